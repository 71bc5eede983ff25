"""Scores of classes and choices by likelihood: as scikit-learn computes them, with paired intervals."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as peer

from unimed_jax.data.example import Example
from unimed_jax.data.multiple_choice import shown_options, with_options
from unimed_jax.evaluate.classes import BINS, class_scores
from unimed_jax.evaluate.labels import OPTIONS, TRAINING, YES_NO, Labels, labels_of, named
from unimed_jax.evaluate.statistics import Measure, Ranked, resample

PLANES = ("axial", "coronal", "sagittal")


def record(truth, logs, labels=PLANES, said="", group="plane", rule=TRAINING, cluster="a", tokens=None):
    return {
        "reference": truth,
        "prediction": said,
        "cluster": cluster,
        "likelihood": {
            "rule": rule,
            "group": group,
            "labels": list(labels),
            "log_likelihoods": list(map(float, logs)),
            "tokens": tokens or [1] * len(labels),
        },
    }


def drawn(n=120, labels=PLANES, seed=0, group="plane"):
    """Records with a noisy model, ties among its beliefs included."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, len(labels), n)
    logs = np.round(rng.normal(0, 1, (n, len(labels))) + 1.2 * np.eye(len(labels))[truth], 1)
    said = [
        labels[i] if rng.random() < 0.7 else "I cannot tell" for i in rng.integers(0, len(labels), n)
    ]
    return [
        record(labels[t], row, labels, s, group, cluster=f"c{i % 12}")
        for i, (t, row, s) in enumerate(zip(truth, logs, said, strict=True))
    ]


def beliefs_of(records):
    logs = np.array([r["likelihood"]["log_likelihoods"] for r in records])
    powers = np.exp(logs - logs.max(1, keepdims=True))
    return np.round(powers / powers.sum(1, keepdims=True), 12)


def values(scores):
    return {name: one["value"] for name, one in scores.items()}


@pytest.mark.parametrize("labels", [PLANES, ("no", "yes")])
def test_scores_are_those_of_scikit_learn(labels):
    records = drawn(labels=labels)
    found = class_scores(records, 50, 0)
    truth = [labels.index(r["reference"]) for r in records]
    beliefs = beliefs_of(records)
    chosen = beliefs.argmax(1)
    area = (
        peer.roc_auc_score(truth, beliefs, multi_class="ovr", average="macro")
        if len(labels) > 2
        else peer.roc_auc_score(truth, beliefs[:, 1])
    )
    assert values(found["sum"]) == {
        "accuracy": pytest.approx(peer.accuracy_score(truth, chosen), abs=1e-12),
        "balanced_accuracy": pytest.approx(peer.balanced_accuracy_score(truth, chosen), abs=1e-12),
        "macro_f1": pytest.approx(peer.f1_score(truth, chosen, average="macro"), abs=1e-12),
        "auc": pytest.approx(area, abs=1e-12),
        "ece": pytest.approx(calibration_error(beliefs.max(1), chosen == truth), abs=1e-12),
    }
    said = [labels.index(r["prediction"]) if r["prediction"] in labels else -1 for r in records]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class -1 that nobody is
        recall = peer.recall_score(truth, said, labels=range(len(labels)), average="macro")
        f1 = peer.f1_score(truth, said, labels=range(len(labels)), average="macro")
    generated = values(found["generated"])
    assert generated["balanced_accuracy"] == pytest.approx(recall, abs=1e-12)
    assert generated["macro_f1"] == pytest.approx(f1, abs=1e-12)
    assert generated["named"] == pytest.approx(np.mean(np.array(said) >= 0))
    gain = found["sum"]["accuracy"]["value"] - generated["accuracy"]
    assert found["gain"]["value"] == pytest.approx(gain) and found["groups"] == {}
    assert sum(one["n"] for one in found["bins"]["sum"]) == found["n"] == 120


def calibration_error(confidence, correct):
    total = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (confidence >= low) & (confidence < low + 1 / BINS)
        if low + 1 / BINS > 0.999:
            inside |= confidence >= low
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return total


def test_lengths_count_only_where_they_are_asked_for():
    """The longer label is likelier per token, the shorter one as a whole."""
    one = record("left lung", (-1.0, -1.5), ("lung", "left lung"), tokens=[1, 3])
    found = class_scores([one, {**one, "cluster": "b"}], 20, 0)
    assert found["sum"]["accuracy"]["value"] == 0.0 and found["per_token"]["accuracy"]["value"] == 1.0
    believed = 1 / (1 + np.exp(-0.5))
    assert found["bins"]["sum"][int(believed * BINS)]["confidence"] == pytest.approx(believed)


def test_intervals_draw_whole_clusters_and_are_paired():
    records = drawn(60)
    found = class_scores(records, 100, 3)
    clusters = [r["cluster"] for r in records]
    rng, names = np.random.default_rng(3), sorted(set(clusters))
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=100)
    areas = []
    for row in counts:
        again = [r for r, c in zip(records, clusters, strict=True) for _ in range(row[names.index(c)])]
        truth = [PLANES.index(r["reference"]) for r in again]
        areas.append(peer.roc_auc_score(truth, beliefs_of(again), multi_class="ovr"))
    np.testing.assert_allclose(
        found["sum"]["auc"]["ci95"], np.percentile(areas, [2.5, 97.5]), atol=1e-12
    )
    alone = class_scores([{**r, "cluster": "x"} for r in records], 20, 0)
    assert alone["sum"]["auc"]["ci95"] is None is alone["gain"]["ci95"]


def test_beliefs_next_to_certainty_keep_their_order():
    """Log-odds of 40 and 45: the beliefs of both are 1, their area is that of the log-odds."""
    odds = [40 + 0.1 * i + (5 if i % 3 else -5) * (i % 2) for i in range(40)]
    labels = ("no", "yes")
    records = [record(labels[i % 2], (-odds[i], -0.01), labels, cluster=f"c{i}") for i in range(40)]
    found = class_scores(records, 20, 0)["sum"]["auc"]["value"]
    assert found == pytest.approx(peer.roc_auc_score([i % 2 for i in range(40)], odds))
    assert 0.55 < found < 0.95


def test_spellings_of_a_label_are_one_class():
    """Templates may write "Yes" and "yes"; the mean over classes is still one over two."""
    truth = ["yes", "Yes", "yes", "no", "No", "no", "no"]
    chosen = [0, 0, 1, 1, 1, 0, 1]
    records = [
        record(word, (-1, -2) if place == 0 else (-2, -1), labels, group="yes/no", rule=YES_NO)
        for word, place in zip(truth, chosen, strict=True)
        for labels in [("Yes", "No") if word[0].isupper() else ("yes", "no")]
    ]
    found = values(class_scores(records, 20, 0)["sum"])
    there = [0 if word.lower() == "yes" else 1 for word in truth]
    assert found["balanced_accuracy"] == pytest.approx(peer.balanced_accuracy_score(there, chosen))
    assert found["macro_f1"] == pytest.approx(peer.f1_score(there, chosen, average="macro"))
    assert found["auc"] == pytest.approx(peer.roc_auc_score(there, chosen))


def test_scores_of_ranks_and_of_sums_share_their_draws():
    values, clusters = np.arange(12.0), [str(i % 4) for i in range(12)]
    ranked = Ranked(np.ones((12, 1)), lambda weights: (weights * values).sum(-1) / weights.sum(-1))
    one, other, third = resample([Measure.mean(values), ranked, Measure.mean(-values)], clusters, 50, 1)
    np.testing.assert_allclose(one, other, atol=1e-12)
    np.testing.assert_allclose(one, -third, atol=1e-12)
    assert ranked.where(values < 2).value == 0.5


def test_groups_are_scored_apart_and_classes_averaged_over_them():
    records = [*drawn(40), *drawn(30, ("no", "yes"), 1, "yes/no")]
    found = class_scores(records, 20, 0)
    groups = found["groups"]
    assert {name: part["n"] for name, part in groups.items()} == {"plane": 40, "yes/no": 30}
    areas = [groups[name]["sum"]["auc"]["value"] for name in ("plane", "yes/no")]
    assert found["sum"]["auc"]["value"] == pytest.approx((3 * areas[0] + 2 * areas[1]) / 5)
    assert found["labels"] == {"plane": list(PLANES), "yes/no": ["no", "yes"]}
    right = [
        40 * groups["plane"]["sum"]["accuracy"]["value"],
        30 * groups["yes/no"]["sum"]["accuracy"]["value"],
    ]
    assert found["sum"]["accuracy"]["value"] == pytest.approx(sum(right) / 70)


def test_options_have_no_classes_and_unseen_classes_are_mistakes():
    rows = [("lung", (-1, -2), ("lung", "liver")), ("bone", (-3, -1), ("skin", "bone"))]
    found = class_scores([record(*row, group=OPTIONS, rule=OPTIONS) for row in rows], 20, 0)
    assert set(found["sum"]) == {"accuracy", "ece"} and found["sum"]["accuracy"]["value"] == 1.0
    assert found["labels"] == {}
    unseen = class_scores([record("oblique", (-1, -2, -3)), record("axial", (-1, -2, -3))], 20, 0)
    assert (
        unseen["sum"]["accuracy"]["value"] == 0.5 and unseen["sum"]["balanced_accuracy"]["value"] == 1.0
    )
    assert class_scores([{"reference": "x", "prediction": "x", "cluster": "a"}], 20, 0) is None


# ------------------------------------------------------------------------------ labels


def example(task, question, answer, **meta):
    return Example("x", task, question, answer, meta=meta)


def test_labels_come_from_options_training_answers_or_yes_and_no():
    train = [
        example("cls", "", name, template="plane") for name in ("axial", "Axial", "Axial", "coronal")
    ]
    asked = [example("cls", "", "axial", template="plane"), example("cls", "", "x", template="unseen")]
    assert labels_of("cls", asked, train) == [Labels(TRAINING, "plane", ("Axial", "coronal")), None]
    closed = dict(template="t", answer_type="CLOSED")
    train = [example("qa", "?", word, **closed) for word in ("yes", "no", "maybe", "Yes", "Yes")]
    train.append(example("qa", "?", "lung", template="t", answer_type="OPEN"))
    asked = [example("qa", "?", word, **closed) for word in ("no", "lung")]
    assert labels_of("qa", asked, train) == [
        Labels(YES_NO, "yes/no/maybe", ("Yes", "no", "maybe")),
        None,
    ]
    slips = [example("qa", "?", word, **closed) for word in ("yes", "no")] * 300  # one maybe in 605
    assert labels_of("qa", asked[:1], train + slips) == [Labels(YES_NO, "yes/no", ("yes", "no"))]
    assert labels_of("vqa", asked[:1], []) == [Labels(YES_NO, "yes/no", ("yes", "no"))]
    assert labels_of("vqa", [example("vqa", "?", "no", answer_type="OPEN")], train) == [None]
    nested = {"A": "left (upper)", "B": "none of (A)", "C": "x", "D": "(A) and (B) only"}
    for shown in ({"A": "lung", "B": "liver"}, nested):
        question = with_options("Which (A) is it?", shown)
        assert shown_options(question) == shown
        asked = [example("vqa", question, answer) for answer in (shown["B"], "skin")]
        assert labels_of("vqa", asked, []) == [Labels(OPTIONS, OPTIONS, tuple(shown.values())), None]
    assert shown_options(with_options("?", {"A": "x", "C": "y"})) == shown_options("Is (A) seen?") == {}
    many = [example("cls", "", f"class {i}", template="t") for i in range(65)]
    assert labels_of("cls", many[:1], many) == [None] and labels_of("cls", many[:1], many[:64])[0]
    assert labels_of("identify", asked, asked) == [None, None]


@pytest.mark.parametrize(
    "answer, place",
    [
        ("left lung", 1),
        ("Left lung.", 1),
        ("It is the left lung", 1),  # holds "lung" too
        ("lung", 0),
        ("not the left lung", -1),
        ("lung or liver", -1),
        ("I am sorry, I cannot answer this question.", -1),
        ("", -1),
        ("B", 1),
        ("(B)", 1),
        ("B. left lung", 1),
        ("(C) liver", 2),
        ("B. liver", -1),
        ("A lung", 0),
        ("D", -1),
    ],
)
def test_a_generated_answer_names_one_option_or_none(answer, place):
    """A refusal is counted as none, whatever letters its words hold."""
    assert named(answer, ("lung", "left lung", "liver"), OPTIONS) == place


@pytest.mark.parametrize(
    "answer, place", [("abnormal", -1), ("normal", -1), ("No.", 0), ("yes or no", -1), ("B", -1)]
)
def test_yes_and_no_are_whole_words(answer, place):
    assert named(answer, ("no", "yes"), YES_NO) == place
