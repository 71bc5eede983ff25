"""Tokenizers from elsewhere that would never end, fill the memory or have ids without rows: one
sentence each.
"""

import json
import time

import pytest
from support.tokenizers import SPECIAL, made, saved

from unimed_jax.config import TextConfig
from unimed_jax.data import tokenizer as module
from unimed_jax.data.tokenizer import Tokenizer, train_tokenizer
from unimed_jax.data.tokenizer_probe import ENDING, is_plain, repeats_within_repeats
from unimed_jax.errors import UserError

CATASTROPHIC = (
    *(
        "(a+)+$",
        "(a*)*b",
        "(a|aa)+$",
        "(a|a?)+$",
        "([a-z]+)*!",
        "(.*a){20,}",
        "((ab?)+)+c",
        "(?:x+x+)+y",
        "(?i:(a+)+)b",
    ),
    *(
        r"(\w+\s?)*$",
        r"(\p{L}+|\p{N})+!",
        "(a{1,9})+$",
        "(a+){10,}b",
        "^(([a-z])+.)+[A-Z]$",
        "(?=(a+)+b)",
        "([^[a-c]]+)*x",
    ),
)
SAFE = (
    *ENDING,
    *(
        r"(?=(\d{3})+(?!\d))",
        r"\d{1,3}(?=(?:\d{3})*\b)",
        "[(a+)+]",
        r"\(a+\)+",
        "(abc)+",
        "(a+)?b",
        "(?i:'s|'t)?x",
        "(ab+)",
    ),
    *(
        r" ?[^(\s|[.,!?…。，、।۔،])]+",
        r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+",
        "(a|b)?c",
        "(x{2,5}){3}",
        "",
    ),
)


def test_patterns():
    assert [pattern for pattern in CATASTROPHIC if not repeats_within_repeats(pattern)] == []
    assert [pattern for pattern in SAFE if repeats_within_repeats(pattern)] == []


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(old: dict, new: str) -> dict:
    return {"type": "Replace", "pattern": old, "content": new}


DOUBLED = {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 48}
HIDDEN = {"type": "Sequence", "pretokenizers": [split("((x|y)+)*z")]}
HOSTILE = {
    "nested repeats": ("pre_tokenizer", split("(a+)+$"), "may take forever"),
    "nested repeats, hidden": (
        "pre_tokenizer",
        {"type": "Sequence", "pretokenizers": [split("((x|y)+)*z")]},
        "forever",
    ),
    "nested repeats in the normalizer": (
        "normalizer",
        replace({"Regex": "(a|aa)+b"}, ""),
        "may take forever",
    ),
    "nested repeats in the decoder": ("decoder", replace({"Regex": "(a*)*b"}, ""), "may take forever"),
    "many repeats after each other": (
        "pre_tokenizer",
        split(r"\w*\w*\w*\w*\w*\w*(?!.|$)"),
        "retry-limit|more than 5 seconds",
    ),
    "a text that doubles 48 times": ("normalizer", DOUBLED, "hundreds of times as long"),
    "no known step": ("normalizer", {"type": "Python"}, "cannot be used"),
    "a step that is a number": ("pre_tokenizer", 3, "cannot be used"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved("byte level", tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", HOSTILE)
def test_programs_that_do_not_end(folder, tmp_path, name):
    part, step, match = HOSTILE[name]
    spec = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {part: step}))
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    start = time.process_time()
    with pytest.raises(UserError, match=match) as error:
        Tokenizer.load(tmp_path)
    assert (
        time.process_time() - start < 2
        and "\n" not in str(error.value)
        and "tokenizer.json" in str(error.value)
    )


def test_honest_ones_need_no_process_of_their_own(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "trouble", lambda file: pytest.fail(f"a process for {file}"))
    train_tokenizer(["a b c"] * 9, TextConfig(vocab=400), tmp_path)
    Tokenizer.load(tmp_path)
    Tokenizer.load(folder)
    for kind in ("metaspace first", "words"):
        Tokenizer.load(saved(kind, tmp_path / kind))


def test_an_unknown_pattern_is_tried_once(folder, tmp_path, monkeypatch):
    spec = json.loads((folder / "tokenizer.json").read_text()) | {"pre_tokenizer": split(r"\w+|[^\w]")}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    tried = []
    real = module.trouble
    monkeypatch.setattr(module, "trouble", lambda file: tried.append(file) or real(file))
    assert Tokenizer.load(tmp_path).encode("ab") == Tokenizer.load(tmp_path).encode("ab")
    assert len(tried) == 1


def test_what_is_plain():
    spec = json.loads(made("prepend").to_str())
    assert is_plain(spec, ENDING)
    for part, step in (
        ("normalizer", {"type": "Prepend", "prepend": "x" * 1000}),
        ("normalizer", replace({"String": ""}, "a")),
        ("normalizer", replace({"String": "a"}, "aa")),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 20}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("pre_tokenizer", split("a+")),
        ("pre_tokenizer", {"type": "Sequence"}),
        ("decoder", []),
    ):
        assert not is_plain(spec | {part: step}, ENDING), step
    assert not is_plain([], ENDING) and not is_plain(None, ENDING)


def words_with(ids: dict[str, int], folder, **settings):
    model = {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"}
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    given = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder


@pytest.mark.parametrize("highest", [5000, (1 << 24) - 1])
def test_ids_with_gaps_need_a_row_for_the_highest(tmp_path, highest):
    ids = {word: i for i, word in enumerate((*SPECIAL, *(f"w{i}" for i in range(403))))} | {
        "last": highest
    }
    tokenizer = Tokenizer.load(words_with(ids, tmp_path))
    assert tokenizer.size == highest + 1 and tokenizer.encode("w0 last") == [3, highest]
    with pytest.raises(
        UserError,
        match=f"decoder.vocab=512 is less than the {highest + 1} rows .*highest id is {highest}",
    ):
        tokenizer.check_fits(512)
    tokenizer.check_fits(highest + 1)
    assert tokenizer.fingerprint


@pytest.mark.parametrize("highest", [1 << 24, (1 << 31) - 1, 4_000_000_000, (1 << 32) - 1])
def test_ids_beyond_any_embedding(tmp_path, highest):
    """The package lists every id that a vocabulary leaves out when it writes it: 16 GB of numbers."""
    with pytest.raises(UserError, match=f"has the id {highest}, but ids end at 16777215"):
        Tokenizer.load(words_with({"</s>": 0, "<unk>": 1, "a": highest}, tmp_path))


@pytest.mark.parametrize("ids", [{"</s>": 0, "a": 1}, {"</s>": 0, "<unk": 1}])
def test_a_token_for_the_unknown_that_is_missing(tmp_path, ids):
    """It is found when the tokenizer is read, not at the first strange word of a long training."""
    with pytest.raises(UserError, match="cannot be read .*[Uu][Nn][Kk]"):
        Tokenizer.load(words_with(ids, tmp_path))


def test_special_tokens_without_a_place_are_counted(tmp_path):
    """transformers gives a token that only tokenizer_config.json names the next id."""
    ids = {word: i for i, word in enumerate(SPECIAL)}
    tokenizer = Tokenizer.load(
        words_with(ids, tmp_path, pad_token="<pad>", additional_special_tokens=["<x>"])
    )
    assert tokenizer.size == 5 and tokenizer.pad in (3, 4)


def test_files_that_are_cut_short(tmp_path):
    """A model of SentencePiece is a row of messages, each with its length."""

    def message(field: int, data: bytes) -> bytes:
        return bytes([field << 3 | 2, len(data)]) + data

    piece = message(1, "▁a".encode()) + b"\x15\0\0\0\0"
    whole = message(1, piece) * 3 + message(2, b"\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "a"})
    )
    for data in (
        *(whole[:end] for end in (1, 3, 5, len(whole) - 1)),
        b"",
        b"\xff" * 50,
        b"\x0a\xff\xff\xff\xff\x7f",
        b"x",
    ):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(
            UserError, match="tokenizer.model is not a model of SentencePiece, or is cut short"
        ):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("text", ["[" * 100_000, "\xff", '{"a": NaN}', "[1]", '"x"', '{"a": 1, "a": 2}'])
def test_settings_that_are_none(folder, tmp_path, name, text):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_the_model_beside_the_tokenizer_is_bounded_too(folder, tmp_path):
    """transformers reads config.json where tokenizer_config.json does not say the class."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "num_hidden_layers": 10**9})
    )
    with pytest.raises(UserError, match="num_hidden_layers is 1000000000"):
        Tokenizer.load(tmp_path)
