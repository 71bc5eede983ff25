"""How large a model is: total, activated and trainable parameters by module, counted without making one."""

import dataclasses
import fnmatch

import jax
from flax import nnx

from unimed_jax.config import Config, ModelConfig, VisionConfig
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.model.vision import VisionEncoder
from unimed_jax.rules import leaf_rules

COUNTS = ("total", "activated", "trainable")
DENSE = "the same model with one MLP in place of each set of experts, and no router"

# Path pattern -> module within its room, in the order of the table; the first match wins.
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
    """Parameters of the settings' model, from its shapes alone. JSON-ready.

    "modules": {"decoder/experts": {"total", "activated", "trainable"}, ...}; "rooms": the same of vision, connector,
    decoder (the language model alone, as Med-MoE counts) and all; "dense": of connector, decoder and all, where
    experts are one MLP (`DENSE`); "ratios": of decoder and all, activated to total and to dense; "tower": of the
    published vision encoder, with the blocks that are never run. Activated is what one token of an example with an
    image is computed with; tables that are only looked up (embedding, positions, task tokens) count whole.
    """
    shapes = parameters(abstract(config.model))
    rules = leaf_rules(shapes, config.train, config.optimizer)
    modules = {f"{pattern.split('/')[0]}/{module}": dict.fromkeys(COUNTS, 0) for pattern, module in MODULES}
    rooms = {room: dict.fromkeys(COUNTS, 0) for room in ("vision", "connector", "decoder", "all")}
    for path, leaf in shapes.items():
        room = path.split("/")[0]
        module = next(name for pattern, name in MODULES if fnmatch.fnmatchcase(path, pattern))
        numbers = (leaf.size, _activated(path, leaf.size, config.model), leaf.size if rules[path].train else 0)
        for group in (modules[f"{room}/{module}"], rooms[room], rooms["all"]):
            for name, number in zip(COUNTS, numbers, strict=True):
                group[name] += number
    modules = {name: numbers for name, numbers in modules.items() if numbers["total"]}
    dense = dict.fromkeys(("connector", "decoder"), 0)
    for path, leaf in parameters(abstract(_dense(config.model))).items():
        if (room := path.split("/")[0]) in dense:
            dense[room] += leaf.size
    dense["all"] = rooms["vision"]["total"] + sum(dense.values())
    ratios = {
        room: {
            "activated/total": rooms[room]["activated"] / rooms[room]["total"],
            "activated/dense": rooms[room]["activated"] / dense[room],
        }
        for room in ("decoder", "all")
    }
    tower = _tower(config.model.vision)
    return {"modules": modules, "rooms": rooms, "dense": dense, "ratios": ratios, "tower": tower}


def _activated(path: str, size: int, model: ModelConfig) -> int:
    """Of a leaf's parameters those that a token passes; an expert's share of a leaf is the same for all."""
    if path.startswith("decoder/layers/moe/experts/"):
        return size * model.moe.top_k // model.moe.experts
    if path.startswith("connector/experts/"):
        return size * _chosen(model) // model.connector.experts
    return size


def _chosen(model: ModelConfig) -> int:
    """Experts of the connector that one visual token passes."""
    connector = model.connector
    return {"sparse": connector.top_k, "hard": 1}.get(connector.router, connector.experts)


def _dense(model: ModelConfig) -> ModelConfig:
    connector, moe = model.connector, dataclasses.replace(model.moe, experts=0)
    if connector.is_moe:
        connector = dataclasses.replace(connector, experts=1, router="constant", task_tokens=0)
    return dataclasses.replace(model, connector=connector, moe=moe)


def _tower(vision: VisionConfig) -> int:
    if vision.feature_layer != -1:  # what lies behind the features is published too: the other blocks and the norm
        vision = dataclasses.replace(vision, feature_layer=-1, output_norm=True)
    return sum(leaf.size for leaf in parameters(jax.eval_shape(lambda: VisionEncoder(vision, nnx.Rngs(0)))).values())


def table(counted: dict, model: ModelConfig) -> str:
    """What `count` found, for the eye."""
    rooms, dense, notes = counted["rooms"], counted["dense"], _notes(counted, model)
    lines = [("module", *COUNTS, "")]
    for room, numbers in rooms.items():
        inside = {name: row for name, row in counted["modules"].items() if name.split("/")[0] == room}
        for name, row in {room: numbers, **inside}.items():
            shown = "  " + name.split("/")[1] if "/" in name else name
            lines.append((shown, *(f"{row[c]:,}" for c in COUNTS), notes.get(name, "")))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = [
        f"{name:{widths[0]}}  " + "  ".join(f"{n:>{w}}" for n, w in zip(numbers, widths[1:], strict=True)) + f"  {note}"
        for name, *numbers, note in lines
    ]
    text.append("")
    for room, what in (("decoder", "decoder alone (as Med-MoE counts)"), ("all", "all")):
        ratios = counted["ratios"][room]
        text.append(
            f"{what}: activated {rooms[room]['activated']:,} = {ratios['activated/total']:.1%} of its total "
            f"{rooms[room]['total']:,}, {ratios['activated/dense']:.1%} of dense {dense[room]:,}"
        )
    text.append(f"dense: {DENSE}")
    return "\n".join(line.rstrip() for line in text)


def _notes(counted: dict, model: ModelConfig) -> dict[str, str]:
    connector, moe, vision = model.connector, model.moe, model.vision
    layers = len(moe.numbers(model.decoder.depth))
    notes = {"decoder/MLPs": f"{model.decoder.depth - layers} layers"}
    if layers:
        notes["decoder/experts"] = f"{moe.top_k} of {moe.experts} in each of {layers} layers"
        notes |= dict.fromkeys(("decoder/meta experts", "decoder/residual MLPs"), f"{layers} layers")
    if connector.is_moe:
        notes["connector/experts"] = f"{_chosen(model)} of {connector.experts} ({connector.router} router)"
    if vision.feature_layer != -1:
        run = vision.depth + 1 + vision.feature_layer
        notes["vision"] = f"{run} of {vision.depth} blocks are run; the whole tower has {counted['tower']:,}"
    return notes
