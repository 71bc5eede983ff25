"""Reads masks, and makes boxes of the connected parts of one.

A mask is a picture of one class: whatever is not zero belongs to it.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from unimed_jax.data.images import READABLE, check_header, read_bytes
from unimed_jax.data.pixels import one_line
from unimed_jax.errors import UserError

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, the ends outside
_TOUCHING = np.ones((3, 3), int)  # pixels belong together across corners too


def read_mask(path: str | Path) -> np.ndarray:
    """Reads a mask as bool [H, W].

    Values are taken as they are stored, so that a 1 counts in files of any depth; of colours any
    channel counts, and transparency does not. Raises UserError for what is not a picture, cannot be
    decoded or is too large.
    """
    data = read_bytes(path)
    check_header(data, str(path))
    try:
        with Image.open(io.BytesIO(data), formats=READABLE) as image:
            clear = image.mode in ("LA", "RGBA", "La", "RGBa", "PA")
            opaque = image.convert("L" if image.mode[0] == "L" else "RGB") if clear else image
            values = np.asarray(opaque)
    except Exception as error:  # decoders raise whatever they come across in a damaged file
        reason = one_line(error) or type(error).__name__
        raise UserError(f"mask {one_line(path)} cannot be read ({reason}); get it again.") from error
    return (values if values.ndim == 2 else values.any(axis=-1)) != 0


def parts(mask: np.ndarray, least: int) -> tuple[list[Box], int]:
    """Returns the boxes of a mask's connected parts, and how many parts are left out as specks.

    mask: bool [H, W]. Pixels that touch at a side or a corner belong together. A part of less than
    `least` pixels is a speck. The boxes are in the order of their upper left corners, row by row.
    """
    numbered, _ = ndimage.label(mask, _TOUCHING)
    areas = np.bincount(numbered.ravel())[1:]
    found = ndimage.find_objects(numbered)
    boxes = [
        (columns.start, rows.start, columns.stop, rows.stop)
        for (rows, columns), area in zip(found, areas, strict=True)
        if area >= least
    ]
    return sorted(boxes, key=lambda box: (box[1], box[0], box)), len(areas) - len(boxes)
