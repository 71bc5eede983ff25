"""The built program: what it imports, and that its shapes are those of real weights and batches."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from unimed_jax.config import MeshConfig
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters
from unimed_jax.plan.program_cost import program_cost
from unimed_jax.train.program import build
from unimed_jax.train.step import first_state

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS = 8

HEAVY = (
    "grain",
    "ml_collections",
    "tensorflow_datasets",
    "transformers",
    "tokenizers",
    "PIL",
    "matplotlib",
    "orbax",
)


@pytest.mark.parametrize("module", ["grain", None])
def test_the_program_and_the_model_import_no_data_libraries(module):
    """A machine with an accelerator has jax and flax, seldom more.

    `module`: the check itself must see one.
    """
    code = f"""
import importlib, pkgutil, sys
import unimed_jax.model, unimed_jax.train.program
for found in pkgutil.iter_modules(unimed_jax.model.__path__, "unimed_jax.model."):
    importlib.import_module(found.name)
if {module!r}:
    importlib.import_module({module!r})
print(*sorted({{name.split(".")[0] for name in sys.modules}} & set({HEAVY!r})))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) >= {module} if module else out.stdout.split() == []


def described(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_shapes_are_those_of_weights_and_batches_and_compile_ahead_of_time():
    config = tiny.training(rows=ROWS)
    program = build(config, None)
    batch = tiny.mixed_batch(np.random.default_rng(0), ROWS)
    leaves = parameters(tiny.model(config.model))
    assert list(leaves) == list(program.leaves)
    state = first_state(
        {path: jnp.array(leaves[path]) for path in program.state.leaves}, program.optimizer
    )
    frozen = {path: leaves[path] for path in program.frozen}
    given = (state, frozen, batch)
    assert described(given) == described((program.state, program.frozen, program.batch))
    ahead = program.lower().compile()
    expected = jax.device_get(
        program.step(jax.tree.map(jnp.array, state), frozen, batch, np.float32(1e-3))
    )
    found = jax.device_get(ahead(state, frozen, batch, np.float32(1e-3)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_on_a_mesh_every_shape_says_where_it_lies():
    """As `first_state` and `on_devices` put the arrays: the compiled program takes them as they are."""
    config = tiny.training(rows=ROWS)
    mesh = sharding.make_mesh(MeshConfig(auto=False, data=2, fsdp=2, tensor=2), ROWS)
    program = build(config, mesh)
    leaves = parameters(tiny.model(config.model))
    leaves = jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh))
    with sharding.inside(mesh):
        state = first_state(
            {path: leaves[path] for path in program.state.leaves}, program.optimizer, mesh
        )
        batch = sharding.on_devices(tiny.mixed_batch(np.random.default_rng(0), ROWS), mesh)
    real = (state, {path: leaves[path] for path in program.frozen}, batch)
    same = jax.tree.map(
        lambda x, shape: (
            (x.shape, x.dtype) == (shape.shape, shape.dtype)
            and x.sharding.is_equivalent_to(shape.sharding, x.ndim)
        ),
        real,
        (program.state, program.frozen, program.batch),
    )
    assert all(jax.tree.leaves(same)), same
    _, metrics = program.lower().compile()(*real, jnp.float32(1e-3))
    assert np.isfinite(metrics["loss"])


def test_micro_batches_leave_rows_on_their_devices():
    """Each device works on its own rows in every micro-batch, so that no activation is sent."""
    config = tiny.training(rows=32, accumulation=4)
    mesh = sharding.make_mesh(MeshConfig(auto=False, data=8), 32)
    cost = program_cost(build(config, mesh).lower().compile().as_text(), dict(mesh.shape))
    assert {c.kind for c in cost.collectives}.isdisjoint({"collective-permute", "all-to-all"})


def test_leaves_that_do_not_train_are_stored_small_except_the_routers_of_experts():
    model = tiny.config(decoder={"depth": 2}, moe={"experts": 2}, lora={"targets": ("q",)})
    program = build(tiny.training(dataclasses.replace(model, frozen_dtype="bfloat16")), None)
    exact = {path for path, leaf in program.frozen.items() if leaf.dtype == jnp.float32}
    assert exact == {path for path in program.frozen if "/moe/router/" in path} != set()
    assert all(leaf.dtype == jnp.float32 for leaf in program.state.leaves.values())
