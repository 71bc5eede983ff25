"""The cost of programs for accelerators, from lines of programs that were compiled ahead of time."""

import pytest

from unimed_jax.plan.program_cost import Collective, program_cost

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
    assert by_name["all-gather-start"] == by_name["reduce-scatter"] == 3 * y
    assert found.collectives == (
        Collective("all-gather", ("fsdp",), y, 1),
        Collective("reduce-scatter", ("data",), y, 1),
    )


# Parts of a training step (H100, jax 0.12): fusions start and end beside other work, and cuBLAS reads
# a layer's kernel where it lies in its stack.
BESIDE_OTHER_WORK = """HloModule jit_step, is_scheduled=true

%fused_dynamic_slice (param_0: bf16[39,1408,6144], param_1: s32[]) -> bf16[1,1408,6144] {
  %param_0 = bf16[39,1408,6144]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %constant_1 = s32[] constant(0)
  ROOT %dynamic_slice.1 = bf16[1,1408,6144]{2,1,0} dynamic-slice(%param_0, %param_1, %constant_1, %constant_1), dynamic_slice_sizes={1,1408,6144}
}

%fused_dynamic_update_slice (param_2: bf16[32,16,256,4096], param_3: s32[], param_4: bf16[16,256,4096]) -> bf16[32,16,256,4096] {
  %param_2 = bf16[32,16,256,4096]{3,2,1,0} parameter(0)
  %param_4 = bf16[16,256,4096]{2,1,0} parameter(2)
  %bitcast.1 = bf16[1,16,256,4096]{3,2,1,0} bitcast(%param_4)
  %param_3 = s32[] parameter(1)
  %constant_2 = s32[] constant(0)
  ROOT %dynamic_update_slice.1 = bf16[32,16,256,4096]{3,2,1,0} dynamic-update-slice(%param_2, %bitcast.1, %param_3, %constant_2, %constant_2, /*index=5*/%constant_2)
}

%dynamic-slice-fusion (p0: bf16[32,4096,11008], p1: s32[], p2: bf16[4096,4096]) -> (bf16[4096,11008], s8[33554432]) {
  %p2 = bf16[4096,4096]{1,0} parameter(2)
  %p0 = bf16[32,4096,11008]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %constant_3 = s32[] constant(0)
  %dynamic_slice.2 = bf16[1,4096,11008]{2,1,0} dynamic-slice(%p0, %p1, %constant_3, %constant_3), dynamic_slice_sizes={1,4096,11008}
  %bitcast.2 = bf16[4096,11008]{1,0} bitcast(%dynamic_slice.2)
  ROOT %custom-call.1 = (bf16[4096,11008]{1,0}, s8[33554432]{0}) custom-call(%p2, %bitcast.2), custom_call_target="__cublas$lt$matmul", metadata={op_name="dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
}

ENTRY %main (stack: bf16[39,1408,6144], at: s32[], saved: bf16[32,16,256,4096], x: bf16[16,256,4096], kernels: bf16[32,4096,11008]) -> (bf16[1,1408,6144], bf16[32,16,256,4096], bf16[4096,11008]) {
  %stack = bf16[39,1408,6144]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %saved = bf16[32,16,256,4096]{3,2,1,0} parameter(2)
  %x = bf16[16,256,4096]{2,1,0} parameter(3)
  %kernels = bf16[32,4096,11008]{2,1,0} parameter(4)
  %fusion-start.1 = ((bf16[39,1408,6144]{2,1,0}, s32[]), bf16[1,1408,6144]{2,1,0}, u32[]) fusion-start(%stack, %at), kind=kLoop, calls=%fused_dynamic_slice, metadata={op_name="slice"}
  %fusion-start.2 = ((bf16[32,16,256,4096]{3,2,1,0}, s32[], bf16[16,256,4096]{2,1,0}), bf16[32,16,256,4096]{3,2,1,0}, u32[]) fusion-start(%saved, %at, %x), kind=kLoop, calls=%fused_dynamic_update_slice, metadata={op_name="update"}
  %bitcast.3 = bf16[4096,4096]{1,0} bitcast(%x)
  %fusion-start.3 = ((bf16[32,4096,11008]{2,1,0}, s32[], bf16[4096,4096]{1,0}), /*index=1*/(bf16[4096,11008]{1,0}, s8[33554432]{0}), u32[]) fusion-start(%kernels, %at, %bitcast.3), kind=kCustom, calls=%dynamic-slice-fusion
  %fusion-done.3 = (bf16[4096,11008]{1,0}, s8[33554432]{0}) fusion-done(%fusion-start.3)
  %product = bf16[4096,11008]{1,0} get-tuple-element(%fusion-done.3), index=0
  %fusion-done.1 = bf16[1,1408,6144]{2,1,0} fusion-done(%fusion-start.1), metadata={op_name="slice"}
  %fusion-done.2 = bf16[32,16,256,4096]{3,2,1,0} fusion-done(%fusion-start.2), metadata={op_name="update"}
  ROOT %tuple.1 = (bf16[1,1408,6144]{2,1,0}, bf16[32,16,256,4096]{3,2,1,0}, bf16[4096,11008]{1,0}) tuple(%fusion-done.1, %fusion-done.2, %product)
}
"""  # noqa: E501


# A product that is written into a scan's stack (H100, jax 0.12): its work space is a result beside it.
INTO_A_STACK = """HloModule jit_f, is_scheduled=true

%dynamic-slice-fusion (p0: bf16[2048,2048], p1: bf16[2048,2048], p2: bf16[8,2048,2048], p3: s32[]) -> (bf16[8,2048,2048], s8[33554432]) {
  %p0 = bf16[2048,2048]{1,0} parameter(0)
  %p1 = bf16[2048,2048]{1,0} parameter(1)
  %p2 = bf16[8,2048,2048]{2,1,0} parameter(2)
  %p3 = s32[] parameter(3)
  %custom-call.1 = (bf16[2048,2048]{1,0}, s8[33554432]{0}) custom-call(%p0, %p1), custom_call_target="__cublas$lt$matmul", metadata={op_name="dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %get-tuple-element.1 = bf16[2048,2048]{1,0} get-tuple-element(%custom-call.1), index=0
  %bitcast.1 = bf16[1,2048,2048]{2,1,0} bitcast(%get-tuple-element.1)
  %constant.1 = s32[] constant(0)
  %dynamic_update_slice.1 = bf16[8,2048,2048]{2,1,0} dynamic-update-slice(%p2, %bitcast.1, %p3, %constant.1, %constant.1)
  %get-tuple-element.2 = s8[33554432]{0} get-tuple-element(%custom-call.1), index=1
  ROOT %tuple.1 = (bf16[8,2048,2048]{2,1,0}, s8[33554432]{0}) tuple(%dynamic_update_slice.1, %get-tuple-element.2)
}

ENTRY %main (x: bf16[2048,2048], w: bf16[2048,2048], stack: bf16[8,2048,2048], at: s32[]) -> bf16[8,2048,2048] {
  %x = bf16[2048,2048]{1,0} parameter(0)
  %w = bf16[2048,2048]{1,0} parameter(1)
  %stack = bf16[8,2048,2048]{2,1,0} parameter(2)
  %at = s32[] parameter(3)
  %fusion.1 = (bf16[8,2048,2048]{2,1,0}, s8[33554432]{0}) fusion(%x, %w, %stack, %at), kind=kCustom, calls=%dynamic-slice-fusion
  ROOT %get-tuple-element.3 = bf16[8,2048,2048]{2,1,0} get-tuple-element(%fusion.1), index=0
}
"""  # noqa: E501


def test_work_space_beside_an_update_in_place_is_no_traffic():
    found = program_cost(INTO_A_STACK)
    assert found.flops == 2 * 2048**3
    assert found.bytes == pytest.approx(3 * 2 * 2048**2, rel=1e-6)  # x, w and the part that is written


def test_fusions_beside_other_work_count_as_others_do():
    found = program_cost(BESIDE_OTHER_WORK)
    layer, x = 2 * 1408 * 6144, 2 * 16 * 256 * 4096
    kernel, product = 2 * 4096 * 11008, 2 * 4096 * 11008
    assert found.flops == 2 * 4096 * 4096 * 11008
    by_name = {o.name: o.bytes for o in found.operations}
    assert by_name.pop("slice") == pytest.approx(2 * layer, rel=1e-6)  # one layer, read and written
    assert by_name.pop("update") == pytest.approx(2 * x, rel=1e-6)  # likewise
    assert by_name.pop("dot_general") == pytest.approx(x + kernel + product, rel=1e-6)
    assert not by_name
