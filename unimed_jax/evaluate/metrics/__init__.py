"""Collects metrics of answers: corrected ones, registered by name, and the published ones.

A *corrected* metric is a registered function from records to a `Measure` (sums over items, so that
a bootstrap over clusters is one matrix product). Every file of this package is imported here: a new
metric is a new file.

    from unimed_jax.evaluate.metrics import Measure, Record, metric

    @metric("short_answer", tasks=("vqa",))
    def short_answer(records: list[Record]) -> Measure:
        "The share of answers of at most three words."
        return Measure.mean([len(record["prediction"].split()) <= 3 for record in records])

*Published* scores (published.py, captions.py) keep the flaws of the evaluations of Uni-Med and
Med-MoE (a repeated word earns full F1, "no" is found in "normal", boxes are one pixel too wide), so
that numbers compare with the papers.
"""

import importlib
import pkgutil

from unimed_jax.evaluate.metrics.registry import (
    Metric,
    NotComputed,
    Record,
    find,
    metric,
    of_task,
    pairs,
    per_record,
)
from unimed_jax.evaluate.statistics import Measure

__all__ = [
    "Measure",
    "Metric",
    "NotComputed",
    "Record",
    "find",
    "metric",
    "of_task",
    "pairs",
    "per_record",
]

for _found in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_found}")
