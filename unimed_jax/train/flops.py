"""Counts the floating-point operations that a training step cannot do without.

A product of [n, in] with a kernel [in, out] needs 2 * n * in * out operations forward, as many for
the gradient of its input if something below it trains, and as many for the gradient of the kernel
if that trains. So LoRA on a frozen decoder needs 4N a token, not 6N, and a frozen encoder 2N.
Attention (scores and weighted values) counts the pairs that are seen: half of S * S in a causal
row, all in the encoder, which does nothing where its features are cached. Recomputation under remat,
norms, activations, softmax, the loss and the optimizer are left out.
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from unimed_jax.config import VISUAL_TASKS, Config, DecoderConfig, ModelConfig
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.rules import leaf_rules

PARTS = ("vision", "connector", "decoder", "head")


def useful_flops(config: Config, examples: int = 1) -> dict[str, float]:
    """Counts the operations (FLOPs) of one step on full rows, by part of the model.

    The keys are vision, connector, decoder, attention (of the decoder) and head.

    Each row holds `examples` of equal length, which do not see each other. Experts of the decoder
    count as often as a token visits them, those of the connector always (the soft router runs them
    all).
    """
    model, data = config.model, config.data
    decoder, vision = model.decoder, model.vision
    images = data.rows * data.row_images
    encoded = 0 if config.train.cache_features else images
    patches = vision.patches + vision.cls_token
    flops = dict.fromkeys((*PARTS, "attention"), 0.0)
    for p in products(config):
        flops[p.part] += 2 * math.prod(p.shape) * p.visits * (1 + p.passes + p.trains)
    below = gradients_pass(config)

    # Scores and weighted values: 2 * width each for every pair that is seen; backward twice as many.
    flops["vision"] += (
        4 * vision.width * patches * patches * encoded * vision.blocks * (3 if below["vision"] else 1)
    )
    pairs = data.rows * examples * _visible_pairs(decoder, data.row_tokens / examples)
    flops["attention"] = 4 * decoder.heads * decoder.head_dim * pairs * (3 if below["decoder"] else 1)
    return flops


def _visible_pairs(decoder: DecoderConfig, tokens: float) -> float:
    """Counts the pairs of tokens that see each other in an example of so many, over all layers."""
    windows = decoder.windows or (0,)
    seen = (min(windows[i % len(windows)] or tokens, tokens) for i in range(decoder.depth))
    return sum(window * (tokens - window / 2) for window in seen)


@functools.cache
def leaf_shapes(model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Lists the shape of every leaf of a model by path."""
    found = {path: tuple(leaf.shape) for path, leaf in parameters(abstract(model)).items()}
    return MappingProxyType(found)


class Product(NamedTuple):
    """Describes a product of activations with a parameter, in one training step."""

    path: str
    part: str  # one of PARTS
    shape: tuple[int, ...]  # of the parameter
    visits: float  # rows of the activations that each of its matrices multiplies, over all devices
    passes: bool  # whether the gradient of its input is needed
    trains: bool  # whether its own gradient is


def products(config: Config) -> list[Product]:
    """Lists the products of a training step, in the model's order of parameters."""
    model, data = config.model, config.data
    images = data.rows * data.row_images
    encoded = 0 if config.train.cache_features else images
    visits = {
        "vision": encoded * (model.vision.patches + model.vision.cls_token),
        "connector": images * model.tokens_per_image,
        "decoder": data.rows * data.row_tokens,
        "head": data.rows * data.row_answers,
    }
    shapes = leaf_shapes(model)
    rules = leaf_rules(shapes, config.train, config.optimizer)
    below, found = gradients_pass(config), []
    for path, shape in shapes.items():
        part = path.split("/")[0]
        if path == "decoder/head" or (path == "decoder/embedding" and model.decoder.tied_head):
            part = "head"
        elif not _is_kernel(path):
            continue
        count: float = visits[part]
        if path == "connector/router/task_kernel":
            count = len(VISUAL_TASKS)  # once a task, whatever the images
        if "/moe/experts/" in path:
            count *= model.moe.top_k / model.moe.experts
        passes = below[part] or path in ("connector/experts/down", "connector/router/out_kernel")
        # layers of a dense connector after its first
        passes |= path.startswith("connector/layers/") and not path.startswith("connector/layers/0/")
        found.append(Product(path, part, shape, count, passes, rules[path].train))
    return found


def gradients_pass(config: Config) -> dict[str, bool]:
    """Says of each part whether anything below it trains, so that gradients must pass through it."""
    shapes = leaf_shapes(config.model)
    rules = leaf_rules(shapes, config.train, config.optimizer)
    trains = {part: any(rules[path].train for path in shapes if path.startswith(part)) for part in PARTS}
    through = trains["vision"] or trains["connector"] or trains["decoder"]
    return {
        "vision": trains["vision"],
        "connector": trains["vision"],
        "decoder": through,
        "head": through,
    }


def _is_kernel(path: str) -> bool:
    """Says whether a parameter multiplies activations.

    Biases, scales and tables of embeddings do not.
    """
    return path.endswith(
        ("kernel", "/lora_a", "/lora_b", "connector/experts/up", "connector/experts/down")
    )
