"""Counts total, activated and trainable parameters by module, without making the model."""

import dataclasses
import fnmatch

import jax
from flax import nnx

from unimed_jax.config import Config, ModelConfig, VisionConfig
from unimed_jax.model.parameters import abstract, parameters, tree_bytes
from unimed_jax.model.vision import VisionEncoder
from unimed_jax.rules import leaf_rules
from unimed_jax.train.program import build

COUNTS = ("total", "activated", "trainable")
TOP = ("vision", "connector", "decoder")
DENSE = "the same model with one MLP in place of each set of experts, and no router"

# Path pattern -> name of the module inside its part of the model, in the order of the table; the
# first match wins.
MODULES = (
    ("vision/[cp]*", "embeddings"),  # cls, patch, positions, pre_norm
    ("vision/blocks/*", "blocks"),
    ("vision/*", "last norm"),
    ("connector/task_tokens", "task tokens"),
    ("connector/router/*", "router"),
    ("connector/experts/*", "experts"),
    ("connector/*", "projector"),
    ("decoder/embedding", "embedding"),
    ("decoder/*/lora_?", "adapters"),
    ("decoder/layers/attention/*", "attention"),
    ("decoder/layers/mlp/*", "MLPs"),
    ("decoder/layers/moe/router/*", "routers"),
    ("decoder/layers/moe/experts/*", "experts"),
    ("decoder/layers/moe/meta/*", "meta experts"),
    ("decoder/layers/moe/*", "residual MLPs"),
    ("decoder/head*", "head"),
    ("decoder/*", "norms"),
)


def count(config: Config) -> dict:
    """Counts the parameters of the settings' model from its shapes; the result is JSON-ready.

    "modules": name -> {"total", "activated", "trainable"}. "vision", "connector" and "decoder"
    (only the language model, as Med-MoE counts) are each followed by what they consist of, as in
    "decoder/experts"; "all" is the sum of the three. Activated parameters are those that one token
    of an example with an image is computed with; tables that are only looked up (embedding,
    positions, task tokens) count whole. "dense": the totals of connector, decoder and all if
    experts are one MLP (`DENSE`). "ratios": of decoder and all, activated to total and activated to
    dense. "tower": the total of the published vision encoder, including the blocks that are never
    run. "bytes": what training keeps of frozen and trained parameters, moments and gradients, as
    stored; batches and activations come on top.
    """
    modules = _count_modules(config)
    dense = _count_dense(config.model, vision=modules["vision"]["total"])
    ratios = {
        name: {
            "activated/total": modules[name]["activated"] / modules[name]["total"],
            "activated/dense": modules[name]["activated"] / dense[name],
        }
        for name in ("decoder", "all")
    }
    return {
        "modules": modules,
        "dense": dense,
        "ratios": ratios,
        "tower": _tower(config.model.vision),
        "bytes": _bytes(config),
    }


def _bytes(config: Config) -> dict[str, int]:
    """Counts the bytes of everything that a training step keeps or makes for every parameter."""
    program = build(config, None)
    trained = tree_bytes(program.state.leaves)
    moments = tree_bytes(program.state.moments)
    return {
        "frozen": tree_bytes(program.frozen),
        "trained": trained,
        "moments": moments,
        "gradients": trained,
    }


def _count_modules(config: Config) -> dict[str, dict[str, int]]:
    """Adds every leaf to its module, to its part of the model and to "all"; omits empty modules."""
    shapes = parameters(abstract(config.model))
    rules = leaf_rules(shapes, config.train, config.optimizer)
    modules: dict[str, dict[str, int]] = {}
    for top in TOP:
        modules[top] = dict.fromkeys(COUNTS, 0)
        inside = [name for pattern, name in MODULES if pattern.startswith(f"{top}/")]
        modules |= {f"{top}/{name}": dict.fromkeys(COUNTS, 0) for name in inside}
    modules["all"] = dict.fromkeys(COUNTS, 0)

    for path, leaf in shapes.items():
        top = path.split("/")[0]
        module = next(name for pattern, name in MODULES if fnmatch.fnmatchcase(path, pattern))
        trainable = leaf.size if rules[path].train else 0
        numbers = (leaf.size, _activated(path, leaf.size, config.model), trainable)
        for group in (modules[f"{top}/{module}"], modules[top], modules["all"]):
            for name, number in zip(COUNTS, numbers, strict=True):
                group[name] += number
    return {name: numbers for name, numbers in modules.items() if numbers["total"]}


def _count_dense(model: ModelConfig, vision: int) -> dict[str, int]:
    """Counts connector, decoder and all of the dense model, which has the same vision encoder."""
    dense = {"connector": 0, "decoder": 0}
    for path, leaf in parameters(abstract(_dense(model))).items():
        top = path.split("/")[0]
        if top in dense:
            dense[top] += leaf.size
    return dense | {"all": vision + sum(dense.values())}


def _activated(path: str, size: int, model: ModelConfig) -> int:
    """Counts the parameters of a leaf that one token uses; experts have equal shares of a leaf."""
    if path.startswith("decoder/layers/moe/experts/"):
        return size * model.moe.top_k // model.moe.experts
    if path.startswith("connector/experts/"):
        return size * _chosen(model) // model.connector.experts
    return size


def _chosen(model: ModelConfig) -> int:
    """Counts the experts of the connector that one visual token uses."""
    connector = model.connector
    return {"sparse": connector.top_k, "hard": 1}.get(connector.router, connector.experts)


def _dense(model: ModelConfig) -> ModelConfig:
    """Returns the settings of the dense model, which `DENSE` describes."""
    connector, moe = model.connector, dataclasses.replace(model.moe, experts=0)
    if connector.is_moe:
        connector = dataclasses.replace(connector, experts=1, router="constant", task_tokens=0)
    return dataclasses.replace(model, connector=connector, moe=moe)


def _tower(vision: VisionConfig) -> int:
    """Counts the whole published vision encoder.

    It includes the blocks and the norm after the features.
    """
    if vision.feature_layer != -1:
        vision = dataclasses.replace(vision, feature_layer=-1, output_norm=True)
    encoder = jax.eval_shape(lambda: VisionEncoder(vision, nnx.Rngs(0)))
    return sum(leaf.size for leaf in parameters(encoder).values())


def table(counted: dict, model: ModelConfig) -> str:
    """Lays out what `count` returned as text."""
    modules, dense, notes = counted["modules"], counted["dense"], _notes(counted, model)
    lines = [("module", *COUNTS, "")]
    for name, row in modules.items():
        shown = "  " + name.split("/")[1] if "/" in name else name
        lines.append((shown, *(f"{row[c]:,}" for c in COUNTS), notes.get(name, "")))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = []
    for name, *numbers, note in lines:
        columns = "  ".join(f"{n:>{w}}" for n, w in zip(numbers, widths[1:], strict=True))
        text.append(f"{name:{widths[0]}}  {columns}  {note}")
    text.append("")
    for name, what in (("decoder", "only the decoder (as Med-MoE counts)"), ("all", "all")):
        ratios = counted["ratios"][name]
        activated, total = modules[name]["activated"], modules[name]["total"]
        text.append(
            f"{what}: activated {activated:,} = {ratios['activated/total']:.1%} of its total "
            f"{total:,}, {ratios['activated/dense']:.1%} of dense {dense[name]:,}"
        )
    text.append(f"dense: {DENSE}")
    gib = {name: number / 2**30 for name, number in counted["bytes"].items()}
    parts = ", ".join(f"{name} {number:,.2f}" for name, number in gib.items())
    text.append(
        f"training keeps {sum(gib.values()):,.2f} GiB ({parts}); batches and activations come on top"
    )
    return "\n".join(line.rstrip() for line in text)


def _notes(counted: dict, model: ModelConfig) -> dict[str, str]:
    """Writes the table's remarks by module.

    They say how many layers and experts there are, and how many of them run.
    """
    connector, moe, vision = model.connector, model.moe, model.vision
    layers = len(moe.numbers(model.decoder.depth))
    notes = {"decoder/MLPs": f"{model.decoder.depth - layers} layers"}
    if layers:
        notes["decoder/experts"] = f"{moe.top_k} of {moe.experts} in each of {layers} layers"
        notes |= dict.fromkeys(
            ("decoder/meta experts", "decoder/residual MLPs"),
            f"{layers} layers",
        )
    if connector.is_moe:
        chosen = _chosen(model)
        notes["connector/experts"] = f"{chosen} of {connector.experts} ({connector.router} router)"
    if vision.feature_layer != -1:
        tower = counted["tower"]
        notes["vision"] = (
            f"{vision.blocks} of {vision.depth} blocks are run; the whole encoder has {tower:,}"
        )
    return notes
