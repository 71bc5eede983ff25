"""Varies the pictures of training, and the boxes of their questions with them.

A variation is one affine map (turned or mirrored, rotated, scaled, shifted) and a change of light. It
depends on the seed and the number of the draw alone. No box leaves the picture: where it would, the
picture is scaled and shifted less. Where a box would have no area as text, only the light changes.
Evaluation never varies anything.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from unimed_jax.config import AugmentConfig
from unimed_jax.data.box_text import box_to_text, valid_box
from unimed_jax.data.example import Example

# A draw with a box is rotated by no more degrees than this. Its new box is the upright one around the
# rotated one, which grows: at 15 degrees a square's by 22 % a side, and what it holds does not. A draw
# whose words name a side is not rotated by more either: at 180 degrees left is right.
BOXED_DEGREES = 15.0
BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")
# Words that are no longer true of a picture that is mirrored or turned.
SIDES = re.compile(
    r"\b(left|right|bilateral|unilateral|ipsilateral|contralateral|top|bottom|upper|lower|uppermost"
    r"|lowest|lowermost|highest|above|below|beneath|side|vertical|horizontal|clockwise)"
    r"|(left|right|top|bottom)(most|ward)|[左右上下]",
    re.IGNORECASE,
)
Box = tuple[float, float, float, float]
# More than what hundredths lose on their way from text to pixels and back, where 29 are 28.999...
ROUNDING = 1e-9


def is_off(settings: AugmentConfig) -> bool:
    """Says whether the settings leave every picture as it is."""
    return settings == AugmentConfig()


class Working(NamedTuple):
    """Holds a decoded picture, shrunk so that many variations of it are cheap."""

    pixels: np.ndarray  # uint8 [h, w, 3]
    size: tuple[int, int]  # width and height as it is stored, in whose pixels boxes are

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes


def working(image: np.ndarray, settings: AugmentConfig, image_size: int) -> Working:
    """Shrinks uint8 [H, W, 3] until its shorter side is twice the encoder's size (or `scale`'s end)."""
    height, width = image.shape[:2]
    scale = max(2.0, settings.scale[1]) * image_size / min(height, width)
    if scale < 1:
        small = max(1, round(width * scale)), max(1, round(height * scale))
        image = np.array(Image.fromarray(image).resize(small, Image.Resampling.BICUBIC))
    return Working(image, (width, height))


@dataclasses.dataclass(frozen=True)
class Variation:
    """Holds what is drawn for one draw, before the size of its pictures is known."""

    quarter: int = 0  # turns by 90 degrees, clockwise
    mirrored: bool = False  # left and right change places, before it is turned
    degrees: float = 0.0  # clockwise
    scale: float = 1.0
    shift: float = 0.0  # at most so large a part of a side
    places: tuple[float, float] = (0.5, 0.5)  # of the shift in what is allowed, 0..1: across, down
    contrast: float = 1.0
    brightness: float = 0.0  # of 255


def variation(settings: AugmentConfig, seed: int, draw: int, examples: Sequence[Example]) -> Variation:
    """Draws the variation of one draw, whose questions are `examples`.

    Where their words or those of earlier turns name a side, the picture is neither turned nor mirrored,
    nor rotated if there is a box: what was leftmost or on the left would not be any more. Without a box
    it is rotated a little, which leaves the left on the left.
    """
    rng = random.Random(f"augment/{seed}/{draw}")
    low, high = settings.scale
    # Always as many numbers, so that one setting does not change what another one draws.
    turn, angle, size, across, down, light, dark = (rng.random() for _ in range(7))
    sided = any(map(_names_side, examples))
    boxed = any(example.box is not None or boxes_in(example) for example in examples)
    eighth = int(turn * 8) if settings.turns and not sided else 0
    most = 0.0 if sided and boxed else min(settings.rotate, BOXED_DEGREES if sided or boxed else 180.0)
    return Variation(
        eighth % 4,
        eighth >= 4,
        (2 * angle - 1) * most,
        low * (high / low) ** size,
        settings.shift,
        (across, down),
        1 + (2 * light - 1) * settings.contrast,
        (2 * dark - 1) * settings.brightness,
    )


def _texts(example: Example) -> tuple[str, ...]:
    """Lists question, answer and earlier turns."""
    return (example.question, example.answer, *(text for turn in example.history for text in turn))


def _names_side(example: Example) -> bool:
    return any(map(SIDES.search, _texts(example)))


def boxes_in(example: Example) -> list[str]:
    """Lists the boxes in the texts of a question, as they are written there."""
    return [match.group() for text in _texts(example) for match in BOX.finditer(text)]


@dataclasses.dataclass(frozen=True)
class Map:
    """Takes points of a stored picture to those of its variation, in pixels."""

    matrix: np.ndarray  # float64 [2, 2]
    offset: np.ndarray  # float64 [2]
    size: tuple[int, int]  # width and height of the variation

    def box(self, box: Sequence[float]) -> Box:
        """Returns the upright box around a box's image, cut to the picture."""
        x1, y1, x2, y2 = _around(self.matrix, box) + np.tile(self.offset, 2)
        width, height = self.size
        return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def map_of(drawn: Variation, size: tuple[int, int], boxes: Sequence[Sequence[float]]) -> Map:
    """Makes the map of a picture of `size` (width, height) that keeps all `boxes` inside.

    The picture stays as large as it was; by an odd number of quarter turns width and height change
    places. If a box would lose its area as text, it is the map that leaves the picture as it is.
    """
    sides = np.array(size, float)
    out = sides[::-1] if drawn.quarter % 2 else sides
    cosine, sine = np.cos(np.radians(drawn.degrees)), np.sin(np.radians(drawn.degrees))
    matrix = np.array([[cosine, -sine], [sine, cosine]]) if drawn.degrees else np.eye(2)
    matrix = matrix @ np.linalg.matrix_power(np.array([[0.0, -1.0], [1.0, 0.0]]), drawn.quarter)
    if drawn.mirrored:
        matrix = matrix @ np.diag([-1.0, 1.0])
    low, high = -drawn.shift * out, drawn.shift * out
    scale = drawn.scale
    if len(boxes):
        found = np.array([_around(matrix, box) for box in boxes])
        corner, end = found[:, :2].min(axis=0), found[:, 2:].max(axis=0)
        scale = min(scale, float((out / (end - corner)).min()))
        centre = scale * matrix @ sides / 2
        least = centre - scale * corner - out / 2
        most = out / 2 + centre - scale * end
        # What the boxes allow, and of that what the setting does, if anything.
        low, high = np.clip(low, least, most), np.clip(high, least, most)
    matrix = scale * matrix
    shift = low + np.array(drawn.places) * (high - low)
    by = Map(matrix, out / 2 - matrix @ sides / 2 + shift, (int(out[0]), int(out[1])))
    # Simpler than to keep each box large enough, which another box at the edge may not allow.
    if any(_flat(by.box(box), by.size) and not _flat(box, size, ROUNDING) for box in boxes):
        return Map(np.eye(2), np.zeros(2), size)
    return by


def _flat(box: Sequence[float], size: tuple[int, int], rounding: float = 0.0) -> bool:
    """Says whether a box has no area in hundredths rounded down, even if it ends `rounding` later."""
    x1, y1, x2, y2 = (v / side * 100 for v, side in zip(box, size * 2, strict=True))
    return int(x2 + rounding) <= int(x1) or int(y2 + rounding) <= int(y1)


def _around(matrix: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Returns the upright box around a box under a matrix, float64 [4]."""
    x1, y1, x2, y2 = box
    corners = np.array([[x1, x2, x1, x2], [y1, y1, y2, y2]], float)
    found = matrix @ corners
    return np.concatenate([found.min(axis=1), found.max(axis=1)])


def boxes_of(example: Example, size: tuple[int, int]) -> dict[str, Sequence[float]]:
    """Returns the boxes in a question's texts in pixels: `example.box` itself, others by hundredths.

    Hundredths are rounded down, so one that ends where it begins is taken to be one hundredth wide.
    """
    width, height = size
    known: dict[str, Sequence[float]] = {}
    for text in boxes_in(example):
        x1, y1, x2, y2 = map(int, BOX.fullmatch(text).groups())  # type: ignore[union-attr]
        x1, y1 = min(x1, 99), min(y1, 99)
        numbers = x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)
        known[text] = [n * side / 100 for n, side in zip(numbers, (width, height) * 2, strict=True)]
    if example.box is not None:
        known[box_to_text(example.box, width, height)] = example.box
    return known


def moved(example: Example, by: Map, size: tuple[int, int]) -> Example:
    """Writes the boxes in a question's texts as they are after the map; `size` is that before it."""
    written = {}
    for text, box in boxes_of(example, size).items():
        again = box_to_text(by.box(box), *by.size)
        # In a picture left as it is, ROUNDING alone may take the area of a box.
        written[text] = again if valid_box(again) or not valid_box(text) else text
    return _rewritten(example, written)


def _rewritten(example: Example, written: dict[str, str]) -> Example:
    def again(text: str) -> str:
        return BOX.sub(lambda match: written.get(match.group(), match.group()), text)

    return dataclasses.replace(
        example,
        question=again(example.question),
        answer=again(example.answer),
        history=tuple((again(asked), again(said)) for asked, said in example.history),
    )


def seen(picture: Working, by: Map) -> np.ndarray:
    """Draws a picture as the map shows it, uint8 [h, w, 3]; beyond its edge is the edge's median colour.

    Its size is that of the working copy, with the sides in the places that the map gives them.
    """
    height, width = picture.pixels.shape[:2]
    ratio = np.array([width / picture.size[0], height / picture.size[1]])  # working pixels a pixel
    out = (width, height) if by.size == picture.size else (height, width)
    after = np.array(out) / np.array(by.size)
    matrix = np.diag(after) @ by.matrix @ np.diag(1 / ratio)
    back = np.linalg.inv(matrix)
    start = -back @ (after * by.offset)
    if np.allclose(matrix, np.eye(2)) and np.allclose(start, 0):
        return picture.pixels
    (a, b), (d, e) = back.tolist()
    edge = np.concatenate(
        [picture.pixels[[0, -1]].reshape(-1, 3), picture.pixels[:, [0, -1]].reshape(-1, 3)]
    )
    red, green, blue = np.median(edge, axis=0).astype(int).tolist()
    image = Image.fromarray(picture.pixels).transform(
        out,
        Image.Transform.AFFINE,
        (a, b, float(start[0]), d, e, float(start[1])),
        Image.Resampling.BICUBIC,
        fillcolor=(red, green, blue),
    )
    return np.array(image)


def lit(pixels: np.ndarray, drawn: Variation) -> np.ndarray:
    """Changes contrast (around the mean of all values) and brightness of uint8 pixels."""
    if drawn.contrast == 1 and drawn.brightness == 0:
        return pixels
    values = np.arange(256, dtype=np.float64)
    mean = pixels.mean(dtype=np.float64)
    table = (values - mean) * drawn.contrast + mean + 255 * drawn.brightness
    return np.clip(np.rint(table), 0, 255).astype(np.uint8)[pixels]


class Longest(Sequence[Example]):
    """Shows examples with every box in its longest written form, for which a row must have tokens."""

    def __init__(self, examples: Sequence[Example], tokenizer):
        self._examples = examples
        forms = ["{" + f"<{n}>" * 4 + "}" for n in range(101)]
        self._longest = max(forms, key=lambda text: len(tokenizer.encode(text)))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i):
        example = self._examples[i]
        return _rewritten(example, dict.fromkeys(boxes_in(example), self._longest))
