"""Weight files: read by slices, nothing executed, written whole or not at all, every mistake a sentence."""

import collections
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from unimed_jax.config import UserError
from unimed_jax.interop.files import TorchFile, new_file, new_folder, open_weights, write_safetensors
from unimed_jax.interop.table import Stored

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
rng = np.random.default_rng(0)


def tensors(dtypes=DTYPES):
    out = {f"a.{np.dtype(t).name}": rng.standard_normal((5, 6)).astype(t) for t in dtypes}
    return out | {"vector": np.arange(4, dtype=np.float32), "scalar": np.array(3.0, np.float32)}


def assert_reads(path, expected):
    file = open_weights(path)
    assert {name: Stored(x.shape, x.dtype) for name, x in expected.items()} == dict(file.stored)
    for name, value in expected.items():
        whole = file.read(name)
        assert whole.dtype == value.dtype and whole.flags.writeable
        np.testing.assert_array_equal(whole, value)
    for name in (name for name, value in expected.items() if value.ndim == 2):
        for index in ((slice(1, 3), slice(2, 5)), (slice(None), slice(0, 1)), (slice(4, 5), slice(None))):
            np.testing.assert_array_equal(file.read(name, index), expected[name][index])


def write(folder, values, **options):
    write_safetensors(folder, {k: Stored(v.shape, v.dtype) for k, v in values.items()}, values.items(), **options)


# ---------------------------------------------------------------------------------------------
# Safetensors
# ---------------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    assert_reads(tmp_path / "model.safetensors", {**read_back(tmp_path / "model.safetensors")})
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
    assert {name: index["weight_map"][name] for file in files for name in read_back(file)} == index["weight_map"]
    assert_reads(tmp_path, values)
    assert_reads(tmp_path / "model.safetensors.index.json", values)


def refused(path, match):
    """The file is refused with one sentence that names it."""
    with pytest.raises(UserError, match=match) as error:
        file = open_weights(path)
        for name in file.stored:
            file.read(name)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


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
    refused(tmp_path / "model.onnx", "no weight file that is read here")
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
        refused(tmp_path, "which is not beside it")
    with_map(renamed=good["weight_map"]["vector"])
    refused(tmp_path, "renamed .in model-0000")
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        refused(tmp_path, "no index of weight files")


# ---------------------------------------------------------------------------------------------
# torch's files
# ---------------------------------------------------------------------------------------------


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
    expected = {k: (v.detach().float() if k == "bfloat" else v.detach()).numpy() for k, v in state.items()}
    expected["bfloat"] = expected["bfloat"].astype(ml_dtypes.bfloat16)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_reads(tmp_path, expected)
    for key in ("model", "state_dict", "module"):
        torch.save({key: state, "epoch": 3, "args": {"lr": 0.1, "betas": (0.9, None)}}, tmp_path / f"{key}.pth")
        assert_reads(tmp_path / f"{key}.pth", expected)
    tree = TorchFile(tmp_path / "model.pth").tree
    assert tree["epoch"] == 3 and tree["args"] == {"lr": 0.1, "betas": (0.9, None)}


def test_torch_shards(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS)
    values = {"a": np.ones((5, 6), np.float32), "b": np.zeros((2, 3), np.float32)}
    for i, (name, value) in enumerate(values.items()):
        torch.save({name: torch.tensor(value)}, tmp_path / f"pytorch_model-{i}.bin")
    weight_map = {"a": "pytorch_model-0.bin", "b": "pytorch_model-1.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_reads(tmp_path, values)


def archive(path, pickled: bytes, records=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", pickled)
        for name, data in records:
            out.writestr(f"archive/data/{name}", data)


class Touch:
    """Pickles as a call, as a malicious file does."""

    def __init__(self, call, *args):
        self.call = (call, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["alone", "beside tensors"])
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
    pickle.loads(pickle.dumps(bomb))  # it is no dud
    assert made.exists() == (call != "getattr")
    if made.exists():
        made.rmdir() if made.is_dir() else made.unlink()
    tree = bomb if where == "alone" else {"model": {"a": 1}, "config": bomb}
    for protocol in (0, 2, 5):
        path = tmp_path / "file.pth"
        archive(path, pickle.dumps(tree, protocol))
        refused(path, "holds code or objects beside tensors .*nothing of it was run")
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
    archive(torch_file, tensor_pickle(4, 0, (4,), (1,)), [("0", np.arange(4, dtype=np.float32).tobytes())])
    np.testing.assert_array_equal(open_weights(torch_file).read("a"), [0, 1, 2, 3])


def tensor_pickle(size, offset, shape, strides, key="0") -> bytes:
    """{"a": tensor}, as torch.save pickles it."""
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


@pytest.mark.parametrize(
    "size, offset, shape, strides, match",
    [
        (4, 1, (4,), (1,), "past its storage"),
        (4, 0, (2, 2), (4, 1), "past its storage"),
        (4, -1, (2,), (1,), "else than numbers"),
        (4, 0, (2,), (-1,), "else than numbers"),
        (4, 0, (2, 2), (1,), "a stride too few"),
        (5, 0, (5,), (1,), "lacks numbers"),
    ],
)
def test_tensors_outside_their_numbers(tmp_path, size, offset, shape, strides, match):
    path = tmp_path / "file.pth"
    archive(path, tensor_pickle(size, offset, shape, strides), [("0", np.arange(4, dtype=np.float32).tobytes())])
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
    refused(path, "none of tensors")


def test_old_torch_format(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS)
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    refused(path, "before version 1.6")


def test_reference_checkpoint():
    """The original's file, optimizer state included, without torch: equal to what torch reads."""
    path = Path(__file__).parent / "goldens/uni_med/open/ref_format_checkpoint_0.pth"
    file = TorchFile(path)
    assert file.tree["epoch"] == 0 and file.tree["config"]["model"]["lora_r"] == 2
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
# Whole or not at all
# ---------------------------------------------------------------------------------------------


def test_new_folder_is_there_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="stop"), new_folder(out) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError("stop")
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
    with pytest.raises(UserError, match="could not be written .No space"), new_file(path) as file:
        file.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with new_file(path) as file:
        file.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_wrong_tensor_leaves_no_folder(tmp_path):
    value = np.ones(3, np.float32)
    with pytest.raises(AssertionError, match="a"), new_folder(tmp_path / "out") as folder:
        write_safetensors(folder, {"a": Stored((4,), value.dtype)}, [("a", value)])
    assert not list(tmp_path.iterdir()) and Path(tmp_path).is_dir()
