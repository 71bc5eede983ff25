"""Makes tiny Hugging Face decoders of every family, all leaves random, as peers of ours."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from support import tiny

from unimed_jax.config import DecoderConfig, LoraConfig, RopeScaling
from unimed_jax.interop.families import hf
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.model.parameters import abstract, parameters

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
HF = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
}
OURS = DecoderConfig(
    vocab=120, width=32, depth=3, heads=4, kv_heads=2, head_dim=8, mlp_width=24, norm_eps=1e-6
)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ALL = ("q", "k", "v", "o")
GEMMA = {
    "norm": "rms_zero",
    "scaled_embedding": True,
    "activation": "gelu_tanh",
    "tied_head": True,
    "head_dim": 12,
}
GEMMA2 = GEMMA | {"post_norms": True, "query_scale": 5**-0.5, "logit_softcap": 3.0}
LAYER = {"norm": "layer", "norm_eps": 1e-5}
PHI = LAYER | {
    **{"parallel_block": True, "gated_mlp": False, "activation": "gelu_tanh"},
    **{"attention_bias": ALL, "mlp_bias": True, "head_bias": True},
}

# Name -> their kind of config, their settings, what differs from OURS.
PEERS = {
    "llama1, positions stretched": (
        "Llama",
        {
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
        {"kv_heads": 4, "rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    ),
    "llama2": (
        "Llama",
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
        {"kv_heads": 4, "norm_eps": 1e-5},
    ),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 128},
                **LLAMA3,
            },
        },
        {"rope_scaling": RopeScaling(**LLAMA3, original_positions=128)},
    ),
    "llama, wide heads and biases, tied": (
        "Llama",
        {"head_dim": 12, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"head_dim": 12, "attention_bias": ALL, "mlp_bias": True, "tied_head": True},
    ),
    "mistral": (
        "Mistral",
        {
            "sliding_window": 5,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        {"windows": (5,), "kv_heads": 1, "rope_theta": 1e6},
    ),
    "mistral without window": ("Mistral", {"sliding_window": None}, {}),
    "qwen2": ("Qwen2", {}, {"attention_bias": ("q", "k", "v")}),
    "qwen2 with windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        {"attention_bias": ("q", "k", "v"), "windows": (0, 7, 7)},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12}, {"head_dim": 12, "qk_norm": True}),
    "qwen3 with windows and biases, tied": (
        "Qwen3",
        {
            **{"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
            **{"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
        },
        {"qk_norm": True, "windows": (0, 0, 7), "attention_bias": ALL, "tied_head": True},
    ),
    "gemma": ("Gemma", {"head_dim": 12, "num_key_value_heads": 1}, GEMMA | {"kv_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            **{"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 5},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        },
        GEMMA2 | {"windows": (5, 0), "attention_softcap": 2.0},
    ),
    "gemma2 without caps": (
        "Gemma2",
        {
            **{"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 12, "attention_bias": True},
            **{"attn_logit_softcapping": None, "final_logit_softcapping": None},
        },
        GEMMA2
        | {"windows": (5, 0), "logit_softcap": None, "query_scale": 12**-0.5, "attention_bias": ALL},
    ),
    "gemma3_text": (
        "Gemma3Text",
        {
            **{
                "head_dim": 12,
                "sliding_window": 5,
                "query_pre_attn_scalar": 5,
                "final_logit_softcapping": 3.0,
            },
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        GEMMA2
        | {
            **{"windows": (5, 5, 0), "qk_norm": True, "rope_theta": 1e6, "local_rope_theta": 100.0},
            "rope_scaling": RopeScaling(kind="linear", factor=8.0),
        },
    ),
    "stablelm": (
        "StableLm",
        {"use_qkv_bias": True},
        LAYER | {"attention_bias": ("q", "k", "v"), "rotary_fraction": 0.25},
    ),
    "stablelm, parallel, tied": (
        "StableLm",
        {"use_parallel_residual": True, "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
        LAYER | {"parallel_block": True, "tied_head": True},
    ),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}, PHI | {"rotary_fraction": 0.5}),
    "phi with norms of q and k": (
        "Phi",
        {"qk_layernorm": True, "hidden_act": "gelu", "partial_rotary_factor": 0.75},
        PHI | {"qk_norm": True, "activation": "gelu", "rotary_fraction": 0.75},
    ),
}


def settings(name: str):
    transformers = pytest.importorskip("transformers")
    kind, theirs, _ = PEERS[name]
    return getattr(transformers, f"{kind}Config")(**{**HF, **theirs})


@functools.cache
def peer(name: str, folder: Path):
    """Makes the torch model with random weights and saves it; returns it and its folder."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        settings(name), attn_implementation="eager"
    ).eval()
    randomise(torch, model)
    folder = folder / name.replace(" ", "_").replace(",", "")
    model.save_pretrained(folder, max_shard_size="20KB")  # several files and an index
    return model, folder


def randomise(torch, model) -> None:
    """Draws kernels of gain 1, biases away from 0, norm gains away from 1 (Gemma: from 0)."""
    one = 0 if type(model).__name__.startswith("Gemma") else 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = weight.shape[-1] if weight.ndim == 2 and "embed" not in name else 4
            centre = one if "norm" in name and "bias" not in name else 0
            weight.copy_(torch.randn_like(weight) * fan_in**-0.5 + centre)


def load_leaves(folder, config: DecoderConfig) -> dict:
    """Reads the decoder's leaves from a folder, and checks that none is missing."""
    settings = dataclasses.replace(tiny.CONFIG, decoder=config, lora=LoraConfig(rank=0))
    leaves = {
        path: leaf
        for path, leaf in parameters(abstract(settings)).items()
        if path.startswith("decoder/")
    }
    loaded = hf.load_decoder(folder, settings, Destination(leaves))
    assert loaded.keys() == leaves.keys()
    return loaded


def padded(side: str, lengths=(160, 97, 5), first: int = 0):
    """Draws rows of several lengths: tokens, mask and positions from `first` on, [B, S] each."""
    rng = np.random.default_rng(1)
    longest = max(lengths)
    tokens, mask = (
        np.zeros((len(lengths), longest), np.int32),
        np.zeros((len(lengths), longest), np.int32),
    )
    for b, n in enumerate(lengths):
        here = slice(0, n) if side == "right" else slice(longest - n, longest)
        tokens[b, here], mask[b, here] = rng.integers(0, OURS.vocab, n), 1
    return tokens, mask, first + np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
