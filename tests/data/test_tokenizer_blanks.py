"""Tokenizers that put a sign before a text, or join words: ids of question and answer are those of
the whole text.
"""

import numpy as np
import pytest
import tokenizers
from support.tokenizers import KINDS, TEXTS, made, saved
from transformers import PreTrainedTokenizerFast

from unimed_jax.config import TextConfig
from unimed_jax.data.example import Example
from unimed_jax.data.forms import form_of, text_of
from unimed_jax.data.layout import VISUAL, Encoder
from unimed_jax.data.tokenizer import Tokenizer

ANSWERS = ("yes", "a lesion in the liver", "", " two blanks", "é", "</s> is text", "a")
QUESTIONS = ("Is a lesion seen?", "x", "ends with a blank ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["phi", "stablelm"])
def test_ids_by_pieces_are_those_of_the_whole_text(tmp_path, kind, form):
    """Against transformers on the text with its ends of text; two turns and one."""
    tokenizer = Tokenizer.load(saved(kind, tmp_path))
    peer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = TextConfig(form=form, max_prompt=10_000)
    encoder = Encoder(tokenizer, text, 4)
    assert (tokenizer.together is None) == (kind in ("byte level", "words"))
    for answer in ANSWERS:
        for question in QUESTIONS:
            for history in ((), ((question, answer), ("b", "no"))):
                example = Example("e", "qa", question, answer, history=history)
                pieces = form_of(text).training(example, 0)
                # transformers would read the answer's own "</s>" as the end of text.
                whole = text_of(pieces, end="</s>").replace("</s> is text", "<e> is text")
                spelt = Example(
                    "e",
                    "qa",
                    question,
                    answer.replace("</s>", "<e>"),
                    # fmt: skip
                    history=tuple((q, a.replace("</s>", "<e>")) for q, a in history),
                )
                encoded = encoder.training(spelt, 0)
                ids = [*encoded.prefix.tolist(), *encoded.suffix.tolist()]
                assert ids == peer(whole, add_special_tokens=False).input_ids, (
                    whole,
                    peer.convert_ids_to_tokens(ids),
                )
                # What is trained on spells the answers, and what is asked is what stands before the
                # last one.
                targets = [int(i) for i in np.asarray(encoded.suffix)[encoded.targets]]
                ends = [i for i, number in enumerate(targets) if number == tokenizer.eos]
                assert len(ends) == len(history) + 1 and ends[-1] == len(targets) - 1
                if kind == "words":  # it knows "</s>" as a word
                    continue
                control = encoder.training(Example("e", "qa", question, answer, history=history), 0)
                assert (control.suffix == tokenizer.eos).sum() == len(ends)  # only ours end


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_the_targets(tmp_path, kind):
    """Where a token of the whole text holds letters of question and answer, it is a target."""
    tokenizer = Tokenizer.load(saved(kind, tmp_path))
    encoder = Encoder(tokenizer, TextConfig(form="phi", max_prompt=10_000), 4)
    encoded = encoder.training(Example("e", "qa", "What is seen?", "maybe left"), 0)
    said = tokenizer.decode(encoded.suffix[encoded.targets])
    assert said.strip() == "maybe left"
    prompt = encoder.prompt(Example("e", "qa", "What is seen?", ""))
    before = encoded.suffix[: encoded.targets[0]]
    asked = tokenizer.decode(prompt.suffix).rstrip()
    assert asked.endswith("ASSISTANT:") and asked.startswith(tokenizer.decode(before).rstrip()[:40])


def test_no_sign_before_an_answer(tmp_path):
    """LLaMA-2's normalizer puts "▁" before every text that it is given, so before each piece."""
    tokenizer = Tokenizer.load(saved("prepend, words", tmp_path))
    encoded = Encoder(tokenizer, TextConfig(form="phi", max_prompt=10_000), 4).training(
        Example("e", "qa", "What is seen?", "yes"), 0
    )
    tokens = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    names = [tokens.id_to_token(int(i)) for i in encoded.suffix]
    assert names[-3:] == [":", "▁yes", "</s>"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_an_image_is_a_text_by_itself(tmp_path, kind):
    tokenizer = Tokenizer.load(saved(kind, tmp_path))
    encoded = Encoder(tokenizer, TextConfig(form="phi", max_prompt=10_000), 3).training(
        Example("e", "vqa", "What is seen?", "yes", images=("x",)), 0
    )
    head = [*encoded.prefix.tolist()]
    rust = made(kind)
    assert head[-3:] == [VISUAL] * 3
    assert head[:-3] == rust.encode(text_before(), add_special_tokens=False).ids
    after = rust.encode("\nWhat is seen? ASSISTANT: yes", add_special_tokens=False).ids
    assert encoded.suffix.tolist() == [*after, tokenizer.eos]


def text_before() -> str:
    pieces = form_of(TextConfig(form="phi")).training(Example("e", "vqa", "q", "a", images=("x",)), 0)
    return pieces[0].text


def test_unimeds_form_tokenises_each_part_by_itself(tmp_path):
    """As published: also LLaMA-2's tokenizer puts its sign before the answer."""
    tokenizer = Tokenizer.load(saved("prepend, words", tmp_path))
    encoded = Encoder(tokenizer, TextConfig(max_prompt=10_000, max_words=None), 4).training(
        Example("e", "qa", TEXTS[0], "yes"), 0
    )
    assert encoded.suffix[encoded.targets].tolist() == [*tokenizer.encode("yes"), tokenizer.eos]


class Slow:
    """A tokenizer in Python, without the fast one beneath.

    It puts a sign before a text as LLaMA-2's does.
    """

    eos_token_id, bos_token_id, unk_token_id, pad_token_id = 1, 0, 2, None
    all_special_ids = (0, 1, 2)

    def get_vocab(self):
        return {"<s>": 0, "</s>": 1, "<unk>": 2} | {chr(i + 3): i + 3 for i in range(9000)}

    def convert_tokens_to_ids(self, tokens):
        return [2 for _ in tokens]

    def encode(self, text, **_):
        return [ord(c) % 9000 + 3 for c in "▁" + text.replace(" ", "▁")]


def test_a_tokenizer_in_python():
    tokenizer = Tokenizer(Slow())
    encoder = Encoder(tokenizer, TextConfig(form="phi", max_prompt=10_000), 4)
    encoded = encoder.training(Example("e", "qa", "What?", "yes"), 0)
    whole = text_of(form_of(TextConfig(form="phi")).training(Example("e", "qa", "What?", "yes"), 0))
    assert encoded.suffix.tolist() == [*Slow().encode(whole), 1]
    assert encoded.suffix[encoded.targets].tolist() == [*Slow().encode(" yes")[1:], 1]
