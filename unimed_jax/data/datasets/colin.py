"""Reads another head than the brain set's: one person's T1 (Colin 27), boxes from the AAL atlas.

It is for testing alone. Slices lie where the test slices of the brain set lie, with the same jitter,
and the questions are made by the same code; structures are those that both heads name.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.datasets import brain
from unimed_jax.data.datasets.brain.volume import SIDES, STRUCTURES, Head, read_nifti, to_grid
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import chosen_options
from unimed_jax.errors import UserError

INFO = Info(
    name="colin",
    tasks=("vqa", "refer", "identify", "caption", "cls"),
    splits=("test",),
    licence="BSD-3-Clause, as the copyright file of Debian's mricron-data says of all its files",
    citation=(
        "Holmes et al. 1998, Enhancement of MR images using registration for signal averaging; "
        "Tzourio-Mazoyer et al. 2002, Automated anatomical labeling of activations in SPM"
    ),
    note="Slices of ONE person's head, for testing alone: results hold for this head.",
    cluster_word="slab",
    files=("aal.nii.gz", "ch2.nii.gz", "ch2bet.nii.gz"),
    counts={"test": 1149},
)
OPTIONS = {
    "skull": False,  # the whole head (ch2) in place of the brain alone (ch2bet)
    "seed": 0,  # of jitter and questions, as in the brain set
}
_SHAPE = (181, 217, 181)  # voxels of each of the three files
_AGAIN = "copy it again from Debian's package mricron-data (/usr/share/mricron/templates)"
# Fluid is darker than 40, grey matter lies near 86 and white matter near 113: within these limits grey
# and white are as bright as in the T1 of the brain set.
_WINDOW = (38, 125)
# What the atlas calls the left one; the right one is the next number.
_LEFT = {
    "thalamus": 77,
    "caudate nucleus": 71,
    "putamen": 73,
    "hippocampus": 37,
    "amygdala": 41,
}
_CEREBELLUM = list(range(91, 117))  # both hemispheres and the vermis


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[np.ndarray, ...]]]:
    """Yields the examples by image key."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "colin")
    yield from brain.with_images(brain.asked(load(folder, chosen["skull"]), split, seed=chosen["seed"]))


def load(folder: Path, skull: bool = False) -> Head:
    """Reads the T1 and the atlas, and lays both into the common grid by their sforms.

    Raises UserError for a file that is missing or is another one, and for an atlas without one of
    the structures.
    """
    t1, t1_place = read_nifti(folder / ("ch2.nii.gz" if skull else "ch2bet.nii.gz"), _SHAPE, _AGAIN)
    atlas = folder / "aal.nii.gz"
    numbers, place = read_nifti(atlas, _SHAPE, _AGAIN)
    found = set(np.unique(numbers).tolist())
    labels = np.zeros(256, np.uint8)  # by the atlas's number
    structures = []
    for name in STRUCTURES:
        side, _, part = name.partition(" ")
        if part in _LEFT:
            own = [_LEFT[part] + SIDES.index(side)]
        elif name == "cerebellum":
            own = _CEREBELLUM
        else:
            continue  # the atlas does not name it
        if not found.intersection(own):
            raise UserError(f"{atlas} has no voxel of the {name} (AAL's number {own[0]}); {_AGAIN}.")
        labels[own] = STRUCTURES.index(name) + 1
        structures.append(name)
    dark, bright = _WINDOW
    shown = (to_grid(t1, t1_place, order=1).astype(np.float32) - dark) / (bright - dark)
    return Head(
        {"t1": np.clip(shown, 0, 1)}, to_grid(labels[numbers], place, order=0), tuple(structures)
    )
