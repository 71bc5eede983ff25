"""report.html: what it holds, what it never holds, and mistakes."""

import dataclasses
import errno
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from support.toy import Says, Toy, evaluated, sets_of, toy_config

from unimed_jax import files, processes
from unimed_jax import main as cli
from unimed_jax.analyze.run_report import examples, facts, page, plots
from unimed_jax.analyze.run_report.markup import Markup, cell, escaped, joined, prose, tag
from unimed_jax.errors import UserError
from unimed_jax.evaluate import scores, tasks
from unimed_jax.evaluate.metrics import captions
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.run import _about, _reader
from unimed_jax.files import write_json
from unimed_jax.runs.folder import write_config

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
    write_config(one, toy_config())
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
    data = facts.Data([])
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
    assert policy.split("; ") == [
        "default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", "base-uri 'none'",
        "form-action 'none'",
    ]  # fmt: skip


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
    monkeypatch.setattr(examples, "BYTES", 2000)
    text = read(evil)
    images = re.findall(r"data:image/png;base64,[^\"]*", text)
    assert images and sum(map(len, images)) <= 2000
    assert f"{5 * 6 - len(images)} pictures were left out" in text
    large = examples._Budget()
    monkeypatch.setattr(examples, "BYTES", 1 << 20)
    noise = np.random.default_rng(0).integers(0, 255, (900, 700, 3), np.uint8)
    assert large.url(noise).startswith("data:image/jpeg") and large.used < 200_000


def test_without_its_data_a_page_says_so(evil, tmp_path):
    (_, folder), _ = evil
    place = page.write([folder], tmp_path / "page.html")
    text = place.read_text()
    assert "Pictures are missing" in text and "<img" not in text


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
        (str(one), f"--out={one / 'metrics.json'}"): "is not the name of a page",
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


# ---- folders that are not whole --------------------------------------------------------------------
@pytest.fixture
def copied(evil, tmp_path):
    """A copy of the first run, and the data."""
    folders, data = evil
    return shutil.copytree(folders[0], tmp_path / "a < b"), data


def shown(folder, data):
    return page.page([facts.gather(folder, folder.name, "")], data)


def test_what_is_not_there_is_left_out(copied):
    folder, data = copied
    for name in ("log.jsonl", "environment.json", "inputs.json", "predictions.jsonl", "config.json"):
        (folder / name).unlink()
    for name in ("reliance", "analysis", "check"):
        shutil.rmtree(folder / name)
    said = "".join(Reader(shown(folder, data)).said)
    for words in ("No log of the training", "No answers were kept", "Not measured.", "Not audited: "):
        assert words in said, words
    assert f"'--out={folder}/check'" in said  # as a shell takes a name with spaces
    assert "To score again" not in said and "--run=" not in said  # no model lies there


def test_damaged_files_are_one_sentence(copied):
    folder, _ = copied
    log = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(log + '{"step": 100, "late": 1}\n{"step": 101, "tra')  # killed
    assert ">late<" in page.write([folder]).read_text()  # the cut line alone is left out
    before = (folder / "report.html").read_bytes()
    line = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
    metrics = json.loads((folder / "metrics.json").read_text())
    for name, content, said in (
        ("log.jsonl", '{"step": 1, "loss": NaN}\n', "NaN is not a number"),
        ("log.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}\n", "another form"),
        ("metrics.json", '{"sets": ', "is not JSON"),
        ("metrics.json", "[]", "is not a JSON object"),
        ("metrics.json", '{"sets": {}}', "not of this version"),
        ("metrics.json", json.dumps(metrics | {"routing": {"mean_weights": [[0, 0]]}}), "another form"),
        ("predictions.jsonl", '{"id": ', "is not JSON"),
        ("predictions.jsonl", json.dumps({"id": line["id"], "split": "test"}), "another form"),
        ("check/check.json", "3", "is not a JSON object"),
        ("reliance/reliance.json", "{", "is not JSON"),
    ):
        kept = (folder / name).read_bytes()
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=said):
            page.write([folder])
        (folder / name).write_bytes(kept)
    (folder / "predictions.jsonl").write_text(json.dumps(line | {"unknown": 1}) + "\n")
    (folder / "environment.json").write_text("{")
    assert (folder / "report.html").read_bytes() == before
    page.write([folder])


def test_on_a_full_disk_the_old_page_stays(copied, monkeypatch, capsys):
    folder, _ = copied
    (folder / "report.html").write_text("old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    page.write_page(folder, toy_config())
    assert "report.html was not written: " in capsys.readouterr().out
    assert (folder / "report.html").read_text() == "old"
    monkeypatch.setattr(processes, "leads", lambda: False)
    page.write_page(folder, toy_config())
    assert capsys.readouterr().out == ""  # one process of several writes


def test_only_what_was_measured_after_the_scored_step_is_concluded_from(copied):
    folder, data = copied
    file = folder / "reliance" / "reliance.json"
    write_json(file, json.loads(file.read_text()) | {"step": 8})
    text = shown(folder, data)
    assert "Relies on the image" not in text and "Measured after another step" in text


def test_pictures_that_cannot_be_read_are_said_to_be_missing(copied, monkeypatch):
    folder, data = copied
    assert "another state" not in shown(folder, data).replace("The audit is of another state", "")
    monkeypatch.setattr(data.sets["toy"].data, "checksum", "d" * 64)
    monkeypatch.setattr(data.sets["toy"].data, "image", lambda key: raised(f"{key} is damaged."))
    text = shown(folder, data)
    assert text.count(">no picture<") == 5 * 6 and "<img" not in text
    assert "Pictures of toy may differ" in text and "The data here is in another state" in text


def test_long_texts_are_cut_and_the_rest_is_folded(copied):
    folder, data = copied
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        line["prediction"] = "x" * 100_000
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = Reader(shown(folder, data))
    longest = max(len(word) for word in found.said if word.startswith("x"))
    assert longest == examples.LONGEST and max(map(len, found.said)) < 2000


# ---- side by side ----------------------------------------------------------------------------------
def changed(folder, out, metrics, line):
    """A copy of a run whose metrics and lines of predictions.jsonl two functions change."""
    shutil.copytree(folder, out)
    content = json.loads((out / "metrics.json").read_text())
    metrics(content)
    write_json(out / "metrics.json", content)
    lines = [json.loads(text) for text in (out / "predictions.jsonl").read_text().splitlines()]
    kept = [json.dumps(made) + "\n" for made in map(line, lines) if made]
    (out / "predictions.jsonl").write_text("".join(kept))
    return out


def test_runs_of_different_data_stand_side_by_side(evil, tmp_path):
    (_, two), data = evil

    def renamed(metrics):
        metrics["sets"] = {"other": metrics["sets"]["toy"]}
        metrics["data"] = {"other": metrics["data"]["toy"]}

    first = changed(
        two,
        tmp_path / "first",
        lambda metrics: metrics["sets"]["toy"]["test"].pop("caption"),
        lambda line: line if line["task"] != "caption" else None,
    )
    second = changed(two, tmp_path / "second", renamed, lambda line: line | {"set": "other"})
    both = facts.Data([])
    both.sets, both.missing = data.sets | {"other": data.sets["toy"]}, ""
    runs = [facts.gather(f, f.name, s) for f, s in ((first, "A"), (second, "B"))]
    text = page.page(runs, both)
    said = Reader(text).said
    assert {"other: caption", "toy: refer"} <= set(said) and "toy: caption" not in said
    assert text.count("<img") == 4 * 6 + 5 * 6 and "other protocols" not in text


def test_another_question_of_the_same_id_is_no_answer_and_another_protocol_is_marked(evil, tmp_path):
    (_, two), data = evil

    def protocol(metrics):
        metrics["sets"]["toy"]["test"]["vqa"]["protocol"] = "another"

    def asked(line):
        return line | {"reference": "?"} if line["task"] == "cls" else line

    other = changed(two, tmp_path / "changed", protocol, asked)
    runs = [facts.gather(f, f.name, s) for f, s in ((two, "A"), (other, "B"))]
    text = page.page(runs, data)
    assert text.count("other protocols") == 2
    answers = [text.count(f'class="sign run{n}" title="{r.name}">{r.sign}</span> <q>')
               for n, r in enumerate(runs)]  # fmt: skip
    assert answers == [36, 30]
