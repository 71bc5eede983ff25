"""Exports of a model that lies on eight devices: the same bytes as from one, in every format."""

import dataclasses

import jax
import numpy as np
import pytest
from support import tiny
from support.exported_model import TEXTS

from unimed_jax.config import MeshConfig, TextConfig
from unimed_jax.data.tokenizer import train_tokenizer
from unimed_jax.interop.families.unimed_names import trainable_table
from unimed_jax.interop.families.unimed_pth import Moments
from unimed_jax.interop.targets import TARGETS, Content
from unimed_jax.model.parameters import parameters
from unimed_jax.model.sharding import make_mesh, parameter_shardings
from unimed_jax.settings import from_config_dict

pytestmark = pytest.mark.usefixtures("quick_compiles")

CLIP = {
    "qkv_bias": "qkv",
    "pre_norm": True,
    "patch_bias": False,
    "activation": "quick_gelu",
    "output_norm": False,
}
MODELS = {
    "peft": {},
    "unimed": {"connector": {"hidden": None, "router_hidden": None}},
    "med_moe": {
        "vision": {**CLIP, "feature_layer": -2, "depth": 3},
        "connector": {"kind": "mlp2x_gelu", "rate": 1, "hidden": None, "task_tokens": 0},
        "decoder": {"norm": "layer", "rotary_fraction": 0.5, "head_dim": 4, "kv_heads": 4},
        "moe": {"experts": 4, "top_k": 2, "layers": (1,)},
        "lora": {"rank": 0},
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_bytes_from_one_device_and_from_eight(kind, tmp_path):
    parts = {part: dict(fields) for part, fields in MODELS[kind].items()}
    parts.setdefault("decoder", {})["vocab"] = 480
    config = dataclasses.replace(from_config_dict({}), model=tiny.config(**parts))
    train_tokenizer(TEXTS, TextConfig(vocab=480), tmp_path / "tokenizer")
    one = parameters(tiny.model(config.model))
    mesh = make_mesh(MeshConfig(auto=False, fsdp=2, tensor=4), 8)
    places = parameter_shardings(one, mesh)
    eight = {path: jax.device_put(leaf, places[path]) for path, leaf in one.items()}
    assert (
        max(len(leaf.devices()) for leaf in eight.values())
        == 8
        > len(next(iter(one.values())).devices())
    )
    assert any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in eight.values())

    def written(leaves, name) -> dict[str, bytes]:
        moments = None
        if kind == "unimed":
            held = {path: leaves[path] for path in trainable_table(config.model).paths()}
            moments = Moments(
                {path: np.array(3, np.int32) for path in held}, held, {p: x * x for p, x in held.items()}
            )
        TARGETS[kind].write(
            tmp_path / name, Content(config, leaves, tmp_path / "tokenizer", moments=moments)
        )
        out = tmp_path / name
        files = [out] if out.is_file() else sorted(out.iterdir())
        return {file.name.replace(name, ""): file.read_bytes() for file in files}

    alone, spread = written(one, "one"), written(eight, "eight")
    assert alone.keys() == spread.keys() and max(map(len, alone.values())) > 1000
    for name in alone:
        assert alone[name] == spread[name], name
