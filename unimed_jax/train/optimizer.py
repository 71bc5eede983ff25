"""Implements AdamW and its schedule as Uni-Med publishes them.

The parameters are a flat dict of trainable leaves.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from unimed_jax.config import VISUAL_TASKS, OptimizerConfig
from unimed_jax.rules import LeafRule

Leaves = dict[str, Any]


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Computes the rate of step `step` (from 0) of `steps`: linear warm-up, then a cosine.

    The cosine spans all steps and is not offset by the warm-up, hence a small drop at the joint (as
    published).
    """
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * step / steps))


class AdamState(NamedTuple):
    # int32, one per leaf (per task for the task tokens): steps it took part in
    count: Leaves  # type: ignore[assignment]  # hides tuple.count
    mean: Leaves
    square: Leaves


def adam(
    betas: tuple[float, float], eps: float, skip_unused: bool
) -> optax.GradientTransformationExtraArgs:
    """Makes the transformation that turns gradients into Adam's direction.

    With `skip_unused`, `update(..., used=...)` names by path which leaves (or rows of a leaf) took
    part in the step's graph; the others keep moments and count and get a zero update, as torch
    leaves parameters whose gradient is None. A gradient of exact zeros does take part.
    """
    plain = optax.scale_by_adam(*betas, eps=eps)
    if not skip_unused:
        return optax.with_extra_args_support(plain)
    b1, b2 = betas

    def init(leaves: Leaves) -> AdamState:
        mean, square = jax.tree.map(jnp.zeros_like, leaves), jax.tree.map(jnp.zeros_like, leaves)
        count = {
            path: jnp.zeros(count_shape(path, leaf.shape), jnp.int32) for path, leaf in leaves.items()
        }
        return AdamState(count, mean, square)

    def update(gradients: Leaves, state: AdamState, leaves: Leaves | None = None, *, used: Leaves):
        del leaves
        out, new = {}, AdamState({}, {}, {})
        for path, g in gradients.items():
            on = used[path]
            count = state.count[path] + on
            mean = jnp.where(on, b1 * state.mean[path] + (1 - b1) * g, state.mean[path])
            square = jnp.where(on, b2 * state.square[path] + (1 - b2) * g * g, state.square[path])
            steps = jnp.maximum(count, 1).astype(jnp.float32)
            direction = mean / (1 - b1**steps) / (jnp.sqrt(square / (1 - b2**steps)) + eps)
            out[path] = jnp.where(on, direction, 0.0)
            new.count[path], new.mean[path], new.square[path] = count, mean, square
        return out, new

    return optax.GradientTransformationExtraArgs(init, update)


def halved(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Makes `inner`, a transformation of `adam`, keep its moments in bfloat16.

    They are rounded up or down at random, so that the mean is right. The nearest number would not do: a
    step changes the second moment by a thousandth (beta 0.999), which is less than half of a bfloat16
    step, and it would stand still.
    """

    def cast(state: Any, dtype: Any) -> Any:
        count, *moments = state
        return type(state)(count, *jax.tree.map(lambda x: x.astype(dtype), moments))

    def rounded(state: Any) -> Any:
        count, *moments = state
        steps = count if isinstance(count, dict) else dict.fromkeys(moments[0], count)
        streams = {(m, path): 2 * i + m for m in range(2) for i, path in enumerate(steps)}
        kept = (
            {path: stochastic_bfloat16(x, steps[path], streams[m, path]) for path, x in part.items()}
            for m, part in enumerate(moments)
        )
        return type(state)(count, *kept)

    def init(leaves: Leaves) -> Any:
        return cast(inner.init(leaves), jnp.bfloat16)

    def update(gradients: Leaves, state: Any, leaves: Leaves | None = None, **extra: Any):
        directions, state = inner.update(gradients, cast(state, jnp.float32), leaves, **extra)
        return directions, rounded(state)

    return optax.GradientTransformationExtraArgs(init, update)


def stochastic_bfloat16(x: Float[Array, "*shape"], step: Array, stream: int) -> Array:
    """Rounds float32 to bfloat16, up with a probability of the part that is cut off.

    What decides is a hash of each number's place, `step` (int32, broadcastable to x) and `stream`: the
    same on any mesh and when a run is continued. A bfloat16 number stays what it is.
    """
    place = jnp.zeros(x.shape, jnp.uint32)  # places in row-major order; iotas are sharded as x is
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # mixing of the kind of murmur3's last steps
    seed = step.astype(jnp.uint32) * np.uint32(0x9E3779B9) + np.uint32(stream * 0x85EBCA6B % 2**32)
    mixed = place * np.uint32(0xCC9E2D51) ^ jnp.broadcast_to(seed, x.shape)
    for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ mixed >> shift) * np.uint32(odd)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (mixed >> 16)
    cut = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), cut, x.astype(jnp.bfloat16))


def per_leaf(state: Any) -> AdamState:
    """Returns the state of `adam`, whichever way it is kept, with a count for every leaf."""
    if isinstance(state, AdamState):
        return state
    return AdamState(dict.fromkeys(state.mu, state.count), state.mu, state.nu)


def count_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Gives the shape of a leaf's count of steps.

    Task tokens have one count each, since they are parameters of their own in the original.
    """
    return (shape[0], 1) if path == "connector/task_tokens" else ()


class Optimizer:
    """Clips gradients and applies Adam, decoupled weight decay and a rate per leaf.

    The rate of a step is an argument, a float on the host.
    """

    def __init__(self, config: OptimizerConfig, rules: dict[str, LeafRule]):
        self.config, self.rules = config, rules
        self.adam = adam(config.betas, config.eps, bool(config.skip_unused))
        if config.moments_dtype == "bfloat16":
            self.adam = halved(self.adam)

    def init(self, leaves: Leaves):
        return self.adam.init(leaves)

    def update(self, gradients: Leaves, state, leaves: Leaves, lr: Float[Array, ""], used: Leaves):
        """Returns (new leaves, new state, gradient norm before clipping)."""
        norm = optax.tree.norm(gradients)
        if self.config.clip:
            shrink = jnp.minimum(1.0, self.config.clip / jnp.maximum(norm, 1e-30))
            gradients = jax.tree.map(lambda g: g * shrink, gradients)
        extra = {"used": used} if self.config.skip_unused else {}
        directions, state = self.adam.update(gradients, state, leaves, **extra)
        new = {}
        for path, leaf in leaves.items():
            rule = self.rules[path]
            decay = rule.weight_decay * (used[path] if self.config.skip_unused else 1)
            new[path] = leaf - lr * rule.lr_scale * (directions[path] + decay * leaf)
        return new, state, norm


def participation(leaves: Leaves, image_tasks: Array, reads_task_token: bool) -> Leaves:
    """Says which leaves the loss of a batch depends on: 0 or 1, broadcastable to the leaf.

    It depends on the connector only with an image, and on a task token only with an image of its
    task and a router that reads it.
    """
    tasks = jnp.arange(len(VISUAL_TASKS))[:, None]
    # [visual tasks, 1]
    present = jnp.any(image_tasks.reshape(1, -1) == tasks, axis=1, keepdims=True).astype(jnp.int32)
    some = jnp.any(image_tasks >= 0).astype(jnp.int32)
    used = {}
    for path in leaves:
        if path == "connector/task_tokens":
            used[path] = present * int(reads_task_token)
        else:
            used[path] = some if path.startswith(("connector/", "vision/")) else jnp.ones((), jnp.int32)
    return used
