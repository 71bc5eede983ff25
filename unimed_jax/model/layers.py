"""Defines building blocks that the vision encoder, the connector and the decoder share.

Every module is a pytree of `nnx.Param` leaves. Stacked layers are one module whose leaves have a
leading [layers] axis (`stack`), which `scan_layers` runs over. No forward pass changes a module.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from unimed_jax.config import DecoderConfig, LoraConfig, RopeScaling
from unimed_jax.model.dropout import kept
from unimed_jax.model.low_rank import SAVED, add_low_rank, kernel_input, separate
from unimed_jax.model.quantised import Quantised
from unimed_jax.model.sharding import gathered


def _gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the exact GELU.

    In 16 bits it is computed in float32 and rounded once, by erf: of the form by erfc, which keeps
    more digits far below 0 than 16 bits hold, GPUs make two kernels.
    """
    if x.dtype.itemsize > 2:
        return jax.nn.gelu(x, approximate=False)
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * np.float32(0.5**0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}

Stacked = TypeVar("Stacked", bound=nnx.Module)
Carry = TypeVar("Carry")

# --------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------


def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float) -> Array:
    """Draws float32 values from a normal distribution of mean 0."""
    return std * jax.random.normal(key, shape, jnp.float32)


def broadcast_channels(
    vector: Float[Array, "width"], like: Float[Array, "*batch width"]
) -> Float[Array, "*batch width"]:
    """Repeats a per-channel vector over all leading axes of `like`.

    It is written out because the tests raise on implicit rank promotion.
    """
    return jnp.broadcast_to(vector, like.shape)


def stack(make: Callable[[nnx.Rngs], Stacked], count: int, rngs: nnx.Rngs) -> Stacked:
    """Makes `count` modules of one kind as one module whose leaves have a leading [count] axis."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


# --------------------------------------------------------------------------------------------------
# Linears and MLPs
# --------------------------------------------------------------------------------------------------


class Dropout(NamedTuple):
    """Holds the keys of one layer's adapter dropout, one per linear; None means no dropout."""

    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    o: Array | None = None
    gate: Array | None = None
    up: Array | None = None
    down: Array | None = None

    @classmethod
    def split(cls, key: Key[Array, ""] | None) -> "Dropout":
        """Splits one key into a key per linear; without a key nothing is dropped (evaluation)."""
        return cls() if key is None else cls(*jax.random.split(key, len(cls._fields)))


def product(
    x: Float[Array, "batch in"], kernel: Any, names: tuple[str | None, ...] = ()
) -> Float[Array, "batch out"]:
    """Multiplies x with a kernel, quantised or not, in x's dtype.

    The backward pass converts the kernel again, so that the numbers of one layer exist at a time.
    names: of the kernel's dimensions (`sharding.parameter_names`).
    """
    if kernel.dtype == x.dtype and not isinstance(kernel, Quantised):
        return x @ kernel

    def multiply(x: Array, kernel: Any) -> Array:
        if isinstance(kernel, Quantised):
            kernel = gathered(kernel, names, len(x))
        return x @ kernel.astype(x.dtype)

    # Layers are scanned: forward and backward pass are loops of their own, which nothing merges. Where
    # a layer's backward pass recomputes the layer (remat), both share the numbers.
    return jax.checkpoint(multiply, prevent_cse=False)(x, kernel)


class Linear(nnx.Module):
    """Computes x W + b, and with a LoRA adapter adds (alpha / rank) dropout(x) A B.

    LoRA: arXiv 2106.09685. kernel [in, out] (an array, or Quantised if it is frozen), bias [out],
    lora_a [in, rank], lora_b [rank, out].
    """

    names: tuple[str | None, ...] = ()  # of the kernel's dimensions; the whole model sets them

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
        lora_a = normal(rngs.params(), (width_in, lora.rank), width_in**-0.5) if lora else None
        self.lora_a = None if lora_a is None else nnx.Param(lora_a)
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, width_out))) if lora else None

    def __call__(
        self, x: Float[Array, "*batch in"], dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "*batch out"]:
        """Computes in x's dtype; without a `dropout_key` nothing is dropped (evaluation)."""
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])  # [batch, in]: one plain product, twice as fast on CPU
        adapted = self.lora_a is not None and separate(self.lora_a.shape[-1])
        y = product(kernel_input(x) if adapted else x, self.kernel[...], self.names)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)[None]
        if self.lora_a is not None:
            assert self.lora_b is not None
            if dropout_key is not None and self.lora_dropout > 0:
                keep = kept(dropout_key, 1 - self.lora_dropout, x.shape)
                # Multiplied, because a scan over layers would store the zeros of `where` whole.
                x = x / (1 - self.lora_dropout) * keep.astype(x.dtype)
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            y = add_low_rank(y, x, a, b, self.lora_scale)
        return y.reshape(*shape, -1)  # [*batch, out]


class Mlp(nnx.Module):
    """Computes down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.activation = config.activation
        width, hidden = config.width, config.mlp_width

        def linear(name: str, width_in: int, width_out: int, std: float | None = None) -> Linear:
            adapter = lora if lora and name in lora.targets else None
            return Linear(
                width_in,
                width_out,
                bias=config.mlp_bias,
                std=std,
                lora=adapter,
                rngs=rngs,
            )

        self.gate = linear("gate", width, hidden) if config.gated_mlp else None
        self.up = linear("up", width, hidden)
        self.down = linear("down", hidden, width, std=(2 * config.depth * hidden) ** -0.5)

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        dropout: Dropout = Dropout(),
    ) -> Float[Array, "*batch D"]:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(x, dropout.up)), dropout.down)
        # As rows between the products too: GPUs do not fuse what reads them with what reads [B, S, D].
        rows = x.reshape(-1, x.shape[-1])  # [batch, D]
        hidden = act(self.gate(rows, dropout.gate)) * self.up(rows, dropout.up)
        return self.down(hidden, dropout.down).reshape(x.shape)  # [*batch, D]


# --------------------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------------------


class Norm(nnx.Module):
    """Normalises the last axis in float32, by LayerNorm or RMSNorm.

    kind: "layer" is LayerNorm with scale and bias, "rms" is RMSNorm with scale, and "rms_zero" is
    RMSNorm with 1 + scale (Gemma).
    """

    def __init__(self, width: int, kind: str, eps: float):
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param(jnp.zeros(width) if kind == "rms_zero" else jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            scale, bias = self.scale[...], self.bias[...]
            y = layer_norm(y, self.eps) * broadcast_channels(scale, y) + broadcast_channels(bias, y)
            return y.astype(x.dtype)
        y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        scale = self.scale[...]
        if self.kind == "rms_zero":
            # The addition is in float32 too: in bfloat16, 1 + scale would round a small scale away.
            scale = 1 + scale.astype(jnp.float32)
        return (y * broadcast_channels(scale, y)).astype(x.dtype)


def layer_norm(x: Float[Array, "*batch width"], eps: float) -> Float[Array, "*batch width"]:
    """Computes LayerNorm with weight 1 and bias 0."""
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


# --------------------------------------------------------------------------------------------------
# Rotary embedding
# --------------------------------------------------------------------------------------------------


def rope_frequencies(rotary: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Computes the radians per position of the rotary / 2 rotated pairs: float32 [half].

    They are numpy values, constants of the traced program. Rounds to float32 at the same points as
    torch, because published models were trained with those values: at far positions the last bit
    counts.
    """
    exponent = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    frequency = np.float32(1) / (theta ** exponent.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return frequency
    factor = np.float32(scaling.factor)
    if scaling.kind == "linear":
        return frequency / factor
    # Llama-3: long wavelengths are scaled, short ones are kept, those between are mixed smoothly.
    wavelength = np.float32(2 * np.pi) / frequency
    longest = scaling.original_positions / scaling.low_freq_factor
    shortest = scaling.original_positions / scaling.high_freq_factor
    span = np.float32(scaling.high_freq_factor - scaling.low_freq_factor)
    turns = np.float32(scaling.original_positions) / wavelength
    smooth = (turns - np.float32(scaling.low_freq_factor)) / span
    between = (1 - smooth) * frequency / factor + smooth * frequency
    kept_or_between = np.where(wavelength < shortest, frequency, between)
    return np.where(wavelength > longest, frequency / factor, kept_or_between)


def rotate(
    x: Float[Array, "B S heads head"],
    positions: Int[Array, "B S"],
    frequencies: Float[Array | np.ndarray, "half"],
) -> Float[Array, "B S heads head"]:
    """Rotates the first 2 * half channels; channel i is paired with i + half, as in Hugging Face."""
    place = positions[:, :, None, None].astype(jnp.float32)  # [B, S, 1, 1]
    angle = place * frequencies[None, None, None]  # [B, S, 1, half]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    half = frequencies.shape[0]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


# --------------------------------------------------------------------------------------------------
# Scanning over stacked layers
# --------------------------------------------------------------------------------------------------

# What the forward pass stores for the backward pass: only every layer's input (and the few channels of
# adapters, on GPUs), or also the outputs of plain matrix products. Everything else is computed again.
REMAT = {
    "full": jax.checkpoint_policies.save_only_these_names(SAVED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_layers(
    body: Callable[[Carry, Any], tuple[Carry, Any]],
    init: Carry,
    inputs: Any,
    depth: int,
    remat: str,
) -> tuple[Carry, Any]:
    """Scans `body` over `depth` stacked layers; returns the final carry and the stacked outputs.

    `remat`: a key of `REMAT`, or "none", which stores everything that the backward pass reads.
    """
    # A few layers are unrolled completely (faster on CPU), many not at all (compile time).
    unroll = depth if depth <= 4 else 1
    if remat != "none":
        # With unrolled layers the compiler would merge each layer with its recomputation.
        body, unroll = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False), 1
    return jax.lax.scan(body, init, inputs, unroll=unroll)
