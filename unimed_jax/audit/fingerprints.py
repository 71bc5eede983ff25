"""Computes fingerprints of a prepared set's images: pixels, shape of the picture, size and headers.

They are kept in the cache by the set's checksum, two files for each part of the images, so that a
killed audit goes on where it stopped and an unchanged set is not read again. A damaged part is
computed again.
"""

import concurrent.futures
import functools
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from unimed_jax.audit.private import of_headers
from unimed_jax.data.image_shards import processes as pool_of
from unimed_jax.data.store import Store
from unimed_jax.errors import UserError
from unimed_jax.files import written_whole
from unimed_jax.parsing import no_file, parse_json

VERSION = 4  # raise it when a fingerprint changes
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


# records [images] of RECORD, and notes by key
Part = tuple[np.ndarray, dict[str, dict[str, Any]]]


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
    named = "\0".join([store.checksum, str(VERSION), str(PART), *keys])
    which = hashlib.sha256(named.encode()).hexdigest()[:12]
    place = cache / "audit" / f"{store.id}-{which}"
    parts = [(start, place / f"{start:09d}.npy") for start in range(0, len(keys), PART)]
    found = {start: _kept(file, len(keys[start : start + PART])) for start, file in parts}
    waiting = [(start, file) for start, file in parts if found[start] is None]
    if waiting:
        place.mkdir(parents=True, exist_ok=True)
        bar = tqdm(
            desc=f"looking at images of {id}", total=len(keys), unit=" images", leave=False, disable=None
        )
        bar.update(len(keys) - sum(len(keys[start : start + PART]) for start, _ in waiting))
        with bar:
            tasks = [(str(folder), list(keys[start : start + PART])) for start, _ in waiting]
            for number, part in _parts(tasks, processes):
                start, file = waiting[number]
                _keep(file, part)
                found[start] = part
                bar.update(len(part[0]))
    done = [part for part in found.values() if part is not None]
    records = np.concatenate([np.empty(0, RECORD), *(part[0] for part in done)])
    return Fingerprints(keys, records, {key: note for _, notes in done for key, note in notes.items()})


def _keep(file: Path, part: Part) -> None:
    """Writes a part's records, and beside them its notes with the checksum of the records."""
    records, notes = part
    stream = io.BytesIO()
    np.save(stream, records)
    content = {"checksum": hashlib.sha256(stream.getvalue()).hexdigest(), "notes": notes}
    with written_whole(file.with_suffix(".json")) as unfinished:
        unfinished.write_text(json.dumps(content), encoding="utf-8")
    with written_whole(file) as unfinished:
        unfinished.write_bytes(stream.getvalue())


def _kept(file: Path, count: int) -> Part | None:
    """Reads a part of `count` images that was kept; None if it was not, or not whole."""
    if no_file(file) or no_file(file.with_suffix(".json")):
        return None
    try:
        content = parse_json(file.with_suffix(".json").read_bytes(), str(file))
        stored, notes = file.read_bytes(), content["notes"]
        if hashlib.sha256(stored).hexdigest() != content["checksum"]:
            return None
        records = np.load(io.BytesIO(stored), allow_pickle=False)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None
    return (records, notes) if records.dtype == RECORD and records.shape == (count,) else None


def _parts(tasks: Sequence[tuple[str, list[str]]], processes: int) -> Iterator[tuple[int, Part]]:
    """Yields (number, `_part`) of each task as it is done, in processes if there are several.

    Raises UserError if one of the processes is ended from outside.
    """
    if processes == 1 or len(tasks) == 1:
        yield from ((number, _part(*task)) for number, task in enumerate(tasks))
        return
    try:
        with pool_of(min(processes, len(tasks))) as pool:
            running = {pool.submit(_part, *task): number for number, task in enumerate(tasks)}
            for done in concurrent.futures.as_completed(running):
                yield running.pop(done), done.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that looks at images was ended from outside, as the system does when memory is "
            "short; give the same command again with fewer --processes, and it goes on."
        ) from error


def _part(folder: str, keys: list[str]) -> Part:
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
