"""Writes what a reader gives into a `Store`, completely or not at all.

This is done once, and by one command at a time. The records are read in one process; their images
are read, checked, encoded and hashed by as many as there are (data/image_shards.py). A command that
was killed is repeated without storing the finished shards of images again.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from unimed_jax import files, processes
from unimed_jax.config import ImageConfig, ReencodeConfig
from unimed_jax.data import image_shards
from unimed_jax.data.columns import Collector
from unimed_jax.data.example import Example
from unimed_jax.data.image_shards import FACTS, ImageShards, Source
from unimed_jax.data.images import PLAIN
from unimed_jax.data.info import Info, nearest_counts
from unimed_jax.data.requirements import check, unanswered
from unimed_jax.data.store import (
    MANIFEST,
    RECORDS,
    SCHEMA,
    SKIPPED,
    Store,
    crc_of,
    facts_of,
    pack,
    unpack,
    write_index,
)
from unimed_jax.errors import UserError

SHARD_RECORDS = 100_000
SHARD_BYTES = 256 << 20
NAMED = 5  # skipped records that a message names
UNFINISHED = ".unfinished"  # how the folder ends in which a set is prepared
BOXES = 2  # how boxes are fitted to smaller images; raise it when that changes: such sets are made again
KEPT = 7 * 24 * 3600.0  # seconds for which such a folder of another set stays after a kill


class Reader(Protocol):
    """Describes a module of data/datasets, or one that a source names with dots."""

    INFO: Info

    def read(
        self, folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
    ) -> Iterator[tuple[Example, Iterable[Source]]]:
        """Yields each example of a split with the sources of its images.

        The sources are in the order of `Example.images`. A record that is left out is appended to
        `skipped` as "<name>: <why>"; nothing is printed or written.
        """
        ...


class How(NamedTuple):
    """Says how a set is prepared: what becomes of its images and its faults, and who works."""

    image: ImageConfig = PLAIN  # how its images are read; part of what the set is
    reencode: ReencodeConfig = ReencodeConfig()  # part of what the set is
    strict: bool = False  # whether a record that is left out is an error
    workers: int = 0  # processes of `pool`; 0: all is done in this process
    pool: Executor | None = None  # see `image_shards.processes`


ALONE = How()


def prepared(
    reader: Reader,
    info: Info,
    folder: Path | None,
    options: Mapping[str, Any],
    cache: Path,
    how: How = ALONE,
) -> Store:
    """Opens the store of a set, which is prepared in `cache` first if it is not there yet.

    The folder's name follows from the set (name, place, options, settings of its images) and its
    version (reader, form, the state of the raw files), so a changed set is prepared again next to
    the old one. Of two commands the second waits for the first.
    """
    target, work = _places(info, folder, options, cache, how)
    if not target.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock = _lock_of(work).open("w")
        except OSError as error:
            raise UserError(
                f"data set {info.name} cannot be kept in {cache} ({error.strerror or error}); set "
                "config.data.cache."
            ) from error
        with lock, _locked(lock):
            if not target.exists():  # another process may have prepared it while this one waited
                files.remove_leftovers(cache)
                set_ = work.name.removesuffix(UNFINISHED).removeprefix(".")
                older = [path.name for path in cache.glob(f"{set_}-*")]
                _remove_forgotten(cache, work)
                with files.resumed_folder(target, work) as place:
                    _write(reader, info, folder, options, place, how)
                _report(Store(target), older)
                if not options:
                    _compare_counts(Store(target), info)
    store = Store(target)
    if how.strict and store.skipped:
        raise _refused(store.id, (store.folder / SKIPPED).read_text(encoding="utf-8").splitlines()[0])
    return store


def unstored(
    reader: Reader,
    info: Info,
    folder: Path | None,
    options: Mapping[str, Any],
    cache: Path,
    how: How = ALONE,
) -> Iterator[tuple[Any, ...]]:
    """Yields the arguments of `image_shards.store_chunk` for each chunk of a set that is to be stored.

    When all are, `prepared` finds them.
    """
    target, work = _places(info, folder, options, cache, how)
    if target.exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    later = image_shards.Later()
    images = ImageShards(work, how.image, how.reencode, later, workers=0)
    for found in _ahead(reader, info, folder, options, images):
        if found.error is not None:
            raise found.error
        yield from later.take()
    images.submit()
    yield from later.take()


def _places(
    info: Info, folder: Path | None, options: Mapping[str, Any], cache: Path, how: How
) -> tuple[Path, Path]:
    """Returns the folder of a prepared set, and the one in which it is prepared."""
    which = _digest(info.name, str(folder and folder.resolve()), dict(options), *_given(how))
    version = _digest(SCHEMA, dataclasses.asdict(info), fingerprint(info, folder))
    name = f"{info.name}-{which}"
    return cache / f"{name}-{version}", cache / f".{name}{UNFINISHED}"


def _lock_of(work: Path) -> Path:
    return work.with_name(work.name.removesuffix(UNFINISHED) + ".lock")


def _remove_forgotten(cache: Path, work: Path) -> None:
    """Removes what killed commands left of other sets a week ago or earlier."""
    for path in cache.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError):  # gone already, or of another user
            last = max(inside.stat().st_mtime for inside in (path, path / FACTS) if inside.exists())
            if path == work or time.time() - last < KEPT:
                continue
            with _lock_of(path).open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: it is being prepared
                files.remove_folder(path)


def _refused(name: str, line: str) -> UserError:
    return UserError(
        f"data set {name} has a record that is left out ({line}), which config.data.strict=True "
        "refuses; mend the record, or leave strict at False."
    )


def _given(how: How) -> list[dict[str, Any]]:
    """Lists settings of images as JSON values; the default ones are those of a set without any."""
    image = [] if how.image == PLAIN else [dataclasses.asdict(how.image)]
    fitted = {"boxes": BOXES} if how.reencode.size else {}
    return image + ([dataclasses.asdict(how.reencode) | fitted] if how.reencode.asked else [])


def fingerprint(info: Info, folder: Path | None) -> list[list[Any]]:
    """Lists name, size and time of change of every file that `info.files` names.

    Images are not in the list. Raises UserError for a link to nothing.
    """
    if folder is None or info.self_contained:
        return []
    inside = (path for pattern in info.files for path in folder.glob(pattern))
    found = [folder] if folder.is_file() else sorted(set(inside))
    facts = []
    for path in found:
        try:
            facts.append((path, path.stat()))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); restore it, or remove it."
            ) from error
    return [[path.name, fact.st_size, fact.st_mtime_ns] for path, fact in facts]


def _digest(*words: Any) -> str:
    return hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode()).hexdigest()[:10]


@contextlib.contextmanager
def _locked(file) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _report(store: Store, older: list[str]) -> None:
    """Says what was skipped, and that a store in an older form remains; only the leader says it."""
    if older:
        processes.say(
            f"{store.id}: prepared again, because its files or its reader changed; "
            f"{', '.join(older)} in {store.folder.parent} can be deleted."
        )
    if store.films and store.image_settings.frame is None:
        processes.say(
            f"{store.id}: {store.films} images have several frames or pages, of which the first is "
            "read; another is chosen by the source's image={'frame': ...}."
        )
    if store.skipped:
        lines = (store.folder / SKIPPED).read_text(encoding="utf-8").splitlines()
        used = sum(len(store.examples(split)) for split in store.splits)
        processes.say(
            f"{store.id}: {store.skipped} records left out, {used} used ({'; '.join(lines[:NAMED])}"
            f"{' ...' if len(lines) > NAMED else ''}); all in {store.folder / SKIPPED}"
        )


def _compare_counts(store: Store, info: Info) -> None:
    """Says where the numbers of examples of a split differ from the published ones.

    Those hold for a reader without options. `data check` compares the others too.
    """

    def count(what: str) -> int | None:
        if " " in what:
            return None
        return len(store.examples(what)) if what in store.splits else 0

    _, compared = nearest_counts(info, count)
    wrong = [
        f"{split} {read}, not {published}"
        for split, (read, published) in compared.items()
        if read != published
    ]
    if wrong:
        processes.say(
            f"{store.id}: other numbers of examples than expected ({'; '.join(wrong)}); check the "
            "raw files."
        )


class _Shards:
    """Appends records to files <kind>-00000.array_record, ... of bounded size."""

    def __init__(self, folder: Path, kind: str):
        self._folder, self._kind = folder, kind
        self._writer: ArrayRecordWriter | None = None
        self._here = self._bytes = 0
        self.records: dict[str, int] = {}  # by file

    def write(self, record: bytes) -> None:
        if self._writer is None or self._here >= SHARD_RECORDS or self._bytes >= SHARD_BYTES:
            self.close()
            name = f"{self._kind}-{len(self.records):05d}.array_record"
            self._writer = ArrayRecordWriter(str(self._folder / name), "group_size:1")  # read at random
            self._here = self._bytes = 0
            self.records[name] = 0
        self._writer.write(record)
        self._here, self._bytes = self._here + 1, self._bytes + len(record)
        self.records[next(reversed(self.records))] += 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Read(NamedTuple):
    """Holds what came from the reader: an example, or why a record is left out, or an error."""

    split: str
    example: Example | None = None
    left_out: str = ""
    error: UserError | None = None


def _read(
    reader: Reader, info: Info, folder: Path | None, options: Mapping[str, Any], images: ImageShards
) -> Iterator[_Read]:
    """Yields the records of all splits in order, each when its images have been looked at.

    The reader is ahead of them, so that there is work for all processes.
    """
    waiting: deque[_Read] = deque()
    for found in _ahead(reader, info, folder, options, images):
        waiting.append(found)
        while waiting and images.ready(_keys(waiting[0])):
            yield waiting.popleft()
    images.submit()
    while waiting:
        images.ready(_keys(waiting[0]), wait=True)
        yield waiting.popleft()


def _ahead(
    reader: Reader, info: Info, folder: Path | None, options: Mapping[str, Any], images: ImageShards
) -> Iterator[_Read]:
    """Yields the records of all splits as they are read, and puts their images on the list.

    A UserError is the last that it yields: what comes before it has its turn first.
    """
    try:
        for split in info.splits:
            left_out: list[str] = []
            for example, sources in reader.read(folder, split, options, left_out):
                yield from (_Read(split, left_out=line) for line in left_out)
                left_out.clear()
                check(example, info.name)
                if reason := unanswered(example):
                    yield _Read(split, left_out=f"{example.id}: {reason}")
                    continue
                for key, source in zip(example.images, sources, strict=True):
                    images.ask(key, source)
                yield _Read(split, example)
            yield from (_Read(split, left_out=line) for line in left_out)
    except UserError as error:
        yield _Read("", error=error)


def _keys(found: _Read) -> tuple[str, ...]:
    return found.example.images if found.example else ()


def _write(
    reader: Reader,
    info: Info,
    folder: Path | None,
    options: Mapping[str, Any],
    place: Path,
    how: How,
) -> None:
    pool = how.pool or image_shards.here()
    images = ImageShards(place, how.image, how.reencode, pool, how.workers)
    examples, columns = _Shards(place, "examples"), Collector()
    version = "\0".join([f"{RECORDS}", info.version, *map(str, _given(how))])
    digest = hashlib.sha256(version.encode())
    skipped: list[str] = []
    splits: dict[str, tuple[int, int]] = {}
    count = films = 0
    with tqdm(desc=f"preparing {info.name}", unit=" examples", leave=False, disable=None) as bar:
        for split, example, left_out, error in _read(reader, info, folder, options, images):
            if error is not None:
                raise error
            if example is not None and (reason := images.left_out(example.images)):
                left_out = f"{example.id}: {reason}"
            if left_out or example is None:
                skipped.append(f"{split}: {_one_line(left_out)}")
                if how.strict:
                    raise _refused(info.name, skipped[-1])
                continue
            for key in example.images:
                if first := images.use(key):
                    films += first.frames > 1
                    digest.update(f"\0{key}\0".encode() + bytes.fromhex(first.digest))
            example = _scaled(example, images)
            packed = pack(example)
            digest.update(f"\0{split}\0".encode() + packed)
            examples.write(packed)
            columns.add(example)
            splits[split] = (splits.get(split, (count, 0))[0], count + 1)
            count += 1
            bar.update()
    examples.close()
    if not count:
        raise UserError(_nothing(info, folder, skipped))
    made = columns.columns()
    _check_ids(made.ids, place, info)
    write_index(place, made, images.keys, images.digests)
    (place / SKIPPED).write_text("".join(f"{line}\n" for line in skipped), encoding="utf-8")
    files.remove_folder(place / FACTS)  # of which nothing belongs to the store
    records = examples.records | images.records
    for path in place.iterdir():  # an earlier try may have had more
        if path.is_file() and path.name not in {*records, SKIPPED}:
            path.unlink()
    manifest = {
        "schema": SCHEMA,
        "info": dataclasses.asdict(info),
        "options": dict(options),
        "source": str(folder or ""),
        "fingerprint": fingerprint(info, folder),
        "checksum": digest.hexdigest(),
        "splits": splits,
        "skipped": len(skipped),
        # what is encoded again has been read by these settings
        "image": dataclasses.asdict(PLAIN if how.reencode.asked else how.image),
        "films": 0 if how.reencode.asked and how.image.frame is not None else films,
        "meta_keys": made.meta_keys,
        "files": {
            str(path.relative_to(place)): facts_of(path, records.get(path.name))
            for path in sorted(place.rglob("*"))
            if path.is_file()
        },
    }
    manifest["crc32"] = crc_of(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _scaled(example: Example, images: ImageShards) -> Example:
    """Fits the box of an example to its image, if that is stored in another size."""
    sizes = images.sizes(example.images[0]) if example.box and example.images else None
    if sizes is None or example.box is None:
        return example
    scales = (sizes[2] / sizes[0], sizes[3] / sizes[1]) * 2
    x1, y1, x2, y2 = (round(side * scale) for side, scale in zip(example.box, scales, strict=True))
    x1, y1 = min(x1, sizes[2] - 1), min(y1, sizes[3] - 1)  # no box begins where the image ends
    return dataclasses.replace(example, box=(x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))


def _one_line(text: str) -> str:
    """Makes any text fit for a line of skipped.txt."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def _nothing(info: Info, folder: Path | None, skipped: list[str]) -> str:
    at = f" in {folder}" if folder else ""
    why = f" ({len(skipped)} records left out: {'; '.join(skipped[:NAMED])})" if skipped else ""
    return f"data set {info.name} has no example{at}{why}; check its path and options."


def _check_ids(hashes: np.ndarray, place: Path, info: Info) -> None:
    values, counts = np.unique(hashes, return_counts=True)
    doubled = values[counts > 1]
    if not len(doubled):
        return
    number = int(np.nonzero(hashes == doubled[0])[0][0])
    for shard in sorted(place.glob("examples-*.array_record")):
        reader = ArrayRecordReader(str(shard))
        if number < reader.num_records():
            break
        number -= reader.num_records()
    name = unpack(reader.read([number])[0]).id
    raise UserError(
        f"data set {info.name}: id {name!r} stands twice ({len(doubled)} ids do); its reader must "
        "give each example an id of its own, over all splits."
    )
