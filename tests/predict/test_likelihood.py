"""Likelihoods of answers are those of the training loss, however rows are packed and on any devices."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from support.fake_brain import COLOURS, Squares, tiny_config

from unimed_jax.config import LossConfig
from unimed_jax.data import fitting, layout
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.unimed import UniMed
from unimed_jax.predict import likelihood
from unimed_jax.predict.likelihood import Asked, Likelihoods, log_probabilities
from unimed_jax.settings import from_config_dict
from unimed_jax.train.loss import answer_logits, cross_entropy, task_losses

pytestmark = pytest.mark.usefixtures("quick_compiles")
LABELS = tuple(COLOURS)


@pytest.fixture(scope="module")
def config():
    return from_config_dict(tiny_config())


@pytest.fixture(scope="module")
def model(config):
    return UniMed(config.model, nnx.Rngs(0))


def questions(count=3):
    """Questions of two tasks with labels of several lengths, in two batches."""
    found = [e for e in Squares().examples("test") if e.task in ("vqa", "cls")][: 2 * count]
    batch = [Asked(e, LABELS if e.task == "cls" else ("red", "a white square", "no")) for e in found]
    return [batch[:count], batch[count:]]


def measured(model, config, tokenizer, batches):
    every = Likelihoods(model, config, tokenizer, batches)
    squares = Squares()
    found = [
        every.of(batch, [[squares.image(key) for key in one.example.images] for one in batch])
        for batch in batches
    ]
    return [one for part in found for one in part]


@pytest.fixture(scope="module")
def likelihoods(model, config, tokenizer):
    return measured(model, config, tokenizer, questions())


def training_row(config, tokenizer, asked, text):
    """The row in which training would show this question with this answer."""
    encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)
    encoded = encoder.training(dataclasses.replace(asked.example, answer=text), 0)
    pixels = [Squares().image(key) for key in asked.example.images]
    fitted = tuple(fitting.fit(image, config.data.fit, config.model.vision) for image in pixels)
    shape = layout.RowShape(64, 1, 12, config.model.tokens_per_image, config.model.vision.image_size)
    return layout.training_batch([[layout.Group((encoded,), fitted)]], shape, tokenizer.pad, "token")


def test_log_likelihoods_are_those_of_the_training_loss(model, config, tokenizer, likelihoods):
    """Each text alone, in the row of training: minus the summed loss, and as many tokens."""
    loss = jax.jit(lambda m, batch: task_losses(m, batch, LossConfig("token"), None, None)[0])
    batches = questions()
    for asked, found in zip([one for batch in batches for one in batch], likelihoods, strict=True):
        for text, value, tokens in zip(asked.texts, found.sums, found.tokens, strict=True):
            alone = loss(model, training_row(config, tokenizer, asked, text))
            assert tokens == int(alone.weight)
            assert value == pytest.approx(-float(alone.tasks.sum()), abs=2e-5)
    assert len({round(value, 3) for one in likelihoods for value in one.sums}) > 12


def test_a_row_gives_the_very_bits_of_the_loss(model, config, tokenizer):
    batch = training_row(config, tokenizer, questions()[0][0], "white")

    @jax.jit
    def cost(model, batch):
        logits = answer_logits(model, model(batch).hidden, batch)
        return cross_entropy(logits, batch["targets"], LossConfig("token"), None)[0]

    used = batch["weights"] > 0
    ours, theirs = (np.asarray(f(model, batch))[used] for f in (log_probabilities, cost))
    assert used.sum() > 1 and np.array_equal(ours, -theirs)


def test_packing_and_the_batch_change_nothing(model, config, tokenizer, likelihoods, monkeypatch):
    """Rows that hold few tokens split the labels of a question; one batch holds all questions."""
    monkeypatch.setattr(likelihood, "ROW", 32)
    together = [[one for batch in questions() for one in batch]]
    narrow = Likelihoods(model, config, tokenizer, together)
    assert narrow._shape.tokens < 64 and any(
        share.first
        for row in narrow._packed(together[0], [narrow._size(a) for a in together[0]])
        for share in row
    )
    again = measured(model, config, tokenizer, together)
    for one, other in zip(likelihoods, again, strict=True):
        np.testing.assert_allclose(one.sums, other.sums, rtol=0, atol=2e-5)
        assert one.tokens == other.tokens


def test_large_vocabularies_are_measured_a_few_rows_at_a_time(
    model, config, tokenizer, likelihoods, monkeypatch
):
    monkeypatch.setattr(likelihood, "LOGITS", 1)
    few = Likelihoods(model, config, tokenizer, questions())
    assert few._rows == 1
    again = measured(model, config, tokenizer, questions())
    np.testing.assert_allclose(again[0].sums, likelihoods[0].sums, rtol=0, atol=2e-5)


def test_text_alone_has_rows_without_images(model, config, tokenizer):
    asked = [Asked(e, ("1", "2", "25")) for e in Squares().examples("test") if e.task == "qa"][:3]
    found = measured(model, config, tokenizer, [asked])
    assert all(np.isfinite(one.sums).all() and max(one.sums) < 0 for one in found)
    assert Likelihoods(model, config, tokenizer, [asked])._shape.images == 0


def test_eight_devices_measure_as_one(model, config, tokenizer, likelihoods):
    mesh = sharding.make_mesh(config.mesh, config.data.rows)
    leaves = parameters(model)
    spread = with_parameters(model, jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh)))
    with sharding.inside(mesh):
        found = measured(spread, config, tokenizer, questions())
    for one, other in zip(found, likelihoods, strict=True):
        np.testing.assert_allclose(one.sums, other.sums, rtol=0, atol=2e-5)


def test_a_prompt_that_is_too_long_is_refused(model, config, tokenizer):
    example = dataclasses.replace(questions()[0][0].example, question="again " * 900)
    with pytest.raises(UserError, match="text.max_prompt"):
        Likelihoods(model, config, tokenizer, [[Asked(example, ("yes", "no"))]])


@pytest.mark.parametrize("form", ["unimed", "stablelm", "plain", "simple"])
def test_an_answer_follows_the_prompt_of_evaluation(config, tokenizer, form):
    """Also where evaluation's prompt is not that of training: two beginnings, no blank."""
    paper = form == "unimed"
    text = dataclasses.replace(config.text, form=form, double_bos=paper, training_blank=paper)
    encoder = layout.Encoder(tokenizer, text, config.model.tokens_per_image)
    example = questions()[0][0].example
    prompt, answered = encoder.prompt(example), encoder.answered(example, "white")
    said = answered.suffix[answered.targets]
    assert np.array_equal(prompt.prefix, answered.prefix)
    assert np.array_equal(answered.suffix[: answered.targets[0]], prompt.suffix)
    assert tokenizer.decode([t for t in said.tolist() if t != tokenizer.eos]).strip(" \n#") == "white"
    assert (said[-1] == tokenizer.eos) == (form in ("unimed", "stablelm"))
