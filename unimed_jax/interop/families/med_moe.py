"""Med-MoE's checkpoints and router files (github.com/jiangsongtao/Med-MoE), in both directions."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.config import (
    AttentionLinear,
    ConnectorConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    VisionConfig,
)
from unimed_jax.errors import UserError
from unimed_jax.files import new_folder
from unimed_jax.interop.families import hf, hf_config
from unimed_jax.interop.families.towers import hf_tower_table
from unimed_jax.interop.tensors.files import open_weights, write_safetensors
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import Entry, Table, each_published, published_shapes
from unimed_jax.settings import check_model

TOWER = "model.image_tower.image_tower.vision_model."
# openai/clip-vit-large-patch14-336, with the features that Med-MoE takes.
CLIP_LARGE = VisionConfig(
    image_size=336,
    patch_size=14,
    width=1024,
    depth=24,
    heads=16,
    mlp_width=4096,
    activation="quick_gelu",
    qkv_bias="qkv",
    patch_bias=False,
    pre_norm=True,
    norm_eps=1e-5,
    feature_layer=-2,
    output_norm=False,
)
KINDS = ("moe_llava_stablelm", "moe_llava_phi")


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


def model_from_med_moe(settings: Mapping[str, Any], vision: VisionConfig = CLIP_LARGE, where: str = "") -> ModelConfig:
    """Our settings of the model that a checkpoint's config.json describes, with everything as published.

    A checkpoint without a `moe` group, or with its moe_enable off, is a dense model (stage 1 or 2). Raises UserError,
    naming the field, for what is not supported.
    """
    s, where = settings, where or "config.json"
    kind = s.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{where}: model_type {kind!r} is no Med-MoE model read here; give {' or '.join(KINDS)}.")
    try:
        projector = s["image_projector_type"]
        if s.get("mm_vision_select_feature", "patch") != "patch":
            raise UserError(f"{where}: mm_vision_select_feature must be 'patch': no class token reaches the decoder.")
        config = ModelConfig(
            vision=dataclasses.replace(vision, feature_layer=s.get("mm_vision_select_layer", -2)),
            connector=ConnectorConfig(kind=projector, rate=1, task_tokens=0),
            decoder=_decoder(s, where),
            moe=_moe(s.get("moe") or {}, s["num_hidden_layers"], where),
            lora=LoraConfig(rank=0),
        )
    except KeyError as error:
        raise UserError(f"{where} lacks {error.args[0]!r}; give the config.json of a Med-MoE checkpoint.") from error
    check_model(config)
    return config


def _decoder(s: Mapping[str, Any], where: str) -> DecoderConfig:
    heads = s["num_attention_heads"]
    if s["hidden_act"] not in hf_config.ACTIVATIONS:
        raise UserError(f"{where}: hidden_act {s['hidden_act']!r} is not supported.")
    common: dict[str, Any] = {
        "vocab": s["vocab_size"],
        "width": s["hidden_size"],
        "depth": s["num_hidden_layers"],
        "heads": heads,
        "kv_heads": s.get("num_key_value_heads") or heads,
        "head_dim": s["hidden_size"] // heads,
        "mlp_width": s["intermediate_size"],
        "norm": "layer",
        "activation": hf_config.ACTIVATIONS[s["hidden_act"]],
        "rope_theta": float(s["rope_theta"]),
        "tied_head": bool(s.get("tie_word_embeddings", False)),
    }
    if s["model_type"] == "moe_llava_stablelm":
        biases: tuple[AttentionLinear, ...] = ("q", "k", "v") if s.get("use_qkv_bias") else ()
        return DecoderConfig(**common, norm_eps=s["norm_eps"], rotary_fraction=s["rope_pct"], attention_bias=biases)
    return DecoderConfig(
        **common,
        norm_eps=s["layer_norm_eps"],
        rotary_fraction=s["partial_rotary_factor"],
        attention_bias=("q", "k", "v", "o"),
        parallel_block=True,
        gated_mlp=False,
        mlp_bias=True,  # Phi-2's head has a bias too, which Med-MoE leaves out
    )


def _moe(moe: Mapping[str, Any], depth: int, where: str) -> MoeConfig:
    """As its code builds the layers: nothing of top-1 is dropped and top-2 has room for four times its share,
    whatever the capacity factors in the file."""
    if not moe.get("moe_enable", bool(moe)):
        return MoeConfig()
    counts = set(moe["num_experts"])
    if len(counts) != 1:
        raise UserError(f"{where}: moe.num_experts {moe['num_experts']} differ, which is not supported here.")
    limit = 4.0 if moe["top_k_experts"] == 2 else None
    return MoeConfig(
        experts=counts.pop(),
        layers=tuple(moe["moe_layers_idx"]),
        top_k=moe["top_k_experts"],
        residual=bool(moe["use_residual"]),
        capacity_factor=limit,
        eval_capacity_factor=limit,
        aux_coef=float(moe["router_aux_loss_coef"]),
    )


def model_to_med_moe(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a checkpoint of this model; the inverse of `model_config`.

    Raises UserError where Med-MoE has no word for one of our settings.
    """
    d, m = config.decoder, config.moe
    words: dict[str, Any] = {
        "vocab_size": d.vocab,
        "hidden_size": d.width,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "intermediate_size": d.mlp_width,
        "rope_theta": d.rope_theta,
        "tie_word_embeddings": d.tied_head,
        "max_position_embeddings": 4096,
        "image_projector_type": config.connector.kind,
        "mm_hidden_size": config.vision.width,
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_vision_select_feature": "patch",
    }
    if d.gated_mlp:
        words |= {"model_type": KINDS[0], "hidden_act": "silu", "rope_pct": d.rotary_fraction, "norm_eps": d.norm_eps}
        words |= {"use_qkv_bias": bool(d.attention_bias)}
    else:
        words |= {"model_type": KINDS[1], "hidden_act": "gelu_new", "partial_rotary_factor": d.rotary_fraction}
        words |= {"layer_norm_eps": d.norm_eps}
    if m.experts:
        numbers = list(m.numbers(d.depth))
        words["moe"] = {
            "moe_enable": True,
            "moe_mode": "custom",
            "moe_layers_idx": numbers,
            "num_experts": [m.experts] * len(numbers),
            "ep_size": 1,
            "top_k_experts": m.top_k,
            "capacity_factor": m.capacity_factor or 4.0,
            "eval_capacity_factor": m.eval_capacity_factor or 4.0,
            "min_capacity": m.min_capacity,
            "use_residual": m.residual,
            "router_aux_loss_coef": m.aux_coef,
            "train_modules": None,
        }
    back = model_from_med_moe(words, config.vision)
    differ = hf_config.decoder_differences(back.decoder, d)
    if not m.meta and m.experts:
        differ.append(("moe.meta", True, False))
    if config.connector.rate != 1 or config.connector.is_moe:
        own = f"{config.connector.kind} with rate={config.connector.rate}"
        differ.append(("connector", "mlp2x_gelu with rate=1", own))
    for name in ("qkv_bias", "patch_bias", "pre_norm", "cls_token", "output_norm", "activation"):
        there, here = getattr(CLIP_LARGE, name), getattr(config.vision, name)
        differ += [(f"vision.{name}", there, here)] if there != here else []
    if differ:
        text = ", ".join(f"{name} is always {there!r} there and {here!r} here" for name, there, here in differ)
        raise UserError(f"config.model cannot be exported as a Med-MoE checkpoint: {text}.")
    return words


# --------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------


def med_moe_decoder_table(config: ModelConfig) -> Table:
    """The decoder with its experts: Hugging Face's names, and DeepSpeed's within the layers that have experts."""
    shared = hf.hf_decoder_table(config.decoder, moe=config.moe)
    table = Table(tuple(e for e in shared if not e.path.startswith("decoder/layers/moe/")), shared.ignored)
    for nth, i in enumerate(config.moe.numbers(config.decoder.depth)):
        table += expert_layer_table(config, f"model.layers.{i}.mlp", nth)
    return table


def expert_layer_table(config: ModelConfig, name: str, nth: int) -> Table:
    """What stands under `name` in place of the MLP of the nth layer with experts."""
    d, m, ours = config.decoder, config.moe, "decoder/layers/moe"
    table: list[Entry] = []
    linears = {ours: name.removeprefix("mlp.") for ours, name in hf.linear_names(d).items() if ours not in "qkvo"}

    def linear(theirs: str, part: str, at: tuple[int, ...], bias: bool = True) -> None:
        table.append(Entry(f"{name}.{theirs}.weight", f"{ours}/{part}/kernel", at, "transpose"))
        if bias:
            table.append(Entry(f"{name}.{theirs}.bias", f"{ours}/{part}/bias", at))

    def mlp(theirs: str, part: str, at: tuple[int, ...]) -> None:
        for linear_, their_linear in linears.items():
            linear(f"{theirs}.{their_linear}", f"{part}/{linear_}", at, d.mlp_bias)

    linear("deepspeed_moe.gate.wg", "router", (nth,))
    for e in range(m.experts):
        mlp(f"deepspeed_moe.experts.deepspeed_experts.{e}", "experts", (nth, e))
    if m.meta:
        mlp("meta_moe", "meta", (nth,))
    if m.residual:
        mlp("mlp", "residual", (nth,))
        linear("coefficient", "coefficient", (nth,))
    return Table(tuple(table))


def projector_table(config: ModelConfig) -> Table:
    """The projector between CLIP and the decoder."""
    kind, table = config.connector.kind, []
    for i in range(config.connector.layers):
        name = "model.mm_projector.image_spatial_proj" + ("" if kind == "linear" else f".{2 * i}")
        table.append(Entry(f"{name}.weight", f"connector/layers/{i}/kernel", layout="transpose"))
        table.append(Entry(f"{name}.bias", f"connector/layers/{i}/bias"))
    return Table(tuple(table))


def med_moe_table(config: ModelConfig) -> Table:
    """A whole checkpoint, the vision tower included."""
    return med_moe_decoder_table(config) + projector_table(config) + hf_tower_table(config.vision, TOWER)


def router_table(config: ModelConfig, layers: int | None = None) -> Table:
    """A router file, the same for every layer with experts; `layers`: of the first ones alone (1, to write a file)."""
    count = len(config.moe.numbers(config.decoder.depth)) if layers is None else layers
    table = []
    for nth in range(count):
        table.append(Entry("fc1.weight", "decoder/layers/moe/router/kernel", (nth,), "transpose"))
        table.append(Entry("fc1.bias", "decoder/layers/moe/router/bias", (nth,)))
    return Table(tuple(table))


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def load_med_moe(
    folder: str | Path,
    config: ModelConfig,
    to: Destination,
) -> dict[str, Any]:
    """All leaves from a checkpoint's folder; `to` as in `load_leaves`.

    Raises UserError where its settings are not `config` or its weights do not fit.
    """
    theirs = model_from_med_moe(read_med_moe_config(folder), config.vision, f"{folder}/config.json")
    differ = hf_config.decoder_differences(theirs.decoder, config.decoder)
    names = ("experts", "top_k", "meta", "residual")
    differ += [(f"moe.{n}", getattr(theirs.moe, n), getattr(config.moe, n)) for n in names]
    depth = config.decoder.depth
    differ.append(("the layers with experts", theirs.moe.numbers(depth), config.moe.numbers(depth)))
    differ.append(("connector.kind", theirs.connector.kind, config.connector.kind))
    differ = [(name, there, here) for name, there, here in differ if there != here]
    if differ:
        text = ", ".join(f"{name} is {there!r} there and {here!r} here" for name, there, here in differ)
        raise UserError(f"config.model is not the model of {folder}: {text}; set what the folder says.")
    return load_leaves(med_moe_table(config), open_weights(folder), to)


def read_med_moe_config(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises UserError where there is none."""
    file = Path(folder) / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or no JSON; give the folder of a Med-MoE checkpoint.") from error


def load_router(
    path: str | Path,
    config: ModelConfig,
    to: Destination,
) -> dict[str, Any]:
    """The routers of all layers with experts from one router file ({"fc1.weight" [E, D], "fc1.bias" [E]})."""
    return load_leaves(router_table(config), open_weights(path), to)


def export_med_moe(
    out: str | Path, config: ModelConfig, leaves: Mapping[str, Any], tokenizer: str | Path, ids: Mapping[str, int]
) -> None:
    """Writes a checkpoint's folder: config.json, safetensors, the tokenizer's files.

    leaves: by path; tokenizer: its folder; ids: bos, eos, pad. Raises UserError where Med-MoE's code cannot build
    such a model, or where `out` holds something already.
    """
    settings = model_to_med_moe(config) | {f"{name}_token_id": number for name, number in ids.items()}
    table = med_moe_table(config)
    stored = published_shapes(table, leaves)
    widest = max((s.dtype for s in stored.values()), key=lambda dtype: np.dtype(dtype).itemsize)
    settings["torch_dtype"] = str(widest)
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        hf.copy_tokenizer(tokenizer, folder)
        write_safetensors(folder, stored, each_published(table, leaves))


def export_router(out: str | Path, config: ModelConfig, leaves: Mapping[str, Any]) -> None:
    """Writes the first router as a folder with a safetensors file of the published names."""
    table = router_table(config, layers=1)
    with new_folder(out) as folder:
        write_safetensors(folder, published_shapes(table, leaves), each_published(table, leaves))
