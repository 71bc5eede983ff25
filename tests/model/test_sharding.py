"""One device against a mesh of eight: values, gradients, whole training steps; where arrays lie."""

import dataclasses
import fnmatch
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import tiny

from unimed_jax.config import (
    Config,
    LossConfig,
    MeshConfig,
    MoeConfig,
    OptimizerConfig,
    TrainConfig,
    to_dict,
)
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.plan.program_cost import program_cost
from unimed_jax.rules import leaf_rules
from unimed_jax.settings import from_config_dict
from unimed_jax.train.loss import loss_sums
from unimed_jax.train.optimizer import Optimizer
from unimed_jax.train.step import TrainState, first_state, make_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Widths that eight chips divide, and five experts, which no axis divides.
MODEL = tiny.config(
    vision={"depth": 1, "width": 16, "heads": 4, "mlp_width": 32},
    connector={"experts": 5, "hidden": 8, "router_hidden": 16},
    decoder={"depth": 2, "width": 16, "mlp_width": 32},
)
# What other families' decoders have besides or instead, as far as it goes together.
OTHER = tiny.config(
    vision={"depth": 1, "width": 16, "heads": 4, "mlp_width": 32},
    connector={"experts": 5, "hidden": 8, "router_hidden": 16},
    decoder={
        **{
            "depth": 2,
            "width": 16,
            "mlp_width": 32,
            "gated_mlp": False,
            "mlp_bias": True,
            "tied_head": True,
        },
        **{
            "head_bias": True,
            "norm": "rms_zero",
            "post_norms": True,
            "qk_norm": True,
            "scaled_embedding": True,
        },
        **{"attention_bias": ("q", "k", "v", "o"), "windows": (8, 0), "local_rope_theta": 100.0},
    },
    lora={"targets": ("q", "k", "v", "o", "up", "down")},
)
# Experts of the decoder, which the axis of two does not divide, and biases.
EXPERTS = dataclasses.replace(
    MODEL,
    decoder=dataclasses.replace(MODEL.decoder, gated_mlp=True, mlp_bias=True),
    moe=MoeConfig(experts=3, top_k=2, aux_coef=0.1),
    lora=dataclasses.replace(MODEL.lora, targets=("q", "k", "v", "o")),
)
ROWS = 8
MESHES = (
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"expert": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "expert": 2},
    {"data": 4, "expert": 2},
)


def mesh_of(**axes) -> jax.sharding.Mesh:
    mesh = sharding.make_mesh(MeshConfig(auto=False, **axes), ROWS)
    assert mesh is not None
    return mesh


def named(axes) -> str:
    return "-".join(f"{axis}{size}" for axis, size in axes.items())


@pytest.fixture(scope="module")
def batch():
    return tiny.mixed_batch(np.random.default_rng(0), ROWS)


def drawn(config):
    """A model whose gradients float32 computes to a few millionths.

    A norm after a layer divides by how large the layer's output is, rounding included, so kernels of
    OTHER are three times as large as elsewhere: 3e-6 in place of 2e-5.
    """
    model = tiny.model(config)
    if not config.decoder.post_norms:
        return model
    leaves = parameters(model)
    kernels = [path for path in leaves if fnmatch.fnmatchcase(path, "decoder/*/kernel")]
    larger = {path: 3 * leaves[path] for path in (*kernels, "decoder/embedding")}
    return with_parameters(model, larger)


def gradients(model, batch):
    def loss(leaves, batch):
        total, aux = loss_sums(with_parameters(model, leaves), batch, LossConfig(), None, None)
        return total / aux["weight"]

    return jax.jit(jax.value_and_grad(loss))(parameters(model), batch)


def gradients_by_row(model, batch):
    """Adds up the rows in float64, which is nearer to the truth than a sum over the batch in float32.

    Only for models whose rows do not depend on each other.
    """

    def loss(leaves, row):
        total, aux = loss_sums(with_parameters(model, leaves), row, LossConfig(), None, None)
        return total, aux["weight"]

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    rows = [{name: x[r : r + 1] for name, x in batch.items()} for r in range(ROWS)]
    parts = jax.device_get([run(parameters(model), row) for row in rows])
    weight = sum(float(weight) for (_, weight), _ in parts)

    def mean(*leaves):
        return sum(np.asarray(leaf, np.float64) for leaf in leaves) / weight

    return jax.tree.map(mean, *((total, grads) for (total, _), grads in parts))


@pytest.fixture(scope="module")
def alone(batch):
    @functools.cache
    def run(config):
        by_row = gradients if config.moe.experts else gradients_by_row
        loss, grads = by_row(drawn(config), batch)
        return float(loss), jax.device_get(grads)

    return run


@pytest.mark.parametrize(
    "config, axes",
    [*((MODEL, axes) for axes in MESHES), (OTHER, MESHES[4]), (EXPERTS, MESHES[5])],
    ids=[*map(named, MESHES), f"other-{named(MESHES[4])}", f"experts-{named(MESHES[5])}"],
)
def test_eight_devices_equal_one(config, axes, batch, alone):
    mesh = mesh_of(**axes)
    model, expected_loss, expected_gradients = drawn(config), *alone(config)
    leaves = parameters(model)
    leaves = jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh))
    with sharding.inside(mesh):
        loss, grads = gradients(with_parameters(model, leaves), sharding.on_devices(batch, mesh))
    assert abs(float(loss) - expected_loss) <= 1e-6 * abs(expected_loss)
    for path, expected in expected_gradients.items():
        scale = np.abs(expected).max()
        assert scale > 0, path
        np.testing.assert_allclose(grads[path], expected, rtol=0, atol=1e-5 * scale, err_msg=path)


def test_an_encoder_with_split_weights_gathers_them_and_shares_out_the_images():
    model, images = tiny.model(OTHER), jnp.zeros((ROWS, 16, 16, 3))

    def cost_on(mesh):
        leaves = {path: leaf for path, leaf in parameters(model).items() if path.startswith("vision/")}
        given, pixels = leaves, images
        if mesh is not None:
            given = jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh))
            pixels = jax.device_put(images, sharding.row_sharding(images.shape, mesh))
        run = jax.jit(lambda leaves, x: with_parameters(model, leaves).vision(x))
        with sharding.inside(mesh):
            text = run.lower(given, pixels).compile().as_text()
        return program_cost(text, {} if mesh is None else dict(mesh.shape))

    shared = cost_on(mesh_of(fsdp=8))
    assert shared.flops == cost_on(None).flops / 8
    assert {(c.kind, c.axes) for c in shared.collectives} == {("all-gather", ("fsdp",))}


def training(mesh, batches, rules=TrainConfig.rules):
    """-> losses, last leaves, compiles.

    Adam divides by the size of a gradient, so where one is almost 0 it would make whole steps of what
    rounding leaves, which differs between processors; the large epsilon keeps those small.
    """
    config = Config(
        model=MODEL,
        optimizer=OptimizerConfig(skip_unused=False, eps=1e-4),
        train=TrainConfig(rules=rules),
    )
    given = leaf_rules(parameters(abstract(MODEL)), config.train, config.optimizer)
    optimizer = Optimizer(config.optimizer, given)
    leaves = {path: jnp.array(leaf) for path, leaf in parameters(tiny.model(MODEL)).items()}
    if mesh is not None:
        leaves = jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh))
    trainable = {path: leaf for path, leaf in leaves.items() if given[path].train}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trainable}
    losses = []
    with sharding.inside(mesh):
        state = first_state(trainable, optimizer, mesh)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_step(abstract(MODEL), config, optimizer, None, mesh)
        for batch in batches:
            state, metrics = step(state, frozen, sharding.on_devices(batch, mesh), np.float32(1e-3))
            losses.append(float(metrics["loss"]))
        if mesh is not None:
            moved = jax.tree.map(
                lambda leaf, old: leaf.sharding.is_equivalent_to(old, leaf.ndim), state, before
            )
            assert all(jax.tree.leaves(moved))
    return losses, jax.device_get(state.leaves), step._cache_size()


def test_training_on_a_mesh_equals_one_device_and_compiles_once():
    batches = [tiny.mixed_batch(np.random.default_rng(seed), ROWS) for seed in range(3)]
    expected, leaves, _ = training(None, batches)
    losses, found, compiles = training(mesh_of(data=2, fsdp=2, tensor=2), batches)
    assert compiles == 1
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(
            found[path], leaf, rtol=0, atol=2e-5 * np.abs(leaf).max(), err_msg=path
        )


def test_where_parameters_and_moments_lie():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    leaves = parameters(abstract(MODEL))
    places = sharding.parameter_shardings(leaves, mesh)
    chips = ("data", "fsdp", "tensor")
    assert places["connector/experts/up"].spec == P(None, chips)
    assert places["connector/experts/down"].spec == P(chips, None)
    assert places["connector/router/task_kernel"].spec == P(None, chips)
    assert places["connector/router/out_kernel"].spec == P(chips, None)
    assert places["decoder/layers/attention/q/kernel"].spec == P(None, ("fsdp",), ("tensor",))
    assert places["decoder/layers/mlp/down/lora_a"].spec == P(None, ("tensor",), None)
    assert places["decoder/layers/norm1/scale"].spec == P(None, None)
    given = leaf_rules(leaves, TrainConfig(), OptimizerConfig())
    optimizer = Optimizer(OptimizerConfig(skip_unused=True), given)
    state = jax.eval_shape(
        lambda leaves: TrainState(jnp.int32(0), leaves, optimizer.init(leaves)), leaves
    )
    found = sharding.state_shardings(state, mesh)
    assert found.leaves == places and found.moments.mean == places
    assert found.moments.count["connector/experts/up"].spec == P() == found.step.spec


def test_only_matching_patterns_and_logical_names_stand_in_the_table():
    paths = {path for config in (MODEL, OTHER, EXPERTS) for path in parameters(abstract(config))}
    for pattern, names in sharding.PARAMETERS:
        assert any(fnmatch.fnmatchcase(path, pattern) for path in paths), pattern
        assert all(name is None or name in sharding.AXES for name in names)


def test_auto_spreads_rows_and_never_fails():
    assert dict(sharding.make_mesh(MeshConfig(), 8).shape) == {
        "data": 8,
        "fsdp": 1,
        "tensor": 1,
        "expert": 1,
    }
    assert dict(sharding.make_mesh(MeshConfig(), 12).shape) == {
        "data": 4,
        "fsdp": 1,
        "tensor": 2,
        "expert": 1,
    }
    assert dict(sharding.make_mesh(MeshConfig(), 15).shape) == {
        "data": 1,
        "fsdp": 1,
        "tensor": 8,
        "expert": 1,
    }


def test_what_does_not_fit_is_refused_in_a_sentence():
    with pytest.raises(UserError, match=r"config.mesh: .*data=3.* makes 6 devices, but there are 8"):
        sharding.make_mesh(MeshConfig(auto=False, data=3, tensor=2), 12)
    with pytest.raises(UserError, match=r"config.data.rows=12 cannot be shared by 8 devices"):
        sharding.make_mesh(MeshConfig(auto=False, data=8), 12)


def test_an_axis_that_does_not_divide_leaves_the_dimension_whole():
    sizes = {"data": 2, "fsdp": 2, "tensor": 4, "expert": 1}
    assert sharding.spec((6, 10), ("embed", "heads"), sizes) == P(("fsdp",), None)
    assert sharding.spec((20,), ("expert_hidden",), sizes) == P(("data", "fsdp"))


def test_one_device_has_no_mesh(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [object()])
    assert sharding.make_mesh(MeshConfig(), 15) is None
    assert sharding.share_of_process(None, 3) == ((0, 1, 2), 3)


def test_a_process_reads_the_rows_of_its_devices_wherever_they_lie(monkeypatch):
    """Chips of a TPU slice are ordered along a ring, of which a host has several pieces."""
    mesh = sharding.make_mesh(MeshConfig(auto=False, data=8), 16)
    assert sharding.share_of_process(mesh, 16) == (tuple(range(16)), 16)
    pieces = {0: slice(0, 2), 1: slice(6, 8), 2: slice(14, 16)}
    of_host = {device: (piece,) for device, piece in pieces.items()}
    cut = {}

    def made(shape, sharding, piece):
        cut.update({device: piece((own, slice(None))) for device, own in pieces.items()})
        return shape

    with monkeypatch.context() as patch:
        here = SimpleNamespace(addressable_devices_indices_map=lambda shape: of_host)
        patch.setattr(sharding, "row_sharding", lambda shape, mesh: here)
        patch.setattr(jax, "make_array_from_callback", made)
        share = sharding.share_of_process(mesh, 16)
        assert share == ((0, 1, 6, 7, 14, 15), 16)
        rows = np.array(share.rows)[:, None] * np.ones((1, 3))
        assert sharding.on_devices({"x": rows}, mesh, share) == {"x": (16, 3)}
    assert {device: part[:, 0].tolist() for device, part in cut.items()} == {
        **{0: [0, 1], 1: [6, 7], 2: [14, 15]}
    }


def test_sizes_that_divide_a_row_of_chips_are_laid_out_all_the_same(monkeypatch):
    """jax.make_mesh refuses them on most TPUs, where chips of one axis need not be neighbours."""

    def refuses(*shape, **words):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 2")

    expected = sharding.make_mesh(MeshConfig(auto=False, data=4, fsdp=2), 16)
    monkeypatch.setattr(jax, "make_mesh", refuses)
    mesh = sharding.make_mesh(MeshConfig(auto=False, data=4, fsdp=2), 16)
    assert mesh == expected
    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", refuses)
    with pytest.raises(UserError, match=r"config.mesh: data=4 x fsdp=2 cannot be laid over these 8"):
        sharding.make_mesh(MeshConfig(auto=False, data=4, fsdp=2), 16)


def test_config_mesh_needs_positive_sizes():
    with pytest.raises(UserError, match="config.mesh.data"):
        from_config_dict(to_dict(dataclasses.replace(Config(), mesh=MeshConfig(data=0))))
