"""Generates text by two jitted programs, one for the prompt and one for all further tokens.

The second one computes token after token over a cache.

Shapes: B rows, P tokens of a prompt, `new` tokens of an answer.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from unimed_jax.model.cache import Cache, Span
from unimed_jax.model.decoding import Jitted
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import Batch, UniMed, span_of


class Sampling(NamedTuple):
    """Says how the next token is picked; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0


def pick(
    logits: Float[Array, "B vocab"], sampling: Sampling, key: Key[Array, "..."] | None
) -> Int[Array, "B"]:
    """Picks the most likely token, or draws one at random.

    A token is drawn from the smallest set whose probabilities reach `top_p`.

    `key`: one for all rows, or one for each row [B].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert key is not None
    return draw(logits / sampling.temperature, sampling.top_p, key)


def draw(logits: Float[Array, "B vocab"], top_p: float, key: Key[Array, "..."]) -> Int[Array, "B"]:
    """Draws tokens from logits that are divided by the temperature; the arguments are those of pick."""
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        in_set = before < top_p  # the tokens before it do not reach top_p yet
        least = jnp.min(jnp.where(in_set, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    categorical = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
    return categorical(key, logits).astype(jnp.int32)


def extended_span(batch: Batch, new: int) -> Span:
    """Describes left-padded prompts [B, P] followed by `new` places for the answer: [B, P + new]."""
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
    key: Key[Array, "..."] | None = None,
) -> Int[Array, "B new"]:
    """Answers left-padded prompts (data/layout.py); places after the end-of-text token hold `pad`.

    It stops as soon as every row has ended. It compiles once per (rows, prompt length, max_new_tokens),
    so callers round prompt lengths up to a few sizes. `eos`, `pad`: token ids. `key`: needed if the
    temperature is not 0; one for all rows, or one for each row [B], whose draws then do not depend
    on the other rows.
    """
    parts = _Parts(*nnx.split(model), Ends(eos, pad, sampling), key)
    span, step = _start(parts, batch, max_new_tokens)
    return _advance(parts, span, step, max_new_tokens).out if max_new_tokens > 1 else step.out


def stream(
    model: UniMed,
    batch: Batch,
    *,
    max_new_tokens: int,
    eos: int,
    pad: int,
    sampling: Sampling = Sampling(),
    key: Key[Array, "..."] | None = None,
    chunk: int = 1,
) -> Iterator[Int[np.ndarray, "B n"]]:
    """Yields the tokens of `generate` as they are picked.

    The first one comes alone, then up to `chunk` at a time.

    It runs the compiled programs of `generate`, so both give the same tokens.
    """
    parts = _Parts(*nnx.split(model), Ends(eos, pad, sampling), key)
    span, step = _start(parts, batch, max_new_tokens)
    seen = 0
    while True:
        done, ended = int(step.done), bool(np.all(step.ended))
        yield np.asarray(step.out)[:, seen:done]
        if ended or done == max_new_tokens:
            return
        seen = done
        step = _advance(parts, span, step, min(done + chunk, max_new_tokens))


class Ends(NamedTuple):
    """Says how a token is picked and when a row ends."""

    eos: int
    pad: int
    sampling: Sampling


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("state", "key"), meta_fields=("graph", "ends")
)
@dataclasses.dataclass(frozen=True)
class _Parts:
    """Holds what both programs need: the split model, how tokens are picked, and the random key."""

    graph: Any
    state: Any
    ends: Ends
    key: Array | None

    def model(self) -> UniMed:
        return nnx.merge(self.graph, self.state)

    def noise(self, number: Array | int) -> Array | None:
        """Gives the key of the routers' noise for the token of that number.

        Models without such noise get None.
        """
        if not self.model().config.moe.eval_noise:
            return None
        first = jax.random.key(0)
        return first if isinstance(number, int) and number == 0 else jax.random.fold_in(first, number)

    def next_token(
        self, model: UniMed, hidden: Array, number: Array | int, ended: Array
    ) -> tuple[Array, Array]:
        """Picks the token of that number from the last hidden state.

        Rows that have ended get `pad`.
        """
        eos, pad, sampling = self.ends
        key = self.key
        if key is not None:
            folded = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in
            key = folded(key, number)
        token = pick(model.decoder.logits(hidden[:, -1]), sampling, key)
        return jnp.where(ended, pad, token), ended | (token == eos)


class Decoding(NamedTuple):
    """Holds what one step of the loop hands to the next."""

    done: Array  # [] int32: tokens picked so far
    token: Array  # [B] int32: the newest
    ended: Array  # [B] bool: rows that have reached the end of text
    out: Array  # [B, new] int32; every process holds all answers
    cache: Cache | None


@functools.partial(Jitted, static_argnames="max_new_tokens")
def _start(parts: _Parts, batch: Batch, max_new_tokens: int) -> tuple[Span, Decoding]:
    """Runs the prompts through the model and picks the first token of each row."""
    model = parts.model()
    rows, prompt = batch["tokens"].shape
    span = extended_span(batch, max_new_tokens)
    x, _ = model.embed(batch)
    here = Span(*(s[:, :prompt] for s in span))
    empty = model.decoder.empty_cache(span, model.config.compute_dtype)
    hidden, cache, *_ = model.decoder(x, here, empty, 0, noise=parts.noise(0))
    token, ended = parts.next_token(model, hidden, 0, jnp.zeros(rows, bool))
    out = jnp.full((rows, max_new_tokens), parts.ends.pad, jnp.int32).at[:, 0].set(token)
    return span, Decoding(jnp.int32(1), token, ended, constrain(out, None, None), cache)


@functools.partial(Jitted, donate_argnames="step")
def _advance(parts: _Parts, span: Span, step: Decoding, until: Array | int) -> Decoding:
    """Picks one token after another until `until` are done or all rows have ended."""
    model = parts.model()
    dtype, prompt = model.config.compute_dtype, span.positions.shape[1] - step.out.shape[1]
    moe = model.config.moe

    def unfinished(step: Decoding) -> Array:
        return (step.done < until) & ~jnp.all(step.ended)

    def decode(step: Decoding) -> Decoding:
        place = prompt + step.done - 1
        here = Span(*(jax.lax.dynamic_slice_in_dim(s, place, 1, axis=1) for s in span))
        if moe.experts and not moe.route_padding:
            # What follows an end of text is padding, and takes no place of other rows' tokens.
            going = (~step.ended)[:, None].astype(here.segments.dtype)  # [B, 1]
            here = Span(here.positions, here.segments * going, here.prefixes * going)
        x = model.decoder.embed(step.token[:, None], dtype)
        hidden, cache, *_ = model.decoder(x, here, step.cache, place, noise=parts.noise(step.done))
        token, ended = parts.next_token(model, hidden, step.done, step.ended)
        return Decoding(step.done + 1, token, ended, step.out.at[:, step.done].set(token), cache)

    step = jax.lax.while_loop(unfinished, decode, step)
    return step._replace(out=constrain(step.out, None, None))
