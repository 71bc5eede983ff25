"""The cost of compiled programs whose operations, bytes and messages are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unimed_jax.model.grouped import block_product
from unimed_jax.plan.collectives import replica_groups
from unimed_jax.plan.program_cost import Collective, program_cost

F32 = jnp.float32


def shaped(*shape, dtype=F32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def cost(run, *arguments, mesh=None, **keywords):
    text = jax.jit(run, **keywords).lower(*arguments).compile().as_text()
    return program_cost(text, dict(mesh.shape) if mesh is not None else None)


def test_matmul():
    found = cost(jnp.matmul, shaped(32, 64), shaped(64, 16))
    assert found.flops == 2 * 32 * 64 * 16
    assert found.bytes == 4 * (32 * 64 + 64 * 16 + 32 * 16)
    assert found.collectives == () and found.unknown_loops == () and found.unknown_calls == ()
    (largest,) = [o for o in found.largest if o.flops]
    assert largest.name.endswith("dot_general") and largest.count == 1


@pytest.mark.parametrize("mask", ["", "s32[16,256,256]", "s32[8,256,512]"])
def test_splash_counts_no_blocks_of_later_tokens(mask):
    """Of 1,024 tokens, in 4 x 4 or 4 x 2 blocks; without a mask a token sees all others."""
    names = "%q, %k" + (", %mask" if mask else "")
    kernel = f'custom-call({names}), custom_call_target="tpu_custom_call"'
    text = f"""HloModule splash
ENTRY %main {{
  %q = bf16[2,1024,64]{{2,1,0}} parameter(0)
  %k = bf16[2,1024,64]{{2,1,0}} parameter(1)
  %mask = {mask or "s32[1]"}{{0}} parameter(2)
  ROOT %splash_mha_fwd.1 = bf16[2,1024,64]{{2,1,0}} {kernel}
}}
"""
    share = {"": 1, "s32[16,256,256]": 10 / 16, "s32[8,256,512]": 6 / 8}[mask]
    assert program_cost(text).flops == 2 * 2 * 2 * 1024 * 1024 * 64 * share


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_loops_are_multiplied_out_and_stacked_layers_read_once():
    depth, rows, width = 12, 4, 128
    found = cost(scanned, shaped(rows, width), shaped(depth, width, width))
    assert found.flops == depth * 2 * rows * width * width
    weights, state = 4 * depth * width * width, 4 * rows * width
    # the whole stack, read by every layer, would be `depth` times as much; on CPU a layer may be
    # copied out of it (read, written, read)
    assert weights <= found.bytes <= 3 * weights + 10 * depth * state

    def nested(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: scanned(x, w), x)

    twice = cost(nested, shaped(rows, width), shaped(depth, width, width))
    assert twice.flops == 5 * found.flops
    assert twice.by("flops")[0].count == 5 * depth


def test_gradients_and_what_is_computed_again():
    depth, rows, width = 6, 8, 64
    weights = shaped(depth, width, width)

    def loss(body, x, w):
        return jax.lax.scan(body, x, w)[0].sum()

    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w), None

    forward = depth * 2 * 2 * rows * width * width
    plain = cost(jax.grad(lambda x, w: loss(layer, x, w), argnums=1), shaped(rows, width), weights)
    # the gradient of the first layer's input is computed too: the loop is the same for all layers
    assert plain.flops == 3 * forward
    again = jax.checkpoint(layer, prevent_cse=False)
    found = cost(jax.grad(lambda x, w: loss(again, x, w), argnums=1), shaped(rows, width), weights)
    assert forward < found.flops - plain.flops + forward / 2 <= 1.5 * forward
    assert sum(o.flops for o in found.operations if "rematted_computation" in o.name) > 0


def test_a_loop_that_ends_when_the_data_say_so_counts_once_and_is_named():
    def run(x, w, until):
        def step(state):
            number, x = state
            return number + 1, jnp.tanh(x @ w)

        return jax.lax.while_loop(lambda state: state[0] < until, step, (0, x))[1]

    found = cost(run, shaped(4, 32), shaped(32, 32), shaped(dtype=jnp.int32))
    assert found.flops == 2 * 4 * 32 * 32
    assert len(found.unknown_loops) == 1 and "while" in found.unknown_loops[0]
    # a bound that is computed, but from constants, is known
    assert cost(lambda x, w: run(x, w, 3 + 4), shaped(4, 32), shaped(32, 32)).flops == 7 * found.flops


def test_the_larger_branch_counts():
    def run(x, w, which):
        return jax.lax.switch(which, [lambda: x, lambda: x @ w, lambda: x @ w @ w @ w], *())

    assert cost(run, shaped(4, 32), shaped(32, 32), shaped(dtype=jnp.int32)).flops == 3 * 2 * 4 * 32 * 32


def test_convolution_without_what_meets_padding():
    def run(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    found = cost(run, shaped(2, 8, 8, 3), shaped(3, 3, 3, 5))
    taps = 3 * 8 - 2  # of the 24 taps of a row, two meet the padding
    assert found.flops == 2 * taps**2 * 2 * 3 * 5


def test_gather_reads_the_rows_that_it_fetches():
    table, ids = shaped(10_000, 64), shaped(7, dtype=jnp.int32)
    found = cost(lambda table, ids: table[ids] * 2, table, ids)
    assert 2 * 7 * 64 * 4 <= found.bytes < 10 * 7 * 64 * 4


def test_update_in_place_writes_the_part():
    stack = shaped(100, 50, 20)
    found = cost(
        lambda stack, x, at: jax.lax.dynamic_update_slice(stack, x[None] + 1, (at, 0, 0)),
        stack,
        shaped(50, 20),
        shaped(dtype=jnp.int32),
        donate_argnums=0,
    )
    assert found.bytes <= 4 * 50 * 20 * 4 + 16


def test_an_update_whose_result_has_another_type_writes_the_whole_array():
    found = cost(
        lambda stack, x, at: jax.lax.dynamic_update_slice(stack, x, (at, 0)).astype(jnp.bfloat16),
        shaped(400, 100),
        shaped(1, 100),
        shaped(dtype=jnp.int32),
    )
    assert found.bytes == pytest.approx((4 + 2) * 400 * 100, rel=0.02)


# --------------------------------------------------------------------------------------------------
# Collectives
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def lowered_on(mesh, out, run, *arguments):
    """`arguments`: (shape, axes of each dimension)."""

    def place(axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    return cost(
        run,
        *(shaped(*shape, sharding=place(axes)) for shape, axes in arguments),
        out_shardings=place(out),
        mesh=mesh,
    )


@pytest.mark.parametrize(
    "out, arguments, collectives",
    [
        # weights split over b are gathered: 3 of 4 parts of 64 x 32 come by
        ((("a", "b"),), [((64, 64), (("a", "b"),)), ((64, 32), ("b",))], [("all-gather", "b", 3)]),
        # both contracted dimensions split over a: partial sums of 64 x 32
        ((None,), [((64, 64), (None, "a")), ((64, 32), ("a",))], [("all-reduce", "a", 2 * 4 / 2)]),
    ],
)
def test_collectives_of_a_sharded_matmul(mesh, out, arguments, collectives):
    found = lowered_on(mesh, out, jnp.matmul, *arguments)
    shard = 4 * 64 * 32 / 4
    expected = [Collective(kind, tuple(axes), n * shard, 1) for kind, axes, n in collectives]
    assert list(found.collectives) == expected
    assert found.collective_bytes == sum(c.bytes for c in expected)


def test_each_kind_of_collective_and_its_axes(mesh):
    spec = PartitionSpec

    def run(x):  # [8, 16] of each device's own
        x = jax.lax.psum_scatter(x, "b", scatter_dimension=0, tiled=True)  # [2, 16]
        x = jax.lax.all_to_all(x, "a", split_axis=1, concat_axis=0, tiled=True)  # [4, 8]
        x = jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])
        x = jax.lax.all_gather(x, ("a", "b"), axis=0, tiled=True)  # [32, 8]
        return jax.lax.psum(x, ("a", "b"))

    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec(), out_specs=spec(), check_vma=False)
    found = cost(mapped, shaped(8, 16), mesh=mesh)
    by_kind = {c.kind: c for c in found.collectives}
    assert by_kind == {
        "reduce-scatter": Collective("reduce-scatter", ("b",), 3 / 4 * 4 * 8 * 16, 1),
        "all-to-all": Collective("all-to-all", ("a",), 1 / 2 * 4 * 2 * 16, 1),
        "collective-permute": Collective("collective-permute", ("b",), 4 * 4 * 8, 1),
        "all-gather": Collective("all-gather", ("a", "b"), 7 * 4 * 4 * 8, 1),
        "all-reduce": Collective("all-reduce", ("a", "b"), 2 * 7 / 8 * 4 * 32 * 8, 1),
    }


def test_collectives_in_a_loop_count_as_often_as_they_run(mesh):
    found = lowered_on(
        mesh,
        (("a", "b"),),
        scanned,
        ((64, 32), (("a", "b"),)),
        ((5, 32, 32), (None, "b")),
    )
    assert found.flops == 5 * 2 * (64 / 8) * 32 * 32
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert sum(c.bytes for c in gathers) == 5 * 3 * 4 * 8 * 32


@pytest.mark.parametrize(
    "written, groups",
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", []),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=2,'y'=4] {'x','y'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "mesh['x'=2,'y'=1,'z'=2], device_ids=([2,2]T(1,0)) {'x'}",
            [[0, 1], [2, 3]],
        ),
    ],
)
def test_groups_of_devices_in_all_forms(written, groups):
    assert (
        replica_groups(f", channel_id=1, replica_groups={written}, use_global_device_ids=true") == groups
    )


# --------------------------------------------------------------------------------------------------
# Other programs
# --------------------------------------------------------------------------------------------------


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        program_cost("HloModule nothing\n")


def test_loops_whose_length_is_decided_while_they_run():
    """Such a loop counts once and is named, or as often as its own name says that it may run."""

    def run(x, times, scope, act):
        with jax.named_scope(scope):
            return jax.lax.fori_loop(0, times, lambda _, x: act(x @ x), x)

    # Other functions, since compilations are kept by what they compute, whatever its names.
    arguments, each = (shaped(32, 32), shaped(dtype=jnp.int32)), 2 * 32**3
    unknown = cost(run, *arguments, "often", jnp.tanh, static_argnums=(2, 3))
    assert unknown.flops == each and len(unknown.unknown_loops) == 1
    known = cost(run, *arguments, "at_most_2.5_times", jnp.sin, static_argnums=(2, 3))
    assert known.flops == 2.5 * each and known.unknown_loops == ()


def test_grouped_products_count_all_blocks_that_there_may_be():
    """By experts as by blocks, whatever part of them the routing fills."""
    blocks, rows, width, hidden, experts = 6, 8, 16, 32, 4
    arguments = (
        shaped(blocks, rows, width),
        shaped(experts, width, hidden),
        shaped(blocks, dtype=jnp.int32),
        shaped(blocks, rows, hidden),  # a gradient that differs from block to block
    )

    def step(x, kernels, owners, weights, way):
        return jax.grad(lambda *a: (weights * block_product(*a, owners, way)).sum(), (0, 1))(x, kernels)

    for way in ("blocks", "experts"):
        found = cost(step, *arguments, way, static_argnums=4)
        assert found.flops == 2 * 2 * blocks * rows * width * hidden, way
        assert found.unknown_loops == ()
