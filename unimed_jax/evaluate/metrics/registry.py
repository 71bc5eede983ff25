"""Registers metrics: what a metric is, which tasks it scores, and how one is found by name."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from unimed_jax.config import TASKS
from unimed_jax.errors import UserError, nearest
from unimed_jax.evaluate.statistics import Measure


class Record(TypedDict):
    """Describes one answered question: a line of predictions.jsonl."""

    id: str  # <set>/<split>/<id within the set>
    set: str  # id of the data set
    split: str
    task: str  # one of config.TASKS
    template: str  # of the question; empty if the set has none
    cluster: str  # what resampling keeps together (a patient, a slab)
    question: str
    images: list[str]  # keys of its images
    reference: str  # the true answer
    prediction: str
    box: list[float] | None  # refer: the true box x1, y1, x2, y2 in pixels
    image_size: list[int] | None  # width, height of its first image in pixels
    meta: Mapping[str, str]
    blind: Mapping[str, str]  # baseline -> its answer, given without looking at this image
    peers: Mapping[str, str]  # qa: answers of learned baselines, which read all that the model reads
    permuted_images: list[str] | None  # what the baseline `permuted_images` was shown
    likelihood: NotRequired["LabelLikelihoods"]  # where the question's possible answers are known


class LabelLikelihoods(TypedDict):
    """Describes the possible answers to a question and how likely the model finds each."""

    rule: str  # how they were found (evaluate/labels.py)
    group: str  # of questions that have the same labels
    labels: list[str]
    log_likelihoods: list[float]  # of each label with its end of text
    tokens: list[int]  # of each label


Scorer = Callable[[Sequence[Record]], Measure]


class NotComputed(Exception):
    """Says why a metric has no value here; its text begins with "not computed: "."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """Describes a registered metric."""

    name: str
    tasks: tuple[str, ...]  # scored with it unless an entry names its metrics
    primary_for: tuple[str, ...]  # tasks whose model is compared with blind baselines on it
    normaliser: str  # what it does to both texts, for the protocol id; empty: nothing
    score: Scorer
    baselines: bool = True  # whether it is measured for baselines too; not, if that takes long

    def __call__(self, records: Sequence[Record]) -> Measure:
        """Scores the records of a task.

        Raises UserError if the metric returns another number of items than it was given, or what is
        no number, and NotComputed if something is missing here that it needs.
        """
        measure = self.score(records)
        if not isinstance(measure, Measure) or len(measure.items) != len(records):
            raise UserError(
                f"metric {self.name!r} must return a Measure with one row per record ({len(records)}); "
                "weigh records that do not count with Measure.where."
            )
        finite = np.isfinite(measure.items).all(1)  # [n]
        if not finite.all():
            where = records[int(finite.argmin())]["id"]
            raise UserError(
                f"metric {self.name!r} gives {where} no finite number; weigh records that do not count "
                "with Measure.where."
            )
        return measure

    def leading(self, records: Sequence[Record]) -> Measure:
        """Scores records by the metric that leads their scores, which cannot be left out.

        Raises UserError where calling the metric raises NotComputed.
        """
        try:
            return self(records)
        except NotComputed as missing:
            raise UserError(
                f"metric {self.name!r} leads the scores of {records[0]['set']} but is {missing}; name "
                "another one first in config.evaluate.entries."
            ) from missing


_METRICS: dict[str, Metric] = {}


def metric(
    name: str,
    tasks: Sequence[str] = (),
    primary_for: Sequence[str] = (),
    normaliser: str = "",
    baselines: bool = True,
) -> Callable[[Scorer], Scorer]:
    """Registers the decorated function `(records) -> Measure` as the metric `name`.

    `tasks` are scored with it by default; without tasks it is computed only if an entry of
    config.evaluate.entries names it. A task has one metric in whose `primary_for` it stands. Raises
    UserError for an unknown task, a name that is taken, and a second primary metric.
    """
    for task in (*tasks, *primary_for):
        if task not in TASKS:
            raise UserError(f"metric {name!r}: {task!r} is not a task{nearest(task, TASKS)}")

    def register(score: Scorer) -> Scorer:
        known = _METRICS.get(name)
        # A module that is imported again (a notebook's reload) may replace its own metric.
        if known and (known.score.__module__, known.score.__qualname__) != (
            score.__module__,
            score.__qualname__,
        ):
            raise UserError(
                f"metric {name!r} is registered already by {known.score.__module__}; choose another "
                "name."
            )
        for task in primary_for:
            other = next(
                (m for m in _METRICS.values() if task in m.primary_for and m.name != name), None
            )
            if other:
                raise UserError(
                    f"metric {name!r}: task {task!r} has the primary metric {other.name!r} already; "
                    "name yours first in the entry's metrics in place of primary_for."
                )
        every = tuple(dict.fromkeys((*tasks, *primary_for)))
        _METRICS[name] = Metric(name, every, tuple(primary_for), normaliser, score, baselines)
        return score

    return register


def find(name: str) -> Metric:
    """Returns the metric called `name`, or `module:name` after importing that module.

    Raises UserError if there is none of that name, or if the module cannot be imported.
    """
    module, colon, short = name.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever somebody's module raises, or no name of a module
            raise UserError(
                f"config.evaluate.entries: metric {name!r}: module {module!r} does not import "
                f"({error}); install it or put its folder on PYTHONPATH."
            ) from error
    if short not in _METRICS:
        raise UserError(
            f"config.evaluate.entries: {name!r} is not a metric{nearest(short, _METRICS)} Choose from "
            f"{', '.join(_METRICS)}, or name your own as module:name (docs/your_metric.md)."
        )
    return _METRICS[short]


def of_task(task: str, names: Sequence[str] = ()) -> tuple[Metric, ...]:
    """Returns the metrics in `names`, or all of the task; the primary one comes first."""
    if names:
        return tuple(dict.fromkeys(find(name) for name in names))
    chosen = [known for known in _METRICS.values() if task in known.tasks]
    # stable: in order of registration
    return tuple(sorted(chosen, key=lambda known: task not in known.primary_for))


def pairs(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns (prediction, reference) of each record."""
    return [(record["prediction"], record["reference"]) for record in records]


def per_record(records: Sequence[Record], score: Callable[[str, str], Any]) -> Measure:
    """Averages `score(prediction, reference)` over records, which is all that most metrics need."""
    return Measure.mean([float(score(*pair)) for pair in pairs(records)])
