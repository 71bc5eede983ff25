"""Conversations in rows: every answer a target, whatever stands between.

The ids of Med-MoE's forms are goldens.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from unimed_jax.config import TextConfig
from unimed_jax.data import forms, layout
from unimed_jax.data.example import Example
from unimed_jax.data.layout import Encoder, Group, RowShape
from unimed_jax.data.tokenizer import corpus
from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict

T, EOS, PAD = 3, 1, 0
SHAPE = RowShape(tokens=400, images=2, answers=80, tokens_per_image=T, image_size=2)


class Letters(SimpleNamespace):
    """One id a letter, so that every span can be read back."""

    def encode(self, text):
        return [ord(c) for c in text]


def encoder(form="phi"):
    return Encoder(Letters(bos=EOS, eos=EOS, pad=PAD), TextConfig(form=form), T)


def read(ids):
    return "".join({EOS: "$", layout.VISUAL: "#"}.get(i) or chr(i) for i in ids)


HISTORY = (("Is it clear?", "no"), ("What is it?", "mass"))
LUNG = Example("r1", "vqa", "Which side?", "left", images=("i",), history=HISTORY)


def test_every_answer_is_a_target():
    encoded = encoder().training(LUNG, 0)
    assert read(encoded.prefix).endswith("questions. USER: ###")
    assert read(encoded.suffix) == (
        "\nIs it clear? ASSISTANT: no$USER: What is it? ASSISTANT: mass$USER: Which side? "
        "ASSISTANT: left$"
    )
    assert read(encoded.suffix[encoded.targets]) == " no$ mass$ left$"
    batch = layout.training_batch(
        [[Group((encoded,))], [Group((encoded, encoded))]], SHAPE, PAD, "example"
    )
    for row, repeats in ((0, 1), (1, 2)):
        used = batch["weights"][row] > 0
        assert read(batch["targets"][row, used]) == " no$ mass$ left$" * repeats
        np.testing.assert_allclose(batch["weights"][row].sum(), repeats, rtol=1e-6)
        # Each is predicted by the letter in front of it.
        seen = batch["tokens"][row, batch["target_index"][row, used]]
        assert read(seen) == (": no" + ": mass" + ": left") * repeats


def test_prompt_ends_where_the_answer_begins():
    prompt, trained = encoder().prompt(LUNG), encoder().training(LUNG, 0)
    assert prompt.answer == 0 and read(prompt.suffix).endswith("mass$USER: Which side? ASSISTANT:")
    np.testing.assert_array_equal(prompt.suffix, trained.suffix[: len(prompt.suffix)])
    text = encoder().prompt(Example("r2", "qa", "Why?", "so"))
    assert len(text.prefix) == 0 and read(text.suffix).endswith("USER: Why? ASSISTANT:")


def test_caption_follows_its_image():
    """Of `plain` the first target is predicted by the last visual token, also after another
    question.
    """
    encoded = encoder("plain").training(Example("r", "caption", "", "two lungs", images=("i",)), 0)
    assert read(encoded.prefix) == "###" and read(encoded.suffix) == "two lungs\n"
    assert encoded.targets.tolist() == list(range(10))
    batch = layout.training_batch([[Group((encoded, encoded))]], SHAPE, PAD, "token")
    assert batch["target_index"][0, [0, 1, 10, 11]].tolist() == [2, 3, 2, 13]


def test_refusals():
    with pytest.raises(UserError, match="record r: '<image>' stands in its text"):
        encoder().training(Example("r", "vqa", "what is <image>?", "a", images=("i",)), 0)
    with pytest.raises(UserError, match="record r: '<image>' stands in its text"):
        encoder().training(Example("r", "qa", "what?", "<image>"), 0)
    with pytest.raises(UserError, match="takes images with one caption"):
        encoder("plain").training(LUNG, 0)
    with pytest.raises(UserError, match="config.text.form='simple' only asks"):
        encoder("simple").training(LUNG, 0)
    with pytest.raises(UserError, match="config.text.form: 'vicuna' is unknown"):
        from_config_dict({"text": {"form": "vicuna"}})
    with pytest.raises(UserError, match="record 7: messages come from"):
        forms.turns_of([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "record 7")
    turns = [{"from": who, "value": who} for who in ("gpt", "human", "gpt")]
    assert forms.turns_of(turns) == [("human", "gpt")]


def test_corpus_is_what_training_shows():
    texts = list(corpus([LUNG], TextConfig(form="stablelm")))
    trained = encoder("stablelm").training(LUNG, 0)
    shown = read([*trained.prefix, *trained.suffix]).replace("$", "")
    assert "###".join(["".join(texts[:1]), "".join(texts[1:])]) == shown and len(texts) == 7
