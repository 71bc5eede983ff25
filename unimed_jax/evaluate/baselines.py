"""Answers questions without looking at the image, by baselines fitted on training examples only.

A model that reads images must beat the best of them. One more needs the model, its answers to other
examples' images (`permuted_images`), and is made in answers.py. Text is the whole input of `qa`:
there the learned baselines read what the model reads, and are its peers.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from unimed_jax.data.box_text import text_to_box
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError
from unimed_jax.evaluate import text_only
from unimed_jax.evaluate.metrics.text import bleu, ngrams
from unimed_jax.evaluate.words import tokens

Baseline = Callable[[Sequence[Example]], list[str]]
NEIGHBOURS = 25
MEDOID_SAMPLE = 256  # training reports; the medoid is sought among and against them


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Holds the baselines of a task by name."""

    blind: Mapping[str, Baseline] = dataclasses.field(default_factory=dict)  # never read the image
    # read all that the model reads
    peers: Mapping[str, Baseline] = dataclasses.field(default_factory=dict)


def fit(task: str, train: Sequence[Example]) -> Fitted:
    """Fits the baselines of `task`, and returns none if no training example has that task.

    Raises UserError if a training box cannot be read (refer's answers, identify's questions).
    """
    train = [example for example in train if example.task == task]
    if not train:
        return Fitted()
    learned = _learned(task, train)
    own = simple(task, train)
    return Fitted(own, learned) if task == "qa" else Fitted({**own, **learned})


def simple(task: str, train: Sequence[Example]) -> dict[str, Baseline]:
    """Fits majorities, medians or medoids, whichever suit the task, to training examples of it."""
    if task in ("vqa", "qa", "cls"):
        fitted = {"majority_per_template": _majority(train, _template)}
        if task == "vqa":  # stronger if one template asks about several structures
            fitted["majority_per_question"] = _majority(train, _template, lambda e: e.question)
        return fitted
    if task == "refer":
        fitted = {"median_box_per_prompt": _median_box(train, lambda e: e.question)}
        if any(example.meta.get("plane") for example in train):
            fitted["median_box_per_prompt_and_plane"] = _median_box(
                train, lambda e: e.question, lambda e: (e.question, e.meta.get("plane", ""))
            )
        return fitted
    if task == "identify":
        return {f"nearest_{NEIGHBOURS}_boxes": _nearest_boxes(train)}
    report = medoid([example.answer for example in train])
    return {"medoid_report": lambda examples: [report] * len(examples)}


def _learned(task: str, train: Sequence[Example]) -> dict[str, Baseline]:
    """Fits TF-IDF with logistic regression if answers repeat, and the nearest question."""
    merges: dict[str, Callable[[Sequence[str]], str]] = {"refer": _median_text, "caption": medoid}
    merge = merges.get(task, most_frequent)
    found: dict[str, Baseline | None] = {"nearest_question": text_only.nearest_question(train, merge)}
    if task not in ("refer", "caption"):
        found = {"tfidf_logistic": text_only.logistic(train)} | found
    return {name: baseline for name, baseline in found.items() if baseline is not None}


def _template(example: Example) -> str:
    return example.meta.get("template", "")


def most_frequent(answers: Sequence[str]) -> str:
    """Returns the commonest answer; of equally common ones the first in the order given counts.

    That order is the training part's own, as the files have it, so that no thread decides.
    """
    return Counter(answers).most_common(1)[0][0]  # which keeps the order of first meeting


def medoid(reports: Sequence[str], sample: int = MEDOID_SAMPLE) -> str:
    """Returns the report with the highest corpus BLEU-4 against an evenly spaced sample."""
    step = max(1, len(reports) / sample)
    chosen = [reports[int(i * step)] for i in range(min(sample, len(reports)))]
    grams = [[ngrams(tokens(report), order) for report in chosen] for order in (1, 2, 3, 4)]
    lengths = np.array([sum(counter.values()) for counter in grams[0]], np.float64)
    sums = np.zeros((len(chosen), 14))  # as `bleu_sums`, a row per candidate, added over all references
    for order, counters in enumerate(grams):
        column = {gram: i for i, gram in enumerate(sorted(set().union(*counters)))}
        counts = np.zeros((len(chosen), len(column)), np.int16)
        for row, counter in enumerate(counters):
            counts[row, [column[gram] for gram in counter]] = list(counter.values())
        for row in range(len(chosen)):
            present = counts[row] > 0
            sums[row, order] = np.minimum(counts[row, present], counts[:, present]).sum()
        sums[:, 4 + order], sums[:, 10 + order] = counts.sum(1) * len(chosen), counts.sum()
    sums[:, 8], sums[:, 9] = lengths * len(chosen), lengths.sum()
    scores = bleu(sums)
    return min(zip(-scores, chosen, strict=True))[1]


def _majority(train: Sequence[Example], *keys: Callable[[Example], Hashable]) -> Baseline:
    """Answers with the majority of the last key seen in training, else of all examples."""
    tables: list[Mapping[Hashable, str]] = []
    for key in (lambda example: None, *keys):
        groups = defaultdict(list)
        for example in train:
            groups[key(example)].append(example.answer)
        tables.append({name: most_frequent(answers) for name, answers in groups.items()})

    def answer(example: Example) -> str:
        found = tables[0][None]
        for table, key in zip(tables[1:], keys, strict=True):
            found = table.get(key(example), found)
        return found

    return lambda examples: [answer(example) for example in examples]


def _median_box(train: Sequence[Example], *keys: Callable[[Example], Hashable]) -> Baseline:
    """Answers with the median box of the last key seen in training, else of all examples."""
    groups: dict[Hashable, list[tuple[int, ...]]] = defaultdict(list)
    for example in train:
        box = _box_of(example, example.answer)
        for level, key in enumerate((lambda example: None, *keys)):
            groups[level, key(example)].append(box)
    medians = {name: _median(boxes) for name, boxes in groups.items()}

    def answer(example: Example) -> str:
        found = medians[0, None]
        for level, key in enumerate(keys, start=1):
            found = medians.get((level, key(example)), found)
        return found

    return lambda examples: [answer(example) for example in examples]


def _median(boxes: Sequence[Sequence[int]]) -> str:
    return "{" + "".join(f"<{round(v)}>" for v in np.median(boxes, axis=0)) + "}"


def _median_text(texts: Sequence[str]) -> str:
    """Returns the median of boxes in text form, which `_median_box` has read before."""
    return _median([box for text in texts if (box := text_to_box(text[max(text.find("{"), 0) :]))])


def _nearest_boxes(train: Sequence[Example]) -> Baseline:
    """Answers with the majority of the nearest training boxes; equal votes go to the nearest."""
    boxes = np.array([_box_of(example, example.question) for example in train], np.float64)  # [n, 4]

    def answer(example: Example) -> str:
        asked = np.array(_box_of(example, example.question))
        distance = np.square(boxes - asked).sum(1)
        nearest = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        return most_frequent([train[i].answer for i in nearest])  # in the order of distance

    return lambda examples: [answer(example) for example in examples]


def _box_of(example: Example, text: str) -> tuple[int, int, int, int]:
    box = text_to_box(text[max(text.find("{"), 0) :])
    if box is None:
        raise UserError(
            f"record {example.id}: no box {{<x1><y1><x2><y2>}} in {text!r}, which task "
            f"{example.task!r} needs for its blind baseline; mend the record."
        )
    return box
