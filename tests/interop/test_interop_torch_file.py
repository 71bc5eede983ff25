"""torch's files: read as torch reads them and without running anything, written so that torch reads
them.
"""

import collections
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from support import golden_uni_med
from support.weight_files import NEEDS, Touch, archive, assert_reads, refused, tensor_pickle

from unimed_jax.errors import UserError
from unimed_jax.interop.tensors import torch_file
from unimed_jax.interop.tensors.files import open_weights
from unimed_jax.interop.tensors.table import Stored
from unimed_jax.interop.tensors.torch_file import Later, TorchFile, write_torch


def test_torch_file(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS)
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    state = collections.OrderedDict(
        {
            "plain": base,
            "transposed": base.T,
            "strided": base[1:5:2, ::3],
            "expanded": base[:1].expand(4, 10),
            "half": base.half(),
            "bfloat": base.bfloat16(),
            "long": torch.arange(3),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(base + 1),
        }
    )
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    expected = {
        k: (v.detach().float() if k == "bfloat" else v.detach()).numpy() for k, v in state.items()
    }
    expected["bfloat"] = expected["bfloat"].astype(ml_dtypes.bfloat16)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_reads(tmp_path, expected)
    for key in ("model", "state_dict", "module"):
        torch.save(
            {key: state, "epoch": 3, "args": {"lr": 0.1, "betas": (0.9, None)}}, tmp_path / f"{key}.pth"
        )
        assert_reads(tmp_path / f"{key}.pth", expected)
    tree = TorchFile(tmp_path / "model.pth").tree
    assert tree["epoch"] == 3 and tree["args"] == {"lr": 0.1, "betas": (0.9, None)}


@pytest.mark.parametrize("where", ["alone", "besides tensors"])
@pytest.mark.parametrize("call", ["os.mkdir", "open", "eval", "exec", "getattr", "torch"])
def test_code_in_a_pickle_is_not_run(tmp_path, call, where):
    made = tmp_path / "made"
    calls = {
        "os.mkdir": (os.mkdir, str(made)),
        "open": (open, str(made), "w"),
        "eval": (eval, f"__import__('os').mkdir({str(made)!r})"),
        "exec": (exec, f"import os; os.mkdir({str(made)!r})"),
        "getattr": (getattr, "", "join"),
        "torch": (zipfile.ZipFile, str(made), "w"),
    }
    bomb = Touch(*calls[call])
    pickle.loads(pickle.dumps(bomb))  # it goes off
    assert made.exists() == (call != "getattr")
    if made.exists():
        made.rmdir() if made.is_dir() else made.unlink()
    tree = bomb if where == "alone" else {"model": {"a": 1}, "config": bomb}
    for protocol in (0, 2, 5):
        path = tmp_path / "file.pth"
        archive(path, pickle.dumps(tree, protocol))
        refused(path, "holds code or objects besides tensors .*nothing of it was run")
        assert not made.exists()


def test_dotted_names_and_registered_extensions_lead_nowhere(tmp_path):
    """Ways around a list of names: attributes of an allowed one, the opcodes for registered classes."""
    path = tmp_path / "file.pth"
    for pickled in (
        b"\x80\x04\x8c\x0btorch._utils\x8c\x25_rebuild_tensor_v2.__call__.__globals__\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x13OrderedDict.__base__\x93.",
        b"\x80\x02\x82\x01.",
    ):
        archive(path, pickled)
        refused(path, "holds code|damaged")


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD on what stands for torch's functions, on classes and on tensors sets nothing."""
    path = tmp_path / "file.pth"
    state = b"}\x8c\x08__call__K\x01s"
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n"):
        for build in (state + b"b", b"N" + state + b"\x86b"):
            archive(path, b"\x80\x04" + name + build + b".")
            refused(path, "damaged")
    torch_file = tmp_path / "good.pth"
    archive(
        torch_file, tensor_pickle(4, 0, (4,), (1,)), [("0", np.arange(4, dtype=np.float32).tobytes())]
    )
    np.testing.assert_array_equal(open_weights(torch_file).read("a"), [0, 1, 2, 3])


@pytest.mark.parametrize(
    "size, offset, shape, strides, match",
    [
        (4, 1, (4,), (1,), "past its storage"),
        (4, 0, (2, 2), (4, 1), "past its storage"),
        (4, -1, (2,), (1,), "other than numbers"),
        (4, 0, (2,), (-1,), "other than numbers"),
        (4, 0, (2, 2), (1,), "a stride too few"),
        (5, 0, (5,), (1,), "lacks numbers"),
    ],
)
def test_tensors_outside_their_numbers(tmp_path, size, offset, shape, strides, match):
    path = tmp_path / "file.pth"
    archive(
        path,
        tensor_pickle(size, offset, shape, strides),
        [("0", np.arange(4, dtype=np.float32).tobytes())],
    )
    refused(path, match)


def test_broken_torch_files(tmp_path):
    path = tmp_path / "file.pth"
    numbers = np.arange(400, dtype=np.float32).tobytes()
    good = tensor_pickle(400, 0, (400,), (1,))
    archive(path, good, [("0", numbers)])
    whole = path.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:end])
        refused(path, "damaged")
    archive(path, good)
    refused(path, "lacks numbers")
    archive(path, good, [("1", numbers)])
    refused(path, "lacks numbers")
    archive(path, good, [("0", numbers)], zipfile.ZIP_DEFLATED)
    refused(path, "lacks numbers")
    archive(path, good[:40], [("0", numbers)])
    refused(path, "damaged")
    archive(path, pickle.dumps({"a": 3}))
    refused(path, "no tensors by name")
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("word/document.xml", "x")
    refused(path, "none that torch.save wrote of tensors")


def test_old_torch_format(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS)
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    refused(path, "before version 1.6")


def test_reference_checkpoint(goldens):
    """The original's file, optimizer state included, without torch: equal to what torch reads."""
    entry = golden_uni_med.manifest(goldens)["checkpoint"]
    path = goldens / entry["file"]
    file = TorchFile(path)
    assert list(file.tree) == entry["top_keys"]
    assert all(file.tree[key] == entry[key] for key in ("epoch", "scaler", "config"))
    torch = pytest.importorskip("torch", reason=NEEDS)
    peer = torch.load(path, weights_only=True)
    model = file.tensors("model")
    assert model.stored.keys() == peer["model"].keys()
    for name, value in peer["model"].items():
        np.testing.assert_array_equal(model.read(name), value.numpy())
    state = file.tree["optimizer"]["state"]
    assert state.keys() == peer["optimizer"]["state"].keys()
    for index, moments in peer["optimizer"]["state"].items():
        for name, value in moments.items():
            np.testing.assert_array_equal(file.read(state[index][name]), value.numpy())
    assert file.tree["optimizer"]["param_groups"] == peer["optimizer"]["param_groups"]
    with pytest.raises(UserError, match="has no ema"):
        file.tensors("ema")


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------

PLAIN = {
    "none": None,
    "flags": [True, False],
    "numbers": (0, -1, 255, 70000, -(1 << 31), 1 << 31, -(1 << 70), 0.1, -2.5e-300, float("inf")),
    "text": ["", "kéy", "a\nb"],
    "empty": [{}, [], ()],
    "nested": {"a": {"b": [({"c": 1},)]}, 3: "number as key"},
    "ordered": collections.OrderedDict(b=1, a=2),
}


@pytest.mark.parametrize("large", [torch_file.LARGE, 100], ids=["sizes of 32 bits", "sizes of 64 bits"])
def test_written_files_are_read_by_torch(tmp_path, monkeypatch, large):
    torch = pytest.importorskip("torch", reason=NEEDS)
    monkeypatch.setattr(torch_file, "LARGE", large)
    rng = np.random.default_rng(0)
    values = {np.dtype(t).name: rng.standard_normal((5, 7)).astype(t) for t in torch_file.STORAGES}
    values |= {"scalar": np.array(2.0, np.float32), "nothing": np.zeros((0, 3), np.float32)}
    values |= {"transposed": values["float32"].T, "cube": rng.standard_normal((2, 3, 4))}
    path = tmp_path / "file.pth"
    write_torch(path, {"model": collections.OrderedDict(values), **PLAIN})

    for weights_only in (True, False):
        tree = torch.load(path, weights_only=weights_only)
        model = tree.pop("model")
        # 1 is no True, a list no tuple, the order kept
        assert tree == PLAIN and repr(tree) == repr(PLAIN)
        assert type(model) is collections.OrderedDict and list(model) == list(values)
        for name, value in values.items():
            there = model[name].float() if name == "bfloat16" else model[name]
            assert there.is_contiguous() and tuple(there.shape) == value.shape
            np.testing.assert_array_equal(
                there.numpy(), value.astype(np.float32) if name == "bfloat16" else value
            )
    mapped = torch.load(path, weights_only=True, mmap=True)["model"]["float32"]
    np.testing.assert_array_equal(mapped.numpy(), values["float32"])

    assert_reads(path, values)
    file = TorchFile(path)
    assert {key: file.tree[key] for key in PLAIN} == PLAIN
    with open(path, "rb") as raw, zipfile.ZipFile(path) as records:
        assert records.testzip() is None
        for info in records.infolist():
            raw.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))
            assert start % 64 == 0 and info.compress_type == zipfile.ZIP_STORED


def test_one_tensor_in_two_places_is_written_once(tmp_path):
    """Also through a reader: what torch stored once stays one storage, and views of one stay apart."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    base = torch.arange(12.0).reshape(3, 4)
    torch.save(
        {"model": {"a": base, "b": base, "c": base.T, "d": base.clone()}}, tmp_path / "theirs.pth"
    )
    file = TorchFile(tmp_path / "theirs.pth")
    write_torch(tmp_path / "ours.pth", file.to_write(file.tree))
    there = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    assert there["a"].data_ptr() == there["b"].data_ptr() != there["d"].data_ptr()
    for name, value in {"a": base, "b": base, "c": base.T, "d": base}.items():
        assert torch.equal(there[name], value)


def test_numbers_are_made_one_at_a_time_and_the_file_is_a_function_of_them(tmp_path):
    alive = []

    def make(i):
        alive.append(i)
        return np.full((2, 3), i, np.float32)

    tree = {
        "model": {
            str(i): Later(Stored((2, 3), np.dtype(np.float32)), lambda i=i: make(i)) for i in range(3)
        }
    }
    for name in ("a.pth", "b.pth"):
        write_torch(tmp_path / name, tree)
    assert (
        alive == [0, 1, 2] * 2 and (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    )
    with pytest.raises(TypeError, match="not <class 'set'>"):
        write_torch(tmp_path / "c.pth", {"x": {1}})
