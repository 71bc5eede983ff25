"""Decodes many answers at once, in slots that take the next question as soon as one has ended.

Two jitted programs serve every mixture of questions. `enter` runs prompts that are packed into rows
as training packs them (data/layout.training_batch), and copies what the decoder keeps of each into a
slot. `advance` picks one token after another for all slots. `generate.generate` is the plain form,
with which tests compare the tokens.

The cache of a slot has P places for its prompt and W for its answer. In the step of number t all
slots write into place P + t % W: one place for all is written at once, on every device. No answer
has more than W tokens, so none writes over itself.

Shapes: N slots, C = P + W places; R rows of S tokens; Q questions that may enter at once.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from unimed_jax.model.cache import Cache, Span
from unimed_jax.model.decoding import Jitted
from unimed_jax.model.generate import draw
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import Batch, UniMed, span_of

CACHE = (None, "batch", "heads", None, None)  # how its dimensions are split over a mesh


class Entry(NamedTuple):
    """Describes questions that enter, as arrays of the host.

    Those beyond the last one have a slot of number N.
    """

    slots: Any  # [Q] int32: the slot of each
    places: Any  # [Q, P] int32: its tokens, by their places in the R * S of the rows
    prompts: Any  # [Q] int32: how many tokens of `places` are its own
    most: Any  # [Q] int32: tokens that its answer has at most, 1 .. W
    seeds: Any  # [Q] uint32: of its draws
    temperatures: Any  # [Q] float32; 0 is greedy
    first: Any  # [] bool: no answer is going on, and steps are counted from 0 again


class Slots(NamedTuple):
    """Holds all answers that are being decoded."""

    keys: Array  # [layers, N, kv_heads, C, head]
    values: Array
    # [N * W] int32: the tokens of each answer. Flat, because an array of two dimensions that all devices
    # hold leaves each program with its sharding written in another way, and would be compiled again.
    out: Array
    done: Array  # [N] int32: how many of them are picked
    live: Array  # [N] bool: whether the answer goes on
    prompts: Array  # [N] int32: tokens of the prompt
    most: Array  # [N] int32
    seeds: Array  # [N] uint32
    temperatures: Array  # [N] float32
    steps: Array  # [] int32: the number of the next step


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "key"),
    meta_fields=("graph", "eos", "top_p", "draws"),
)
@dataclasses.dataclass(frozen=True)
class Parts:
    """Holds what both programs need: the split model, when an answer ends and how tokens are drawn."""

    graph: Any
    state: Any
    key: Array  # [] from which the keys of all questions are made
    eos: int
    top_p: float
    draws: bool  # false if every temperature is 0: random numbers take long to compile

    @classmethod
    def of(cls, model: UniMed, eos: int, top_p: float, seed: int, draws: bool = True) -> "Parts":
        return cls(*nnx.split(model), jax.random.key(seed), eos, top_p, draws)

    def model(self) -> UniMed:
        return nnx.merge(self.graph, self.state)


@functools.partial(jax.jit, static_argnames=("slots", "prompt", "answer"))
def empty(parts: Parts, slots: int, prompt: int, answer: int) -> Slots:
    """Makes N slots without questions, for prompts of P tokens and answers of W."""
    model = parts.model()
    c = model.config.decoder
    shape = (c.depth, slots, c.kv_heads, prompt + answer, c.head_dim)
    zeros = jnp.zeros(shape, model.config.compute_dtype)
    numbers = jnp.zeros(slots, jnp.int32)
    out = jnp.zeros(slots * answer, jnp.int32)
    seeds, temperatures = jnp.zeros(slots, jnp.uint32), jnp.zeros(slots, jnp.float32)
    none = jnp.zeros(slots, bool)
    return _placed(
        Slots(zeros, zeros, out, numbers, none, numbers, numbers, seeds, temperatures, jnp.int32(0))
    )


@functools.partial(Jitted, donate_argnames="slots")
def enter(parts: Parts, slots: Slots, batch: Batch, entry: Entry) -> Slots:
    """Runs the prompts of a batch of rows, and puts each question with its first token into a slot.

    batch: as `layout.training_batch` makes it, without its targets.
    """
    model = parts.model()
    decoder, dtype = model.decoder, model.config.compute_dtype
    span, length = span_of(batch), entry.places.shape[1]
    answer = slots.out.size // slots.done.size
    hidden, cache, *_ = decoder(_embedded(model, batch), span, decoder.empty_cache(span, dtype))
    assert cache is not None

    def taken(rows: Array) -> Array:
        """Picks each question's places out of keys or values [layers, R, kv_heads, S, head]."""
        depth, _, heads, _, width = rows.shape
        rows = rows.transpose(0, 2, 1, 3, 4).reshape(depth, heads, -1, width)  # [L, kv, R * S, d]
        return rows[:, :, entry.places].transpose(0, 2, 1, 3, 4)  # [L, Q, kv, P, d]

    last = jnp.take_along_axis(entry.places, entry.prompts[:, None] - 1, axis=1)[:, 0]  # [Q]
    hidden = hidden.reshape(-1, hidden.shape[-1])[last]  # [Q, D]
    token = _pick(parts, decoder.logits(hidden), entry.seeds, entry.temperatures, 0 * entry.most)
    going = (token != parts.eos) & (entry.most > 1)

    def put(old: Array, new: Array) -> Array:
        return old.at[entry.slots].set(new, mode="drop")

    return _placed(
        slots._replace(
            keys=slots.keys.at[:, entry.slots, :, :length].set(taken(cache.keys), mode="drop"),
            values=slots.values.at[:, entry.slots, :, :length].set(taken(cache.values), mode="drop"),
            out=slots.out.at[entry.slots * answer].set(token, mode="drop"),
            done=put(slots.done, jnp.ones_like(token)),
            live=put(slots.live, going),
            prompts=put(slots.prompts, entry.prompts),
            most=put(slots.most, entry.most),
            seeds=put(slots.seeds, entry.seeds),
            temperatures=put(slots.temperatures, entry.temperatures),
            steps=jnp.where(entry.first, 0, slots.steps),
        )
    )


def _embedded(model: UniMed, batch: Batch) -> Float[Array, "R S D"]:
    """Embeds the rows; nothing is encoded if none of them has an image."""
    none = constrain(
        model.decoder.embed(batch["tokens"], model.config.compute_dtype), "batch", None, None
    )
    if not batch["image_tasks"].shape[1]:
        return none
    return jax.lax.cond(jnp.any(batch["image_tasks"] >= 0), lambda: model.embed(batch)[0], lambda: none)


@functools.partial(Jitted, donate_argnames="slots")
def advance(
    parts: Parts,
    slots: Slots,
    steps: Array | int,
    enough: Array | int,
    kept: Bool[Array, "N"] | np.ndarray,
) -> Slots:
    """Picks up to `steps` more tokens of every answer.

    It stops earlier when `enough` slots are free, so that others can enter, and when all have ended.
    kept: false for answers that are given up.
    """
    model = parts.model()
    # Of the steps before only the place in the ring matters; counted on they would overflow one day.
    begun = slots.steps % (slots.out.size // slots.done.size)
    until = begun + steps
    slots = slots._replace(live=slots.live & kept, steps=begun)

    def unfinished(slots: Slots) -> Array:
        live = slots.live.sum()
        return (slots.steps < until) & (live > 0) & (len(slots.live) - live < enough)

    return _placed(jax.lax.while_loop(unfinished, functools.partial(_step, parts, model), slots))


def _step(parts: Parts, model: UniMed, slots: Slots) -> Slots:
    """Picks one token of every live answer."""
    decoder = model.decoder
    count = slots.done.size
    answer = slots.out.size // count
    out = slots.out.reshape(count, answer)  # [N, W]
    places = slots.keys.shape[3]
    prompt, turn = places - answer, slots.steps % answer
    live, done = slots.live, slots.done
    token = jnp.take_along_axis(out, jnp.maximum(done - 1, 0)[:, None], axis=1)  # [N, 1]
    x = decoder.embed(token, model.config.compute_dtype)

    age = (turn - jnp.arange(answer)) % answer  # steps since a place was written; 0 is written now
    position = slots.prompts + done - 1  # [N]: of the newest token
    written = jnp.concatenate(
        [jnp.arange(prompt)[None] < slots.prompts[:, None], age[None] < done[:, None]], axis=1
    )
    positions = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.arange(prompt)[None], (count, prompt)),
            position[:, None] - age[None],
        ],
        axis=1,
    )
    there = (written & live[:, None]).astype(jnp.int32)  # [N, C]
    here = live.astype(jnp.int32)[:, None]
    kept = Cache(slots.keys, slots.values, Span(positions, there, there))
    query = Span(position[:, None], here, here)
    hidden, cache, *_ = decoder(x, query, kept, prompt + turn, before=places)
    assert cache is not None

    logits = decoder.logits(hidden[:, 0])  # [N, vocab]
    token = _pick(parts, logits, slots.seeds, slots.temperatures, done)
    new = (jnp.arange(answer)[None] == done[:, None]) & live[:, None]  # [N, W]
    done = done + live
    return slots._replace(
        keys=constrain(cache.keys, *CACHE),
        values=constrain(cache.values, *CACHE),
        out=jnp.where(new, token[:, None], out).reshape(-1),  # [N * W]
        done=done,
        live=live & (token != parts.eos) & (done < slots.most),
        steps=slots.steps + 1,
    )


def _pick(
    parts: Parts,
    logits: Float[Array, "B vocab"],
    seeds: UInt32[Array, "B"],
    temperatures: Float[Array, "B"],
    numbers: Int[Array, "B"],
) -> Int[Array, "B"]:
    """Picks the token of that number for each question, as `generate.pick` does with a key a row."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not parts.draws:
        return greedy
    hot = temperatures > 0

    def drawn() -> Array:
        divided = logits / jnp.where(hot, temperatures, 1.0)[:, None]
        return jnp.where(hot, draw(divided, parts.top_p, _keys(parts, seeds, numbers)), greedy)

    return jax.lax.cond(jnp.any(hot), drawn, lambda: greedy)


def _keys(parts: Parts, seeds: Array, numbers: Array) -> Key[Array, "B"]:
    own = jax.vmap(jax.random.fold_in, (None, 0))(parts.key, seeds)
    return jax.vmap(jax.random.fold_in)(own, numbers)


def _placed(slots: Slots) -> Slots:
    """Splits the cache over the mesh; every process holds the rest whole, and reads it."""
    small = {
        name: constrain(value, *(None,) * value.ndim)
        for name, value in slots._asdict().items()
        if name not in ("keys", "values")
    }
    return slots._replace(
        keys=constrain(slots.keys, *CACHE), values=constrain(slots.values, *CACHE), **small
    )
