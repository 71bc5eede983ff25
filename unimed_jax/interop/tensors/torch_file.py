"""torch's zip files (`.bin`, `.pth`, `.pt`), read without executing anything and written without torch.

Such a file holds a pickle of a tree (dicts, lists, scalars), in which tensors name storages, and each storage's
numbers as a record of their own. Of a pickle only the containers and the rebuilding of tensors are interpreted;
anything else is refused.
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
    **{"DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16},
    **{"BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32},
    **{"ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_},
}
PICKLE_LIMIT = 1 << 28  # bytes; names and shapes of a model take less than a hundredth of it


class Storage(NamedTuple):
    record: str  # within the archive
    dtype: np.dtype
    size: int  # elements


class TorchTensor(NamedTuple):
    """A strided view of a storage; its numbers are still in the file."""

    storage: Storage
    offset: int  # elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _OrderedDict(collections.OrderedDict):
    """Stands for OrderedDict; what a pickle would set besides the entries (a module's `_metadata`) is dropped."""

    def __setstate__(self, state):
        pass


class _RebuildTensor(tuple):
    """Stands for torch's function. An empty tuple: a pickle can set nothing on it."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *_) -> TorchTensor:
        if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
            raise pickle.UnpicklingError("a tensor is described by something else than numbers")
        if len(shape) != len(strides):
            raise pickle.UnpicklingError("a tensor has a stride too few or too many")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.size:
            raise pickle.UnpicklingError("a tensor reaches past its storage")
        return TorchTensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter(tuple):
    __slots__ = ()

    def __call__(self, tensor, *_):
        return tensor


# Everything that a pickle may name: no class or function of any library is among it.
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): name for name in TORCH_DTYPES},
}


class _Unpickler(pickle.Unpickler):
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


def damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path} is damaged or no such file as its name says ({reason}); get it again.")


class _Refused(Exception):
    """A pickle that names something beyond ALLOWED."""


class TorchFile:
    """What `torch.save` wrote: `tree` is its nest of dicts, lists and scalars, with TorchTensor for tensors.

    Raises UserError for a file that is damaged, in the format from before PyTorch 1.6, or that holds code.
    """

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        if not path.is_file():
            raise UserError(f"weight file {path} does not exist; check its path.")
        try:
            with zipfile.ZipFile(path) as archive:
                records = {info.filename: info for info in archive.infolist()}
                pickled = next((name for name in records if name.endswith("data.pkl")), None)
                if pickled is None or records[pickled].file_size > PICKLE_LIMIT:
                    raise UserError(f"{path} is a zip file, but none of tensors that torch.save wrote; check it.")
                root = pickled.removesuffix("data.pkl")
                if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
                    raise UserError(f"{path} was written on a big-endian machine; save it on another.")
                with archive.open(pickled) as file:
                    self.tree = _Unpickler(file, root).load()
        except _Refused as error:
            raise UserError(
                f"{path} holds code or objects beside tensors ({error}), and nothing of it was run; save its "
                "state_dict alone, best as safetensors."
            ) from error
        except zipfile.BadZipFile as error:
            with open(path, "rb") as file:
                old = file.read(2)[:1] == b"\x80"
            if old:
                raise UserError(
                    f"{path} is in torch's format from before version 1.6, which is not read here; load it with torch "
                    "and save it again, best as safetensors."
                ) from error
            raise damaged(path, error) from error
        except UserError:
            raise
        except Exception as error:  # whatever a malformed pickle makes the interpreter of opcodes raise
            raise damaged(path, error) from error
        self.records = records

    def read(self, tensor: TorchTensor, index: Region = ()) -> np.ndarray:
        """A copy of that part of a tensor."""
        storage = tensor.storage
        if 0 in tensor.shape:
            return np.empty(tensor.shape, storage.dtype)[index]
        info = self.records.get(storage.record)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < storage.size * _width(storage):
            raise UserError(f"{self.path} lacks numbers of one of its tensors ({storage.record}); get it again.")
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
        start = (
            info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
        )
        if header[:4] != b"PK\3\4" or start + storage.size * _width(storage) > self.path.stat().st_size:
            raise UserError(f"{self.path} is cut short at {storage.record}; get it again.")
        # Mapped for this read alone: the pages are given back with the map.
        numbers = np.memmap(self.path, storage.dtype, "r", start, (storage.size,))
        strides = tuple(stride * _width(storage) for stride in tensor.strides)
        view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)
        return np.array(view[index])

    def to_write(self, tree: Any) -> Any:
        """A part of `tree` as `write_torch` takes it; tensors that are one in this file stay one."""
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
        """The dict of tensors under these keys; without any, the model's, wherever training programs put it."""
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


def _width(storage: Storage) -> int:
    return storage.dtype.itemsize


class TorchTensors(Tensors):
    def __init__(self, file: TorchFile, tensors: dict[str, TorchTensor], origin: str = ""):
        self.file, self.places, self.origin = file, tensors, origin or str(file.path)
        self.stored = {name: Stored(t.shape, t.storage.dtype) for name, t in tensors.items()}

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        return self.file.read(self.places[name], index)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------

STORAGES = {np.dtype(dtype): name for name, dtype in TORCH_DTYPES.items()}
ALIGNMENT = 64  # bytes; torch maps records into memory
LARGE = 1 << 30  # bytes; larger records have their sizes in 64 bits


@dataclasses.dataclass(frozen=True, eq=False)
class Later:
    """A tensor whose numbers are made when their turn to be written comes."""

    stored: Stored
    make: Callable[[], np.ndarray]


def write_torch(path: Path, tree: Any) -> None:
    """Writes what `torch.load` reads, with `weights_only` too. Use within `new_file`.

    tree: dicts, lists, tuples, strings, numbers, None and tensors (arrays, or `Later`). A tensor that stands in
    several places is written once, and is one storage when it is read again. Host memory holds one at a time.
    """
    pickled = _Pickled(tree)
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:

        def record(name: str, data: Any) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")  # of the year 1980: the same tree gives the same file
            info.file_size = memoryview(data).nbytes
            large = info.file_size > LARGE
            header = 30 + len(info.filename) + (20 if large else 0)  # bytes, and 4 of the field that pads it
            padding = -(file.tell() + header + 4) % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # a field that readers of zip skip
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
    """A tree as a pickle of protocol 2, in the words that torch's own are made of."""

    def __init__(self, tree: Any):
        self.out = bytearray(pickle.PROTO + b"\2")
        self.tensors: list[Later] = []  # in the order of their storages' keys
        self.keys: dict[int, int] = {}  # by identity
        self._write(tree)
        self.out += pickle.STOP

    def _write(self, x: Any) -> None:
        if x is None:
            self.out += pickle.NONE
        elif isinstance(x, bool):
            self.out += pickle.NEWTRUE if x else pickle.NEWFALSE
        elif isinstance(x, int):
            small = -(1 << 31) <= x < 1 << 31
            long = pickle.encode_long(x)
            self.out += pickle.BININT + struct.pack("<i", x) if small else pickle.LONG1 + bytes([len(long)]) + long
        elif isinstance(x, float):
            self.out += pickle.BINFLOAT + struct.pack(">d", x)
        elif isinstance(x, str):
            text = x.encode()
            self.out += pickle.BINUNICODE + struct.pack("<I", len(text)) + text
        elif isinstance(x, Later | np.ndarray):
            self._tensor(x)
        elif isinstance(x, tuple):
            self._within(pickle.MARK, x, pickle.TUPLE)
        elif isinstance(x, list):
            self._within(pickle.EMPTY_LIST + pickle.MARK, x, pickle.APPENDS)
        elif isinstance(x, dict):
            start = pickle.EMPTY_DICT
            if isinstance(x, collections.OrderedDict):
                start = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
            self._within(start + pickle.MARK, [part for item in x.items() for part in item], pickle.SETITEMS)
        else:
            raise TypeError(f"a torch file holds plain data and tensors, no {type(x)}")

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
        self.out += _name("torch._utils", "_rebuild_tensor_v2") + pickle.MARK + pickle.MARK
        self._write("storage")
        self.out += _name("torch", STORAGES[np.dtype(dtype)])
        self._within(b"", (str(key), "cpu", size), pickle.TUPLE + pickle.BINPERSID)
        rest: tuple[Any, ...] = (
            0,
            tuple(shape),
            strides,
            False,
            collections.OrderedDict(),
        )  # offset, ..., no gradient, no hooks
        self._within(b"", rest, pickle.TUPLE + pickle.REDUCE)


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
