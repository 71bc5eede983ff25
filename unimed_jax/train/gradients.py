"""Combines the gradients of several tasks into one, by the strategy in `config.train.gradients`.

A step differentiates a vector of losses: one for each task and, last, the balancing loss of the
decoder's experts. A strategy says along which `directions` (rows of weights over these losses) the
gradient is taken, and how the results are combined. A new strategy is one class here and its name in
`config.py`; one that needs every task's own gradient has the identity as its directions:

    class EqualNorm:
        def directions(self, losses):
            return jnp.eye(losses)

        def combine(self, gradients):  # path -> [losses, *shape of the leaf]
            ...
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unimed_jax.train.loss import Losses
from unimed_jax.train.optimizer import Leaves


class Strategy(Protocol):
    """Combines gradients of several losses into the one that the optimizer follows."""

    def directions(self, losses: int) -> Float[Array, "k losses"]:
        """Gives the weighted sums of losses whose gradients are taken.

        Each costs one backward pass and its memory.
        """
        ...

    def combine(self, gradients: Leaves) -> Leaves:
        """Makes the gradient [*shape] of each leaf from those along the directions, [k, *shape].

        They are gradients of the batch's losses divided by its whole weight, so that their sum is
        the gradient of the total loss. A task without an answer in the batch has zeros.
        """
        ...


class Sum:
    """Takes the gradient of the total loss (as published): one backward pass."""

    def directions(self, losses: int) -> Float[Array, "1 losses"]:
        return jnp.ones((1, losses))

    def combine(self, gradients: Leaves) -> Leaves:
        return jax.tree.map(lambda g: g[0], gradients)


STRATEGIES: dict[str, Callable[[], Strategy]] = {"sum": Sum}


def along(
    directions: Float[Array, "k losses"], run: Callable[[Leaves], tuple[Losses, Any]], leaves: Leaves
) -> tuple[Leaves, Losses, Any]:
    """Computes gradients [k, *shape] of the losses of `run(leaves)` along each direction.

    Also returns the losses, and the other result of `run`.
    """

    def vector(leaves):
        losses, aux = run(leaves)
        return jnp.append(losses.tasks, losses.balance), (losses, aux)  # [tasks + 1]

    _, pull, (losses, aux) = jax.vjp(vector, leaves, has_aux=True)
    if len(directions) == 1:
        (gradients,) = pull(directions[0])
        return jax.tree.map(lambda g: g[None], gradients), losses, aux
    (gradients,) = jax.vmap(pull)(directions)
    return gradients, losses, aux
