"""Exports tiny models of many kinds as folders for torch, and makes the questions to ask them."""

import dataclasses
import functools
import re

import numpy as np
import pytest
from support import tiny

from unimed_jax.config import VISUAL_TASKS, Config, SourceConfig, TextConfig
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import train_tokenizer
from unimed_jax.interop.families.unimed_hf import (
    export_unimed_hf,
    merged_leaves,
)
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.predict.predictor import Predictor
from unimed_jax.predict.request import Request
from unimed_jax.settings import from_config_dict

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
TEXTS = [
    "[INST] <Img></Img> [vqa] Is the left thalamus seen? [/INST]",
    "{<12><3><40><99>}",
    "a report of 12 words",
] * 5
VOCAB, EOS = 480, 1
TOLERANCE = 1e-4

# What differs from tiny.CONFIG, which has a class token, biases on q and v, strips, a soft router
# on both tokens, LoRA.
VARIANTS = {
    "as published": {},
    "block, sparse on the visual token, as CLIP, tied": {
        "vision": {
            **{"cls_token": False, "qkv_bias": "qkv", "pre_norm": True, "feature_layer": -2, "depth": 3},
            **{"output_norm": False, "patch_bias": False, "activation": "quick_gelu"},
        },
        "connector": {
            "aggregation": "block",
            "kind": "moe_linear",
            "router": "sparse",
            "router_input": "token",
        },
        "decoder": {"tied_head": True},
    },
    "avgpool, hard": {
        "vision": {"qkv_bias": "none", "activation": "gelu_tanh"},
        "connector": {"aggregation": "avgpool", "router": "hard", "activation": "silu", "experts": 5},
        "decoder": {"attention_bias": ("q", "k", "v"), "kv_heads": 4, "head_dim": 4},
    },
    "maxpool, soft on a narrow task token": {
        "vision": {"activation": "silu", "normalise": "picture"},
        "connector": {
            "aggregation": "maxpool",
            "router_input": "task",
            "task_token_width": 6,
            "router_hidden": None,
        },
        "decoder": {"windows": (9,)},
    },
    "constant": {"connector": {"router": "constant", "kind": "moe_linear"}, "lora": {"rank": 0}},
    "linear": {"connector": {"kind": "linear", "task_tokens": 0, "rate": 1}},
    "mlp": {"connector": {"kind": "mlp3x_gelu", "hidden": 10, "activation": "gelu_tanh"}},
    "gemma 2": {
        "decoder": {
            **{
                "norm": "rms_zero",
                "scaled_embedding": True,
                "tied_head": True,
                "post_norms": True,
                "windows": (9, 0),
            },
            **{
                "activation": "gelu_tanh",
                "query_scale": 0.25,
                "attention_softcap": 2.0,
                "logit_softcap": 5.0,
            },
        }
    },
    "phi": {
        "decoder": {
            **{
                "norm": "layer",
                "parallel_block": True,
                "gated_mlp": False,
                "activation": "gelu_tanh",
                "kv_heads": 4,
            },
            **{
                "attention_bias": ("q", "k", "v", "o"),
                "mlp_bias": True,
                "head_bias": True,
                "rotary_fraction": 0.5,
            },
            **{"head_dim": 4},
        },
        "lora": {"targets": ("q", "v")},
    },
}
QUESTIONS = {
    "vqa": "Is the  left\tthalamus seen?",
    "refer": "left thalamus",
    "identify": "{<12><3><40><99>}",
    "caption": "",
    "cls": "",
    "qa": "What is 1 plus </s> 1?",
}


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason=NEEDS)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, TextConfig(vocab=VOCAB), folder)
    return folder


def settings_of(model, **text) -> Config:
    base = from_config_dict({})
    return dataclasses.replace(
        base,
        name="tiny",
        model=model,
        text=dataclasses.replace(
            base.text, **{"max_prompt": 128, "tokenizer": "/secret/folder/tokens", **text}
        ),
        data=dataclasses.replace(
            base.data,
            root="/secret",
            sources=(SourceConfig("slake", path="/secret/slake", tasks=("vqa",)),),
        ),
        init=(("seed", ""), ("hf", "/secret/folder/some-llama")),
        evaluate=dataclasses.replace(base.evaluate, max_new_tokens=8, batch=8),
    )


def random_model(settings):
    """Makes a random model that sometimes ends its answers."""
    model = tiny.model(settings)
    leaf = "embedding" if settings.decoder.tied_head else "head"
    values = parameters(model)[f"decoder/{leaf}"]
    place = (EOS, slice(None)) if leaf == "embedding" else (slice(None), EOS)
    return with_parameters(model, {f"decoder/{leaf}": values.at[place].multiply(2.5)})


@pytest.fixture(scope="session")
def exported(tokenizer_folder, tmp_path_factory):
    """Returns a function from a variant to its (config, model, folder), which is made only once."""

    @functools.cache
    def make(name):
        parts = {part: dict(fields) for part, fields in VARIANTS[name].items()}
        parts.setdefault("decoder", {})["vocab"] = VOCAB
        config = settings_of(tiny.config(**parts))
        model = random_model(config.model)
        folder = tmp_path_factory.mktemp("exported") / re.sub(r"\W+", "_", name)
        export_unimed_hf(folder, config, parameters(model), tokenizer_folder)
        return config, model, folder

    return make


@pytest.fixture(scope="session")
def asked():
    """Makes an example of each task, with images of several sizes.

    One of them has the model's own size.
    """
    rng = np.random.default_rng(0)
    examples, pixels = [], []
    for i, (task, question) in enumerate(QUESTIONS.items()):
        visual = task in VISUAL_TASKS
        examples.append(Example(task, task, question, "", images=(task,) if visual else ()))
        size = (16, 16) if i == 2 else (20 + i, 40 - 3 * i)
        pixels.append([rng.integers(0, 256, (*size, 3)).astype(np.uint8)] if visual else [])
    return examples, pixels


def answers(model, config, tokenizer, examples, pixels) -> list[str]:
    requests = [Request(e.task, e.question, tuple(own)) for e, own in zip(examples, pixels, strict=True)]
    return Predictor(model, config, tokenizer).answers(requests)


def merged(model):
    """Returns the leaves of a model, with adapters folded in."""
    return {
        path: np.asarray(leaf) for path, leaf in merged_leaves(model.config, parameters(model)).items()
    }
