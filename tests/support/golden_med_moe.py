"""Reads the golden cases cut from the original Med-MoE (their manifest.json explains every tensor)."""

import dataclasses
import fnmatch
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from unimed_jax.config import TASKS, DecoderConfig, LoraConfig, ModelConfig, MoeConfig, VisionConfig
from unimed_jax.interop.families import med_moe
from unimed_jax.interop.tensors.table import to_leaves
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.model.routing import Noise
from unimed_jax.model.unimed import UniMed

IMAGE, IGNORED = -200, -100
NOISE = {"uniform": "rts_uniform", "gumbel": "gumbel", "jitter": "jitter"}  # our word: the manifest's
ACTIVATION = {"swiglu": "silu", "phi": "gelu_tanh"}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def name_of(entry: dict) -> str:
    return entry["case"] if "case" in entry else f"{entry['model']}/weights"


def arrays_of(folder: Path, entry: dict) -> dict[str, np.ndarray]:
    """Reads the tensors of a case and checks that they are those that the manifest names."""
    prefix = entry.get("prefix", entry["case"]) + "/"
    arrays = {
        k.removeprefix(prefix): v
        for k, v in load_file(folder / entry["file"]).items()
        if k.startswith(prefix)
    }
    described = {k: [list(v.shape), str(v.dtype)] for k, v in arrays.items()}
    if "grad_tensors" in entry:
        grads = [k for k in described if k.startswith("grad.") and k not in entry["tensors"]]
        assert len(grads) == entry["grad_tensors"]
        described = {k: v for k, v in described.items() if k not in grads}
    assert described == entry["tensors"], f"{entry['file']} holds other tensors than the manifest says"
    return arrays


def trainable(entry: dict, names) -> set[str]:
    """Returns which published names train: a list, or "all except PATTERN and PATTERN"."""
    said = entry["trainable_parameter_names"]
    if not isinstance(said, str):
        return set(said)
    assert said.startswith("all except "), f"{said!r} is not understood"
    patterns = re.split(r",? and |, ", said.removeprefix("all except "))
    return {
        name
        for name in names
        if not any(fnmatch.fnmatchcase(name, f"*{pattern}") for pattern in patterns)
    }


def noise(arrays: dict[str, np.ndarray], prefix: str, number: int = 0) -> Noise:
    """Returns the recorded random numbers of the router's call of that number."""
    keys = {ours: f"{prefix}noise.{theirs}.{number}" for ours, theirs in NOISE.items()}
    return Noise(**{ours: jnp.asarray(arrays[key]) for ours, key in keys.items() if key in arrays})


def used(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """Returns which tokens are routed, if a case says it."""
    found = [v for k, v in arrays.items() if "used_token" in k]
    return found[0].astype(bool) if found else None


def limits(top_k: int, drop: bool | None, factor: float, eval_factor: float, least: int) -> dict:
    """Returns the MoeConfig fields that say what is dropped; top-2 always has a limit."""
    if top_k == 1 and not drop:
        factor = eval_factor = None
    return {"capacity_factor": factor, "eval_capacity_factor": eval_factor, "min_capacity": least}


def loaded(config: ModelConfig, table, weights: dict[str, np.ndarray]) -> UniMed:
    """Loads the model's leaves by the table; what no table names is NaN and spoils every number."""
    model = abstract(config)
    empty = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in parameters(model).items()}
    return with_parameters(model, empty | to_leaves(table, weights, empty))


def layer_config(entry: dict, path: str) -> ModelConfig:
    """Describes a decoder of one layer, the case's."""
    return ModelConfig(
        decoder=DecoderConfig(
            **{"vocab": 2, "depth": 1, "heads": 1, "kv_heads": 1, "head_dim": 2},
            width=entry["D"],
            mlp_width=entry["I"],
            gated_mlp=entry["expert"] == "swiglu",
            activation=ACTIVATION[entry["expert"]],
            mlp_bias=entry["expert"] == "phi",
        ),
        moe=MoeConfig(
            experts=entry["E"],
            placement="dense",
            top_k=entry["top_k"],
            meta=entry["meta_expert"],
            residual=entry["use_residual"],
            gate_noise=(entry["noisy_gate_policy"] or "none").lower(),
            path=path,
            **limits(
                entry["top_k"],
                entry["drop_tokens"],
                entry["capacity_factor"],
                entry["eval_capacity_factor"],
                entry["min_capacity"],
            ),
        ),
        lora=LoraConfig(rank=0),
    )


def model_config(weights: dict) -> ModelConfig:
    """Reads a model's settings from the entry of its weights: config.json, tower, fixed values."""
    clip, built = weights["clip"], weights["moe_layer_settings_hardcoded"]
    vision = VisionConfig(
        image_size=clip["image_size"],
        patch_size=clip["patch_size"],
        width=clip["hidden_size"],
        depth=clip["num_hidden_layers"],
        heads=clip["num_attention_heads"],
        mlp_width=clip["intermediate_size"],
        activation=clip["hidden_act"],
        norm_eps=clip["layer_norm_eps"],
        **{"qkv_bias": "qkv", "patch_bias": False, "pre_norm": True, "output_norm": False},
    )
    config = med_moe.model_from_med_moe(
        {"model_type": f"moe_llava_{weights['arch']}", **weights["config"]}, vision
    )
    assert config.vision.feature_layer == clip["select_layer"] and clip["select_feature"] == "patch"
    if config.moe.experts:
        factors = built["capacity_factor"], built["eval_capacity_factor"], built["min_capacity"]
        said = limits(config.moe.top_k, built["drop_tokens"], *factors)
        assert said == {name: getattr(config.moe, name) for name in said}
    # As published, so that counts and balancing losses compare.
    return dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, eval_noise=True, route_padding=True)
    )


@dataclasses.dataclass
class Rows:
    """Holds a case's rows as our batch, and where the original's columns stand in them."""

    batch: dict[str, np.ndarray]
    order: np.ndarray  # [B, W]: the original's column at each of our places
    real: np.ndarray  # [B, W] bool, in the original's columns
    labels: np.ndarray  # [B, W], in the original's columns

    def back(self, array) -> np.ndarray:
        """Brings an array [..., B, W, ...] from our columns to the original's.

        The axis of the rows is found by its length and that of the next one.
        """
        array = np.asarray(array)
        rows, width = self.order.shape
        axis = next(i for i in range(array.ndim) if array.shape[i : i + 2] == (rows, width))
        front = np.moveaxis(array, (axis, axis + 1), (0, 1))  # [B, W, ...]
        out = np.empty_like(front)
        out[np.arange(rows)[:, None], self.order] = front
        return np.moveaxis(out, (0, 1), (axis, axis + 1))

    def ours(self, tokens: np.ndarray) -> np.ndarray:
        """Brings the original's [B * W, ...] to our places."""
        rows = np.arange(len(self.order))[:, None]
        return tokens.reshape(*self.order.shape, -1)[rows, self.order].reshape(tokens.shape)


def rows_of(
    arrays: dict, config: ModelConfig, left: bool, width: int | None = None, padding_last: bool = False
) -> Rows:
    """Lays a case's rows out as our batch.

    `left`: the side of the padding. `width`: where rows are cut; None: as long as the longest.

    `padding_last`: left padding comes after its row here, so that it sees all of it.
    """
    ids = arrays["in.input_ids"]
    mask = arrays.get("in.attention_mask", np.ones_like(ids)).astype(bool)
    labels = arrays.get("in.labels", np.full_like(ids, IGNORED))
    tokens, images = config.tokens_per_image, iter(arrays.get("in.images", ()))
    rows, slots = [], []
    for row, row_labels in zip(ids, labels, strict=True):
        seen = mask[len(rows)]
        stream, targets = [], []
        for token, label in zip(row[seen], row_labels[seen], strict=True):
            stream += [IMAGE] * tokens if token == IMAGE else [token]
            targets += [IGNORED] * tokens if token == IMAGE else [label]
        count = int((row[seen] == IMAGE).sum())
        slots.append([next(images) for _ in range(count)])
        if not count:
            next(images, None)  # text without an image comes with one that is not used
        rows.append((stream, targets))
    assert next(images, None) is None, "the case has more images than places for them"
    width = min(width or 10**9, max(len(stream) for stream, _ in rows))
    shape = (len(rows), width)
    stream, out_labels, real = np.zeros(shape, int), np.full(shape, IGNORED), np.zeros(shape, bool)
    for b, (row, targets) in enumerate(rows):
        row, targets = row[:width], targets[:width]
        here = slice(width - len(row), width) if left else slice(0, len(row))
        stream[b, here], out_labels[b, here], real[b, here] = row, targets, True
    order = np.tile(np.arange(width), (len(rows), 1))
    if padding_last:
        order = np.argsort(~real, axis=1, kind="stable")
    pick = lambda a: np.take_along_axis(a, order, axis=1)  # noqa: E731
    stream, segments, targets = pick(stream), pick(real).astype(int), pick(out_labels)
    return Rows(batch_of(stream, segments, targets, order, slots, config), order, real, out_labels)


def batch_of(stream, segments, labels, positions, slots, config: ModelConfig) -> dict[str, np.ndarray]:
    size, most = config.vision.image_size, max(map(len, slots))
    images = np.zeros((len(slots), most, size, size, 3), np.float32)
    for b, row in enumerate(slots):
        for i, image in enumerate(row):
            images[b, i] = image.transpose(1, 2, 0)
    visual = stream == IMAGE
    has_label = labels != IGNORED
    has_label[:, 0] = False  # nothing predicts the first token
    answers = max(1, has_label.sum(axis=1).max())
    batch = {
        "tokens": np.where(visual, 0, stream),
        "visual": np.where(visual, np.cumsum(visual, axis=1) - 1, -1),
        "segments": segments,
        "prefixes": segments,
        "positions": positions,
        "image_tasks": np.array([[0 if i < len(row) else -1 for i in range(most)] for row in slots]),
        "target_index": np.zeros((len(slots), answers)),
        "targets": np.zeros((len(slots), answers)),
        "target_tasks": np.full((len(slots), answers), -1),
    }
    weights = np.zeros((len(slots), answers), np.float32)
    for b in range(len(slots)):
        (where,) = np.nonzero(has_label[b])
        batch["target_index"][b, : len(where)] = where - 1
        batch["targets"][b, : len(where)] = labels[b, where]
        batch["target_tasks"][b, : len(where)] = TASKS.index("vqa")
        weights[b, : len(where)] = 1
    return {k: v.astype(np.int32) for k, v in batch.items()} | {"weights": weights, "images": images}
