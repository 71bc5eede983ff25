"""Reads SA-Med2D-20M as Uni-Med prepared it: organs and lesions in boxes (tasks refer, identify).

    images/<modality>/<id>.png
    regions/<modality>/<id>.json     [{"label": [x, y, width, height]}, ...] in pixels

An id is ct_00--AbdomenCT1K--Case_00011--x_0040: modality, set, case, slice. All of it is one split,
train; make others by case, which is what keeps slices of one patient together:

    splits={"train": "train[:90%] by cluster", "test": "train[90%:] by cluster"}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data import grounding
from unimed_jax.data.example import Example
from unimed_jax.data.grounding import Labelled
from unimed_jax.data.image_shards import no_image
from unimed_jax.data.info import Info
from unimed_jax.data.records import chosen_options, inside, labelled_boxes, size_of
from unimed_jax.errors import UserError

INFO = Info(
    name="samed",
    tasks=("refer", "identify"),
    splits=("train",),
    licence="CC BY-NC-SA 4.0",
    citation="Ye et al., SA-Med2D-20M, 2023",
    cluster_word="case",
    files=("regions/*/*.json",),
)
OPTIONS = {**grounding.OPTIONS, "per_image": 0}  # every box, as published


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the questions about each image's boxes, in the order of modalities and ids."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "samed")
    grounding.check_options(chosen, "samed")
    files = sorted(folder.glob("regions/*/*.json"))
    if not files:
        raise UserError(
            f"{folder} holds no regions/<modality>/<id>.json; give Uni-Med's folder of SA-Med2D as path."
        )
    for file in files:
        modality = file.parent.name
        key = f"{modality}/{file.stem}"
        path = inside(folder, folder / "images", f"{key}.png", str(file))
        size = size_of(path)
        reason = no_image(path) or ("" if size else f"image {path} is no picture")
        if reason or size is None:
            skipped.append(f"{key}: {reason}")
            continue
        found = ((where, Labelled(label, box)) for where, label, box in labelled_boxes(file))
        things = grounding.usable(found, size, skipped)
        case = "--".join(file.stem.split("--")[1:3]) or file.stem
        for example in grounding.questions(
            key, things, size, chosen, cluster=case, meta={"modality": modality}
        ):
            yield example, (path,)
