"""Uni-Med: vision encoder -> connector -> decoder, and the loss on answer positions."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from unimed_jax.config import ModelConfig
from unimed_jax.model.connector import Connector
from unimed_jax.model.decoder import Decoder, Span
from unimed_jax.model.routing import Noise, Routing
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
