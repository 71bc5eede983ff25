"""Tables of published weights: layouts, all mistakes at once, slices into sharded arrays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support import tiny
from support.unimed_frozen import frozen_table

from unimed_jax.config import MeshConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.families import unimed_names
from unimed_jax.interop.tensors import load
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import (
    LAYOUTS,
    Arrays,
    Entry,
    Stored,
    Table,
    Tensors,
    check,
    each_published,
    folded,
    is_finite,
    published_shapes,
    read_region,
    to_leaves,
    to_published,
)
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.model.sharding import make_mesh, parameter_shardings

rng = np.random.default_rng(0)


def numbers(*shape):
    return rng.standard_normal(shape).astype(np.float32)


# Our leaf's shape, the index of the block in it, the block as published, how many heads.
CASES = {
    "same": ((5, 6), (), (5, 6), 0),
    "transpose": ((5, 6), (), (6, 5), 0),
    "row": ((4, 7), (2,), (1, 1, 7), 0),
    "batch": ((5, 6), (), (1, 5, 6), 0),
    "patch": ((12, 5), (), (5, 3, 2, 2), 0),
    "pairs": ((3, 5, 12), (1,), (12, 5), 2),
}


def table_of(layout):
    leaf, index, _, heads = CASES[layout]
    entries = [Entry("x", "p", index, layout, heads=heads)]
    if index:  # the leaf's other parts
        entries += [
            Entry(f"y{i}", "p", (i,), layout, heads=heads) for i in range(leaf[0]) if (i,) != index
        ]
    return Table(tuple(entries))


def test_every_layout_has_a_case():
    assert CASES.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", CASES)
def test_layout_round_trip(layout):
    leaf, index, shape, _ = CASES[layout]
    table, value = table_of(layout), numbers(*leaf)
    there = to_published(table, {"p": value})
    assert there["x"].shape == shape and there["x"].flags.c_contiguous
    assert {name: Stored(x.shape, x.dtype) for name, x in there.items()} == published_shapes(
        table, {"p": value}
    )
    np.testing.assert_array_equal(np.sort(there["x"], axis=None), np.sort(value[index], axis=None))
    back = to_leaves(table, there, {"p": value})
    assert (back["p"] == value).all() and back["p"].dtype == np.float32
    on_device = dict(each_published(table, {"p": jnp.asarray(value)}))
    assert all((on_device[name] == x).all() for name, x in there.items())


@pytest.mark.parametrize("layout", CASES)
def test_layout_by_slices(layout):
    """Any region of a leaf is what the whole leaf holds there."""
    leaf, *_ = CASES[layout]
    table, value = table_of(layout), numbers(*leaf)
    tensors = Arrays(to_published(table, {"p": value}))
    for _ in range(30):
        ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in leaf]
        region = tuple(slice(int(a), int(b)) for a, b in ends)
        np.testing.assert_array_equal(read_region(table, tensors, "p", leaf, region), value[region])


def test_pairs_by_definition():
    """Published rows 2 j and 2 j + 1 of a head are its channels j and d / 2 + j."""
    tensor, heads, d = numbers(12, 5), 2, 6
    ours = LAYOUTS["pairs"].to_ours(tensor, heads)
    for h in range(heads):
        for j in range(d // 2):
            np.testing.assert_array_equal(ours[:, h * d + j], tensor[h * d + 2 * j])
            np.testing.assert_array_equal(ours[:, h * d + d // 2 + j], tensor[h * d + 2 * j + 1])


def test_columns_of_one_tensor_in_two_leaves():
    table = Table(
        (
            Entry("w", "a", layout="transpose", columns=(0, 3)),
            Entry("w", "b", layout="transpose", columns=(3, 8)),
        )
    )
    leaves = {"a": numbers(3, 4), "b": numbers(5, 4)}
    there = to_published(table, leaves)
    np.testing.assert_array_equal(there["w"], np.concatenate([leaves["a"], leaves["b"]]).T)
    back = to_leaves(table, there, leaves)
    assert all((back[path] == leaves[path]).all() for path in leaves)
    assert (
        read_region(table, Arrays(there), "b", (5, 4), (slice(1, 3), slice(2, 4)))
        == leaves["b"][1:3, 2:4]
    ).all()
    with pytest.raises(UserError, match=r"w is of shape \[4, 7\] in place of \[4, 8\]"):
        to_leaves(table, {"w": there["w"][:, :7]}, leaves)


def test_every_mistake_at_once():
    """Missing, unexpected, mis-shaped (transposed) and quantised tensors in one sentence.

    What is ignored is not.
    """
    table = Table(
        tuple(Entry(f"layers.{i}.w", "w", (i,), "transpose") for i in range(6))
        + (Entry("b", "b"), Entry("c", "c")),
        ignored=("*.inv_freq",),
    )
    leaves = {
        "w": np.zeros((6, 2, 3), np.float32),
        "b": np.zeros(4, np.float32),
        "c": np.zeros(2, np.float32),
    }
    tensors = {f"layers.{i}.w": numbers(3, 2) for i in (1, 3)} | {"layers.5.w": numbers(2, 3)}
    tensors |= {"layers.0.inv_freq": numbers(2), "layers.9.w": numbers(3, 2), "extra": numbers(1)}
    tensors |= {"b": np.zeros(4, np.int8)}
    with pytest.raises(UserError) as error:
        check(table, Arrays(tensors, origin="FILE"), leaves)
    text = str(error.value)
    for part in (
        "FILE does not fit the model",
        "layers.{0,2,4}.w, c are missing",
        "layers.9.w, extra are not known to this model",
        "layers.5.w is of shape [2, 3] in place of [3, 2]",
        "b is stored as int8",
    ):
        assert part in text, text
    assert "inv_freq" not in text and text.count(". ") == 0
    good = {f"layers.{i}.w": numbers(3, 2) for i in range(6)} | {"b": numbers(4), "c": numbers(2)}
    check(table, Arrays(good), leaves)


def test_folded():
    assert folded(["a.0.b.7", "a.1.b.7", "a.3.b.7", "a.3.c", "x"]) == ["a.{0-1,3}.b.7", "a.3.c", "x"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_by_name(bad, dtype):
    table = Table((Entry("good", "a"), Entry("bad", "b")))
    leaves = {"a": numbers(3, 4).astype(dtype), "b": numbers(3, 4).astype(dtype)}
    assert is_finite(leaves["b"]) and is_finite(np.array([3e38, -3e38], ml_dtypes.bfloat16))
    leaves["b"][1, 2] = bad
    with pytest.raises(UserError, match="bad holds NaN or infinite numbers"):
        to_leaves(table, {"good": leaves["a"], "bad": leaves["b"]}, leaves)


def test_an_open_part_of_a_leaf_is_a_mistake_of_the_table():
    table = Table((Entry("x", "p", (0,)),))
    with pytest.raises(AssertionError, match="open"):
        to_leaves(table, {"x": numbers(3)}, {"p": np.zeros((2, 3), np.float32)})


# ---------------------------------------------------------------------------------------------
# Slices into sharded arrays
# ---------------------------------------------------------------------------------------------


class Spy(Tensors):
    """Counts the bytes that are read, but for the patch kernel, which is small and always read whole."""

    def __init__(self, inner):
        self.inner, self.origin, self.stored = inner, inner.origin, inner.stored
        self.sizes = []

    def read(self, name, index=()):
        out = self.inner.read(name, index)
        if "patch_embed.proj.weight" not in name:
            self.sizes.append(out.nbytes)
        return out


def whole_table(config):
    return unimed_names.trainable_table(config) + frozen_table(config)


def tiny_files():
    model = tiny.model()
    table = whole_table(tiny.CONFIG)
    leaves = {path: np.asarray(leaf) for path, leaf in parameters(model).items()}
    assert set(table.paths()) == set(leaves)  # every leaf crosses the border
    return table, leaves, Spy(Arrays(to_published(table, leaves)))


def bytes_once(leaves):
    return sum(leaf.nbytes for path, leaf in leaves.items() if path != "vision/patch/kernel")


@pytest.mark.parametrize("strip", [1, 500, 1 << 20])
def test_load_on_one_device(strip, monkeypatch):
    """Strips of one row, of some, and whole leaves give the same arrays.

    No read is larger than a strip or a row.
    """
    monkeypatch.setattr(load, "STRIP", strip)
    table, leaves, tensors = tiny_files()
    loaded = load_leaves(table, tensors, Destination(parameters(abstract(tiny.CONFIG))))
    assert loaded.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert isinstance(loaded[path], jax.Array) and len(loaded[path].devices()) == 1
        np.testing.assert_array_equal(np.asarray(loaded[path]), leaf, err_msg=path)
    rows = max(leaf[0].nbytes for leaf in leaves.values())
    assert max(tensors.sizes) <= max(strip, rows)
    # a last strip may overlap
    assert bytes_once(leaves) <= sum(tensors.sizes) <= 1.02 * bytes_once(leaves)


@pytest.mark.parametrize(
    "axes", [{"tensor": 4, "fsdp": 2}, {"expert": 2, "data": 2, "fsdp": 2}, {"data": 8}]
)
def test_load_on_a_mesh(axes, monkeypatch):
    """Each device holds its part, and nothing is read twice for the copies of a part."""
    monkeypatch.setattr(load, "STRIP", 700)
    table, leaves, tensors = tiny_files()
    mesh = make_mesh(MeshConfig(auto=False, **axes), 8)
    shardings = parameter_shardings(leaves, mesh)
    loaded = load_leaves(table, tensors, Destination(leaves, shardings))
    for path, leaf in leaves.items():
        assert loaded[path].sharding.is_equivalent_to(shardings[path], leaf.ndim)
        for shard in loaded[path].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), leaf[shard.index], err_msg=path)
    if axes != {"data": 8}:
        assert any(not s.is_fully_replicated for s in shardings.values())
    # a last strip may overlap
    assert bytes_once(leaves) <= sum(tensors.sizes) <= 1.02 * bytes_once(leaves)


def test_load_takes_dtypes_by_path():
    table, leaves, tensors = tiny_files()
    path = "decoder/layers/mlp/up/kernel"
    shapes = {p: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for p, leaf in leaves.items()}
    loaded = load_leaves(table, tensors, Destination(shapes, dtypes={path: jnp.float32}))
    assert {p for p, leaf in loaded.items() if leaf.dtype == jnp.float32} == {path}
    other = "decoder/layers/mlp/down/kernel"
    np.testing.assert_array_equal(np.asarray(loaded[other]), leaves[other].astype(ml_dtypes.bfloat16))


def test_load_reads_nothing_when_something_does_not_fit():
    table, leaves, tensors = tiny_files()
    wrong = dict(leaves) | {"decoder/embedding": np.zeros((7, 16), np.float32)}
    with pytest.raises(
        UserError, match=r"embed_tokens.weight is of shape \[120, 16\] in place of \[7, 16\]"
    ):
        load_leaves(table, tensors, Destination(wrong))
    assert tensors.sizes == []


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_host_memory(devices, tmp_path):
    """The benchmark at a size for tests: neither the file's pages nor copies pile up beside the
    arrays.
    """
    root = Path(__file__).parents[2]
    words = [sys.executable, root / "benchmarks/load_memory.py", "--gb=0.6", f"--devices={devices}"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [*words, f"--folder={tmp_path}"], env=environment, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["arrays_gb"] > 0.6 and result["beyond_gb"] < 0.35, result
