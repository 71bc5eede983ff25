"""Boxes in answers and their overlap."""

from collections.abc import Sequence

from unimed_jax.data.forms import text_to_box

Box = tuple[float, float, float, float]


def predicted_box(text: str, size: tuple[int, int]) -> Box | None:
    """The box at the beginning of an answer, in pixels of an image of `size` (width, height), or None."""
    percent = text_to_box(text)
    if percent is None:
        return None
    width, height = size
    x1, y1, x2, y2 = percent
    return x1 / 100 * width, y1 / 100 * height, x2 / 100 * width, y2 / 100 * height


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes x1, y1, x2, y2 whose ends are outside; 0 for an empty or inverted box."""
    return overlap(a, b, 0.0) if a[2] > a[0] and a[3] > a[1] else 0.0


def overlap(a: Sequence[float], b: Sequence[float], extra: float) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + extra)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + extra)
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if width * height else 0.0
