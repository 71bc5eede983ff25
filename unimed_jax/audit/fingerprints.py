"""Computes fingerprints of a prepared set's images: pixels, shape of the picture, size and headers.

They are kept in the cache by the set's checksum, a file for each part of the images, so that a
killed audit goes on where it stopped and an unchanged set is not read again.
"""

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from unimed_jax.audit.private import of_headers
from unimed_jax.data.store import Store
from unimed_jax.errors import UserError
from unimed_jax.files import written_whole

VERSION = 2  # raise it when a fingerprint changes
PART = 500  # images of a file
SIDE = 32  # pixels of the thumbnail that the shape is computed from
WAVES = 16  # of it across and down
SHAPE = WAVES * WAVES  # numbers of a shape

RECORD = np.dtype(
    [
        ("pixels", "V16"),  # first half of the sha256 of size and pixels; zero: unreadable
        ("size", "i4", (2,)),  # height and width in pixels
        ("shape", "f2", (SHAPE,)),  # see `shape_of`
    ]
)


class Fingerprints(NamedTuple):
    """Holds the fingerprints of images, in the order of `keys`, and what their headers say."""

    keys: Sequence[str]
    records: np.ndarray  # [images] of RECORD
    notes: Mapping[str, Mapping[str, Any]]  # key -> what `_note` says, of images with a note only

    @property
    def readable(self) -> np.ndarray:
        """Says which images could be read, bool [images]."""
        return self.records["pixels"] != np.zeros((), "V16")

    @property
    def unreadable(self) -> dict[str, str]:
        """Gives the reason for each image that cannot be read."""
        return {key: note["unreadable"] for key, note in self.notes.items() if "unreadable" in note}


def fingerprints(
    folder: Path, id: str, keys: Sequence[str], cache: Path, processes: int = 2
) -> Fingerprints:
    """Computes or reads the fingerprints of images of a store, with a progress bar.

    folder: where the store is. id: what the progress bar calls the set.
    """
    store = Store(folder)
    named = "\0".join([store.checksum, str(VERSION), *keys])
    which = hashlib.sha256(named.encode()).hexdigest()[:12]
    place = cache / "audit" / f"{store.id}-{which}"
    parts = [(start, place / f"{start:09d}.npy") for start in range(0, len(keys), PART)]
    waiting = [(start, file) for start, file in parts if not file.is_file()]
    if waiting:
        place.mkdir(parents=True, exist_ok=True)
        bar = tqdm(
            desc=f"looking at images of {id}", total=len(keys), unit=" images", leave=False, disable=None
        )
        bar.update(len(keys) - sum(len(keys[start : start + PART]) for start, _ in waiting))
        with bar:
            tasks = [(str(folder), list(keys[start : start + PART])) for start, _ in waiting]
            for number, (records, notes) in _parts(tasks, processes):
                file = waiting[number][1]
                # The notes come first: a part counts as done when its records are there.
                with written_whole(file.with_suffix(".json")) as unfinished:
                    unfinished.write_text(json.dumps(notes), encoding="utf-8")
                with written_whole(file) as unfinished, unfinished.open("wb") as stream:
                    np.save(stream, records)
                bar.update(len(records))
    out = np.empty(len(keys), RECORD)
    found: dict[str, dict[str, Any]] = {}
    for start, file in parts:
        out[start : start + PART] = np.load(file, allow_pickle=False)
        found |= json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return Fingerprints(keys, out, found)


def _parts(
    tasks: Sequence[tuple[str, list[str]]], processes: int
) -> Iterator[tuple[int, tuple[np.ndarray, dict[str, dict[str, Any]]]]]:
    """Yields (number, `_part`) of each task as it is done, in processes if there are several."""
    if processes == 1 or len(tasks) == 1:
        yield from ((number, _part(*task)) for number, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")  # threads of JAX do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context) as pool:
        running = {pool.submit(_part, *task): number for number, task in enumerate(tasks)}
        for done in concurrent.futures.as_completed(running):
            yield running.pop(done), done.result()


def _part(folder: str, keys: list[str]) -> tuple[np.ndarray, dict[str, dict[str, Any]]]:
    """Computes the fingerprints of some images, and notes of those that need one.

    A record of zeros means that the image cannot be read.
    """
    store = Store(folder)
    records = np.zeros(len(keys), RECORD)
    notes: dict[str, dict[str, Any]] = {}
    for number, key in enumerate(keys):
        note: dict[str, Any] = {}
        try:
            records[number] = fingerprint(store.image(key))
            note = of_headers(store.encoded(key))
        except UserError as error:
            note["unreadable"] = str(error)
        if note:
            notes[key] = note
    return records, notes


def fingerprint(image: np.ndarray) -> np.ndarray:
    """Computes the fingerprint of an image uint8 [H, W, 3], a single record."""
    digest = hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()[:16]
    record = np.zeros((), RECORD)
    record["pixels"] = np.void(digest)
    record["size"] = image.shape[:2]
    record["shape"] = shape_of(image)
    return record


def shape_of(image: np.ndarray) -> np.ndarray:
    """Describes what an image uint8 [H, W, 3] shows by its slow waves: float32 [SHAPE] of length 1.

    They are the cosine transform of a thumbnail, without the mean and with more weight on faster
    waves, because what all pictures of a kind have in common is slow. Another size, brightness,
    contrast or compression changes little; the mirror image changes the sign of every other column
    (MIRROR). An image of one colour has length 0.
    """
    grey = Image.fromarray(image).convert("L")
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    waves, weight = _waves()
    shape = (waves @ thumbnail @ waves.T * weight).reshape(SHAPE)
    length = np.linalg.norm(shape)
    return shape / length if length > 1e-3 else np.zeros(SHAPE, np.float32)


@functools.cache
def _waves() -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of the cosine transform [WAVES, SIDE] and the weights [WAVES, WAVES]."""
    k, n = np.arange(WAVES)[:, None], np.arange(SIDE)[None]
    waves = np.cos(np.pi * (2 * n + 1) * k / (2 * SIDE)) * np.sqrt(2 / SIDE)
    waves[0] /= np.sqrt(2)
    weight = np.sqrt(np.hypot(k, k.T))
    return waves.astype(np.float32), weight.astype(np.float32)


# A mirrored image's shape is its shape times this, float32 [SHAPE].
MIRROR = np.tile(np.where(np.arange(WAVES) % 2, -1.0, 1.0), WAVES).astype(np.float32)
