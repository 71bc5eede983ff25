"""Answers with the own image, without it, with others, and in other words: planted models and files."""

import dataclasses
import json

import numpy as np
import pytest
from support.toy import Toy, sets_of, toy_config

from unimed_jax.analyze import reliance, reliance_report
from unimed_jax.analyze.reliance import BLANK, GREY, OTHER, OWN, TEXT
from unimed_jax.data.example import Example
from unimed_jax.data.forms import INSTRUCTIONS
from unimed_jax.errors import UserError
from unimed_jax.evaluate import baselines, tasks
from unimed_jax.evaluate.metrics import captions, find
from unimed_jax.evaluate.run import records_of
from unimed_jax.predict.request import Picture, Request
from unimed_jax.verdicts import reliance_verdict


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)


class Fake:
    """Answers requests with a function of the example and the changed request; counts its calls."""

    def __init__(self, say, dies_after=None):
        self.say, self.calls, self.dies_after = say, 0, dies_after

    def __call__(self, change):
        def answer(passes, ended):
            if self.calls == self.dies_after:
                raise KeyboardInterrupt
            self.calls += 1
            (questions,) = passes
            return [[self.say(q.example, self.request(q, change)) for q in questions]]

        return lambda calls: answer

    def request(self, question, change):
        example = question.example
        return change(Request(example.task, example.question, question.images, id=example.id))


def brightness(request):
    """What a model sees of the toy's images: their grey level, and nothing of a prompt without one."""
    return int(request.images[0].read()[0, 0, 0]) if request.images and request.show_images else -1


def reads(example, request):
    return example.answer if brightness(request) != GREY and brightness(request) >= 0 else ""


def asked(say, folder, toy, dies_after=None):
    """Asks all units of a toy; returns units, answers, journals and how often it was asked."""
    config = toy_config()
    units, _ = tasks.units_of(config, sets_of(toy))
    other, _ = reliance.with_other_images(units)
    fake = Fake(say, dies_after)
    return units, *reliance.ask(units, other, fake, folder, "f", config.seed, 16), fake.calls


def measured(say, folder, toy=None, blind=False):
    """Scores what `asked` gives, by task."""
    config, toy = toy_config(), toy or Toy(per_task=12)
    units, answers, *_ = asked(say, folder, toy)
    found, training = {}, tasks.Training(config, sets_of(toy))
    for unit in units:
        fitted = baselines.simple(unit.task, training.of(unit)) if blind else {}
        guesses = {name: baseline(unit.examples) for name, baseline in fitted.items()}
        passes, records = reliance.texts_of(unit, answers), records_of(unit, answers[OWN], {})
        found[unit.task] = reliance.scores_of(unit, records, passes, guesses, config)
    return found


def values(entry):
    return {name: score["value"] for name, score in entry["scores"].items()}


def test_a_model_that_ignores_the_image_has_no_sensitivity(tmp_path):
    found = measured(lambda example, request: example.answer, tmp_path)
    assert values(found["qa"]) == {"flip_rate": 0.0}
    for task, entry in found.items():
        if task != "qa":
            scores = values(entry)
            assert scores["image_sensitivity"] == scores["visual_reliance_score"] == 0.0
            assert scores["hallucinated_visual_reasoning_rate"] == scores["dangerous"] == 1.0
            assert scores["text_only_drop"] == scores["blank_drop"] == scores["flip_rate"] == 0.0
            assert entry["scores"]["image_sensitivity"]["ci95"] == [0.0, 0.0]
            assert reliance_verdict(entry["scores"]["visual_reliance_score"]) == "undecided"
            assert entry["passes"][TEXT] == entry["passes"][OWN]


def test_a_model_that_reads_the_image_has_more(tmp_path):
    toy = Toy(per_task=12)
    right = {e.id: int(toy.image(e.images[0])[0, 0, 0]) for e in toy.examples("test") if e.images}

    def sees(example, request):
        return example.answer if brightness(request) == right.get(example.id, -1) else ""

    found = measured(sees, tmp_path, toy, blind=True)
    for task, entry in found.items():
        if task != "qa":
            scores = values(entry)
            own = entry["passes"][OWN]["value"]
            assert scores["image_sensitivity"] == 1.0 and scores["visual_reliance_score"] == own > 0.8
            assert scores["hallucinated_visual_reasoning_rate"] == scores["dangerous"] == 0.0
            assert scores["text_only_drop"] == scores["blank_drop"] == own
            assert {
                e["value"] for name, e in entry["passes"].items() if name in (TEXT, BLANK, OTHER)
            } == {0}
            assert entry["quadrants"]["ideal"]["value"] == 1.0
            verdict = reliance_verdict(entry["scores"]["visual_reliance_score"])
            assert verdict == "relies on the image"
            assert entry["best_blind"] in entry["blind"] and entry["blind"]
    assert found["vqa"]["templates"]["what"]["image_sensitivity"]["value"] == 1.0


def test_sensitivity_counts_changes_and_reliance_scores(tmp_path):
    """A model that answers by any image's brightness changes its answers and gains nothing."""
    toy = Toy(per_task=12, left_out=("vqa", "refer", "identify", "caption", "qa"))
    found = measured(lambda example, request: f"level {brightness(request)}", tmp_path, toy)
    scores = values(found["cls"])
    assert scores["image_sensitivity"] == 1.0 and scores["visual_reliance_score"] == 0.0


def test_an_empty_answer_or_no_box_claims_nothing(tmp_path):
    toy = Toy(per_task=12, left_out=("vqa", "identify", "caption", "qa"))
    found = measured(lambda example, request: "", tmp_path / "a", toy)
    assert values(found["cls"])["hallucinated_visual_reasoning_rate"] == 0.0
    found = measured(lambda example, request: "a box", tmp_path / "b", toy)
    assert values(found["cls"])["hallucinated_visual_reasoning_rate"] == 1.0
    assert values(found["refer"])["hallucinated_visual_reasoning_rate"] == 0.0
    assert values(found["refer"])["image_sensitivity"] == 0.0


def test_flips_are_counted_over_all_wordings(tmp_path):
    def worded(example, request):
        even = int(example.id.rpartition("-")[2]) % 2 == 0
        return f"{even and request.wording == 2}"

    found = measured(worded, tmp_path)
    for task, entry in found.items():
        assert values(entry)["flip_rate"] == 0.5
        flips = {name: part["value"] for name, part in entry["wordings"].items()}
        assert flips == {f"flips_{i}": 0.5 if i == 2 else 0.0 for i in range(1, len(INSTRUCTIONS[task]))}
    assert (
        found["vqa"]["quadrants"]["worst"]["value"]
        == 0.5
        == found["vqa"]["quadrants"]["dangerous"]["value"]
    )


def test_other_images_leave_case_cluster_and_image():
    units, _ = tasks.units_of(toy_config(), sets_of(Toy()))
    other, notes = reliance.with_other_images(units)
    assert [unit.task for unit in other] == ["vqa", "refer", "identify", "caption", "cls"] and not notes
    again, _ = reliance.with_other_images(units)
    for unit, changed, same in zip(units, other, again, strict=False):
        homes = {e.images[0]: e.cluster for e in unit.examples}
        for own, e in zip(unit.examples, changed.examples, strict=True):
            assert homes[e.images[0]] != own.cluster and dataclasses.replace(e, images=own.images) == own
        assert changed.examples == same.examples


@pytest.mark.parametrize("shared", [True, False])
def test_where_no_other_case_can_be_given_it_is_said(shared):
    """One case has most examples, or two cases have the same images."""
    units, _ = tasks.units_of(toy_config(), sets_of(Toy()))
    examples = [
        Example(str(i), "cls", "", "", (str(i % 2),), cluster=str(i // 2 % 2))
        if shared
        else Example(str(i), "cls", "", "", (str(i),), cluster="all")
        for i in range(8)
    ]
    (unit,) = [dataclasses.replace(unit, examples=examples) for unit in units if unit.task == "cls"]
    other, (note,) = reliance.with_other_images([unit])
    assert not other and "toy/test/cls: not asked about other cases' images" in note


def test_a_killed_command_goes_on(tmp_path):
    toy = Toy(left_out=("vqa", "identify", "caption"))  # two batches of refer, of cls and of qa
    _, whole, journals, calls = asked(reads, tmp_path / "whole", toy)
    for journal in journals:
        journal.remove()
    assert not list((tmp_path / "whole").iterdir())
    with pytest.raises(KeyboardInterrupt):
        asked(reads, tmp_path / "cut", toy, dies_after=calls // 2)
    _, again, _, rest = asked(reads, tmp_path / "cut", toy)
    assert again == whole and rest == calls - calls // 2
    assert asked(reads, tmp_path / "cut", toy)[-1] == 0


def test_text_alone_has_nothing_to_rely_on(tmp_path, monkeypatch):
    toy = Toy(per_task=2, left_out=("vqa", "refer", "identify", "caption", "cls"))
    monkeypatch.setattr(reliance, "open_sets", lambda data: sets_of(toy))
    with pytest.raises(UserError, match="split 'test' of .* has no example with an image; name another"):
        reliance.measure_reliance(None, toy_config(), tmp_path / "out")


def test_a_blank_image_is_grey_and_as_large():
    image = np.zeros((4, 6, 3), np.uint8)
    picture = Picture("one", lambda: image)
    (grey,) = reliance.changes()[BLANK](Request("cls", images=(picture,))).images
    assert grey.key != picture.key and grey.key == picture.changed("grey", lambda it: it).key
    blank = grey.read()
    assert blank.shape == image.shape and (blank == 128).all() and blank.dtype == np.uint8


def test_page_and_picture(tmp_path):
    found = measured(reads, tmp_path, blind=True)
    metrics = {"name": "toy", "split": "test", "step": 3, "definitions": reliance.DEFINITIONS}
    metrics |= {"sets": {"toy": found}, "notes": ["something"]}
    lines = [{"id": "a", "answers": {OWN: "x"}}]
    reliance_report.write(tmp_path / "out", metrics, lines)
    assert json.loads((tmp_path / "out" / "reliance.jsonl").read_text()) == lines[0]
    assert json.loads((tmp_path / "out" / "reliance.json").read_text())["sets"]["toy"]["vqa"]["n"] == 12
    assert (tmp_path / "out" / "reliance.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "reliance.md").read_text()
    for piece in (
        "| toy | refer | 12 | miou |",
        "HVRR",
        "2603.03437",
        "2603.20985",
        "- something.",
        "score by wording",
    ):
        assert piece in page


def test_a_metric_that_is_not_computed_is_one_sentence(tmp_path):
    toy = Toy(per_task=12, left_out=("vqa", "refer", "identify", "caption", "qa"))
    (unit,), answers, *_ = asked(reads, tmp_path, toy)
    unit = dataclasses.replace(unit, metrics=(find("green"),))
    records = records_of(unit, answers[OWN], {})
    with pytest.raises(UserError, match="'green' leads the scores of toy but is not computed: needs"):
        reliance.scores_of(unit, records, reliance.texts_of(unit, answers), {}, toy_config())
