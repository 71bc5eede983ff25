"""Reads boxes in answers, measures their overlap with the true ones, and scores refer (REC)."""

from collections.abc import Sequence

import numpy as np

from unimed_jax.data.box_text import valid_box
from unimed_jax.evaluate.metrics.registry import Record, metric
from unimed_jax.evaluate.statistics import Measure

Box = tuple[float, float, float, float]


def predicted_box(text: str, size: tuple[int, int]) -> Box | None:
    """Reads the box at the beginning of an answer, in pixels of an image of `size` (width, height).

    Returns None without a box, and for one without an area or not within the image.
    """
    percent = valid_box(text)
    return in_pixels(percent, size) if percent else None


def in_pixels(percent: Sequence[int], size: tuple[int, int]) -> Box:
    """Scales a box from hundredths of the sides to pixels of an image of `size` (width, height)."""
    (x1, y1, x2, y2), (width, height) = percent, size
    return x1 / 100 * width, y1 / 100 * height, x2 / 100 * width, y2 / 100 * height


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Computes the intersection over union of two boxes, which is 0 if `a` is empty.

    Boxes are x1, y1, x2, y2, with the ends excluded.
    """
    return overlap(a, b, 0.0) if a[2] > a[0] and a[3] > a[1] else 0.0


def overlap(a: Sequence[float], b: Sequence[float], extra: float) -> float:
    """Computes intersection over union of boxes x1, y1, x2, y2 with sides `extra` pixels longer."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + extra)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + extra)
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if width * height else 0.0


def _found(record: Record) -> Box | None:
    assert record["image_size"] is not None  # a record of refer has an image
    width, height = record["image_size"]
    return predicted_box(record["prediction"], (width, height))


def _overlaps(records: Sequence[Record]) -> np.ndarray:
    """Computes the IoU of each predicted box with the true one, float64 [n].

    It is 0 where no box was predicted.
    """
    found = [(_found(record), record["box"]) for record in records]
    return np.array([iou(box, truth) if box and truth else 0.0 for box, truth in found])


@metric("miou", primary_for=("refer",), only=("refer",))
def miou(records: Sequence[Record]) -> Measure:
    """Computes the mean intersection over union; an answer without a valid box counts 0."""
    return Measure.mean(_overlaps(records).tolist())


@metric("accuracy_iou50", tasks=("refer",), only=("refer",))
def accuracy_iou50(records: Sequence[Record]) -> Measure:
    """Computes the share of boxes with an IoU above 0.5."""
    return Measure.mean((_overlaps(records) > 0.5).tolist())


@metric("parsed", tasks=("refer",), only=("refer",))
def parsed(records: Sequence[Record]) -> Measure:
    """Computes the share of answers that begin with a valid box: with an area, within the image."""
    return Measure.mean([_found(record) is not None for record in records])
