"""Scores classes and choices from the likelihoods of their labels, beside what was generated.

Of each record with `likelihood` (metrics.Record) the label of the highest likelihood is chosen, and the
softmax over its labels is what the model believes of them: once over the log-likelihoods ("sum"), once
over their means per token ("per_token"), which do not favour short labels. A class is a label of a group
of questions that have the same labels; a mean over classes is one over the classes of all groups. A true
answer that is none of the labels is a mistake, and no class.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimed_jax.evaluate.labels import OPTIONS, named, place_of
from unimed_jax.evaluate.metrics import Record
from unimed_jax.evaluate.statistics import Measure, Ranked, interval, resample
from unimed_jax.evaluate.words import canonical

KINDS = ("sum", "per_token")
BINS = 15  # of equal width, of the expected calibration error


def class_scores(records: Sequence[Record], resamples: int, seed: int) -> dict[str, Any] | None:
    """Scores the records that have likelihoods; None if none has.

    {n, left_out, labels: {group: [labels]}, sum and per_token: {score: {value, ci95}} with the scores
    accuracy, balanced_accuracy, macro_f1, auc and ece, generated: the same without the last two, and
    `named` (the share of generated answers that name one label), gain: accuracy of "sum" less that of
    the generated answers, groups: {group: {n, sum, per_token, generated}}, bins: {kind: [{n,
    confidence, accuracy}]} of the BINS bins of confidence}. A score that is not defined (the AUC of
    options that differ from question to question) is left out.
    """
    chosen = [record for record in records if record.get("likelihood")]
    if not chosen:
        return None
    judged = {kind: _Judged(chosen, kind) for kind in (*KINDS, "generated")}
    clusters = [record["cluster"] for record in chosen]
    groups = [str(record["likelihood"]["group"]) for record in chosen]
    masks = {"": np.ones(len(chosen), bool)}
    masks |= {name: np.array([group == name for group in groups]) for name in sorted(set(groups))}
    if len(masks) == 2:  # the only group is the whole
        masks = {"": masks[""]}
    measures = {
        (group, kind, name): measure.where(mask)
        for kind, one in judged.items()
        for name, measure in one.measures().items()
        for group, mask in masks.items()
    }
    values = {key: measure.value for key, measure in measures.items()}
    defined = [key for key, value in values.items() if np.isfinite(value)]
    drawn = resample([measures[key] for key in defined], clusters, resamples, seed)
    draws = dict(zip(defined, drawn, strict=True))

    def estimate(key: tuple[str, str, str]) -> dict[str, Any]:
        several = measures[key].varies(clusters)
        return {"value": values[key], "ci95": interval(draws[key]) if several else None}

    def of_group(group: str) -> dict[str, Any]:
        return {
            "n": int(masks[group].sum()),
            **{
                kind: {name: estimate((g, k, name)) for g, k, name in defined if (g, k) == (group, kind)}
                for kind in judged
            },
        }

    ours, theirs = ("", "sum", "accuracy"), ("", "generated", "accuracy")
    return {
        **of_group(""),
        "left_out": len(records) - len(chosen),
        "labels": {
            str(record["likelihood"]["group"]): list(record["likelihood"]["labels"])
            for record in chosen
            if record["likelihood"]["rule"] != OPTIONS
        },
        "gain": {
            "value": values[ours] - values[theirs],
            "ci95": interval(draws[ours] - draws[theirs]) if measures[ours].varies(clusters) else None,
        },
        "groups": {group: of_group(group) for group in masks if group},
        "bins": {kind: judged[kind].bins() for kind in KINDS},
    }


class _Judged:
    """Holds what was chosen and what is true, for one way of choosing."""

    def __init__(self, records: Sequence[Record], kind: str):
        """Takes records that have likelihoods; kind: one of KINDS, or "generated"."""
        given = [record["likelihood"] for record in records]
        own = [one["labels"] for one in given]
        truth = [place_of(r["reference"], labels) for r, labels in zip(records, own, strict=True)]
        # [n][labels], none for generated answers
        logs = [] if kind == "generated" else [_logs(one, kind) for one in given]
        self.beliefs, self._odds = [_softmax(one) for one in logs], [_log_odds(one) for one in logs]
        if self.beliefs:
            said = [int(belief.argmax()) for belief in self.beliefs]
        else:
            said = [
                named(r["prediction"], one["labels"], one["rule"])
                for r, one in zip(records, given, strict=True)
            ]
        self.named = np.array(said) >= 0  # [n]
        self.correct = np.array([a == b >= 0 for a, b in zip(said, truth, strict=True)])  # [n]
        # classes: (group, label), numbered; options of a single question are none. "Yes" of one template
        # and "yes" of another are one class.
        self._classes: dict[tuple[str, str], int] = {}
        for one in given:
            if one["rule"] != OPTIONS:
                for label in one["labels"]:
                    self._classes.setdefault((one["group"], canonical(label)), len(self._classes))
        # [n][labels]
        self._numbers = [
            [self._classes[one["group"], canonical(label)] for label in one["labels"]]
            if one["rule"] != OPTIONS
            else []
            for one in given
        ]
        self._truth, self._said = (
            self._one_hot(
                [row[i] if row and i >= 0 else -1 for row, i in zip(self._numbers, places, strict=True)]
            )
            for places in (truth, said)
        )

    def _one_hot(self, classes: Sequence[int]) -> np.ndarray:
        """Marks each item's class, float64 [n, C]; -1 is none."""
        return (np.array(classes)[:, None] == np.arange(len(self._classes))).astype(np.float64)

    def measures(self) -> dict[str, Measure]:
        """Returns the scores by name."""
        truth, said = self._truth, self._said
        found: dict[str, Measure] = {
            "accuracy": Measure.mean(self.correct.tolist()),
            "balanced_accuracy": Measure(np.concatenate([truth * said, truth], 1), _balanced),
            "macro_f1": Measure(np.concatenate([truth * said, truth, said], 1), _macro_f1),
        }
        if not self.beliefs:
            return found | {"named": Measure.mean(self.named.tolist())}
        return found | {
            "auc": Ranked(np.ones((len(truth), 1)), functools.partial(_auc, self._ranks())),
            "ece": Measure(self._calibration(), _ece),
        }

    def _ranks(self) -> list["_Ranks"]:
        """Sorts the items of each class by the belief in it.

        As log-odds, since beliefs next to 0 and 1 are rounded to these.
        """
        of_class: dict[int, list[tuple[int, float]]] = {}
        for i, (row, odds) in enumerate(zip(self._numbers, self._odds, strict=True)):
            for number, value in zip(row, odds, strict=False):
                of_class.setdefault(number, []).append((i, float(value)))
        return [
            _Ranks(
                np.array([i for i, _ in items]), np.array([v for _, v in items]), self._truth[:, number]
            )
            for number, items in of_class.items()
        ]

    def _confidence(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the belief in the chosen label [n] and its bin [n]."""
        confidence = np.array([belief.max() for belief in self.beliefs])
        return confidence, np.minimum((confidence * BINS).astype(int), BINS - 1)

    def _calibration(self) -> np.ndarray:
        """Returns by how much each item was believed too much, in the column of its bin, and 1."""
        confidence, place = self._confidence()
        out = np.zeros((len(place), BINS + 1))
        out[np.arange(len(place)), place] = confidence - self.correct
        out[:, BINS] = 1
        return out

    def bins(self) -> list[dict[str, Any]]:
        """Lists the bins of confidence from 0 to 1: {n, confidence, accuracy}; None where none falls."""
        confidence, place = self._confidence()
        out = []
        for number in range(BINS):
            inside = place == number
            n = int(inside.sum())
            out.append(
                {
                    "n": n,
                    "confidence": float(confidence[inside].mean()) if n else None,
                    "accuracy": float(self.correct[inside].mean()) if n else None,
                }
            )
        return out


def _logs(one: Mapping[str, Any], kind: str) -> np.ndarray:
    """Returns the log-likelihoods of a record's labels, or their means per token, float64 [labels]."""
    logs = np.array(one["log_likelihoods"], np.float64)
    return logs / np.array(one["tokens"]) if kind == "per_token" else logs


def _softmax(logs: np.ndarray) -> np.ndarray:
    powers = np.exp(logs - logs.max())
    return powers / powers.sum()


def _log_odds(logs: np.ndarray) -> np.ndarray:
    """Computes log(p / (1 - p)) of the softmax p of log-likelihoods [labels], without rounding p."""
    others = np.where(np.eye(len(logs), dtype=bool), -np.inf, logs)  # [labels, labels]
    return logs - np.logaddexp.reduce(others, axis=1)


def _balanced(sums: np.ndarray) -> np.ndarray:
    """Averages recall over the classes that occur, [..., 2 C] -> [...]."""
    hits, there = np.split(sums, 2, axis=-1)
    return _mean(hits / np.maximum(there, 1e-300), there > 0)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """Averages F1 over the classes that occur or are said, [..., 3 C] -> [...]."""
    hits, there, said = np.split(sums, 3, axis=-1)
    return _mean(2 * hits / np.maximum(there + said, 1e-300), there + said > 0)


def _mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Averages the values that count; NaN if none does."""
    with np.errstate(invalid="ignore"):
        return np.where(counts, values, 0).sum(-1) / counts.sum(-1)


def _ece(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.abs(sums[..., :BINS]).sum(-1) / sums[..., BINS]


class _Ranks:
    """Sorts the items to which a class is offered by its log-odds; equal ones share a place."""

    def __init__(self, items: np.ndarray, odds: np.ndarray, truth: np.ndarray):
        odds = np.round(odds, 9)  # what differs by rounding alone is equal
        order = np.argsort(odds, kind="stable")
        self.items = items[order]
        self.positive = truth[self.items]  # [k], 1 or 0
        odds = odds[order]
        self.starts = np.flatnonzero(np.concatenate([[True], odds[1:] != odds[:-1]]))


def _auc(classes: Sequence[_Ranks], weights: np.ndarray) -> np.ndarray:
    """Averages the area under the ROC curve of one class against the rest, weights [..., n] -> [...].

    Classes count that occur and that something else occurs beside.
    """
    areas, counts = [], []
    for ranks in classes:
        own = weights[..., ranks.items]
        there = np.add.reduceat(own * ranks.positive, ranks.starts, axis=-1)
        others = np.add.reduceat(own * (1 - ranks.positive), ranks.starts, axis=-1)
        below = np.cumsum(others, axis=-1) - others / 2
        pairs = there.sum(-1) * others.sum(-1)
        areas.append((there * below).sum(-1) / np.maximum(pairs, 1e-300))
        counts.append(pairs > 0)
    if not classes:
        return np.full(weights.shape[:-1], np.nan)
    return _mean(np.stack(areas, -1), np.stack(counts, -1))
