"""Reads vision encoders: EVA-CLIP-g under LAVIS's names, and Hugging Face's CLIP and SigLIP."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimed_jax.config import ModelConfig, VisionConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.families.foreign import checked_tower, understood
from unimed_jax.interop.families.hf_config import ACTIVATIONS, differences_text, read_hf_config
from unimed_jax.interop.tensors.files import open_weights
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import ALL, Arrays, Entry, Table, Tensors
from unimed_jax.model.vision import resize_positions

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PretrainedConfig

# --------------------------------------------------------------------------------------------------
# CLIP and SigLIP
# --------------------------------------------------------------------------------------------------


def tower_from_hf(settings: "PretrainedConfig", where: str = "config.json") -> VisionConfig:
    """Translates Hugging Face's settings of CLIP or SigLIP into ours.

    settings: of the whole model, or of its vision tower only.

    Of CLIP we take the features of the last block but one, as LLaVA does; of SigLIP those of the last
    block, after its norm. The image size is what the patches cover: 378 of the 384 pixels of SigLIP
    so400m, whose last 6 are in no patch.
    """
    kind = settings.model_type.split("_")[0]
    if kind not in ("clip", "siglip"):
        raise UserError(
            f"{where}: {settings.model_type!r} is not a vision tower that can be read here; give "
            "CLIP or SigLIP."
        )
    with understood(where):
        vision = _translated(getattr(settings, "vision_config", settings), kind, where)
    return checked_tower(vision, where)


def _translated(tower: Any, kind: str, where: str) -> VisionConfig:
    act = {**ACTIVATIONS, "quick_gelu": "quick_gelu"}.get(tower.hidden_act)
    if act is None:
        raise UserError(
            f"{where}: hidden_act {repr(tower.hidden_act)[:60]} of the vision tower is not supported."
        )
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
        return VisionConfig(
            **common,
            patch_bias=False,
            pre_norm=True,
            feature_layer=-2,
            output_norm=False,
        )
    half = (0.5, 0.5, 0.5)
    return VisionConfig(
        **common,
        cls_token=False,
        output_norm=True,
        mean=half,
        std=half,
    )


def hf_tower_table(v: VisionConfig, prefix: str = "vision_model.") -> Table:
    """Lists the tensors of a CLIP or SigLIP tower.

    Any of our encoders can be written under these names.
    """
    embeddings = f"{prefix}embeddings"
    entries = [
        Entry(f"{embeddings}.patch_embedding.weight", "vision/patch/kernel", layout="patch"),
        Entry(f"{embeddings}.position_embedding.weight", "vision/positions"),
    ]
    if v.patch_bias:
        entries.append(Entry(f"{embeddings}.patch_embedding.bias", "vision/patch/bias"))
    if v.cls_token:
        entries.append(Entry(f"{embeddings}.class_embedding", "vision/cls"))
    if v.pre_norm:
        entries += _norm_entries(f"{prefix}pre_layrnorm", "vision/pre_norm")  # the misspelling is theirs
    if v.output_norm:
        entries += _norm_entries(f"{prefix}post_layernorm", "vision/output_norm")
    for i in range(v.blocks):
        entries += _hf_block_entries(v, f"{prefix}encoder.layers.{i}", i)
    not_needed = [
        # Blocks after the feature layer are not built; the text half and the pooling heads are not used.
        *(f"{prefix}encoder.layers.{i}.*" for i in range(v.blocks, v.depth)),
        f"{embeddings}.position_ids",
        f"{prefix}post_layernorm.*",
        f"{prefix}head.*",
        "text_model.*",
        "logit_scale",
        "logit_bias",
        "visual_projection.*",
        "text_projection.*",
    ]
    return Table(tuple(entries), tuple(not_needed))


def _hf_block_entries(v: VisionConfig, theirs: str, i: int) -> list[Entry]:
    """Lists the entries that map one block of a Hugging Face tower to our leaves.

    Queries, keys and values are three linears in the file and one kernel [D, 3 D] of ours.
    """
    ours = "vision/blocks"
    entries = []
    for n, letter in enumerate("qkv"):
        columns = slice(n * v.width, (n + 1) * v.width)
        name = f"{theirs}.self_attn.{letter}_proj"
        entries.append(
            Entry(f"{name}.weight", f"{ours}/attention/qkv/kernel", (i, ALL, columns), "transpose")
        )
        if letter in v.qkv_bias.replace("none", ""):
            entries.append(Entry(f"{name}.bias", f"{ours}/attention/{letter}_bias", (i,)))
    linears = {"self_attn.out_proj": "attention/out", "mlp.fc1": "up", "mlp.fc2": "down"}
    for name, linear in linears.items():
        entries.append(Entry(f"{theirs}.{name}.weight", f"{ours}/{linear}/kernel", (i,), "transpose"))
        entries.append(Entry(f"{theirs}.{name}.bias", f"{ours}/{linear}/bias", (i,)))
    for n in (1, 2):
        entries += _norm_entries(f"{theirs}.layer_norm{n}", f"{ours}/norm{n}", (i,))
    return entries


def _norm_entries(theirs: str, ours: str, index: tuple[int, ...] = ()) -> list[Entry]:
    return [
        Entry(f"{theirs}.weight", f"{ours}/scale", index),
        Entry(f"{theirs}.bias", f"{ours}/bias", index),
    ]


def load_tower(path: str | Path, config: ModelConfig, to: Destination) -> dict[str, Any]:
    """Loads the vision leaves from a Hugging Face folder of CLIP or SigLIP.

    to: as in `load_leaves`.

    Positions of another image size are resized. Raises UserError if the folder's settings are not those
    of `config` (except the image size), or if its weights do not fit.
    """
    v, tensors = config.vision, open_weights(path)
    theirs = tower_from_hf(read_hf_config(path), f"{path}/config.json")
    free = {"image_size", "feature_layer", "output_norm", "output_norm_eps", "position_init"}
    names = [field.name for field in dataclasses.fields(v) if field.name not in free]
    differ = [(name, getattr(theirs, name), getattr(v, name)) for name in names]
    text = differences_text(differ)
    if text:
        raise UserError(f"config.model.vision is not the tower of {path}: {text}; set what it says.")
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in tensors.stored) else ""
    tensors = with_resized_positions(tensors, f"{prefix}embeddings.position_embedding.weight", v)
    return load_leaves(hf_tower_table(v, prefix), tensors, to)


# --------------------------------------------------------------------------------------------------
# EVA
# --------------------------------------------------------------------------------------------------

# LAVIS's name within a block -> our leaf of all blocks.
EVA_BLOCK = {
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


def eva_table(v: VisionConfig, prefix: str = "") -> Table:
    """Lists the tensors of EVA-CLIP as LAVIS names them; the published file has no prefix."""
    entries = [
        Entry(f"{prefix}cls_token", "vision/cls", layout="row"),
        Entry(f"{prefix}pos_embed", "vision/positions", layout="batch"),
        Entry(f"{prefix}patch_embed.proj.weight", "vision/patch/kernel", layout="patch"),
        Entry(f"{prefix}patch_embed.proj.bias", "vision/patch/bias"),
    ]
    for i in range(v.blocks):
        for theirs, ours in EVA_BLOCK.items():
            layout = "transpose" if ours.endswith("kernel") else "same"
            entries.append(Entry(f"{prefix}blocks.{i}.{theirs}", f"vision/blocks/{ours}", (i,), layout))
    # Files of the whole encoder hold a block more than is used, and a head.
    not_needed = ("norm.*", "fc_norm.*", "head.*", f"blocks.{v.blocks}.*")
    return Table(tuple(entries), tuple(prefix + pattern for pattern in not_needed))


def load_eva(path: str | Path, config: ModelConfig, to: Destination) -> dict[str, Any]:
    """Loads the vision leaves from an EVA-CLIP file; `to` as in `load_leaves`.

    Positions of another image size are resized. Raises UserError if the weights do not fit.
    """
    tensors = with_resized_positions(open_weights(path), "pos_embed", config.vision)
    return load_leaves(eva_table(config.vision), tensors, to)


# --------------------------------------------------------------------------------------------------
# Both
# --------------------------------------------------------------------------------------------------


def with_resized_positions(tensors: Tensors, name: str, v: VisionConfig) -> Tensors:
    """Resizes the position embeddings `name` to our image size.

    They are [tokens, width] or [1, tokens, width].

    Positions that are not a square grid of our width stay as they are; `load_leaves` then refuses them
    together with everything else that does not fit.
    """
    extra = int(v.cls_token)  # the class token's position is not part of the grid
    stored = tensors.stored.get(name)
    if stored is None or len(stored.shape) < 2 or stored.shape[-2:] == (extra + v.patches, v.width):
        return tensors
    patches = stored.shape[-2] - extra
    side = round(max(patches, 0) ** 0.5)
    if side * side != patches or stored.shape[-1] != v.width:
        return tensors
    positions = tensors.read(name).astype(np.float32).reshape(-1, v.width)  # [tokens, width]
    resized = resize_positions(positions, v.grid, extra).reshape(*stored.shape[:-2], -1, v.width)
    return Arrays({name: resized}, tensors)
