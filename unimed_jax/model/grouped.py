"""Multiplies blocks of rows, each by the kernel of the expert that owns it, as suits the platform.

Three ways give the same numbers up to rounding, values and gradients:

- "blocks": one loop over all blocks. The reference, and the fastest on CPUs.
- "experts": a loop over the experts, and in it one over the blocks that an expert owns. On GPUs the
  reference copies every expert's gradient twice for each block; here a gradient grows in place,
  and an expert's kernel is copied out of its stack once.
- "megablox": the Pallas kernels for TPUs that come with JAX, which copy nothing.

`jax.lax.ragged_dot` multiplies every row by every kernel on CPU, GPU and TPU (jaxlib 0.10.2). JAX's
Mosaic kernels for Hopper have never run on a card here, and their last compiler runs on the card
alone: `benchmarks/grouped_kernels.py` measures them, and this file does without. Shapes: M blocks of
b rows, E experts, kernels of D x F.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from unimed_jax.model.attention import hardware

Tile = tuple[int, int]
Way = Literal["blocks", "experts", "megablox"]
# What plan and train say about a way.
SHOWN: dict[Way, str] = {
    "blocks": "grouped experts run by a loop over blocks of tokens",
    "experts": "grouped experts run one after the other, by blocks of their tokens",
    "megablox": "grouped experts run by megablox, the Pallas kernels for TPUs that come with JAX",
}
_LANES = 128  # TPUs compute on tiles of so many columns
_INNER = 512  # channels that a product sums over at least before it adds to what it has
# Bytes of a TPU core's memory that a kernel may plan with; libtpu gives it 16 MiB on v5e.
_CORE_MEMORY = 12 * 2**20


def way(dtype: DTypeLike, width: int, hidden: int) -> Way:
    """Chooses how experts of D = `width` and F = `hidden` are multiplied on the devices in context."""
    platform = hardware()
    if platform == "cpu":
        return "blocks"
    if platform != "tpu":
        return "experts"
    return "experts" if megablox_refusal(dtype, width, hidden) else "megablox"


def megablox_refusal(dtype: DTypeLike, width: int, hidden: int) -> str | None:
    """Says why megablox cannot multiply kernels of these sizes; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"megablox multiplies bfloat16 and float32, and config.model.compute_dtype is {dtype}"
    for size in (width, hidden):
        if size % _LANES:
            return f"experts of {width} x {hidden} channels are not in multiples of {_LANES}"
    return None


class Blocks(NamedTuple):
    """Divides the rows of a grouped product into M equal blocks, each owned by one expert."""

    size: int  # rows of a block
    # [M] int32, rising: the expert of each block, E for blocks that stay empty
    owners: Array
    starts: Array  # [E] int32: the first row of each expert


def block_rows(choices: int, count: int, chosen_way: Way) -> int:
    """Chooses the rows of a block: enough for a product to be fast, few enough to leave few empty.

    `choices` over `count` experts. On GPUs every block reads its kernel, and reads and writes the sum
    of the kernel's gradient, so that blocks grow with the experts' tokens.
    """
    all_ = 1 << (choices // count).bit_length()  # a block for nearly all tokens of an expert
    if hardware() == "cpu":
        return min(64, max(8, all_))
    if chosen_way == "megablox":
        return min(256, max(_LANES, all_))
    return min(max(256, min(1024, all_ // 8)), max(8, all_))


def make_blocks(
    chosen: Int[Array, "N K"], kept: Bool[Array, "N K"], count: int, chosen_way: Way
) -> Blocks:
    """Gives each of `count` experts whole blocks for its kept choices; no block has two owners."""
    choices = chosen.size
    size = block_rows(choices, count, chosen_way)
    mask = jax.nn.one_hot(chosen, count, dtype=jnp.int32) * kept[..., None]  # [N, K, E]
    tokens = mask.sum(axis=(0, 1))  # [E]
    ends = jnp.cumsum(-(-tokens // size))  # [E], in blocks
    blocks = choices // size + min(count, choices)  # enough whatever the routing is
    owners = jnp.searchsorted(ends, jnp.arange(blocks), side="right").astype(jnp.int32)
    starts = (ends - -(-tokens // size)) * size
    return Blocks(size, owners, starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def block_product(
    x: Float[Array, "M b D"],
    kernels: Float[Array, "E D F"],
    owners: Int[Array, "M"],
    chosen_way: Way = "blocks",
    axes: tuple[str, ...] = (),
) -> Float[Array, "M b F"]:
    """Multiplies each block with the kernel of its owner.

    `owners` rise. A block whose owner is E gives zeros. Inside shard_map, `axes` are the mesh axes
    over which x and kernels differ between devices.
    """
    return _FORWARD[chosen_way](x, kernels, owners, axes)


def _forward(x, kernels, owners, chosen_way, axes):
    return _FORWARD[chosen_way](x, kernels, owners, axes), (x, kernels, owners)


def _backward(chosen_way, axes, saved, dy):
    """Computes both gradients; automatic ones would add a whole [E, D, F] for each block."""
    x, kernels, owners = saved
    return *_BACKWARD[chosen_way](x, kernels, owners, dy, axes), None


block_product.defvjp(_forward, _backward)


# --------------------------------------------------------------------------------------------------
# A loop over all blocks
# --------------------------------------------------------------------------------------------------


def _by_block(x: Array, kernels: Array, owners: Array, axes: tuple[str, ...]) -> Array:
    """Multiplies one block after the other; a block that nobody owns costs nothing."""

    def one(inputs):
        block, owner = inputs
        none = varying(jnp.zeros((block.shape[0], kernels.shape[2]), x.dtype), axes)
        return jax.lax.cond(owner < len(kernels), lambda: block @ kernels[owner], lambda: none)

    return jax.lax.map(one, (x, owners))


def _by_block_backward(x: Array, kernels: Array, owners: Array, dy: Array, axes: tuple[str, ...]):
    """Computes the gradients of x and kernels in one pass over the blocks."""

    def one(total, inputs):
        block, dy, owner = inputs

        def add():
            part = jnp.einsum("bd,bf->df", block, dy, preferred_element_type=jnp.float32)
            return total.at[owner].add(part), dy @ kernels[owner].T

        none = varying(jnp.zeros(block.shape, block.dtype), axes)
        return jax.lax.cond(owner < len(kernels), add, lambda: (total, none))

    zeros = varying(jnp.zeros(kernels.shape, jnp.float32), axes)
    total, dx = jax.lax.scan(one, zeros, (x, dy, owners))
    return dx, total.astype(kernels.dtype)


# --------------------------------------------------------------------------------------------------
# A loop over the experts and their blocks
# --------------------------------------------------------------------------------------------------


def _by_expert(x: Array, kernels: Array, owners: Array, axes: tuple[str, ...]) -> Array:
    """Multiplies the blocks of one expert after those of another; what nobody owns stays zero."""
    y = varying(jnp.zeros((*x.shape[:2], kernels.shape[2]), x.dtype), axes)  # [M, b, F]

    def one(y, inputs):
        kernel, first, after = inputs

        def add(i, y):
            return jax.lax.dynamic_update_index_in_dim(y, x[i] @ kernel, i, 0)

        return _for_each(first, after, len(x) / len(kernels), add, y), None

    return jax.lax.scan(one, y, (kernels, *_own_blocks(owners, len(kernels))))[0]


def _by_expert_backward(x: Array, kernels: Array, owners: Array, dy: Array, axes: tuple[str, ...]):
    """Computes the gradients; an expert's own is complete before that of the next begins."""

    def one(dx, inputs):
        kernel, first, after = inputs
        zeros = varying(jnp.zeros(kernel.shape, jnp.float32), axes)  # [D, F]

        def add(i, state):
            dx, total = state
            part = jnp.einsum("bd,bf->df", x[i], dy[i], preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_index_in_dim(dx, dy[i] @ kernel.T, i, 0), total + part

        dx, total = _for_each(first, after, len(x) / len(kernels), add, (dx, zeros))
        return dx, total.astype(kernels.dtype)

    zeros = varying(jnp.zeros(x.shape, x.dtype), axes)
    return jax.lax.scan(one, zeros, (kernels, *_own_blocks(owners, len(kernels))))


def _own_blocks(owners: Int[Array, "M"], count: int) -> tuple[Array, Array]:
    """Finds the first block of each expert, and the one after its last: [E] each."""
    experts = jnp.arange(count)
    return jnp.searchsorted(owners, experts), jnp.searchsorted(owners, experts, side="right")


def _for_each(first: Array, after: Array, mean: float, add: Callable, state: Any) -> Any:
    """Runs `add` for an expert's own blocks, of which there are at most `mean` in the mean of all.

    How many is decided while it runs; the name tells `plan/program_cost.py` what to count.
    """
    with jax.named_scope(f"at_most_{mean:g}_times"):
        return jax.lax.fori_loop(first, after, add, state)


# --------------------------------------------------------------------------------------------------
# JAX's kernels for TPUs
# --------------------------------------------------------------------------------------------------


def _by_megablox(x: Array, kernels: Array, owners: Array, axes: tuple[str, ...]) -> Array:
    """Multiplies all rows in one kernel, which visits only the blocks that are owned."""
    blocks, size, inner = x.shape
    outer = kernels.shape[2]
    y = _megablox().gmm(
        x.reshape(-1, inner),  # [M * b, D]
        kernels,
        _rows_of_experts(owners, len(kernels), size),
        x.dtype,
        (size, *tiles(size, inner, outer, x.dtype.itemsize)),
        interpret=hardware() != "tpu",
    )
    return _only_owned(y.reshape(blocks, size, outer), owners, len(kernels))


def _by_megablox_backward(x: Array, kernels: Array, owners: Array, dy: Array, axes: tuple[str, ...]):
    """Computes the gradients with a kernel each; one writes zeros for experts without a block."""
    blocks, size, inner = x.shape
    count, outer = len(kernels), kernels.shape[2]
    rows = _rows_of_experts(owners, count, size)
    x, dy = x.reshape(-1, inner), dy.reshape(-1, outer)  # [M * b, D], [M * b, F]
    interpret = hardware() != "tpu"
    dx = _megablox().gmm(
        dy,
        kernels,
        rows,
        x.dtype,
        (size, *tiles(size, outer, inner, x.dtype.itemsize)),
        transpose_rhs=True,
        interpret=interpret,
    )
    dkernels = _megablox().tgmm(
        x.swapaxes(0, 1),
        dy,
        rows,
        kernels.dtype,
        (size, *gradient_tiles(size, inner, outer, x.dtype.itemsize)),
        interpret=interpret,
    )
    return _only_owned(dx.reshape(blocks, size, inner), owners, count), dkernels


def _megablox() -> ModuleType:
    """Loads JAX's kernels, which bring a compiler; the package hides the module by a function."""
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _rows_of_experts(owners: Int[Array, "M"], count: int, size: int) -> Int[Array, "E"]:
    """Counts the rows of each expert's blocks."""
    first, after = _own_blocks(owners, count)
    return ((after - first) * size).astype(jnp.int32)


def _only_owned(y: Float[Array, "M b F"], owners: Int[Array, "M"], count: int) -> Array:
    """Writes zeros where the kernel wrote nothing and memory holds what was there before."""
    return jnp.where((owners < count)[:, None, None], y, 0)


def tiles(rows: int, inner: int, outer: int, item: int) -> Tile:
    """Chooses (inner, outer) tiles of a product of `rows` by [inner, outer] that move least.

    x is read again for every tile of `outer`; a kernel is read once for all blocks of an expert if
    `inner` is whole, and else for each block. `item`: bytes of a number.
    """

    def moved(tile: Tile) -> float:
        again = 1.0 if tile[0] < inner else 0.5  # of two blocks an expert
        return rows * inner * outer / tile[1] + again * inner * outer

    def held(tile: Tile) -> int:
        """Counts two buffers of x, kernel and y each, and three of y in float32."""
        k, n = tile
        return 2 * item * (rows * k + k * n + rows * n) + 3 * 4 * rows * n

    pairs = [(k, n) for k in _tile_sizes(inner, _INNER) for n in _tile_sizes(outer)]
    return _least(pairs, moved, held)


def gradient_tiles(rows: int, inner: int, outer: int, item: int) -> Tile:
    """Chooses (inner, outer) tiles of the kernels' gradient [inner, outer], a sum over rows."""

    def moved(tile: Tile) -> float:
        return inner * outer / tile[1] + outer * inner / tile[0]

    def held(tile: Tile) -> int:
        """Counts two buffers of each array, the sum, and masked copies of x and dy in float32."""
        k, n = tile
        return 2 * item * (rows * k + rows * n + k * n) + 4 * k * n + 2 * 4 * rows * (k + n)

    pairs = [(k, n) for k in _tile_sizes(inner) for n in _tile_sizes(outer)]
    return _least(pairs, moved, held)


def _least(pairs: Sequence[Tile], moved: Callable[[Tile], float], held: Callable[[Tile], int]) -> Tile:
    """Finds the tiles that move least, of those the largest, among what a core's memory can hold."""
    able = [pair for pair in pairs if held(pair) <= _CORE_MEMORY]
    return min(able, key=lambda pair: (moved(pair), -math.prod(pair))) if able else min(pairs, key=held)


def _tile_sizes(size: int, smallest: int = _LANES) -> list[int]:
    """Lists multiples of a TPU's lanes, from `smallest` up, that divide a size; or the size alone."""
    return [n for n in range(_LANES, size + 1, _LANES) if size % n == 0 and n >= smallest] or [size]


_FORWARD = {"blocks": _by_block, "experts": _by_expert, "megablox": _by_megablox}
_BACKWARD = {
    "blocks": _by_block_backward,
    "experts": _by_expert_backward,
    "megablox": _by_megablox_backward,
}


def varying(x: Array, axes: Sequence[str]) -> Array:
    """Marks x, for shard_map, as an array that may differ between devices along `axes`."""
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
