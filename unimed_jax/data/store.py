"""Reads a prepared data set from disk, at random, by an index that is memory-mapped.

    <cache>/<name>-<set>-<version>/
      manifest.json     what the set is, its splits, the size of every file
      examples-*.array_record   one JSON text per example
      images-*.array_record     one encoded image (PNG, JPEG, DICOM ...) per image key
      index/*.npy       columns (data/columns.py), tables of texts, image keys sorted by hash, digests
      skipped.txt       records that were left out, one a line, with the reason

`data/prepare.py` writes it. A million examples cost a few megabytes of memory, because nothing here
holds them.
"""

import dataclasses
import hashlib
import itertools
import json
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from unimed_jax import files
from unimed_jax.config import ImageConfig
from unimed_jax.data.columns import Column, Columns, Strings, hash_of
from unimed_jax.data.example import Example
from unimed_jax.data.images import PLAIN, read_image
from unimed_jax.data.info import Info
from unimed_jax.errors import UserError, nearest
from unimed_jax.parsing import read_json

SCHEMA = 3  # of the files; raise it when they change
RECORDS = 1  # of the records within; raise it when what is packed changes: checksums then differ
MANIFEST = "manifest.json"
SKIPPED = "skipped.txt"
CHUNK = 256  # examples read at once while iterating
AT_RANDOM = "readahead_buffer_size:0,max_parallelism:0"
OPEN = 128  # files of a kind that are open at once; a large set has more than a process may open
MAPPED = 1 << 16  # bytes from which an array is mapped instead of read
_AGAIN = "delete that folder and run again: it is prepared again from the source"


class Store:
    """Reads a prepared data set from its folder.

    `examples(split)` and `image(key)` come from disk, `columns(split)` from the index.
    """

    def __init__(self, folder: str | Path):
        """Opens what `prepare` wrote.

        Raises UserError if files are missing, cut or of another form.
        """
        self.folder = Path(folder)
        manifest = _manifest(self.folder)
        try:
            self.info = info_of(manifest["info"])
            self.id = self.name = self.info.name
            self.checksum: str = manifest["checksum"]
            self.skipped: int = manifest["skipped"]
            self.image_settings = image_settings_of(manifest.get("image", {}))
            self.films: int = manifest.get("films", 0)  # images of several frames
            self._bounds: dict[str, tuple[int, int]] = {
                split: (a, b) for split, (a, b) in manifest["splits"].items()
            }
            self.splits = tuple(self._bounds)
            self._meta_keys = tuple(manifest["meta_keys"])
            _check_files(self.folder, manifest["files"])
            self._examples = Shards(self.folder, manifest["files"], "examples-")
            self._images = Shards(self.folder, manifest["files"], "images-")
            _check_bounds(self._bounds, len(self._examples))
            self._keys, self._key_order = self._array("key_hashes"), self._array("key_order")
            self._key_texts, self._digests = self._strings("keys"), self._array("key_digests")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.folder / MANIFEST} is not what was written ({error!r}); {_AGAIN}."
            ) from error

    def examples(self, split: str) -> "Rows":
        start, stop = self._bound(split)
        return Rows(self, np.arange(start, stop, dtype=np.int32))

    def rows(self, split: str) -> tuple[int, int]:
        """Returns the first and last + 1 example number of a split."""
        return self._bound(split)

    def columns(self, split: str) -> Columns:
        start, stop = self._bound(split)
        return self.all_columns().at(slice(start, stop))

    def all_columns(self) -> Columns:
        """Returns the columns of all splits, one after the other."""
        return Columns(
            self._array("task"),
            self._array("image_count"),
            self._array("image_set"),
            self._array("ids"),
            self._column("cluster"),
            self._meta_keys,
            lambda key: self._column(f"meta_{self._meta_keys.index(key)}"),
        )

    def image(self, key: str) -> np.ndarray:
        """Decodes the image of a key by the set's image settings, uint8 [H, W, 3].

        Raises UserError if there is none, or if its bytes are not an image.
        """
        data = self.encoded(key)
        try:
            return read_image(data, self.image_settings)
        except UserError as error:
            raise UserError(f"data set {self.id}, image {key!r}: {error}") from error

    def encoded(self, key: str) -> bytes:
        """Returns the image's bytes as they were found (PNG, JPEG, DICOM ...)."""
        return self._read(self._images, [self._image_number(key)])[0]

    def digest(self, key: str) -> bytes:
        """Returns 32 bytes that two images share only if `image` gives the same pixels for both.

        They follow from the stored bytes and from how those are read.
        """
        stored = self._digests[self._image_number(key)].tobytes()
        if self.image_settings == PLAIN:
            return stored
        return hashlib.sha256(stored + str(self.image_settings).encode()).digest()

    def _image_number(self, key: str) -> int:
        wanted = np.uint64(hash_of(key))
        at = int(np.searchsorted(self._keys, wanted))
        while at < len(self._keys) and self._keys[at] == wanted:
            number = int(self._key_order[at])
            if self._key_texts[number] == key:
                return number
            at += 1
        raise UserError(f"data set {self.id} has no image {key!r}.")

    def read(self, numbers: Sequence[int]) -> list[Example]:
        """Reads examples by number; raises UserError if their bytes are damaged."""
        records = self._read(self._examples, numbers)
        try:
            return [unpack(data) for data in records]
        except (AttributeError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def _read(self, source: "Shards", numbers: Sequence[int]) -> list[bytes]:
        try:
            return source.read(numbers)
        except (OSError, IndexError, ValueError, RuntimeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(f"data set {self.folder} cannot be read ({reason}); {_AGAIN}.")

    def _bound(self, split: str) -> tuple[int, int]:
        if split not in self._bounds:
            raise UserError(
                f"data set {self.id} has no split {split!r}{nearest(split, self.splits)} "
                f"Choose from {', '.join(self.splits)}."
            )
        return self._bounds[split]

    def _array(self, name: str) -> np.ndarray:
        path = self.folder / "index" / f"{name}.npy"
        try:
            small = path.stat().st_size < MAPPED  # an empty array cannot be mapped at all
            return np.load(path, mmap_mode=None if small else "r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"data set index {path} cannot be read ({error}); {_AGAIN}.") from error

    def _strings(self, name: str) -> Strings:
        return Strings(self._array(f"{name}_text"), self._array(f"{name}_ends"))

    def _column(self, name: str) -> Column:
        return Column(self._array(name), self._strings(name))


class Shards:
    """Reads the records of the array_record files whose names begin with `kind`, counted through.

    Files are opened when first read, and at most `OPEN` stay open.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Any]], kind: str):
        names = sorted(name for name in files if name.startswith(kind))
        self._paths = [folder / name for name in names]
        self._ends = np.cumsum([0, *(files[name]["records"] for name in names)])
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """Reads records by number; neighbours of one file are read together."""
        shards = np.searchsorted(self._ends, numbers, side="right") - 1
        out: list[bytes] = []
        for shard, group in itertools.groupby(
            zip(shards.tolist(), numbers, strict=True), key=lambda pair: pair[0]
        ):
            first = int(self._ends[shard])
            out += self._reader(shard).read([number - first for _, number in group])
        return out

    def path_of(self, number: int) -> Path:
        """Returns the file that holds a record."""
        return self._paths[int(np.searchsorted(self._ends, number, side="right")) - 1]

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                if len(self._readers) >= OPEN:  # whoever reads from it just now keeps it alive
                    del self._readers[next(iter(self._readers))]
                self._readers[shard] = ArrayRecordReader(str(self._paths[shard]), AT_RANDOM)
            return self._readers[shard]


class Rows(Sequence[Example]):
    """Shows some examples of a store by number, read from disk as they are asked for."""

    def __init__(self, store: Store, numbers: np.ndarray):
        self._store, self.numbers = store, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, places: np.ndarray) -> "Rows":
        """Returns the examples at some places."""
        return Rows(self._store, self.numbers[places])

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Rows(self._store, self.numbers[i])
        return self._store.read([int(self.numbers[i])])[0]

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), CHUNK):
            yield from self._store.read(self.numbers[start : start + CHUNK].tolist())


def pack(example: Example) -> bytes:
    """Writes an example as JSON, the same bytes for the same example."""
    fields = {k: v for k, v in dataclasses.asdict(example).items() if v}
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def unpack(data: bytes) -> Example:
    """Reads what `pack` wrote."""
    fields = json.loads(data)
    for key in ("images", "box"):
        if key in fields:
            fields[key] = tuple(fields[key])
    if "history" in fields:
        fields["history"] = tuple((question, answer) for question, answer in fields["history"])
    return Example(**{"id": "", "question": "", "answer": ""} | fields)


def info_of(fields: dict[str, Any]) -> Info:
    """Makes an `Info` from the JSON of what `dataclasses.asdict` made of one."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Info(**plain)


def image_settings_of(fields: Mapping[str, Any]) -> ImageConfig:
    """Makes an `ImageConfig` from the JSON of what `dataclasses.asdict` made of one."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return ImageConfig(**plain)


def crc_of(manifest: Mapping[str, Any]) -> int:
    """Computes the CRC-32 of a manifest without its own entry `crc32`."""
    content = {key: value for key, value in manifest.items() if key != "crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def facts_of(path: Path, records: int | None) -> dict[str, int]:
    """Describes one file of a store by its size, and by its number of records or else its CRC-32.

    Files of records need no CRC-32: array_record keeps checksums of its own.
    """
    return {"bytes": path.stat().st_size} | (
        {"crc32": _crc_of(path)} if records is None else {"records": records}
    )


def _crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} is not a prepared data set ({MANIFEST} does not exist); {_AGAIN}.")
    manifest = read_json(path, _AGAIN)
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise UserError(f"{path} is not what was written; {_AGAIN}.")
    if manifest["schema"] != SCHEMA:
        raise UserError(
            f"data set {folder} was prepared in form {manifest['schema']!r}, and this version reads "
            f"form {SCHEMA}; {_AGAIN}."
        )
    if manifest.get("crc32") != crc_of(manifest):
        raise UserError(f"{path} is not what was written; {_AGAIN}.")
    return manifest


def _check_bounds(bounds: Mapping[str, tuple[int, int]], count: int) -> None:
    """Raises ValueError unless the splits follow each other and hold all examples."""
    ends = [0, *(end for _, end in bounds.values())]
    if any(
        start != before or end < start
        for (start, end), before in zip(bounds.values(), ends, strict=False)
    ):
        raise ValueError(f"splits {bounds}")
    if ends[-1] != count:
        raise ValueError(f"{count} examples, and {ends[-1]} in the splits")


def _check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raises UserError if a file of a store is missing, is cut, or has changed.

    Changes are looked for in the index and skipped.txt.
    """
    for name, facts in files.items():
        path = folder / name
        try:
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise UserError(f"data set file {path} does not exist; {_AGAIN}.")
            if size != facts["bytes"]:
                raise UserError(
                    f"data set file {path} has {size} of its {facts['bytes']} bytes; {_AGAIN}."
                )
            if "crc32" in facts and _crc_of(path) != facts["crc32"]:
                raise UserError(f"data set file {path} has changed since it was written; {_AGAIN}.")
        except OSError as error:
            raise UserError(
                f"data set file {path} cannot be read ({error.strerror or error}); {_AGAIN}."
            ) from error


def write_index(place: Path, made: Columns, keys: list[str], digests: list[str]) -> None:
    """Writes the columns, and keys and digests of the images in the order in which they are stored.

    digests: 64 hexadecimal digits each.
    """
    index = place / "index"
    files.remove_folder(index)  # of an earlier try
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
    bytes_ = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8)
    arrays["key_digests"] = bytes_.reshape(-1, 32)  # [images, 32]
    for name, array in arrays.items():
        np.save(index / f"{name}.npy", array)


def _text_arrays(name: str, strings: Strings) -> dict[str, np.ndarray]:
    text, ends = strings.arrays
    return {f"{name}_text": text, f"{name}_ends": ends}


def _column_arrays(name: str, column: Column) -> dict[str, np.ndarray]:
    return {name: column.codes, **_text_arrays(name, column.texts)}
