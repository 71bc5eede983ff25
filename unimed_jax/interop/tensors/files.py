"""Weight files, read by slices without executing anything, and written whole or not at all.

Safetensors (single, or sharded with an index); torch's files are in `torch_file`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from unimed_jax.errors import UserError
from unimed_jax.interop.tensors.table import Region, Stored, Tensors
from unimed_jax.interop.tensors.torch_file import TorchFile, damaged

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


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


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
