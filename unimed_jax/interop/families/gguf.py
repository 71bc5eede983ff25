"""Reads LLaMA decoders from GGUF files: settings, weights (dequantised) and tokenizer.

The container itself is read by `interop/tensors/gguf.py`.
"""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from unimed_jax.config import AttentionLinear, DecoderConfig, ModelConfig, MoeConfig, RopeScaling
from unimed_jax.errors import UserError
from unimed_jax.files import new_folder
from unimed_jax.interop.families.hf import copies_of_linear, has_bias
from unimed_jax.interop.families.hf_config import refuse_other_decoder
from unimed_jax.interop.tensors.gguf import GgufFile
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import Entry, Table, folded
from unimed_jax.model.layers import rope_frequencies

# --------------------------------------------------------------------------------------------------
# The decoder
# --------------------------------------------------------------------------------------------------

# The keys under "llama." that are read.
READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
}
# Keys that change no number, whatever they say: what was done before, or what this architecture
# does not read.
DESCRIPTIVE = {
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "attention.layer_norm_epsilon",
    "attention.group_norm_epsilon",
    "attention.group_norm_groups",
}
# Keys that change nothing at these values. Any other value, and any other key, is refused.
NEUTRAL = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "leading_dense_block_count": 0,
    "pooling_type": 0,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}
# The largest counts that are accepted, since a file may say anything.
LARGEST = {"block_count": 10_000, "attention.head_count": 1 << 16, "attention.head_count_kv": 1 << 16}
# Our linear -> its name within a block of the file.
LINEARS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def decoder_from_gguf(file: GgufFile) -> DecoderConfig:
    """Translates the settings in a file into ours.

    Raises UserError, naming the key, for what is not supported.
    """
    _refuse_unknown_keys(file)

    def count(word: str, default: int | None = None) -> int:
        number = file.value(f"llama.{word}", int, default)
        if not 1 <= number <= LARGEST.get(word, 1 << 24):
            raise UserError(f"{file.origin}: llama.{word} is {number}; get the file again.")
        return number

    width = count("embedding_length")
    heads = count("attention.head_count")
    head_dim = count("attention.key_length", width // heads)
    for word in ("attention.value_length", "rope.dimension_count"):
        if count(word, head_dim) != head_dim:
            raise UserError(
                f"{file.origin}: llama.{word} is {count(word)} and a key has {head_dim}; they must "
                "be the same here."
            )
    theta = file.value("llama.rope.freq_base", float, 10000.0)
    embedding = file.stored.get("token_embd.weight")
    biased = [
        linear for linear in get_args(AttentionLinear) if f"blk.0.{LINEARS[linear]}.bias" in file.stored
    ]
    return DecoderConfig(
        vocab=embedding.shape[0] if embedding else 0,
        width=width,
        depth=count("block_count"),
        heads=heads,
        kv_heads=count("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=count("feed_forward_length"),
        norm_eps=file.value("llama.attention.layer_norm_rms_epsilon", float),
        attention_bias=tuple(biased),
        mlp_bias="blk.0.ffn_up.bias" in file.stored,
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, head_dim, theta),
        tied_head="output.weight" not in file.stored,
    )


def _refuse_unknown_keys(file: GgufFile) -> None:
    """Raises UserError for another architecture, or for a key that could change the results."""
    architecture = file.value("general.architecture", str)
    if architecture != "llama":
        raise UserError(
            f"{file.origin}: architecture {architecture!r} is not supported; give a file of 'llama'."
        )
    for key in file.fields:
        word = key.removeprefix("llama.")
        if word == key or word in READ | DESCRIPTIVE:
            continue
        value = file.value(key, object)
        if word not in NEUTRAL or value != NEUTRAL[word]:
            raise UserError(
                f"{file.origin}: {key}={str(value)[:80]} is not supported; give a model without it."
            )


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> RopeScaling | None:
    """Reads how the rotary frequencies are scaled: linearly, as in Llama 3, or not at all.

    GGUF stores Llama 3's scaling as one divisor per frequency (`rope_freqs.weight`), from which its
    factor is taken.
    """
    kind = file.value("llama.rope.scaling.type", str, "linear")  # the format's default
    if kind not in ("linear", "none"):
        raise UserError(
            f"{file.origin}: llama.rope.scaling.type={kind} is not supported; choose from none, linear."
        )
    factor = _rope_factor(file) if kind == "linear" else 1.0
    if factor != 1 and "rope_freqs.weight" in file.stored:
        raise UserError(
            f"{file.origin} scales its positions twice, by rope.scaling.factor and by rope_freqs.weight."
        )
    if factor != 1:
        return RopeScaling(kind="linear", factor=factor)
    if "rope_freqs.weight" not in file.stored:
        return None
    divisors = file.read("rope_freqs.weight")  # [head_dim / 2]
    # The other three numbers are the same in all Llama 3.x, and the default here.
    scaling = RopeScaling(factor=round(float(divisors.max()), 3))
    expected = rope_frequencies(head_dim, theta, None) / rope_frequencies(head_dim, theta, scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(
            f"{file.origin}: rope_freqs.weight is not Llama-3's scaling of the rotary embedding (factor "
            f"{divisors.max()} over {scaling.original_positions} positions), and so is not supported."
        )
    return scaling


def _rope_factor(file: GgufFile) -> float:
    """Reads the factor of linear scaling; it is 1 if the file has none.

    A stored 0 means none, too, as in llama.cpp.
    """
    old = file.value("llama.rope.scale_linear", float, 0.0)  # what the key was called at first
    factor = file.value("llama.rope.scaling.factor", float, old) or 1.0
    if not 0 < factor < float("inf"):
        raise UserError(f"{file.origin}: llama.rope.scaling.factor is {factor}; get the file again.")
    return factor


def gguf_decoder_table(d: DecoderConfig, moe: MoeConfig = MoeConfig()) -> Table:
    """Lists the tensors of a decoder in a GGUF file.

    With experts in `moe`, every expert of a layer is read from the one MLP that the file has there.
    """
    table = [
        Entry("token_embd.weight", "decoder/embedding"),
        Entry("output_norm.weight", "decoder/norm/scale"),
    ]
    for i in range(d.depth):
        for ours, theirs in LINEARS.items():
            table += _linear_entries(f"blk.{i}.{theirs}", d, moe, ours, i)
        table.append(Entry(f"blk.{i}.attn_norm.weight", "decoder/layers/norm1/scale", (i,)))
        table.append(Entry(f"blk.{i}.ffn_norm.weight", "decoder/layers/norm2/scale", (i,)))
    if not d.tied_head:
        table.append(Entry("output.weight", "decoder/head", layout="transpose"))
    divisors_read = d.rope_scaling is not None and d.rope_scaling.kind == "llama3"  # by `_rope_scaling`
    return Table(tuple(table), ("rope_freqs.weight",) if divisors_read else ())


def _linear_entries(name: str, d: DecoderConfig, moe: MoeConfig, linear: str, layer: int) -> list[Entry]:
    """Maps one linear of the file to our kernel.

    Queries and keys are stored with the two channels of each rotary pair next to each other.
    """
    heads = {"q": d.heads, "k": d.kv_heads}.get(linear, 0)
    kernel_layout, bias_layout = ("pairs", "pairs") if heads else ("transpose", "same")
    entries = []
    for leaf, index in copies_of_linear(d, moe, linear, layer):
        entries.append(Entry(f"{name}.weight", f"{leaf}/kernel", index, kernel_layout, heads=heads))
        if has_bias(d, linear):
            entries.append(Entry(f"{name}.bias", f"{leaf}/bias", index, bias_layout, heads=heads))
    return entries


def load_gguf(path: str | Path, config: ModelConfig, to: Destination) -> dict[str, Any]:
    """Loads the decoder's leaves, except adapters and routers, from a GGUF file.

    `to` as in `load_leaves`.

    path: as in `find_gguf`. Experts start as copies of their layer's MLP. Raises UserError if the
    file's settings are not those of `config` or its weights do not fit.
    """
    file = GgufFile(path)
    refuse_other_decoder(decoder_from_gguf(file), config.decoder, file.origin)
    _refuse_unknown_quantisations(file)
    return load_leaves(gguf_decoder_table(config.decoder, config.moe), file, to)


def _refuse_unknown_quantisations(file: GgufFile) -> None:
    """Raises UserError for tensors that the package cannot dequantise."""
    opaque = [name for name, stored in file.stored.items() if isinstance(stored.dtype, str)]
    if not opaque:
        return
    kinds = ", ".join(sorted({str(file.stored[name].dtype) for name in opaque}))
    verb = "is" if len(opaque) == 1 else "are"
    raise UserError(
        f"{file.origin}: {', '.join(folded(opaque))} {verb} stored as {kinds}, which the package "
        "gguf does not dequantise; give a file of another type (F16, Q8_0, Q4_K, ...)."
    )


# --------------------------------------------------------------------------------------------------
# The tokenizer
# --------------------------------------------------------------------------------------------------

# Llama 3's rule for cutting text into words, as in its own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> (a pattern that cuts text first, or None; whether GPT-2's rule then cuts the
# pieces).
WORD_RULES: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, True),
    # every digit by itself
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_LLAMA3, False)),
}
LONGEST_TOKEN = 1000  # characters; every way to cut a token in two is examined
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type
NO_TOKEN = (-1, 0xFFFFFFFF)  # llama.cpp's number for none, signed and unsigned
# Hugging Face's name of a special token -> the word for it in tokenizer.ggml.<word>_token_id.
SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def write_tokenizer(path: str | Path, folder: str | Path) -> None:
    """Writes the file's tokenizer as a Hugging Face folder, chat template included.

    Byte-level BPE ("gpt2") and SentencePiece's BPE ("llama") are supported; UserError for others. As in
    the original, a byte-level vocabulary that lacks a byte drops it from text (SmolLM2 lacks 21:
    control characters, and bytes that no character has).
    """
    file = GgufFile(path)
    tokens = _list(file, "tokens", str)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UserError(
            f"{file.origin} holds a token twice (tokenizer.ggml.tokens); get the file again."
        )
    longest = max(map(len, tokens), default=0)
    if longest > LONGEST_TOKEN:
        raise UserError(
            f"{file.origin} holds a token of {longest} characters (tokenizer.ggml.tokens); get it again."
        )
    special = _special_tokens(file, tokens)
    made = _tokenizer(file, vocabulary, special)
    with new_folder(folder) as place:
        made.save(str(place / "tokenizer.json"))
        settings = json.dumps(_tokenizer_settings(file, special), indent=2)
        (place / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")


def _special_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    """Gives the text of each special token that the file has, by Hugging Face's name for it.

    Raises UserError for a special token that the vocabulary lacks.
    """
    found = {}
    for name, word in SPECIAL_TOKENS.items():
        key = f"tokenizer.ggml.{word}_token_id"
        number = file.value(key, int, -1)
        if number in NO_TOKEN:
            continue
        if not 0 <= number < len(tokens):
            raise UserError(
                f"{file.origin}: {key} is {number}, and the file has {len(tokens)} tokens; get it again."
            )
        found[name] = tokens[number]
    return found


def _tokenizer(
    file: GgufFile, vocabulary: dict[str, int], special: dict[str, str]
) -> tokenizers.Tokenizer:
    """Builds the file's tokenizer, with its special tokens and, if it adds one, the start token."""
    kind = file.value("tokenizer.ggml.model", str)
    if kind == "gpt2":
        made = _byte_level(file, vocabulary)
    elif kind == "llama":
        made = _sentencepiece(file, vocabulary, special.get("unk_token"))
    else:
        raise UserError(
            f"{file.origin}: its tokenizer is of kind {kind!r}; choose a file with 'gpt2' or 'llama'."
        )
    for token, number in zip(vocabulary, _types(file, len(vocabulary)), strict=True):
        if number in (CONTROL, USER_DEFINED):
            made.add_tokens([tokenizers.AddedToken(token, normalized=False, special=number == CONTROL)])
    bos = special.get("bos_token")
    if file.value("tokenizer.ggml.add_bos_token", bool, kind == "llama") and bos is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, vocabulary[bos])],
        )
    return made


def _tokenizer_settings(file: GgufFile, special: dict[str, str]) -> dict[str, Any]:
    """Makes the content of tokenizer_config.json."""
    settings = {
        # As in data/tokenizer.py: save_pretrained names a class that older versions lack.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
        "model_max_length": file.value("llama.context_length", int, 0) or int(1e30),
    }
    template = file.value("tokenizer.chat_template", str, "")
    return settings | ({"chat_template": template} if template else {})


def _list(
    file: GgufFile, key: str, kind: type, length: int | None = None, default: list | None = None
) -> list:
    """Reads the list under tokenizer.ggml.<key>, which must hold `length` values of type `kind`."""
    values = file.value(f"tokenizer.ggml.{key}", list, default)
    if not all(isinstance(value, kind) for value in values) or len(values) != (length or len(values)):
        raise UserError(
            f"{file.origin}: tokenizer.ggml.{key} is not a list of {length or 'any number of'} "
            f"{kind.__name__}; get the file again."
        )
    return values


def _types(file: GgufFile, count: int) -> list[int]:
    """Reads the kind of each token; without a list all are normal."""
    return _list(file, "token_type", int, count, [NORMAL] * count)


def _byte_level(file: GgufFile, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """Builds GPT-2's kind of tokenizer: BPE over bytes, with the merges that the file lists."""
    name = file.value("tokenizer.ggml.pre", str)
    if name not in WORD_RULES:
        raise UserError(
            f"{file.origin}: how its tokenizer cuts words (tokenizer.ggml.pre {name!r}) is not "
            "known here; give the model's Hugging Face tokenizer folder as config.text.tokenizer "
            f"(known: {', '.join(WORD_RULES)})."
        )
    pattern, gpt2_rule = WORD_RULES[name]
    merges = [tuple(merge.split(" ")) for merge in _list(file, "merges", str)]
    # A word of Llama 3 that is itself a token is taken whole, even if no merges lead to it.
    whole_words = pattern == _LLAMA3
    try:
        made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    except Exception as error:  # a merge of unknown tokens
        raise UserError(
            f"{file.origin}: its merges do not fit its tokens ({error}); get the file again."
        ) from error
    steps: list[Any] = []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_rule))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(
    file: GgufFile, vocabulary: dict[str, int], unknown: str | None
) -> tokenizers.Tokenizer:
    """Builds SentencePiece's BPE, which merges the two neighbours whose joint token scores highest.

    The file holds scores instead of merges, so every split of every token becomes a merge, highest
    score first.
    """
    scores, types = _list(file, "scores", float, len(vocabulary)), _types(file, len(vocabulary))
    splits = [
        (-scores[i], vocabulary[word[:cut]], vocabulary[word[cut:]], word[:cut], word[cut:])
        for word, i in vocabulary.items()
        if types[i] in (NORMAL, USER_DEFINED)  # "<s>" is never made of letters
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(splits)]
    bpe = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(bpe)
    space = file.value("tokenizer.ggml.add_space_prefix", bool, True)
    before = [normalizers.Prepend("▁")] if space else []
    after = [decoders.Strip(" ", 1, 0)] if space else []
    made.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *after,
        ]
    )
    return made
