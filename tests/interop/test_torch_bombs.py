"""Torch files made to take a machine down: each is one sentence, in little time and memory."""

import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from support.weight_files import archive, assert_reads, refused, tensor_pickle

from unimed_jax import pickles
from unimed_jax.interop.tensors import torch_file
from unimed_jax.interop.tensors.files import open_weights

TENSOR = tensor_pickle(4, 0, (4,), (1,))  # {"a": tensor}
NUMBERS = [("0", np.arange(4, dtype=np.float32).tobytes())]


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def long(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(size: bytes, offset: bytes, shape: bytes, strides: bytes, key: bytes = word("0")) -> bytes:
    """A pickle of {"a": tensor}, whose parts may be any values."""
    head = b"\x80\x02}" + word("a") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + word("storage")
    return (
        head
        + b"ctorch\nFloatStorage\n"
        + key
        + word("cpu")
        + size
        + b"tQ"
        + offset
        + shape
        + strides
        + b"\x89}tRs."
    )


def pair(a: bytes, b: bytes) -> bytes:
    return a + b + b"\x86"


DEEP = b")" + b"\x85" * 100_000  # (((...)))
DOUBLED = b")" + b"2\x86" * 60  # each holds the one before twice: 2^60 empty tuples
ONE = long(1)
MANY = b"(" + b"K\x01" * 100_000 + b"t"
BOMBS = {
    "a memo of 2^31 places": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a memo place of a million digits": b"\x80\x02}p" + b"9" * 1_000_000 + b"\n.",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "a text of 2^63 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b".",
    "bytes of 2^60": b"\x80\x05\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "a bytearray of 2^60": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "a frame of 2^60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a number of 200,000 digits": b"\x80\x02I" + b"9" * 200_000 + b"\n.",
    "a number of 100,000 bytes": b"\x80\x02\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b".",
    "a deep tuple as a key": b"\x80\x02}" + DEEP + b"Ns.",
    "a doubled tuple as a key": b"\x80\x02}" + DOUBLED + b"Ns.",
    "a doubled tuple as the storage's key": tensor(ONE, ONE, b")", b")", key=DOUBLED),
    "a doubled tuple as the storage": b"\x80\x02}" + word("a") + DOUBLED + b"Qs.",
    "a deep tuple as the shape": tensor(ONE, long(0), DEEP, ONE + b"\x85"),
    "a doubled tuple as strides": tensor(ONE, long(0), ONE + b"\x85", DOUBLED),
    "a doubled tuple as the offset": tensor(ONE, DOUBLED, ONE + b"\x85", ONE + b"\x85"),
    "a doubled tuple beside a tensor": TENSOR[:-1] + word("b") + DOUBLED + b"s.",
    "a doubled list beside a tensor": TENSOR[:-1]
    + word("b")
    + b"]"
    + b"q\x00]h\x00ah\x00aq\x00" * 60
    + b"s.",
    "a list that holds itself": TENSOR[:-1] + word("b") + b"]q\x00h\x00as.",
    "deep lists beside a tensor": TENSOR[:-1] + word("b") + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    "a dict of doubled tuples": b"\x80\x02ccollections\nOrderedDict\n(" + DOUBLED + b"tR.",
    "a shape that overflows": tensor(
        ONE, long(0), pair(long(1 << 62), long(1 << 62)), pair(long(0), long(0))
    ),
    "a hidden shape that overflows": tensor(ONE, long(0), pair(long(0), long(1 << 62)), pair(ONE, ONE)),
    "a number repeated 10^12 times": tensor(ONE, long(0), long(10**12) + b"\x85", long(0) + b"\x85"),
    "strides that overflow": tensor(ONE, long(0), pair(long(2), long(2)), pair(long(1 << 400), ONE)),
    "a storage of 2^62 numbers": tensor(long(1 << 62), long(0), long(1 << 62) + b"\x85", ONE + b"\x85"),
    "a storage of -1 numbers": tensor(long(-1), long(0), long(0) + b"\x85", ONE + b"\x85"),
    "a tensor of 100,000 dimensions": tensor(ONE, long(0), MANY, MANY),
    "100,000 copies": b"\x80\x02" + b"2" * 10 + b"}" + b"2" * 100_000 + b".",
    "100,000 places": b"\x80\x04}" + b"\x94" * 100_000 + b"0.",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "marks alone": b"\x80\x02" + b"(" * 100_000 + b".",
    "an opcode of registered classes": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "a set": b"\x80\x04\x8f.",
    "half of a surrogate pair": b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_takes_what_its_bytes_take(tmp_path, name):
    path = tmp_path / "file.pth"
    archive(path, BOMBS[name], NUMBERS)
    tracemalloc.start()
    start = time.monotonic()
    try:
        refused(path, "damaged|holds code|no tensors by name|lacks numbers")
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.monotonic() - start < 10 and peak < 100 << 20, (time.monotonic() - start, peak)


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x7f", b"r\x00\x00\x00\x20", b"p" + b"9" * 30 + b"\n"])
def test_a_far_place_in_the_memo_takes_no_more_than_a_near_one(tmp_path, put):
    archive(tmp_path / "file.pth", TENSOR[:-1] + put + b".", NUMBERS)
    assert_reads(tmp_path / "file.pth", {"a": np.arange(4, dtype=np.float32)})


def test_too_many_opcodes(tmp_path, monkeypatch):
    archive(tmp_path / "file.pth", TENSOR, NUMBERS)
    monkeypatch.setattr(pickles, "OPCODES", 10)
    refused(tmp_path / "file.pth", "more than 10 opcodes")


def zeros(path, name: str, size: int, compression=zipfile.ZIP_DEFLATED) -> None:
    """An ordinary file with one more record of `size` zeros."""
    archive(path, TENSOR, NUMBERS)
    with (
        zipfile.ZipFile(path, "a", compression) as out,
        out.open(f"archive/{name}", "w", force_zip64=True) as record,
    ):
        for _ in range(size >> 20):
            record.write(bytes(1 << 20))


def test_records_of_zeros(tmp_path):
    """Of the record `byteorder` a few bytes are read, and of others that torch adds none."""
    path = tmp_path / "file.pth"
    tracemalloc.start()
    zeros(path, "byteorder", 64 << 20)
    refused(path, "big-endian")
    for name in ("version", ".data/serialization_id", "data/9"):
        zeros(path, name, 16 << 20)
        np.testing.assert_array_equal(open_weights(path).read("a"), [0, 1, 2, 3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_pickles_that_unpack_to_more_than_they_are(tmp_path, compression, monkeypatch):
    monkeypatch.setattr(torch_file, "BYTES", 1 << 20)
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", bytes(torch_file.BYTES + 1))
    refused(path, "none that torch.save wrote of tensors")
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", b"N" * torch_file.BYTES)
    tracemalloc.start()
    refused(path, "damaged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_long_list_of_records(tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    archive(path, TENSOR, NUMBERS)
    open_weights(path)
    monkeypatch.setattr(torch_file, "DIRECTORY_LIMIT", 50)
    refused(path, "list of records")
    # the numbers of the list are written with 64 bits
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    archive(path, TENSOR, NUMBERS)
    assert b"PK\6\6" in path.read_bytes()
    refused(path, "list of records")
