"""Draws examples with their images, questions, answers and boxes, for the eye."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from unimed_jax.data.example import Dataset, Example
from unimed_jax.errors import UserError
from unimed_jax.files import written_whole

COLUMNS = 4
SIDE = 300  # screen pixels of an image's longer side; also the width of a tile
LINE = 13  # screen pixels of a line of text
LETTERS, LINES = 48, 4  # of the question and of the answer each
WHITE, GREEN, GREY = (255, 255, 255), (120, 230, 120), (170, 170, 170)


def example_sheet(
    dataset: Dataset,
    path: str | Path,
    split: str = "train",
    task: str = "",
    count: int = 12,
    seed: int = 0,
) -> int:
    """Writes a PNG of `count` examples of a split and returns how many there are in it.

    The seed draws the examples. task: of this one only; empty: of every task, in turn. Raises
    UserError if there is no such example.
    """
    chosen = _chosen(dataset, split, task, count, seed)
    tiles = [_tile(dataset, example) for example in chosen]
    height = max(tile.size[1] for tile in tiles)
    sheet = Image.new("RGB", (SIDE * min(COLUMNS, len(tiles)), height * -(-len(tiles) // COLUMNS)))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % COLUMNS * SIDE, i // COLUMNS * height))
    with written_whole(path) as file:
        sheet.save(file, "PNG")
    return len(tiles)


def _chosen(dataset: Dataset, split: str, task: str, count: int, seed: int) -> list[Example]:
    """Draws examples of the tasks in turn.

    It looks at no more of a large set than it has to.
    """
    if split not in dataset.splits:
        raise UserError(
            f"data set {dataset.id} has no split {split!r}; choose from {', '.join(dataset.splits)}."
        )
    examples = dataset.examples(split)
    of_task: dict[str, list[Example]] = {}
    for place in np.random.default_rng(seed).permutation(len(examples)).tolist():
        example = examples[place]
        if task in ("", example.task):
            of_task.setdefault(example.task, []).append(example)
        if sum(min(len(some), count) for some in of_task.values()) >= count * (
            1 if task else len(dataset.info.tasks)
        ):
            break
    if not of_task:
        raise UserError(f"data set {dataset.id} has no {split} example of task {task!r}.")
    turns = [some[n] for n in range(count) for _, some in sorted(of_task.items()) if n < len(some)]
    return turns[:count]


def _tile(dataset: Dataset, example: Example) -> Image.Image:
    """Draws one example: its images side by side with its box, then id, question and answer."""
    shown = _images(dataset, example)
    about = " ".join([example.task, *(f"{key}={value}" for key, value in sorted(example.meta.items()))])
    lines = [(example.id[-LETTERS:], GREY), *((line, GREY) for line in _wrapped(about)[:2])]
    for question, answer in (*example.history, (example.question, example.answer)):
        lines += [(line, WHITE) for line in _wrapped(question)] + [
            (line, GREEN) for line in _wrapped(answer)
        ]
    tile = Image.new("RGB", (SIDE, shown.size[1] + LINE * (len(lines) + 1)))
    tile.paste(shown, (0, 0))
    draw = ImageDraw.Draw(tile)
    for number, (line, colour) in enumerate(lines):
        printable = line.encode("latin-1", "replace").decode("latin-1")  # all that PIL's own font has
        draw.text((3, shown.size[1] + 3 + LINE * number), printable, fill=colour)
    return tile


def _images(dataset: Dataset, example: Example) -> Image.Image:
    """Draws the images of an example side by side, which together are as wide as a tile."""
    if not example.images:
        return Image.new("RGB", (SIDE, 1))
    side = (SIDE - 6) // len(example.images)
    parts = []
    for key in example.images:
        pixels = dataset.image(key)
        scale = side / max(pixels.shape[:2])
        size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
        part = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
        if example.box is not None:
            x1, y1, x2, y2 = (round(v * scale) for v in example.box)
            ImageDraw.Draw(part).rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=GREEN)
        parts.append(part)
    shown = Image.new("RGB", (SIDE, max(part.size[1] for part in parts)))
    for number, part in enumerate(parts):
        shown.paste(part, (number * side, 0))
    return shown


def _wrapped(text: str) -> Sequence[str]:
    lines = textwrap.wrap(text, LETTERS)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], f"{lines[LINES - 1]} ..."]
