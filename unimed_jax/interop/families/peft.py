"""Reads and writes LoRA adapters as folders of PEFT.

A folder holds `adapter_config.json` and `adapter_model.safetensors`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimed_jax.config import ModelConfig
from unimed_jax.errors import UserError
from unimed_jax.files import new_folder
from unimed_jax.interop.families import hf
from unimed_jax.interop.tensors.files import open_weights, write_safetensors
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import (
    Entry,
    Table,
    Tensors,
    check,
    each_published,
    first_of,
    published_shapes,
)
from unimed_jax.parsing import read_json

SETTINGS_BYTES = 1 << 20  # largest adapter_config.json that is read
HIGHEST_RANK = 1 << 16
PREFIX = "base_model.model.model.layers"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# The linears in the order of Hugging Face's modules.
ORDER = ("q", "k", "v", "o", "gate", "down", "up")
# Settings that are read here.
READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "bias",
    "init_lora_weights",
)
# Settings that do not change what the adapter computes. All others must be off: we cannot represent
# what they do.
HARMLESS = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "exclude_modules",  # the weights show which linears carry adapters
    "layers_pattern",
    "megatron_config",
    "ensure_weight_tying",
    # How the adapters start, which matters only with their kind of init_lora_weights.
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
)
# Values of init_lora_weights with which PEFT leaves the base model's weights as they are.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def adaptable_linears(config: ModelConfig) -> dict[str, str]:
    """Maps each linear that can carry an adapter to its name in a layer of Hugging Face's decoder."""
    names = hf.linear_names(config.decoder)
    return {name: names[name] for name in ORDER if name in names}


def peft_table(config: ModelConfig, prefix: str = PREFIX, adapter: str = "") -> Table:
    """Lists the adapters' tensors.

    adapter: "." and the adapter's name, which PEFT inserts in a model in memory but not in a folder.
    """
    targets = config.lora.targets if config.lora.rank else ()
    linears = {ours: theirs for ours, theirs in adaptable_linears(config).items() if ours in targets}
    table = []
    for i in range(config.decoder.depth):
        for ours, theirs in linears.items():
            for letter in "ab":
                name = f"{prefix}.{i}.{theirs}.lora_{letter.upper()}{adapter}.weight"
                table.append(Entry(name, f"{hf.linear_path(ours)}/lora_{letter}", (i,), "transpose"))
    return Table(tuple(table))


def load_peft(folder: str | Path, config: ModelConfig, to: Destination) -> dict[str, Any]:
    """Loads the adapters' leaves from a folder that PEFT wrote; `to` as in `load_leaves`.

    Raises UserError for an adapter that is more than plain LoRA, and one for everything in which it
    differs from `config.lora`.
    """
    folder = Path(folder)
    rank, alpha = _rank_and_alpha(folder)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(
            f"folder {folder} holds no {' or '.join(WEIGHTS)}; give the folder of a PEFT adapter."
        )
    tensors = open_weights(path)
    table, lora = peft_table(config), config.lora
    targets = [
        ours for ours, theirs in adaptable_linears(config).items() if _has_adapter(tensors, theirs)
    ]
    differences = []
    if rank != lora.rank:
        differences.append(f"its rank is {rank}, not {lora.rank}")
    if not math.isclose(alpha, lora.alpha, rel_tol=1e-6):
        differences.append(f"its alpha is {alpha:g}, not {lora.alpha:g}")
    if lora.rank and set(targets) != set(lora.targets):
        differences.append(
            f"its targets are {', '.join(targets) or 'none'}, not {', '.join(lora.targets)}"
        )
    check(table, tensors, to.leaves, differences)
    return load_leaves(table, tensors, to)


def _has_adapter(tensors: Tensors, linear: str) -> bool:
    return any(f".{linear}.lora_" in name for name in tensors.stored)


def _rank_and_alpha(folder: Path) -> tuple[int, float]:
    """Reads rank and alpha from a folder's adapter_config.json, which must describe plain LoRA."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist; give the folder of a PEFT adapter.")
    settings = read_json(file, "get it again", SETTINGS_BYTES)
    try:
        rank, alpha = settings["r"], settings["lora_alpha"]
        if type(rank) is not int or not 1 <= rank <= HIGHEST_RANK:
            raise ValueError(f"r is {repr(rank)[:60]}, not a whole number from 1 to {HIGHEST_RANK}")
        if type(alpha) not in (int, float) or not -1e30 < alpha < 1e30:
            raise ValueError(f"lora_alpha is {repr(alpha)[:60]}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not describe a LoRA adapter ({error!r}); get it again.") from error
    unsupported = [
        f"{key}={repr(value)[:60]}" for key, value in settings.items() if not _is_plain(key, value)
    ]
    if unsupported:
        raise UserError(
            f"{file} describes more than plain LoRA on linears ({first_of(unsupported)}), which "
            "cannot be represented here; merge it into its model with PEFT and give that."
        )
    # Rank-stabilised LoRA divides alpha by the root of the rank, LoRA by the rank.
    return rank, alpha * rank**0.5 if settings.get("use_rslora") else alpha


def _is_plain(key: str, value: Any) -> bool:
    """Says whether a setting is one of plain LoRA on linears."""
    if key == "peft_type":
        return value == "LORA"
    if key == "bias":
        return value == "none"
    if key == "init_lora_weights":
        return value in STARTS
    return key in READ + HARMLESS or not value


def export_peft(
    out: str | Path, config: ModelConfig, leaves: Mapping[str, Any], base_model: str
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads onto the decoder.

    leaves: at least the adapters', by path. base_model: name or folder of the decoder, for the
    adapter's settings. Raises UserError if there are no adapters, or if `out` exists already.
    """
    lora = config.lora
    if not lora.rank:
        raise UserError(
            "config.model.lora.rank is 0: there are no adapters to export; export the decoder instead."
        )
    names = adaptable_linears(config)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": whole_number(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": [names[name].split(".")[-1] for name in names if name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    table = peft_table(config)
    with new_folder(out) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        write_safetensors(
            folder, published_shapes(table, leaves), each_published(table, leaves), stem="adapter_model"
        )


def whole_number(x: float) -> float | int:
    """Turns 16.0 into 16, as torch's programs write it, and leaves 16.5 as it is."""
    return int(x) if x == int(x) else x
