"""Makes the brain set: six tasks on slices of a real head and on medical codes.

The slices are split by slabs; the questions about codes come from ICD-10-CM.

The head is the ICBM152 average (T1 and its grey and white matter maps) inside nilearn: one average
brain, so that what is measured on it holds across slices and jitter, never across patients.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unimed_jax.config import TASKS
from unimed_jax.data.datasets.brain import codes as brain_codes
from unimed_jax.data.datasets.brain import icbm152
from unimed_jax.data.datasets.brain import questions as brain_questions
from unimed_jax.data.datasets.brain.volume import MAPS, SLABS, Head, Jitter, Slice, render
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info

INFO = Info(
    name="brain",
    tasks=TASKS,
    licence=(
        "ICBM152 2009a template (McConnell Brain Imaging Centre; free to use, copy and distribute "
        "with its notice), through nilearn (BSD-3); ICD-10-CM through simple_icd_10_cm (MIT)"
    ),
    citation=(
        "Fonov et al. 2009, Unbiased nonlinear average age-appropriate brain templates from birth "
        "to adulthood"
    ),
    note=(
        "Slices of ONE average brain: results hold across slices and jitter, and say nothing about "
        "patients."
    ),
    cluster_word="slab",
    counts={"train": 80425, "val": 709, "test": 2392},
    version="2",
)
SPLITS = INFO.splits
JITTERS = 8  # of a train slice and map; the option `jitters`
_HELD_OUT_JITTERS = 2
_SEEDS = {"train": 1, "val": 2, "test": 3}


# --------------------------------------------------------------------------------------------------
# Generation: everything follows from (head, split, jitters, seed)
# --------------------------------------------------------------------------------------------------


def draw_slices(head: Head, split: str, jitters: int = JITTERS, seed: int = 0) -> Iterator[Slice]:
    """Yields all jittered slices of a head in the slabs of a split.

    Val and test have two jitters a slice; sagittal slices, which are rarer and may be mirrored,
    have twice as many as the others. Jitter depends on place, map and seed, not on the head.
    """
    count = jitters if split == "train" else _HELD_OUT_JITTERS
    jobs = [
        (slab, position, name, copy)
        for slab in SLABS
        if slab.split == split
        for position in slab.positions
        for name in MAPS
        if name in head.maps
        for copy in range(count * (2 if slab.plane == "sagittal" else 1))
    ]
    for slab, position, name, copy in tqdm(
        jobs, f"brain slices, {split}", unit="image", leave=False, disable=None
    ):
        key = f"{slab.plane}_{position:+04d}_{name}_{copy:02d}"
        rng = generator(seed, _SEEDS[split], key)
        yield render(head, slab, position, name, Jitter.draw(rng, slab.plane), key, rng)


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[np.ndarray, ...]]]:
    """Yields examples about slices by image key, then those about codes by category.

    The options are `jitters` and `seed`.
    """
    jitters, seed = options.get("jitters", JITTERS), options.get("seed", 0)
    yield from with_images(asked(icbm152.load(), split, jitters, seed))
    for _, examples in sorted(brain_codes.ask(seed)[split].items()):
        for example in examples:
            yield example, ()


def asked(
    head: Head, split: str, jitters: int = JITTERS, seed: int = 0
) -> list[tuple[Slice, list[Example]]]:
    """Returns the slices of a split with their examples, in the order in which they were drawn."""
    slices = list(draw_slices(head, split, jitters, seed))
    found = brain_questions.ask(slices, split, generator(seed, _SEEDS[split], "questions"))
    return list(zip(slices, found, strict=True))


def with_images(
    slices: Iterable[tuple[Slice, list[Example]]],
) -> Iterator[tuple[Example, tuple[np.ndarray, ...]]]:
    """Yields the examples about slices with their images, in the order of the image keys."""
    for piece, examples in sorted(slices, key=lambda pair: pair[0].key):
        for example in examples:
            yield example, (piece.image,)


def generator(*words: object) -> np.random.Generator:
    """Makes a generator of random numbers that depends on the given words alone."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))
