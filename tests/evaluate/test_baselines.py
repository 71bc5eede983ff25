"""Blind baselines answer from training examples, and learned ones from the question."""

import dataclasses

import pytest
from support.toy import Toy, sets_of, toy_config

from unimed_jax.data.box_text import text_to_box
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError
from unimed_jax.evaluate import baselines, tasks, text_only


@pytest.fixture
def config():
    return toy_config()


def make(task, question="", answer="", name="x", **meta):
    return Example(name, task, question, answer, meta=meta)


def fit(task, train):
    """Fits blind baselines, by name, that answer one example."""
    return {
        name: lambda e, b=baseline: b([e])[0]
        for name, baseline in baselines.fit(task, train).blind.items()
    }


def test_majority_per_template_and_per_question():
    train = [make("vqa", "a?", answer, template="t") for answer in ("yes", "yes", "no")]
    train += [make("vqa", "b?", answer, template="t") for answer in ("no", "no", "no")]
    train += [make("vqa", "c?", "lung", template="u"), make("cls", "", "disc", template="t")]
    fitted = fit("vqa", train)
    per_template, per_question = fitted["majority_per_template"], fitted["majority_per_question"]
    assert per_template(make("vqa", "a?", template="t")) == "no"
    assert per_question(make("vqa", "a?", template="t")) == "yes"
    assert per_question(make("vqa", "unseen?", template="u")) == "lung"
    assert per_template(make("vqa", "a?", template="unseen")) == "no"
    # equals: the first in training order, not in the alphabet
    assert baselines.most_frequent(["c", "b", "a", "b", "a"]) == "b"
    ties = [make("vqa", "d?", answer, template="v") for answer in ("right", "left", "left", "right")]
    assert fit("vqa", ties)["majority_per_question"](make("vqa", "d?", template="v")) == "right"
    assert fit("vqa", ties[1:])["majority_per_question"](make("vqa", "d?", template="v")) == "left"
    assert baselines.fit("qa", train) == baselines.Fitted() and not fit("qa", train)


def test_median_box_per_prompt_and_plane():
    boxes = {
        "axial": ["{<0><0><10><10>}", "{<2><2><12><12>}", "{<90><4><99><14>}"],
        "sagittal": ["{<50><50><60><60>}"],
    }
    train = [
        make("refer", "disc", text, plane=plane) for plane, texts in boxes.items() for text in texts
    ]
    train.append(make("refer", "bar", "{<20><20><30><30>}", plane="axial"))
    fitted = fit("refer", train)
    asked = make("refer", "disc", plane="axial")
    assert fitted["median_box_per_prompt"](asked) == "{<26><3><36><13>}"
    assert fitted["median_box_per_prompt_and_plane"](asked) == "{<2><2><12><12>}"
    assert (
        fitted["median_box_per_prompt_and_plane"](make("refer", "bar", plane="coronal"))
        == "{<20><20><30><30>}"
    )
    assert text_to_box(fitted["median_box_per_prompt"](make("refer", "unseen"))) is not None
    assert list(fit("refer", [make("refer", "disc", "{<0><0><9><9>}")])) == ["median_box_per_prompt"]
    with pytest.raises(UserError, match="record bad: no box"):
        baselines.fit("refer", [make("refer", "disc", "on the left", name="bad")])


def test_nearest_boxes_vote_with_25_neighbours():
    near = [make("identify", f"{{<{i}><0><50><50>}}", "near") for i in range(13)]
    ring = [make("identify", f"{{<{i}><0><50><50>}}", "ring") for i in range(20, 32)]
    far = [make("identify", "{<60><60><90><90>}", "far")] * 40
    answer = fit("identify", far + ring + near)["nearest_25_boxes"]
    assert answer(make("identify", "{<0><0><50><50>}")) == "near"  # 13 against 12
    assert answer(make("identify", "box {<61><60><90><90>}")) == "far"
    assert fit("identify", near[:1])["nearest_25_boxes"](make("identify", "{<9><9><10><10>}")) == "near"


def test_medoid_report_is_the_most_typical():
    typical = "the left ventricle is wide and the brain is small"
    reports = (
        [f"{typical} {end}" for end in ("today", "here", "now")]
        + [typical]
        + ["nothing to see here at all"] * 2
    )
    assert baselines.medoid(reports) == typical
    assert baselines.medoid(reports * 500) == typical  # sampled, evenly
    assert baselines.medoid(["x"]) == "x"


def test_learned_baselines_read_the_question_and_its_template():
    train = [
        make("vqa", f"is the {organ} big {i}?", organ, template="t")
        for organ in ("heart", "lung")
        for i in range(5)
    ]
    train += [make("vqa", "is it seen?", answer, template=answer) for answer in ("yes", "no")]
    fitted = fit("vqa", train)
    assert set(fitted) == {
        "majority_per_template",
        "majority_per_question",
        "tfidf_logistic",
        "nearest_question",
    }
    for name in ("tfidf_logistic", "nearest_question"):
        assert fitted[name](make("vqa", "how big is the lung now?", template="t")) == "lung"
        assert fitted[name](make("vqa", "is it seen?", template="no")) == "no"
        assert fitted[name](make("vqa", "is it seen?", template="yes")) == "yes"


def test_nearest_question_merges_equal_questions_by_task():
    boxes = [make("refer", "disc", f"{{<{i}><0><50><50>}}") for i in (1, 2, 9)] + [
        make("refer", "bar", "{<7><7><8><8>}")
    ]
    nearest = fit("refer", boxes)["nearest_question"]
    assert (
        nearest(make("refer", "the disc")) == "{<2><0><50><50>}"
        and nearest(make("refer", "bar")) == "{<7><7><8><8>}"
    )
    assert "tfidf_logistic" not in fit("refer", boxes)
    reports = [make("caption", "head", text) for text in ("a b c d", "a b c d e", "x")] + [
        make("caption", "knee", "k")
    ]
    assert fit("caption", reports)["nearest_question"](make("caption", "head")) == "a b c d"
    assert list(fit("caption", [make("caption", "", "a"), make("caption", "", "b")])) == [
        "medoid_report"
    ]


def test_in_qa_the_learned_baselines_are_peers():
    train = [
        make("qa", f"{word} {i}?", word, template="t") for word in ("heart", "lung") for i in range(4)
    ]
    fitted = baselines.fit("qa", train)
    assert list(fitted.blind) == ["majority_per_template"] and set(fitted.peers) == {
        "tfidf_logistic",
        "nearest_question",
    }
    assert fitted.peers["tfidf_logistic"]([make("qa", "lung or what?", template="t")]) == ["lung"]


def test_learned_baselines_are_bounded_and_deterministic(monkeypatch):
    monkeypatch.setattr(text_only, "MAX_TEXTS", 60)
    monkeypatch.setattr(text_only, "MAX_CLASSES", 3)
    train = [make("vqa", f"word{i} of kind{i % 7}?", f"answer{i % 7}") for i in range(400)]
    train += [make("vqa", "which kind0?", "answer0")] * 50
    seen = []
    vectoriser = text_only._vectoriser
    monkeypatch.setattr(
        text_only, "_vectoriser", lambda texts: seen.append(len(texts)) or vectoriser(texts)
    )
    asked = [make("vqa", f"some kind{i}?") for i in range(7)]
    first, again = (baselines.fit("vqa", order) for order in (train, train[::-1]))
    assert max(seen) <= 60
    for name in ("tfidf_logistic", "nearest_question"):
        assert first.blind[name](asked) == again.blind[name](asked)
    assert len(set(first.blind["tfidf_logistic"](asked))) <= 3


def test_texts_without_a_word_have_no_learned_baseline():
    train = [make("vqa", "?", "yes"), make("vqa", "!", "no")]
    assert set(fit("vqa", train)) == {"majority_per_template", "majority_per_question"}


def test_an_external_set_is_measured_against_the_training_sources(config):
    """Baselines of a set that is not trained on are fitted on the training sets."""
    trained, outside = Toy(id="trained"), Toy(id="outside")
    settings = dataclasses.replace(config.evaluate, sources=({"name": "outside"},))
    training = tasks.Training(config, sets_of(trained))
    units, _ = tasks.units_of(dataclasses.replace(config, evaluate=settings), sets_of(outside))
    assert [e.id for e in training.of(units[0])] == [
        e.id for e in trained.rows["train"] if e.task == "vqa"
    ]
    own = tasks.Training(config, sets_of(trained, outside))
    assert own.of(units[0])[0] is outside.rows["train"][0]
