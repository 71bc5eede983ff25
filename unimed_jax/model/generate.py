"""Generation: prefill and decode in one jitted loop over a key-value cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from unimed_jax.model.decoder import Span
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import Batch, UniMed, span_of


class Sampling(NamedTuple):
    """How the next token is picked; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0


def pick(logits: Float[Array, "B vocab"], sampling: Sampling, key: Key[Array, ""] | None) -> Int[Array, "B"]:
    """Greedy, or a draw from the smallest set of tokens whose probabilities reach `top_p`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert key is not None
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def extended_span(batch: Batch, new: int) -> Span:
    """The span of left-padded prompts [B, P] and of `new` places behind them, [B, P + new]."""
    span = span_of(batch)
    last = span.positions[:, -1:]
    positions = jnp.concatenate([span.positions, last + 1 + jnp.arange(new)[None]], axis=1)
    tail = jnp.ones((last.shape[0], new), jnp.int32)
    segments = jnp.concatenate([span.segments, span.segments[:, -1:] * tail], axis=1)
    prefixes = jnp.concatenate([span.prefixes, span.prefixes[:, -1:] * tail], axis=1)
    return Span(positions, segments, prefixes)


def generate(
    model: UniMed,
    batch: Batch,
    *,
    max_new_tokens: int,
    eos: int,
    pad: int,
    sampling: Sampling = Sampling(),
    key: Key[Array, ""] | None = None,
) -> Int[Array, "B new"]:
    """Answers to left-padded prompts (data/layout.py); places after the end-of-text token hold `pad`.

    Stops as soon as every row has ended. Compiles once per (rows, prompt length, max_new_tokens): callers
    keep prompt lengths in buckets.
    """
    graph, state = nnx.split(model)
    return _generate(graph, state, batch, max_new_tokens, eos, pad, sampling, key)


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "eos", "pad", "sampling"))
def _generate(graph, state, batch: Batch, max_new_tokens: int, eos: int, pad: int, sampling: Sampling, key):
    model: UniMed = nnx.merge(graph, state)
    decoder, dtype = model.decoder, model.config.compute_dtype
    rows, prompt = batch["tokens"].shape
    span = extended_span(batch, max_new_tokens)
    x, _ = model.embed(batch)
    here = Span(*(s[:, :prompt] for s in span))
    noise = jax.random.key(0) if model.config.moe.eval_noise else None
    hidden, cache, *_ = decoder(x, here, decoder.empty_cache(span, dtype), 0, noise=noise)
    keys = None if key is None else jax.random.split(key, max_new_tokens)

    def next_token(hidden, n, ended):
        token = pick(decoder.logits(hidden[:, -1]), sampling, None if keys is None else keys[n])
        return jnp.where(ended, pad, token), ended | (token == eos)

    token, ended = next_token(hidden, 0, jnp.zeros(rows, bool))
    out = jnp.full((rows, max_new_tokens), pad, jnp.int32).at[:, 0].set(token)

    def unfinished(carry):
        n, _, ended, _, _ = carry
        return (n < max_new_tokens) & ~jnp.all(ended)

    def decode(carry):
        n, token, ended, out, cache = carry
        place = prompt + n - 1
        here = Span(*(jax.lax.dynamic_slice_in_dim(s, place, 1, axis=1) for s in span))
        step = None if noise is None else jax.random.fold_in(noise, n)
        hidden, cache, *_ = decoder(decoder.embed(token[:, None], dtype), here, cache, place, noise=step)
        token, ended = next_token(hidden, n, ended)
        return n + 1, token, ended, out.at[:, n].set(token), cache

    out = jax.lax.while_loop(unfinished, decode, (jnp.int32(1), token, ended, out, cache))[3]
    return constrain(out, None, None)  # every process reads all answers
