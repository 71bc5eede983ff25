"""Reads SA-Med2D-20M: organs and lesions in boxes (tasks refer, identify), in either of two layouts.

The full release, whose zip over several disks is joined and unpacked (a mask's name ends with its
class and instance), or its inner folder itself:

    SAMed2Dv1/images/ct_00--AbdomenCT1K--Case_00011--x_0040.png
    SAMed2Dv1/masks/ct_00--AbdomenCT1K--Case_00011--x_0040--0000_001.png
    SAMed2Dv1/SAMed2D_v1_class_mapping_id.json      {set: {class: number}}

or a subset in boxes, as Uni-Med prepared it and `data subset` writes it:

    images/<modality>/<id>.png
    regions/<modality>/<id>.json     [{"label": [x, y, width, height]}, ...] in pixels

An id is ct_00--AbdomenCT1K--Case_00011--x_0040: modality, set, case, slice. All of it is one split,
train; make others by case, which is what keeps slices of one patient together:

    splits={"train": "train[:90%] by cluster", "test": "train[90%:] by cluster"}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unimed_jax.data import grounding, masks
from unimed_jax.data.archives import packed
from unimed_jax.data.datasets.samed import release
from unimed_jax.data.datasets.samed.names import cluster_of
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
    files=("regions/*/*.json", *(f"{place}{release.CLASSES}" for place in release.PLACES)),
)
# Of the full release, what is taken and how its masks are read.
CHOICE: dict[str, Any] = {
    "seed": 0,  # of this choice, and of that among boxes
    "fraction": 1.0,  # of the cases, all slices of a case or none
    "per_modality": 0,  # images of a modality at most; 0: all
    "per_class": 0,  # images of each class of a modality at most; 0: all
    "modalities": [],  # these only: ct, mr, x_ray ...; []: all
    "classes": [],  # these only, in the words of the answers ("left kidney"); []: all
    "without": [],  # sets that are left out: BraTS2018 ...
    "unions": False,  # whether masks are taken that unite other classes (union_...)
    "least_area": 25,  # pixels; a connected part of a mask with less is a speck and left out
}
OPTIONS = {**grounding.OPTIONS, "per_image": 0, **CHOICE}  # every box, as published


class Scene(NamedTuple):
    """Holds an image with the labelled boxes in it."""

    key: str  # <modality>/<id>
    path: Path
    size: tuple[int, int]  # width and height in pixels
    things: list[Labelled]


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the questions about each image's boxes, in the order of modalities and ids."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "samed")
    grounding.check_options(chosen, "samed")
    for key, path, size, things in scenes(folder, chosen, skipped):
        modality, _, stem = key.partition("/")
        for example in grounding.questions(
            key, things, size, chosen, cluster=cluster_of(stem), meta={"modality": modality}
        ):
            yield example, (path,)


def scenes(folder: Path, options: Mapping[str, Any], skipped: list[str]) -> Iterator[Scene]:
    """Yields each image with its boxes, from whichever layout lies in the folder.

    What cannot be used is appended to `skipped` by name. Raises UserError if no layout is found, and
    for options that mean nothing.
    """
    root = None if (folder / "regions").is_dir() else release.place(folder)
    if root:
        yield from _of_masks(root, options, skipped)
        return
    release.refuse_choice(options, CHOICE, folder)
    files = sorted(folder.glob("regions/*/*.json"), key=lambda file: (file.parent.name, file.stem))
    if not files:
        raise UserError(
            packed(folder, folder / "raw")
            or f"{folder} holds neither SAMed2Dv1/images and masks nor regions/<modality>/<id>.json; "
            "give the folder of the full release or Uni-Med's as path."
        )
    for file in files:
        key = f"{file.parent.name}/{file.stem}"
        path = inside(folder, folder / "images", f"{key}.png", str(file))
        size = _size(key, path, skipped)
        if size:
            found = ((where, Labelled(label, box)) for where, label, box in labelled_boxes(file))
            yield Scene(key, path, size, grounding.usable(found, size, skipped))


def _of_masks(root: Path, options: Mapping[str, Any], skipped: list[str]) -> Iterator[Scene]:
    """Yields the images of the full release, each class in as many boxes as it has connected parts."""
    for key, labels in release.chosen(root, options, skipped):
        stem = key.partition("/")[2]
        path = inside(root, root / "images", f"{stem}.png", str(root))
        size = _size(key, path, skipped)
        if not size:
            continue
        things: list[Labelled] = []
        for mask, label in labels:
            place = inside(root, root / "masks", f"{stem}--{mask}.png", str(root))
            boxes, fault = _boxes(place, size, options["least_area"])
            things += (Labelled(label, box) for box in boxes)
            if fault:
                skipped.append(f"{key}: mask {mask} {fault}")
        yield Scene(key, path, size, things)


def _boxes(path: Path, size: tuple[int, int], least: int) -> tuple[list[masks.Box], str]:
    """Returns the boxes of a mask, and what of it is left out, in words that follow its name."""
    try:
        mask = masks.read_mask(path)
    except UserError as error:
        return [], f"cannot be used ({str(error).rstrip('.')})"
    if mask.shape[::-1] != size:
        width, height = mask.shape[::-1]
        return [], f"has {width} x {height} pixels, its image {size[0]} x {size[1]}"
    boxes, specks = masks.parts(mask, least)
    if not boxes and not specks:
        return [], "is empty"
    part = f"{specks} part{'s' * (specks > 1)}"
    return boxes, f"has {part} of less than {least} pixels (option `least_area`)" if specks else ""


def _size(key: str, path: Path, skipped: list[str]) -> tuple[int, int] | None:
    size = no_image(path) or size_of(path)
    if isinstance(size, str):
        skipped.append(f"{key}: {size}")
        return None
    return size
