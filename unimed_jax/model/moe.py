"""The decoder's mixture of experts (Med-MoE, arXiv 2404.10237): a router, experts, and the meta expert.

`route` decides, `Moe` runs the experts, in one of three ways that mean the same: `dense` runs every expert on every
token and is the reference; `grouped` sorts the tokens by expert and drops none that was routed; `capacity` gives each
expert a buffer of fixed size. Gating as in GShard (arXiv 2006.16668) and DeepSpeed-MoE (arXiv 2201.05596).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from unimed_jax.config import DecoderConfig, MoeConfig
from unimed_jax.model.layers import ACTIVATIONS, Linear, Mlp, spread, stack
from unimed_jax.model.sharding import AXES, constrain, shared


class Noise(NamedTuple):
    """Random numbers of one layer's routing of N tokens; None: that step is done without."""

    uniform: Array | None = None  # [N, E] in (0, 1): who finds room (top-1)
    gumbel: Array | None = None  # [N, E] standard Gumbel: the choice (top-1 "rsample"), the second choice (top-2)
    jitter: Array | None = None  # [N, D] in (0.99, 1.01): factors of the router's input


class Routing(NamedTuple):
    """Where N tokens go; K choices each."""

    logits: Array  # [N, E] float32
    experts: Array  # [N, K] int32
    weights: Array  # [N, K] float32, 0 where a choice is not kept
    kept: Array  # [N, K] bool: false for unused tokens and where an expert had no room
    counts: Array  # [E] int32: tokens whose first choice is this expert, before any is dropped
    aux: Array  # [] float32: the balancing loss


def draw_noise(key: Key[Array, ""], tokens: int, width: int, config: MoeConfig, training: bool) -> Noise:
    """What the settings ask for; at evaluation `random` alone (with `eval_noise`)."""
    keys = jax.random.split(key, 3)
    limited = (config.capacity_factor if training else config.eval_capacity_factor) is not None
    drawn = config.top_k == 2 and config.random or training and config.gate_noise == "rsample"
    shape = (tokens, config.experts)
    return Noise(
        uniform=jax.random.uniform(keys[0], shape) if config.top_k == 1 and config.random and limited else None,
        gumbel=jax.random.gumbel(keys[1], shape) if drawn else None,
        jitter=(
            jax.random.uniform(keys[2], (tokens, width), minval=0.99, maxval=1.01)
            if training and config.gate_noise == "jitter"
            else None
        ),
    )


def capacity(tokens: int, config: MoeConfig, training: bool) -> int | None:
    """Tokens that an expert has room for, None without a limit: factor * top_k * tokens / experts, rounded up.

    In float32, as the original rounds.
    """
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor is None:
        return None
    room = np.float32(tokens / config.experts) * np.float32(factor * config.top_k)
    return max(math.ceil(room), config.min_capacity)


def route(
    logits: Float[Array, "N E"],
    top_k: int,
    room: int | None = None,
    used: Bool[Array, "N"] | None = None,
    noise: Noise = Noise(),
) -> Routing:
    """Choices and weights from the router's logits.

    top_k 1: the weight is the softmax probability. 2: the probabilities of the choices that found room, divided by
    their sum. `room`: of each expert, in tokens. Top-1 fills it in the order of `noise.uniform`, the largest first
    (random token selection), else in the order of tokens; top-2 with all first choices before the second ones.
    `used` [N]: the tokens that are routed and counted at all (None: every one).
    """
    logits = logits.astype(jnp.float32)
    tokens, count = logits.shape
    used = jnp.ones(tokens, bool) if used is None else used
    probs = jax.nn.softmax(logits, axis=-1)
    noised = logits if noise.gumbel is None else logits + noise.gumbel
    first = jnp.argmax(noised if top_k == 1 else probs, axis=-1)
    chosen = [first]
    if top_k == 2:
        chosen.append(jnp.argmax(jnp.where(jax.nn.one_hot(first, count, dtype=bool), -jnp.inf, noised), axis=-1))
    masks = [jax.nn.one_hot(c, count, dtype=bool) & used[:, None] for c in chosen]  # [N, E] each
    if room is None or room >= tokens:
        kept = [used] * top_k
    elif top_k == 1:
        kept = [(masks[0] & _largest(masks[0], noise.uniform, room)).any(axis=1)]
    else:
        # Places in the experts' buffers: all first choices before any second one.
        places = jnp.cumsum(jnp.concatenate(masks), axis=0) - 1  # [2 N, E]
        found = jnp.concatenate(masks) & (places < room)
        kept = list(found.any(axis=1).reshape(2, tokens))
    experts, kept_ = jnp.stack(chosen, axis=1).astype(jnp.int32), jnp.stack(kept, axis=1)  # [N, K]
    weights = jnp.where(kept_, jnp.take_along_axis(probs, experts, axis=1), 0)
    if top_k == 2:
        weights /= jnp.maximum(weights.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).eps)
    counts = masks[0].sum(axis=0, dtype=jnp.int32)
    return Routing(logits, experts, weights, kept_, counts, balance(probs, masks[0], used))


def _largest(mask: Bool[Array, "N E"], order: Float[Array, "N E"] | None, room: int) -> Bool[Array, "N E"]:
    """Of each expert's tokens the `room` ones of the largest `order`, or the first ones."""
    if order is None:
        return jnp.cumsum(mask, axis=0) <= room
    rows = jax.lax.top_k(jnp.where(mask, order, -1.0).T, room)[1]  # [E, room]
    return jnp.zeros(mask.T.shape, bool).at[jnp.arange(len(rows))[:, None], rows].set(True).T  # [N, E]


def balance(probs: Float[Array, "N E"], first: Bool[Array, "N E"], counted: Bool[Array, "N"]) -> Float[Array, ""]:
    """The balancing loss, experts * sum(mean probability * share of first choices), means over `counted` tokens."""
    weight = counted.astype(jnp.float32)
    weight /= jnp.maximum(weight.sum(), 1)
    shares = jnp.einsum("n,ne->e", weight, first.astype(jnp.float32))
    return probs.shape[1] * (jnp.einsum("n,ne->e", weight, probs) * shares).sum()


def slots(routing: Routing) -> Int[Array, "N K"]:
    """Each kept choice's place in its expert's buffer, first choices before second ones; -1 where it is not kept."""
    count = routing.counts.shape[0]
    mask = jax.nn.one_hot(routing.experts.T, count, dtype=jnp.int32) * routing.kept.T[..., None]  # [K, N, E]
    places = jnp.cumsum(mask.reshape(-1, count), axis=0).reshape(mask.shape) - 1  # [K, N, E]
    return jnp.where(routing.kept, jnp.take_along_axis(places, routing.experts.T[..., None], axis=2)[..., 0].T, -1)


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
    """Each expert on a buffer of `room` tokens, filled and emptied by matrix products (GShard algorithm 2)."""
    experts = _divisible(experts)
    count = experts.up.kernel[...].shape[0]
    at = jax.nn.one_hot(routing.experts, count, dtype=x.dtype)  # [N, K, E]
    places = jax.nn.one_hot(slots(routing), room, dtype=x.dtype)  # [N, K, C], zeros where not kept
    dispatch = jnp.einsum("nke,nkc->nec", at, places)
    buffer = constrain(jnp.einsum("nec,nd->ecd", dispatch, x), "expert", "capacity", None)
    out = constrain(jax.vmap(lambda expert, tokens: expert(tokens))(experts, buffer), "expert", "capacity", None)
    combine = jnp.einsum("nke,nkc->nec", at * routing.weights.astype(x.dtype)[..., None], places)
    return jnp.einsum("nec,ecd->nd", combine, out)


def run_grouped(experts: Mlp, x: Float[Array, "B S D"], routing: Routing) -> Float[Array, "B S D"]:
    """Each expert on its own tokens, whatever their number; over a mesh each device runs its own experts.

    Devices that share experts out exchange tokens: they gather those of their group of rows, run what is theirs
    and add up the parts of every token.
    """
    batch, length, _ = x.shape
    choices = (routing.experts, routing.weights, routing.kept)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _sorted(experts, x.reshape(-1, x.shape[-1]), *choices).reshape(x.shape)  # [B, S, D]
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
        y = _sorted(experts, x.reshape(-1, x.shape[-1]), chosen, weights, kept).reshape(x.shape)
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


def _sorted(
    experts: Mlp,
    x: Float[Array, "N D"],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    kept: Bool[Array, "N K"],
) -> Float[Array, "N D"]:
    """Tokens sorted by expert, one grouped product a linear; what is not kept stands behind all groups, as zeros."""
    (tokens, top_k), count = chosen.shape, experts.up.kernel[...].shape[0]
    key = jnp.where(kept, chosen, count).reshape(-1).astype(jnp.int32)  # [N * K]
    # Not argsort: inside shard_map its result is taken for the same on all devices, and gradients turn wrong.
    key, order = jax.lax.sort((key, jax.lax.iota(jnp.int32, tokens * top_k)), num_keys=1)
    sizes = (key[:, None] == jnp.arange(count)[None]).sum(axis=0, dtype=jnp.int32)
    inside = (key < count)[:, None]
    group = jnp.minimum(key, count - 1)

    def linear(layer: Linear, x):
        y = jax.lax.ragged_dot(x, layer.kernel[...].astype(x.dtype), sizes)
        y = y if layer.bias is None else y + layer.bias[...].astype(x.dtype)[group]
        return jnp.where(inside, y, 0)  # nothing says what the product leaves behind its groups

    x = x[order // top_k]  # [N * K, D]
    hidden = linear(experts.up, x)
    act = ACTIVATIONS[experts.activation]
    hidden = act(hidden) if experts.gate is None else act(linear(experts.gate, x)) * hidden
    y = linear(experts.down, hidden)
    y = y * weights.reshape(-1)[order].astype(y.dtype)[:, None]
    # Back in the tokens' own order, the choices of a token side by side.
    back = jax.lax.sort((order, jax.lax.iota(jnp.int32, tokens * top_k)), num_keys=1)[1]
    return y[back].reshape(tokens, top_k, -1).sum(axis=1)  # [N, D]


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
