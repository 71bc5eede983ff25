"""Scored runs and another tool's answers beside the first run: planted differences and refusals."""

import dataclasses
import json
import re
import shutil

import pytest
from scipy.stats import binomtest
from support.toy import Says, Toy, evaluated, sets_of, toy_config

from unimed_jax import main
from unimed_jax.analyze.compare import compare
from unimed_jax.analyze.compare_report import table
from unimed_jax.errors import UserError
from unimed_jax.evaluate import scores, tasks
from unimed_jax.evaluate.metrics import Measure, NotComputed, captions, registry
from unimed_jax.evaluate.run import _about
from unimed_jax.provenance import plain


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder of scores of a model that knows everything but every fifth answer."""
    config, toy, folder = toy_config(), Toy(), tmp_path_factory.mktemp("compare") / "first"
    folder.mkdir()
    says = Says(lambda e: e.answer if int(e.id.rpartition("-")[2]) % 5 else "")
    found, notes = tasks.units_of(config, sets_of(toy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "find_java", lambda: None)  # METEOR takes 9 s to start
        parts = evaluated(says, toy, config, folder)
    metrics = scores.summarise(config, parts, _about(sets_of(toy), found), notes, 7)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = [json.dumps(plain(record)) + "\n" for part in parts for record in part.records]
    (folder / "predictions.jsonl").write_text("".join(lines))
    return folder


def answers(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def changed(scored, folder, say=None, metrics=None):
    """Copies the scores with other answers, or with a text of metrics.json replaced."""
    shutil.copytree(scored, folder)
    if say:
        lines = [json.dumps(say(record)) + "\n" for record in answers(folder)]
        (folder / "predictions.jsonl").write_text("".join(lines))
    if metrics:
        text = (folder / "metrics.json").read_text()
        assert metrics[0] in text
        (folder / "metrics.json").write_text(text.replace(*metrics))
    return folder


def rows(found, kind="tasks"):
    return {(row["task"], row["template"]): row for row in found[kind]}


def test_a_run_beside_itself_is_undecided(scored, tmp_path):
    found = compare([scored, changed(scored, tmp_path / "same")])
    assert len(found["tasks"]) == 6 and not found["notes"]
    for row in found["tasks"] + found["templates"]:
        assert (row["difference"], row["p_holm"], row["verdict"]) == (0.0, 1.0, "undecided")
        assert row["first"] == row["value"] and row["detectable"] is None


def test_a_planted_difference_is_found_with_its_sign(scored, tmp_path):
    def forgets(record):
        return record | {"prediction": ""} if record["task"] in ("vqa", "refer") else record

    worse = changed(scored, tmp_path / "worse", forgets)
    for places, verdict in (([scored, worse], "worse"), ([worse, scored], "better")):
        found = compare(places)
        for (task, _), row in rows(found).items():
            planted = task in ("vqa", "refer")
            assert row["verdict"] == (verdict if planted else "undecided"), row
            assert row["difference"] == pytest.approx(row["value"] - row["first"])
            assert (row["difference"] > 0) == (planted and verdict == "better")
            assert (row["p_mcnemar"] is None) == (task in ("refer", "caption"))
            assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]
        vqa, right = rows(found)["vqa", ""], sum(bool(r["prediction"]) for r in answers(scored)[:24])
        assert vqa["n"] == 24 and vqa["clusters"] == 6
        assert vqa["p_mcnemar"] == binomtest(0, right).pvalue <= vqa["p"] < 0.05
        assert {key for key in rows(found, "templates") if key[0] == "vqa"} == {
            ("vqa", "seen"),
            ("vqa", "what"),
        }
        assert ("cls", "shape") not in rows(found, "templates")  # it is all of cls


def test_n_and_clusters_are_those_that_the_metric_counts(scored, tmp_path, leading):
    first = sorted({record["cluster"] for record in answers(scored) if record["task"] == "vqa"})[:2]

    def of_two_clusters(records):
        return Measure.mean([1.0] * len(records)).where([r["cluster"] in first for r in records])

    leading("vqa", of_two_clusters)
    row = rows(compare([scored, changed(scored, tmp_path / "same")]))["vqa", ""]
    assert (row["n"], row["clusters"]) == (8, 2)


def test_other_settings_of_decoding_are_noted(scored, tmp_path):
    other = changed(scored, tmp_path / "other")
    kept = json.loads((other / "metrics.json").read_text())
    kept["evaluate"]["temperature"] = 0.7
    (other / "metrics.json").write_text(json.dumps(kept))
    (note,) = compare([scored, other])["notes"]
    assert note == "evaluate.temperature is 0.0 for first and 0.7 for other"


def test_a_template_without_a_name_has_its_own_cell(scored, tmp_path):
    def unnamed(record):
        return record | {"template": "" if record["template"] == "seen" else record["template"]}

    one = changed(scored, tmp_path / "one", unnamed)
    found = compare([one, changed(scored, tmp_path / "two", unnamed)])
    lines = [re.split(r" *\| *", line)[1:-1] for line in table(found["templates"]).splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert {line[1] for line in lines if line[2] == "vqa"} == {"(none)", "what"}


def test_several_runs_are_corrected_together(scored, tmp_path):
    few = changed(
        scored,
        tmp_path / "few",
        lambda r: r | {"prediction": ""} if r["task"] == "qa" and int(r["id"][-1]) % 2 else r,
    )
    one = rows(compare([scored, few]))["qa", ""]
    others = [changed(scored, tmp_path / f"same{i}") for i in range(3)]
    both = compare([scored, few, *others])
    (row,) = [r for r in both["tasks"] if (r["run"], r["task"]) == ("few", "qa")]
    assert row["p"] == one["p"] and row["p_holm"] == pytest.approx(4 * one["p_holm"]) and row["p"] > 0
    assert [run["name"] for run in both["runs"]] == ["first", "few", "same0", "same1", "same2"]


def test_answers_of_another_tool_stand_beside_a_run(scored, tmp_path):
    kept = [record for record in answers(scored) if record["task"] == "vqa"][:20]
    lines = [{"id": r["id"], "prediction": r["reference"]} for r in kept]
    lines += [lines[0] | {"prediction": "no"}, {"id": "toy/test/unknown", "prediction": "x"}]
    file = tmp_path / "theirs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare([scored, file])
    (row,) = found["tasks"]
    assert (row["n"], row["value"], row["verdict"]) == (20, 1.0, "undecided")
    assert "toy/test/vqa: 4 items that only first has" in found["notes"]
    assert found["runs"][1]["notes"] == [
        "1 ids are unknown in first",
        "1 ids are doubled, the first line counts",
    ]
    assert any("first was asked form=unimed fit=stretch" in note for note in found["notes"])
    assert compare([file, scored])["tasks"][0]["difference"] == pytest.approx(-row["difference"])


@pytest.fixture
def leading(monkeypatch):
    """Lets a function of the records lead the scores of a task of all runs."""

    def make(task, score):
        every = dict(registry._METRICS)
        (name,) = (n for n, metric in every.items() if task in metric.primary_for)
        every[name] = dataclasses.replace(every[name], score=score)
        monkeypatch.setattr(registry, "_METRICS", every)

    return make


def test_a_metric_that_counts_other_items_of_each_run_has_no_mcnemar(scored, tmp_path, leading):
    """The share of right ones among the answers that say something."""

    def answered(records):
        right = [r["prediction"] == r["reference"] for r in records]
        return Measure.mean(right).where([bool(r["prediction"]) for r in records])

    leading("qa", answered)
    wrong = changed(scored, tmp_path / "wrong", lambda r: r | {"prediction": r["prediction"] or "?"})
    row = rows(compare([scored, wrong]))["qa", ""]
    assert row["p_mcnemar"] is None and row["first"] == 1.0 and row["value"] < 1.0 and row["p"] < 1


def test_a_task_whose_metric_cannot_be_computed_here_is_said(scored, tmp_path, leading):
    def lacks(records):
        raise NotComputed("not computed: needs Java")

    same = changed(scored, tmp_path / "same")
    leading("caption", lacks)
    found = compare([scored, same])
    assert "caption" not in {row["task"] for row in found["tasks"]} and len(found["tasks"]) == 5
    sentence = "toy/test/caption is not compared: its bleu4_regex_tokens is not computed: needs Java"
    assert found["notes"] == [sentence]
    captions_only = [changed(scored, tmp_path / name) for name in ("one", "two")]
    for folder in captions_only:
        lines = [line for line in answers(folder) if line["task"] == "caption"]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="needs Java; install it, or score the runs by another metric"):
        compare(captions_only)


REFUSED = {
    "another revision": (("toy@cccccccc", "toy@dddddddd"), "two revisions of a data set"),
    "another protocol": (
        ("norm=nfkc-lower-signs", "norm=lower"),
        r"two protocols on toy/test/vqa \(norm",
    ),
    "another metric": (("fit=stretch/exact_match", "fit=stretch/f1"), r"\(exact_match and f1\)"),
    "another version": (('"schema": 1', '"schema": 0'), "another version; score it again"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_whose_scores_are_not_comparable_are_refused(scored, tmp_path, name):
    texts, words = REFUSED[name]
    other = changed(scored, tmp_path / "other", metrics=texts)
    with pytest.raises(UserError, match=words):
        compare([scored, other])


DAMAGED = {
    "no sets": ({"schema": 1}, {}, "is no file of scores that evaluate wrote ('sets')"),
    "empty sets": ({"sets": None}, {}, "is no file of scores that evaluate wrote"),
    "sets of text": ({"sets": {"toy": "x"}}, {}, "is no file of scores that evaluate wrote"),
    "no size": ({}, {"image_size": None}, "not an answer; score it again"),
    "a size of letters": ({}, {"image_size": "ab"}, "not an answer; score it again"),
    "a size of 0": ({}, {"image_size": [0, 5]}, "not an answer; score it again"),
    "a size beyond all numbers": ({}, {"image_size": [10**400, 5]}, "not an answer; score it again"),
    "half a box": ({}, {"box": [1, 2]}, "not an answer; score it again"),
    "one id": ({}, {"id": "toy/test/x"}, "'toy/test/x' stands here a second time; score it again"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_scores_are_one_sentence(scored, tmp_path, name):
    metrics, record, words = DAMAGED[name]
    other = changed(scored, tmp_path / "other", lambda r: r | record if r["task"] == "refer" else r)
    kept = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(
        json.dumps(metrics if "schema" in metrics else {**kept, **metrics})
    )
    with pytest.raises(UserError, match=re.escape(words)):
        compare([scored, other])


def test_mistakes_are_one_sentence(scored, tmp_path, capsys):
    other = changed(scored, tmp_path / "other", lambda r: r | {"id": r["id"] + "x"})
    (tmp_path / "empty").mkdir()
    silent = changed(scored, tmp_path / "silent")
    (silent / "predictions.jsonl").write_text("")
    file = tmp_path / "file.jsonl"
    file.write_text('{"id": "a", "prediction": "b"}\n')
    for words, sentence in {
        (scored,): "compare takes two runs or more",
        (scored, other): "share no item of split 'test' (144 and 144 items)",
        (scored, tmp_path / "empty"): "holds no scores; score the run first",
        (scored, tmp_path / "nowhere"): "does not exist; name a scored run's folder",
        (scored, file): "share no item: none of its 1 ids is known",
        (silent, file): "silent/predictions.jsonl holds no answer; score it again",
        (file, file): "none is a scored folder",
        (scored, scored, "--resamples=1"): "--resamples=1 is out of bounds",
        (scored, scored, "--split=tset"): "share no item of split 'tset'",
    }.items():
        assert main.main(["compare", *map(str, words), f"--out={tmp_path / 'out'}"]) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


def test_the_verb_writes_numbers_page_and_picture(scored, tmp_path, capsys):
    other = changed(scored, tmp_path / "other", lambda r: r | {"prediction": r["reference"]})
    assert main.main(["compare", str(scored), str(other), f"--out={tmp_path / 'out'}"]) == 0
    assert (
        "| toy | vqa | exact_match | 24 | 6 | 0.792 | other | 1.000 | +0.208 ["
        in capsys.readouterr().out
    )
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["first"] == "first" and len(found["tasks"]) == 6
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "# Compared with first" in page and "## Question templates on test" in page
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
