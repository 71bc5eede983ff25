"""Measures the likelihood of every label of the units' questions, and keeps what it has measured.

Batches are those of the answers (answers.py), so that a killed pass continues where it stopped.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unimed_jax.evaluate.answers import Journal, batches, progress
from unimed_jax.evaluate.labels import Labels, labels_of
from unimed_jax.evaluate.tasks import Training, Unit
from unimed_jax.predict.likelihood import Asked, Likelihood, Likelihoods

JOURNAL = "likelihoods.partial.jsonl"
# All batches -> what measures one of them, given the images of each question (uint8 [H, W, 3]).
Measurer = Callable[
    [Sequence[Sequence[Asked]]],
    Callable[[Sequence[Asked], Sequence[Sequence[np.ndarray]]], list[Likelihood]],
]


def known_labels(units: Sequence[Unit], training: Training) -> dict[str, Labels]:
    """Finds the labels of all questions that have some, by the ids of predictions.jsonl."""
    found: dict[str, Labels] = {}
    for unit in units:
        for example, labels in zip(
            unit.examples, labels_of(unit.task, unit.examples, training.of(unit)), strict=True
        ):
            if labels is not None:
                found[unit.id_of(example)] = labels
    return found


def measure_units(
    units: Sequence[Unit], labels: Mapping[str, Labels], measurer: Measurer, journal: Journal
) -> dict[str, Likelihood]:
    """Measures the labels that the journal lacks, and returns the likelihoods by id.

    Questions with images and those without are measured by two programs. It is called by all processes
    alike.
    """
    found = dict(journal.found)
    parts: dict[bool, list[tuple[Unit, list[int]]]] = {True: [], False: []}
    for unit in units:
        for places in batches(unit):
            kept = [i for i in places if unit.id_of(unit.examples[i]) in labels]
            if kept:
                parts[bool(unit.examples[kept[0]].images)].append((unit, kept))
    total = sum(len(places) for part in parts.values() for _, places in part)
    with progress(total, shown=True) as bar:
        bar.set_description("likelihoods", refresh=False)
        for part in parts.values():
            if not all(name in found for unit, places in part for name in _names(unit, places)):
                asked = [_asked(unit, places, labels) for unit, places in part]
                measure = measurer(asked)
                for (unit, places), batch in zip(part, asked, strict=True):
                    names = _names(unit, places)
                    if not all(name in found for name in names):
                        pixels = [
                            [unit.source.data.image(k) for k in one.example.images] for one in batch
                        ]
                        found_now = zip(names, measure(batch, pixels), strict=True)
                        # those of single tokens are arrays, which no score needs and no journal takes
                        measured = {name: dataclasses.replace(one, each=[]) for name, one in found_now}
                        found |= measured
                        journal.add(measured)
                    bar.update(len(places))
    return found


def model_measurer(model, config, tokenizer) -> Measurer:
    """Makes of a model what `measure_units` takes."""
    return lambda every: Likelihoods(model, config, tokenizer, every).of


def _names(unit: Unit, places: Sequence[int]) -> list[str]:
    return [unit.id_of(unit.examples[i]) for i in places]


def _asked(unit: Unit, places: Sequence[int], labels: Mapping[str, Labels]) -> list[Asked]:
    examples = [unit.examples[i] for i in places]
    # asked without the turns before them, as answers are
    return [
        Asked(dataclasses.replace(example, history=()), labels[unit.id_of(example)].labels)
        for example in examples
    ]
