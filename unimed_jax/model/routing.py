"""Routes tokens to the decoder's experts: which ones a token goes to, within their capacity.

Nothing here runs an expert; `dispatch.py` does. The rules are those of GShard (arXiv 2006.16668)
and DeepSpeed-MoE (arXiv 2201.05596), which Med-MoE (arXiv 2404.10237) uses. Shapes: N tokens, E
experts, K choices per token.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from unimed_jax.config import MoeConfig


class Noise(NamedTuple):
    """Holds the random numbers of one layer's routing; None switches a field's step off."""

    # [N, E] in (0, 1): random token selection. When an expert is over capacity (top-1), it keeps
    # the tokens with the largest numbers instead of the first ones.
    uniform: Array | None = None
    # [N, E] standard Gumbel, added to the logits before the choice (top-1, "rsample") or before the
    # second choice (top-2), which makes that choice a draw instead of a maximum.
    gumbel: Array | None = None
    # [N, D] in (0.99, 1.01): the router's input is multiplied by it.
    jitter: Array | None = None


class Routing(NamedTuple):
    """Describes where N tokens go, with K choices each."""

    logits: Array  # [N, E] float32
    experts: Array  # [N, K] int32
    weights: Array  # [N, K] float32, 0 for a choice that is not kept
    kept: Array  # [N, K] bool; false for unused tokens and for choices beyond an expert's capacity
    counts: Array  # [E] int32; tokens whose first choice is this expert, before any token is dropped
    aux: Array  # [] float32; the balancing loss


def draw_noise(
    key: Key[Array, ""],
    tokens: int,
    width: int,
    config: MoeConfig,
    training: bool,
) -> Noise:
    """Draws the noise that the settings ask for, for `tokens` tokens of `width` channels.

    At evaluation only the parts that `config.random` switches on are drawn (the caller asks for
    them with `eval_noise`); `gate_noise` belongs to training.
    """
    keys = jax.random.split(key, 3)
    factor = config.capacity_factor if training else config.eval_capacity_factor
    selects_at_random = config.top_k == 1 and config.random and factor is not None
    draws_second_choice = config.top_k == 2 and config.random
    draws_first_choice = training and config.gate_noise == "rsample"
    shape = (tokens, config.experts)

    uniform = gumbel = jitter = None
    if selects_at_random:
        uniform = jax.random.uniform(keys[0], shape)
    if draws_second_choice or draws_first_choice:
        gumbel = jax.random.gumbel(keys[1], shape)
    if training and config.gate_noise == "jitter":
        jitter = jax.random.uniform(keys[2], (tokens, width), minval=0.99, maxval=1.01)
    return Noise(uniform, gumbel, jitter)


def expert_capacity(tokens: int, config: MoeConfig, training: bool) -> int | None:
    """Computes how many tokens an expert may take: factor * top_k * tokens / experts, rounded up.

    None means that there is no limit. A limit is at least `config.min_capacity`.
    """
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor is None:
        return None
    # In float32, because the original rounds there and the last bit decides what "rounded up" is.
    exact = np.float32(tokens / config.experts) * np.float32(factor * config.top_k)
    return max(math.ceil(exact), config.min_capacity)


def route(
    logits: Float[Array, "N E"],
    top_k: int,
    capacity: int | None = None,
    used: Bool[Array, "N"] | None = None,
    noise: Noise = Noise(),
) -> Routing:
    """Chooses each token's experts and weights from the router's logits.

    With top_k 1 the weight is the expert's softmax probability. With top_k 2 it is the probability
    divided by the sum over the token's kept choices.

    `capacity` limits the tokens of each expert (None: no limit). Top-1 keeps the tokens with the
    largest `noise.uniform` (random token selection), without it the first ones. Top-2 keeps tokens
    in their order, all first choices before any second choice. `used` [N] marks the tokens that are
    routed and counted (None: all of them).
    """
    logits = logits.astype(jnp.float32)
    tokens, experts = logits.shape
    used = jnp.ones(tokens, bool) if used is None else used
    probs = jax.nn.softmax(logits, axis=-1)

    choices = _choose(logits, probs, top_k, noise.gumbel)  # K of [N]
    masks = [jax.nn.one_hot(c, experts, dtype=bool) & used[:, None] for c in choices]  # K of [N, E]
    if capacity is None or capacity >= tokens:
        fitting = [used] * top_k
    else:
        fitting = _within_capacity(masks, capacity, noise.uniform)
    chosen = jnp.stack(choices, axis=1).astype(jnp.int32)  # [N, K]
    kept = jnp.stack(fitting, axis=1)  # [N, K]

    weights = jnp.where(kept, jnp.take_along_axis(probs, chosen, axis=1), 0)
    if top_k == 2:
        weights /= jnp.maximum(weights.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).eps)
    counts = masks[0].sum(axis=0, dtype=jnp.int32)
    return Routing(logits, chosen, weights, kept, counts, balance(probs, masks[0], used))


def _choose(
    logits: Float[Array, "N E"],
    probs: Float[Array, "N E"],
    top_k: int,
    gumbel: Float[Array, "N E"] | None,
) -> list[Array]:
    """Picks the first and, with top-2, the second expert of each token: K arrays [N]."""
    noised = logits if gumbel is None else logits + gumbel
    if top_k == 1:
        return [jnp.argmax(noised, axis=-1)]
    first = jnp.argmax(probs, axis=-1)  # never noised: only the second choice is drawn
    is_first = jax.nn.one_hot(first, logits.shape[1], dtype=bool)
    return [first, jnp.argmax(jnp.where(is_first, -jnp.inf, noised), axis=-1)]


def _within_capacity(
    masks: list[Array],
    capacity: int,
    order: Float[Array, "N E"] | None,
) -> list[Array]:
    """Decides which choices fit their expert: K masks [N, E] of choices -> K arrays [N] bool."""
    if len(masks) == 1:
        return [(masks[0] & _largest(masks[0], order, capacity)).any(axis=1)]
    # All first choices take their positions before any second choice.
    positions = jnp.cumsum(jnp.concatenate(masks), axis=0) - 1  # [2 N, E]
    fits = jnp.concatenate(masks) & (positions < capacity)
    return list(fits.any(axis=1).reshape(2, -1))  # 2 of [N]


def _largest(
    mask: Bool[Array, "N E"],
    order: Float[Array, "N E"] | None,
    capacity: int,
) -> Bool[Array, "N E"]:
    """Keeps, for each expert, the `capacity` tokens with the largest `order`.

    Without `order` it keeps the first ones.
    The result may also mark tokens outside `mask`; the caller intersects the two.
    """
    if order is None:
        return jnp.cumsum(mask, axis=0) <= capacity
    rows = jax.lax.top_k(jnp.where(mask, order, -1.0).T, capacity)[1]  # [E, capacity]
    experts = jnp.arange(len(rows))[:, None]
    return jnp.zeros(mask.T.shape, bool).at[experts, rows].set(True).T  # [N, E]


def balance(
    probs: Float[Array, "N E"],
    first: Bool[Array, "N E"],
    counted: Bool[Array, "N"],
) -> Float[Array, ""]:
    """Computes the balancing loss of the experts.

    It is E * sum over experts of mean probability * share of first choices.

    Mean and share are taken over the `counted` tokens. It is 1 when the tokens are spread evenly.
    """
    weight = counted.astype(jnp.float32)
    weight /= jnp.maximum(weight.sum(), 1)
    shares = jnp.einsum("n,ne->e", weight, first.astype(jnp.float32))
    return probs.shape[1] * (jnp.einsum("n,ne->e", weight, probs) * shares).sum()


def positions_in_expert(
    experts: Int[Array, "N K"],
    kept: Bool[Array, "N K"],
    count: int,
) -> Int[Array, "N K"]:
    """Numbers the kept choices of each of `count` experts from 0; -1 for choices that are not kept.

    First choices come before second choices, and tokens keep their order within each.
    """
    mask = jax.nn.one_hot(experts.T, count, dtype=jnp.int32) * kept.T[..., None]  # [K, N, E]
    positions = jnp.cumsum(mask.reshape(-1, count), axis=0).reshape(mask.shape) - 1  # [K, N, E]
    own = jnp.take_along_axis(positions, experts.T[..., None], axis=2)[..., 0].T  # [N, K]
    return jnp.where(kept, own, -1)
