"""Building blocks shared by the vision encoder, the connector and the decoder.

Every module is a pytree of `nnx.Param` leaves. Stacked layers are modules whose leaves carry a leading
[layers] axis (`stack`), consumed by `jax.lax.scan`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from unimed_jax.config import DecoderConfig, LoraConfig, RopeScaling

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


Stacked = TypeVar("Stacked", bound=nnx.Module)


def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float) -> Array:
    return std * jax.random.normal(key, shape, jnp.float32)


def spread(vector: Float[Array, "width"], like: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """A per-channel vector over all leading axes (ranks are never promoted silently here)."""
    return jnp.broadcast_to(vector, like.shape)


def stack(make: Callable[[nnx.Rngs], Stacked], count: int, rngs: nnx.Rngs) -> Stacked:
    """`count` modules of one kind as one module whose leaves have a leading [count] axis."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


class Linear(nnx.Module):
    """y = x W + b, and with an adapter + (alpha / rank) dropout(x) A B (LoRA, arXiv 2106.09685).

    kernel [in, out], bias [out], lora_a [in, rank], lora_b [rank, out].
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        bias: bool = True,
        std: float | None = None,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
    ):
        std = width_in**-0.5 if std is None else std
        self.kernel = nnx.Param(normal(rngs.params(), (width_in, width_out), std))
        self.bias = nnx.Param(jnp.zeros(width_out)) if bias else None
        self.lora_scale = lora.alpha / lora.rank if lora else 0.0
        self.lora_dropout = lora.dropout if lora else 0.0
        self.lora_a = nnx.Param(normal(rngs.params(), (width_in, lora.rank), width_in**-0.5)) if lora else None
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, width_out))) if lora else None

    def __call__(
        self, x: Float[Array, "*batch in"], dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "*batch out"]:
        """Computes in x's dtype; `dropout_key` None: no dropout (evaluation)."""
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])  # [batch, in]: one plain product, twice as fast on CPU
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)[None]
        if self.lora_a is not None:
            assert self.lora_b is not None
            if dropout_key is not None and self.lora_dropout > 0:
                keep = jax.random.bernoulli(dropout_key, 1 - self.lora_dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.lora_dropout), 0)
            y += (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype) * self.lora_scale
        return y.reshape(*shape, -1)  # [*batch, out]


class Mlp(nnx.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.activation = config.activation

        def linear(name: str, width_in: int, width_out: int, std: float | None = None) -> Linear:
            adapter = lora if lora and name in lora.targets else None
            return Linear(width_in, width_out, bias=config.mlp_bias, std=std, lora=adapter, rngs=rngs)

        self.gate = linear("gate", config.width, config.mlp_width) if config.gated_mlp else None
        self.up = linear("up", config.width, config.mlp_width)
        self.down = linear("down", config.mlp_width, config.width, std=(2 * config.depth * config.mlp_width) ** -0.5)

    def __call__(self, x: Float[Array, "*batch D"], dropout=(None, None, None)) -> Float[Array, "*batch D"]:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(x, dropout[1])), dropout[2])
        return self.down(act(self.gate(x, dropout[0])) * self.up(x, dropout[1]), dropout[2])


class Norm(nnx.Module):
    """LayerNorm ("layer": scale and bias) or RMSNorm ("rms": scale; "rms_zero": 1 + scale), computed in float32."""

    def __init__(self, width: int, kind: str, eps: float):
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param(jnp.zeros(width) if kind == "rms_zero" else jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = layer_norm(y, self.eps) * spread(self.scale[...], y) + spread(self.bias[...], y)
            return y.astype(x.dtype)
        y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        # The sum in float32 too: stored in bfloat16, 1 + scale would lose what the scale says.
        scale = 1 + self.scale[...].astype(jnp.float32) if self.kind == "rms_zero" else self.scale[...]
        return (y * spread(scale, y)).astype(x.dtype)


def layer_norm(x: Float[Array, "*batch width"], eps: float) -> Float[Array, "*batch width"]:
    """LayerNorm with weight 1 and bias 0."""
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


def rope_frequencies(rotary: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of the `rotary` / 2 rotated pairs: float32 [half], known when a program is traced.

    Rounded where torch rounds, by whose numbers published models were trained: at far positions the last bit counts.
    """
    exponent = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    frequency = np.float32(1) / (theta ** exponent.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return frequency
    factor = np.float32(scaling.factor)
    if scaling.kind == "linear":
        return frequency / factor
    wavelength = np.float32(2 * np.pi) / frequency
    low = scaling.original_positions / scaling.low_freq_factor
    high = scaling.original_positions / scaling.high_freq_factor
    smooth = (np.float32(scaling.original_positions) / wavelength - np.float32(scaling.low_freq_factor)) / np.float32(
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequency / factor + smooth * frequency
    return np.where(wavelength > low, frequency / factor, np.where(wavelength < high, frequency, between))


def rotate(
    x: Float[Array, "B S heads head"], positions: Int[Array, "B S"], frequencies: Float[Array | np.ndarray, "half"]
) -> Float[Array, "B S heads head"]:
    """Rotary embedding of the first 2 * half channels, pairs split in halves (Hugging Face's order)."""
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]  # [B, S, 1, half]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    half = frequencies.shape[0]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


# What the backward pass finds stored: every layer's input alone, or the outputs of plain matrix products too.
REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


Carry = TypeVar("Carry")


def scan_layers(
    body: Callable[[Carry, Any], tuple[Carry, Any]], init: Carry, inputs: Any, depth: int, remat: str
) -> tuple[Carry, Any]:
    """What `body` makes of `init` through `depth` stacked layers, and its outputs stacked in their turn.

    `remat` "none" stores all that is to be read back.
    """
    # All of a few layers are written out (faster on CPU), else one (compile time).
    unroll = depth if depth <= 4 else 1
    if remat != "none":
        # A loop, else the compiler would merge each layer with its recomputation.
        body, unroll = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False), 1
    return jax.lax.scan(body, init, inputs, unroll=unroll)
