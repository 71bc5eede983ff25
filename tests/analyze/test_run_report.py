"""report.html: what it holds, what it never holds, and mistakes."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from support.toy import Says, Toy, evaluated, sets_of, toy_config

from unimed_jax import main as cli
from unimed_jax.analyze.run_report import facts, page, plots, tiles
from unimed_jax.analyze.run_report.markup import Markup, cell, escaped, joined, prose, tag
from unimed_jax.errors import UserError
from unimed_jax.evaluate import scores, tasks
from unimed_jax.evaluate.metrics import captions
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.run import _about, _reader
from unimed_jax.files import write_json
from unimed_jax.runs import environment

EVIL = "</style></title></svg><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;b&gt;\u202e"
WORDS = (
    "html head meta title style body a p header h1 h2 h3 nav main section footer ul li b span div table "
    "caption thead tbody tr th td details summary figure figcaption img svg rect line circle polyline "
    "text dl dt dd label input q code pre em br small"
)
TAGS = set(WORDS.split())
EMPTY = {"meta", "img", "input", "br"}


class Reader(HTMLParser):
    """Notes every element with its attributes and all text; fails where ends do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.said = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.said.append(data)


class Evil(Toy):
    """Says markup wherever a data set can say anything."""

    def example(self, split, s, task, i):
        example = super().example(split, s, task, i)
        if task in ("vqa", "qa"):
            example = dataclasses.replace(
                example,
                question=f"{EVIL} {example.question}",
                meta={"template": EVIL + example.meta["template"]},
            )
        return example


def scored(folder, toy, say=lambda e: e.answer, **config):
    """Scores a toy and writes all files of an evaluation into the folder."""
    settings = dataclasses.replace(toy_config(), **config)
    sets = sets_of(toy)
    found, notes = tasks.units_of(settings, sets)
    parts = evaluated(Says(say), [toy], settings, folder)
    routing = {
        "tv_trained": {"value": 0.25, "ci95": [0.2, 0.3]},
        "mean_weights": np.full((5, 3), 1 / 3),
        "maps": np.full((5, settings.model.tokens_per_image, 3), 1 / 3),
    }
    metrics = scores.summarise(settings, parts, _about(sets, found), [*notes, EVIL], 7, routing)
    write_report(folder, settings, metrics, parts, _reader(sets), routing, f"--run={folder}")
    return folder


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """Two scored runs of a hostile set, the first with everything a page can show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "find_java", lambda: None)
        patch.setattr("unimed_jax.evaluate.report.draw_predictions", lambda *arguments: None)
        patch.setattr("unimed_jax.evaluate.report.draw_routing", lambda *arguments: None)
        toy = Evil(per_task=6, note=EVIL)
        toy.info = dataclasses.replace(toy.info, licence=EVIL, citation=EVIL)
        top = tmp_path_factory.mktemp("runs")
        folders = [
            scored(top / "one", toy, lambda e: EVIL if e.task in ("vqa", "caption") else e.answer),
            scored(top / "two", toy),
        ]
    one = folders[0]
    log = [{"step": n, "train/loss": 5 / (n + 1), EVIL: n, "off": float("nan")} for n in range(100)]
    (one / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in log).replace("NaN", "null")
    )
    write_json(one / "environment.json", {"sessions": [{"command": f"python {EVIL}", "python": "3"}]})
    write_json(one / "inputs.json", {"inputs": {EVIL: "c" * 64}, "changes": []})
    entry = {"value": 0.5, "ci95": [0.25, 0.75]}
    reliance = {
        "n": 6, "metric": "exact_match", "best_blind": EVIL, "blind": {EVIL: entry}, "templates": {},
        "passes": {"own_image": entry, "other_image": {"value": 0.125, "ci95": None}},
        "scores": {"visual_reliance_score": entry},
    }  # fmt: skip
    (one / "reliance").mkdir()
    content = {"split": "test", "definitions": {"a": EVIL}, "sets": {"toy": {"vqa": reliance}}}
    metrics = json.loads((one / "metrics.json").read_text())
    content |= {key: metrics[key] for key in ("step", "data_checksum")}
    write_json(one / "reliance" / "reliance.json", content)
    units = {"names": ["vqa", EVIL], "absent": ["qa"], "cos": [[1.0, -0.5], [-0.5, 1.0]]}
    units |= {"magnitude": [[1.0, None], [0.5, 1.0]], "indices": {"mean_cos": entry}}
    tug = {"run": f"/a/{EVIL}", "connector": "linear", "step": 3, "units": {"connector": units}}
    (one / "analysis").mkdir()
    write_json(one / "analysis" / "tug_of_war.json", {"runs": [tug]})
    leaks = {
        "leaks": {"image": {"train_test": 2}, "cluster": {"train_test": 0}},
        "checksum": toy.checksum,
    }
    (one / "check").mkdir()
    content = {
        "sets": {"toy": {**leaks, "checksum": "other", "by_design": {"image": EVIL}, "cluster": EVIL}}
    }
    write_json(one / "check" / "check.json", content)
    data = facts.Data(None)
    data.sets, data.missing = sets_of(toy), ""
    return folders, data


def read(evil, count=1):
    folders, data = evil
    signs = ["A", "B"][:count] if count > 1 else [""]
    runs = [facts.gather(f, f.name, sign) for f, sign in zip(folders, signs, strict=False)]
    return page.page(runs, data)


@pytest.mark.parametrize("count", [1, 2])
def test_what_data_says_never_becomes_markup(evil, count):
    found = Reader(read(evil, count))
    assert {name for name, _ in found.elements} <= TAGS  # no script, link, iframe, form or object
    for name, attributes in found.elements:
        assert not any(key.startswith("on") for key in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
        assert "url(" not in attributes.get("style", "")
        if name == "style":
            assert not attributes
    said = "".join(found.said)
    assert said.count(EVIL[:60]) > 10  # it is there, as text
    policy = next(a["content"] for n, a in found.elements if n == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_a_page_shows_all_that_is_known(evil):
    found = Reader(read(evil))
    said = "".join(found.said)
    for words in (
        "not a medical device",
        "Corrected scores on test",
        "By question template",
        "As published",
        "another case's image",
        "Relies on the image: vqa.",
        "train/loss",
        "Mean routing weight by task",
        "connector: magnitude similarity",
        "images with the very same pixels (by design: ",
        "train → test",
        "The audit is of another state of this set.",
        "To train again:",
        "evaluate --run=",
        "toy: splits",
        "true box 2, 2, 12, 14",
        "IoU 0.9",
    ):
        assert words in said, words
    shown = [a for n, a in found.elements if n == "img"]
    assert len(shown) == 5 * 6 and {a["width"] for a in shown} == {"48"}
    figures = [a for n, a in found.elements if n == "figure" and "tabindex" in a]
    assert len(figures) == 6 * 6 and {"wrong", "right"} == {a["class"] for a in figures}
    assert "off" not in said.split()  # a value that was never a number has no curve


def test_runs_side_by_side_share_pictures_and_differ_in_answers(evil):
    found = Reader(read(evil, 2))
    said = "".join(found.said)
    assert "2 runs side by side" in said and "Settings that differ" in said
    assert len([1 for n, _ in found.elements if n == "img"]) == 5 * 6
    signs = [a["class"] for n, a in found.elements if a.get("class", "").startswith("sign")]
    assert signs.count("sign run0") > 40 and signs.count("sign run1") > 40
    assert "Not measured" in said  # of the second run


def test_pictures_have_a_budget(evil, monkeypatch):
    monkeypatch.setattr(tiles, "BYTES", 2000)
    text = read(evil)
    images = re.findall(r"data:image/png;base64,[^\"]*", text)
    assert images and sum(map(len, images)) <= 2000
    assert f"{5 * 6 - len(images)} pictures were left out" in text
    large = tiles._Budget()
    monkeypatch.setattr(tiles, "BYTES", 1 << 20)
    noise = np.random.default_rng(0).integers(0, 255, (900, 700, 3), np.uint8)
    assert large.url(noise).startswith("data:image/jpeg") and large.used < 200_000


def test_without_its_data_a_page_says_so(evil, tmp_path):
    (folder, _), _ = evil
    place = page.write([folder], tmp_path / "page.html")
    text = place.read_text()
    assert "There are no pictures" in text and "<img" not in text


def test_markup_is_escaped_once():
    assert escaped("a<b>&\"'\x00\ud800") == "a&lt;b&gt;&amp;&quot;&#x27;\ufffd\ufffd"
    assert escaped(Markup("<b>")) == "<b>" and escaped(None) == "" and joined([1, "<"]) == "1&lt;"
    assert tag("a", "x", href='"><', class_="c", hidden=True, id=None) == (
        '<a href="&quot;&gt;&lt;" class="c" hidden>x</a>'
    )
    assert cell("`<x>`") == "<code>&lt;x&gt;</code>" and "chip good" in cell("above blind")
    assert prose("*a* `b` <c>") == "<p><em>a</em> <code>b</code> &lt;c&gt;</p>"


def test_curves_are_thinned_and_axes_named():
    steps = np.arange(1000.0)
    text = plots.curve("loss", [plots.Series(0, "", steps, 1 / (1 + steps))])
    assert text.count("<circle") == plots.POINTS and ">step 10<" in text
    flat = plots.curve("flat", [plots.Series(0, "", steps[:1], np.zeros(1))])
    assert "nan" not in flat and flat.count("<circle") == 1
    assert [plots.short(v) for v in (0, 0.12345, 5e-4, 123456)] == ["0", "0.123", "5e-4", "1.2e5"]
    assert plots._ticks(0.0, 1.0) == [0.0, 0.5, 1.0]


def test_mistakes_are_one_sentence(evil, tmp_path, capsys):
    (one, two), _ = evil
    cases = {
        (str(tmp_path / "none"),): "is not a folder",
        (str(tmp_path),): "does not exist; score the run first",
        (str(one), str(one)): "named twice",
        tuple(map(str, [one] * 9)): "too many for one page",
        (str(one), f"--check={tmp_path / 'no.json'}"): "does not exist",
        (str(one), f"--out={tmp_path}"): "is a folder",
    }
    for words, said in cases.items():
        assert cli.main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    for change in ({"sets": {}, "data": 3}, {"split": "val"}):
        (tmp_path / "other").mkdir(exist_ok=True)
        metrics = json.loads((two / "metrics.json").read_text()) | change
        write_json(tmp_path / "other" / "metrics.json", metrics)
        with pytest.raises(UserError, match="another form|different splits"):
            page.write([two, tmp_path / "other"], tmp_path / "x.html")


def test_an_evaluation_stands_without_its_page(evil, monkeypatch, capsys):
    (_, two), _ = evil
    page.write_page(two, toy_config())
    assert (two / "report.html").is_file() and "wrote" in capsys.readouterr().out
    monkeypatch.setattr(page, "write", lambda *arguments, **named: raised("the disk is full."))
    page.write_page(two, toy_config())
    assert "was not written: the disk is full." in capsys.readouterr().out
    page.write_page(two / "none", toy_config())
    assert capsys.readouterr().out == ""


def raised(sentence):
    raise UserError(sentence)


def test_the_verb_writes_the_page(evil, capsys):
    (one, two), _ = evil
    assert cli.main(["report", str(one), str(two)]) == 0
    assert (one / "reports.html").is_file() and "reports.html (0." in capsys.readouterr().out


def test_the_environment_is_kept_once_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/unimed_jax/main.py", "train", "--config=a b.py"])
    environment.keep(tmp_path)
    environment.keep(tmp_path)
    (only,) = environment.kept(tmp_path)
    assert only["command"] == "python -m unimed_jax.main train '--config=a b.py'"
    assert only["devices"].endswith("cpu") and only["packages"]["jax"]
    monkeypatch.setattr("sys.argv", ["pytest"])
    environment.keep(tmp_path)
    assert [one["command"] for one in environment.kept(tmp_path)][1:] == [""]
    (tmp_path / environment.FILE).write_text("{}")
    assert environment.kept(tmp_path) == []
