"""Writes a subset of SA-Med2D-20M in boxes, with a table of what each modality and class gets."""

import csv
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unimed_jax.data.datasets.samed import CHOICE, OPTIONS, scenes
from unimed_jax.data.datasets.samed.names import cluster_of
from unimed_jax.errors import UserError
from unimed_jax.files import new_folder

TABLE = "subset.csv"
ALL = "(all)"  # stands for every class of a modality, and for every modality


class Row(NamedTuple):
    """Holds what a class of a modality has in a subset."""

    modality: str
    label: str
    cases: int
    images: int
    boxes: int


def write_subset(folder: Path, out: Path, options: Mapping[str, Any]) -> tuple[list[Row], int]:
    """Writes the images and boxes that `options` choose from the folder into the new folder `out`.

    There are images/<modality>/<id>.png, regions/<modality>/<id>.json, subset.csv (the table),
    subset.json (the options) and skipped.txt. The reader makes the same examples of it as of the
    folder with these options, if it is given the same seed. Returns the table and the number of
    records that were left out. Raises UserError if nothing is chosen, for wrong options, and if
    `out` exists.
    """
    skipped: list[str] = []
    tally: dict[tuple[str, str], tuple[set[str], list[int]]] = defaultdict(lambda: (set(), [0, 0]))
    with new_folder(out) as place:
        for key, path, _, things in scenes(folder, {**OPTIONS, **options}, skipped):
            modality, _, stem = key.partition("/")
            for kind, end in (("images", "png"), ("regions", "json")):
                (place / kind / modality).mkdir(parents=True, exist_ok=True)
                target = place / kind / modality / f"{stem}.{end}"
                if kind == "images":
                    shutil.copyfile(path, target)
                    continue
                boxes = [{label: [x1, y1, x2 - x1, y2 - y1]} for label, (x1, y1, x2, y2) in things]
                target.write_text(json.dumps(boxes), encoding="utf-8")
            for pair in {(ALL, ALL), (modality, ALL), *((modality, thing.label) for thing in things)}:
                cases, counts = tally[pair]
                cases.add(cluster_of(stem))
                counts[0] += 1
                counts[1] += sum(pair[1] in (ALL, thing.label) for thing in things)
        if not tally:
            raise UserError(f"data subset: the options choose no image of {folder}; widen them.")
        rows = [Row(*pair, len(cases), *counts) for pair, (cases, counts) in sorted(tally.items())]
        with (place / TABLE).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("modality", "class", "cases", "images", "boxes"), *rows])
        said = {key: options.get(key, value) for key, value in CHOICE.items()}
        (place / "subset.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        (place / "skipped.txt").write_text("".join(f"{line}\n" for line in skipped), encoding="utf-8")
    return rows, len(skipped)
