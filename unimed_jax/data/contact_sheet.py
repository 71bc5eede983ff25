"""Draws a contact sheet: a data set's images with their labelled boxes, for the eye."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from unimed_jax.data.example import Dataset, Example
from unimed_jax.files import written_whole

EXAMINED = 100_000
_SIDE = 320  # screen pixels of an image's longer side
_COLUMNS = 6
_LINE = 13  # screen pixels of a line of text
_NAMES = 3  # lines of two names under an image
_COLOURS = (
    (255, 90, 90),
    (90, 220, 90),
    (110, 160, 255),
    (255, 220, 60),
    (240, 120, 255),
    (80, 230, 230),
)


def contact_sheet(
    datasets: Sequence[Dataset], path: str | Path, split: str = "train", rows: int = 6, seed: int = 0
) -> Path | None:
    """Writes a PNG of `rows` x 6 images of a split, in which data sets, planes and maps take turns.

    Returns its path, or None if there is no image. Boxes are those of the examples that have one
    (refer, identify), labelled with the structure; the heading of each image is its key. At most
    EXAMINED examples of a set are looked at, evenly spaced.
    """
    queues = [queue for d in {d.id: d for d in datasets}.values() for queue in _queues(d, split, seed)]
    turns = [
        queue[n] for n in range(max(map(len, queues), default=0)) for queue in queues if n < len(queue)
    ]
    if not turns:
        return None
    tiles = [_tile(d.image(key), key, examples) for d, key, examples in turns[: rows * _COLUMNS]]
    width, height = (max(t.size[i] for t in tiles) for i in (0, 1))
    sheet = Image.new("RGB", (width * _COLUMNS, height * -(-len(tiles) // _COLUMNS)))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % _COLUMNS * width, i // _COLUMNS * height))
    path = Path(path)
    with written_whole(path) as file:
        sheet.save(file, "PNG")
    return path


def _queues(dataset: Dataset, split: str, seed: int) -> list[list[tuple[Dataset, str, list[Example]]]]:
    """Lists the images of a set with the examples about each, in a queue for each plane and map."""
    if split not in dataset.splits:
        return []
    examples = dataset.examples(split)
    by_image: dict[str, list[Example]] = defaultdict(list)
    for place in np.unique(np.linspace(0, len(examples) - 1, min(len(examples), EXAMINED)).astype(int)):
        example = examples[int(place)]
        for key in example.images:
            by_image[key].append(example)
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    drawn = np.random.default_rng(seed).permutation(sorted(by_image)).tolist()
    # Images with three boxes and more come first, they show most.
    boxes = {key: len({e.box for e in by_image[key] if e.box}) for key in drawn}
    for key in sorted(drawn, key=lambda k: -min(boxes[k], 3)):
        meta = by_image[key][0].meta
        kinds[meta.get("plane", ""), meta.get("map", "")].append(key)
    return [[(dataset, key, by_image[key]) for key in keys] for _, keys in sorted(kinds.items())]


def _tile(image: np.ndarray, key: str, examples: list[Example]) -> Image.Image:
    """Draws an image with its key above it, its boxes in it and the names of the boxes below it.

    Each name has the colour of its box.
    """
    scale = _SIDE / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])  # a strip keeps a pixel
    tile = Image.new("RGB", (width + 6, _LINE * (1 + _NAMES) + height))
    tile.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (0, _LINE))
    draw = ImageDraw.Draw(tile)
    draw.text((2, 1), key, fill=(255, 255, 255))
    boxes = {e.meta.get("structure", ""): e.box for e in examples if e.box is not None}
    for i, (name, box) in enumerate(sorted(boxes.items())[: 2 * _NAMES]):
        colour = _COLOURS[i % len(_COLOURS)]
        x1, y1, x2, y2 = (round(v * scale) for v in box)
        draw.rectangle((x1, y1 + _LINE, x2 - 1, y2 + _LINE - 1), outline=colour)
        draw.text((2 + i % 2 * width // 2, height + _LINE * (1 + i // 2)), name, fill=colour)
    return tile
