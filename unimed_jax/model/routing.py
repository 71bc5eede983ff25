"""Routing of the decoder's experts: which experts a token passes, within their capacity, and the balancing loss."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from unimed_jax.config import MoeConfig


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


def slots(experts: Int[Array, "N K"], kept: Bool[Array, "N K"], count: int) -> Int[Array, "N K"]:
    """Each kept choice's place among those of its expert, first choices before second ones; -1 where not kept."""
    mask = jax.nn.one_hot(experts.T, count, dtype=jnp.int32) * kept.T[..., None]  # [K, N, E]
    places = jnp.cumsum(mask.reshape(-1, count), axis=0).reshape(mask.shape) - 1  # [K, N, E]
    return jnp.where(kept, jnp.take_along_axis(places, experts.T[..., None], axis=2)[..., 0].T, -1)
