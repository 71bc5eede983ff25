"""Writes GGUF files as llama.cpp's converter does, from random torch LLaMAs, and reads them."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from unimed_jax.config import DecoderConfig, LoraConfig, RopeScaling
from unimed_jax.interop.families.gguf import load_gguf
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.model.cache import Span
from unimed_jax.model.decoder import Decoder
from unimed_jax.model.parameters import abstract, parameters, with_parameters

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
# Widths are multiples of 32, the length of a quantised block.
HF = {
    **{
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "head_dim": 16,
    },
    **{
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}
OURS = DecoderConfig(
    vocab=96, width=64, depth=3, heads=4, kv_heads=2, head_dim=16, mlp_width=96, norm_eps=1e-6
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3["original_max_position_embeddings"] = 8192
# Name -> type of the matrices, what differs in Hugging Face's settings, and in ours.
FILES = {
    "F32": ("F32", {}, {}),
    "F16": ("F16", {}, {}),
    "BF16": ("BF16", {}, {}),
    "Q8_0": ("Q8_0", {}, {}),
    "Q4_1, tied": ("Q4_1", {"tie_word_embeddings": True}, {"tied_head": True}),
    "F32, biases": (
        "F32",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        {"attention_bias": ("q", "k", "v", "o"), "mlp_bias": True, "kv_heads": 4},
    ),
    "F32, positions stretched": (
        "F32",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    ),
    "F32, llama3": ("F32", {"rope_parameters": LLAMA3}, {"rope_scaling": RopeScaling(factor=32.0)}),
}
NAMES = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    "mlp.down_proj": "ffn_down",
}


def settings_of(config) -> dict:
    """Returns what llama.cpp's converter says of a Hugging Face LLaMA."""
    linear = config.rope_parameters["rope_type"] == "linear"
    return {
        **({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0} if linear else {}),
        "llama.block_count": config.num_hidden_layers,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": 512,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": config.head_dim,
    }


def tensors_of(model) -> dict[str, np.ndarray]:
    """Renames tensors as llama.cpp does, with the rows of each rotary pair next to each other."""
    out, c = {}, model.config
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stem, kind = name.rsplit(".", 1)
        layer = stem.split(".")[2] if stem.startswith("model.layers.") else ""
        value = value.numpy()
        if stem.endswith(("q_proj", "k_proj")):
            half, rows = c.head_dim // 2, []
            for head in range(value.shape[0] // c.head_dim):
                rows += [head * c.head_dim + i + side * half for i in range(half) for side in (0, 1)]
            value = value[rows]
        ours = NAMES[stem.removeprefix(f"model.layers.{layer}.") if layer else stem]
        out[f"blk.{layer}.{ours}.{kind}" if layer else f"{ours}.{kind}"] = value
    return out


def write(path, kind="F32", settings=None, tensors=None, architecture="llama", tokenizer=None) -> None:
    """Writes a file of these settings and tensors; matrices are stored as `kind`."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in {**(settings or {}), **(tokenizer or {})}.items():
        adders.get(type(value), writer.add_array)(key, value)
    for name, value in (tensors or {}).items():
        if value.ndim == 1 or kind == "F32":
            writer.add_tensor(name, value)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(value, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_llama(**differ):
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**HF, **differ})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # kernels of gain 1, biases and norms away from 0 and 1
        for name, weight in model.named_parameters():
            fan_in = weight.shape[-1] if weight.ndim == 2 and "embed" not in name else 4
            weight.copy_(torch.randn_like(weight) * fan_in**-0.5 + ("norm" in name))
    return model


def imported(path, config: DecoderConfig) -> Decoder:
    settings = dataclasses.replace(tiny.CONFIG, decoder=config, lora=LoraConfig(rank=0))
    model = abstract(settings)
    leaves = {name: leaf for name, leaf in parameters(model).items() if name.startswith("decoder/")}
    loaded = load_gguf(path, settings, Destination(leaves))
    assert loaded.keys() == leaves.keys()
    return with_parameters(model, loaded).decoder


@jax.jit
def logits_of(decoder, tokens):
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return decoder.logits(decoder(decoder.embed(tokens, jnp.float32), Span(positions, ones, ones))[0])
