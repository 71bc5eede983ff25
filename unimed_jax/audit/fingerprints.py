"""Computes fingerprints of a prepared set's images, which find equal and nearly equal ones.

They are kept in the cache by the set's checksum, a file for each part of the images, so that a
killed audit goes on where it stopped and an unchanged set is not read again.
"""

import concurrent.futures
import hashlib
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from unimed_jax.data.store import Store
from unimed_jax.errors import UserError
from unimed_jax.files import written_whole

VERSION = 1  # raise it when a fingerprint changes
PART = 2_000  # images of a file
SIDE = 32  # pixels of a thumbnail
BITS = 16  # a row and a column of the gradient's signs: 256 bits in all

_RECORD = np.dtype(
    [
        ("pixels", "V16"),  # first half of the sha256 of shape and pixels; zero: unreadable
        ("bits", "u8", (4,)),  # whether it gets brighter to the right, in 16 x 16 cells
        ("mirrored", "u8", (4,)),  # the same of its mirror image
        ("thumbnail", "u1", (SIDE, SIDE)),
    ]
)


class Fingerprints(NamedTuple):
    """Holds the fingerprints of a set's images and what could not be read.

    They are in the order of `keys`.
    """

    keys: Sequence[str]
    records: np.ndarray  # [images] of _RECORD
    unreadable: dict[str, str]  # key -> reason

    @property
    def readable(self) -> np.ndarray:
        """Says which images could be read, bool [images]."""
        return self.records["pixels"] != np.zeros((), "V16")


def fingerprints(folder: Path, keys: Sequence[str], cache: Path, processes: int = 2) -> Fingerprints:
    """Computes or reads the fingerprints of images of a store, with a progress bar.

    folder: where the store is.
    """
    store = Store(folder)
    named = "\0".join([store.checksum, str(VERSION), *keys])
    which = hashlib.sha256(named.encode()).hexdigest()[:12]
    place = cache / "audit" / f"{store.id}-{which}"
    parts = [(start, place / f"{start:09d}.npy") for start in range(0, len(keys), PART)]
    waiting = [(start, file) for start, file in parts if not file.is_file()]
    if waiting:
        place.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")  # threads of JAX do not survive a fork
        bar = tqdm(
            desc=f"looking at images of {store.id}",
            total=len(keys),
            unit=" images",
            leave=False,
            disable=None,
        )
        bar.update(len(keys) - sum(len(keys[start : start + PART]) for start, _ in waiting))
        with bar, concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
            tasks = {
                pool.submit(_part, str(folder), list(keys[start : start + PART])): (start, file)
                for start, file in waiting
            }
            for done in concurrent.futures.as_completed(tasks):
                _, file = tasks[done]
                records = done.result()
                with written_whole(file) as unfinished, unfinished.open("wb") as stream:
                    np.save(stream, records)
                bar.update(len(records))
    records = (
        np.concatenate([np.load(file, allow_pickle=False) for _, file in parts])
        if parts
        else np.empty(0, _RECORD)
    )
    lost = np.nonzero(records["pixels"] == np.zeros((), "V16"))[0].tolist()
    return Fingerprints(keys, records, {keys[i]: _reason(store, keys[i]) for i in lost})


def _reason(store: Store, key: str) -> str:
    """Says why an image cannot be read."""
    try:
        store.image(key)
    except UserError as error:
        return str(error)
    return ""


def _part(folder: str, keys: list[str]) -> np.ndarray:
    """Computes the fingerprints of some images.

    A record of zeros means that the image cannot be read.
    """
    store = Store(folder)
    records = np.zeros(len(keys), _RECORD)
    for number, key in enumerate(keys):
        try:
            records[number] = fingerprint(store.image(key))
        except UserError:
            continue
    return records


def fingerprint(image: np.ndarray) -> np.ndarray:
    """Computes the fingerprint of an image uint8 [H, W, 3], a single record."""
    digest = hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()[:16]
    grey = Image.fromarray(image).convert("L")
    cells = np.asarray(grey.resize((BITS + 1, BITS), Image.Resampling.BOX), np.int16)
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
    record = np.zeros((), _RECORD)
    record["pixels"] = np.void(digest)
    record["bits"] = _packed(cells[:, 1:] > cells[:, :-1])
    turned = cells[:, ::-1]
    record["mirrored"] = _packed(turned[:, 1:] > turned[:, :-1])
    record["thumbnail"] = thumbnail
    return record


def _packed(bits: np.ndarray) -> np.ndarray:
    """Packs the bits of a hash, bool [16, 16], into uint64 [4]."""
    return np.packbits(bits.reshape(-1)).view(np.uint64)


# ---- pairs -----------------------------------------------------------------------------------------
DISTANCE = 20  # of 256 bits, at most, between images that are nearly equal
LIKENESS = 0.98  # correlation of their thumbnails, at least
# hash tables, and bits of each: a pair at DISTANCE is found with probability 0.999
TABLES, SAMPLED = 32, 20
BLOCK = 1 << 20  # candidate pairs that are compared at a time


def near_pairs(a: np.ndarray, b: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """Finds the pairs (i, j) of nearly equal images of two groups of records, int64 [pairs, 2].

    mirrored: those where b's mirror image is nearly a. Candidates are images that agree in SAMPLED
    random bits in one of TABLES tables, so that no time goes into comparing all with all.
    """
    bits_a, bits_b = a["bits"], b["mirrored" if mirrored else "bits"]
    if not len(a) or not len(b):
        return np.empty((0, 2), np.int64)
    flat = b["thumbnail"][:, :, ::-1] if mirrored else b["thumbnail"]
    found: set[tuple[int, int]] = set()
    rng = np.random.default_rng(0)
    ones_a, ones_b = (np.unpackbits(bits.view(np.uint8), axis=1) for bits in (bits_a, bits_b))
    for _ in range(TABLES):
        sampled = rng.permutation(256)[:SAMPLED]
        weights = 1 << np.arange(SAMPLED, dtype=np.int64)
        hash_a, hash_b = (ones[:, sampled].astype(np.int64) @ weights for ones in (ones_a, ones_b))
        order = np.argsort(hash_b, kind="stable")
        low, high = (np.searchsorted(hash_b[order], hash_a, side) for side in ("left", "right"))
        for start, stop in _blocks(high - low):
            counts = high[start:stop] - low[start:stop]
            i = np.repeat(np.arange(start, stop), counts)
            offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            j = order[np.repeat(low[start:stop], counts) + offset]
            close = np.bitwise_count(bits_a[i] ^ bits_b[j]).sum(axis=1) <= DISTANCE
            i, j = i[close], j[close]
            alike = _likeness(a["thumbnail"][i], flat[j]) >= LIKENESS
            found.update(zip(i[alike].tolist(), j[alike].tolist(), strict=True))
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def _blocks(counts: np.ndarray) -> list[tuple[int, int]]:
    """Cuts rows into blocks of at most BLOCK candidates each (a single row may have more)."""
    ends, start, blocks = np.cumsum(counts), 0, []
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK, side="right")))
        blocks.append((start, stop))
        start = stop
    return blocks


def _likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlates thumbnails [n, 32, 32] pairwise to [n], where two flat ones are alike."""
    a, b = (x.reshape(len(x), SIDE * SIDE).astype(np.float32) for x in (a, b))
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.where(scale > 0, (a * b).sum(axis=1) / np.maximum(scale, 1e-6), 1.0)
