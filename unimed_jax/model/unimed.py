"""Joins the parts into the whole model: vision encoder -> connector -> decoder.

Shapes: B rows of S tokens with M image slots each, T visual tokens per image, A answer tokens per
row, D channels.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from unimed_jax.config import ModelConfig
from unimed_jax.model.cache import Span
from unimed_jax.model.connector import Connector, ConnectorOutput
from unimed_jax.model.decoder import Decoder
from unimed_jax.model.layers import Linear
from unimed_jax.model.routing import Noise, Routing
from unimed_jax.model.sharding import constrain, parameter_names
from unimed_jax.model.vision import VisionEncoder, normalise

# The arrays of a batch by name, as data/layout.py makes them: images [B, M, H, W, 3], or in their
# place features [B, M, patches, width], with image_tasks [B, M]; tokens, visual, segments, prefixes,
# positions [B, S]; target_index, targets, weights, target_tasks [B, A].
Batch = dict[str, Any]

COORDINATES = 101  # tokens of box coordinates: 0..100


class Output(NamedTuple):
    """Names what the model returns; `decoder.logits` turns `hidden` into logits."""

    hidden: Array  # [B, S, D]
    routing: Array | None  # [B * M, T, E] of the connector
    experts: Routing | None  # routing of the decoder's layers with experts


class UniMed(nnx.Module):
    """Reads images through a vision encoder and a connector, and answers with a decoder."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        # A fused kernel that the settings name is meant for the decoder's rows; the patches of an
        # image seldom have the length that it needs.
        attention = "xla" if config.attention == "xla" else "auto"
        self.vision = VisionEncoder(config.vision, rngs, attention=attention, remat=config.remat)
        self.connector = Connector(config, rngs)
        self.decoder = Decoder(
            config.decoder,
            config.lora,
            rngs,
            moe=config.moe,
            attention=config.attention,
            remat=config.remat,
        )
        # The table of shardings speaks of paths, which a linear does not know by itself.
        for keys, module in nnx.iter_modules(self):
            if isinstance(module, Linear):
                module.names = parameter_names("/".join(map(str, keys)) + "/kernel")

    def features(self, images: Array) -> Float[Array, "N patches width"]:
        """Encodes pixels [N, H, W, 3] (uint8, or float if normalised already) for the connector."""
        pixels = normalise(images, self.config.vision, self.config.compute_dtype)
        return self.vision(constrain(pixels, "batch", None, None, None))

    def encode_images(self, images: Array, tasks: Int[Array, "N"]) -> ConnectorOutput:
        """Turns pixels, as in `features`, into visual tokens."""
        return self.connector(self.features(images), tasks)

    def __call__(
        self,
        batch: Batch,
        dropout_key: Key[Array, ""] | None = None,
        noise: Noise | Key[Array, ""] | None = None,
    ) -> Output:
        """Runs a batch through all parts; `dropout_key` and `noise` are those of Decoder."""
        x, routing = self.embed(batch)
        out = self.decoder(x, span_of(batch), dropout_key=dropout_key, noise=noise)
        return Output(out.hidden, routing, out.routing)

    def embed(self, batch: Batch) -> tuple[Float[Array, "B S D"], Array | None]:
        """Embeds the tokens and puts the visual tokens of each row's images into their places.

        `batch["visual"]` says for each place which of the row's M * T visual tokens stands there,
        -1 for text. Also returns the connector's routing, see Output.
        """
        x = constrain(
            self.decoder.embed(batch["tokens"], self.config.compute_dtype),
            "batch",
            None,
            None,
        )
        rows, slots = batch["image_tasks"].shape
        if slots == 0:
            return x, None
        if "features" in batch:  # computed once, by the same frozen encoder (features.py)
            features = batch["features"].astype(self.config.compute_dtype)
            features = features.reshape(rows * slots, *features.shape[2:])  # [B * M, patches, width]
            features = constrain(features, "batch", None, None)
        else:
            images = batch["images"]
            features = self.features(images.reshape(rows * slots, *images.shape[2:]))  # [B * M, ...]
        tokens, routing = self.connector(features, batch["image_tasks"].reshape(-1))
        tokens = tokens.reshape(rows, -1, tokens.shape[-1])  # [B, M * T, D]
        visual = batch["visual"]
        places = jnp.maximum(visual, 0)[..., None]  # [B, S, 1]
        gathered = jnp.take_along_axis(tokens, places, axis=1)  # [B, S, D]
        x = jnp.where((visual >= 0)[..., None], gathered.astype(x.dtype), x)
        return constrain(x, "batch", None, None), routing


def answer_logits(
    model: UniMed, hidden: Float[Array, "B S D"], batch: Batch
) -> Float[Array, "B A vocab"]:
    """Computes the logits that predict answer tokens; the head never runs on other positions."""
    picked = jnp.take_along_axis(hidden, batch["target_index"][..., None], axis=1)  # [B, A, D]
    return constrain(model.decoder.logits(picked), "batch", None, "vocab")


def span_of(batch: Batch) -> Span:
    """Picks out of a batch what the decoder's mask and rotation need."""
    return Span(batch["positions"], batch["segments"], batch["prefixes"])


def order_coordinates(model: UniMed, start: int) -> None:
    """Gives the 101 coordinate tokens ordered sine-cosine embeddings and head columns, in place.

    `start` is the id of coordinate 0. The values get the standard deviation of the random ones.
    Without this, a short run from scratch never learns that 41 is next to 42.
    """
    decoder = model.decoder
    half = model.config.decoder.width // 2
    frequency = jnp.geomspace(2 * jnp.pi / 200, 2 * jnp.pi / 8, half)  # radians per coordinate step
    angle = jnp.arange(COORDINATES)[:, None] * frequency[None]  # [101, half]
    ordered = 2**0.5 * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)  # [101, D]
    rows = slice(start, start + COORDINATES)
    table = decoder.embedding[...]
    decoder.embedding[...] = table.at[rows, : 2 * half].set(ordered * table.std())
    if decoder.head is not None:
        head = decoder.head[...]
        decoder.head[...] = head.at[: 2 * half, rows].set(ordered.T * head.std())
