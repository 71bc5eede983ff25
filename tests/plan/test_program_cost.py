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
# Accelerators: lines of programs that were compiled ahead of time, shortened
# --------------------------------------------------------------------------------------------------

# An all-gather that runs beside a product (v5e 2x2, libtpu 0.0.52): started, carried on, awaited.
TPU = """HloModule jit_layers, is_scheduled=true

%fused_computation.24 (param_0.78: bf16[1,512,1024]) -> (bf16[1,512,1024], bf16[1,1024,1024], s32[2]) {
  %param_0.78 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.19 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.78), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.3 = (bf16[1,512,1024]{2,1,0:T(8,128)(2,1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}) custom-call(%all-gather.19), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.28 (param_0.83: bf16[1,512,1024], param_1.84: bf16[1,1024,1024], param_2.55: s32[2], param_9.2: bf16[512,1024], param_10.3: bf16[512,1024]) -> (bf16[1024,1024], bf16[1,512,1024], bf16[1,1024,1024], s32[2]) {
  %param_9.2 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} parameter(3)
  %param_10.3 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(4)
  %convolution.13 = bf16[1024,1024]{1,0:T(8,128)(2,1)} convolution(%param_9.2, %param_10.3), dim_labels=fb_io->bf, metadata={op_name="jit(layers)/transpose(jvp())/while/body/dot_general" stack_frame_id=10}
  %param_0.83 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.84 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.21 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.83), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  %param_2.55 = s32[2]{0:S(4)} parameter(2)
  ROOT %tuple.59 = (bf16[1024,1024]{1,0:T(8,128)(2,1)}, bf16[1,512,1024]{2,1,0:T(8,128)(2,1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}) tuple(%convolution.13, %param_0.83, %all-gather.21, %param_2.55)
}

%fused_computation.26 (param_0.86: bf16[1,512,1024], param_1.87: bf16[1,1024,1024]) -> bf16[1,1024,1024] {
  %param_0.86 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.87 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.23 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.86), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %custom-call.5 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} custom-call(%param_0.86, %param_1.87, %all-gather.23), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (input.2: bf16[1024,1024]) -> bf16[512,1024] {
  %input.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.6 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input.2), channel_id=5, replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%add.clone
  %partition-id.8 = u32[] partition-id()
  %constant.142 = u32[] constant(0)
  ROOT %dynamic-slice.39 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.6, %partition-id.8, %constant.142), dynamic_slice_sizes={512,1024}
}

%fused_computation.16 (param_0.73: bf16[6,512,1024], param_1.77: s32[]) -> bf16[1,512,1024] {
  %param_0.73 = bf16[6,512,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.77 = s32[]{:T(128)S(6)} parameter(1)
  %constant.144 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.40 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.73, %param_1.77, %constant.144, %constant.144), dynamic_slice_sizes={1,512,1024}
}

ENTRY %main.6_spmd (param.4: bf16[6,512,1024], param.7: s32[], param.5: bf16[512,1024], param.6: bf16[512,1024]) -> (bf16[1,1024,1024], bf16[512,1024]) {
  %param.4 = bf16[6,512,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param.7 = s32[]{:T(128)S(6)} parameter(1)
  %param.5 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %copy-start = (bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%param.5), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}
  %constant_dynamic-slice_fusion.5 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} fusion(%param.4, %param.7), kind=kLoop, calls=%fused_computation.16
  %async-collective-start = (bf16[1,512,1024]{2,1,0:T(8,128)(2,1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}) fusion(%constant_dynamic-slice_fusion.5), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.24
  %get-tuple-element.343 = s32[2]{0:S(4)} get-tuple-element(%async-collective-start), index=2
  %get-tuple-element.342 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %get-tuple-element.341 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=0
  %copy-done = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %param.6 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(3)
  %fusion.28 = (bf16[1024,1024]{1,0:T(8,128)(2,1)}, bf16[1,512,1024]{2,1,0:T(8,128)(2,1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}) fusion(%get-tuple-element.341, %get-tuple-element.342, %get-tuple-element.343, %copy-done, %param.6), kind=kOutput, calls=%async_collective_fusion.28
  %get-tuple-element.350 = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.28), index=0
  %fusion.26 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.350), kind=kCustom, calls=%all-reduce-scatter
  %get-tuple-element.352 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%fusion.28), index=2
  %get-tuple-element.351 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%fusion.28), index=1
  %async-collective-done = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} fusion(%get-tuple-element.351, %get-tuple-element.352), kind=kCustom, calls=%fused_computation.26
  ROOT %tuple.57 = (bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}) tuple(%async-collective-done, %fusion.26)
}
"""  # noqa: E501


def test_tpu_collectives_beside_products_and_the_cores_own_memory():
    found = program_cost(TPU, {"data": 2, "fsdp": 2})
    assert found.flops == 2 * 512 * 1024 * 1024
    part = 2 * 512 * 1024  # bytes of a shard
    assert {(c.kind, c.axes, c.bytes, c.count) for c in found.collectives} == {
        ("all-gather", ("fsdp",), part, 1),
        ("reduce-scatter", ("fsdp",), part, 1),
    }
    by_name = {o.name: o.bytes for o in found.operations if o.name != "dynamic-slice"}
    slices = {o.shape: o.bytes for o in found.operations if o.name == "dynamic-slice"}
    # the layer is copied out of its stack: read and written; all 6 would be 6 times as much.
    # Scattering reads both parts and leaves its own in the core's memory.
    assert slices == {"bf16[1,512,1024]": 2 * part, "bf16[512,1024]": 2 * part}
    assert by_name.pop("copy-start") == part  # read; the copy lies in the core's own memory
    # one operand there, one in memory, the result of two parts
    assert by_name.pop("jit(layers)/transpose(jvp())/while/body/dot_general") == 3 * part
    # gathering reads a part and writes both, once for all three
    assert by_name.pop("AsyncCollectiveStart") == 3 * part
    assert not any(by_name.values())


# A layer of decoding (H100, jax 0.10.2): its kernel is copied out of the stack before cuBLAS reads it.
GPU = """HloModule jit__advance, is_scheduled=true

%fused_dynamic_slice.2 (param_0.209: bf16[32,1,4096,11008], param_1.199: s32[]) -> bf16[1,1,4096,11008] {
  %param_0.209 = bf16[32,1,4096,11008]{3,2,1,0} parameter(0)
  %param_1.199 = s32[] parameter(1)
  %constant_111_9 = s32[] constant(0)
  %dynamic_slice.39.1 = bf16[1,1,4096,11008]{3,2,1,0} dynamic-slice(%param_0.209, %param_1.199, %constant_111_9, %constant_111_9, %constant_111_9), dynamic_slice_sizes={1,1,4096,11008}
  ROOT %copy.58 = bf16[1,1,4096,11008]{3,2,1,0} copy(%dynamic_slice.39.1)
}

%fused_add (param_0.1: s32[]) -> s32[] {
  %param_0.1 = s32[] parameter(0)
  %constant_112 = s32[] constant(1)
  ROOT %add.1 = s32[] add(%param_0.1, %constant_112)
}

%body (arg_tuple.1: (s32[], bf16[4096], bf16[32,1,4096,11008], bf16[11008])) -> (s32[], bf16[4096], bf16[32,1,4096,11008], bf16[11008]) {
  %arg_tuple.1 = (s32[], bf16[4096]{0}, bf16[32,1,4096,11008]{3,2,1,0}, bf16[11008]{0}) parameter(0)
  %get-tuple-element.170 = s32[] get-tuple-element(%arg_tuple.1), index=0
  %get-tuple-element.171 = bf16[4096]{0} get-tuple-element(%arg_tuple.1), index=1
  %get-tuple-element.199 = bf16[32,1,4096,11008]{3,2,1,0} get-tuple-element(%arg_tuple.1), index=2
  %loop_dynamic_slice_fusion.2 = bf16[1,1,4096,11008]{3,2,1,0} fusion(%get-tuple-element.199, %get-tuple-element.170), kind=kCustom, calls=%fused_dynamic_slice.2, metadata={op_name="jit(_advance)/while/body/dynamic_slice"}
  %bitcast.21.0 = bf16[4096,11008]{1,0} bitcast(%loop_dynamic_slice_fusion.2)
  %custom-call.6 = (bf16[11008]{0}, s8[33554432]{0}) custom-call(%get-tuple-element.171, %bitcast.21.0), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(_advance)/while/body/dot_general"}, backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %get-tuple-element.120.0 = bf16[11008]{0} get-tuple-element(%custom-call.6), index=0
  %loop_add_fusion = s32[] fusion(%get-tuple-element.170), kind=kLoop, calls=%fused_add, control-predecessors={%loop_dynamic_slice_fusion.2}
  ROOT %tuple.23 = (s32[], bf16[4096]{0}, bf16[32,1,4096,11008]{3,2,1,0}, bf16[11008]{0}) tuple(%loop_add_fusion, %get-tuple-element.171, %get-tuple-element.199, %get-tuple-element.120.0)
}

%fused_compare (param_0.2: s32[]) -> pred[] {
  %param_0.2 = s32[] parameter(0)
  %constant_108_1 = s32[] constant(32)
  ROOT %lt.14.1 = pred[] compare(%param_0.2, %constant_108_1), direction=LT
}

%cond (arg_tuple.0: (s32[], bf16[4096], bf16[32,1,4096,11008], bf16[11008])) -> pred[] {
  %arg_tuple.0 = (s32[], bf16[4096]{0}, bf16[32,1,4096,11008]{3,2,1,0}, bf16[11008]{0}) parameter(0)
  %get-tuple-element.16.0 = s32[] get-tuple-element(%arg_tuple.0), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%get-tuple-element.16.0), kind=kLoop, calls=%fused_compare
}

ENTRY %main (param.1: bf16[4096], param.2: bf16[32,1,4096,11008], param.3: bf16[11008]) -> bf16[11008] {
  %constant.1 = s32[] constant(0)
  %copy.1 = s32[] copy(%constant.1)
  %param.1 = bf16[4096]{0} parameter(0)
  %param.2 = bf16[32,1,4096,11008]{3,2,1,0} parameter(1)
  %param.3 = bf16[11008]{0} parameter(2)
  %tuple.1 = (s32[], bf16[4096]{0}, bf16[32,1,4096,11008]{3,2,1,0}, bf16[11008]{0}) tuple(%copy.1, %param.1, %param.2, %param.3)
  %while.2 = (s32[], bf16[4096]{0}, bf16[32,1,4096,11008]{3,2,1,0}, bf16[11008]{0}) while(%tuple.1), condition=%cond, body=%body
  %get-tuple-element.2 = bf16[11008]{0} get-tuple-element(%while.2), index=3
  %all-gather-start = (bf16[11008]{0}, bf16[22016]{0}) all-gather-start(%get-tuple-element.2), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %all-gather-done = bf16[22016]{0} all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((bf16[22016]{0}), bf16[11008]{0}) reduce-scatter-start(%all-gather-done), channel_id=6, replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_2'}, use_global_device_ids=true, dimensions={0}, to_apply=%add.clone
  ROOT %reduce-scatter-done = bf16[11008]{0} reduce-scatter-done(%reduce-scatter-start)
}
"""  # noqa: E501


def test_gpu_kernels_read_copies_of_stacked_layers_and_work_space_is_not_traffic():
    found = program_cost(GPU, {"data": 2, "fsdp": 2})
    kernel, x, y = 2 * 4096 * 11008, 2 * 4096, 2 * 11008
    assert found.flops == 32 * 2 * 4096 * 11008  # the loop's count comes from its condition
    by_name = {o.name: o.bytes for o in found.operations}
    assert by_name["jit(_advance)/while/body/dynamic_slice"] == pytest.approx(32 * 2 * kernel, rel=1e-6)
    assert by_name["jit(_advance)/while/body/dot_general"] == 32 * (kernel + x + y)
    assert by_name["all-gather-start"] == by_name["reduce-scatter-start"] == 3 * y
    assert found.collectives == (
        Collective("all-gather", ("fsdp",), y, 1),
        Collective("reduce-scatter", ("data",), y, 1),
    )


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
    )

    def step(x, kernels, owners, way):
        return jax.grad(lambda *a: block_product(*a, owners, way).sum(), (0, 1))(x, kernels)

    for way in ("blocks", "experts"):
        found = cost(step, *arguments, way, static_argnums=3)
        assert found.flops == 2 * 2 * blocks * rows * width * hidden, way
        assert found.unknown_loops == ()
