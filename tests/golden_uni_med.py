"""Reads the golden cases cut from the original Uni-Med (their manifest.json explains every tensor)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from unimed_jax.config import (
    VISUAL_TASKS,
    ConnectorConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
    check_model,
)
from unimed_jax.interop import unimed_pth
from unimed_jax.model.unimed import UniMed, parameters, with_parameters


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@dataclasses.dataclass
class Golden:
    case: dict
    base: dict
    config: ModelConfig
    weights: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    pool: dict[str, np.ndarray]

    @property
    def task(self) -> int:
        return VISUAL_TASKS.index(self.case["task"]) if self.case["task"] in VISUAL_TASKS else -1

    def model(self) -> UniMed:
        model = UniMed(self.config, nnx.Rngs(0))
        leaves = unimed_pth.to_leaves(self.table(), self.weights, parameters(model))
        return with_parameters(model, leaves)

    def table(self):
        c = self.config
        frozen = unimed_pth.decoder_table(c) + unimed_pth.vision_table(c) + unimed_pth.ln_vision_table()
        return unimed_pth.trainable_table(c) + frozen

    def images(self, index) -> np.ndarray:
        """[B, M, H, W, 3] from the pool's [n, 3, H, W]; an entry of `index` is one image or several."""
        index = np.asarray(index)
        rows = self.pool["pool.images"][index]
        rows = rows if index.ndim == 2 else rows[:, None]
        return rows.transpose(0, 1, 3, 4, 2)  # [B, M, H, W, 3]


def load(folder: Path, name: str) -> Golden:
    data = manifest(folder)
    case = next(c for c in data["cases"] if c["name"] == name)
    base = data["bases"][case["base"]]
    weights = {**load_file(folder / base["file"]), **load_file(folder / case["connector_file"])}
    weights = {k: np.asarray(v, np.float32) for k, v in weights.items()}
    pool = {k: weights.pop(k) for k in list(weights) if k.startswith("pool.")}
    return Golden(case, base, model_config(base, case["config"]), weights, load_file(folder / case["file"]), pool)


def model_config(base: dict, settings: dict) -> ModelConfig:
    vit, llm, lora = base["vit"], base["llm"], base["lora"]
    config = ModelConfig(
        vision=VisionConfig(
            image_size=vit["img_size"],
            patch_size=vit["patch_size"],
            width=vit["embed_dim"],
            depth=vit["depth"],
            heads=vit["num_heads"],
            mlp_width=vit["mlp_hidden"],
            norm_eps=vit["block_ln_eps"],
            output_norm_eps=vit["ln_vision_eps"],
        ),
        connector=connector_config(settings),
        decoder=DecoderConfig(
            vocab=llm["vocab_size"],
            width=llm["hidden_size"],
            depth=llm["num_layers"],
            heads=llm["num_heads"],
            kv_heads=llm.get("num_key_value_heads", llm["num_heads"]),
            head_dim=llm["head_dim"],
            mlp_width=llm["intermediate_size"],
            norm_eps=llm["rms_norm_eps"],
            rope_theta=llm["rope_theta"],
            tied_head=llm["tie_word_embeddings"],
        ),
        lora=LoraConfig(
            rank=settings.get("lora_r", lora["r"]),
            alpha=settings.get("lora_alpha", lora["alpha"]),
            targets=tuple(t.removesuffix("_proj") for t in lora["targets"]),
        ),
    )
    check_model(config)
    return config


def connector_config(settings: dict) -> ConnectorConfig:
    return ConnectorConfig(
        aggregation=settings["resample_method"],
        rate=settings["resample_rate"],
        kind=settings["projector_type"],
        experts=settings["num_experts"],
        router=settings["router_type"],
        router_input=settings["router_method"].removeprefix("router_"),
        top_k=settings["sparse_topk"],
        task_tokens=settings["num_task_tokens"],
        task_token_width=settings["task_token_c"],
    )


def training_batch(golden: Golden, layout_ids, attention_mask, targets, image_index) -> dict[str, np.ndarray]:
    """The golden's padded rows as our batch arrays (row = example)."""
    ids, mask = np.asarray(layout_ids), np.asarray(attention_mask)
    rows, length = ids.shape
    visual = np.where(ids == -1, np.cumsum(ids == -1, axis=1) - 1, -1)
    is_target = np.asarray(targets) != -100
    answers = max(int(is_target.sum(axis=1).max()), 1)
    batch = {
        "tokens": np.where(ids < 0, golden.base["pad_id"], ids),
        "visual": visual,
        "segments": mask,
        "prefixes": mask,
        "positions": np.tile(np.arange(length), (rows, 1)),
        "target_index": np.zeros((rows, answers)),
        "targets": np.zeros((rows, answers)),
        "target_tasks": np.full((rows, answers), -1),
    }
    weights = np.zeros((rows, answers), np.float32)
    for row in range(rows):
        (where,) = np.nonzero(is_target[row])
        batch["target_index"][row, : len(where)] = where - 1
        batch["targets"][row, : len(where)] = np.asarray(targets)[row, where]
        batch["target_tasks"][row, : len(where)] = golden.task if golden.task >= 0 else len(VISUAL_TASKS)
        weights[row, : len(where)] = 1
    batch = {k: v.astype(np.int32) for k, v in batch.items()}
    size = golden.config.vision.image_size
    images = np.zeros((rows, 0, size, size, 3), np.float32) if image_index is None else golden.images(image_index)
    return {
        **batch,
        "weights": weights,
        "images": images,
        "image_tasks": np.full(images.shape[:2], golden.task, np.int32),
    }
