"""Writes twins of SA-Med2D-20M: one set of scenes in boxes, and as the full release has them."""

import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from unimed_jax.data.twins.random import pick, write_json

CELL = 16  # pixels; each thing lies in a cell of its own, so that no two touch
SIZE = (64, 48)  # width and height
# set -> class -> number, as in the release: numbers as text, and classes that unite others
CLASSES = {
    "AbdomenCT1K": {
        "liver": "0000",
        "left_kidney": "0001",
        "spleen": "0002",
        "union_liver_spleen": "0003",
    },
    "CHAOS_Task_4": {"liver": "0001", "right_kidney": "0004"},
}
SETS = {"ct_00": "AbdomenCT1K", "mr_t1": "CHAOS_Task_4"}


class Scene(NamedTuple):
    """Holds an image and the things in it: class, and their boxes x1, y1, x2, y2 row by row."""

    name: str
    pixels: np.ndarray
    things: dict[str, list[tuple[int, int, int, int]]]
    free: list[tuple[int, int]]  # corners of cells that hold nothing


def _scenes(records: int, rng: np.random.Generator) -> list[Scene]:
    """Draws the images, three slices a case, in which one class may have several things."""
    found = []
    for i in range(records):
        modality = "ct_00" if i // 3 % 2 == 0 else "mr_t1"
        known = [label for label in CLASSES[SETS[modality]] if not label.startswith("union_")]
        cells = [(x, y) for y in range(0, SIZE[1], CELL) for x in range(0, SIZE[0], CELL)]
        order = [cells[k] for k in rng.permutation(len(cells))]
        things: dict[str, list[tuple[int, int, int, int]]] = {}
        for x, y in order[: int(rng.integers(2, 7))]:
            x, y = x + int(rng.integers(1, 3)), y + int(rng.integers(1, 3))
            box = x, y, x + int(rng.integers(6, 13)), y + int(rng.integers(6, 13))
            things.setdefault(pick(rng, known), []).append(box)
        for boxes in things.values():
            boxes.sort(key=lambda box: (box[1], box[0]))
        pixels = rng.integers(0, 256, (SIZE[1], SIZE[0]), dtype=np.uint8)
        name = f"{modality}--{SETS[modality]}--Case_{i // 3:05d}--x_{i:04d}"
        found.append(Scene(name, pixels, things, order[7:]))
    return found


def _in_order(scene: Scene) -> list[str]:
    """Lists the classes of a scene by their number."""
    return sorted(scene.things, key=CLASSES[scene.name.split("--")[1]].__getitem__)


def regions(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes boxes, as Uni-Med prepared them."""
    for scene in _scenes(records, rng):
        modality = scene.name.partition("_")[0]
        (folder / "images" / modality).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.pixels).save(folder / "images" / modality / f"{scene.name}.png")
        found = [
            {label.replace("_", " "): [x1, y1, x2 - x1, y2 - y1]}
            for label in _in_order(scene)
            for x1, y1, x2, y2 in scene.things[label]
        ]
        write_json(folder / "regions" / modality / f"{scene.name}.json", found)


def release(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the full release, next to the zip over two disks that it comes in.

    A class with several things has one mask that holds them all or a mask for each; some masks have
    a speck besides, one is empty, and one unites two classes.
    """
    root = folder / "SAMed2Dv1"
    for place in ("images", "masks"):
        (root / place).mkdir(parents=True)
    listed: dict[str, list[str]] = {}
    for number, scene in enumerate(_scenes(records, rng)):
        Image.fromarray(scene.pixels).save(root / f"images/{scene.name}.png")
        numbers = CLASSES[scene.name.split("--")[1]]
        written: dict[str, np.ndarray] = {}
        for label in _in_order(scene):
            boxes = scene.things[label]
            for i, some in enumerate([boxes] if number % 2 else [[box] for box in boxes]):
                written[f"{numbers[label]}_{i:03d}"] = _mask(some)
        first = next(iter(written))
        if number % 4 == 0:
            x, y = scene.free[0]
            written[first][y, x] = 255  # a speck
        if number == 1:
            written[f"{first[:4]}_099"] = _mask([])
        if number == 2 and "union_liver_spleen" in numbers:
            boxes = [box for some in scene.things.values() for box in some]
            written[f"{numbers['union_liver_spleen']}_000"] = _mask(boxes)
        for name, mask in written.items():
            Image.fromarray(mask).save(root / f"masks/{scene.name}--{name}.png")
        listed[f"images/{scene.name}.png"] = [f"masks/{scene.name}--{name}.png" for name in written]
    (root / "SAMed2D_v1.json").write_text(json.dumps(listed))
    (root / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(CLASSES))
    (folder / "SA-Med2D-16M.z01").write_bytes(b"PK\7\10")
    (folder / "SA-Med2D-16M.zip").write_bytes(b"PK\5\6" + struct.pack("<4H2LH", 1, 1, 0, 0, 0, 0, 0))


def _mask(boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Fills boxes with 255, the corners left out where there is room, as organs are no rectangles."""
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = 255
        mask[y1, x1] = mask[y2 - 1, x2 - 1] = 0
    return mask
