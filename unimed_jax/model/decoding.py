"""Prepares models, and the programs that decode with them, for the hardware that they run on.

Decoding is bound by reading the weights. On GPUs and CPUs a product reads whole buffers, so a layer's
part of stacked weights is copied before it is used, and written and read again: on an H100 2.95 times
the bytes of the weights a token for LLaMA-2-7B, in the compiled program. Layers whose arrays are
separate need no copy, but take longer to compile. TPUs read a part of a stack in place.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from unimed_jax.model.attention import hardware
from unimed_jax.model.decoder import Decoder, DecoderLayer
from unimed_jax.model.parameters import tree_bytes
from unimed_jax.model.unimed import UniMed

# By hardware. XLA joins small products of one input (q, k, v) into one product, and copies their
# kernels into one array to do so, for every token again.
OPTIONS: dict[str, dict[str, Any]] = {"nvidia": {"xla_gpu_dot_merger_threshold_mb": 0}}


LARGE = 64 << 20  # bytes of layers; smaller ones stay in caches
# Tokens of an answer, one after another, after which separate layers have gained what compiling them
# took, with a margin: on two cores 4 to 7 more seconds for 40 to 54 ms a token (30 layers of 576), on an
# H100 some 35 s for 8 ms (LLaMA-2-7B, from the compiled program's bytes; docs/speed.md).
WORTH = {"cpu": 200}
WORTH_ON_GPU = 4000


def wants_separate(decoder: Decoder, tokens: float = math.inf) -> bool:
    """Says whether so many tokens of an answer come sooner with layers whose arrays are separate."""
    stacked = isinstance(decoder.layers, DecoderLayer)
    worth = hardware() != "tpu" and tokens >= WORTH.get(hardware(), WORTH_ON_GPU)
    return stacked and worth and tree_bytes(decoder.layers) > LARGE


def prepare(model: UniMed) -> None:
    """Separates the layers of a model that will only answer, in place, if that makes it faster."""
    if wants_separate(model.decoder):
        separate_layers(model.decoder)


def prepared(model: UniMed) -> UniMed:
    """Gives a model with separate layers that shares all other arrays; `model` stays as it is."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    separate_layers(copy.decoder)
    return copy


@jax.jit
def take_layer(leaf: Array, number: int) -> Array:
    """Copies a layer's part out of a stacked leaf."""
    return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)


def separate_layers(decoder: Decoder, take: Callable[[Any, int], Any] = take_layer) -> None:
    """Gives every layer arrays of its own in place of its share of stacked ones, in `decoder` itself.

    The stacks are freed one by one as they are taken apart, if nothing else holds them, so that at
    most one of them exists twice. The decoder computes the same; its parameters have other paths.
    One whose layers are separate stays as it is.

    take: returns a layer's part of a leaf; another one serves leaves that are only described.
    """
    if not isinstance(decoder.layers, DecoderLayer):
        return
    stacks = list(decoder.layers.parts())
    decoder.layers = nnx.List([])  # holds the stacks no more
    separate = []
    while stacks:
        leaves, tree = jax.tree.flatten(stacks.pop(0))
        count = leaves[0].shape[0] if leaves else 0
        parts = []
        while leaves:
            stacked = leaves.pop(0)
            parts.append([take(stacked, i) for i in range(count)])
        separate.append([jax.tree.unflatten(tree, own) for own in zip(*parts, strict=True)])
    shared, mlps, moes = separate
    plain, with_experts = iter(mlps), iter(moes)
    numbers = decoder.moe.numbers(decoder.config.depth)
    for i, layer in enumerate(shared):
        layer.mlp = nnx.data(None if i in numbers else next(plain))
        layer.moe = nnx.data(next(with_experts) if i in numbers else None)
    decoder.layers = nnx.List(shared)


class Jitted:
    """Compiles a function as jax.jit does, with the options of the hardware that it runs on."""

    def __init__(self, function: Callable[..., Any], **how: Any):
        functools.update_wrapper(self, function)
        self._function, self._how = function, how
        self._by_hardware: dict[str, Any] = {}

    def _of(self, name: str) -> Any:
        if name not in self._by_hardware:
            options = OPTIONS.get(name)
            self._by_hardware[name] = jax.jit(self._function, compiler_options=options, **self._how)
        return self._by_hardware[name]

    def __call__(self, *arguments: Any) -> Any:
        return self._of(hardware())(*arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Traces the function for the hardware of the mesh in context."""
        return self._of(hardware()).lower(*arguments)

    def compiled(self) -> int:
        """Counts the programs that were compiled so far."""
        return sum(jitted._cache_size() for jitted in self._by_hardware.values())
