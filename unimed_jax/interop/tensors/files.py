"""Reads weight files in slices, without executing anything, and writes safetensors.

Safetensors may be one file or several with an index. torch's own files are read by `torch_file`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from unimed_jax.errors import UserError
from unimed_jax.interop.tensors.table import Region, Stored, Tensors, first_of
from unimed_jax.interop.tensors.torch_file import TorchFile, damaged
from unimed_jax.parsing import read_json

# Names of the weights in a folder; the first one found is read.
FOLDER_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
HEADER_BYTES = 32 << 20  # limit of a safetensors file's header: some 300,000 tensors
INDEX_BYTES = 24 << 20  # largest index that is read
SHARD_BYTES = 2 << 30  # largest file that is written


def open_weights(path: str | Path) -> Tensors:
    """Opens a weight file, or the weights (one file, or an index of several) in a folder.

    Raises UserError if there are none, or if they are damaged or not what their name says.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in FOLDER_NAMES if (path / name).is_file()), None)
        if found is None:
            raise UserError(
                f"folder {path} holds no weights; expected {' or '.join(FOLDER_NAMES[:3])} in it."
            )
        path = found
    if not path.is_file():
        raise UserError(f"weight file {path} does not exist; check its path.")
    if path.name.endswith(".index.json"):
        return Shards(path)
    if path.suffix == ".safetensors":
        return Safetensors(path)
    if path.suffix in (".bin", ".pth", ".pt"):
        return TorchFile(path).tensors()
    raise UserError(
        f"{path} is not a weight file that can be read here; give .safetensors, .bin, .pth or .pt."
    )


class Safetensors(Tensors):
    """Reads one safetensors file."""

    def __init__(self, path: Path):
        self.path, self.origin = path, str(path)
        self.stored = {}
        try:
            with open(path, "rb") as start:
                length = int.from_bytes(start.read(8), "little")
            if length > HEADER_BYTES:
                raise ValueError(f"its list of tensors is said to have {length} bytes")
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (it is not a dict)
                    part = file.get_slice(name)
                    dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                    kept = np.dtype(dtype) if dtype else str(part.get_dtype())
                    self.stored[name] = Stored(tuple(part.get_shape()), kept)
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(path, error) from error

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        try:
            # Opened for each read: closing the file gives back the pages of memory that were read.
            with safe_open(self.path, framework="numpy") as file:
                part = file.get_slice(name)
                if index:
                    return part[index]
                return part[:] if part.get_shape() else file.get_tensor(name)
        # a type that numpy lacks
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise damaged(self.path, error) from error


class Shards(Tensors):
    """Reads several weight files that an index in the same folder names.

    The index holds "weight_map": tensor -> file.
    """

    def __init__(self, index: Path):
        self.origin = str(index.parent)
        try:
            self.file_of: dict[str, str] = read_json(index, "get it again", INDEX_BYTES)["weight_map"]
            names = set(self.file_of.values())
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{index} is not an index of weight files (no weight_map); get it again."
            ) from error
        for name in names:
            # A name with a folder in it could reach outside.
            plain = isinstance(name, str) and len(name) < 200 and Path(name).name == name
            if (
                not plain
                or not name.endswith((".safetensors", ".bin"))
                or not (index.parent / name).is_file()
            ):
                raise UserError(
                    f"{index} names the file {str(name)[:100]!r}, which is not next to it; get it again."
                )
        self.files = {name: open_weights(index.parent / name) for name in sorted(names)}
        lost = [
            f"{name} (in {file})"
            for name, file in self.file_of.items()
            if name not in self.files[file].stored
        ]
        if lost:
            raise UserError(
                f"{index} names tensors that their files lack: {first_of(lost)}; get the files again."
            )
        self.stored = {name: self.files[file].stored[name] for name, file in self.file_of.items()}

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        return self.files[self.file_of[name]].read(name, index)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def write_safetensors(
    folder: Path,
    stored: Mapping[str, Stored],
    tensors: Iterable[tuple[str, np.ndarray]],
    stem: str = "model",
    limit: int = SHARD_BYTES,
) -> None:
    """Writes tensors, which come one at a time in the order of `stored`, as `<stem>.safetensors`.

    More than `limit` bytes become several files with an index, named as Hugging Face names them. Use it
    within `new_folder`.
    """
    shards = _shards(stored, limit)
    count = len(shards)
    if count == 1:
        files = [f"{stem}.safetensors"]
    else:
        files = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    stream = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        _write_shard(folder / file, {name: stored[name] for name in names}, stream)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(_bytes(one) for one in stored.values())},
            "weight_map": {
                name: file for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _shards(stored: Mapping[str, Stored], limit: int) -> list[list[str]]:
    """Groups the tensors, in their order, into files of at most `limit` bytes.

    A tensor larger than that gets a file of its own.
    """
    shards: list[list[str]] = [[]]
    left = limit
    for name, one in stored.items():
        size = _bytes(one)
        if shards[-1] and size > left:
            shards.append([])
            left = limit
        shards[-1].append(name)
        left -= size
    return shards


def _write_shard(
    path: Path, stored: Mapping[str, Stored], stream: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Writes one safetensors file: the header's length, the header, and the tensors' numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, one in stored.items():
        start, end = end, end + _bytes(one)
        kind = SAFETENSORS_NAMES[np.dtype(one.dtype)]
        header[name] = {"dtype": kind, "shape": one.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for expected in stored:
            name, value = next(stream)
            assert (name, value.shape, value.dtype) == (expected, *stored[expected]), name
            out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)  # [bytes]


def _bytes(stored: Stored) -> int:
    return int(np.prod(stored.shape, dtype=np.int64)) * np.dtype(stored.dtype).itemsize
