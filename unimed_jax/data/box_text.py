"""Writes boxes as text and reads them back: `{<x1><y1><x2><y2>}` in hundredths of the image's sides."""

import re
from collections.abc import Sequence

from unimed_jax.errors import UserError


def box_to_text(box: Sequence[float], width: int, height: int) -> str:
    """Writes a box as `{<x1><y1><x2><y2>}` in whole hundredths of the image's sides.

    The hundredths are 0..100, rounded down. `box`: x1, y1, x2, y2 in pixels of a `width` x `height`
    image. Raises UserError if it is empty or leaves the image.
    """
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise UserError(
            f"box {tuple(box)} is empty or leaves its image of {width} x {height} pixels; "
            "give x1 < x2 <= width and y1 < y2 <= height."
        )
    # In this order of operations, as published: 29 of 100 pixels is 28.
    values = [int(v / size * 100) for v, size in zip(box, (width, height, width, height), strict=True)]
    return "{" + "".join(f"<{v}>" for v in values) + "}"


def text_to_box(text: str) -> tuple[int, int, int, int] | None:
    """Reads the box in hundredths that `text` begins with, and returns None if there is none."""
    number = r"<(\d{1,3})>"
    match = re.match(r"\{" + number * 4 + r"\}", text.replace("<unk>", "").replace(" ", ""))
    if not match:
        return None
    x1, y1, x2, y2 = (int(g) for g in match.groups())
    return x1, y1, x2, y2


def valid_box(text: str) -> tuple[int, int, int, int] | None:
    """Reads the box that `text` begins with.

    Returns None if there is none, if it has no area, or if it does not lie within the image.
    """
    box = text_to_box(text)
    if box is None:
        return None
    x1, y1, x2, y2 = box
    return box if x1 < x2 <= 100 and y1 < y2 <= 100 else None
