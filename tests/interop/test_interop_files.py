"""Weight files: read by slices, nothing executed, written whole or not at all, every mistake a
sentence.
"""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from support.weight_files import NEEDS, assert_reads, refused

from unimed_jax.errors import UserError
from unimed_jax.files import new_folder, written_whole
from unimed_jax.interop.tensors.files import write_safetensors
from unimed_jax.interop.tensors.table import Stored

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
rng = np.random.default_rng(0)


def tensors(dtypes=DTYPES):
    out = {f"a.{np.dtype(t).name}": rng.standard_normal((5, 6)).astype(t) for t in dtypes}
    return out | {"vector": np.arange(4, dtype=np.float32), "scalar": np.array(3.0, np.float32)}


def write(folder, values, **options):
    write_safetensors(
        folder, {k: Stored(v.shape, v.dtype) for k, v in values.items()}, values.items(), **options
    )


# ---------------------------------------------------------------------------------------------
# Safetensors
# ---------------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    assert_reads(tmp_path / "model.safetensors", read_back(tmp_path / "model.safetensors"))
    assert_reads(tmp_path, read_back(tmp_path / "model.safetensors"))


def read_back(path):
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_written_safetensors_are_read_by_their_own_library(tmp_path):
    values = tensors()
    write(tmp_path, values)
    there = read_back(tmp_path / "model.safetensors")
    assert there.keys() == values.keys()
    for name, value in values.items():
        assert there[name].dtype == value.dtype
        np.testing.assert_array_equal(there[name], value)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers insists on it


def test_shards(tmp_path):
    values = tensors()
    write(tmp_path, values, limit=250)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
    assert {name: file.name for file in files for name in read_back(file)} == index["weight_map"]
    assert_reads(tmp_path, values)
    assert_reads(tmp_path / "model.safetensors.index.json", values)


def test_broken_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    refused(path, "does not exist")
    save_file({"a": np.ones((40, 50), np.float32)}, path)
    whole = path.read_bytes()
    for end in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:end])
        refused(path, "damaged")
    path.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    refused(path, "damaged")
    path.write_bytes(b"PK\3\4" + whole)
    refused(path, "damaged")
    path.rename(tmp_path / "model.onnx")
    refused(tmp_path / "model.onnx", "is not a weight file that can be read here")
    refused(tmp_path, "holds no weights")


def test_broken_index(tmp_path):
    write(tmp_path, tensors(), limit=250)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def with_map(**changes):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | changes}))

    outside = tmp_path.parent / "outside.safetensors"
    save_file({"x": np.ones(1, np.float32)}, outside)
    for name in ("gone.safetensors", "../outside.safetensors", str(outside), index.name, 3):
        with_map(x=name)
        refused(tmp_path, "which is not next to it")
    with_map(renamed=good["weight_map"]["vector"])
    refused(tmp_path, "renamed .in model-0000")
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        refused(tmp_path, "is not JSON" if text == "{" else "is not an index of weight files")


def test_torch_shards(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS)
    values = {"a": np.ones((5, 6), np.float32), "b": np.zeros((2, 3), np.float32)}
    for i, (name, value) in enumerate(values.items()):
        torch.save({name: torch.tensor(value)}, tmp_path / f"pytorch_model-{i}.bin")
    weight_map = {"a": "pytorch_model-0.bin", "b": "pytorch_model-1.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_reads(tmp_path, values)


# ---------------------------------------------------------------------------------------------
# Whole or not at all
# ---------------------------------------------------------------------------------------------


def test_new_folder_is_there_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="stop") as stopped, new_folder(out) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError("stop")
    assert stopped.value.__cause__ is None  # not itself, which would make its chain of causes endless
    assert list(tmp_path.rglob("*")) == [out.parent]
    with new_folder(out) as folder:
        (folder / "a").write_text("whole")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a"] and list(out.parent.iterdir()) == [out]
    with pytest.raises(UserError, match="exists already"), new_folder(out):
        raise AssertionError("not reached")
    assert (out / "a").read_text() == "whole"


def test_new_file_replaces_or_leaves(tmp_path):
    path = tmp_path / "x.pth"
    path.write_text("old")
    with pytest.raises(UserError, match="could not be written .No space"), written_whole(path) as file:
        file.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with written_whole(path) as file:
        file.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_wrong_tensor_leaves_no_folder(tmp_path):
    value = np.ones(3, np.float32)
    with pytest.raises(AssertionError, match="a"), new_folder(tmp_path / "out") as folder:
        write_safetensors(folder, {"a": Stored((4,), value.dtype)}, [("a", value)])
    assert not list(tmp_path.iterdir()) and Path(tmp_path).is_dir()
