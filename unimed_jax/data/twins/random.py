"""Draws the words and pictures of twins."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("lesion", "node", "margin", "field", "shadow", "vessel", "lobe", "signal", "density", "contour")
SHARES = {"train": 1.0, "val": 1 / 3, "test": 1 / 3}  # of the records of a twin, by split


def count(split: str, records: int) -> int:
    """Returns how many records a split has."""
    return max(1, round(SHARES[split] * records))


def words(rng: np.random.Generator, low: int = 3, high: int = 8) -> str:
    """Draws a few words."""
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def pick(rng: np.random.Generator, some: Sequence[Any]) -> Any:
    """Draws one of several values and keeps its type, which numpy's own choice would change."""
    return some[int(rng.integers(len(some)))]


def picture(
    path: Path, rng: np.random.Generator, size: tuple[int, int] = (48, 40), grey: bool = False
) -> None:
    """Writes an image of random pixels; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if grey else (size[1], size[0], 3)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Writes JSON as most tools do: characters beyond ASCII escaped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")


def write_lines(path: Path, records: Sequence[Any]) -> None:
    """Writes one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
