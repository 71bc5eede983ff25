"""Loads the original Uni-Med's golden checkpoint, and our model of its settings."""

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from support import golden_uni_med as golden_files
from support import tiny

from unimed_jax.config import Config
from unimed_jax.interop.families import unimed_names
from unimed_jax.model.parameters import abstract, parameters


@dataclasses.dataclass
class Reference:
    """Holds the original's file, what the manifest says of it, and our model of its settings."""

    path: Path
    entry: dict
    config: Config
    weights: dict[str, np.ndarray]  # the model's whole state, by published name

    @property
    def leaves(self):
        return parameters(abstract(self.config.model))

    @property
    def table(self):
        return unimed_names.trainable_table(self.config.model)

    @property
    def names(self) -> list[str]:
        return self.entry["optimizer_param_index_to_name"]


def reference_of(goldens) -> Reference:
    entry = golden_files.manifest(goldens)["checkpoint"]
    dims, path = entry["model_dims"], goldens / entry["file"]
    weights = load_file(goldens / dims["full_state"].split()[0])
    vit = {"img_size": dims["image"], "patch_size": dims["patch"], "embed_dim": dims["vit_embed"]}
    vit |= {
        "depth": dims["vit_depth"],
        "num_heads": dims["vit_heads"],
        "block_ln_eps": 1e-6,
        "ln_vision_eps": 1e-5,
    }
    vit["mlp_hidden"] = len(weights["visual_encoder.blocks.0.mlp.fc1.bias"])
    llm = {
        "vocab_size": dims["vocab"],
        "hidden_size": dims["llm_hidden"],
        "num_layers": dims["llm_layers"],
    }
    llm |= {"num_heads": dims["llm_heads"], "head_dim": dims["llm_hidden"] // dims["llm_heads"]}
    llm |= {"intermediate_size": dims["llm_intermediate"], "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    llm["tie_word_embeddings"] = False
    lora = {"r": dims["lora_r"], "alpha": dims["lora_alpha"], "targets": tiny.CONFIG.lora.targets}
    model = golden_files.model_config({"vit": vit, "llm": llm, "lora": lora}, entry["config"]["model"])
    return Reference(path, entry, Config(model=model), weights)
