"""Lists and replaces the leaves of a model by path, and describes a model without allocating it.

A leaf's path joins the names of the modules that lead to it, as in
"decoder/layers/attention/q/kernel". Weight tables, training rules and the sharding table all speak
of leaves by these paths. This file knows nothing of files on disk: `runs` and `interop` read leaves
and hand them in.
"""

from typing import Any

import jax
from flax import nnx

from unimed_jax.config import ModelConfig
from unimed_jax.model.unimed import UniMed


def abstract(config: ModelConfig) -> UniMed:
    """Makes the model with jax.ShapeDtypeStruct in place of arrays, which allocates nothing."""
    return jax.eval_shape(lambda: UniMed(config, nnx.Rngs(0)))


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Lists every leaf of a model by its path; of an abstract model these are shapes."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {_path(keys): leaf.get_value() for keys, leaf in flat}


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
