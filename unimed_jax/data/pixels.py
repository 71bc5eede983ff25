"""Bounds the size of pictures, and turns pixel values of any depth into 8 bits.

This is done for a block of rows at a time.
"""

from collections.abc import Callable

import numpy as np

from unimed_jax.config import ImageConfig
from unimed_jax.errors import UserError

MOST_PIXELS = 1 << 26  # of a picture: 8192 x 8192
MOST_SIDE = 1 << 16  # pixels; scaling a longer strip takes more memory than a square of as many pixels
MOST_BYTES = 1 << 29  # of a decoded picture, and of what a compressed file unpacks to
SCANS = 64  # of a progressive JPEG; each goes over the whole picture, and encoders write about ten
_SHOWN = 150  # letters at each end of a line that is too long for a sentence
# pixels that are worked on at once, so that floats of a large picture need little memory
_BLOCK = 1 << 20


def check_size(name: str, height: int, width: int, bytes_a_pixel: int = 1) -> None:
    """Raises UserError if a picture, of which only the header was read, would need too much memory.

    name: of the picture in the sentence; bytes_a_pixel: as decoded, all samples together.
    """
    if height < 1 or width < 1:
        raise UserError(f"image {name} has no pixels ({width} x {height}); give a whole file.")
    pixels = height * width
    if pixels > MOST_PIXELS or max(height, width) > MOST_SIDE or pixels * bytes_a_pixel > MOST_BYTES:
        raise UserError(
            f"image {name} has {width} x {height} pixels of {bytes_a_pixel} bytes by its header, "
            f"more than is read ({MOST_PIXELS} pixels, {MOST_BYTES >> 20} MiB, {MOST_SIDE} on a "
            "side); scale it down or cut it."
        )


def chosen_frame(view: ImageConfig, frames: int, name: str) -> int:
    """Returns the number, from 0, of the frame that is read of a picture with so many.

    The middle one of n is number n // 2. name: of the picture in the sentence. Raises UserError if
    the picture has no such frame.
    """
    if isinstance(view.frame, int):
        if view.frame >= frames:
            raise UserError(
                f"image {name} has {frames} frame{'s' * (frames > 1)}, counted from 0, so it has no "
                f"frame {view.frame}; choose another by the source's image.frame, or 'last'."
            )
        return view.frame
    return {"middle": frames // 2, "last": frames - 1}.get(str(view.frame), 0)


def one_line(text: object) -> str:
    """Writes a path, or what a decoder says, in one line of printable letters.

    The middle of a long one is left out.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(text).split()))
    return line if len(line) <= 2 * _SHOWN else f"{line[:_SHOWN]}...{line[-_SHOWN:]}"


def in_blocks(function: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> np.ndarray:
    """Applies a function of single pixels to an array, a block of rows at a time.

    The function maps rows [h, W, ...] to uint8 [h, W, ...]; the array is [H, W, ...].
    """
    rows = max(1, _BLOCK // max(1, array.shape[1]))
    with np.errstate(invalid="ignore"):  # a float may be any kind of NaN
        return np.concatenate([function(array[top : top + rows]) for top in range(0, len(array), rows)])


def bounds(array: np.ndarray, values: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float] | None:
    """Finds the least and greatest finite value of [H, W], and returns None if there is none."""
    rows = max(1, _BLOCK // max(1, array.shape[1]))
    least, greatest = np.inf, -np.inf
    for top in range(0, len(array), rows):
        with np.errstate(invalid="ignore"):
            block = values(array[top : top + rows])
        finite = block[np.isfinite(block)]
        if finite.size:
            least, greatest = min(least, float(finite.min())), max(greatest, float(finite.max()))
    return (least, greatest) if least <= greatest else None


def eight_bits(white: np.ndarray) -> np.ndarray:
    """Rounds brightness 0..1 to uint8 of the same shape.

    Values are clipped to 0..1; NaN is black.
    """
    return np.round(np.clip(np.nan_to_num(white, nan=0.0), 0, 1) * 255).astype(np.uint8)


def by_depth(array: np.ndarray, bits: int) -> np.ndarray:
    """Scales integers [H, W, ...] of `bits` bits to uint8, so that 2^bits - 1 is white.

    The brightest pixel that occurs plays no part.
    """
    if bits == 8 and array.dtype == np.uint8:
        return array
    return in_blocks(lambda rows: eight_bits(rows / (2**bits - 1)), array)


def ramp(array: np.ndarray) -> np.ndarray:
    """Spreads the finite values of [H, W] over uint8, the least black, the greatest white."""
    found = bounds(array, lambda rows: rows.astype(np.float64))
    if found is None or found[0] == found[1]:
        return np.zeros(array.shape, np.uint8)
    return in_blocks(lambda rows: eight_bits(between(rows.astype(np.float64), *found)), array)


def between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Says where values lie between low (0) and high (1), clipped to 0..1.

    Nothing overflows on the way.
    """
    if not np.isfinite(high - low):
        values, low, high = values / 4, low / 4, high / 4
    return np.clip((np.clip(values, low, high) - low) / (high - low), 0, 1)


def grey(plane: np.ndarray) -> np.ndarray:
    """Repeats a plane [H, W] over three channels [H, W, 3]."""
    return np.repeat(plane[..., None], 3, axis=-1)
