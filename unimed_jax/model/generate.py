"""Generates text, one token after another, in one jitted loop over a key-value cache.

Shapes: B rows, P tokens of a prompt, `new` tokens of an answer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from unimed_jax.model.decoder import Cache, Span
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import Batch, UniMed, span_of


class Sampling(NamedTuple):
    """Says how the next token is picked; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0


def pick(
    logits: Float[Array, "B vocab"],
    sampling: Sampling,
    key: Key[Array, ""] | None,
) -> Int[Array, "B"]:
    """Picks the likeliest token, or draws from the smallest set whose probabilities reach `top_p`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert key is not None
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(
            ordered,
            axis=-1,
        )
        in_set = before < sampling.top_p  # the tokens before it do not reach top_p yet
        least = jnp.min(jnp.where(in_set, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def extended_span(batch: Batch, new: int) -> Span:
    """Describes left-padded prompts and `new` places after them for the answer: [B, P + new]."""
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
    """Answers left-padded prompts (data/layout.py); places after the end-of-text token hold `pad`.

    Stops as soon as every row has ended. Compiles once per (rows, prompt length, max_new_tokens),
    so callers round prompt lengths up to a few sizes. `eos`, `pad`: token ids. `key`: needed if the
    temperature is not 0.
    """
    graph, state = nnx.split(model)
    return _generate(graph, state, batch, max_new_tokens, eos, pad, sampling, key)


class Decoding(NamedTuple):
    """Holds what one step of the loop hands to the next."""

    done: Array  # [] int32: tokens picked so far
    token: Array  # [B] int32: the newest
    ended: Array  # [B] bool: rows that have reached the end of text
    out: Array  # [B, new] int32
    cache: Cache | None


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "eos", "pad", "sampling"))
def _generate(
    graph,
    state,
    batch: Batch,
    max_new_tokens: int,
    eos: int,
    pad: int,
    sampling: Sampling,
    key,
):
    """Runs `generate` on the split model: the whole prompt, then one token after another."""
    model: UniMed = nnx.merge(graph, state)
    decoder, dtype = model.decoder, model.config.compute_dtype
    rows, prompt = batch["tokens"].shape
    span = extended_span(batch, max_new_tokens)
    x, _ = model.embed(batch)
    here = Span(*(s[:, :prompt] for s in span))
    noise = jax.random.key(0) if model.config.moe.eval_noise else None
    hidden, cache, *_ = decoder(x, here, decoder.empty_cache(span, dtype), 0, noise=noise)
    keys = None if key is None else jax.random.split(key, max_new_tokens)

    def next_token(hidden: Array, number: Array | int, ended: Array) -> tuple[Array, Array]:
        """Picks the next token from the last hidden state; rows that have ended get `pad`."""
        token_key = None if keys is None else keys[number]
        token = pick(decoder.logits(hidden[:, -1]), sampling, token_key)
        return jnp.where(ended, pad, token), ended | (token == eos)

    def unfinished(step: Decoding) -> Array:
        return (step.done < max_new_tokens) & ~jnp.all(step.ended)

    def decode(step: Decoding) -> Decoding:
        place = prompt + step.done - 1
        here = Span(*(jax.lax.dynamic_slice_in_dim(s, place, 1, axis=1) for s in span))
        drawn = None if noise is None else jax.random.fold_in(noise, step.done)
        x = decoder.embed(step.token[:, None], dtype)
        hidden, cache, *_ = decoder(x, here, step.cache, place, noise=drawn)
        token, ended = next_token(hidden, step.done, step.ended)
        return Decoding(step.done + 1, token, ended, step.out.at[:, step.done].set(token), cache)

    token, ended = next_token(hidden, 0, jnp.zeros(rows, bool))
    out = jnp.full((rows, max_new_tokens), pad, jnp.int32).at[:, 0].set(token)
    first = Decoding(jnp.int32(1), token, ended, out, cache)
    out = jax.lax.while_loop(unfinished, decode, first).out
    return constrain(out, None, None)  # every process reads all answers
