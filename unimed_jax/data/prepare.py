"""Writes what a reader gives into a `Store`, completely or not at all.

This is done once, and by one process at a time.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from unimed_jax import files, parsing, processes
from unimed_jax.config import TASKS, VISUAL_TASKS
from unimed_jax.data.columns import Collector, Column, Strings, hash_of
from unimed_jax.data.example import Example
from unimed_jax.data.images import check_header, read_bytes
from unimed_jax.data.info import Info
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
)
from unimed_jax.errors import UserError

# of an image: a file, its bytes, or pixels uint8 [H, W] or [H, W, 3]
Source = str | Path | bytes | np.ndarray
SHARD_RECORDS = 100_000
SHARD_BYTES = 256 << 20
NAMED = 5  # skipped records that a message names
# categories of Unicode's white space, control and format characters
INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that show nothing


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


def prepared(
    reader: Reader, info: Info, folder: Path | None, options: Mapping[str, Any], cache: Path
) -> Store:
    """Opens the store of a set, which is prepared in `cache` first if it is not there yet.

    The folder's name follows from the set (name, place, options) and its version (reader, form, the
    state of the raw files), so a changed set is prepared again next to the old one. Of two
    processes the second waits for the first.
    """
    which = _digest(info.name, str(folder and folder.resolve()), dict(options))
    version = _digest(SCHEMA, dataclasses.asdict(info), fingerprint(info, folder))
    target = cache / f"{info.name}-{which}-{version}"
    if not target.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock = (cache / f".{info.name}-{which}.lock").open("w")
        except OSError as error:
            raise UserError(
                f"data set {info.name} cannot be kept in {cache} ({error.strerror or error}); set "
                "config.data.cache."
            ) from error
        with lock, _locked(lock):
            if not target.exists():  # another process may have prepared it while this one waited
                files.remove_leftovers(cache)
                older = [path.name for path in cache.glob(f"{info.name}-{which}-*")]
                _write(reader, info, folder, options, target)
                _report(Store(target), older)
                if not options:
                    _compare_counts(Store(target), info)
    return Store(target)


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
    if store.skipped:
        lines = (store.folder / SKIPPED).read_text(encoding="utf-8").splitlines()
        used = sum(len(store.examples(split)) for split in store.splits)
        processes.say(
            f"{store.id}: {store.skipped} records left out, {used} used ({'; '.join(lines[:NAMED])}"
            f"{' ...' if len(lines) > NAMED else ''}); all in {store.folder / SKIPPED}"
        )


def _compare_counts(store: Store, info: Info) -> None:
    """Says where the numbers of examples that were read differ from `info.counts`.

    Those counts hold for a reader without options.
    """
    read = {split: len(store.examples(split)) if split in store.splits else 0 for split in info.counts}
    wrong = [
        f"{split} {read[split]}, not {count}"
        for split, count in info.counts.items()
        if read[split] != count
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


def _write(
    reader: Reader, info: Info, folder: Path | None, options: Mapping[str, Any], target: Path
) -> None:
    with files.new_folder(target) as place:
        examples, images, columns = _Shards(place, "examples"), _Shards(place, "images"), Collector()
        digest = hashlib.sha256(f"{RECORDS}\0{info.version}".encode())
        keys: dict[str, int] = {}
        skipped: list[str] = []
        splits: dict[str, tuple[int, int]] = {}
        count = 0
        with tqdm(desc=f"preparing {info.name}", unit=" examples", leave=False, disable=None) as bar:
            for split in info.splits:
                start = count
                left_out: list[str] = []
                for example, sources in reader.read(folder, split, options, left_out):
                    check(example, info.name)
                    found = unanswered(example) or _encoded(example, sources, keys)
                    if isinstance(found, str):
                        left_out.append(f"{example.id}: {found}")
                        continue
                    for key, (data, content) in found.items():
                        keys[key] = len(keys)
                        images.write(data)
                        digest.update(f"\0{key}\0".encode() + hashlib.sha256(content).digest())
                    packed = pack(example)
                    digest.update(f"\0{split}\0".encode() + packed)
                    examples.write(packed)
                    columns.add(example)
                    count += 1
                    bar.update()
                skipped += [f"{split}: {_one_line(line)}" for line in left_out]
                if count > start:
                    splits[split] = (start, count)
        examples.close()
        images.close()
        if not count:
            raise UserError(_nothing(info, folder, skipped))
        made = columns.columns()
        _check_ids(made.ids, place, info)
        index = place / "index"
        index.mkdir()
        arrays = {
            "task": made.task,
            "image_count": made.images,
            "image_set": made.image_set,
            "ids": made.ids,
        }
        arrays |= _column_arrays("cluster", made.cluster)
        for i, key in enumerate(made.meta_keys):
            arrays |= _column_arrays(f"meta_{i}", made.meta(key))
        hashes = np.array([hash_of(key) for key in keys], np.uint64)
        order = np.argsort(hashes, kind="stable")
        arrays |= {"key_hashes": hashes[order], "key_order": order.astype(np.int32)}
        arrays |= _text_arrays("keys", Strings.of(keys))
        for name, array in arrays.items():
            np.save(index / f"{name}.npy", array)
        (place / SKIPPED).write_text("".join(f"{line}\n" for line in skipped), encoding="utf-8")
        records = examples.records | images.records
        manifest = {
            "schema": SCHEMA,
            "info": dataclasses.asdict(info),
            "options": dict(options),
            "source": str(folder or ""),
            "fingerprint": fingerprint(info, folder),
            "checksum": digest.hexdigest(),
            "splits": splits,
            "skipped": len(skipped),
            "meta_keys": made.meta_keys,
            "files": {
                str(path.relative_to(place)): facts_of(path, records.get(path.name))
                for path in sorted(place.rglob("*"))
                if path.is_file()
            },
        }
        manifest["crc32"] = crc_of(manifest)
        (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def check(example: Example, name: str) -> None:
    """Raises UserError for an example that no task can use, or whose texts are not texts."""
    where = f"record {name}/{example.id}"
    named = ascii(where)[1:-1]  # an id that is not text cannot be printed
    for field, text in _texts(example):
        if not isinstance(text, str):
            raise UserError(
                f"{ascii(where)[1:-1]}: its {field} is {ascii(text)[:80]}, which is no text; mend "
                "the record."
            )
        if not parsing.is_text(text):
            raise UserError(
                f"{named}: its {field} holds half of a surrogate pair, which is no character "
                f"({ascii(text)[1:-1][:80]}); mend the record."
            )
    if example.task not in TASKS:
        raise UserError(f"{where}: task {example.task!r} is unknown; choose from {', '.join(TASKS)}.")
    visual = example.task in VISUAL_TASKS
    if visual != bool(example.images):
        raise UserError(
            f"{where}: task {example.task!r} "
            + ("needs an image." if visual else "is text alone and takes no image; use 'vqa' for it.")
        )


def _texts(example: Example) -> Iterator[tuple[str, Any]]:
    """Yields every text of an example with the words that name it in errors."""
    yield from (
        ("id", example.id),
        ("task", example.task),
        ("question", example.question),
        ("answer", example.answer),
    )
    yield from (("image", key) for key in example.images)
    yield "cluster", example.cluster
    yield from (("meta", text) for pair in example.meta.items() for text in pair)
    yield from (("earlier turn", text) for turn in example.history for text in turn)


def unanswered(example: Example) -> str:
    """Says which answer of an example is empty or blank, so that nothing can be learnt from it.

    Returns an empty text if none is.
    """
    if _blank(example.answer):
        return "its answer is empty"
    return "an earlier answer is empty" if any(_blank(answer) for _, answer in example.history) else ""


def _blank(text: str) -> bool:
    """Says whether a text shows nothing.

    Such a text holds only white space, control and format characters, and fillers.
    """
    return all(unicodedata.category(c) in INVISIBLE or c in FILLERS for c in text)


def _one_line(text: str) -> str:
    """Makes any text fit for a line of skipped.txt."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def no_image(path: Path) -> str:
    """Says why the file of an image cannot be read, and returns an empty text if it can."""
    reason = parsing.no_file(path)
    return (
        f"no image {path}" if reason == "does not exist" else f"image {path} {reason}" if reason else ""
    )


def _encoded(
    example: Example, sources: Iterable[Source], keys: Mapping[str, int]
) -> dict[str, tuple[bytes, bytes]] | str:
    """Reads the images of an example that are not stored yet.

    Returns key -> (bytes to store, bytes to hash). A text instead says why the example is left out:
    the file of an image cannot be read, or its header is not that of a picture. What comes after
    the header is decoded when it is needed.
    """
    found: dict[str, tuple[bytes, bytes]] = {}
    for key, source in zip(example.images, sources, strict=True):
        if key in keys or key in found:
            continue
        if isinstance(source, np.ndarray):
            buffer = io.BytesIO()
            Image.fromarray(source).save(buffer, "PNG")
            # Compression differs between versions of zlib, pixels do not.
            found[key] = buffer.getvalue(), str(source.shape).encode() + source.tobytes()
            continue
        if not isinstance(source, bytes) and (reason := no_image(Path(source))):
            return reason
        try:
            data = source if isinstance(source, bytes) else read_bytes(source)
            check_header(data, f"{key!r}" if isinstance(source, bytes) else str(source))
        except UserError as error:
            return str(error).rstrip(".")
        found[key] = data, data
    return found


def _nothing(info: Info, folder: Path | None, skipped: list[str]) -> str:
    at = f" in {folder}" if folder else ""
    why = f" ({len(skipped)} records left out: {'; '.join(skipped[:NAMED])})" if skipped else ""
    return f"data set {info.name} has no example{at}{why}; check its path and options."


def _check_ids(hashes: np.ndarray, place: Path, info: Info) -> None:
    values, counts = np.unique(hashes, return_counts=True)
    doubled = values[counts > 1]
    if not len(doubled):
        return
    first = int(np.nonzero(hashes == doubled[0])[0][0])
    shard = place / f"examples-{first // SHARD_RECORDS:05d}.array_record"
    name = unpack(ArrayRecordReader(str(shard)).read([first % SHARD_RECORDS])[0]).id
    raise UserError(
        f"data set {info.name}: id {name!r} stands twice ({len(doubled)} ids do); its reader must "
        "give each example an id of its own, over all splits."
    )


def _text_arrays(name: str, strings: Strings) -> dict[str, np.ndarray]:
    text, ends = strings.arrays
    return {f"{name}_text": text, f"{name}_ends": ends}


def _column_arrays(name: str, column: Column) -> dict[str, np.ndarray]:
    return {name: column.codes, **_text_arrays(name, column.texts)}
