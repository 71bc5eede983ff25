"""Checks weight files, and makes pickles of which some would run code."""

import struct
import zipfile

import numpy as np
import pytest

from unimed_jax.errors import UserError
from unimed_jax.interop.tensors.files import open_weights
from unimed_jax.interop.tensors.table import Stored

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"


def assert_reads(path, expected):
    file = open_weights(path)
    assert {name: Stored(x.shape, x.dtype) for name, x in expected.items()} == dict(file.stored)
    for name, value in expected.items():
        whole = file.read(name)
        assert whole.dtype == value.dtype and whole.flags.writeable
        np.testing.assert_array_equal(whole, value)
    for name in (name for name, value in expected.items() if value.ndim == 2):
        for index in (
            (slice(1, 3), slice(2, 5)),
            (slice(None), slice(0, 1)),
            (slice(4, 5), slice(None)),
        ):
            np.testing.assert_array_equal(file.read(name, index), expected[name][index])


def refused(path, match):
    """Checks that the file is refused with one sentence that names it."""
    with pytest.raises(UserError, match=match) as error:
        file = open_weights(path)
        for name in file.stored:
            file.read(name)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def archive(path, pickled: bytes, records=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", pickled)
        for name, data in records:
            out.writestr(f"archive/data/{name}", data)


def tensor_pickle(size, offset, shape, strides, key="0") -> bytes:
    """Pickles {"a": tensor} as torch.save does."""
    out = bytearray(b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(")

    def number(n):
        out.extend(b"J" + struct.pack("<i", n))

    def word(text):
        out.extend(b"X" + struct.pack("<I", len(text)) + text.encode())

    out.extend(b"(")
    word("storage")
    out.extend(b"ctorch\nFloatStorage\n")
    word(key)
    word("cpu")
    number(size)
    out.extend(b"tQ")
    number(offset)
    for values in (shape, strides):
        out.extend(b"(")
        for value in values:
            number(value)
        out.extend(b"t")
    out.extend(b"\x89}tRs.")
    return bytes(out)


class Touch:
    """Pickles as a call, as a malicious file does."""

    def __init__(self, call, *args):
        self.call = (call, args)

    def __reduce__(self):
        return self.call
