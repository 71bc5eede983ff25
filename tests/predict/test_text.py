"""Pieces of an answer: joined they are its text, whatever tokens it has and however they are cut."""

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.predict.text import CUT, Spoken, text_of

SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
WORDS = ("▁", "a", "m", "▁a", "▁b", ".", "\n", CUT)
LAST = len(SPECIAL) + len(BYTES) + len(WORDS) - 1


def byte_fallback() -> Tokenizer:
    """One as LLaMA's: characters that it lacks are tokens of their bytes."""
    vocab = {word: i for i, word in enumerate((*SPECIAL, *BYTES, *WORDS))}
    merges = [("▁", "a")]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(made)


def byte_level() -> Tokenizer:
    """One as GPT-2's: every token is bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate((*SPECIAL, *alphabet))}
    made = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return wrapped(made)


def wrapped(made: tokenizers.Tokenizer) -> Tokenizer:
    special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=made, **special))


TOKENIZERS = {"byte fallback": byte_fallback(), "byte level": byte_level()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(
    ids=st.lists(
        st.one_of(
            st.integers(0, LAST),
            st.integers(LAST - len(WORDS) + 1, LAST),
            st.sampled_from([3 + byte for byte in b"\nA \xc3\xa9\xe2\x82\xac\xf3\xff"]),
        ),
        max_size=24,
    ),
    cuts=st.lists(st.integers(1, 4)),
)
def test_joined_pieces_are_the_text_of_all_tokens(kind, ids, cuts):
    tokenizer = TOKENIZERS[kind]
    ids = [i for i in ids if i < tokenizer.size]
    spoken = Spoken(tokenizer)
    pieces, at = [], 0
    for count in [*cuts, len(ids)]:
        pieces.append(spoken.add(ids[at : at + count]))
        at += count
    pieces.append(spoken.end())
    assert "".join(pieces) == text_of(tokenizer, ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_nothing_is_held_back_that_no_token_can_change(kind):
    """After an invalid byte too, each character comes with the token that makes it certain."""
    tokenizer = TOKENIZERS[kind]
    lead = tokenizer.encode("é")[-2]
    ids = [*tokenizer.encode("aé"), lead, *tokenizer.encode("a.é a a.")]
    spoken, said = Spoken(tokenizer), ""
    for number, token in enumerate(ids, 1):
        said += spoken.add([token])
        whole = text_of(tokenizer, ids[:number])
        if whole and whole[-1] in "a.":
            assert said == whole
    assert said == text_of(tokenizer, ids) and said.count(CUT) in (1, 3) and spoken.end() == ""


def test_a_character_that_is_cut_takes_nothing_back():
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer.encode("aéé")[:-1]
    spoken = Spoken(tokenizer)
    pieces = [spoken.add([i]) for i in ids]
    assert "".join(pieces) == "a" and spoken.end() == 3 * CUT
