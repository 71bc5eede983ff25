"""Implements AdamW and its schedule as Uni-Med publishes them.

The parameters are a flat dict of trainable leaves.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
