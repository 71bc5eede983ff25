"""Counts the floating-point operations that a training step cannot do without.

A product of [n, in] with a kernel [in, out] needs 2 * n * in * out operations forward, as many for
the gradient of its input if something below it trains, and as many for the gradient of the kernel
if that trains. So LoRA on a frozen decoder needs 4N a token, not 6N, and a frozen encoder 2N.
Attention (scores and weighted values) counts the pairs that are seen: half of S * S in a causal
row, all in the encoder. Recomputation under remat, norms, activations, softmax, the loss and the
optimizer are left out.
"""

import math

from unimed_jax.config import VISUAL_TASKS, Config
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.rules import leaf_rules


def useful_flops(config: Config, examples: int = 1) -> dict[str, float]:
    """Counts the operations (FLOPs) of one step on full rows, by part of the model.

    The keys are vision, connector, decoder, attention (of the decoder) and head.

    Each row holds `examples` of equal length, which do not see each other. Experts of the decoder
    count as often as a token visits them, those of the connector always (the soft router runs them
    all).
    """
    model, data = config.model, config.data
    decoder, vision = model.decoder, model.vision
    shapes = parameters(abstract(model))
    rules = leaf_rules(shapes, config.train, config.optimizer)
    images = data.rows * data.row_images
    patches = vision.patches + vision.cls_token
    visits = {
        "vision": images * patches,
        "connector": images * model.tokens_per_image,
        "decoder": data.rows * data.row_tokens,
        "head": data.rows * data.row_answers,
    }
    # Whether anything below a part trains, so that gradients must pass through the part.
    trains = {
        part: any(rules[path].train for path in shapes if path.startswith(part)) for part in visits
    }
    below = {"vision": trains["vision"], "connector": trains["vision"]}
    below["decoder"] = below["head"] = trains["vision"] or trains["connector"] or trains["decoder"]

    flops = dict.fromkeys((*visits, "attention"), 0.0)
    for path, leaf in shapes.items():
        part = path.split("/")[0]
        if path == "decoder/head" or (path == "decoder/embedding" and decoder.tied_head):
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
        flops[part] += 2 * math.prod(leaf.shape) * count * (1 + passes + rules[path].train)

    # Scores and weighted values: 2 * width each for every pair that is seen; backward twice as many.
    flops["vision"] += (
        4 * vision.width * patches * patches * images * vision.depth * (3 if below["vision"] else 1)
    )
    pairs = data.rows * examples * (data.row_tokens / examples) ** 2 / 2
    flops["attention"] = (
        4 * decoder.heads * decoder.head_dim * pairs * decoder.depth * (3 if below["decoder"] else 1)
    )
    return flops


def _is_kernel(path: str) -> bool:
    """Says whether a parameter multiplies activations.

    Biases, scales and tables of embeddings do not.
    """
    return path.endswith(
        ("kernel", "/lora_a", "/lora_b", "connector/experts/up", "connector/experts/down")
    )
