"""Reads torch's zip files (`.bin`, `.pth`, `.pt`) without executing anything, and writes them without torch.

Such a file holds a pickle of a tree (dicts, lists, scalars, tensors), and the numbers of each tensor's
storage as a record of their own. Of the pickle only containers and the rebuilding of tensors are
interpreted; anything else is refused.
"""

import collections
import dataclasses
import functools
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from unimed_jax.errors import UserError
from unimed_jax.interop.tensors.table import Region, Stored, Tensors

TORCH_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
STORAGES = {np.dtype(dtype): name for name, dtype in TORCH_DTYPES.items()}
PICKLE_LIMIT = 1 << 28  # bytes; names and shapes of a model take less than a hundredth of it
LOCAL_HEADER = 30  # bytes of a zip record's header, before its name and its extra field


def damaged(path: Path, error: Exception) -> UserError:
    """Makes the error for a file that its format's reader could not read."""
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path} is damaged or is not the kind of file that its name says ({reason}); get it again.")


# --------------------------------------------------------------------------------------------------
# Unpickling
# --------------------------------------------------------------------------------------------------


class Storage(NamedTuple):
    """Describes a run of numbers in the file, of which tensors are views."""

    record: str  # within the archive
    dtype: np.dtype
    size: int  # elements


class TorchTensor(NamedTuple):
    """Describes a strided view of a storage, whose numbers are still in the file."""

    storage: Storage
    offset: int  # elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _OrderedDict(collections.OrderedDict):
    """Takes the place of OrderedDict and ignores what a pickle sets besides entries (a `_metadata`)."""

    def __setstate__(self, state):
        pass


class _RebuildTensor(tuple):
    """Takes the place of torch's function; as an empty tuple it has no attributes that a pickle could set."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *_) -> TorchTensor:
        if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
            raise pickle.UnpicklingError("a tensor is described by something other than numbers")
        if len(shape) != len(strides):
            raise pickle.UnpicklingError("a tensor has a stride too few or too many")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.size:
            raise pickle.UnpicklingError("a tensor reaches past its storage")
        return TorchTensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter(tuple):
    """Takes the place of torch's function for parameters, which are tensors with a flag."""

    __slots__ = ()

    def __call__(self, tensor, *_):
        return tensor


# Everything that a pickle may name. None of it is a class or a function of any library.
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): name for name in TORCH_DTYPES},
}


class _Refused(Exception):
    """Names something in a pickle that is not in ALLOWED."""


class _Unpickler(pickle.Unpickler):
    """Interprets a pickle, and refuses every name that is not in ALLOWED."""

    def __init__(self, file, root: str):
        super().__init__(file)
        self.root = root

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid) -> Storage:
        kind, storage, key, _, size = pid
        if kind != "storage" or storage not in TORCH_DTYPES or type(key) is not str or type(size) is not int:
            raise pickle.UnpicklingError("an unknown kind of storage")
        return Storage(f"{self.root}data/{key}", np.dtype(TORCH_DTYPES[storage]), size)


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


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
            with zipfile.ZipFile(path) as archive:
                self.records = {info.filename: info for info in archive.infolist()}
                self.tree = self._unpickled(archive)
        except _Refused as error:
            raise UserError(
                f"{path} holds code or objects besides tensors ({error}), and nothing of it was run; save only its "
                "state_dict, best as safetensors."
            ) from error
        except zipfile.BadZipFile as error:
            with open(path, "rb") as file:
                is_pickle = file.read(1) == b"\x80"
            if is_pickle:
                raise UserError(
                    f"{path} is in torch's format from before version 1.6, which cannot be read here; load it with "
                    "torch and save it again, best as safetensors."
                ) from error
            raise damaged(path, error) from error
        except UserError:
            raise
        except Exception as error:  # a malformed pickle makes the unpickler raise many kinds
            raise damaged(path, error) from error

    def _unpickled(self, archive: zipfile.ZipFile) -> Any:
        """Reads the tree of the archive, whose tensors name their records."""
        pickled = next((name for name in self.records if name.endswith("data.pkl")), None)
        if pickled is None or self.records[pickled].file_size > PICKLE_LIMIT:
            raise UserError(f"{self.path} is a zip file, but none that torch.save wrote of tensors; check it.")
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in self.records and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{self.path} was written on a big-endian machine; save it on another.")
        with archive.open(pickled) as file:
            return _Unpickler(file, root).load()

    def read(self, tensor: TorchTensor, index: Region = ()) -> np.ndarray:
        """Copies a region of a tensor into memory."""
        storage = tensor.storage
        if 0 in tensor.shape:
            return np.empty(tensor.shape, storage.dtype)[index]
        # The map lives only as long as this call: with it the pages that were read are given back.
        numbers = np.memmap(self.path, storage.dtype, "r", self._start_of(storage), (storage.size,))
        strides = tuple(stride * storage.dtype.itemsize for stride in tensor.strides)
        view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)
        return np.array(view[index])

    def _start_of(self, storage: Storage) -> int:
        """Finds the byte of the file at which a storage's numbers start."""
        size = storage.size * storage.dtype.itemsize
        info = self.records.get(storage.record)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < size:
            raise UserError(f"{self.path} lacks numbers of one of its tensors ({storage.record}); get it again.")
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            header = file.read(LOCAL_HEADER)
        name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:], "little")
        start = info.header_offset + LOCAL_HEADER + name + extra
        if header[:4] != b"PK\3\4" or start + size > self.path.stat().st_size:
            raise UserError(f"{self.path} is cut short at {storage.record}; get it again.")
        return start

    def to_write(self, tree: Any) -> Any:
        """Turns a part of `tree` into what `write_torch` takes; tensors that this file shares stay shared."""
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
                raise UserError(f"{self.path} has no {'.'.join(keys)}; give a checkpoint in the original's format.")
            tree = tree[key]
        if not keys and isinstance(tree, dict):
            inner = [key for key in ("model", "state_dict", "module") if isinstance(tree.get(key), dict)]
            tree = tree[inner[0]] if inner else tree
        if not isinstance(tree, dict) or not any(isinstance(value, TorchTensor) for value in tree.values()):
            raise UserError(f"{self.path} holds no tensors by name; give a file with a model's state_dict.")
        return TorchTensors(self, {str(k): v for k, v in tree.items() if isinstance(v, TorchTensor)})


class TorchTensors(Tensors):
    """Gives named tensors of a torch file."""

    def __init__(self, file: TorchFile, tensors: dict[str, TorchTensor], origin: str = ""):
        self.file, self.tensors = file, tensors
        self.origin = origin or str(file.path)
        self.stored = {name: Stored(tensor.shape, tensor.storage.dtype) for name, tensor in tensors.items()}

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
    """Writes a file that `torch.load` reads, also with `weights_only`. Use it within `written_whole`.

    tree: dicts, lists, tuples, strings, numbers, None and tensors (arrays, or `Later`). A tensor that
    appears in several places is written once and is one storage when it is read again. Host memory
    holds one tensor at a time.
    """
    pickled = _Pickled(tree)
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:

        def record(name: str, data: Any) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980, so that the same tree gives the same file
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
            self.tensors.append(x if isinstance(x, Later) else Later(Stored(x.shape, x.dtype), lambda: x))
        shape, dtype = self.tensors[key].stored
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))
        size = int(np.prod(shape, dtype=np.int64))
        offset, needs_gradient, hooks = 0, False, collections.OrderedDict()  # type: ignore[var-annotated]
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
