"""Encodes images by a pre-norm ViT, by settings EVA-CLIP-g (Uni-Med section 3.1) or CLIP.

Shapes: N images, P tokens of an image (its patches, and the class token if there is one).
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from unimed_jax.config import VisionConfig
from unimed_jax.model.attention import attend
from unimed_jax.model.layers import (
    ACTIVATIONS,
    Linear,
    Norm,
    broadcast_channels,
    normal,
    scan_layers,
    stack,
)
from unimed_jax.model.sharding import constrain

# --------------------------------------------------------------------------------------------------
# The encoder
# --------------------------------------------------------------------------------------------------


class VisionAttention(nnx.Module):
    """Attends with one stored kernel for q, k and v; EVA has biases for q and v only."""

    def __init__(self, config: VisionConfig, implementation: str, rngs: nnx.Rngs):
        width = config.width
        self.heads = config.heads
        self.implementation = implementation
        self.qkv = Linear(width, 3 * width, bias=False, rngs=rngs)
        self.q_bias = nnx.Param(jnp.zeros(width)) if config.qkv_bias != "none" else None
        self.k_bias = nnx.Param(jnp.zeros(width)) if config.qkv_bias == "qkv" else None
        self.v_bias = nnx.Param(jnp.zeros(width)) if config.qkv_bias != "none" else None
        self.out = Linear(width, width, std=(2 * config.depth * width) ** -0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "N P width"]) -> Float[Array, "N P width"]:
        images, patches, width = x.shape
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)

        def heads(y: Array, bias: nnx.Param | None) -> Array:
            if bias is not None:
                y = y + broadcast_channels(bias[...].astype(y.dtype), y)
            return y.reshape(images, patches, self.heads, -1)  # [N, P, heads, d]

        q, k, v = heads(q, self.q_bias), heads(k, self.k_bias), heads(v, self.v_bias)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [N, heads, P, d]
        out = attend(q, k, v, None, implementation=self.implementation)
        return self.out(out.reshape(images, patches, width))  # [N, P, width]


class VisionBlock(nnx.Module):
    """Adds attention and an MLP to the residual stream, each after a LayerNorm."""

    def __init__(self, config: VisionConfig, implementation: str, rngs: nnx.Rngs):
        self.activation = config.activation
        hidden = config.mlp_width
        self.norm1 = Norm(config.width, "layer", config.norm_eps)
        self.attention = VisionAttention(config, implementation, rngs)
        self.norm2 = Norm(config.width, "layer", config.norm_eps)
        self.up = Linear(config.width, hidden, rngs=rngs)
        self.down = Linear(hidden, config.width, std=(2 * config.depth * hidden) ** -0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "N P width"]) -> Float[Array, "N P width"]:
        x = x + self.attention(self.norm1(x))
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm2(x))))


class VisionEncoder(nnx.Module):
    """Turns images into patch features [N, patches, width]; a class token is dropped at the end."""

    def __init__(
        self,
        config: VisionConfig,
        rngs: nnx.Rngs,
        *,
        attention: str = "auto",
        remat: str = "none",
    ):
        """Creates the patch embedding, the positions and the blocks.

        attention, remat: those of ModelConfig.
        """
        self.config, self.remat = config, remat
        width = config.width
        extra = int(config.cls_token)
        # kernel [patch * patch * 3, width]; the pixels of a patch are in (row, column, channel)
        # order
        self.patch = Linear(3 * config.patch_size**2, width, bias=config.patch_bias, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (width,), 0.02)) if config.cls_token else None
        positions = normal(rngs.params(), (extra + config.patches, width), 0.02)
        if config.position_init == "sincos":
            positions = positions.at[extra:].set(sincos_positions(config.grid, width))
        self.positions = nnx.Param(positions)
        self.pre_norm = Norm(width, "layer", config.norm_eps) if config.pre_norm else None
        # Blocks after the feature layer are never run, so they are not built.
        self.blocks = stack(lambda r: VisionBlock(config, attention, r), config.blocks, rngs)
        output_norm = Norm(width, "layer", config.output_norm_eps)
        self.output_norm = output_norm if config.output_norm else None

    def __call__(
        self,
        images: Float[Array, "N height width_px 3"],
    ) -> Float[Array, "N patches width"]:
        """Encodes square images that `normalise` has prepared, in the compute dtype."""
        x = self.encode(images)
        x = x[:, int(self.config.cls_token) :]
        return x if self.output_norm is None else self.output_norm(x)

    def encode(self, images: Float[Array, "N height width_px 3"]) -> Float[Array, "N tokens width"]:
        """Returns the last used block's output, before the output norm; a class token is first."""
        x = self.patch(patchify(images, self.config.patch_size))
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([cls, x], axis=1)  # [N, 1 + P, width]
        x += self.positions[...].astype(x.dtype)[None]
        if self.pre_norm is not None:
            x = self.pre_norm(x)

        # Left to itself, the compiler splits the channels as the weights are split over a mesh; then
        # every device attends in all images, and each block adds up all images' sums over the mesh.
        x = constrain(x, "batch", None, None)
        return scan_layers(
            lambda x, block: (block(x), None),
            x,
            self.blocks,
            self.config.depth,
            self.remat,
        )[0]


# --------------------------------------------------------------------------------------------------
# Pixels and positions
# --------------------------------------------------------------------------------------------------


LEAST_STD = 0.5  # of 255: less is no more than rounding


def normalise(images: Array, config: VisionConfig, dtype: str) -> Array:
    """Turns uint8 pixels into (x / 255 - mean) / std; floats count as normalised already.

    mean, std: those of `config`, or each picture's own. A channel that is the same all over becomes 0.
    """
    if images.dtype == jnp.uint8 and config.normalise == "picture":
        images = images.astype(jnp.float32)
        images -= images.mean((-3, -2), keepdims=True)
        images /= jnp.maximum(jnp.sqrt(jnp.square(images).mean((-3, -2), keepdims=True)), LEAST_STD)
    elif images.dtype == jnp.uint8:
        mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
        scale, offset = jnp.asarray(1 / (255 * std)), jnp.asarray(mean / std)
        images = images.astype(jnp.float32)
        images = images * broadcast_channels(scale, images) - broadcast_channels(offset, images)
    return images.astype(dtype)


def patchify(
    images: Float[Array, "N height width_px 3"],
    patch: int,
) -> Float[Array, "N patches pixels"]:
    """Cuts images into patches in raster order, each flattened in (row, column, channel) order."""
    count, height, width, channels = images.shape
    x = images.reshape(count, height // patch, patch, width // patch, patch, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [N, rows, columns, p, p, 3]
    return x.reshape(count, -1, patch * patch * channels)  # [N, P, p * p * 3]


def sincos_positions(grid: int, width: int) -> Float[np.ndarray, "patches width"]:
    """Makes fixed 2-D sine-cosine positions (arXiv 2104.02057).

    Rows are in the first half of the channels, columns in the second.
    """
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angle = np.arange(grid)[:, None] * frequency  # [grid, width / 4]
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [grid, width / 2]
    rows = np.repeat(axis, grid, axis=0)
    columns = np.tile(axis, (grid, 1))
    return 0.5 * np.concatenate([rows, columns], axis=1).astype(np.float32)  # [grid * grid, width]


def resize_positions(
    positions: Float[np.ndarray, "tokens width"], grid: int, extra: int
) -> Float[np.ndarray, "new_tokens width"]:
    """Resizes a position table to another grid, bicubically.

    The first `extra` positions (class token) are kept. Cubic convolution with a = -0.75 and
    half-pixel centres without antialiasing (torch's `interpolate(mode="bicubic",
    align_corners=False)`), as EVA-CLIP's checkpoints are resized.
    """
    kept, table = positions[:extra], np.asarray(positions[extra:], np.float64)
    old = round(len(table) ** 0.5)
    if old == grid:
        return positions
    weights = _cubic_weights(old, grid)  # [grid, old]
    table = table.reshape(old, old, -1)  # [old, old, width]
    table = np.einsum("ia,jb,abw->ijw", weights, weights, table)
    table = table.reshape(grid * grid, -1)  # [grid * grid, width]
    return np.concatenate([kept, table.astype(positions.dtype)])


def _cubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Computes the matrix that resizes a line of values; beyond its ends they are repeated."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(centre - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        columns = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), columns), np.where(x <= 1, near, far))
    return weights
