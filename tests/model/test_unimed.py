"""The whole model: visual tokens in their places, packed equals alone equals step by step, full
size by counting.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from transformers import GemmaConfig

from unimed_jax.config_file import load_config_file
from unimed_jax.data import layout
from unimed_jax.interop.families import hf_config
from unimed_jax.model.cache import Span
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.model.unimed import COORDINATES, UniMed, order_coordinates, span_of
from unimed_jax.rules import leaf_rules
from unimed_jax.settings import from_config_dict
from unimed_jax.train.loss import answer_logits

pytestmark = pytest.mark.usefixtures("quick_compiles")


@jax.jit
def predict(model, batch):
    """-> (logits of all positions, logits of the answer positions)."""
    out = model(batch)
    return model.decoder.logits(out.hidden), answer_logits(model, out.hidden, batch)


def predict_rows(model, rows, shape):
    batch = layout.training_batch(rows, shape, tiny.PAD, "token")
    full, answers = predict(model, batch)
    return batch, np.asarray(full), np.asarray(answers)


def answers_of(batch, answers, row, segment):
    """Answer logits of one segment of a row."""
    index = batch["target_index"][row]
    mine = (batch["segments"][row, index] == segment) & (batch["weights"][row] > 0)
    return answers[row, mine]


@pytest.mark.parametrize("seed", [0, 1])
def test_packed_third_equals_alone(seed):
    """After a shared image with three questions and after text alone, an example's logits are
    those it has alone.
    """
    rng = np.random.default_rng(seed)
    model = tiny.model(seed=seed)
    groups = [
        tiny.group(rng, "refer", questions=3),
        tiny.group(rng, "qa", images=0),
        tiny.group(rng, "caption"),
    ]
    shape = tiny.shape(tokens=80)
    packed_batch, packed, packed_answers = predict_rows(model, [groups], shape)
    _, alone, alone_answers = predict_rows(model, [[g] for g in groups[1:]], shape)
    # one prefix with three suffixes, text, and the third example
    assert packed_batch["segments"].max() == 6
    for row, (segment, group) in enumerate(zip((5, 6), groups[1:], strict=True)):
        length = group.questions[0].tokens
        here = packed_batch["segments"][0] == segment
        np.testing.assert_allclose(packed[0, here], alone[row, :length], rtol=0, atol=1e-5)
        mine = answers_of(packed_batch, packed_answers, 0, segment)
        np.testing.assert_allclose(mine, alone_answers[row, : len(mine)], rtol=0, atol=1e-5)


def test_shared_image_equals_own_image():
    """Three questions after one image have the logits that each has with the image to itself."""
    rng = np.random.default_rng(2)
    model = tiny.model()
    shared = tiny.group(rng, "vqa", questions=3)
    shape = tiny.shape(tokens=80)
    batch, _, answers = predict_rows(model, [[shared]], shape)
    own = [[dataclasses.replace(shared, questions=(question,))] for question in shared.questions]
    _, _, own_answers = predict_rows(model, own, shape)
    for i, segment in enumerate((2, 3, 4)):
        mine = answers_of(batch, answers, 0, segment)
        assert len(mine) == 3
        np.testing.assert_allclose(mine, own_answers[i, :3], rtol=0, atol=1e-5)


@jax.jit
def decode_step(model, x, here, cache, place):
    hidden, cache, *_ = model.decoder(x, here, cache, place)
    return model.decoder.logits(hidden), cache


@pytest.mark.parametrize("questions", [1, 2])
def test_cache_equals_one_pass(questions):
    """An example (or two questions after one image) token by token through the cache, as in one
    packed pass.
    """
    rng = np.random.default_rng(3)
    model = tiny.model()
    shape = tiny.shape(tokens=26)
    batch, full, _ = predict_rows(model, [[tiny.group(rng, "cls", questions=questions)]], shape)
    x, _ = jax.jit(UniMed.embed)(model, batch)
    span = Span(*(jnp.asarray(s) for s in span_of(batch)))
    cache = model.decoder.empty_cache(span, jnp.float32)
    for place in range(int((batch["segments"] > 0).sum())):
        here = Span(*(s[:, place : place + 1] for s in span))
        logits, cache = decode_step(model, x[:, place : place + 1], here, cache, place)
        np.testing.assert_allclose(logits[:, 0], full[:, place], rtol=0, atol=1e-5)


def test_visual_tokens_stand_in_their_places():
    """Two images in one example, one each in two others.

    Embeddings at visual places are the connector's tokens.
    """
    rng = np.random.default_rng(4)
    model = tiny.model()
    rows = [[tiny.group(rng, "vqa", images=2)], [tiny.group(rng, "refer"), tiny.group(rng, "cls")]]
    batch = layout.training_batch(rows, tiny.shape(), tiny.PAD, "token")
    x, routing = jax.jit(UniMed.embed)(model, batch)
    assert routing.shape == (4, tiny.TOKENS, 3)
    slots = [(0, 0, "vqa"), (0, 1, "vqa"), (1, 0, "refer"), (1, 1, "cls")]
    encode = jax.jit(UniMed.encode_images)
    tasks = ("vqa", "refer", "identify", "caption", "cls")
    for row, slot, task in slots:
        tokens = encode(model, batch["images"][row, slot][None], np.array([tasks.index(task)])).tokens[0]
        for t in range(tiny.TOKENS):
            (place,) = np.flatnonzero(batch["visual"][row] == slot * tiny.TOKENS + t)
            np.testing.assert_allclose(x[row, place], tokens[t], rtol=0, atol=1e-5)
    text = batch["visual"] < 0
    np.testing.assert_array_equal(
        np.asarray(x)[text], np.asarray(model.decoder.embedding[...])[batch["tokens"][text]]
    )


def test_nothing_leaks():
    """An empty slot's pixels, another row's image and a neighbour's answer change nothing.

    The own image does.
    """
    rng = np.random.default_rng(5)
    model = tiny.model()
    rows = [[tiny.group(rng, "vqa"), tiny.group(rng, "qa", images=0)], [tiny.group(rng, "caption")]]
    batch, full, _ = predict_rows(model, rows, tiny.shape())

    def changed(key, where, value):
        other = {k: v.copy() for k, v in batch.items()}
        other[key][where] = value
        return np.abs(np.asarray(predict(model, other)[0]) - full).max(axis=-1)  # [B, S]

    empty = changed("images", (1, 1), 77)
    real = batch["segments"] > 0
    assert not empty[real].any()
    own = changed("images", (0, 0), 77)
    first, second = batch["segments"][0] == 1, batch["segments"][0] == 2
    seen = np.flatnonzero(batch["visual"][0] >= 0)[0]
    assert (own[0, first][seen:] > 1e-4).all() and not own[0, first][:seen].any()
    assert not own[0, second].any() and not own[1].any()
    place = np.flatnonzero(first)[-1]
    token = changed("tokens", (0, place), 5)
    assert token[0, place] > 1e-4 and not token[0, second].any() and not token[0, :place].any()


def test_published_size():
    """configs/cmoe.py builds without allocating, and its trainable counts are the published ones."""
    config = from_config_dict(load_config_file("configs/cmoe.py"))
    leaves = parameters(abstract(config.model))
    counts = collections.Counter()
    for path, leaf in leaves.items():
        *_, name = path.split("/")
        kind = "lora" if name.startswith("lora_") else "/".join(path.split("/")[:2])
        counts[kind] += leaf.size
    assert counts["connector/router"] == 507_781_125
    assert counts["connector/experts"] == 199_270_400
    assert counts["lora"] == 19_988_480
    assert counts["connector/task_tokens"] == 28_160
    rules = leaf_rules(leaves, config.train, config.optimizer)
    assert sum(leaf.size for path, leaf in leaves.items() if rules[path].train) == 727_068_165
    base = sum(
        leaf.size for path, leaf in leaves.items() if path.startswith("decoder/") and "lora" not in path
    )
    assert base == 6_738_415_616  # LLaMA-2-7B
    assert (
        sum(leaf.size for path, leaf in leaves.items() if path.startswith("vision/blocks"))
        == 39 * 25_248_768
    )
    assert config.model.tokens_per_image == 64
    assert leaves["connector/router/task_kernel"].shape == (5632, 45056)


def test_gemma_twin():
    """configs/cmoe_gemma.py: transformers' own Gemma-7B, and else the published configuration."""
    config, published = (
        from_config_dict(load_config_file(f"configs/{n}.py")) for n in ("cmoe_gemma", "cmoe")
    )
    assert not hf_config.decoder_differences(
        hf_config.decoder_from_hf(GemmaConfig()), config.model.decoder
    )
    leaves = parameters(abstract(config.model))
    base = sum(
        leaf.size for path, leaf in leaves.items() if path.startswith("decoder/") and "lora" not in path
    )
    assert base == 8_537_680_896
    same = dataclasses.replace(config.model, decoder=published.model.decoder)
    assert dataclasses.replace(config, name="cmoe", model=same) == published


def test_parameters_and_back():
    model = tiny.model()
    leaves = parameters(model)
    assert leaves["decoder/layers/attention/q/kernel"].shape == (2, 16, 32)
    assert all(path.startswith(("vision/", "connector/", "decoder/")) for path in leaves)
    other = with_parameters(model, {"decoder/norm/scale": np.full(16, 3, np.float32)})
    assert (np.asarray(other.decoder.norm.scale[...]) == 3).all()
    assert (np.asarray(model.decoder.norm.scale[...]) == leaves["decoder/norm/scale"]).all()
    rest = parameters(other)
    assert all(rest[path] is leaf for path, leaf in leaves.items() if path != "decoder/norm/scale")


@pytest.mark.parametrize("tied", [False, True])
def test_ordered_coordinates(tied):
    """Neighbouring coordinates start close and far ones apart; other tokens and the sizes stay."""
    model = tiny.model(tiny.config(decoder={"tied_head": tied}))
    before = {path: np.asarray(leaf) for path, leaf in parameters(model).items()}
    order_coordinates(model, tiny.COORDINATE_START)
    after = parameters(model)
    rows = slice(tiny.COORDINATE_START, tiny.COORDINATE_START + COORDINATES)
    tables = {"decoder/embedding": np.asarray(after["decoder/embedding"])}
    if not tied:
        tables["decoder/head"] = np.asarray(after["decoder/head"]).T
    for path, table in tables.items():
        old = before[path] if path == "decoder/embedding" else before[path].T
        rest = np.ones(len(table), bool)
        rest[rows] = False
        np.testing.assert_array_equal(table[rest], old[rest])
        assert table[rows].std() == pytest.approx(old.std(), rel=0.2)
        distance = np.linalg.norm(table[rows][:, None] - table[rows][None], axis=-1)
        near, far = (np.diagonal(distance, offset).mean() for offset in (1, 30))
        assert near < 0.4 * far and (distance[~np.eye(COORDINATES, dtype=bool)] > 0).all()
    assert all((np.asarray(after[p]) == before[p]).all() for p in before if p not in tables)


def test_half_precision():
    """bfloat16 computes near float32; logits stay float32; parameters keep their type."""
    rng = np.random.default_rng(6)
    rows = [[tiny.group(rng, "vqa")]]
    batch, full, _ = predict_rows(tiny.model(), rows, tiny.shape())
    half = tiny.model(dataclasses.replace(tiny.CONFIG, compute_dtype="bfloat16"))
    logits, _ = predict(half, batch)
    real = batch["segments"] > 0
    assert logits.dtype == jnp.float32 and half.decoder.embedding[...].dtype == jnp.float32
    assert np.abs(np.asarray(logits) - full)[real].max() < 0.1 * np.abs(full[real]).max()
    assert jax.eval_shape(half, batch).hidden.dtype == jnp.bfloat16


def test_depth_adds_no_leaves():
    """Layers are stacked: the number of leaves does not grow with depth."""
    shallow, deep = (abstract(tiny.config(decoder={"depth": d}, vision={"depth": d})) for d in (2, 6))
    assert parameters(shallow).keys() == parameters(deep).keys()
    assert parameters(deep)["decoder/layers/mlp/up/kernel"].shape[0] == 6
