"""Reads and writes decoders as folders in Hugging Face's format.

A folder holds the settings, the weights under Hugging Face's names, and the tokenizer's files.

Their settings are translated by `hf_config`.

Nothing here needs torch, runs code from a folder or fetches anything.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.config import DecoderConfig, ModelConfig, MoeConfig
from unimed_jax.data import tokenizer
from unimed_jax.files import new_folder
from unimed_jax.interop.families.hf_config import (
    POSITIONS,
    decoder_from_hf,
    decoder_to_hf,
    read_hf_config,
    refuse_other_decoder,
    with_older_names,
)
from unimed_jax.interop.tensors.files import open_weights, write_safetensors
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import Entry, Stored, Table, each_published, published_shapes
from unimed_jax.processes import say

# --------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------


def linear_names(d: DecoderConfig) -> dict[str, str]:
    """Maps each of our linears to its name in a layer of Hugging Face's decoder.

    Only Phi's MLP has no gate.
    """
    names = {linear: f"self_attn.{linear}_proj" for linear in "qkv"}
    if not d.gated_mlp:
        return names | {"o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"}
    names["o"] = "self_attn.o_proj"
    return names | {linear: f"mlp.{linear}_proj" for linear in ("gate", "up", "down")}


def norm_names(d: DecoderConfig) -> dict[str, str]:
    """Maps each of our norms to its name within a layer of Hugging Face's.

    "post_attention_layernorm" is the norm before the MLP in most families, and the one after attention
    in Gemma 2.
    """
    if d.post_norms:
        names = {
            "norm1": "input_layernorm",
            "post_norm1": "post_attention_layernorm",
            "norm2": "pre_feedforward_layernorm",
            "post_norm2": "post_feedforward_layernorm",
        }
    else:
        names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    if d.parallel_block:
        del names["norm2"]  # one norm serves both branches
    if d.qk_norm:
        word = "layernorm" if d.norm == "layer" else "norm"
        names |= {f"attention/{x}_norm": f"self_attn.{x}_{word}" for x in "qk"}
    return names


def has_bias(d: DecoderConfig, linear: str) -> bool:
    """Says whether one of the decoder's linears has a bias."""
    return linear in d.attention_bias or (linear not in "qkvo" and d.mlp_bias)


def linear_path(linear: str) -> str:
    """Gives the path of one of the decoder's linears, all layers of which are stacked there."""
    return f"decoder/layers/{'attention' if linear in 'qkvo' else 'mlp'}/{linear}"


def copies_of_linear(
    d: DecoderConfig, moe: MoeConfig, linear: str, layer: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Lists (path, index) of all our linears that start from this linear of a dense decoder.

    There are several if the layer has experts: each expert, the meta expert and the residual MLP start
    as copies.
    """
    expert_layers = moe.numbers(d.depth)
    if linear in "qkvo":
        return [(linear_path(linear), (layer,))]
    before = sum(n < layer for n in expert_layers)
    if layer not in expert_layers:
        return [(linear_path(linear), (layer - before,))]
    path = "decoder/layers/moe"
    others = [part for part in ("meta", "residual") if getattr(moe, part)]
    return [
        *((f"{path}/experts/{linear}", (before, e)) for e in range(moe.experts)),
        *((f"{path}/{part}/{linear}", (before,)) for part in others),
    ]


def hf_decoder_table(
    d: DecoderConfig, prefix: str = "", wrapped: tuple[str, ...] = (), moe: MoeConfig = MoeConfig()
) -> Table:
    """Lists a decoder's tensors under Hugging Face's names.

    prefix: stands before every name. wrapped: linears around which PEFT has put adapters; their own
    weights are then called ".base_layer". moe: with experts, every MLP of such a layer is read from the
    one MLP there (such a table can only read).
    """
    table = [Entry(f"{prefix}model.embed_tokens.weight", "decoder/embedding")]
    for i in range(d.depth):
        layer = f"{prefix}model.layers.{i}"
        for ours, theirs in linear_names(d).items():
            name = f"{layer}.{theirs}{'.base_layer' if ours in wrapped else ''}"
            for leaf, index in copies_of_linear(d, moe, ours, i):
                table.append(Entry(f"{name}.weight", f"{leaf}/kernel", index, "transpose"))
                if has_bias(d, ours):
                    table.append(Entry(f"{name}.bias", f"{leaf}/bias", index))
        for ours, theirs in norm_names(d).items():
            table += _norm_entries(d, f"{layer}.{theirs}", f"decoder/layers/{ours}", (i,))
    last_norm = "norm" if d.gated_mlp else "final_layernorm"
    table += _norm_entries(d, f"{prefix}model.{last_norm}", "decoder/norm")
    if not d.tied_head:
        table.append(Entry(f"{prefix}lm_head.weight", "decoder/head", layout="transpose"))
    if d.head_bias:
        table.append(Entry(f"{prefix}lm_head.bias", "decoder/head_bias"))
    repeated = (
        ((f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"),) if d.tied_head else ()
    )
    return Table(tuple(table), ("*.rotary_emb.inv_freq",), repeated)


def _norm_entries(d: DecoderConfig, theirs: str, ours: str, index: tuple[int, ...] = ()) -> list[Entry]:
    entries = [Entry(f"{theirs}.weight", f"{ours}/scale", index)]
    if d.norm == "layer":
        entries.append(Entry(f"{theirs}.bias", f"{ours}/bias", index))
    return entries


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------


def load_decoder(folder: str | Path, config: ModelConfig, to: Destination) -> dict[str, Any]:
    """Loads the decoder's leaves, except adapters and routers, from a Hugging Face folder.

    `to` as in `load_leaves`. Experts start as copies of their layer's MLP. If the folder has a bias of
    the head and `config` has none (Med-MoE's Phi-2), the bias is left out and a line says so. Raises
    UserError if the folder's settings are not those of `config` or its weights do not fit.
    """
    d = config.decoder
    theirs = decoder_from_hf(read_hf_config(folder), f"{folder}/config.json")
    table = hf_decoder_table(d, moe=config.moe)
    if theirs.head_bias and not d.head_bias:
        say(f"{folder}: the bias of its head is left out, as config.model.decoder.head_bias=False says")
        theirs = dataclasses.replace(theirs, head_bias=False)
        table = dataclasses.replace(table, ignored=(*table.ignored, "lm_head.bias"))
    refuse_other_decoder(theirs, d, folder)
    return load_leaves(table, open_weights(folder), to)


def export_decoder(
    out: str | Path,
    d: DecoderConfig,
    leaves: Mapping[str, Any],
    tokenizer: str | Path,
    ids: Mapping[str, int],
    positions: int = POSITIONS,
) -> None:
    """Writes a folder that `AutoModelForCausalLM` loads.

    It holds config.json, safetensors and the tokenizer's files.

    leaves: the decoder's, by path, with adapters merged (`merge_lora`). tokenizer: its folder. ids: of
    bos, eos, pad. Raises UserError if no Hugging Face family has these settings, or if `out` exists
    already.
    """
    settings = decoder_to_hf(d, positions)
    for name, number in ids.items():
        setattr(settings, f"{name}_token_id", number)
    table = hf_decoder_table(d)
    stored = published_shapes(table, leaves)
    settings.dtype = widest_dtype(stored)
    with new_folder(out) as folder:
        settings.save_pretrained(folder)
        file = folder / "config.json"
        content = with_older_names(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(tokenizer, folder)
        write_safetensors(folder, stored, each_published(table, leaves))


def widest_dtype(stored: Mapping[str, Stored]) -> str:
    """Names the widest dtype among tensors, in which a config.json says that they are loaded."""
    return str(max((s.dtype for s in stored.values()), key=lambda dtype: np.dtype(dtype).itemsize))


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copies the files of a tokenizer from one folder to another."""
    for name in tokenizer.FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
