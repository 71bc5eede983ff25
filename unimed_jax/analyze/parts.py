"""Cuts a model's leaves into the parts that analyses speak of: an expert, the router, a layer.

A leaf may hold several parts: experts lie side by side in wide matrices, layers are stacked.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence

from jaxtyping import Array

from unimed_jax.config import ModelConfig
from unimed_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Part:
    """Names a slice of a leaf: indices `start` to `start + size` of one axis."""

    module: str  # "connector", "vision", "decoder", or "LoRA"
    name: str  # within the module: "expert 0", "router", "layer 3"
    leaf: str  # path
    axis: int
    start: int
    size: int

    def of(self, leaf: Array) -> Array:
        """Cuts the part out of the leaf, or out of an array of the same shape."""
        whole = self.size == leaf.shape[self.axis]
        index = (slice(None),) * self.axis + (slice(self.start, self.start + self.size),)
        return leaf if whole else leaf[index]

    def count(self, shape: Sequence[int]) -> int:
        """Counts the part's numbers, given the leaf's shape."""
        return math.prod(shape) // shape[self.axis] * self.size

    def split(self, shape: Sequence[int], most: float) -> Iterator["Part"]:
        """Cuts the part along its axis into pieces of at most `most` numbers, or of one index."""
        step = max(1, min(self.size, int(most // (self.count(shape) // self.size))))
        for start in range(self.start, self.start + self.size, step):
            size = min(step, self.start + self.size - start)
            yield dataclasses.replace(self, start=start, size=size)


def parts_of(shapes: Mapping[str, Sequence[int]], config: ModelConfig) -> list[Part]:
    """Cuts leaves, given by path and shape, into experts, router and layers; nothing is left out."""
    found: list[Part] = []
    for path, shape in shapes.items():
        module, second, *rest = path.split("/")
        if path.startswith("connector/experts/"):
            # Side by side (model/connector.py): up [C, E * H], up_bias [E * H], down [E * H, D],
            # bias [E, D].
            axis = 1 if rest == ["up"] else 0
            size = shape[axis] // config.connector.experts
            for e in range(config.connector.experts):
                found.append(Part(module, f"expert {e}", path, axis, e * size, size))
        elif module == "connector" and second == "layers":
            found.append(Part(module, f"layer {rest[0]}", path, 0, 0, shape[0]))
        elif second in ("layers", "blocks"):
            of = "LoRA" if rest[-1].startswith("lora_") else module
            numbers = _layers_of(rest[0], config) if module == "decoder" else range(shape[0])
            places = zip(range(shape[0]), numbers, strict=True)
            found += [Part(of, f"layer {n}", path, 0, i, 1) for i, n in places]
        else:
            found.append(Part(module, second.replace("_", " "), path, 0, 0, shape[0]))
    return found


def _layers_of(part: str, config: ModelConfig) -> list[int]:
    """Lists the decoder's layers over which a part of its layers is stacked.

    Experts ("moe") are stacked over the layers that have them, "mlp" over the others, the rest over all.
    """
    every = range(config.decoder.depth)
    with_experts = config.moe.numbers(config.decoder.depth)
    chosen = {"moe": with_experts, "mlp": [n for n in every if n not in with_experts]}
    return list(chosen.get(part, every))


def groups_of(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """Groups parts as tables show them: each module as a whole, then its parts by name.

    A module's only part is not listed again, nor are task tokens: each belongs to one task, so that
    no two tasks meet there.
    """
    modules: dict[str, list[Part]] = {}
    for part in parts:
        modules.setdefault(part.module, []).append(part)
    groups = dict(modules)
    for module, whole in modules.items():
        named = [part for part in whole if part.name != "task tokens"]
        if len({part.name for part in named}) > 1:
            for part in named:
                groups.setdefault(f"{module}: {part.name}", []).append(part)
    return groups


def matching(paths: Sequence[str], patterns: Sequence[str], option: str) -> list[str]:
    """Lists the paths of leaves that match a pattern; `option` names the argument that gave them.

    Raises UserError for a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise UserError(
                f"{option}={pattern} matches no parameter of this model{nearest(pattern, paths)} Give "
                "a pattern of paths such as 'connector/*' or 'decoder/layers/*/lora_?'."
            )
    return [path for path in paths if any(fnmatch.fnmatchcase(path, p) for p in patterns)]
