"""Hugging Face's decoders: their settings, tensor names and folders, in both directions.

Nothing here needs torch, runs code from a folder or fetches anything.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from unimed_jax.config import DecoderConfig, MoeConfig, RopeScaling
from unimed_jax.errors import UserError
from unimed_jax.files import new_folder
from unimed_jax.interop.tensors.files import open_weights, write_safetensors
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import Entry, Table, each_published, published_shapes

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"},
}
POSITIONS = 4096  # max_position_embeddings of an export: a rotary embedding has no limit, but the field must be there


def read_hf_config(folder: str | Path) -> PretrainedConfig:
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


def decoder_from_hf(settings: PretrainedConfig, where: str = "config.json") -> DecoderConfig:
    """Our settings of the same decoder. Raises UserError, naming the field, for what is not supported."""
    if settings.model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type {settings.model_type!r} is not supported; choose from {', '.join(FAMILIES)}."
        )
    family = FAMILIES[settings.model_type]
    if getattr(settings, "quantization_config", None):
        raise UserError(f"{where}: the weights are quantised (quantization_config); give the original ones.")
    for name in family.unsupported:
        if getattr(settings, name):
            raise UserError(
                f"{where}: {name}={getattr(settings, name)!r} is not supported for {settings.model_type}; give a model "
                "without it."
            )
    act = getattr(settings, family.activation)
    if act not in ACTIVATIONS:
        raise UserError(f"{where}: {family.activation} {act!r} is not supported; choose from {', '.join(ACTIVATIONS)}.")
    heads = settings.num_attention_heads
    common: dict[str, Any] = {
        "vocab": settings.vocab_size,
        "width": settings.hidden_size,
        "depth": settings.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(settings, "num_key_value_heads", None) or heads,
        "head_dim": getattr(settings, "head_dim", None) or settings.hidden_size // heads,
        "mlp_width": settings.intermediate_size,
        "norm_eps": getattr(settings, family.eps),
        "activation": ACTIVATIONS[act],
        "tied_head": bool(settings.tie_word_embeddings),
        **family.ours(settings),
    }
    return DecoderConfig(**common, **_rope(settings, family, bool(common.get("windows")), where))


def _rope(settings: Any, family: "Family", windowed: bool, where: str) -> dict[str, Any]:
    """The fields of the rotary embedding."""
    parameters, local = settings.rope_parameters, None
    if family.local_rope:
        parameters, near = parameters["full_attention"], parameters["sliding_attention"]
        if near.get("rope_type", "default") != "default":
            raise UserError(
                f"{where}: rope_type {near['rope_type']!r} of rope_parameters.sliding_attention is not supported; the "
                "layers with a window must have the default."
            )
        local = float(near["rope_theta"]) if windowed else None
    if "rope_theta" not in parameters:
        raise UserError(f"{where}: rope_parameters is not supported, as it holds no rope_theta; set it.")
    kind, scaling = parameters.get("rope_type", "default"), None
    fraction = float(parameters.get("partial_rotary_factor", 1.0))
    if fraction != 1 and not family.partial_rotary:
        raise UserError(
            f"{where}: partial_rotary_factor={fraction} is not supported for {settings.model_type}; it must be 1."
        )
    if kind == "linear":
        scaling = RopeScaling(kind="linear", factor=float(parameters["factor"]))
    elif kind == "llama3":
        scaling = RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_positions=int(parameters["original_max_position_embeddings"]),
        )
    elif kind != "default":
        raise UserError(f"{where}: rope_type {kind!r} is not supported; choose from default, linear, llama3.")
    theta = float(parameters["rope_theta"])
    if local == theta and scaling is None:
        local = None
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local, "rotary_fraction": fraction}


def _windows(settings: PretrainedConfig) -> tuple[int, ...]:
    """Sliding windows of the layers, as the shortest run that repeats."""
    windows = [settings.sliding_window or 0 if kind == "sliding_attention" else 0 for kind in settings.layer_types]
    if not any(windows):
        return ()
    return next(
        tuple(windows[:n])
        for n in range(1, len(windows) + 1)
        if all(w == windows[i % n] for i, w in enumerate(windows))
    )


def _biases(on: bool, linears: tuple[str, ...] = ("q", "k", "v", "o")) -> tuple[str, ...]:
    return linears if on else ()


class Family(NamedTuple):
    """How a family's settings are to be read."""

    ours: Callable[[Any], dict[str, Any]]  # their settings -> our fields that differ from the plain LLaMA's
    unsupported: tuple[str, ...] = ()  # settings of theirs that must be off
    eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    local_rope: bool = False  # rope_parameters are apart for layers with a window
    partial_rotary: bool = False  # the others ignore partial_rotary_factor


def _gemma(s: Any) -> dict[str, Any]:
    return {"norm": "rms_zero", "scaled_embedding": True, "attention_bias": _biases(s.attention_bias)}


def _gemma2(s: Any) -> dict[str, Any]:
    return {
        **_gemma(s),
        "post_norms": True,
        "query_scale": s.query_pre_attn_scalar**-0.5,
        "windows": _windows(s),
        "logit_softcap": s.final_logit_softcapping,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda s: {"attention_bias": _biases(s.attention_bias), "mlp_bias": s.mlp_bias}),
    "mistral": Family(lambda s: {"windows": (s.sliding_window,) if s.sliding_window else ()}),
    "qwen2": Family(lambda s: {"attention_bias": ("q", "k", "v"), "windows": _windows(s)}),
    "qwen3": Family(
        lambda s: {"attention_bias": _biases(s.attention_bias), "windows": _windows(s), "qk_norm": True},
    ),
    "gemma": Family(_gemma, ("use_bidirectional_attention",)),
    "gemma2": Family(
        lambda s: {**_gemma2(s), "attention_softcap": s.attn_logit_softcapping},
        ("use_bidirectional_attention",),
        activation="hidden_activation",
    ),
    "gemma3_text": Family(
        lambda s: {**_gemma2(s), "qk_norm": True},
        # Its attention has no soft cap in transformers, whatever this setting says.
        ("use_bidirectional_attention", "attn_logit_softcapping"),
        activation="hidden_activation",
        local_rope=True,
    ),
    "stablelm": Family(
        lambda s: {
            "norm": "layer",
            "attention_bias": _biases(s.use_qkv_bias, ("q", "k", "v")),
            "parallel_block": s.use_parallel_residual,
        },
        ("qk_layernorm",),  # a norm of its own for each head
        eps="layer_norm_eps",
        partial_rotary=True,
    ),
    "phi": Family(
        lambda s: {
            **{"norm": "layer", "parallel_block": True, "gated_mlp": False, "qk_norm": s.qk_layernorm},
            **{"attention_bias": _biases(True), "mlp_bias": True, "head_bias": True},
        },
        eps="layer_norm_eps",
        partial_rotary=True,
    ),
}


def decoder_to_hf(d: DecoderConfig, positions: int = POSITIONS) -> PretrainedConfig:
    """Hugging Face's settings of the same decoder, in the first family that can say all of ours.

    Raises UserError where none can.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": d.rope_theta}
    if d.rope_scaling is not None and d.rope_scaling.kind == "linear":
        rope |= {"rope_type": "linear", "factor": d.rope_scaling.factor}
    elif d.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": d.rope_scaling.factor,
            "low_freq_factor": d.rope_scaling.low_freq_factor,
            "high_freq_factor": d.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": d.rope_scaling.original_positions,
        }
    windows, scale = _explicit(d).windows, _explicit(d).query_scale
    assert scale is not None
    act = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh" if d.gated_mlp else "gelu_new"}
    words: dict[str, Any] = {
        "vocab_size": d.vocab,
        "hidden_size": d.width,
        "intermediate_size": d.mlp_width,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "tie_word_embeddings": d.tied_head,
        "attention_bias": bool(d.attention_bias),
        "use_qkv_bias": bool(d.attention_bias),
        "mlp_bias": d.mlp_bias,
        "qk_layernorm": d.qk_norm,
        "use_parallel_residual": d.parallel_block,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": d.attention_softcap,
        "final_logit_softcapping": d.logit_softcap,
        "sliding_window": max(windows) or None,
        "use_sliding_window": any(windows),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        "max_position_embeddings": max(positions, 2 * rope.get("original_max_position_embeddings", 0)),
    }
    for name, family in FAMILIES.items():
        kind: Any = CONFIG_MAPPING[name]
        known = {field.name for field in dataclasses.fields(kind)}
        own = {family.eps: d.norm_eps, family.activation: act[d.activation], "rope_parameters": rope}
        if family.partial_rotary:
            own["rope_parameters"] = rope | {"partial_rotary_factor": d.rotary_fraction}
        if family.local_rope:
            near = {"rope_type": "default", "rope_theta": d.local_rope_theta or d.rope_theta}
            own["rope_parameters"] = {"full_attention": rope, "sliding_attention": near}
        try:
            settings = kind(**{word: value for word, value in words.items() if word in known}, **own)
            if not decoder_differences(decoder_from_hf(settings), d):
                settings.architectures = [kind.__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"]
                return settings
        except Exception:  # noqa: S112  the family's own checks refuse these numbers
            continue
    raise UserError(
        f"no Hugging Face decoder ({', '.join(FAMILIES)}) has all settings of config.model.decoder, so it cannot be "
        "exported as one."
    )


def _explicit(d: DecoderConfig) -> DecoderConfig:
    """The same decoder with a window for every layer and the scale of its attention scores."""
    windows = tuple(np.resize(d.windows or (0,), d.depth).tolist())
    scale = d.head_dim**-0.5 if d.query_scale is None else d.query_scale
    return dataclasses.replace(d, windows=windows, query_scale=scale)


# --------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------


def linear_names(d: DecoderConfig) -> dict[str, str]:
    """Our linear -> its name within a layer of Hugging Face's. An MLP without a gate is Phi's alone."""
    names = {x: f"self_attn.{x}_proj" for x in "qkv"}
    if not d.gated_mlp:
        return names | {"o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"}
    return names | {"o": "self_attn.o_proj"} | {x: f"mlp.{x}_proj" for x in ("gate", "up", "down")}


def norm_names(d: DecoderConfig) -> dict[str, str]:
    """Our norm -> its name within a layer of Hugging Face's, where one word means two things."""
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    if d.post_norms:
        names |= {"post_norm1": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm"}
        names |= {"post_norm2": "post_feedforward_layernorm"}
    if d.parallel_block:
        del names["norm2"]
    if d.qk_norm:
        names |= {f"attention/{x}_norm": f"self_attn.{x}_{'layernorm' if d.norm == 'layer' else 'norm'}" for x in "qk"}
    return names


def linear_path(linear: str) -> str:
    """Path of one of the decoder's linears."""
    return f"decoder/layers/{'attention' if linear in 'qkvo' else 'mlp'}/{linear}"


def copies_of_linear(d: DecoderConfig, moe: MoeConfig, linear: str, layer: int) -> list[tuple[str, tuple[int, ...]]]:
    """(path, index) of each of our linears that a dense decoder's linear of that layer is, or is the beginning of."""
    numbers = moe.numbers(d.depth)
    if linear in "qkvo":
        return [(linear_path(linear), (layer,))]
    nth = sum(n < layer for n in numbers)
    if layer not in numbers:
        return [(linear_path(linear), (layer - nth,))]
    path = "decoder/layers/moe"
    beside = [f"{path}/{part}/{linear}" for part in ("meta", "residual") if getattr(moe, part)]
    return [(f"{path}/experts/{linear}", (nth, e)) for e in range(moe.experts)] + [(leaf, (nth,)) for leaf in beside]


def hf_decoder_table(
    d: DecoderConfig, prefix: str = "", wrapped: tuple[str, ...] = (), moe: MoeConfig = MoeConfig()
) -> Table:
    """The decoder's tensors under `prefix`; `wrapped` linears carry PEFT's ".base_layer".

    Where `moe` has experts, all MLPs of such a layer are copies of the one MLP there (a table to read by).
    """

    def norm(theirs: str, ours: str, index: tuple[int, ...] = ()) -> list[Entry]:
        parts = {"weight": "scale"} | ({"bias": "bias"} if d.norm == "layer" else {})
        return [Entry(f"{theirs}.{word}", f"decoder/{ours}/{part}", index) for word, part in parts.items()]

    table = [Entry(f"{prefix}model.embed_tokens.weight", "decoder/embedding")]
    for i in range(d.depth):
        layer = f"{prefix}model.layers.{i}"
        for ours, theirs in linear_names(d).items():
            name = f"{layer}.{theirs}{'.base_layer' if ours in wrapped else ''}"
            for leaf, at in copies_of_linear(d, moe, ours, i):
                table.append(Entry(f"{name}.weight", f"{leaf}/kernel", at, "transpose"))
                if ours in d.attention_bias or (ours not in "qkvo" and d.mlp_bias):
                    table.append(Entry(f"{name}.bias", f"{leaf}/bias", at))
        for ours, theirs in norm_names(d).items():
            table += norm(f"{layer}.{theirs}", f"layers/{ours}", (i,))
    table += norm(f"{prefix}model.{'norm' if d.gated_mlp else 'final_layernorm'}", "norm")
    ignored = ["*.rotary_emb.inv_freq"]
    if d.tied_head:
        ignored.append(f"{prefix}lm_head.weight")  # the embedding again
    else:
        table.append(Entry(f"{prefix}lm_head.weight", "decoder/head", layout="transpose"))
    if d.head_bias:
        table.append(Entry(f"{prefix}lm_head.bias", "decoder/head_bias"))
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
    to: Destination,
    moe: MoeConfig = MoeConfig(),
) -> dict[str, Any]:
    """The decoder's leaves (but for adapters and routers) from a Hugging Face folder; `to` as in `load_leaves`.

    Experts start as copies of their layer's MLP. A head's bias is left out, and it is said so, where `d` has none
    (Med-MoE's Phi-2). Raises UserError where its settings are not `d` or its weights do not fit.
    """
    theirs, table = decoder_from_hf(read_hf_config(folder), f"{folder}/config.json"), hf_decoder_table(d, moe=moe)
    if theirs.head_bias and not d.head_bias:
        print(f"{folder}: the bias of its head is left out, as config.model.decoder.head_bias=False says")
        theirs = dataclasses.replace(theirs, head_bias=False)
        table = Table(table.entries, (*table.ignored, "lm_head.bias"))
    refuse_other_decoder(theirs, d, folder)
    return load_leaves(table, open_weights(folder), to)


def refuse_other_decoder(theirs: DecoderConfig, d: DecoderConfig, where: str | Path) -> None:
    """Raises UserError where the decoder found at `where` is not `d`."""
    differ = decoder_differences(theirs, d)
    if differ:
        text = ", ".join(f"{name} is {there!r} there and {here!r} here" for name, there, here in differ)
        raise UserError(f"config.model.decoder is not the decoder of {where}: {text}; set what is said there.")


def decoder_differences(a: DecoderConfig, b: DecoderConfig) -> list[tuple[str, Any, Any]]:
    """(field, value of a, value of b) wherever two decoders compute differently."""
    a, b = _explicit(a), _explicit(b)
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
    settings = decoder_to_hf(d, positions)
    for name, number in ids.items():
        setattr(settings, f"{name}_token_id", number)
    table = hf_decoder_table(d)
    stored = published_shapes(table, leaves)
    settings.dtype = str(max((s.dtype for s in stored.values()), key=lambda dtype: np.dtype(dtype).itemsize))
    with new_folder(out) as folder:
        settings.save_pretrained(folder)
        copy_tokenizer(tokenizer, folder)
        write_safetensors(folder, stored, each_published(table, leaves))


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
