"""Implements the decoder's mixture of experts, with three ways to run it.

It is that of Med-MoE (arXiv 2404.10237).

`routing.route` decides where tokens go; this file takes them there and back:

- `run_dense` runs every expert on every token. It is the reference for the other two.
- `run_grouped` sorts the tokens by expert and drops none that was routed; `grouped.py` multiplies.
- `run_capacity` gives each expert a buffer of fixed size, as GShard (arXiv 2006.16668) does.

For the same routing they give the same numbers up to rounding, values and gradients. Shapes: B
rows, S tokens per row, N = B * S tokens, D channels, E experts, F hidden units, K choices per
token.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from unimed_jax.config import DecoderConfig, ModelConfig, MoeConfig
from unimed_jax.model.grouped import Way, block_product, make_blocks, varying, way
from unimed_jax.model.layers import ACTIVATIONS, Linear, Mlp, broadcast_channels, stack
from unimed_jax.model.routing import Noise, Routing, expert_capacity, positions_in_expert, route
from unimed_jax.model.sharding import AXES, axes_by_dimension, constrain

# --------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------


class Moe(nnx.Module):
    """Replaces a layer's MLP by the sum of weight * expert(x) over a token's choices, plus meta(x).

    With `config.residual` it is c0 * that sum + c1 * residual(x) + meta(x), where c = softmax of a
    linear of x. The experts' leaves are stacked: up kernel [E, D, F], down kernel [E, F, D], biases
    [E, F] and [E, D].

    `config.path` names the dispatch. "capacity" needs a capacity, which training and evaluation set
    separately: when `eval_capacity_factor` is None, evaluation has no limit, nothing may be
    dropped, and it runs grouped.
    """

    def __init__(self, config: MoeConfig, decoder: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.router = Linear(decoder.width, config.experts, rngs=rngs)
        self.experts = stack(lambda r: Mlp(decoder, None, r), config.experts, rngs)
        self.meta = Mlp(decoder, None, rngs) if config.meta else None
        self.residual = Mlp(decoder, None, rngs) if config.residual else None
        self.coefficient = Linear(decoder.width, 2, rngs=rngs) if config.residual else None
        # [E]: 0 for an expert that is off (analyze/ablation.py), else 1; None: all are on.
        self.kept: nnx.Variable | None = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        used: Bool[Array, "B S"] | None = None,
        noise: Noise = Noise(),
        training: bool = False,
    ) -> tuple[Float[Array, "B S D"], Routing]:
        """Routes the `used` tokens (None: all) and runs their experts; others only get meta(x)."""
        batch, length, width = x.shape
        capacity = expert_capacity(batch * length, self.config, training)
        logits = self.logits(x.reshape(-1, width), noise.jitter)  # [N, D] in
        if self.kept is not None:  # tokens of an expert that is off go to their next choice
            logits = jnp.where(self.kept[...][None] > 0, logits, -jnp.inf)  # [N, E]
        routing = route(
            logits,
            self.config.top_k,
            capacity,
            None if used is None else used.reshape(-1),  # [N]
            noise,
        )
        y = self._run_experts(x, routing, capacity)
        if self.residual is not None and self.coefficient is not None:
            share = jax.nn.softmax(self.coefficient(x).astype(jnp.float32), axis=-1).astype(x.dtype)
            y = y * share[..., :1] + self.residual(x) * share[..., 1:]
        return y if self.meta is None else y + self.meta(x), routing

    def _run_experts(
        self,
        x: Float[Array, "B S D"],
        routing: Routing,
        capacity: int | None,
    ) -> Float[Array, "B S D"]:
        """Runs the experts by the dispatch that the settings name."""
        width = x.shape[-1]
        if self.config.path == "dense":
            y = run_dense(self.experts, x.reshape(-1, width), routing)  # [N, D]
            return y.reshape(x.shape)  # [B, S, D]
        if self.config.path == "capacity" and capacity is not None:
            tokens = x.reshape(-1, width)  # [N, D]
            # No expert takes a token twice, so a buffer never needs more places than there are tokens.
            y = run_capacity(self.experts, tokens, routing, min(capacity, len(tokens)))  # [N, D]
            return y.reshape(x.shape)  # [B, S, D]
        return run_grouped(self.experts, x, routing)  # this also runs "capacity" without a capacity

    def logits(
        self,
        x: Float[Array, "N D"],
        jitter: Float[Array, "N D"] | None = None,
    ) -> Float[Array, "N E"]:
        """Computes the router's logits in float32; rounding them to bfloat16 would change experts."""
        x = x.astype(jnp.float32)
        x = x if jitter is None else x * jitter
        assert self.router.bias is not None
        kernel = self.router.kernel[...].astype(jnp.float32)
        bias = self.router.bias[...].astype(jnp.float32)
        logits = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
        return logits + broadcast_channels(bias, logits)


def way_of(model: ModelConfig) -> Way | None:
    """Says how the experts of a model's decoder are multiplied on the devices in context.

    None if it has no experts, or if `config.path` is another one.
    """
    if not model.moe.experts or model.moe.path != "grouped":
        return None
    return _way(jnp.dtype(model.compute_dtype), model.decoder.width, model.decoder.mlp_width)


def _way(dtype: DTypeLike, width: int, hidden: int) -> Way:
    """Chooses how grouped products are multiplied, by the part of the F units that a device has."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        (units,) = axes_by_dimension((hidden,), ("mlp",), dict(mesh.shape))
        hidden //= math.prod(mesh.shape[axis] for axis in units)
    return way(dtype, width, hidden)


def upcycled(mlp: dict[str, Array], config: MoeConfig, depth: int) -> dict[str, Array]:
    """Turns the MLP leaves of a dense decoder into the leaves of `layers/mlp` and `layers/moe`.

    `mlp`: leaf by name ("gate/kernel", ...), stacked over all `depth` layers. Every expert, the
    meta expert and the residual MLP of a layer start as copies of the layer's MLP (sparse
    upcycling, arXiv 2212.05055). Routers and coefficients have no counterpart in a dense decoder
    and are left out.
    """
    with_experts = list(config.numbers(depth))
    plain = [i for i in range(depth) if i not in with_experts]
    copies = [part for part, there in (("meta", config.meta), ("residual", config.residual)) if there]
    out = {}
    for name, leaf in mlp.items():
        of_experts = leaf[jnp.array(with_experts)]  # [layers with experts, ...]
        # [layers with experts, E, ...]
        experts = jnp.repeat(of_experts[:, None], config.experts, axis=1)
        out[f"moe/experts/{name}"] = experts
        if plain:
            out[f"mlp/{name}"] = leaf[jnp.array(plain)]
        for part in copies:
            out[f"moe/{part}/{name}"] = experts[:, 0]
    return out


# --------------------------------------------------------------------------------------------------
# Dense: the reference
# --------------------------------------------------------------------------------------------------


def run_dense(experts: Mlp, x: Float[Array, "N D"], routing: Routing) -> Float[Array, "N D"]:
    """Runs every expert on every token and adds the outputs up with the routing's weights."""
    every = jax.vmap(lambda expert: expert(x))(experts)  # [E, N, D]
    chosen = jax.nn.one_hot(routing.experts, every.shape[0])  # [N, K, E]
    weights = jnp.einsum("nk,nke->ne", routing.weights, chosen)
    return jnp.einsum("ne,end->nd", weights.astype(x.dtype), every)


# --------------------------------------------------------------------------------------------------
# Capacity: a buffer per expert
# --------------------------------------------------------------------------------------------------


def run_capacity(
    experts: Mlp,
    x: Float[Array, "N D"],
    routing: Routing,
    capacity: int,
) -> Float[Array, "N D"]:
    """Runs each expert on a buffer of `capacity` tokens; places that no token fills hold zeros."""
    experts = _pad_experts(experts)
    count = experts.up.kernel[...].shape[0]

    def run(rows: Array) -> Array:
        buffers = rows.reshape(count, capacity, -1)  # [E, C, D]
        buffers = constrain(buffers, "expert", "capacity", None)
        out = jax.vmap(lambda expert, tokens: expert(tokens))(experts, buffers)
        return constrain(out, "expert", "capacity", None).reshape(rows.shape)  # [E * C, D]

    positions = positions_in_expert(routing.experts, routing.kept, count)
    places = routing.experts * capacity + positions  # [N, K]
    return _scatter_run_gather(run, x, places, count * capacity, routing.weights, routing.kept)


def _scatter_run_gather(
    run: Callable[[Array], Array],
    x: Float[Array, "N D"],
    places: Int[Array, "N K"],
    rows: int,
    weights: Float[Array, "N K"],
    kept: Bool[Array, "N K"],
) -> Float[Array, "N D"]:
    """Scatters tokens into `rows` rows, runs `run` on them and gathers the outputs of each token.

    The outputs are weighted.

    Every kept choice has a place of its own; a choice that is not kept writes nothing and reads
    zeros.
    """
    places = jnp.where(kept, places, rows)  # `rows` is past the end, so dropped below
    tokens = jnp.broadcast_to(jnp.arange(len(x))[:, None], places.shape)
    token_of_row = jnp.full(rows, len(x)).at[places].set(tokens, mode="drop")
    out = run(x.at[token_of_row].get(mode="fill", fill_value=0))  # [rows, D]
    chosen = out.at[places].get(mode="fill", fill_value=0)  # [N, K, D]
    return jnp.einsum("nk,nkd->nd", weights.astype(x.dtype), chosen)


# --------------------------------------------------------------------------------------------------
# Grouped: tokens sorted by expert
# --------------------------------------------------------------------------------------------------


def run_grouped(experts: Mlp, x: Float[Array, "B S D"], routing: Routing) -> Float[Array, "B S D"]:
    """Runs each expert on exactly its own tokens, however many these are.

    On a mesh each device runs the experts that it holds. Devices that hold different experts
    exchange tokens: they gather the tokens of their group of rows, run their experts and add up the
    parts of every token.
    """
    batch, length, width = x.shape
    choices = (routing.experts, routing.weights, routing.kept)
    mesh = jax.sharding.get_abstract_mesh()
    # So that gathered kernels and the sums of their gradients are as wide as those of other layers.
    experts = jax.tree.map(lambda leaf: leaf.astype(x.dtype), _pad_experts(experts))
    count, _, hidden = experts.up.kernel[...].shape
    chosen_way = _way(x.dtype, width, hidden)
    if mesh.empty:
        y = _sort_and_run(chosen_way, experts, x.reshape(-1, width), *choices)  # [N, D]
        return y.reshape(x.shape)  # [B, S, D]

    sizes = (batch, count, hidden)
    layout = ExpertLayout(*axes_by_dimension(sizes, ("batch", "expert", "mlp"), dict(mesh.shape)))
    shaped = [a.reshape(batch, length, -1) for a in choices]  # [B, S, K] each
    in_rows = PartitionSpec(layout.rows)
    run = jax.shard_map(
        functools.partial(_run_own_experts, layout, chosen_way),
        in_specs=(layout.specs(experts), in_rows, in_rows, in_rows, in_rows),
        out_specs=in_rows,
        check_vma=_is_checked(chosen_way),
    )
    return run(experts, x, *shaped)


class ExpertLayout(NamedTuple):
    """Names the mesh axes over which the work of the experts is split."""

    rows: tuple[str, ...]  # split the rows of the batch
    holders: tuple[str, ...]  # split the experts
    units: tuple[str, ...]  # split the hidden units of every expert

    @property
    def exchanges_tokens(self) -> bool:
        """Says whether devices that hold different experts also hold different rows."""
        exchanges = bool(set(self.holders) & set(self.rows))
        assert not exchanges or set(self.holders) <= set(self.rows)
        return exchanges

    def specs(self, experts: Mlp) -> Mlp:
        """Gives the partition of every leaf of stacked experts."""

        def spec_of(path: tuple, leaf: Array) -> PartitionSpec:
            down, kernel = _in_down(path), leaf.ndim == 3
            if kernel and down:  # [E, F, D]
                return PartitionSpec(self.holders, self.units, None)
            if kernel:  # [E, D, F]
                return PartitionSpec(self.holders, None, self.units)
            return PartitionSpec(self.holders, None if down else self.units)  # [E, D] or [E, F]

        return jax.tree_util.tree_map_with_path(spec_of, experts)


def _in_down(path: tuple) -> bool:
    """Says whether a leaf's path in an Mlp leads through its `down` linear."""
    return any(getattr(key, "name", None) == "down" for key in path)


def _is_checked(chosen_way: Way) -> bool:
    """Says whether shard_map can tell over which axes results differ; of Pallas kernels it cannot."""
    return chosen_way != "megablox"


def _run_own_experts(
    layout: ExpertLayout,
    chosen_way: Way,
    experts: Mlp,
    x: Float[Array, "b S D"],
    chosen: Int[Array, "b S K"],
    weights: Float[Array, "b S K"],
    kept: Bool[Array, "b S K"],
) -> Float[Array, "b S D"]:
    """Runs, inside `shard_map`, the experts that one device holds; b counts the device's own rows."""
    rows, holders, units = layout
    shape = x.shape
    if layout.exchanges_tokens:
        gather = functools.partial(jax.lax.all_gather, axis_name=holders, tiled=True)
        x, chosen = gather(x), gather(chosen)  # [more b, S, ...] each
        weights, kept = gather(weights), gather(kept)
    choices = (chosen, weights, kept)
    chosen, weights, kept = (a.reshape(-1, a.shape[-1]) for a in choices)  # [N, K] each

    held = experts.up.kernel[...].shape[0]
    first = held * (jax.lax.axis_index(holders) if holders else 0)
    chosen = chosen - first  # numbers among the experts held here
    kept = kept & (chosen >= 0) & (chosen < held)

    gathered = x.shape
    x = varying(x, [axis for axis in (*holders, *units) if axis not in rows])
    axes = tuple(dict.fromkeys((*rows, *holders, *units)))
    own = _of_this_device(experts, layout)
    tokens = x.reshape(-1, x.shape[-1])  # [N, D]
    y = _sort_and_run(chosen_way, own, tokens, chosen, weights, kept, axes)
    y = y.reshape(gathered)  # [more b, S, D]

    add = jax.lax.psum if _is_checked(chosen_way) else _add_unchecked
    if units:
        y = add(y, units)
    if layout.exchanges_tokens:
        return jax.lax.psum_scatter(y, holders, tiled=True).reshape(shape)  # [b, S, D]
    return add(y, holders) if holders else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _add_unchecked(y: Float[Array, "b S D"], axes: tuple[str, ...]) -> Float[Array, "b S D"]:
    """Adds up over `axes`, inside a shard_map without checks, whose gradient sends nothing.

    There every device is given an equal part of the gradient. The automatic gradient adds these up by
    messages; multiplying does as well.
    """
    return jax.lax.psum(y, axes)


_add_unchecked.defvjp(
    lambda y, axes: (_add_unchecked(y, axes), None),
    lambda axes, _, dy: (dy * jax.lax.axis_size(axes),),
)


def _of_this_device(experts: Mlp, layout: ExpertLayout) -> Mlp:
    """Prepares a device's experts for products whose results are summed over the devices.

    Kernels become varying over the axes of the rows, as `block_product` needs. Devices that split
    the hidden units each add the bias of `down`, so each adds its share of it.
    """
    others = [axis for axis in layout.rows if axis not in layout.holders]

    def prepare(path: tuple, leaf: Array) -> Array:
        if leaf.ndim == 3:
            return varying(leaf, others)
        if layout.units and _in_down(path):
            return leaf / jax.lax.axis_size(layout.units)
        return leaf

    return jax.tree_util.tree_map_with_path(prepare, experts)


def _pad_experts(experts: Mlp) -> Mlp:
    """Appends phantom experts when the mesh cannot split the experts evenly.

    Phantoms are zeros that no token is sent to: their gradient is zero, and the padding's own
    gradient cuts it off.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shares = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in AXES["expert"])
    more = -experts.up.kernel[...].shape[0] % shares
    return jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, more)] + [(0, 0)] * (leaf.ndim - 1)),
        experts,
    )


def _sort_and_run(
    chosen_way: Way,
    experts: Mlp,
    x: Float[Array, "N D"],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    kept: Bool[Array, "N K"],
    axes: tuple[str, ...] = (),
) -> Float[Array, "N D"]:
    """Sorts the kept choices by expert and runs each linear of all experts as one grouped product.

    `chosen` counts among these experts and may lie outside of them where `kept` is false. `axes`:
    see block_product.
    """
    count = experts.up.kernel[...].shape[0]
    blocks = make_blocks(chosen, kept, count, chosen_way)
    last = count - 1

    def linear(layer: Linear, x: Float[Array, "M b D"]) -> Float[Array, "M b F"]:
        y = block_product(x, layer.kernel[...], blocks.owners, chosen_way, axes)
        if layer.bias is None:
            return y
        return y + layer.bias[...][blocks.owners.clip(max=last), None]

    def run(rows: Array) -> Array:
        x = rows.reshape(len(blocks.owners), blocks.size, -1)  # [M, b, D]
        hidden = linear(experts.up, x)
        act = ACTIVATIONS[experts.activation]
        hidden = act(hidden) if experts.gate is None else act(linear(experts.gate, x)) * hidden
        return linear(experts.down, hidden).reshape(rows.shape)  # [M * b, D]

    chosen = jnp.clip(chosen, 0, last)
    places = blocks.starts[chosen] + positions_in_expert(chosen, kept, count)
    return _scatter_run_gather(run, x, places, len(blocks.owners) * blocks.size, weights, kept)
