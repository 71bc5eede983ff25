"""Makes hostile tokenizers: folders of Hugging Face, and models of SentencePiece."""

import functools
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
from campaigns.fuzz_changes import VALUES, changed_bytes, changed_json, changed_tree

from unimed_jax.config import TextConfig
from unimed_jax.data.tokenizer import Tokenizer, train_tokenizer

WORDS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "▁ab", "the", "▁lung"]


@functools.cache
def _tokenizers() -> list[dict]:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    with tempfile.TemporaryDirectory() as folder:
        texts = ["the left lung is clear", "a b c"] * 9
        train_tokenizer(texts, TextConfig(vocab=400), Path(folder, "it"))
        trained = json.loads(Path(folder, "it", "tokenizer.json").read_text())
    steps = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFC()]
    )
    llama = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(WORDS)}, [("a", "b")], unk_token="<unk>")
    )
    llama.normalizer, llama.decoder = (
        steps,
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
    )
    unigram = tokenizers.Tokenizer(
        models.Unigram([(w, -float(i)) for i, w in enumerate(WORDS)], unk_id=0)
    )
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+"), "isolated"),
            pre_tokenizers.Metaspace(),
        ]
    )
    words = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for made in (llama, unigram, words):
        made.add_special_tokens(["</s>"])
    return [trained, *(json.loads(made.to_str()) for made in (llama, unigram, words))]


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TOKENIZER_VALUES = [
    *VALUES, {"type": "Prepend", "prepend": "x" * 1000}, 4294967295, 1 << 32,
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"}, {"type": "Digits",
    "individual_digits": True},
    {"type": "Split", "pattern": {"Regex": "\\w*\\w*\\w*\\w*(?!.|$)"}, "behavior": "Isolated",
    "invert": False},
    {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "aaaaaaaaaa"},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"},
    "content": "aa"}] * 50},
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}] * 3000},
]  # fmt: skip


def _tokenizer(rng: np.random.Generator, number: int, folder: Path) -> None:
    spec = _tokenizers()[number % len(_tokenizers())]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **SPECIAL,
    }
    other = number % 5 == 0
    text = changed_json(rng, settings, TOKENIZER_VALUES)
    (folder / "tokenizer_config.json").write_bytes(text if other else json.dumps(settings).encode())
    spec = {**spec, "model": spec["model"]}
    parts = [
        part
        for part in ("normalizer", "pre_tokenizer", "decoder", "model", "added_tokens")
        if spec.get(part)
    ]
    part = parts[rng.integers(len(parts))]  # otherwise nearly all changes would fall into the vocabulary
    if not other:
        spec[part] = changed_tree(rng, spec[part], TOKENIZER_VALUES)
    text = json.dumps(spec).encode()
    (folder / "tokenizer.json").write_bytes(changed_bytes(rng, text) if number % 11 == 0 else text)
    _use(folder)


def _use(folder: Path) -> None:
    """Reads a tokenizer's folder and encodes and decodes a text."""
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("the left lung a12 \n <s> é"))
    assert tokenizer.fingerprint and tokenizer.size >= 0
    if tokenizer.together:
        tokenizer.together(["a: ", " ab"], False)


def _piece(word: str, score: float, kind: int) -> bytes:
    """Makes a piece as SentencePiece's protocol buffer holds it: 1 text, 2 score, 3 kind."""
    text = word.encode()
    inner = (
        b"\x0a"
        + bytes([len(text)])
        + text
        + b"\x15"
        + struct.pack("<f", score)
        + b"\x18"
        + bytes([kind])
    )
    return b"\x0a" + bytes([len(inner)]) + inner


def sentencepiece_model() -> bytes:
    """Makes a model of SentencePiece, of the kind BPE, by hand."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    pieces = b"".join(_piece(word, -float(i), kinds.get(word, 1)) for i, word in enumerate(WORDS))
    trainer = b"\x18\x02" + b"\x20" + bytes([len(WORDS)])  # model_type BPE, vocab_size
    normalizer = b"\x0a\x08identity" + b"\x18\x01" + b"\x20\x00"
    return (
        pieces
        + b"\x12"
        + bytes([len(trainer)])
        + trainer
        + b"\x1a"
        + bytes([len(normalizer)])
        + normalizer
    )


def _sentencepiece(rng: np.random.Generator, number: int, folder: Path) -> None:
    name = ("LlamaTokenizer", "T5Tokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast")[number % 4]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, "legacy": bool(number % 3), **SPECIAL})
    )
    (folder / "tokenizer.model").write_bytes(changed_bytes(rng, sentencepiece_model()))
    _use(folder)


READERS = {"tokenizer": _tokenizer, "sentencepiece": _sentencepiece}
