"""Weight files, read by slices without executing anything, and written whole or not at all.

Safetensors (single, or sharded with an index) and torch's zip files (`.bin`, `.pth`, `.pt`). Of a torch file's
pickle only the containers and the rebuilding of tensors are interpreted; anything else is refused.
"""

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from unimed_jax.config import UserError
from unimed_jax.interop.table import Region, Stored, Tensors

# What a folder's weights are called, best first.
FOLDER_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)
SAFETENSORS_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_},
}


def open_weights(path: str | Path) -> Tensors:
    """The tensors of a weight file, or of a folder that holds one (or an index of several).

    Raises UserError where there is none, or where it is damaged or not what its name says.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in FOLDER_NAMES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"folder {path} holds no weights; expected {' or '.join(FOLDER_NAMES[:3])} in it.")
        path = found
    if not path.is_file():
        raise UserError(f"weight file {path} does not exist; check its path.")
    if path.name.endswith(".index.json"):
        return Shards(path)
    if path.suffix == ".safetensors":
        return Safetensors(path)
    if path.suffix in (".bin", ".pth", ".pt"):
        return TorchFile(path).tensors()
    raise UserError(f"{path} is no weight file that is read here; give .safetensors, .bin, .pth or .pt.")


class Safetensors(Tensors):
    def __init__(self, path: Path):
        self.path, self.origin, self.stored = path, str(path), {}
        try:
            with safe_open(path, framework="numpy") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 (no dict)
                    part = file.get_slice(name)
                    dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                    self.stored[name] = Stored(
                        tuple(part.get_shape()), np.dtype(dtype) if dtype else str(part.get_dtype())
                    )
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        # Opened anew each time: the pages that were read are given back with the file.
        with safe_open(self.path, framework="numpy") as file:
            part = file.get_slice(name)
            return part[index] if index else part[:] if part.get_shape() else file.get_tensor(name)


class Shards(Tensors):
    """Several files and their index ("weight_map": tensor -> file beside it)."""

    def __init__(self, index: Path):
        self.origin = str(index.parent)
        try:
            self.place: dict[str, str] = json.loads(index.read_text())["weight_map"]
            names = set(self.place.values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is no index of weight files (no weight_map); get it again.") from error
        for name in names:
            plain = isinstance(name, str) and Path(name).name == name and name.endswith((".safetensors", ".bin"))
            if not plain or not (index.parent / name).is_file():
                raise UserError(f"{index} names the file {name!r}, which is not beside it; get it again.")
        self.files = {name: open_weights(index.parent / name) for name in sorted(names)}
        lost = [f"{name} (in {file})" for name, file in self.place.items() if name not in self.files[file].stored]
        if lost:
            raise UserError(f"{index} names tensors that their files lack: {', '.join(lost)}; get the files again.")
        self.stored = {name: self.files[file].stored[name] for name, file in self.place.items()}

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        return self.files[self.place[name]].read(name, index)


def damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path} is damaged or no such file as its name says ({reason}); get it again.")


# --------------------------------------------------------------------------------------------------
# torch's zip files
# --------------------------------------------------------------------------------------------------

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


class _Dict(dict):
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
    ("collections", "OrderedDict"): _Dict,
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


class _Refused(Exception):
    """A pickle that names something beyond ALLOWED."""


class TorchFile:
    """What `torch.save` wrote: `tree` is its nest of dicts, lists and scalars, with TorchTensor for tensors.

    Raises UserError for a file that is damaged, in the format from before PyTorch 1.6, or that holds code.
    """

    def __init__(self, path: Path):
        self.path = path
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
    def __init__(self, file: TorchFile, tensors: dict[str, TorchTensor]):
        self.file, self.places, self.origin = file, tensors, str(file.path)
        self.stored = {name: Stored(t.shape, t.storage.dtype) for name, t in tensors.items()}

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        return self.file.read(self.places[name], index)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when all went well and vanishes when not.

    Raises UserError where `path` holds something already.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; choose another folder, or remove it.")
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        beside.mkdir(parents=True)
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                _flush(file)
        beside.replace(path)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when all went well and vanishes when not."""
    path = Path(path)
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        _flush(beside)
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: BaseException) -> BaseException:
    if isinstance(error, OSError):
        return UserError(f"{path} could not be written ({error.strerror or error}) and nothing of it was kept.")
    return error


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_safetensors(
    folder: Path,
    stored: Mapping[str, Stored],
    tensors: Iterable[tuple[str, np.ndarray]],
    stem: str = "model",
    limit: int = 2 << 30,
) -> None:
    """Writes tensors, which come one at a time in the order of `stored`, as `<stem>.safetensors`.

    More than `limit` bytes become several files with an index, as Hugging Face names them. Use within `new_folder`.
    """
    shards: list[list[str]] = [[]]
    room = limit
    for name, (shape, dtype) in stored.items():
        size = _bytes(shape, dtype)
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    stream = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            shape, dtype = stored[name]
            start, end = end, end + _bytes(shape, dtype)
            header[name] = {"dtype": SAFETENSORS_NAMES[np.dtype(dtype)], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for expected in names:
                name, value = next(stream)
                assert (name, value.shape, value.dtype) == (expected, *stored[expected]), name
                out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)  # [bytes]
    if count > 1:
        total = sum(_bytes(*s) for s in stored.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
