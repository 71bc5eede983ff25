"""Hugging Face's decoders: their settings, tensor names and folders, in both directions.

Nothing here needs torch, runs code from a folder or fetches anything.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import NamedSharding
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from unimed_jax.config import DecoderConfig, RopeScaling, UserError
from unimed_jax.interop.files import new_folder, open_weights, write_safetensors
from unimed_jax.interop.load import load_leaves
from unimed_jax.interop.table import Entry, Table, each_published, published

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"},
}
POSITIONS = 4096  # max_position_embeddings of an export: a rotary embedding has no limit, but the field must be there


def read_settings(folder: str | Path) -> PretrainedConfig:
    """The folder's config.json as its own class. Raises UserError where there is none, or of an unknown kind."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; give the folder of a Hugging Face model.")
    try:
        # Without trust a config that asks for code of its own is refused, not asked about.
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        raise UserError(
            f"{folder}/config.json cannot be read ({' '.join(str(error).split())[:200]}); check the folder."
        ) from error


def decoder_config(settings: PretrainedConfig, where: str = "config.json") -> DecoderConfig:
    """Our settings of the same decoder. Raises UserError, naming the field, for what is not supported."""
    family = settings.model_type
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported; choose from {', '.join(FAMILIES)}.")
    if getattr(settings, "quantization_config", None):
        raise UserError(f"{where}: the weights are quantised (quantization_config); give the original ones.")
    act = getattr(settings, "hidden_activation", None) or settings.hidden_act
    if act not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act {act!r} is not supported; choose from {', '.join(ACTIVATIONS)}.")
    heads = settings.num_attention_heads
    theta, scaling, fraction = _rope(settings.rope_parameters, where)
    common: dict[str, Any] = {
        "vocab": settings.vocab_size,
        "width": settings.hidden_size,
        "depth": settings.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(settings, "num_key_value_heads", None) or heads,
        "head_dim": getattr(settings, "head_dim", None) or settings.hidden_size // heads,
        "mlp_width": settings.intermediate_size,
        "norm_eps": float(settings.rms_norm_eps),
        "activation": ACTIVATIONS[act],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_fraction": fraction,
        "tied_head": bool(settings.tie_word_embeddings),
    }
    return DecoderConfig(**{**common, **FAMILIES[family](settings)})


def _rope(parameters: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None, float]:
    """(theta, scaling, rotated fraction of a head)."""
    kind, scaling = parameters.get("rope_type", "default"), None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_positions=int(parameters["original_max_position_embeddings"]),
        )
    elif kind != "default":
        raise UserError(f"{where}: rope_type {kind!r} is not supported; choose from default, llama3.")
    return float(parameters["rope_theta"]), scaling, float(parameters.get("partial_rotary_factor", 1.0))


def _windows(settings: PretrainedConfig) -> tuple[int, ...]:
    """Sliding windows of the layers, as the shortest run that repeats."""
    kinds = getattr(settings, "layer_types", None) or ["sliding_attention"] * settings.num_hidden_layers
    windows = [settings.sliding_window or 0 if kind == "sliding_attention" else 0 for kind in kinds]
    if not any(windows):
        return ()
    return next(
        tuple(windows[:n])
        for n in range(1, len(windows) + 1)
        if all(w == windows[i % n] for i, w in enumerate(windows))
    )


# Family -> the fields in which it differs from the plain LLaMA.
FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": lambda s: {
        "attention_bias": ("q", "k", "v", "o") if s.attention_bias else (),
        "mlp_bias": bool(s.mlp_bias),
    },
    "mistral": lambda s: {"windows": _windows(s)},
    "qwen2": lambda s: {"attention_bias": ("q", "k", "v"), "windows": _windows(s)},
}


def hf_settings(d: DecoderConfig, positions: int = POSITIONS) -> PretrainedConfig:
    """Hugging Face's settings of the same decoder, in the first family that can say all of ours.

    Raises UserError where none can.
    """
    rope = {"rope_type": "default", "rope_theta": d.rope_theta}
    if d.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": d.rope_scaling.factor,
            "low_freq_factor": d.rope_scaling.low_freq_factor,
            "high_freq_factor": d.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": d.rope_scaling.original_positions,
        }
    windows = _every(d).windows
    words: dict[str, Any] = {
        "vocab_size": d.vocab,
        "hidden_size": d.width,
        "intermediate_size": d.mlp_width,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "hidden_act": {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[d.activation],
        "rms_norm_eps": d.norm_eps,
        "tie_word_embeddings": d.tied_head,
        "rope_parameters": rope,
        "attention_bias": bool(d.attention_bias),
        "mlp_bias": d.mlp_bias,
        "sliding_window": max(windows) or None,
        "use_sliding_window": any(windows),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        "max_position_embeddings": max(positions, 2 * d.rope_scaling.original_positions if d.rope_scaling else 0),
    }
    for family in FAMILIES:
        kind: Any = CONFIG_MAPPING[family]
        known = {field.name for field in dataclasses.fields(kind)}
        try:
            settings = kind(**{word: value for word, value in words.items() if word in known})
            if _every(decoder_config(settings)) == _every(d):
                settings.architectures = [kind.__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"]
                return settings
        except Exception:  # noqa: S112  the family's own checks refuse these numbers
            continue
    raise UserError(
        f"no Hugging Face decoder ({', '.join(FAMILIES)}) has all settings of config.model.decoder, so it cannot be "
        "exported as one."
    )


def _every(d: DecoderConfig) -> DecoderConfig:
    """The same decoder with a window for every layer."""
    return dataclasses.replace(d, windows=tuple(np.resize(d.windows or (0,), d.depth).tolist()))


# --------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def leaf_of(linear: str) -> str:
    """Path of one of the decoder's linears."""
    return f"decoder/layers/{'attention' if linear in 'qkvo' else 'mlp'}/{linear}"


def decoder_table(d: DecoderConfig, prefix: str = "", wrapped: tuple[str, ...] = ()) -> Table:
    """The decoder's tensors under `prefix`; `wrapped` linears carry PEFT's ".base_layer"."""
    table = [Entry(f"{prefix}model.embed_tokens.weight", "decoder/embedding")]
    for i in range(d.depth):
        layer = f"{prefix}model.layers.{i}"
        for ours, theirs in LINEARS.items():
            name = f"{layer}.{theirs}{'.base_layer' if ours in wrapped else ''}"
            table.append(Entry(f"{name}.weight", f"{leaf_of(ours)}/kernel", (i,), "transpose"))
            if ours in d.attention_bias or (ours not in "qkvo" and d.mlp_bias):
                table.append(Entry(f"{name}.bias", f"{leaf_of(ours)}/bias", (i,)))
        table.append(Entry(f"{layer}.input_layernorm.weight", "decoder/layers/norm1/scale", (i,)))
        table.append(Entry(f"{layer}.post_attention_layernorm.weight", "decoder/layers/norm2/scale", (i,)))
    table.append(Entry(f"{prefix}model.norm.weight", "decoder/norm/scale"))
    ignored = ["*.rotary_emb.inv_freq"]
    if d.tied_head:
        ignored.append(f"{prefix}lm_head.weight")  # the embedding again
    else:
        table.append(Entry(f"{prefix}lm_head.weight", "decoder/head", layout="transpose"))
    return Table(tuple(table), tuple(ignored))


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


def load_decoder(
    folder: str | Path,
    d: DecoderConfig,
    leaves: Mapping[str, Any],
    shardings: Mapping[str, NamedSharding] | None = None,
    dtypes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The decoder's leaves (but for adapters) from a Hugging Face folder; arguments as in `load_leaves`.

    Raises UserError where its settings are not `d` or its weights do not fit.
    """
    refuse_differences(decoder_config(read_settings(folder), f"{folder}/config.json"), d, folder)
    return load_leaves(decoder_table(d), open_weights(folder), leaves, shardings, dtypes)


def refuse_differences(theirs: DecoderConfig, d: DecoderConfig, where: str | Path) -> None:
    """Raises UserError where the decoder found at `where` is not `d`."""
    differ = differences(theirs, d)
    if differ:
        text = ", ".join(f"{name} is {there!r} there and {here!r} here" for name, there, here in differ)
        raise UserError(f"config.model.decoder is not the decoder of {where}: {text}; set what is said there.")


def differences(a: DecoderConfig, b: DecoderConfig) -> list[tuple[str, Any, Any]]:
    """(field, value of a, value of b) wherever two decoders compute differently."""
    a, b = _every(a), _every(b)
    names = (field.name for field in dataclasses.fields(DecoderConfig))
    return [(n, getattr(a, n), getattr(b, n)) for n in names if getattr(a, n) != getattr(b, n)]


def export_decoder(
    out: str | Path,
    d: DecoderConfig,
    leaves: Mapping[str, Any],
    tokenizer: str | Path,
    ids: Mapping[str, int],
    positions: int = POSITIONS,
) -> None:
    """Writes a folder that `AutoModelForCausalLM` loads: config.json, safetensors, the tokenizer's files.

    leaves: the decoder's, adapters merged (`merge_lora`), by path; tokenizer: its folder; ids: bos, eos, pad.
    Raises UserError where no Hugging Face family has these settings, or where `out` holds something already.
    """
    settings = hf_settings(d, positions)
    for name, number in ids.items():
        setattr(settings, f"{name}_token_id", number)
    table = decoder_table(d)
    stored = published(table, leaves)
    settings.dtype = str(max((s.dtype for s in stored.values()), key=lambda dtype: np.dtype(dtype).itemsize))
    with new_folder(out) as folder:
        settings.save_pretrained(folder)
        copy_tokenizer(tokenizer, folder)
        write_safetensors(folder, stored, each_published(table, leaves))


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
