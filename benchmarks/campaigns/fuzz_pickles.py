"""Makes hostile files of torch: archives and random programs of opcodes for pickles."""

import collections
import functools
import io
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from campaigns.fuzz_changes import changed_bytes

from unimed_jax.interop.tensors.files import open_weights
from unimed_jax.interop.tensors.torch_file import TorchFile, write_torch


def read_all(path: Path) -> None:
    """Reads all tensors of a file or folder."""
    tensors = open_weights(path)
    for name in tensors.stored:
        tensors.read(name)


@functools.cache
def _torch_bytes() -> bytes:
    values = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}
    moments = {"step": np.array(3, np.float32), "exp_avg": np.ones((3, 4), np.float32)}
    tree = {
        "model": collections.OrderedDict(values),
        "optimizer": {
            "state": {0: moments},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}],
        },
        "config": {"model": {"lora_r": 8, "name": "é"}, "run": {"flags": [True, None]}},
        "epoch": 3,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_torch(Path(folder, "good.pth"), tree)
        return Path(folder, "good.pth").read_bytes()


def _archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return out.getvalue()


def good_pickle() -> bytes:
    """Gives the pickle of an ordinary checkpoint."""
    with zipfile.ZipFile(io.BytesIO(_torch_bytes())) as archive:
        return archive.read("archive/data.pkl")


def _program(rng: np.random.Generator) -> bytes:
    """Makes a pickle of random opcodes, most of them with sensible arguments."""
    word = b"X\x01\x00\x00\x00a"
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"
    )
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x03K\x04\x86K\x04K\x01\x86\x89}tR"
    )
    parts = [
        *(
            b"(",
            b"0",
            b"1",
            b"2",
            b")",
            b"]",
            b"}",
            b"t",
            b"l",
            b"d",
            b"a",
            b"e",
            b"s",
            b"u",
            b"N",
            b"\x88",
            b"b",
        ),
        *(
            b"\x85",
            b"\x86",
            b"\x87",
            b"R",
            b"\x81",
            b"Q",
            b"\x94",
            b"\x93",
            b".",
            word,
            word,
            tensor,
            tensor,
            storage,
        ),
        *(
            b"q\x00",
            b"h\x00",
            b"r" + struct.pack("<I", int(rng.integers(1 << 32))),
            b"j\x00\x00\x00\x00",
        ),
        *(
            b"K\x03",
            b"J" + rng.bytes(4),
            b"\x8a\x08" + rng.bytes(8),
            b"G" + rng.bytes(8),
            b"I5\n",
            b"Vab\n",
            b"g0\n",
        ),
        *(
            b"X" + struct.pack("<I", int(rng.integers(1 << 32))),
            b"\x8b" + rng.bytes(4),
            b"\x95" + rng.bytes(8),
        ),
        *(
            b"ccollections\nOrderedDict\n",
            b"ctorch\nSize\n",
            b"cos\nsystem\n",
            b"\x8e" + rng.bytes(8),
            b"\x8f",
        ),
    ]
    chosen = [parts[i] for i in rng.integers(0, len(parts), rng.integers(1, 60))]
    return (
        b"\x80\x02" + b"".join(chosen) + (b"}" + word + tensor + b"s." if rng.random() < 0.7 else b".")
    )


def _pth(rng: np.random.Generator, number: int, folder: Path) -> None:
    path = folder / "file.pth"
    with zipfile.ZipFile(io.BytesIO(_torch_bytes())) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    kind = number % 4
    if kind == 0:
        path.write_bytes(changed_bytes(rng, _torch_bytes()))
    elif kind == 1:
        records["archive/data.pkl"] = changed_bytes(rng, records["archive/data.pkl"])
        path.write_bytes(_archive(records, int(rng.choice([0, 0, 8, 12, 14]))))
    elif kind == 2:
        records["archive/data.pkl"] = _program(rng)
        path.write_bytes(_archive(records))
    else:
        name = list(records)[rng.integers(len(records))]
        if rng.random() < 0.5:
            records[name] = bytes(int(rng.choice([0, 1, 100, 3 << 20]))) + records[name] * int(
                rng.integers(0, 3)
            )
        else:
            records[f"{name}{rng.integers(3)}"] = records.pop(name)
        path.write_bytes(_archive(records, int(rng.choice([0, 8]))))
    file = TorchFile(path)
    file.to_write(file.tree)
    read_all(path)


READERS = {"pth": _pth}
