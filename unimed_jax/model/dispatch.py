"""The decoder's mixture of experts (Med-MoE, arXiv 2404.10237): a router, experts, and the meta expert.

`route` decides, `Moe` runs the experts, in one of three ways that mean the same: `dense` runs every expert on every
token and is the reference; `grouped` sorts the tokens by expert and drops none that was routed; `capacity` gives each
expert a buffer of fixed size. Gating as in GShard (arXiv 2006.16668) and DeepSpeed-MoE (arXiv 2201.05596).
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from unimed_jax.config import DecoderConfig, MoeConfig
from unimed_jax.model.attention import hardware
from unimed_jax.model.layers import ACTIVATIONS, Linear, Mlp, spread, stack
from unimed_jax.model.routing import Noise, Routing, capacity, route, slots
from unimed_jax.model.sharding import AXES, constrain, shared

# --------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------


class Moe(nnx.Module):
    """sum of weight * expert(x) over a token's choices, plus meta(x).

    With `residual`: c0 * that sum + c1 * residual(x) + meta(x), c = softmax of a linear of x. Experts are stacked:
    up kernel [E, D, F], down kernel [E, F, D], biases [E, F] and [E, D].
    """

    def __init__(self, config: MoeConfig, decoder: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.router = Linear(decoder.width, config.experts, rngs=rngs)
        self.experts = stack(lambda r: Mlp(decoder, None, r), config.experts, rngs)
        self.meta = Mlp(decoder, None, rngs) if config.meta else None
        self.residual = Mlp(decoder, None, rngs) if config.residual else None
        self.coefficient = Linear(decoder.width, 2, rngs=rngs) if config.residual else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        used: Bool[Array, "B S"] | None = None,
        noise: Noise = Noise(),
        training: bool = False,
    ) -> tuple[Float[Array, "B S D"], Routing]:
        """`used`: the tokens that are routed (None: all); the others get meta(x) alone."""
        batch, length, width = x.shape
        room = capacity(batch * length, self.config, training)
        routing = route(
            self.logits(x.reshape(-1, width), noise.jitter),  # [N, D] in
            self.config.top_k,
            room,
            None if used is None else used.reshape(-1),  # [N]
            noise,
        )
        if self.config.path == "dense":
            y = run_dense(self.experts, x.reshape(-1, width), routing).reshape(x.shape)  # [B, S, D]
        elif self.config.path == "capacity" and room is not None:
            y = run_capacity(self.experts, x.reshape(-1, width), routing, room).reshape(x.shape)  # [B, S, D]
        else:
            y = run_grouped(self.experts, x, routing)
        if self.residual is not None and self.coefficient is not None:
            share = jax.nn.softmax(self.coefficient(x).astype(jnp.float32), axis=-1).astype(x.dtype)
            y = y * share[..., :1] + self.residual(x) * share[..., 1:]
        return y if self.meta is None else y + self.meta(x), routing

    def logits(self, x: Float[Array, "N D"], jitter: Float[Array, "N D"] | None = None) -> Float[Array, "N E"]:
        """In float32 whatever the compute dtype: a rounded logit changes the expert."""
        x = x.astype(jnp.float32)
        x = x if jitter is None else x * jitter
        assert self.router.bias is not None
        kernel, bias = (leaf[...].astype(jnp.float32) for leaf in (self.router.kernel, self.router.bias))
        logits = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
        return logits + spread(bias, logits)


def run_dense(experts: Mlp, x: Float[Array, "N D"], routing: Routing) -> Float[Array, "N D"]:
    """Every expert on every token; the reference."""
    every = jax.vmap(lambda expert: expert(x))(experts)  # [E, N, D]
    chosen = jax.nn.one_hot(routing.experts, every.shape[0])  # [N, K, E]
    weights = jnp.einsum("nk,nke->ne", routing.weights, chosen)
    return jnp.einsum("ne,end->nd", weights.astype(x.dtype), every)


def run_capacity(experts: Mlp, x: Float[Array, "N D"], routing: Routing, room: int) -> Float[Array, "N D"]:
    """Each expert on a buffer of `room` tokens, zeros where no token is."""
    experts = _divisible(experts)
    count = experts.up.kernel[...].shape[0]

    def run(rows):
        buffer = constrain(rows.reshape(count, room, -1), "expert", "capacity", None)  # [E, C, D]
        out = jax.vmap(lambda expert, tokens: expert(tokens))(experts, buffer)
        return constrain(out, "expert", "capacity", None).reshape(rows.shape)  # [E * C, D]

    places = routing.experts * room + slots(routing.experts, routing.kept, count)
    return _through(run, x, places, count * room, routing.weights, routing.kept)


def _through(
    run, x: Float[Array, "N D"], places: Int[Array, "N K"], rows: int, weights: Float[Array, "N K"], kept
) -> Float[Array, "N D"]:
    """Tokens into `rows` rows at their kept `places` (one each), through `run`, and back with their weights."""
    places = jnp.where(kept, places, rows)  # behind the end
    tokens = jnp.broadcast_to(jnp.arange(len(x))[:, None], places.shape)
    held = jnp.full(rows, len(x)).at[places].set(tokens, mode="drop")
    out = run(x.at[held].get(mode="fill", fill_value=0))  # [rows, D]
    chosen = out.at[places].get(mode="fill", fill_value=0)  # [N, K, D]
    return jnp.einsum("nk,nkd->nd", weights.astype(x.dtype), chosen)


def run_grouped(experts: Mlp, x: Float[Array, "B S D"], routing: Routing) -> Float[Array, "B S D"]:
    """Each expert on its own tokens, whatever their number; over a mesh each device runs its own experts.

    Devices that share experts out exchange tokens: they gather those of their group of rows, run what is theirs
    and add up the parts of every token.
    """
    batch, length, _ = x.shape
    choices = (routing.experts, routing.weights, routing.kept)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _grouped(experts, x.reshape(-1, x.shape[-1]), *choices).reshape(x.shape)  # [B, S, D]
    experts = _divisible(experts)
    count, _, hidden = experts.up.kernel[...].shape
    rows, holders, units = shared((batch, count, hidden), ("batch", "expert", "mlp"), dict(mesh.shape))
    spread_rows = bool(set(holders) & set(rows))  # the rows too, over the devices that hold different experts
    assert not spread_rows or set(holders) <= set(rows)

    def on_device(experts, x, *choices):
        shape = x.shape
        gathered = list(choices)
        if spread_rows:
            x, *gathered = (jax.lax.all_gather(a, holders, tiled=True) for a in (x, *choices))  # [more B, S, ...]
        chosen, weights, kept = (a.reshape(-1, a.shape[-1]) for a in gathered)  # [N, K] each
        own = experts.up.kernel[...].shape[0]
        chosen = chosen - own * (jax.lax.axis_index(holders) if holders else 0)
        kept = kept & (chosen >= 0) & (chosen < own)
        if units and experts.down.bias is not None:  # each device of a unit's group adds its share of the bias
            experts.down.bias = nnx.Param(experts.down.bias[...] / jax.lax.axis_size(units))
        x = varying(x, [axis for axis in (*holders, *units) if axis not in rows])
        others = [axis for axis in rows if axis not in holders]
        for part in (experts.gate, experts.up, experts.down):
            if part is not None:
                part.kernel = nnx.Param(varying(part.kernel[...], others))
        axes = tuple(dict.fromkeys((*rows, *holders, *units)))
        y = _grouped(experts, x.reshape(-1, x.shape[-1]), chosen, weights, kept, axes).reshape(x.shape)
        y = jax.lax.psum(y, units) if units else y
        if spread_rows:
            return jax.lax.psum_scatter(y, holders, tiled=True).reshape(shape)
        return jax.lax.psum(y, holders) if holders else y

    def place(keys, leaf) -> PartitionSpec:
        down = any(getattr(key, "name", None) == "down" for key in keys)
        if leaf.ndim == 3:
            return PartitionSpec(holders, units, None) if down else PartitionSpec(holders, None, units)
        return PartitionSpec(holders, None) if down else PartitionSpec(holders, units)

    shaped = [a.reshape(batch, length, -1) for a in choices]  # [B, S, K] each
    return jax.shard_map(
        on_device,
        in_specs=(jax.tree_util.tree_map_with_path(place, experts), *(PartitionSpec(rows),) * 4),
        out_specs=PartitionSpec(rows),
    )(experts, x, *shaped)


def _divisible(experts: Mlp) -> Mlp:
    """The experts, with phantom ones behind them where the mesh cannot share them out evenly.

    These are zeros that no token is sent to, so their gradient is zero and is cut off again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shares = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in AXES["expert"])
    more = -experts.up.kernel[...].shape[0] % shares
    return jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, more)] + [(0, 0)] * (leaf.ndim - 1)), experts)


def _grouped(
    experts: Mlp,
    x: Float[Array, "N D"],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    kept: Bool[Array, "N K"],
    axes: tuple[str, ...] = (),
) -> Float[Array, "N D"]:
    """Tokens sorted by expert, one grouped product a linear.

    Each expert's rows begin a new block, so that no block has rows of two. What is not kept has no row.
    `axes`: see block_product.
    """
    count, choices = experts.up.kernel[...].shape[0], chosen.size
    # Large enough for a product to be fast, small enough to leave few rows empty.
    block = min(64 if hardware() == "cpu" else 256, max(8, 1 << (choices // count).bit_length()))
    sizes = (jax.nn.one_hot(chosen, count, dtype=jnp.int32) * kept[..., None]).sum(axis=(0, 1))  # [E]
    ends = jnp.cumsum(-(-sizes // block))  # in blocks
    blocks = choices // block + min(count, choices)  # whatever the routing
    owners = jnp.searchsorted(ends, jnp.arange(blocks), side="right").astype(jnp.int32)  # E behind all

    def linear(layer: Linear, x: Float[Array, "M b D"]) -> Float[Array, "M b F"]:
        y = block_product(x, layer.kernel[...].astype(x.dtype), owners, axes)
        return y if layer.bias is None else y + layer.bias[...].astype(x.dtype)[owners.clip(max=count - 1), None]

    def run(rows):
        x = rows.reshape(blocks, block, -1)  # [M, b, D]
        hidden = linear(experts.up, x)
        act = ACTIVATIONS[experts.activation]
        hidden = act(hidden) if experts.gate is None else act(linear(experts.gate, x)) * hidden
        return linear(experts.down, hidden).reshape(rows.shape)  # [M * b, D]

    chosen = jnp.clip(chosen, 0, count - 1)
    starts = (ends - -(-sizes // block)) * block
    places = starts[chosen] + slots(chosen, kept, count)
    return _through(run, x, places, blocks * block, weights, kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def block_product(
    x: Float[Array, "M b D"], kernels: Float[Array, "E D F"], owners: Int[Array, "M"], axes: tuple[str, ...] = ()
) -> Float[Array, "M b F"]:
    """Each block times the kernel of its owner; zeros, at no cost, where there is no such kernel.

    In place of jax.lax.ragged_dot, which on CPU multiplies all rows with every kernel, and at the size of
    StableLM-2 does not compile for a TPU v5e (scoped VMEM). Under shard_map both arrays differ between devices
    over all of `axes`.
    """

    def one(inputs):
        block, owner = inputs
        none = varying(jnp.zeros((block.shape[0], kernels.shape[2]), x.dtype), axes)
        return jax.lax.cond(owner < len(kernels), lambda: block @ kernels[owner], lambda: none)

    return jax.lax.map(one, (x, owners))


def _block_product_forward(x, kernels, owners, axes):
    return block_product(x, kernels, owners, axes), (x, kernels, owners)


def _block_product_backward(axes, kept, dy):
    """One pass over the blocks: automatic gradients would add up a whole [E, D, F] for each."""
    x, kernels, owners = kept

    def one(total, inputs):
        block, dy, owner = inputs

        def add():
            part = jnp.einsum("bd,bf->df", block, dy, preferred_element_type=jnp.float32)
            return total.at[owner].add(part), dy @ kernels[owner].T

        none = varying(jnp.zeros(block.shape, block.dtype), axes)
        return jax.lax.cond(owner < len(kernels), add, lambda: (total, none))

    zeros = varying(jnp.zeros(kernels.shape, jnp.float32), axes)
    total, dx = jax.lax.scan(one, zeros, (x, dy, owners))
    return dx, total.astype(kernels.dtype), None


block_product.defvjp(_block_product_forward, _block_product_backward)


def varying(x: Array, axes: Sequence[str]) -> Array:
    """x as an array that may differ between the devices along `axes`, where it is the same by its type (shard_map)."""
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def upcycled(mlp: dict[str, Array], config: MoeConfig, depth: int) -> dict[str, Array]:
    """A dense decoder's MLP leaves by name ("gate/kernel" ...; stacked over all layers) as those of `mlp` and `moe`.

    Every expert, the meta expert and the residual MLP of a layer start as copies of its MLP; routers and
    coefficients are not among what comes back.
    """
    numbers = list(config.numbers(depth))
    plain = [i for i in range(depth) if i not in numbers]
    out = {}
    for name, leaf in mlp.items():
        experts = jnp.repeat(leaf[jnp.array(numbers)][:, None], config.experts, axis=1)  # [layers, E, ...]
        out[f"moe/experts/{name}"] = experts
        if plain:
            out[f"mlp/{name}"] = leaf[jnp.array(plain)]
        for part in (["meta"] if config.meta else []) + (["residual"] if config.residual else []):
            out[f"moe/{part}/{name}"] = experts[:, 0]
    return out
