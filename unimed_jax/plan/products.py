"""Counts the floating-point operations of matrix products and convolutions in a compiled program."""

import functools
import math
import re

from unimed_jax.plan.hlo import Array, Computation, Instruction

# Products of [S, d] with [d, S] blocks that an attention kernel needs: forward the scores and the
# weighted values; backward the scores again and the gradients of weights, values, queries and keys.
# Splash computes the scores and the gradient of the weights in each of its two backward kernels.
_CUDNN = {"Backward": 5, "": 2}
_SPLASH = {"splash_mha_dkv": 4, "splash_mqa_dkv": 4, "splash_mha_dq": 3, "splash_mqa_dq": 3}
_SPLASH |= {"splash_mha_fwd": 2, "splash_mqa_fwd": 2}


def flops_of_product(here: Computation, i: Instruction) -> float:
    """Counts the operations of an instruction if it is a product, 2 a multiplication; else 0."""
    if i.opcode == "dot":
        left = here.operand(i, 0).array
        return (
            2.0 * i.array.elements * math.prod(left.dims[d] for d in i.numbers("lhs_contracting_dims"))
        )
    if i.opcode == "convolution":
        return _convolution(i, here.operand(i, 0).array, here.operand(i, 1).array, i.array)
    if i.opcode == "reduce" and i.op_name.endswith("dot_general"):
        return 2.0 * here.operand(i, 0).array.elements
    return _kernel(here, i) if i.opcode == "custom-call" else 0.0


def unknown_kernel(i: Instruction) -> bool:
    """Says whether an instruction is a kernel that may compute products which nothing here counts."""
    if i.opcode != "custom-call":
        return False
    if i.target == "tpu_custom_call":
        return _splash(i) is None and _estimate(i) is None
    return "triton" in i.target.lower() or i.target.startswith(("mosaic", "xla_ffi_python"))


def _kernel(here: Computation, i: Instruction) -> float:
    operands = [here.instructions[name].array for name in i.operands]
    if "matmul" in i.target or "gemm" in i.target:
        found = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', i.attributes)
        contracted = (
            [int(n) for n in re.findall(r"\d+", found[1])] if found else [len(operands[0].dims) - 1]
        )
        return 2.0 * i.array.elements * math.prod(operands[0].dims[d] for d in contracted)
    if i.target.startswith("__cudnn$fmha"):
        found = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', i.attributes)
        dims = [int(n) for n in re.findall(r"\d+", found[1])] if found else [0] * 4  # [B, heads, S, K]
        head = operands[0].elements / max(math.prod(dims[:3]), 1)
        return 2.0 * math.prod(dims) * head * next(n for end, n in _CUDNN.items() if end in i.target)
    if i.target.startswith("__cudnn$conv"):
        left, right, out = operands[0], operands[1], i.array
        if "BackwardFilter" in i.target:
            right, out = out, right
        elif "BackwardInput" in i.target:
            left, out = out, left
        return _convolution(i, left, right, out)
    if i.target == "tpu_custom_call":
        return _splash_flops(i, operands) if _splash(i) else _estimate(i) or 0.0
    if i.target.startswith("__onednn$"):
        left, right, out = operands[0], operands[1], i.array
        if "matmul" in i.target:
            return 2.0 * out.elements * left.dims[-1]
        return 2.0 * out.elements * right.elements / max(out.dims[-1], 1)
    return 0.0


def _splash(i: Instruction) -> int | None:
    """Counts the products of a splash attention kernel; None if it is another one."""
    return next((n for name, n in _SPLASH.items() if name in i.op_name or name in i.name), None)


def _splash_flops(i: Instruction, operands: list[Array]) -> float:
    """Counts the pairs of tokens in the blocks that are computed.

    A kernel that is given a mask skips blocks without a visible pair. Which these are is decided
    while it runs, but no token sees a later one (model/cache.py), so blocks above the diagonal count
    none, and all others whole.
    """
    # q [heads, S, d], k [heads, K, d], perhaps after the rows of a batch
    q, k = [a for a in operands if len(a.dims) >= 3 and a.dtype in ("bf16", "f32")][:2]
    pairs = q.dims[-2] * k.dims[-2]
    # the mask's blocks: [blocks, queries, keys]
    mask = next((a for a in operands if len(a.dims) >= 3 and a.dtype == "s32"), None)
    if mask is not None:
        queries, keys = mask.dims[-2:]
        seen = (min(first + queries, k.dims[-2]) for first in range(0, q.dims[-2], queries))
        pairs = sum(queries * keys * math.ceil(last / keys) for last in seen)
    return 2.0 * q.elements / q.dims[-2] * pairs * (_splash(i) or 0)


def _estimate(i: Instruction) -> float | None:
    """Reads the FLOPs that the author of a Pallas kernel gave."""
    found = re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', i.attributes.replace("\\", ""))
    return float(found[1]) if found else None


def _convolution(i: Instruction, left: Array, right: Array, out: Array) -> float:
    """Counts the products that a convolution needs; taps that meet padding or holes need none."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    of_left, of_right, of_out = labels[1], labels[2], labels[3]
    spatial = [c for c in of_left if c.isdigit()]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", i.attribute("window")))

    def values(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    strides, pads = values("stride", "1"), values("pad", "0_0")
    holes_left, holes_right = values("lhs_dilate", "1"), values("rhs_dilate", "1")
    taps = 1
    for n, axis in enumerate(spatial):
        taps *= _valid_taps(
            left.dims[of_left.index(axis)],
            right.dims[of_right.index(axis)],
            out.dims[of_out.index(axis)],
            int(strides[n]),
            int(pads[n].split("_")[0]),
            int(holes_left[n]),
            int(holes_right[n]),
        )
    batch = left.dims[of_left.index("b")] // int(i.attribute("batch_group_count") or 1)
    features = right.dims[of_right.index("i")] * right.dims[of_right.index("o")]
    return 2.0 * taps * batch * features


@functools.cache
def _valid_taps(
    size: int, kernel: int, out: int, stride: int, pad: int, hole: int, kernel_hole: int
) -> int:
    """Counts the pairs (place of the result, tap of the kernel) along one axis that meet a value."""
    reach = (size - 1) * hole
    count = 0
    for tap in range(kernel):
        first = tap * kernel_hole - pad  # where this tap lies for result 0
        places = (p for p in range(first, first + out * stride, stride) if 0 <= p <= reach)
        count += sum(p % hole == 0 for p in places) if hole > 1 else sum(1 for _ in places)
    return count
