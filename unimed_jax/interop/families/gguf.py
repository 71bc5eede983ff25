"""GGUF files, llama.cpp's format, of LLaMA decoders: settings, weights (dequantised) and tokenizer.

The format is read by the package `gguf` (extra `gguf`), which maps the file: a tensor is in memory while it is read.
"""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from unimed_jax.config import AttentionLinear, DecoderConfig, MoeConfig, RopeScaling
from unimed_jax.errors import UserError
from unimed_jax.files import new_folder
from unimed_jax.interop.families.hf import copies_of_linear, refuse_other_decoder
from unimed_jax.interop.tensors.gguf import GgufFile
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import Entry, Table, folded
from unimed_jax.model.layers import rope_frequencies

# --------------------------------------------------------------------------------------------------
# The decoder
# --------------------------------------------------------------------------------------------------

# What is read of what a file says under "llama.".
READ = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor"),
}
# Words that change nothing at these values. At others, and for other words, a file is refused.
NEUTRAL = {
    **{"attention.causal": True, "attention.sliding_window": 0, "expert_count": 0, "expert_used_count": 0},
    "rope.scale_linear": 1.0,
}
LINEARS = {
    **{"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
}


def decoder_from_gguf(file: GgufFile) -> DecoderConfig:
    """Our settings of the same decoder. Raises UserError, naming the key, for what is not supported."""
    architecture = file.value("general.architecture", str)
    if architecture != "llama":
        raise UserError(f"{file.origin}: architecture {architecture!r} is not supported; give a file of 'llama'.")
    for key in file.fields:
        word = key.removeprefix("llama.")
        if word == key or word in READ:
            continue
        said = file.value(key, object)
        if word not in NEUTRAL or said != NEUTRAL[word]:
            raise UserError(f"{file.origin}: {key}={str(said)[:80]} is not supported; give a model without it.")

    def count(word: str, default: int | None = None) -> int:
        number = file.value(f"llama.{word}", int, default)
        if number < 1:
            raise UserError(f"{file.origin}: llama.{word} is {number}; get the file again.")
        return number

    width, heads = count("embedding_length"), count("attention.head_count")
    head_dim = count("attention.key_length", width // heads)
    for word in ("attention.value_length", "rope.dimension_count"):
        if count(word, head_dim) != head_dim:
            raise UserError(
                f"{file.origin}: llama.{word} is {count(word)} and a key has {head_dim}; they must be the same here."
            )
    theta = file.value("llama.rope.freq_base", float, 10000.0)
    return DecoderConfig(
        vocab=file.stored["token_embd.weight"].shape[0] if "token_embd.weight" in file.stored else 0,
        width=width,
        depth=count("block_count"),
        heads=heads,
        kv_heads=count("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=count("feed_forward_length"),
        norm_eps=file.value("llama.attention.layer_norm_rms_epsilon", float),
        attention_bias=tuple(
            ours for ours in get_args(AttentionLinear) if f"blk.0.{LINEARS[ours]}.bias" in file.stored
        ),
        mlp_bias="blk.0.ffn_up.bias" in file.stored,
        rope_theta=theta,
        rope_scaling=_scaling(file, head_dim, theta),
        tied_head="output.weight" not in file.stored,
    )


def _scaling(file: GgufFile, head_dim: int, theta: float) -> RopeScaling | None:
    """All frequencies divided by one number, or Llama-3's scaling, of which files hold by how much each is divided."""
    kind = file.value("llama.rope.scaling.type", str, "none")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=file.value("llama.rope.scaling.factor", float))
    if kind != "none":
        raise UserError(f"{file.origin}: llama.rope.scaling.type={kind} is not supported; choose from none, linear.")
    if "rope_freqs.weight" not in file.stored:
        return None
    factors = file.read("rope_freqs.weight")
    scaling = RopeScaling(factor=round(float(factors.max()), 3))  # the rest is the same in all Llama-3.x
    ours = rope_frequencies(head_dim, theta, None) / rope_frequencies(head_dim, theta, scaling)
    if factors.shape != ours.shape or not np.allclose(factors, ours, rtol=1e-3):
        raise UserError(
            f"{file.origin}: rope_freqs.weight is not Llama-3's scaling of the rotary embedding (factor {factors.max()}"
            f" over {scaling.original_positions} positions), and so not supported."
        )
    return scaling


def gguf_decoder_table(d: DecoderConfig, moe: MoeConfig = MoeConfig()) -> Table:
    table = [Entry("token_embd.weight", "decoder/embedding"), Entry("output_norm.weight", "decoder/norm/scale")]
    for i in range(d.depth):
        for ours, theirs in LINEARS.items():
            heads = {"q": d.heads, "k": d.kv_heads}.get(ours, 0)
            layouts = ("pairs", "pairs") if heads else ("transpose", "same")
            name = f"blk.{i}.{theirs}"
            for leaf, at in copies_of_linear(d, moe, ours, i):
                table.append(Entry(f"{name}.weight", f"{leaf}/kernel", at, layouts[0], heads=heads))
                if ours in d.attention_bias or (ours not in "qkvo" and d.mlp_bias):
                    table.append(Entry(f"{name}.bias", f"{leaf}/bias", at, layouts[1], heads=heads))
        table.append(Entry(f"blk.{i}.attn_norm.weight", "decoder/layers/norm1/scale", (i,)))
        table.append(Entry(f"blk.{i}.ffn_norm.weight", "decoder/layers/norm2/scale", (i,)))
    if not d.tied_head:
        table.append(Entry("output.weight", "decoder/head", layout="transpose"))
    return Table(tuple(table), ("rope_freqs.weight",) if d.rope_scaling and d.rope_scaling.kind == "llama3" else ())


def load_gguf(
    path: str | Path,
    d: DecoderConfig,
    to: Destination,
    moe: MoeConfig = MoeConfig(),
) -> dict[str, Any]:
    """The decoder's leaves (but for adapters and routers) from a GGUF file; `to` as in `load_leaves`.

    Experts start as copies of their layer's MLP.

    path: as in `find`. Raises UserError where its settings are not `d` or its weights do not fit.
    """
    file = GgufFile(path)
    refuse_other_decoder(decoder_from_gguf(file), d, file.origin)
    opaque = [name for name, stored in file.stored.items() if isinstance(stored.dtype, str)]
    if opaque:
        kinds = ", ".join(sorted({str(file.stored[name].dtype) for name in opaque}))
        verb = "is" if len(opaque) == 1 else "are"
        raise UserError(
            f"{file.origin}: {', '.join(folded(opaque))} {verb} stored as {kinds}, which the package "
            "gguf does not dequantise; give a file of another type (F16, Q8_0, Q4_K, ...)."
        )
    return load_leaves(gguf_decoder_table(d, moe), file, to)


# --------------------------------------------------------------------------------------------------
# The tokenizer
# --------------------------------------------------------------------------------------------------

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> what cuts text into words before GPT-2's rule (or, where that is False, in its place).
CUTS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", True)),  # digits stand alone
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_LLAMA3, False)),
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer(path: str | Path, folder: str | Path) -> None:
    """Writes the file's tokenizer as a Hugging Face folder, chat template included.

    Byte-level BPE ("gpt2") and SentencePiece's BPE ("llama") are read. As in the original, a byte-level vocabulary
    that lacks a byte drops it from text (SmolLM2 lacks 21: control characters and bytes of no character).
    Raises UserError for another kind of tokenizer.
    """
    file = GgufFile(path)
    kind = file.value("tokenizer.ggml.model", str)
    tokens = _list(file, "tokens", str)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UserError(f"{file.origin} holds a token twice (tokenizer.ggml.tokens); get the file again.")
    ids = {name: file.value(f"tokenizer.ggml.{word}_token_id", int, -1) for name, word in IDS.items()}
    words = {name: tokens[number] for name, number in ids.items() if 0 <= number < len(tokens)}
    if kind == "gpt2":
        made = _byte_level(file, vocabulary)
    elif kind == "llama":
        made = _sentencepiece(file, vocabulary, words.get("unk_token"))
    else:
        raise UserError(f"{file.origin}: its tokenizer is of kind {kind!r}; choose a file with 'gpt2' or 'llama'.")
    for token, number in zip(tokens, _types(file, len(tokens)), strict=True):
        if number in (CONTROL, USER_DEFINED):
            made.add_tokens([tokenizers.AddedToken(token, normalized=False, special=number == CONTROL)])
    bos = words.get("bos_token")
    if file.value("tokenizer.ggml.add_bos_token", bool, kind == "llama") and bos is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    # As in data/tokenizer.py: save_pretrained names a class that older versions lack.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **words}
    settings["model_max_length"] = file.value("llama.context_length", int, 0) or int(1e30)
    template = file.value("tokenizer.chat_template", str, "")
    if template:
        settings["chat_template"] = template
    with new_folder(folder) as place:
        made.save(str(place / "tokenizer.json"))
        (place / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _list(file: GgufFile, key: str, kind: type, length: int | None = None, default: list | None = None) -> list:
    """The list under tokenizer.ggml.<key>, one entry for each of `length` tokens."""
    values = file.value(f"tokenizer.ggml.{key}", list, default)
    if not all(isinstance(value, kind) for value in values) or len(values) != (length or len(values)):
        raise UserError(
            f"{file.origin}: tokenizer.ggml.{key} is no list of {length or 'any number of'} {kind.__name__}; get the "
            "file again."
        )
    return values


def _types(file: GgufFile, count: int) -> list[int]:
    return _list(file, "token_type", int, count, [NORMAL] * count)


def _byte_level(file: GgufFile, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    name = file.value("tokenizer.ggml.pre", str)
    if name not in CUTS:
        raise UserError(
            f"{file.origin}: how its tokenizer cuts words (tokenizer.ggml.pre {name!r}) is not known here; give the "
            f"model's Hugging Face tokenizer folder as config.text.tokenizer (known: {', '.join(CUTS)})."
        )
    cut, words = CUTS[name]
    merges = [tuple(merge.split(" ")) for merge in _list(file, "merges", str)]
    try:
        # What was learned by Llama-3's rule is a token as it stands, also where no merge leads to it.
        made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut == _LLAMA3))
    except Exception as error:  # a merge of unknown tokens
        raise UserError(f"{file.origin}: its merges do not fit its tokens ({error}); get the file again.") from error
    steps: list[Any] = [] if cut is None else [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(file: GgufFile, vocabulary: dict[str, int], unknown: str | None) -> tokenizers.Tokenizer:
    """BPE of SentencePiece: of two neighbours those are joined first whose token scores highest."""
    scores, types = _list(file, "scores", float, len(vocabulary)), _types(file, len(vocabulary))
    joined = [
        (-scores[i], vocabulary[word[:cut]], vocabulary[word[cut:]], word[:cut], word[cut:])
        for word, i in vocabulary.items()
        if types[i] in (NORMAL, USER_DEFINED)  # "<s>" is never made of letters
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(joined)]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = file.value("tokenizer.ggml.add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Prepend("▁")] if space else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(" ", 1, 0)] if space else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return made
