"""Reads and writes Med-MoE's checkpoints and router files (github.com/jiangsongtao/Med-MoE)."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from unimed_jax.foreign_config import read_sizes
from unimed_jax.interop.families import hf
from unimed_jax.interop.families.foreign import understood
from unimed_jax.interop.families.hf_config import ACTIVATIONS, decoder_differences, differences_text
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
# Of the encoder, what every checkpoint has as CLIP has it.
TOWERS = (
    *("qkv_bias", "patch_bias", "pre_norm", "cls_token", "output_norm", "activation"),
    *("normalise", "mean", "std"),
)
STABLELM, PHI = "moe_llava_stablelm", "moe_llava_phi"  # kinds of checkpoints (model_type)


# --------------------------------------------------------------------------------------------------
# Settings: theirs -> ours
# --------------------------------------------------------------------------------------------------


def read_med_moe_config(folder: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's config.json; raises UserError if there is none."""
    file = Path(folder) / "config.json"
    return read_sizes(file, "give the folder of a Med-MoE checkpoint")


def model_from_med_moe(
    settings: Mapping[str, Any], vision: VisionConfig = CLIP_LARGE, where: str = ""
) -> ModelConfig:
    """Translates a checkpoint's config.json into our settings, with everything as published.

    A checkpoint without a `moe` group, or with moe_enable off, is a dense model (stage 1 or 2). Raises
    UserError, naming the field, for what is not supported.
    """
    s, where = settings, where or "config.json"
    kind = s.get("model_type")
    if kind not in (STABLELM, PHI):
        raise UserError(
            f"{where}: model_type {kind!r} is not a Med-MoE model that can be read here; give "
            f"{STABLELM} or {PHI}."
        )
    if s.get("mm_vision_select_feature", "patch") != "patch":
        raise UserError(
            f"{where}: mm_vision_select_feature must be 'patch': no class token reaches the decoder."
        )
    with understood(where):
        try:
            config = ModelConfig(
                vision=dataclasses.replace(vision, feature_layer=s.get("mm_vision_select_layer", -2)),
                connector=ConnectorConfig(kind=s["image_projector_type"], rate=1, task_tokens=0),
                decoder=_decoder_from_med_moe(s, where),
                moe=_experts_from_med_moe(s.get("moe") or {}, where),
                lora=LoraConfig(rank=0),
            )
        except KeyError as error:
            raise UserError(
                f"{where} lacks {error.args[0]!r}; give the config.json of a Med-MoE checkpoint."
            ) from error
        check_model(config)
    return config


def _decoder_from_med_moe(s: Mapping[str, Any], where: str) -> DecoderConfig:
    """Translates the decoder's settings, in the words of StableLM or of Phi."""
    heads = s["num_attention_heads"]
    if s["hidden_act"] not in ACTIVATIONS:
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
        "activation": ACTIVATIONS[s["hidden_act"]],
        "rope_theta": float(s["rope_theta"]),
        "tied_head": bool(s.get("tie_word_embeddings", False)),
    }
    if s["model_type"] == STABLELM:
        biases: tuple[AttentionLinear, ...] = ("q", "k", "v") if s.get("use_qkv_bias") else ()
        return DecoderConfig(
            **common,
            norm_eps=s["norm_eps"],
            rotary_fraction=s["rope_pct"],
            attention_bias=biases,
        )
    return DecoderConfig(
        **common,
        norm_eps=s["layer_norm_eps"],
        rotary_fraction=s["partial_rotary_factor"],
        attention_bias=("q", "k", "v", "o"),
        parallel_block=True,
        gated_mlp=False,
        mlp_bias=True,  # Phi-2's head has a bias too, which Med-MoE leaves out
    )


def _experts_from_med_moe(moe: Mapping[str, Any], where: str) -> MoeConfig:
    """Translates the group `moe` into what the original's code makes of it.

    Top-1 drops no token, and top-2 has a capacity of four times the even share, whatever capacity
    factors the file holds.
    """
    if not moe.get("moe_enable", bool(moe)):
        return MoeConfig()
    counts = set(moe["num_experts"])
    if len(counts) != 1:
        raise UserError(
            f"{where}: moe.num_experts {moe['num_experts']} differ, which is not supported here."
        )
    capacity = 4.0 if moe["top_k_experts"] == 2 else None
    return MoeConfig(
        experts=counts.pop(),
        layers=tuple(moe["moe_layers_idx"]),
        top_k=moe["top_k_experts"],
        residual=bool(moe["use_residual"]),
        capacity_factor=capacity,
        eval_capacity_factor=capacity,
        aux_coef=float(moe["router_aux_loss_coef"]),
    )


# --------------------------------------------------------------------------------------------------
# Settings: ours -> theirs
# --------------------------------------------------------------------------------------------------


def model_to_med_moe(config: ModelConfig) -> dict[str, Any]:
    """Translates our settings into a checkpoint's config.json; the inverse of `model_from_med_moe`.

    The result is read back and compared. Raises UserError if Med-MoE has no word for one of our
    settings.
    """
    words = _decoder_to_med_moe(config.decoder) | {
        "max_position_embeddings": 4096,
        "image_projector_type": config.connector.kind,
        "mm_hidden_size": config.vision.width,
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_vision_select_feature": "patch",
    }
    if config.moe.experts:
        words["moe"] = _experts_to_med_moe(config)
    _refuse_inexpressible(config, model_from_med_moe(words, config.vision))
    return words


def _decoder_to_med_moe(d: DecoderConfig) -> dict[str, Any]:
    """Translates the decoder's settings back; only Phi's MLP has no gate."""
    common = {
        "vocab_size": d.vocab,
        "hidden_size": d.width,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "intermediate_size": d.mlp_width,
        "rope_theta": d.rope_theta,
        "tie_word_embeddings": d.tied_head,
    }
    if d.gated_mlp:
        return common | {
            "model_type": STABLELM,
            "hidden_act": "silu",
            "rope_pct": d.rotary_fraction,
            "norm_eps": d.norm_eps,
            "use_qkv_bias": bool(d.attention_bias),
        }
    return common | {
        "model_type": PHI,
        "hidden_act": "gelu_new",
        "partial_rotary_factor": d.rotary_fraction,
        "layer_norm_eps": d.norm_eps,
    }


def _experts_to_med_moe(config: ModelConfig) -> dict[str, Any]:
    """Makes the group `moe` of a checkpoint's config.json."""
    m, layers = config.moe, list(config.moe.numbers(config.decoder.depth))
    return {
        "moe_enable": True,
        "moe_mode": "custom",
        "moe_layers_idx": layers,
        "num_experts": [m.experts] * len(layers),
        "ep_size": 1,
        "top_k_experts": m.top_k,
        "capacity_factor": m.capacity_factor or 4.0,
        "eval_capacity_factor": m.eval_capacity_factor or 4.0,
        "min_capacity": m.min_capacity,
        "use_residual": m.residual,
        "router_aux_loss_coef": m.aux_coef,
        "train_modules": None,
    }


def _refuse_inexpressible(config: ModelConfig, back: ModelConfig) -> None:
    """Raises UserError for settings of `config` that `back`, its translation read back, has lost."""
    differ = decoder_differences(back.decoder, config.decoder)
    if config.moe.experts and not config.moe.meta:
        differ.append(("moe.meta", True, False))
    if config.connector.rate != 1 or config.connector.is_moe:
        ours = f"{config.connector.kind} with rate={config.connector.rate}"
        differ.append(("connector", "mlp2x_gelu with rate=1", ours))
    if config.connector.has_hidden and config.connector.hidden not in (None, config.decoder.width):
        differ.append(("connector.hidden", config.decoder.width, config.connector.hidden))
    if config.connector.activation != "gelu":
        differ.append(("connector.activation", "gelu", config.connector.activation))
    for name in TOWERS:
        there, here = getattr(CLIP_LARGE, name), getattr(config.vision, name)
        if there != here:
            differ.append((f"vision.{name}", there, here))
    there, here = (_limit(moe) for moe in (back.moe, config.moe))
    if there != here:
        differ.append(("moe.eval_capacity_factor", there, here))
    if differ:
        text = ", ".join(
            f"{name} is always {there!r} there and {here!r} here" for name, there, here in differ
        )
        raise UserError(f"config.model cannot be exported as a Med-MoE checkpoint: {text}.")


def _limit(moe: MoeConfig) -> float | None:
    """Returns the capacity at evaluation; None if no token can lie beyond it."""
    factor = moe.eval_capacity_factor
    return None if factor is None or factor * moe.top_k >= moe.experts else factor


# --------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------


def med_moe_table(config: ModelConfig) -> Table:
    """Lists the tensors of a whole checkpoint, the vision tower included."""
    return med_moe_decoder_table(config) + projector_table(config) + hf_tower_table(config.vision, TOWER)


def med_moe_decoder_table(config: ModelConfig) -> Table:
    """Lists the decoder's tensors under the names that a checkpoint gives them.

    The names are Hugging Face's and, in the layers that have experts, DeepSpeed's.
    """
    dense = hf.hf_decoder_table(config.decoder, moe=config.moe)
    outside = [entry for entry in dense if not entry.path.startswith("decoder/layers/moe/")]
    table = dataclasses.replace(dense, entries=tuple(outside))
    for nth, layer in enumerate(config.moe.numbers(config.decoder.depth)):
        table += expert_layer_table(config, f"model.layers.{layer}.mlp", nth)
    return table


def expert_layer_table(config: ModelConfig, name: str, nth: int) -> Table:
    """Lists what a checkpoint holds under `name` instead of an MLP, for the nth layer with experts."""
    m, ours = config.moe, "decoder/layers/moe"
    entries = [
        Entry(f"{name}.deepspeed_moe.gate.wg.weight", f"{ours}/router/kernel", (nth,), "transpose")
    ]
    entries.append(Entry(f"{name}.deepspeed_moe.gate.wg.bias", f"{ours}/router/bias", (nth,)))
    for e in range(m.experts):
        expert = f"{name}.deepspeed_moe.experts.deepspeed_experts.{e}"
        entries += _mlp_entries(config.decoder, expert, f"{ours}/experts", (nth, e))
    if m.meta:
        entries += _mlp_entries(config.decoder, f"{name}.meta_moe", f"{ours}/meta", (nth,))
    if m.residual:
        entries += _mlp_entries(config.decoder, f"{name}.mlp", f"{ours}/residual", (nth,))
        entries.append(
            Entry(f"{name}.coefficient.weight", f"{ours}/coefficient/kernel", (nth,), "transpose")
        )
        entries.append(Entry(f"{name}.coefficient.bias", f"{ours}/coefficient/bias", (nth,)))
    return Table(tuple(entries))


def _mlp_entries(d: DecoderConfig, theirs: str, ours: str, index: tuple[int, ...]) -> list[Entry]:
    entries = []
    for linear, name in hf.linear_names(d).items():
        if linear in "qkvo":
            continue
        name = name.removeprefix("mlp.")
        entries.append(Entry(f"{theirs}.{name}.weight", f"{ours}/{linear}/kernel", index, "transpose"))
        if d.mlp_bias:
            entries.append(Entry(f"{theirs}.{name}.bias", f"{ours}/{linear}/bias", index))
    return entries


def projector_table(config: ModelConfig) -> Table:
    """Lists the tensors of the projector between CLIP and the decoder."""
    entries = []
    for i in range(config.connector.layers):
        # The modules between two linears are activations.
        number = "" if config.connector.kind == "linear" else f".{2 * i}"
        name = f"model.mm_projector.image_spatial_proj{number}"
        entries.append(Entry(f"{name}.weight", f"connector/layers/{i}/kernel", layout="transpose"))
        entries.append(Entry(f"{name}.bias", f"connector/layers/{i}/bias"))
    return Table(tuple(entries))


def router_table(config: ModelConfig, layers: int | None = None) -> Table:
    """Lists the tensors of a router file, which serves every layer with experts.

    layers: take only the first ones (1, to write a file).
    """
    count = len(config.moe.numbers(config.decoder.depth)) if layers is None else layers
    entries = []
    for nth in range(count):
        entries.append(Entry("fc1.weight", "decoder/layers/moe/router/kernel", (nth,), "transpose"))
        entries.append(Entry("fc1.bias", "decoder/layers/moe/router/bias", (nth,)))
    return Table(tuple(entries))


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def load_med_moe(folder: str | Path, config: ModelConfig, to: Destination) -> dict[str, Any]:
    """Loads all leaves from a checkpoint's folder; `to` as in `load_leaves`.

    Raises UserError if the folder's settings are not those of `config` or its weights do not fit.
    """
    theirs = model_from_med_moe(read_med_moe_config(folder), config.vision, f"{folder}/config.json")
    depth = config.decoder.depth
    experts = ("experts", "top_k", "meta", "residual")
    text = differences_text(
        [
            *decoder_differences(theirs.decoder, config.decoder),
            *((f"moe.{name}", getattr(theirs.moe, name), getattr(config.moe, name)) for name in experts),
            ("the layers with experts", theirs.moe.numbers(depth), config.moe.numbers(depth)),
            ("connector.kind", theirs.connector.kind, config.connector.kind),
            ("connector.activation", "gelu", config.connector.activation),
            ("vision.feature_layer", theirs.vision.feature_layer, config.vision.feature_layer),
        ]
    )
    if text:
        raise UserError(f"config.model is not the model of {folder}: {text}; set what the folder says.")
    return load_leaves(med_moe_table(config), open_weights(folder), to)


def load_router(path: str | Path, config: ModelConfig, to: Destination) -> dict[str, Any]:
    """Loads the routers of all layers with experts from one file.

    The file holds "fc1.weight" [E, D] and "fc1.bias" [E].
    """
    return load_leaves(router_table(config), open_weights(path), to)


def export_med_moe(
    out: str | Path,
    config: ModelConfig,
    leaves: Mapping[str, Any],
    tokenizer: str | Path,
    ids: Mapping[str, int],
) -> None:
    """Writes a checkpoint's folder: config.json, safetensors, the tokenizer's files.

    leaves: by path. tokenizer: its folder. ids: of bos, eos, pad. Raises UserError if Med-MoE's code
    cannot build such a model, or if `out` exists already.
    """
    settings = model_to_med_moe(config) | {f"{name}_token_id": number for name, number in ids.items()}
    table = med_moe_table(config)
    stored = published_shapes(table, leaves)
    settings["torch_dtype"] = hf.widest_dtype(stored)
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        hf.copy_tokenizer(tokenizer, folder)
        write_safetensors(folder, stored, each_published(table, leaves))


def export_router(out: str | Path, config: ModelConfig, leaves: Mapping[str, Any]) -> None:
    """Writes the router of the first layer with experts as a folder that `load_router` reads."""
    table = router_table(config, layers=1)
    with new_folder(out) as folder:
        write_safetensors(folder, published_shapes(table, leaves), each_published(table, leaves))
