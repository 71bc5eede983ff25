"""Makes the records that are scored and kept: the lines of predictions.jsonl."""

from collections.abc import Mapping, Sequence
from typing import cast

from unimed_jax.bounds import FrozenDict
from unimed_jax.data.box_text import text_to_box
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError
from unimed_jax.evaluate.answers import Answered
from unimed_jax.evaluate.labels import Labels
from unimed_jax.evaluate.metrics import Record
from unimed_jax.evaluate.metrics.registry import LabelLikelihoods
from unimed_jax.evaluate.scores import PERMUTED
from unimed_jax.evaluate.tasks import Unit
from unimed_jax.predict.likelihood import Likelihood


def records_of(
    unit: Unit,
    found: Mapping[str, Answered],
    blind: Mapping[str, Mapping[str, list[str]]],
    known: Mapping[str, LabelLikelihoods] = FrozenDict(),
) -> list[Record]:
    """Makes the lines of predictions.jsonl of one unit."""
    out = []
    for i, example in enumerate(unit.examples):
        name = unit.id_of(example)
        answered = found[name]
        guesses = {kind: {key: texts[i] for key, texts in some.items()} for kind, some in blind.items()}
        if answered.permuted is not None:
            guesses.setdefault("blind", {})[PERMUTED] = answered.permuted
        record = {
            "id": name,
            "set": unit.source.id,
            "split": unit.split,
            "task": unit.task,
            "template": example.meta.get("template", ""),
            "cluster": example.cluster or example.id,
            "question": example.question,
            "images": list(example.images),
            "reference": example.answer,
            "prediction": answered.prediction,
            "box": _box(example, answered.image_size),
            "image_size": answered.image_size,
            "meta": dict(example.meta),
            "blind": guesses.get("blind", {}),
            "peers": guesses.get("peers", {}),
            "permuted_images": answered.permuted_images,
            **({"likelihood": known[name]} if name in known else {}),
        }
        out.append(cast(Record, record))
    return out


def _box(example: Example, size: Sequence[int] | None) -> list[float] | None:
    """Returns the box of a record in pixels: its own or, for task refer, that of its answer."""
    if example.box is not None:
        return [int(value) for value in example.box]
    if example.task != "refer" or size is None:
        return None
    percent = text_to_box(example.answer)
    if percent is None:
        raise UserError(
            f"record {example.id}: task 'refer' needs a box or an answer {{<x1><y1><x2><y2>}}; mend it."
        )
    return [value / 100 * size[i % 2] for i, value in enumerate(percent)]


def of_labels(labels: Labels, found: Likelihood) -> LabelLikelihoods:
    """Makes what a record says of the likelihoods of its labels."""
    return {
        "rule": labels.rule,
        "group": labels.group,
        "labels": list(labels.labels),
        "log_likelihoods": found.sums,
        "tokens": found.tokens,
    }
