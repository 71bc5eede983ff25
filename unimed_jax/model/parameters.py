"""Lists and replaces the leaves of a model by path, and describes a model without allocating it.

A leaf's path joins the names of the modules that lead to it, as in
"decoder/layers/attention/q/kernel". Weight tables, training rules and the sharding table all speak
of leaves by these paths. This file knows nothing of files on disk: `runs` and `interop` read leaves
and hand them in.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from unimed_jax.config import Config, ModelConfig
from unimed_jax.errors import UserError
from unimed_jax.model.quantised import BLOCK, described
from unimed_jax.model.unimed import UniMed
from unimed_jax.rules import LeafRule, leaf_rules

# Routers of experts stay float32, because rounding their weights would change which expert is chosen.
EXACT = "decoder/layers/moe/router/*"
# The kernels that `config.model.frozen_kernels` is about: those of scanned layers, which are multiplied
# one layer at a time. Experts are not, as a grouped product takes all of a layer at once.
KERNELS = (
    "decoder/layers/attention/*/kernel",
    "decoder/layers/mlp/*/kernel",
    "decoder/layers/moe/meta/*/kernel",
    "decoder/layers/moe/residual/*/kernel",
    "vision/blocks/*/kernel",
)


def abstract(config: ModelConfig) -> UniMed:
    """Makes the model with jax.ShapeDtypeStruct in place of arrays, which allocates nothing."""
    return jax.eval_shape(lambda: UniMed(config, nnx.Rngs(0)))


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Lists every leaf of a model by its path; of an abstract model these are shapes."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {_path(keys): leaf.get_value() for keys, leaf in flat}


def stored_leaves(config: Config) -> dict[str, Any]:
    """Describes every leaf of a run's model by path, as `stored` does."""
    shapes = parameters(abstract(config.model))
    return stored(shapes, leaf_rules(shapes, config.train, config.optimizer), config.model)


def stored(
    shapes: Mapping[str, Any], rules: Mapping[str, LeafRule], config: ModelConfig
) -> dict[str, Any]:
    """Describes how every leaf is stored while a model trains, answers or is scored.

    The description is jax.ShapeDtypeStruct, or for a frozen kernel in few bits `Quantised` of two of
    them. What trains is float32. Raises UserError for a kernel that cannot be cut into blocks.
    """
    out: dict[str, Any] = {}
    for path, leaf in shapes.items():
        kind = config.frozen_kernels
        if rules[path].train or fnmatch.fnmatchcase(path, EXACT):
            out[path] = jax.ShapeDtypeStruct(leaf.shape, "float32")
        elif kind == "plain" or not any(fnmatch.fnmatchcase(path, each) for each in KERNELS):
            out[path] = jax.ShapeDtypeStruct(leaf.shape, config.frozen_dtype)
        elif leaf.shape[-2] % BLOCK:
            raise UserError(
                f"config.model.frozen_kernels={kind!r} stores blocks of {BLOCK} numbers, and {path} has "
                f"{leaf.shape[-2]} inputs; choose a multiple of {BLOCK}, or 'plain'."
            )
        else:
            out[path] = described(leaf.shape, kind, config.frozen_dtype)
    return out


def tree_bytes(tree: Any) -> int:
    """Adds up the bytes of the arrays, or of the shapes in place of arrays, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def with_parameters(model: UniMed, leaves: dict[str, Any]) -> UniMed:
    """Returns a new model with the named leaves replaced; all other leaves are shared."""
    graph, state = nnx.split(model)
    flat = []
    for keys, leaf in nnx.to_flat_state(state):
        value = leaves.get(_path(keys), leaf.get_value())
        flat.append((keys, leaf.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _path(keys: tuple) -> str:
    return "/".join(map(str, keys))
