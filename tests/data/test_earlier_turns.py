"""Earlier turns in prompts: laid out as a question with its answer, images in the first one."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from unimed_jax.config import TextConfig
from unimed_jax.data.example import Example
from unimed_jax.data.forms import tagged
from unimed_jax.data.layout import VISUAL, Encoder
from unimed_jax.errors import UserError


def _letters(form: str):
    tokenizer = SimpleNamespace(bos=1, eos=2, pad=0, encode=lambda words: [ord(c) for c in words])
    return Encoder(tokenizer, TextConfig(form=form, chat_template=form == "unimed"), 2, keeps=False)


def _said(ids) -> str:
    return "".join({1: "^", 2: "$", VISUAL: "#"}.get(int(i)) or chr(int(i)) for i in ids)


EARLIER = (("Is it clear?", "no"), ("[refer] left lung", "{<1><2><3><4>}"))


@pytest.mark.parametrize(
    "example, expected",
    [
        (
            Example("r", "vqa", "Which side?", "", images=("a", "b")),
            "^[INST] <Img>##</Img> <Img>##</Img> [vqa] Is it clear? [/INST]no$"
            "[INST] [refer] Where is the left lung? [/INST]{<1><2><3><4>}$"
            "[INST] [vqa] Which side? [/INST]",
        ),
        (
            Example("r", "identify", "{<5><6><7><8>}", "", images=("a",)),
            "^[INST] <Img>##</Img> [identify] What lies in Is it clear?? [/INST]no$"
            "[INST] [refer] Where is the left lung? [/INST]{<1><2><3><4>}$"
            "[INST] [identify] What lies in {<5><6><7><8>}? [/INST]",
        ),
    ],
)
def test_earlier_turns_stand_before_the_question_with_their_answers(example, expected):
    encoded = _letters("unimed").prompt(example, turns=EARLIER)
    assert _said([*encoded.prefix, *encoded.suffix]) == expected
    assert encoded.answer == 0 and encoded.prefix[-1] == VISUAL
    answered = _letters("unimed").answered(example, "left", EARLIER)
    assert _said([*answered.prefix, *answered.suffix]) == expected + "left$"
    assert _said(answered.suffix[answered.targets]) == "left$"


@pytest.mark.parametrize("form", ["unimed", "stablelm", "phi", "simple"])
def test_a_turn_with_its_answer_is_laid_out_as_a_question_that_was_trained_on(form):
    """What stands before the next question is the earlier prompt with its answer, id by id."""
    encoder = _letters(form)
    first = Example("r", "vqa", "Is it clear?", "", images=("a",))
    second = dataclasses.replace(first, question="Which side?")
    whole = encoder.prompt(second, turns=[("Is it clear?", "no")])
    before = encoder.answered(first, "no")
    np.testing.assert_array_equal(whole.prefix, before.prefix)
    np.testing.assert_array_equal(whole.suffix[: len(before.suffix)], before.suffix)
    assert _said(whole.suffix).endswith(("[/INST]", "ASSISTANT:", "Assistant:"))


def test_without_earlier_turns_nothing_changes_and_plain_holds_none():
    example = Example("r", "vqa", "Which side?", "", images=("a",))
    for form in ("unimed", "stablelm", "plain"):
        alone, same = _letters(form).prompt(example), _letters(form).prompt(example, turns=())
        np.testing.assert_array_equal(alone.suffix, same.suffix)
    with pytest.raises(UserError, match="holds one question"):
        _letters("plain").prompt(example, turns=EARLIER)
    assert tagged(" [qa]  Why?") == ("qa", "Why?") and tagged("[x] Why?") == (None, "[x] Why?")
