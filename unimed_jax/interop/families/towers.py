"""Vision encoders from outside: EVA-CLIP-g as LAVIS names it, Hugging Face's CLIP and SigLIP."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from unimed_jax.config import VisionConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.families.hf_config import ACTIVATIONS, read_hf_config
from unimed_jax.interop.tensors.files import open_weights
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import Arrays, Entry, Table, Tensors
from unimed_jax.model.vision import resize_positions

KINDS = ("eva", "clip", "siglip")


def tower_from_hf(settings: PretrainedConfig, where: str = "config.json") -> VisionConfig:
    """Our settings of a CLIP or SigLIP tower (of its whole model, or of the tower alone).

    CLIP: the last but one block's features, as LLaVA takes them; SigLIP: the last block's, behind its norm. The
    image size is what the patches cover: 378 pixels of the 384 of SigLIP so400m, whose last 6 meet no patch.
    """
    kind = settings.model_type.split("_")[0]
    if kind not in ("clip", "siglip"):
        raise UserError(f"{where}: {settings.model_type!r} is no vision tower that is read here; give CLIP or SigLIP.")
    tower = getattr(settings, "vision_config", settings)
    act = {**ACTIVATIONS, "quick_gelu": "quick_gelu"}.get(tower.hidden_act)
    if act is None:
        raise UserError(f"{where}: hidden_act {tower.hidden_act!r} of the vision tower is not supported.")
    common: dict[str, Any] = {
        "image_size": tower.image_size // tower.patch_size * tower.patch_size,
        "patch_size": tower.patch_size,
        "width": tower.hidden_size,
        "depth": tower.num_hidden_layers,
        "heads": tower.num_attention_heads,
        "mlp_width": tower.intermediate_size,
        "activation": act,
        "qkv_bias": "qkv",
        "norm_eps": tower.layer_norm_eps,
        "output_norm_eps": tower.layer_norm_eps,
    }
    if kind == "clip":
        return VisionConfig(**common, patch_bias=False, pre_norm=True, feature_layer=-2, output_norm=False)
    half = (0.5, 0.5, 0.5)
    return VisionConfig(**common, cls_token=False, output_norm=True, mean=half, std=half)


def hf_tower_table(v: VisionConfig, prefix: str = "vision_model.") -> Table:
    """A CLIP or SigLIP tower, or any of ours under their names; q, k and v are apart there and joined here."""
    depth = _built(v)
    table = [
        Entry(f"{prefix}embeddings.patch_embedding.weight", "vision/patch/kernel", layout="patch"),
        Entry(f"{prefix}embeddings.position_embedding.weight", "vision/positions"),
    ]
    if v.patch_bias:
        table.append(Entry(f"{prefix}embeddings.patch_embedding.bias", "vision/patch/bias"))
    if v.cls_token:
        table.append(Entry(f"{prefix}embeddings.class_embedding", "vision/cls"))
    norms = {"pre_layrnorm": "pre_norm"} if v.pre_norm else {}
    norms |= {"post_layernorm": "output_norm"} if v.output_norm else {}
    for theirs, ours in norms.items():
        table.append(Entry(f"{prefix}{theirs}.weight", f"vision/{ours}/scale"))
        table.append(Entry(f"{prefix}{theirs}.bias", f"vision/{ours}/bias"))
    linears = {"self_attn.out_proj": "attention/out", "mlp.fc1": "up", "mlp.fc2": "down"}
    for i in range(depth):
        layer, block = f"{prefix}encoder.layers.{i}", "vision/blocks"
        for n, letter in enumerate("qkv"):
            columns = slice(n * v.width, (n + 1) * v.width)
            name = f"{layer}.self_attn.{letter}_proj"
            table.append(
                Entry(f"{name}.weight", f"{block}/attention/qkv/kernel", (i, slice(None), columns), "transpose")
            )
            if letter in v.qkv_bias.replace("none", ""):
                table.append(Entry(f"{name}.bias", f"{block}/attention/{letter}_bias", (i,)))
        for theirs, ours in linears.items():
            table.append(Entry(f"{layer}.{theirs}.weight", f"{block}/{ours}/kernel", (i,), "transpose"))
            table.append(Entry(f"{layer}.{theirs}.bias", f"{block}/{ours}/bias", (i,)))
        for n in (1, 2):
            table.append(Entry(f"{layer}.layer_norm{n}.weight", f"{block}/norm{n}/scale", (i,)))
            table.append(Entry(f"{layer}.layer_norm{n}.bias", f"{block}/norm{n}/bias", (i,)))
    # Blocks behind the feature layer are not built; the text half and the pooling heads are not used.
    unused = [f"{prefix}encoder.layers.{i}.*" for i in range(depth, v.depth)]
    unused += [f"{prefix}embeddings.position_ids", f"{prefix}post_layernorm.*", f"{prefix}head.*"]
    unused += ["text_model.*", "logit_scale", "logit_bias", "visual_projection.*", "text_projection.*"]
    return Table(tuple(table), tuple(unused))


def eva_table(v: VisionConfig, prefix: str = "") -> Table:
    """EVA-CLIP as LAVIS names it; prefix "" is the published file."""
    depth = _built(v)
    table = [
        Entry(f"{prefix}cls_token", "vision/cls", layout="row"),
        Entry(f"{prefix}pos_embed", "vision/positions", layout="batch"),
        Entry(f"{prefix}patch_embed.proj.weight", "vision/patch/kernel", layout="patch"),
        Entry(f"{prefix}patch_embed.proj.bias", "vision/patch/bias"),
    ]
    names = {
        "norm1.weight": "norm1/scale",
        "norm1.bias": "norm1/bias",
        "norm2.weight": "norm2/scale",
        "norm2.bias": "norm2/bias",
        "attn.q_bias": "attention/q_bias",
        "attn.v_bias": "attention/v_bias",
        "attn.qkv.weight": "attention/qkv/kernel",
        "attn.proj.weight": "attention/out/kernel",
        "attn.proj.bias": "attention/out/bias",
        "mlp.fc1.weight": "up/kernel",
        "mlp.fc1.bias": "up/bias",
        "mlp.fc2.weight": "down/kernel",
        "mlp.fc2.bias": "down/bias",
    }
    for i in range(depth):
        for theirs, ours in names.items():
            layout = "transpose" if ours.endswith("kernel") else "same"
            table.append(Entry(f"{prefix}blocks.{i}.{theirs}", f"vision/blocks/{ours}", (i,), layout))
    # Files of the whole encoder hold a block more than is used, and a head.
    unused = (f"{prefix}blocks.{depth}.*", f"{prefix}norm.*", f"{prefix}fc_norm.*", f"{prefix}head.*")
    return Table(tuple(table), unused)


def _built(v: VisionConfig) -> int:
    """Blocks that the encoder has: none behind the feature layer."""
    return v.depth + 1 + v.feature_layer


def load_tower(
    kind: str,
    path: str | Path,
    v: VisionConfig,
    to: Destination,
) -> dict[str, Any]:
    """The vision leaves from an EVA file ("eva") or a Hugging Face folder ("clip", "siglip").

    A grid of positions of another image size is resized. `to` as in `load_leaves`. Raises UserError where
    the settings of a folder are not `v` (but for the image size) or the weights do not fit.
    """
    tensors = open_weights(path)
    if kind == "eva":
        return load_leaves(eva_table(v), with_resized_positions(tensors, "pos_embed", v), to)
    theirs = tower_from_hf(read_hf_config(path), f"{path}/config.json")
    free = {"image_size", "feature_layer", "output_norm", "output_norm_eps", "position_init"}
    differ = [
        f"{field.name} is {getattr(theirs, field.name)!r} there and {getattr(v, field.name)!r} here"
        for field in dataclasses.fields(v)
        if field.name not in free and getattr(theirs, field.name) != getattr(v, field.name)
    ]
    if differ:
        raise UserError(f"config.model.vision is not the tower of {path}: {', '.join(differ)}; set what it says.")
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in tensors.stored) else ""
    tensors = with_resized_positions(tensors, f"{prefix}embeddings.position_embedding.weight", v)
    return load_leaves(hf_tower_table(v, prefix), tensors, to)


def with_resized_positions(tensors: Tensors, name: str, v: VisionConfig) -> Tensors:
    """The tensors with the table of positions [tokens, width] or [1, tokens, width] made for our image size."""
    extra = int(v.cls_token)
    stored = tensors.stored.get(name)
    if stored is None or stored.shape[-2:] == (extra + v.patches, v.width) or len(stored.shape) < 2:
        return tensors
    side = round(max(stored.shape[-2] - extra, 0) ** 0.5)
    if side * side != stored.shape[-2] - extra or stored.shape[-1] != v.width:
        return tensors  # no square grid of this width: refused with everything else that does not fit
    table = tensors.read(name).astype(np.float32).reshape(-1, v.width)  # [tokens, width]
    table = resize_positions(table, v.grid, extra).reshape(*stored.shape[:-2], -1, v.width)
    return Arrays({name: table}, tensors)
