"""The training loss: cross entropy on answer positions, summed over a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from unimed_jax.config import TASKS, VISUAL_TASKS, LossConfig
from unimed_jax.model.routing import Noise
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import COORDINATES, Batch, UniMed


def answer_logits(model: UniMed, hidden: Float[Array, "B S D"], batch: Batch) -> Float[Array, "B A vocab"]:
    """Logits that predict the answer tokens; the head never runs on the other positions."""
    picked = jnp.take_along_axis(hidden, batch["target_index"][..., None], axis=1)  # [B, A, D]
    return constrain(model.decoder.logits(picked), "batch", None, "vocab")


def cross_entropy(
    logits: Float[Array, "B A vocab"], targets: Int[Array, "B A"], loss: LossConfig, coordinate_start: int | None
) -> tuple[Float[Array, "B A"], Float[Array, "B A"]]:
    """Per answer token: cross entropy and weight factor.

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
    # Clipped, so that the Gaussian of a token that is no coordinate is finite too (no NaN behind the where).
    centre = jnp.clip(offset, 0, COORDINATES - 1)[..., None]
    soft = jax.nn.softmax(-0.5 * ((jnp.arange(COORDINATES)[None, None] - centre) / loss.coordinate_sd) ** 2, axis=-1)
    log_c = jax.lax.dynamic_slice_in_dim(log_p, coordinate_start, COORDINATES, axis=-1)
    return jnp.where(is_coordinate, -(soft * log_c).sum(axis=-1), nll), factor


def loss_sums(
    model: UniMed,
    batch: Batch,
    loss: LossConfig,
    coordinate_start: int | None,
    dropout_key: Key[Array, ""] | None,
    noise: Noise | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Sum of weighted cross entropies, and sums to divide by and to log.

    The loss of any set of batches is sum(first) / sum(aux["weight"]), so it stays the same however a batch
    is split over micro-steps and devices. aux: weight [], task_loss [tasks], task_weight [tasks],
    routing [visual tasks, E], slots [visual tasks]; of the decoder's layers with experts balance [layers] times the
    weight, and tokens [layers, E]. Their balancing loss, of all the tokens given here, is in the sum times the weight.
    """
    out = model(batch, dropout_key, noise)
    nll, factor = cross_entropy(answer_logits(model, out.hidden, batch), batch["targets"], loss, coordinate_start)
    weights = batch["weights"] * factor
    weighted = nll * weights
    by_task = jax.nn.one_hot(batch["target_tasks"], len(TASKS))  # [B, A, tasks], zeros where unused
    slots = jax.nn.one_hot(batch["image_tasks"].reshape(-1), len(VISUAL_TASKS))  # [B * M, visual tasks]
    aux = {
        "weight": weights.sum(),
        "task_loss": jnp.einsum("ba,bat->t", weighted, by_task),
        "task_weight": jnp.einsum("ba,bat->t", weights, by_task),
        "slots": slots.sum(axis=0),  # [visual tasks]
    }
    if out.routing is not None:
        aux["routing"] = jnp.einsum("nte,nv->ve", jax.lax.stop_gradient(out.routing), slots) / out.routing.shape[1]
    total = weighted.sum()
    if out.experts is not None:
        aux["balance"], aux["tokens"] = out.experts.aux * aux["weight"], out.experts.counts.astype(jnp.float32)
        total += model.config.moe.aux_coef * aux["balance"].sum()
    return total, aux
