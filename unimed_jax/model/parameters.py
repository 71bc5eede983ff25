"""The leaves of a model by path: listing them, replacing them, and a model without arrays."""

from typing import Any

import jax
from flax import nnx

from unimed_jax.config import ModelConfig
from unimed_jax.model.unimed import UniMed


def abstract(config: ModelConfig) -> UniMed:
    """The model with shapes and dtypes in place of arrays: nothing is allocated."""
    return jax.eval_shape(lambda: UniMed(config, nnx.Rngs(0)))


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Every leaf by its path, e.g. "decoder/layers/attention/q/kernel"."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def with_parameters(model: UniMed, leaves: dict[str, Any]) -> UniMed:
    """The model with the named leaves in place of its own; a new object, the rest shared."""
    graph, state = nnx.split(model)
    flat = [
        (path, leaf.replace(leaves.get("/".join(map(str, path)), leaf.get_value())))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))
