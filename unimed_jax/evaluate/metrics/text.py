"""Scores text answers by the corrected rules, and sums up what BLEU needs.

The metrics are exact match, word F1, recall, and the accuracy of closed questions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unimed_jax.evaluate.closed import closed_accuracy
from unimed_jax.evaluate.metrics.registry import Record, metric, per_record
from unimed_jax.evaluate.statistics import Measure
from unimed_jax.evaluate.words import EXACT, WORDS, canonical, tokens

# ---------------------------------------------------------------------------------------------
# One answer
# ---------------------------------------------------------------------------------------------


def is_closed(meta: Mapping[str, str]) -> bool:
    """Says whether a question is closed by its answer_type.

    That is CLOSED (SLAKE, VQA-RAD), close (Med-MoE's files) or yes/no (Path-VQA).
    """
    return meta.get("answer_type", "").strip().lower() in ("closed", "close", "yes/no")


def exact_match(prediction: str, reference: str) -> bool:
    """Says whether the `canonical` forms are equal; an empty prediction is wrong."""
    prediction = canonical(prediction)
    return bool(prediction) and prediction == canonical(reference)


def token_f1(prediction: str, reference: str) -> float:
    """Computes F1 of token multisets, so that repeating a word costs precision."""
    candidate, target = Counter(tokens(prediction)), Counter(tokens(reference))
    shared = (candidate & target).total()
    return 2 * shared / (candidate.total() + target.total()) if shared else 0.0


def token_recall(prediction: str, reference: str) -> float:
    """Computes the share of the reference's tokens that were said.

    A token that occurs several times in the reference has to be said as often.
    """
    candidate, target = Counter(tokens(prediction)), Counter(tokens(reference))
    return (candidate & target).total() / target.total() if target else 0.0


def ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Counts each run of `order` words in a text."""
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def bleu_sums(prediction: Sequence[str], reference: Sequence[str]) -> np.ndarray:
    """Counts what BLEU adds up over items: float64 [14].

    Matched n-grams 1..4, predicted n-grams 1..4, both lengths, n-grams 1..4 of the reference.
    """
    matched, predicted, wanted = [], [], []
    for order in (1, 2, 3, 4):
        candidate, target = ngrams(prediction, order), ngrams(reference, order)
        matched.append((candidate & target).total())
        predicted.append(candidate.total())
        wanted.append(target.total())
    return np.array([*matched, *predicted, len(prediction), len(reference), *wanted], np.float64)


def bleu(sums: np.ndarray, order: int = 4, floor: float = 0.0, every_order: bool = False) -> np.ndarray:
    """Computes BLEU with one reference from `bleu_sums` [..., 14] added over items -> [...].

    A precision of zero becomes `floor`; without any matched word the score is 0. Orders for which
    neither side has a text long enough are left out, so that identical short texts score 1, unless
    `every_order` (as published).
    """
    predicted = sums[..., 4 : 4 + order]
    absent = (predicted == 0) & (sums[..., 10 : 10 + order] == 0) & (not every_order)
    precision = sums[..., :order] / np.maximum(predicted, 1)  # [..., order]
    with np.errstate(divide="ignore"):
        logs = np.where(absent, 0.0, np.log(np.where(precision > 0, precision, floor)))
    length, target = sums[..., 8], sums[..., 9]
    brevity = np.exp(np.minimum(0.0, 1 - target / np.maximum(length, 1e-9)))
    mean = logs.sum(-1) / np.maximum(order - absent.sum(-1), 1)
    return np.where(sums[..., 0] > 0, brevity * np.exp(mean), 0.0)


# ---------------------------------------------------------------------------------------------
# Metrics. The order of the functions is the order in tables.
# ---------------------------------------------------------------------------------------------


_TEXT_TASKS = ("vqa", "identify", "cls", "qa")


@metric("exact_match", primary_for=_TEXT_TASKS, normaliser=EXACT)
def exact_matches(records: Sequence[Record]) -> Measure:
    """Computes the share of answers that equal the reference except for spelling.

    What counts as spelling is in evaluate/words.py.

    This is a recipe for the next metric: one value per record, their mean as a `Measure`, and the
    decorator above.
    """
    return per_record(records, exact_match)


@metric("token_f1", tasks=(*_TEXT_TASKS, "caption"), normaliser=WORDS)
def token_f1s(records: Sequence[Record]) -> Measure:
    """Computes the mean F1 of word multisets."""
    return per_record(records, token_f1)


def _closed(records: Sequence[Record]) -> np.ndarray:
    return np.array([is_closed(record["meta"]) for record in records], bool)  # [n]


@metric("open_exact_match", tasks=("vqa",), normaliser=EXACT)
def open_exact_match(records: Sequence[Record]) -> Measure:
    """Computes the exact match of open questions; closed ones do not count."""
    return exact_matches(records).where(~_closed(records))


@metric("open_token_f1", tasks=("vqa",), normaliser=WORDS)
def open_token_f1(records: Sequence[Record]) -> Measure:
    """Computes the word F1 of open questions."""
    return token_f1s(records).where(~_closed(records))


@metric("open_recall", tasks=("vqa",), normaliser=WORDS)
def open_recall(records: Sequence[Record]) -> Measure:
    """Computes the share of the reference's words that was said, over open questions."""
    return per_record(records, token_recall).where(~_closed(records))


@metric("closed_exact_match", tasks=("vqa",), normaliser=EXACT)
def closed_exact_match(records: Sequence[Record]) -> Measure:
    """Computes the exact match of closed questions."""
    return exact_matches(records).where(_closed(records))


@metric("closed_accuracy", tasks=("vqa",), normaliser=f"{WORDS}-one-choice-2")
def closed_accuracies(records: Sequence[Record]) -> Measure:
    """Computes the share of closed questions whose answer chooses the reference and nothing else.

    Of yes and no the first one in the answer decides: "Yes, no fracture is seen" is yes, "No
    evidence of a mass, yes" is no, "yes or no" is neither. Any other reference must stand in the
    answer as whole words, not denied, and not as one of several: "left or right" is not left, and
    "CT, X-ray" is not CT (`closed.closed_accuracy`).
    """
    return per_record(records, closed_accuracy).where(_closed(records))
