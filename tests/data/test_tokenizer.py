import random

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unimed_jax.config import TextConfig
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import CONTROL, COORDINATES, MARKERS, Tokenizer, corpus, train_tokenizer
from unimed_jax.errors import UserError

TEXTS = [
    "[INST] <Img></Img> [vqa] Is the left thalamus visible? [/INST]",
    "Where is the hippocampus?",
    "{<12><3><40><99>}",
    "J45.901 asthma with status, S00.00XA",
] * 10

ODD = [
    "",
    " ",
    "  two  blanks \n\n\ttab , . ! ?",
    " don't  can 't .",
    "{<12><3><40><99>}",
    "{<0><100><1><01>}<101>",
    "[INST] <Img></Img> [refer] x [/INST]",
    "日本語 é \u0301 🧠\u200d\u202e\u00a0\ufeff",
    "\x00\x01\x7f\ud7ff",
    "½ ３ Ⅳ ٣",
    "a</s>b <s><unk> <pad>",
    "ĠĊ byte-level's own letters",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, TextConfig(vocab=500), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


@pytest.mark.parametrize("text", ODD)
def test_decode_of_encode_is_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_unknown_even_outside_the_training_texts(tokenizer):
    rng = random.Random(0)
    unknown = tokenizer._tokenizer.unk_token_id
    for _ in range(300):
        text = "".join(
            chr(rng.choice([rng.randrange(1, 256), rng.randrange(0xE000, 0x110000)])) for _ in range(20)
        )
        ids = tokenizer.encode(text)
        assert unknown not in ids and tokenizer.decode(ids) == text


def test_markers_and_coordinates_are_one_token_wherever_they_stand(tokenizer):
    for word in (*MARKERS, *COORDINATES):
        (middle,) = tokenizer.encode(word)
        left, right = tokenizer.encode("pre"), tokenizer.encode("post")
        assert tokenizer.encode(f"pre{word}post") == [*left, middle, *right]
    start = tokenizer.coordinate_start
    assert [tokenizer.encode(word) for word in COORDINATES] == [[start + i] for i in range(101)]
    assert len(tokenizer.encode("{<12><3><40><99>}")) == 6


def test_digits_and_codes_are_single_characters(tokenizer):
    for code in ("1234567", "J45.901", "S00.00XA", "M1A.0110", "ICD10", "T1"):
        assert len(tokenizer.encode(code)) == len(code)
    assert len(tokenizer.encode("thalamus")) < len("thalamus")  # words are not


def test_control_tokens_are_never_read_out_of_a_text_and_never_shown(tokenizer):
    control = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
    assert len(control) == 3 and not control & set(tokenizer.encode("a</s>b<s><pad>"))
    ids = [tokenizer.bos, *tokenizer.encode("{<5>} yes"), tokenizer.eos, tokenizer.pad, tokenizer.pad]
    assert tokenizer.decode(ids) == "{<5>} yes"
    assert tokenizer.decode([tokenizer.size + 7]) == ""  # a model's vocabulary may be wider


def test_merges_are_spent_on_words_alone(folder, tokenizer):
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    pieces = {p for p in vocabulary if len(p) > 1} - {*MARKERS, *COORDINATES, *CONTROL.values()}
    assert "Ġthalamus" in pieces or "thalamus" in pieces
    assert not [p for p in pieces if any(c in "[]<>{}0123456789" for c in p)]


def test_the_same_texts_give_the_same_files(folder, tmp_path):
    train_tokenizer(iter(TEXTS), TextConfig(vocab=500), tmp_path)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_vocabulary_size_counts_everything(tmp_path):
    train_tokenizer(["the quick brown fox jumps over lazy dogs " * 3], TextConfig(vocab=400), tmp_path)
    assert Tokenizer.load(tmp_path).size == 400
    train_tokenizer(TEXTS, TextConfig(vocab=290, coordinate_tokens=False), tmp_path)
    without = Tokenizer.load(tmp_path)
    assert without.size == 290 and without.coordinate_start is None
    assert len(without.encode("<12>")) == 4 and without.decode(without.encode("{<12>}")) == "{<12>}"
    with pytest.raises(UserError, match="config.text.vocab=300"):
        train_tokenizer(TEXTS, TextConfig(vocab=300), tmp_path)


def test_folders_without_bos_or_pad(tmp_path):
    def save(**special):
        words = {"a": 0, "b": 1, "<e>": 2, "<u>": 3, "<12>": 4}
        bare = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<u>"))
        bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(tmp_path)
        return Tokenizer.load(tmp_path)

    tokenizer = save(eos_token="<e>")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.coordinate_start) == (2, 2, 2, None)
    assert tokenizer.encode("a b") == [0, 1] and tokenizer.decode([0, 2]) == "a"
    assert save(eos_token="<e>", unk_token="<u>").pad == 3
    with pytest.raises(UserError, match="end-of-text"):
        save()


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_corpus_shows_every_instruction():
    examples = [Example(str(i), "vqa", "Q?", "yes", images=("x",)) for i in range(8)]
    texts = list(corpus(examples, TextConfig()))
    assert len(texts) == 24 and texts.count("yes") == 8 and texts.count("[INST] <Img>") == 8
    assert len(set(texts)) > 4
