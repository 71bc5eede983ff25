"""Translates the settings of Hugging Face's decoders into ours and back."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from unimed_jax.config import DecoderConfig, RopeScaling
from unimed_jax.errors import UserError
from unimed_jax.foreign_config import read_sizes
from unimed_jax.interop.families.foreign import checked_decoder, understood

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PretrainedConfig

# Hugging Face's name of an activation -> ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
# the other kinds that are read: see towers.py
TOWERS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
# max_position_embeddings of an export: rotary embeddings have no limit, but the field is required.
POSITIONS = 4096


# --------------------------------------------------------------------------------------------------
# Families: what each calls our settings
# --------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """Says how the settings of one kind of decoder (`model_type`) are read."""

    # its settings -> those fields of ours that differ from plain LLaMA's
    ours: Callable[[Any], dict[str, Any]]
    unsupported: tuple[str, ...] = ()  # its settings that must be off
    eps: str = "rms_norm_eps"  # its name for the epsilon of the norms
    activation: str = "hidden_act"  # its name for the activation of the MLP
    local_rope: bool = False  # whether layers with a window have rope_parameters of their own
    partial_rotary: bool = False  # whether it reads partial_rotary_factor; the others ignore it


def _biases(on: bool, linears: tuple[str, ...] = ("q", "k", "v", "o")) -> tuple[str, ...]:
    return linears if on else ()


def _windows(settings: "PretrainedConfig") -> tuple[int, ...]:
    """Reads the sliding windows of the layers (0: none), as the shortest sequence that repeats."""
    width = settings.sliding_window or 0
    windows = [width if kind == "sliding_attention" else 0 for kind in settings.layer_types]
    if not any(windows):
        return ()
    return next(
        tuple(windows[:n])
        for n in range(1, len(windows) + 1)
        if all(window == windows[i % n] for i, window in enumerate(windows))
    )


def _llama(s: Any) -> dict[str, Any]:
    return {"attention_bias": _biases(s.attention_bias), "mlp_bias": s.mlp_bias}


def _mistral(s: Any) -> dict[str, Any]:
    return {"windows": (s.sliding_window,) if s.sliding_window else ()}


def _qwen2(s: Any) -> dict[str, Any]:
    return {"attention_bias": ("q", "k", "v"), "windows": _windows(s)}


def _qwen3(s: Any) -> dict[str, Any]:
    return {"attention_bias": _biases(s.attention_bias), "windows": _windows(s), "qk_norm": True}


def _gemma(s: Any) -> dict[str, Any]:
    return {"norm": "rms_zero", "scaled_embedding": True, "attention_bias": _biases(s.attention_bias)}


def _gemma2_and_3(s: Any) -> dict[str, Any]:
    """Gives what the two later Gemmas have in common."""
    return {
        **_gemma(s),
        "post_norms": True,
        "query_scale": s.query_pre_attn_scalar**-0.5,
        "windows": _windows(s),
        "logit_softcap": s.final_logit_softcapping,
    }


def _gemma2(s: Any) -> dict[str, Any]:
    return {**_gemma2_and_3(s), "attention_softcap": s.attn_logit_softcapping}


def _gemma3(s: Any) -> dict[str, Any]:
    return {**_gemma2_and_3(s), "qk_norm": True}


def _stablelm(s: Any) -> dict[str, Any]:
    return {
        "norm": "layer",
        "attention_bias": _biases(s.use_qkv_bias, ("q", "k", "v")),
        "parallel_block": s.use_parallel_residual,
    }


def _phi(s: Any) -> dict[str, Any]:
    return {
        "norm": "layer",
        "parallel_block": True,
        "gated_mlp": False,
        "qk_norm": s.qk_layernorm,
        "attention_bias": _biases(True),
        "mlp_bias": True,
        "head_bias": True,
    }


# An export takes the first family that can hold all settings, so the plain ones come first.
FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3),
    "gemma": Family(_gemma, unsupported=("use_bidirectional_attention",)),
    "gemma2": Family(
        _gemma2,
        unsupported=("use_bidirectional_attention",),
        activation="hidden_activation",
    ),
    "gemma3_text": Family(
        _gemma3,
        # transformers' attention of this family ignores the soft cap, whatever the setting says.
        unsupported=("use_bidirectional_attention", "attn_logit_softcapping"),
        activation="hidden_activation",
        local_rope=True,
    ),
    "stablelm": Family(
        _stablelm,
        unsupported=("qk_layernorm",),  # in this family it is a separate norm for each head
        eps="layer_norm_eps",
        partial_rotary=True,
    ),
    "phi": Family(
        _phi,
        eps="layer_norm_eps",
        partial_rotary=True,
    ),
}


# --------------------------------------------------------------------------------------------------
# Settings: theirs -> ours
# --------------------------------------------------------------------------------------------------


def read_hf_config(folder: str | Path) -> "PretrainedConfig":
    """Reads a folder's config.json.

    Raises UserError if there is none, or if it is of an unknown kind.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no config.json; give the folder of a Hugging Face model.")
    kind = read_sizes(file, "give the folder of a Hugging Face model").get("model_type")
    if kind not in (*FAMILIES, *TOWERS):  # transformers builds what a config of any other kind asks for
        known = ", ".join((*FAMILIES, *TOWERS))
        raise UserError(
            f"{file} cannot be read: model_type {repr(kind)[:60]} is not supported; choose from {known}."
        )
    try:
        # Without trust, a config that asks for code of its own is refused instead of asked about.
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read ({reason}); check the folder.") from error


def decoder_from_hf(settings: "PretrainedConfig", where: str = "config.json") -> DecoderConfig:
    """Translates Hugging Face's settings of a decoder into ours.

    Raises UserError, naming the field, for what is not supported.
    """
    if settings.model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type {settings.model_type!r} is not supported; choose from "
            f"{', '.join(FAMILIES)}."
        )
    with understood(where):
        decoder = _translated(settings, where)
    return checked_decoder(decoder, where)


def _translated(settings: "PretrainedConfig", where: str) -> DecoderConfig:
    kind = settings.model_type
    family = FAMILIES[kind]
    if getattr(settings, "quantization_config", None):
        raise UserError(
            f"{where}: the weights are quantised (quantization_config); give the original ones."
        )
    for name in family.unsupported:
        value = getattr(settings, name)
        if value:
            raise UserError(
                f"{where}: {name}={repr(value)[:60]} is not supported for {kind}; give a model "
                "without it."
            )
    act = getattr(settings, family.activation)
    if act not in ACTIVATIONS:
        raise UserError(
            f"{where}: {family.activation} {repr(act)[:60]} is not supported; choose from "
            f"{', '.join(ACTIVATIONS)}."
        )
    heads = settings.num_attention_heads
    fields: dict[str, Any] = {
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
    return DecoderConfig(**fields, **_rope_from_hf(settings, family, bool(fields.get("windows")), where))


def _rope_from_hf(settings: Any, family: Family, windowed: bool, where: str) -> dict[str, Any]:
    """Translates the settings of the rotary embedding into our fields."""
    parameters, local = settings.rope_parameters, None
    if family.local_rope:
        parameters, near = parameters["full_attention"], parameters["sliding_attention"]
        if near.get("rope_type", "default") != "default":
            raise UserError(
                f"{where}: rope_type {near['rope_type']!r} of rope_parameters.sliding_attention is "
                "not supported; layers with a window must have the default."
            )
        local = float(near["rope_theta"]) if windowed else None
    if "rope_theta" not in parameters:
        raise UserError(f"{where}: rope_parameters is not supported, as it holds no rope_theta; set it.")
    fraction = float(parameters.get("partial_rotary_factor", 1.0))
    if fraction != 1 and not family.partial_rotary:
        raise UserError(
            f"{where}: partial_rotary_factor={fraction} is not supported for {settings.model_type}; "
            "it must be 1."
        )
    theta = float(parameters["rope_theta"])
    scaling = _scaling_from_hf(parameters, where)
    if local == theta and scaling is None:
        local = None
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local,
        "rotary_fraction": fraction,
    }


def _scaling_from_hf(parameters: Mapping[str, Any], where: str) -> RopeScaling | None:
    """Translates how the rotary frequencies are scaled (None: not at all)."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(parameters["factor"]))
    if kind == "llama3":
        return RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_positions=int(parameters["original_max_position_embeddings"]),
        )
    raise UserError(
        f"{where}: rope_type {kind!r} is not supported; choose from default, linear, llama3."
    )


# --------------------------------------------------------------------------------------------------
# Settings: ours -> theirs
# --------------------------------------------------------------------------------------------------


def decoder_to_hf(d: DecoderConfig, positions: int = POSITIONS) -> "PretrainedConfig":
    """Translates our settings into Hugging Face's, of the first family that can hold all of them.

    Each family is tried and read back: it fits if what comes back computes the same. Raises UserError
    if none does.
    """
    for name, family in FAMILIES.items():
        try:
            settings = _as_family(name, family, d, positions)
            # Not `decoder_from_hf`, which takes a defect of ours for a fault of somebody's file.
            fits = not decoder_differences(checked_decoder(_translated(settings, name), name), d)
        except (UserError, StrictDataclassError, ValueError):
            continue  # the family itself refuses these numbers
        if fits:
            return settings
    raise UserError(
        f"no Hugging Face decoder ({', '.join(FAMILIES)}) has all settings of config.model.decoder, "
        "so it cannot be exported as one."
    )


def _as_family(name: str, family: Family, d: DecoderConfig, positions: int) -> "PretrainedConfig":
    """Makes the settings of one family; those of ours that it has no field for are left out."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[name]
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {field: value for field, value in _fields_to_hf(d, positions).items() if field in known}
    fields[family.eps] = d.norm_eps
    fields[family.activation] = _activation_to_hf(d)
    fields["rope_parameters"] = _rope_to_hf(d, family)
    settings = kind(**fields)
    settings.architectures = [kind.__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"]
    return settings


def _fields_to_hf(d: DecoderConfig, positions: int) -> dict[str, Any]:
    """Gives our settings under all names that any of the families has for them."""
    explicit = _explicit(d)
    assert explicit.query_scale is not None
    stretched = d.rope_scaling.original_positions if _is_llama3(d.rope_scaling) else 0
    return {
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
        "query_pre_attn_scalar": round(explicit.query_scale**-2),
        "attn_logit_softcapping": d.attention_softcap,
        "final_logit_softcapping": d.logit_softcap,
        "sliding_window": max(explicit.windows) or None,
        "use_sliding_window": any(explicit.windows),
        "layer_types": [
            "sliding_attention" if window else "full_attention" for window in explicit.windows
        ],
        "max_position_embeddings": max(positions, 2 * stretched),
    }


def _activation_to_hf(d: DecoderConfig) -> str:
    if d.activation == "gelu_tanh":
        return "gelu_pytorch_tanh" if d.gated_mlp else "gelu_new"  # as Gemma and Phi name it
    return d.activation


def _rope_to_hf(d: DecoderConfig, family: Family) -> dict[str, Any]:
    """Makes the field rope_parameters."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": d.rope_theta}
    scaling = d.rope_scaling
    if _is_llama3(scaling):
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    elif scaling is not None:
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    if family.partial_rotary:
        return rope | {"partial_rotary_factor": d.rotary_fraction}
    if family.local_rope:
        near = {"rope_type": "default", "rope_theta": d.local_rope_theta or d.rope_theta}
        return {"full_attention": rope, "sliding_attention": near}
    return rope


def with_older_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a config.json its rotary settings under the names that transformers 4 has for them.

    Version 4, and what is built on it, passes over `rope_parameters` without a word and takes a base
    of 10,000. Version 5 reads both and gives the same.
    """
    rope = content["rope_parameters"]
    found: dict[str, Any] = {}
    if "full_attention" in rope:
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    found["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        found["rope_scaling"] = {
            name: value
            for name, value in rope.items()
            if name not in ("rope_theta", "partial_rotary_factor")
        }
    return {**content, **found}


def _is_llama3(scaling: RopeScaling | None) -> TypeGuard[RopeScaling]:
    return scaling is not None and scaling.kind == "llama3"


# --------------------------------------------------------------------------------------------------
# Comparing decoders
# --------------------------------------------------------------------------------------------------


def decoder_differences(a: DecoderConfig, b: DecoderConfig) -> list[tuple[str, Any, Any]]:
    """Lists (field, value of a, value of b) where two decoders differ in what they compute."""
    a, b = _explicit(a), _explicit(b)
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    return [
        (name, getattr(a, name), getattr(b, name))
        for name in names
        if getattr(a, name) != getattr(b, name)
    ]


def refuse_other_decoder(theirs: DecoderConfig, d: DecoderConfig, where: str | Path) -> None:
    """Raises UserError if the decoder found at `where` is not `d`."""
    text = differences_text(decoder_differences(theirs, d))
    if text:
        raise UserError(
            f"config.model.decoder is not the decoder of {where}: {text}; set what is said there."
        )


def differences_text(values: Iterable[tuple[str, Any, Any]]) -> str:
    """Puts into words which settings differ ("" if none); takes (setting, value there, value here)."""
    return ", ".join(
        f"{name} is {there!r} there and {here!r} here" for name, there, here in values if there != here
    )


def _explicit(d: DecoderConfig) -> DecoderConfig:
    """Writes out what is implied: a window for every layer, and the scale of the attention scores."""
    windows = tuple(np.resize(d.windows or (0,), d.depth).tolist())
    scale = d.head_dim**-0.5 if d.query_scale is None else d.query_scale
    return dataclasses.replace(d, windows=windows, query_scale=scale)
