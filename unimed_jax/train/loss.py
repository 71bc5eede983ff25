"""Computes the training loss: cross entropy on answer positions, summed over a batch for each task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from unimed_jax.config import TASKS, VISUAL_TASKS, LossConfig
from unimed_jax.model.routing import Noise
from unimed_jax.model.unimed import COORDINATES, Batch, UniMed, answer_logits


def cross_entropy(
    logits: Float[Array, "B A vocab"],
    targets: Int[Array, "B A"],
    loss: LossConfig,
    coordinate_start: int | None,
) -> tuple[Float[Array, "B A"], Float[Array, "B A"]]:
    """Computes, for each answer token, its cross entropy and weight factor.

    With `loss.coordinate_sd` a coordinate's target is a Gaussian over the 101 coordinates around it, and
    `loss.coordinate_weight` its weight; other tokens have a one-hot target and weight 1.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]  # [B, A]
    if coordinate_start is None or (loss.coordinate_sd == 0 and loss.coordinate_weight == 1):
        return nll, jnp.ones_like(nll)
    offset = targets - coordinate_start
    is_coordinate = (offset >= 0) & (offset < COORDINATES)
    factor = jnp.where(is_coordinate, loss.coordinate_weight, 1.0)
    if loss.coordinate_sd == 0:
        return nll, factor
    # Clipped, so that the Gaussian of other tokens is finite too, and `where` hides no NaN.
    centre = jnp.clip(offset, 0, COORDINATES - 1)[..., None]
    soft = jax.nn.softmax(
        -0.5 * ((jnp.arange(COORDINATES)[None, None] - centre) / loss.coordinate_sd) ** 2, axis=-1
    )
    log_c = jax.lax.dynamic_slice_in_dim(log_p, coordinate_start, COORDINATES, axis=-1)
    return jnp.where(is_coordinate, -(soft * log_c).sum(axis=-1), nll), factor


class Losses(NamedTuple):
    """Holds sums over a batch, so that batches can be added: their loss is `total` / `weight`.

    It stays the same however a batch is divided over micro-steps and devices.
    """

    tasks: Array  # [tasks]: weighted cross entropies of each task's answer tokens
    weights: Array  # [tasks]: their weights
    balance: Array  # []: loss that balances the decoder's experts, times the weight; 0 without experts

    @property
    def total(self) -> Array:
        """Adds up what is minimised, times the weight: the tasks' sums and the balancing loss."""
        return self.tasks.sum() + self.balance

    @property
    def weight(self) -> Array:
        """Adds up the weights of all tasks."""
        return self.weights.sum()


def task_losses(
    model: UniMed,
    batch: Batch,
    loss: LossConfig,
    coordinate_start: int | None,
    dropout_key: Key[Array, ""] | None,
    noise: Noise | None = None,
) -> tuple[Losses, dict[str, Array]]:
    """Computes the losses of a batch by task, and sums to log.

    The dict, all float32: slots [visual tasks] (images of each task) and routing [visual tasks, E]
    (the connector's weights, summed over those images); of the decoder's layers with experts
    balance [layers] times the weight, and tokens [layers, E]. `dropout_key` and `noise` as in
    Decoder.
    """
    out = model(batch, dropout_key, noise)
    nll, factor = cross_entropy(
        answer_logits(model, out.hidden, batch), batch["targets"], loss, coordinate_start
    )
    weights = batch["weights"] * factor
    # Multiplied and added, not as a product of matrices, which accelerators round to fewer bits.
    by_task = jax.nn.one_hot(batch["target_tasks"], len(TASKS))  # [B, A, tasks], zeros where unused
    weights_by_task = (weights[..., None] * by_task).sum(axis=(0, 1))  # [tasks]
    tasks = ((nll * weights)[..., None] * by_task).sum(axis=(0, 1))  # [tasks]
    # [B * M, visual tasks]
    of_task = jax.nn.one_hot(batch["image_tasks"].reshape(-1), len(VISUAL_TASKS))
    logged = {"slots": of_task.sum(axis=0)}
    if out.routing is not None:
        routing = jax.lax.stop_gradient(out.routing)
        logged["routing"] = jnp.einsum("nte,nv->ve", routing, of_task) / routing.shape[1]
    balance = jnp.zeros(())
    if out.experts is not None:
        logged["balance"] = out.experts.aux * weights_by_task.sum()
        logged["tokens"] = out.experts.counts.astype(jnp.float32)
        balance = model.config.moe.aux_coef * logged["balance"].sum()
    return Losses(tasks, weights_by_task, balance), logged


def loss_sums(model: UniMed, *arguments, **keywords) -> tuple[Array, dict[str, Array]]:
    """Returns the total of `task_losses` as a number that `jax.grad` takes.

    The dict also holds weight, task_loss and task_weight.

    It serves tests and analyses of a model without a training program.
    """
    losses, logged = task_losses(model, *arguments, **keywords)
    return losses.total, {
        "weight": losses.weight,
        "task_loss": losses.tasks,
        "task_weight": losses.weights,
        **logged,
    }
