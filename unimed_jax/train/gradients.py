"""Combines the gradients of several tasks into one, by the strategy in `config.train.gradients`.

A step differentiates a vector of losses: one for each task and, last, the balancing loss of the
decoder's experts. A strategy says along which `directions` (rows of weights over these losses)
gradients are taken; the step follows a weighted sum of them. Strategies that ease conflicts between
tasks (gradient surgery) need no more than the inner products of all pairs, the Gram matrix: what
they add to a gradient is always a multiple of another one. A new strategy is one class here and its
name in `config.py`:

    class Halved:
        def directions(self, losses):
            return jnp.eye(losses)

        def start(self, losses):
            return ()

        def weights(self, gram, memory, orders):
            return jnp.full(len(gram), 0.5), memory
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from unimed_jax.train.loss import Losses
from unimed_jax.train.optimizer import Leaves


class Strategy(Protocol):
    """Weighs gradients of several losses; the optimizer follows their weighted sum."""

    def directions(self, losses: int) -> Float[Array, "k losses"]:
        """Gives the weighted sums of losses whose gradients are taken.

        Each costs one backward pass and its memory.
        """
        ...

    def start(self, losses: int) -> Any:
        """Makes what the strategy remembers before step 0, a tree of arrays; () if nothing.

        It is part of a checkpoint.
        """
        ...

    def weights(
        self, gram: Float[Array, "k k"], memory: Any, orders: Int[Array, "tasks tasks"]
    ) -> tuple[Float[Array, "k"], Any]:
        """Weighs the gradients along the directions by their inner products.

        They are gradients of the batch's losses divided by its whole weight, so that weights of 1
        give the gradient of the total loss. A task without an answer in the batch has zeros. Row i
        of `orders` is the random order in which task i meets all tasks. Also returns what the
        strategy remembers after the step.
        """
        ...


class Sum:
    """Takes the gradient of the total loss (as published): one backward pass."""

    def directions(self, losses: int) -> Float[Array, "1 losses"]:
        return jnp.ones((1, losses))

    def start(self, losses: int) -> Any:
        return ()

    def weights(self, gram, memory, orders):
        return jnp.ones(1), memory


class _OfTasks:
    """Takes every loss's own gradient; the balancing loss, the last one, always counts once."""

    def directions(self, losses: int) -> Float[Array, "losses losses"]:
        return jnp.eye(losses)

    def start(self, losses: int) -> Any:
        return ()

    def weights(self, gram, memory, orders):
        tasks, memory = self.of_tasks(gram[:-1, :-1], memory, orders)
        return jnp.append(tasks, 1.0), memory

    def of_tasks(self, gram, memory, orders) -> tuple[Float[Array, "tasks"], Any]:
        raise NotImplementedError


class EqualNorm(_OfTasks):
    """Scales the gradients of the tasks in a batch to their mean norm, and adds them."""

    def of_tasks(self, gram, memory, orders):
        norms = jnp.sqrt(jnp.diagonal(gram))
        present = norms > 0
        mean = norms.sum() / jnp.maximum(present.sum(), 1)
        return jnp.where(present, mean / jnp.where(present, norms, 1.0), 0.0), memory


class PCGrad(_OfTasks):
    """Projects each task's gradient off every gradient that it conflicts with (arXiv 2001.06782).

    Two gradients conflict if their cosine is negative. Task i meets the other tasks in random order
    and loses its component along each unchanged gradient that points against it (Algorithm 1).
    """

    def of_tasks(self, gram, memory, orders):
        def meet(place, parts):  # parts [tasks, tasks]: row i holds task i's gradient as a sum of all
            other = orders[:, place]
            inner = (parts * gram[other]).sum(axis=1)  # [tasks]
            square = gram[other, other]
            against = (inner < 0) & (square > 0) & (other != rows)
            share = jnp.where(against, inner / jnp.where(square > 0, square, 1.0), 0.0)
            return parts.at[rows, other].add(-share)

        rows = jnp.arange(len(gram))
        parts = jax.lax.fori_loop(0, len(gram), meet, jnp.eye(len(gram)))
        return parts.sum(axis=0), memory


class GradVac(_OfTasks):
    """Raises the cosine of each two tasks to its moving average (arXiv 2010.05874, equation 5).

    decay: how much the newest cosine counts in the average, which starts at 0. Only tasks that are
    in the batch meet.
    """

    def __init__(self, decay: float = 0.01):
        self.decay = decay

    def start(self, losses: int) -> Any:
        return jnp.zeros((losses - 1, losses - 1))

    def of_tasks(self, gram, memory, orders):
        norms = jnp.sqrt(jnp.diagonal(gram))
        rows = jnp.arange(len(gram))

        def meet(place, state):
            parts, target = state  # [tasks, tasks] both; target is the average cosine
            other = orders[:, place]
            inner = (parts * gram[other]).sum(axis=1)  # [tasks]
            own = jnp.sqrt(jnp.maximum(jnp.einsum("ij,jk,ik->i", parts, gram, parts), 0))
            meets = (norms > 0) & (norms[other] > 0) & (own > 0) & (other != rows)
            cosine = jnp.where(meets, inner / jnp.where(meets, own * norms[other], 1.0), 0.0)
            goal = target[rows, other]
            sine, goal_sine = _sine(cosine), _sine(goal)
            raised = own * (goal * sine - cosine * goal_sine)
            low = meets & (cosine < goal)
            share = jnp.where(low, raised / jnp.where(low, norms[other] * goal_sine, 1.0), 0.0)
            new = jnp.where(meets, (1 - self.decay) * goal + self.decay * cosine, goal)
            return parts.at[rows, other].add(share), target.at[rows, other].set(new)

        parts, memory = jax.lax.fori_loop(0, len(gram), meet, (jnp.eye(len(gram)), memory))
        return parts.sum(axis=0), memory


def _sine(cosine: Array) -> Array:
    return jnp.sqrt(jnp.maximum(1 - cosine * cosine, 1e-12))


SUM = Sum()
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "sum": Sum,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "equal-norm": EqualNorm,
}


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


def gram(gradients: Leaves) -> Float[Array, "k k"]:
    """Computes the inner products of k gradients over all leaves, each [k, *shape].

    In float32 at the highest precision, since a difference of products decides about a conflict.
    """

    def of_leaf(g: Array) -> Array:
        rest = tuple(range(1, g.ndim))
        return jax.lax.dot_general(g, g, ((rest, rest), ((), ())), precision="highest")  # [k, k]

    return sum(map(of_leaf, gradients.values()), jnp.zeros(()))


def combine(
    strategy: Strategy, gradients: Leaves, memory: Any, key: Key[Array, ""], tasks: int
) -> tuple[Leaves, Any]:
    """Makes the gradient [*shape] of each leaf from those along a strategy's directions.

    key: for the random orders in which `tasks` tasks meet. Also returns the strategy's memory.
    """
    if len(next(iter(gradients.values()))) == 1:  # one direction: nothing to weigh
        return jax.tree.map(lambda g: g[0], gradients), memory
    orders = jax.vmap(lambda k: jax.random.permutation(k, tasks))(jax.random.split(key, tasks))
    weights, memory = strategy.weights(gram(gradients), memory, orders)
    return jax.tree.map(lambda g: jnp.tensordot(weights, g, axes=1), gradients), memory
