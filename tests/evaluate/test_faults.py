"""Faults that public harnesses have, and inputs on which libraries differ: what happens here.

Each test is one fault or one row of what nltk, sacrebleu, rouge and rouge-score were measured to do.
"""

import dataclasses

import numpy as np
import pytest
from support.toy import Says, Toy, evaluated, toy_config

from unimed_jax.errors import UserError
from unimed_jax.evaluate import metrics, scores
from unimed_jax.evaluate.metrics import captions, clinical, published, text


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)


def report(said, wanted, cluster="a"):
    return {
        "set": "reports",
        "task": "caption",
        "template": "",
        "cluster": cluster,
        "prediction": said,
        "reference": wanted,
        "box": None,
        "image_size": [9, 9],
        "meta": {},
        "blind": {"medoid_report": wanted},
        "peers": {},
    }


def value(name, *pairs):
    return metrics.find(name)([report(*pair) for pair in pairs]).value


# ------------------------------------------------------------------------------ faults of harnesses


def test_precision_recall_and_f1_are_not_mixed_up():
    said, wanted = "left lung upper lobe", "left lung"
    f1, precision, recall = published.published_overlap(said, wanted)
    assert (precision, recall) == (0.5, 1.0) and f1 == pytest.approx(2 / 3)
    assert text.token_recall(said, wanted) == 1.0 and text.token_f1(said, wanted) == pytest.approx(2 / 3)
    med_moe = published.medmoe_scores(said, wanted)
    assert (med_moe["precision"], med_moe["recall"]) == (0.5, 1.0)


def test_no_question_is_counted_twice(no_java, tmp_path):
    """Closed and open questions part the whole, and no share is above 1."""
    for form in ("unimed", "phi"):
        config = toy_config()
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, form=form))
        says = Says(lambda e: f"{e.answer}, {e.answer} {e.answer}")
        parts = evaluated(says, Toy(), config, tmp_path / form)
        vqa = next(part.scores for part in parts if part.task == "vqa")
        assert vqa["n_open"] + vqa["n_closed"] == vqa["n"] == 24
        most = 100.0 if form == "phi" else 1.0
        assert max(vqa["published"].values()) <= most + 1e-9
        assert max(one["value"] for one in vqa["corrected"].values()) <= 1


@pytest.mark.parametrize("said", ["abnormal", "normal", "It is abnormal.", "noticeable", "unknown"])
def test_no_is_a_word_and_not_part_of_one(said):
    assert not text.closed_accuracy(said, "no") and not text.closed_accuracy(said, "yes")
    assert not text.closed_accuracy("abnormal", "normal") and not text.closed_accuracy(
        "normal", "abnormal"
    )


def test_an_empty_report_counts_as_any_other(no_java):
    """A harness that skips empty answers and divides by all scores .5 here by leaving one out."""
    pair = ("the heart is of normal size", "the heart is of normal size")
    for name in ("token_f1", "rouge_l_regex_tokens"):
        assert value(name, pair, ("", "no effusion")) == 0.5, name
    assert value("bleu4_regex_tokens", pair, ("", "no effusion")) < 1.0
    assert captions.report_scores([pair, ("", "no effusion")])["pairs_scored"] == 1  # as published: said


def test_a_missing_box_is_not_that_of_the_question_before():
    whole = (0.0, 0.0, 100.0, 100.0)
    found = published.refer_report(["{<0><0><100><100>}", "no box", ""], [whole] * 3, [(100, 100)] * 3)
    assert found == {"miou": pytest.approx(1 / 3), "accuracy": pytest.approx(1 / 3)}
    rows = [
        {"prediction": said, "reference": "", "box": list(whole), "image_size": [100, 100], "meta": {}}
        for said in ("{<0><0><100><100>}", "no box")
    ]
    assert metrics.find("miou")(rows).value == 0.5 and metrics.find("parsed")(rows).value == 0.5


# ------------------------------------------------------------------------------ libraries


def test_sentence_bleu_of_one_word_is_dominated_by_missing_orders():
    """nltk: BLEU-2 to -4 of one right word are about 0; kept as published, mended where corrected."""
    assert published.published_bleu("lung", "lung")[0] == 1.0
    assert max(published.published_bleu("lung", "lung")[1:]) < 1e-150
    assert value("bleu4_regex_tokens", ("lung", "lung")) == 1.0
    assert published.published_bleu("", "lung") == published.published_bleu("lung", "") == [0.0] * 4


def test_corpus_bleu_of_equal_short_texts_is_one():
    """sacrebleu: corpus("yes", "yes") is 0."""
    assert value("bleu4_regex_tokens", ("yes", "yes"), ("no", "no")) == 1.0


def test_rouge_of_nothing_is_nothing():
    """rouge 1.0.1 raises ValueError on "" and on "."."""
    assert captions.rouge([("", "lung"), (".", "lung"), ("lung", "")]) == [0.0, 0.0, 0.0]
    assert value("rouge_l_regex_tokens", ("", "lung"), (".", "lung"), ("lung", "")) == 0.0


def test_rouge_l_reads_every_script_and_whole_numbers():
    """rouge-score by its own tokens: 0 for equal Chinese texts, and "3.5" is the words 3 and 5."""
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"])
    assert theirs.score("左肺上叶", "左肺上叶")["rougeL"].fmeasure == 0.0
    assert value("rouge_l_regex_tokens", ("左肺上叶", "左肺上叶")) == 1.0
    assert value("rouge_l_regex_tokens", ("3.5", "35")) == 0.0
    assert value("rouge_l_regex_tokens", ("3 5", "3.5")) == 0.0
    assert theirs.score("3.5", "3 5")["rougeL"].fmeasure == 1.0
    plain = ("the left lung is clear", "the lung on the left is clear")
    same = theirs.score(plain[1], plain[0])["rougeL"].fmeasure
    assert value("rouge_l_regex_tokens", plain) == pytest.approx(same) and 0 < same < 1


# ------------------------------------------------------------------------------ CIDEr, clinical scores


def test_cider_is_that_of_pycocoevalcap(monkeypatch):
    """By hand: identical reports of words that no other report has score 10, empty ones 0."""
    monkeypatch.setattr(captions, "why_no_java_metrics", lambda: None)
    asked = []

    def lower(texts):
        asked.append(list(texts))
        return [" ".join(text.lower().replace(".", "").split()) for text in texts]

    monkeypatch.setattr(captions, "ptb_tokenise", lower)
    pytest.importorskip("pycocoevalcap")
    pairs = [("Left lung lower lobe.", "left lung lower lobe"), ("", "a small nodule there")]
    assert value("cider", *pairs) == pytest.approx(5.0)
    assert value("cider", *pairs) == pytest.approx(5.0)
    assert len(asked) == 1 and "" not in asked[0]  # the second time nothing is new
    half = value(
        "cider", ("left lung lower lobe", "left lung lower lobe"), ("a small", "a small nodule there")
    )
    assert 5.0 < half < 10.0
    with pytest.raises(metrics.NotComputed, match="at least two reports"):
        value("cider", ("a", "a"))


def test_what_cannot_be_computed_says_why_and_nothing_else(no_java):
    named = [metrics.find(name) for name in ("bleu4_regex_tokens", "cider", *clinical.METRICS)]
    rows = [report("the heart is normal", "the heart is normal", c) for c in "ab"]
    found = scores.score("caption", rows, toy_config(), named)
    assert found["corrected"]["cider"] == {
        "value": None,
        "ci95": None,
        "why": "not computed: needs Java",
    }
    for name in clinical.METRICS:
        entry = found["corrected"][name]
        assert entry["value"] is None and entry["why"].startswith("not computed: needs weights")
        assert set(found["blind"]["medoid_report"]) == {"bleu4_regex_tokens"}
    with pytest.raises(UserError, match="'green' leads the scores of reports but is not computed"):
        scores.score("caption", rows, toy_config(), [metrics.find("green")])


def test_clinical_scores_are_the_means_of_radeval(monkeypatch):
    """A double of the package: which of its scores counts, and what a failure says."""
    import sys
    import types

    class RadEval:
        values = {"radgraph_partial": [0.25, 0.75], "radgraph_simple": [1.0, 1.0]}

        def __init__(self, metrics, per_sample, show_progress):
            assert metrics == ["radgraph"] and per_sample

        def __call__(self, refs, hyps):
            assert refs == ["true"] * 2 and hyps == ["said"] * 2
            return self.values

    monkeypatch.setitem(sys.modules, "radeval", types.SimpleNamespace(RadEval=RadEval))
    rows = [("said", "true")] * 2
    assert value("radgraph_f1", *rows) == 0.5
    monkeypatch.setattr(RadEval, "values", {"radgraph_partial": [0.25, np.nan]})
    with pytest.raises(metrics.NotComputed, match="radeval gave no value for some of 2 reports"):
        value("radgraph_f1", *rows)
    monkeypatch.setattr(RadEval, "values", {})
    with pytest.raises(metrics.NotComputed, match=r"not computed: radeval failed \(KeyError: "):
        value("radgraph_f1", *rows)

    def offline(self, refs, hyps):
        raise ConnectionError("no network")

    monkeypatch.setattr(RadEval, "__call__", offline)
    with pytest.raises(
        metrics.NotComputed, match=r"not computed: needs weights \(radeval: ConnectionError\)"
    ):
        value("radgraph_f1", *rows)
