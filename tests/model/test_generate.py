"""Generation: the jitted loop over a cache equals whole passes.

Ends, padding, sampling, mixed batches.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from unimed_jax.data import layout
from unimed_jax.model.generate import Sampling, extended_span, generate, pick, stream

pytestmark = pytest.mark.usefixtures("quick_compiles")

NEW, LENGTH = 8, 24
NEVER = -1  # an end of text that no model says


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def prompts() -> list[layout.Group]:
    """Long and short, two images, text alone."""
    rng = np.random.default_rng(0)
    return [
        tiny.group(rng, "vqa", question=9, answer=0),
        tiny.group(rng, "qa", question=4, answer=0, images=0),
        tiny.group(rng, "refer", question=3, answer=0),
        tiny.group(rng, "caption", question=6, answer=0, images=2),
    ]


def batch_of(prompts, length=LENGTH):
    return layout.prompt_batch(prompts, tiny.shape(tokens=length), tiny.PAD)


def greedy(model, batch, eos=NEVER, pad=tiny.PAD, new=NEW):
    return np.asarray(generate(model, batch, max_new_tokens=new, eos=eos, pad=pad))


@pytest.fixture(scope="module")
def expected(model, prompts):
    """Greedy answers without a cache: the whole row anew for every token, places to come masked as
    padding.
    """
    batch = batch_of(prompts)
    rows = len(prompts)
    span = [np.array(s) for s in extended_span(batch, NEW)]
    wider = ((0, 0), (0, NEW))
    grown = {
        **batch,
        "tokens": np.pad(batch["tokens"], wider),
        "visual": np.pad(batch["visual"], wider, constant_values=-1),
    }
    last = jax.jit(lambda model, batch, place: model.decoder.logits(model(batch).hidden[:, place]))
    tokens, gaps = np.zeros((rows, NEW), np.int32), []
    for n in range(NEW):
        real = np.arange(LENGTH + NEW)[None] < LENGTH + n
        positions, segments, prefixes = span[0], np.where(real, span[1], 0), np.where(real, span[2], 0)
        now = {**grown, "positions": positions, "segments": segments, "prefixes": prefixes}
        logits = np.asarray(last(model, now, LENGTH + n - 1))
        top = np.sort(logits, axis=-1)
        gaps.append((top[:, -1] - top[:, -2]).min())
        tokens[:, n] = grown["tokens"][:, LENGTH + n] = logits.argmax(axis=-1)
    assert min(gaps) > 1e-3  # no near tie that rounding could turn
    return tokens


def test_greedy_equals_whole_passes(model, prompts, expected):
    np.testing.assert_array_equal(greedy(model, batch_of(prompts)), expected)
    assert len(np.unique(expected)) > 3


def test_rows_do_not_see_each_other(model, prompts, expected):
    """Each prompt alone, in rows just as long as itself, gives what it gave beside the others."""
    for row, prompt in enumerate(prompts[:2]):
        alone = greedy(model, batch_of([prompt], length=prompt.questions[0].tokens))
        np.testing.assert_array_equal(alone[0], expected[row])


def test_end_of_text(model, prompts, expected):
    """A row is padded after its first end of text; the others go on."""
    eos = int(expected[0, 2])
    tokens = greedy(model, batch_of(prompts), eos=eos, pad=7)
    ends = [row.index(eos) + 1 if eos in row else NEW for row in expected.tolist()]
    assert min(ends) < NEW
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(tokens[row, :end], expected[row, :end])
        assert (tokens[row, end:] == 7).all()


def test_stops_when_all_have_ended(model, prompts, expected):
    """One prompt whose first token ends it: the rest is padding."""
    tokens = greedy(model, batch_of(prompts[:1]), eos=int(expected[0, 0]), pad=7)
    assert tokens[0].tolist() == [expected[0, 0]] + [7] * (NEW - 1)


def test_extended_span(prompts):
    span = extended_span(batch_of(prompts), 3)
    lengths = [p.questions[0].tokens for p in prompts]
    for row, length in enumerate(lengths):
        assert np.asarray(span.positions[row, LENGTH:]).tolist() == [length, length + 1, length + 2]
        assert np.asarray(span.segments[row]).tolist() == [0] * (LENGTH - length) + [1] * (length + 3)


# ---------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------

LOGITS = np.array([1.0, 0.3, 2.0, -1.0, -0.2, 1.5])
DRAWS = 20_000


def frequencies(sampling, seed=0):
    tokens = pick(jnp.tile(jnp.asarray(LOGITS, jnp.float32), (DRAWS, 1)), sampling, jax.random.key(seed))
    return np.bincount(np.asarray(tokens), minlength=6) / DRAWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "top_p, kept", [(1.0, {0.5: 6, 1.0: 6, 2.0: 6}), (0.75, {0.5: 2, 1.0: 3, 2.0: 4})]
)
def test_sampled_frequencies(temperature, top_p, kept):
    """Chi-square of 20,000 draws against the softmax over the smallest set that reaches top_p."""
    p = np.exp(LOGITS / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    count = int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-9)) + 1
    assert count == kept[temperature]  # worked out by hand, so that the nucleus is no copy of the code
    nucleus = np.zeros(6)
    nucleus[order[:count]] = p[order[:count]] / p[order[:count]].sum()
    seen = frequencies(Sampling(temperature, top_p))
    assert not seen[nucleus == 0].any()
    inside = nucleus > 0
    chi_square = DRAWS * ((seen - nucleus)[inside] ** 2 / nucleus[inside]).sum()
    assert chi_square < 22  # 0.05 % of fair draws are beyond that with 5 degrees of freedom


def test_sampling_ends():
    """Nearly cold, or a nucleus of one: the argmax; greedy needs no key."""
    logits = jnp.asarray(LOGITS, jnp.float32)[None]
    assert int(pick(logits, Sampling(), None)[0]) == 2
    for sampling in (Sampling(1e-3), Sampling(1.0, 1e-6)):
        assert frequencies(sampling)[2] == 1


def test_sampled_generation(model, prompts):
    """The same key, the same tokens; another key, others; rows and steps draw on their own."""

    def sample(seed, rows=prompts):
        key = jax.random.key(seed)
        sampling = Sampling(2.0, 0.9)
        out = generate(
            model,
            batch_of(rows),
            max_new_tokens=NEW,
            eos=NEVER,
            pad=tiny.PAD,
            sampling=sampling,
            key=key,
        )
        return np.asarray(out)

    first = sample(0)
    np.testing.assert_array_equal(sample(0), first)
    assert (sample(1) != first).mean() > 0.5
    twins = sample(0, [prompts[0]] * 4)
    assert len(np.unique(twins, axis=0)) == 4 and all(len(set(row)) > 2 for row in twins.tolist())


def test_a_rows_own_key_makes_its_draws_independent_of_the_others(model, prompts):
    keys = jax.vmap(jax.random.key)(jnp.arange(len(prompts)))
    settings = dict(max_new_tokens=NEW, eos=NEVER, pad=tiny.PAD, sampling=Sampling(2.0, 0.9))
    together = np.asarray(generate(model, batch_of(prompts), key=keys, **settings))
    alone = np.asarray(generate(model, batch_of(prompts[1:2]), key=keys[1:2], **settings))
    np.testing.assert_array_equal(alone[0], together[1])
    assert (together[0] != together[1]).any()


@pytest.mark.parametrize("chunk", [1, 3])
def test_streamed_tokens_are_the_generated_ones(model, prompts, expected, chunk):
    eos = int(expected[0, 2])
    for ends in (NEVER, eos):
        pieces = list(stream(model, batch_of(prompts), max_new_tokens=NEW, eos=ends, pad=7, chunk=chunk))
        whole = greedy(model, batch_of(prompts), eos=ends, pad=7)
        found = np.concatenate(pieces, axis=1)
        np.testing.assert_array_equal(found, whole[:, : found.shape[1]])
        assert (whole[:, found.shape[1] :] == 7).all()
        assert pieces[0].shape == (len(prompts), 1) and all(piece.shape[1] <= chunk for piece in pieces)
    first = list(
        stream(model, batch_of(prompts[:1]), max_new_tokens=NEW, eos=int(expected[0, 0]), pad=7)
    )
    assert [piece.tolist() for piece in first] == [[[expected[0, 0]]]]
