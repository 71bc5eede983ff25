"""Reads torch's zip files without executing anything, and writes them without torch.

Their names end in `.bin`, `.pth` or `.pt`.

Such a file holds a pickle of a tree (dicts, lists, scalars, tensors), which `unimed_jax.pickles`
interprets, and the numbers of each tensor's storage as a record of their own.
"""

import collections
import dataclasses
import functools
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unimed_jax.errors import UserError
from unimed_jax.interop.tensors.table import Region, Stored, Tensors
from unimed_jax.pickles import (
    BYTES,
    TORCH_DTYPES,
    Refused,
    Storage,
    TorchTensor,
    read_pickle,
)

STORAGES = {np.dtype(dtype): name for name, dtype in TORCH_DTYPES.items()}
DIRECTORY_LIMIT = 1 << 24  # bytes of the list of records at the end of the archive
LOCAL_HEADER = 30  # bytes of a zip record's header, before its name and its extra field


def damaged(path: Path, error: Exception) -> UserError:
    """Makes the error for a file that its format's reader could not read."""
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"{path} is damaged or is not the kind of file that its name says ({reason}); get it again."
    )


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def _check_directory(path: Path) -> None:
    """Raises ValueError if the archive's list of records is too long to be read.

    Reading such a list can take minutes and gigabytes.
    """
    with open(path, "rb") as file:
        # a comment of at most 65,535 bytes comes last
        file.seek(max(0, path.stat().st_size - (1 << 16) - 100))
        tail = file.read()
        end = tail.rfind(b"PK\5\6")
        sizes = [int.from_bytes(tail[end + 12 : end + 16], "little")] if end >= 0 else []
        # names the place of a record with 64-bit numbers
        locator = tail.rfind(b"PK\6\7", 0, max(end, 0))
        if locator >= 0:
            file.seek(
                min(int.from_bytes(tail[locator + 8 : locator + 16], "little"), path.stat().st_size)
            )
            sizes.append(int.from_bytes(file.read(56)[40:48], "little"))
            large = tail.rfind(b"PK\6\6", 0, locator)
            sizes += [int.from_bytes(tail[large + 40 : large + 48], "little")] if large >= 0 else []
    if any(size > DIRECTORY_LIMIT and size != 0xFFFFFFFF for size in sizes):
        raise ValueError("its list of records is longer than torch writes any")


class TorchFile:
    """Reads a file that `torch.save` wrote.

    `tree` is its nest of dicts, lists and scalars, with a TorchTensor for each tensor. Raises UserError
    if the file is damaged, holds code, or is in torch's format from before version 1.6.
    """

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        if not path.is_file():
            raise UserError(f"weight file {path} does not exist; check its path.")
        try:
            _check_directory(path)
            with zipfile.ZipFile(path) as archive:
                self.records = {info.filename: info for info in archive.infolist()}
                self.tree = self._unpickled(archive)
        except Refused as error:
            raise UserError(
                f"{path} holds code or objects besides tensors ({error}), and nothing of it was "
                "run; save only its state_dict, best as safetensors."
            ) from error
        except zipfile.BadZipFile as error:
            with open(path, "rb") as file:
                is_pickle = file.read(1) == b"\x80"
            if is_pickle:
                raise UserError(
                    f"{path} is in torch's format from before version 1.6, which cannot be read "
                    "here; load it with torch and save it again, best as safetensors."
                ) from error
            raise damaged(path, error) from error
        except UserError:
            raise
        except Exception as error:  # for a malformed pickle the unpickler raises many kinds of errors
            raise damaged(path, error) from error

    def _unpickled(self, archive: zipfile.ZipFile) -> Any:
        """Reads the tree of the archive, whose tensors name their records."""
        pickled = next((name for name in self.records if name.endswith("data.pkl")), None)
        if pickled is None or self.records[pickled].file_size > BYTES:
            raise UserError(
                f"{self.path} is a zip file, but none that torch.save wrote of tensors; check it."
            )
        root = pickled.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in self.records and self._record(archive, order, len(b"little")) != b"little":
            raise UserError(f"{self.path} was written on a big-endian machine; save it on another.")
        return read_pickle(self._record(archive, pickled, BYTES), root, self.path.stat().st_size)

    def _record(self, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
        """Reads a record of the archive, or its first bytes if it has more than `limit`."""
        if self.records[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # others unpack without a limit
            raise ValueError(f"{name} is packed in a way that torch does not use")
        with archive.open(name) as file:
            return file.read(limit)

    def read(self, tensor: TorchTensor, index: Region = ()) -> np.ndarray:
        """Copies a region of a tensor into memory."""
        storage = tensor.storage
        if 0 in tensor.shape:
            return np.empty(tensor.shape, storage.dtype)[index]
        # The map lives only as long as this call: with it the pages that were read are given back.
        numbers = np.memmap(self.path, storage.dtype, "r", self._start_of(storage), (storage.size,))
        strides = tuple(stride * storage.dtype.itemsize for stride in tensor.strides)
        view = np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :], tensor.shape, strides, writeable=False
        )
        return np.array(view[index])

    def _start_of(self, storage: Storage) -> int:
        """Finds the byte of the file at which a storage's numbers start."""
        size = storage.size * storage.dtype.itemsize
        info = self.records.get(storage.record)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < size:
            raise UserError(
                f"{self.path} lacks numbers of one of its tensors ({storage.record}); get it again."
            )
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            header = file.read(LOCAL_HEADER)
        name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:], "little")
        start = info.header_offset + LOCAL_HEADER + name + extra
        if header[:4] != b"PK\3\4" or start + size > self.path.stat().st_size:
            raise UserError(f"{self.path} is cut short at {storage.record}; get it again.")
        return start

    def to_write(self, tree: Any) -> Any:
        """Turns a part of `tree` into what `write_torch` takes.

        Tensors that this file shares stay shared.
        """
        made: dict[TorchTensor, Later] = {}

        def copy(part: Any) -> Any:
            if isinstance(part, TorchTensor):
                later = Later(Stored(part.shape, part.storage.dtype), functools.partial(self.read, part))
                return made.setdefault(part, later)
            if isinstance(part, dict):
                return type(part)((key, copy(value)) for key, value in part.items())
            return type(part)(map(copy, part)) if isinstance(part, (list, tuple)) else part

        return copy(tree)

    def tensors(self, *keys: str) -> "TorchTensors":
        """Gives the dict of tensors under these keys of the tree.

        Without keys it is the model's, which training programs put under different keys.
        """
        tree = self.tree
        for key in keys:
            if not isinstance(tree, dict) or key not in tree:
                raise UserError(
                    f"{self.path} has no {'.'.join(keys)}; give a checkpoint in the original's format."
                )
            tree = tree[key]
        if not keys and isinstance(tree, dict):
            inner = [key for key in ("model", "state_dict", "module") if isinstance(tree.get(key), dict)]
            tree = tree[inner[0]] if inner else tree
        if not isinstance(tree, dict) or not any(
            isinstance(value, TorchTensor) for value in tree.values()
        ):
            raise UserError(
                f"{self.path} holds no tensors by name; give a file with a model's state_dict."
            )
        return TorchTensors(self, {str(k): v for k, v in tree.items() if isinstance(v, TorchTensor)})


class TorchTensors(Tensors):
    """Gives named tensors of a torch file."""

    def __init__(self, file: TorchFile, tensors: dict[str, TorchTensor], origin: str = ""):
        self.file, self.tensors = file, tensors
        self.origin = origin or str(file.path)
        self.stored = {
            name: Stored(tensor.shape, tensor.storage.dtype) for name, tensor in tensors.items()
        }

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        return self.file.read(self.tensors[name], index)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------

ALIGNMENT = 64  # bytes; torch maps records into memory
LARGE = 1 << 30  # bytes; the sizes of larger records are written with 64 bits


@dataclasses.dataclass(frozen=True, eq=False)
class Later:
    """Promises a tensor whose numbers are made only when they are written."""

    stored: Stored
    make: Callable[[], np.ndarray]


def write_torch(path: Path, tree: Any) -> None:
    """Writes a file that `torch.load` reads, also with `weights_only`.

    Use it within `written_whole`.

    tree: dicts, lists, tuples, strings, numbers, None and tensors (arrays, or `Later`). A tensor that
    appears in several places is written once and is one storage when it is read again. Host memory
    holds one tensor at a time.
    """
    with open(path, "wb") as file:
        dump_torch(file, tree)


def dump_torch(file: BinaryIO, tree: Any) -> None:
    """Writes what `write_torch` does into an open file, from its beginning."""
    pickled = _Pickled(tree)
    with zipfile.ZipFile(file, "w") as archive:

        def record(name: str, data: Any) -> None:
            # dated 1980, so that the same tree gives the same file
            info = zipfile.ZipInfo(f"archive/{name}")
            info.file_size = memoryview(data).nbytes
            large = info.file_size > LARGE
            field = 4  # bytes, of the empty extra field with which the record is padded to ALIGNMENT
            header = LOCAL_HEADER + len(info.filename) + (20 if large else 0) + field
            padding = -(file.tell() + header) % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            with archive.open(info, "w", force_zip64=large) as out:
                out.write(data)

        record("data.pkl", bytes(pickled.out))
        record("byteorder", b"little")
        for key, tensor in enumerate(pickled.tensors):
            values = np.ascontiguousarray(tensor.make()).reshape(tensor.stored.shape)
            assert values.dtype == tensor.stored.dtype
            record(f"data/{key}", values.reshape(-1).view(np.uint8).data)  # [bytes]
        record("version", b"3\n")


class _Pickled:
    """Holds a tree as a pickle of protocol 2, made of the same opcodes as torch's own."""

    def __init__(self, tree: Any):
        self.out = bytearray(pickle.PROTO + b"\2")
        self.tensors: list[Later] = []  # in the order of their storages' keys
        self.keys: dict[int, int] = {}  # id of a tensor -> its storage's key
        self._write(tree)
        self.out += pickle.STOP

    def _write(self, x: Any) -> None:
        if isinstance(x, Later | np.ndarray):
            self._tensor(x)
        elif isinstance(x, tuple):
            self._within(pickle.MARK, x, pickle.TUPLE)
        elif isinstance(x, list):
            self._within(pickle.EMPTY_LIST + pickle.MARK, x, pickle.APPENDS)
        elif isinstance(x, dict):
            start = pickle.EMPTY_DICT
            if isinstance(x, collections.OrderedDict):
                start = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
            flat = [part for item in x.items() for part in item]
            self._within(start + pickle.MARK, flat, pickle.SETITEMS)
        else:
            self.out += _scalar(x)

    def _within(self, start: bytes, parts: Any, end: bytes) -> None:
        self.out += start
        for part in parts:
            self._write(part)
        self.out += end

    def _tensor(self, x: Later | np.ndarray) -> None:
        key = self.keys.setdefault(id(x), len(self.keys))
        if key == len(self.tensors):
            self.tensors.append(
                x if isinstance(x, Later) else Later(Stored(x.shape, x.dtype), lambda: x)
            )
        shape, dtype = self.tensors[key].stored
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))
        size = int(np.prod(shape, dtype=np.int64))
        hooks: collections.OrderedDict = collections.OrderedDict()
        offset, needs_gradient = 0, False
        self.out += _name("torch._utils", "_rebuild_tensor_v2") + pickle.MARK + pickle.MARK
        self._write("storage")
        self.out += _name("torch", STORAGES[np.dtype(dtype)])
        self._within(b"", (str(key), "cpu", size), pickle.TUPLE + pickle.BINPERSID)
        rest = (offset, tuple(shape), strides, needs_gradient, hooks)
        self._within(b"", rest, pickle.TUPLE + pickle.REDUCE)


def _scalar(x: Any) -> bytes:
    """Pickles None, a number or a string."""
    if x is None:
        return pickle.NONE
    if isinstance(x, bool):
        return pickle.NEWTRUE if x else pickle.NEWFALSE
    if isinstance(x, int):
        if -(1 << 31) <= x < 1 << 31:
            return pickle.BININT + struct.pack("<i", x)
        long = pickle.encode_long(x)
        return pickle.LONG1 + bytes([len(long)]) + long
    if isinstance(x, float):
        return pickle.BINFLOAT + struct.pack(">d", x)
    if isinstance(x, str):
        text = x.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    raise TypeError(f"a torch file holds plain data and tensors, not {type(x)}")


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
