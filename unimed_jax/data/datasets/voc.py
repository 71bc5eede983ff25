"""Reads labelled boxes in the form of Pascal VOC, for the tasks refer (where) and identify (what).

Annotations/<name>.xml       boxes, whose corners count from 1 and belong to the box
ImageSets/Main/<split>.txt   names of a split, one a line: train, val, test
JPEGImages/<name>.jpg        or what <filename> says
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data import grounding
from unimed_jax.data.example import Example
from unimed_jax.data.grounding import Labelled
from unimed_jax.data.image_shards import no_image
from unimed_jax.data.info import Info
from unimed_jax.data.records import chosen_options, inside, other_size, short
from unimed_jax.errors import UserError, misspelt
from unimed_jax.parsing import read_text

INFO = Info(
    name="voc",
    tasks=("refer", "identify"),
    cluster_word="image",
    files=(
        "ImageSets/Main/train.txt",
        "ImageSets/Main/val.txt",
        "ImageSets/Main/test.txt",
        "Annotations/*.xml",
    ),
)


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the questions about each image of a split, by the options of data/grounding.py.

    A box that is empty or leaves its image is skipped, and so is an image that is missing or of
    another size than its annotation says.
    """
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, grounding.OPTIONS, "voc")
    grounding.check_options(chosen, "voc")
    for name in _names(folder, split):
        file = inside(folder, folder / "Annotations", f"{name}.xml", f"{folder}, {split}")
        things, size, picture = _annotation(file, skipped, name)
        path = inside(folder, folder / "JPEGImages", picture, str(file))
        reason = no_image(path) or other_size(path, size)
        if reason:
            skipped.append(f"{name}: {reason}")
            continue
        for example in grounding.questions(picture, things, size, chosen, cluster=picture, meta={}):
            yield example, (path,)


def _names(folder: Path, split: str) -> list[str]:
    sets = folder / "ImageSets" / "Main"
    file = sets / f"{split}.txt"
    if not file.exists():
        if split == "train" and not any((sets / f"{other}.txt").exists() for other in INFO.splits):
            raise UserError(f"{file} does not exist; give a folder in the form of Pascal VOC as path.")
        return []
    # A line of a class's own list ends with a number that says whether the class is there.
    return [line.split()[0] for line in read_text(file).splitlines() if line.strip()]


def _annotation(
    file: Path, skipped: list[str], name: str
) -> tuple[list[Labelled], tuple[int, int], str]:
    """Reads the things of an image, its (width, height) and the name of its file."""
    text = read_text(file, "restore it, or take its name out of ImageSets")
    if re.search(r"<!(doctype|entity)", text, re.IGNORECASE):
        raise UserError(f"{file} declares entities, which no annotation needs; remove the declaration.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{file} is not XML ({error}); mend it.") from error
    size = _number(root, "size/width", file), _number(root, "size/height", file)
    if other := misspelt("object", {child.tag for child in root} - {"object"}):
        raise UserError(f"{file}: <{other}> is unknown; did you mean <object>?")
    things = []
    for number, found in enumerate(root.iterfind("object")):
        corners = [
            _number(found, f"bndbox/{corner}", file) for corner in ("xmin", "ymin", "xmax", "ymax")
        ]
        # Corners count from 1, but many a tool writes 0.
        box = max(corners[0] - 1, 0), max(corners[1] - 1, 0), corners[2], corners[3]
        label = (found.findtext("name") or "").strip()
        empty = corners[0] >= corners[2] or corners[1] >= corners[3]  # a line by either way of counting
        reason = f"box {tuple(corners)} is empty" if empty else grounding.fault(box, *size)
        reason = reason if label else "it has no name"
        if reason:
            skipped.append(f"{name}: object {number}: {reason}")
        else:
            things.append(Labelled(label, box))
    return things, size, (root.findtext("filename") or f"{name}.jpg").strip()


def _number(parent: ElementTree.Element, path: str, file: Path) -> int:
    text = parent.findtext(path)
    try:
        return int(float(text or ""))
    except (ValueError, OverflowError):
        raise UserError(f"{file}: {path} is {short(text)}, which is no number; mend it.") from None
