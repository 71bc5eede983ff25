"""Reads the golden cases cut from the original Uni-Med (their manifest.json explains every tensor)."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from support.unimed_frozen import frozen_table

from unimed_jax.config import (
    VISUAL_TASKS,
    ConnectorConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
)
from unimed_jax.interop.families import unimed_pth
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.table import to_leaves
from unimed_jax.interop.tensors.torch_file import write_torch
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.model.unimed import UniMed
from unimed_jax.settings import check_model


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
        """Loads the golden weights: trained ones from an original checkpoint, others by the tables."""
        model = abstract(self.config)
        # A leaf that no table names would stay NaN and spoil every number.
        empty = {
            path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in parameters(model).items()
        }
        frozen = frozen_table(self.config)
        weights = {name: value for name, value in self.weights.items() if name not in self.trainable()}
        leaves = empty | to_leaves(frozen, weights, empty)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint_0.pth"
            tree = {
                "model": self.trainable(),
                "config": {"model": self.case["config"], "run": {}, "datasets": {}},
            }
            write_torch(path, tree)
            return with_parameters(
                model, leaves | unimed_pth.load_unimed(path, self.config, Destination(empty))
            )

    def trainable(self) -> dict[str, np.ndarray]:
        """Returns the weights that the original trains, including a router that nothing reads."""
        starts = ("task_tokens.", "moe_layers.", "llm_proj.", "router.")
        return {k: v for k, v in self.weights.items() if k.startswith(starts) or ".lora_" in k}

    def slots(self, index, counts) -> tuple[np.ndarray, np.ndarray]:
        """Returns images [B, M, H, W, 3] from the pool's [n, 3, H, W], and their tasks [B, M].

        `index` names the images in order, one list or one list a row; row b takes the next
        counts[b] of them.
        """
        size, slots = self.config.vision.image_size, max(counts, default=0)
        images = np.zeros((len(counts), slots, size, size, 3), np.float32)
        tasks = np.full((len(counts), slots), -1, np.int32)
        pictures = self.pool["pool.images"][flat(index)].transpose(0, 2, 3, 1)  # [n, H, W, 3]
        assert len(pictures) == sum(counts), (
            "image_index must name as many images as the rows have places for"
        )
        for row, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
            images[row, :count], tasks[row, :count] = pictures[end - count : end], self.task
        return images, tasks


def flat(index) -> list[int]:
    """Returns a case's `image_index` as one list; null is a batch of text."""
    if index is None:
        return []
    return [i for entry in index for i in (entry if isinstance(entry, list) else [entry])]


def load(folder: Path, name: str) -> Golden:
    data = manifest(folder)
    case = next(c for c in data["cases"] if c["name"] == name)
    base = data["bases"][case["base"]]
    weights = {**load_file(folder / base["file"]), **load_file(folder / case["connector_file"])}
    weights = {k: np.asarray(v, np.float32) for k, v in weights.items()}
    pool = {k: weights.pop(k) for k in list(weights) if k.startswith("pool.")}
    return Golden(
        case, base, model_config(base, case["config"]), weights, load_file(folder / case["file"]), pool
    )


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


def training_batch(
    golden: Golden, layout_ids, attention_mask, targets, image_index
) -> dict[str, np.ndarray]:
    """Returns the golden's padded rows as our batch arrays (row = example).

    Rows are padded further to a multiple of 32 and answers to one of 16, so that batches share
    compiled programs.
    """
    rows, length = np.shape(layout_ids)
    wider = ((0, 0), (0, -length % 32))
    ids = np.pad(layout_ids, wider, constant_values=golden.base["pad_id"])  # [B, S]
    # [B, S] each
    mask, targets = np.pad(attention_mask, wider), np.pad(targets, wider, constant_values=-100)
    visual = np.where(ids == -1, np.cumsum(ids == -1, axis=1) - 1, -1)
    is_target = targets != -100
    answers = int(is_target.sum(axis=1).max())
    answers += -answers % 16
    batch = {
        "tokens": np.where(ids < 0, golden.base["pad_id"], ids),
        "visual": visual,
        "segments": mask,
        "prefixes": mask,
        "positions": np.tile(np.arange(ids.shape[1]), (rows, 1)),
        "target_index": np.zeros((rows, answers)),
        "targets": np.zeros((rows, answers)),
        "target_tasks": np.full((rows, answers), -1),
    }
    weights = np.zeros((rows, answers), np.float32)
    for row in range(rows):
        (where,) = np.nonzero(is_target[row])
        batch["target_index"][row, : len(where)] = where - 1
        batch["targets"][row, : len(where)] = targets[row, where]
        batch["target_tasks"][row, : len(where)] = golden.task if golden.task >= 0 else len(VISUAL_TASKS)
        weights[row, : len(where)] = 1
    images, tasks = golden.slots(image_index, (ids == -1).sum(axis=1) // golden.config.tokens_per_image)
    batch = {k: v.astype(np.int32) for k, v in batch.items()}
    return {**batch, "weights": weights, "images": images, "image_tasks": tasks}
