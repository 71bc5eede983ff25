"""Uni-Med: vision encoder -> connector -> decoder, and the loss on answer positions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from unimed_jax.config import TASKS, LossConfig, ModelConfig
from unimed_jax.model.connector import Connector
from unimed_jax.model.decoder import Decoder, Span
from unimed_jax.model.moe import Noise, Routing
from unimed_jax.model.sharding import constrain
from unimed_jax.model.vision import VisionEncoder, normalise

# Arrays of a batch of B rows (data/layout.py makes them): images [B, M, H, W, 3] with image_tasks [B, M];
# tokens, visual, segments, prefixes, positions [B, S]; target_index, targets, weights, target_tasks [B, A].
Batch = dict[str, Any]

COORDINATES = 101  # box coordinates 0..100


class Output(NamedTuple):
    hidden: Array  # [B, S, D]
    routing: Array | None  # [B * M, T, E] of the connector
    experts: Routing | None  # of the decoder's layers with experts


class UniMed(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        # A kernel is asked for by name for the decoder's rows; an image's patches seldom have the length it needs.
        attention = "xla" if config.attention == "xla" else "auto"
        self.vision = VisionEncoder(config.vision, rngs, attention=attention, remat=config.remat)
        self.connector = Connector(config, rngs)
        self.decoder = Decoder(
            config.decoder, config.lora, rngs, moe=config.moe, attention=config.attention, remat=config.remat
        )

    def encode_images(self, images: Array, tasks: Int[Array, "N"]):
        """Pixels [N, H, W, 3] (uint8, or float already normalised) -> ConnectorOutput."""
        pixels = normalise(images, self.config.vision, self.config.compute_dtype)
        pixels = constrain(pixels, "batch", None, None, None)
        return self.connector(self.vision(pixels), tasks)

    def __call__(self, batch: Batch, dropout_key: Key[Array, ""] | None = None, noise: Noise | None = None) -> Output:
        """`dropout_key` and `noise` as in Decoder."""
        x, routing = self.embed(batch)
        out = self.decoder(x, span_of(batch), dropout_key=dropout_key, noise=noise)
        return Output(out.hidden, routing, out.routing)

    def embed(self, batch: Batch) -> tuple[Float[Array, "B S D"], Array | None]:
        """Token embeddings with the visual tokens of each row's image slots gathered into their places."""
        x = constrain(self.decoder.embed(batch["tokens"], self.config.compute_dtype), "batch", None, None)
        rows, slots = batch["image_tasks"].shape
        if slots == 0:
            return x, None
        images = batch["images"].reshape(rows * slots, *batch["images"].shape[2:])  # [B * M, H, W, 3]
        tokens, routing = self.encode_images(images, batch["image_tasks"].reshape(-1))
        tokens = tokens.reshape(rows, -1, tokens.shape[-1])  # [B, M * T, D]
        visual = batch["visual"]
        gathered = jnp.take_along_axis(tokens, jnp.maximum(visual, 0)[..., None], axis=1)  # [B, S, D]
        x = jnp.where((visual >= 0)[..., None], gathered.astype(x.dtype), x)
        return constrain(x, "batch", None, None), routing


def span_of(batch: Batch) -> Span:
    return Span(batch["positions"], batch["segments"], batch["prefixes"])


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
    aux = {
        "weight": weights.sum(),
        "task_loss": jnp.einsum("ba,bat->t", weighted, by_task),
        "task_weight": jnp.einsum("ba,bat->t", weights, by_task),
        "slots": jax.nn.one_hot(batch["image_tasks"].reshape(-1), len(TASKS) - 1).sum(axis=0),  # [visual tasks]
    }
    if out.routing is not None:
        slots = jax.nn.one_hot(batch["image_tasks"].reshape(-1), len(TASKS) - 1)  # [B * M, visual tasks]
        aux["routing"] = jnp.einsum("nte,nv->ve", jax.lax.stop_gradient(out.routing), slots) / out.routing.shape[1]
    total = weighted.sum()
    if out.experts is not None:
        aux["balance"], aux["tokens"] = out.experts.aux * aux["weight"], out.experts.counts.astype(jnp.float32)
        total += model.config.moe.aux_coef * aux["balance"].sum()
    return total, aux


def order_coordinates(model: UniMed, start: int) -> None:
    """Gives the 101 coordinate tokens ordered sine-cosine embeddings and head columns, of the random ones' size.

    From scratch, random rows never learn that 41 lies beside 42 within a short run.
    """
    decoder = model.decoder
    half = model.config.decoder.width // 2
    frequency = jnp.geomspace(2 * jnp.pi / 200, 2 * jnp.pi / 8, half)  # radians per coordinate step
    angle = jnp.arange(COORDINATES)[:, None] * frequency[None]  # [101, half]
    ordered = 2**0.5 * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)  # [101, D]
    rows = slice(start, start + COORDINATES)
    decoder.embedding[...] = decoder.embedding[...].at[rows, : 2 * half].set(ordered * decoder.embedding[...].std())
    if decoder.head is not None:
        decoder.head[...] = decoder.head[...].at[: 2 * half, rows].set(ordered.T * decoder.head[...].std())


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
