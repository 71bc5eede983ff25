"""Implements the language decoder of all families, with layers stacked and scanned.

All families share one pre-norm block.

Shapes: B rows, S tokens per row, D channels, K keys that are attended (S, or the C places of a
cache).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from unimed_jax.config import DecoderConfig, LoraConfig, MoeConfig
from unimed_jax.model.attention import attend
from unimed_jax.model.cache import Cache, CacheSlot, Span, visible
from unimed_jax.model.dispatch import Moe
from unimed_jax.model.layer_plan import LayerPlan, Stacks, loop_layers, scan_plan
from unimed_jax.model.layers import (
    Dropout,
    Linear,
    Mlp,
    Norm,
    broadcast_channels,
    normal,
    rope_frequencies,
    rotate,
    stack,
)
from unimed_jax.model.routing import Noise, Routing, draw_noise

# --------------------------------------------------------------------------------------------------
# One layer
# --------------------------------------------------------------------------------------------------


class DecoderAttention(nnx.Module):
    """Attends with rotary positions, grouped heads and, when decoding, a cache of keys and values."""

    def __init__(
        self,
        config: DecoderConfig,
        lora: LoraConfig | None,
        implementation: str,
        rngs: nnx.Rngs,
    ):
        self.config = c = config
        self.implementation = implementation
        q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def linear(name: str, width_in: int, width_out: int, std: float | None = None) -> Linear:
            adapter = lora if lora and name in lora.targets else None
            bias = name in c.attention_bias
            return Linear(width_in, width_out, bias=bias, std=std, lora=adapter, rngs=rngs)

        self.q = linear("q", c.width, q_width)
        self.k = linear("k", c.width, kv_width)
        self.v = linear("v", c.width, kv_width)
        self.o = linear("o", q_width, c.width, std=(2 * c.depth * q_width) ** -0.5)
        self.q_norm = Norm(c.head_dim, c.norm, c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head_dim, c.norm, c.norm_eps) if c.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        frequencies: Float[Array | np.ndarray, "half"],
        mask: Bool[Array, "B S K"],
        slot: CacheSlot | None,
        dropout: Dropout,
    ) -> tuple[Float[Array, "B S D"], CacheSlot | None]:
        """Attends x to itself or, with a cache slot, to the layer's cache after x is written to it.

        `frequencies`: of the rotation, in radians per position. Returns the slot of the updated
        cache, too.
        """
        c = self.config
        batch, length, _ = x.shape
        shared = (batch, length, c.kv_heads, c.head_dim)
        q = self.q(x, dropout.q).reshape(batch, length, c.heads, c.head_dim)  # [B, S, heads, d]
        k = self.k(x, dropout.k).reshape(shared)  # [B, S, kv_heads, d]
        v = self.v(x, dropout.v).reshape(shared)  # [B, S, kv_heads, d]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, kv_heads, S, d]

        implementation = self.implementation
        if slot is not None:
            slot = slot.write(k, v)
            k, v = slot.read()  # [B, kv_heads, C, d]
            # Fused kernels are for rows that attend to themselves, as prompts do that fill a cache; a
            # name that the settings give is meant for rows of training.
            itself = k.shape[2] == length and implementation != "xla"
            implementation = "auto" if itself else "xla"
        out = attend(
            q,
            k,
            v,
            mask,
            scale=c.query_scale,
            softcap=c.attention_softcap,
            implementation=implementation,
        )
        return self.o(out.reshape(batch, length, -1), dropout.o), slot  # [B, S, heads * d] in


# x [B, S, D] -> (output [B, S, D], Routing if it was a mixture of experts)
FeedForward = Callable[[Array], tuple[Array, Routing | None]]


class DecoderLayer(nnx.Module):
    """Adds attention and a feed-forward part to the residual stream, each after a norm.

    The feed-forward part (an MLP or experts) is an argument of the call, because not all layers
    hold the same. The fields `mlp` and `moe` only store its leaves in `Decoder.layers`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        lora: LoraConfig | None,
        implementation: str,
        rngs: nnx.Rngs,
    ):
        def norm(there: bool) -> Norm | None:
            return Norm(config.width, config.norm, config.norm_eps) if there else None

        self.norm1 = Norm(config.width, config.norm, config.norm_eps)
        self.attention = DecoderAttention(config, lora, implementation, rngs)
        self.post_norm1 = norm(config.post_norms)
        self.norm2 = norm(not config.parallel_block)
        self.post_norm2 = norm(config.post_norms)
        self.mlp: Mlp | None = nnx.data(Mlp(config, lora, rngs))
        self.moe: Moe | None = nnx.data(None)

    def parts(self) -> tuple["DecoderLayer", Mlp | None, Moe | None]:
        """Takes the layer, or a stack of them, apart: norms with attention, MLP, experts."""
        shared = nnx.clone(self)
        shared.mlp = shared.moe = None
        return shared, self.mlp, self.moe

    def __call__(
        self,
        feed_forward: FeedForward,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        frequencies: Float[Array | np.ndarray, "half"],
        mask: Bool[Array, "B S K"],
        slot: CacheSlot | None,
        dropout: Dropout,
    ) -> tuple[Float[Array, "B S D"], CacheSlot | None, Routing | None]:
        """Runs the layer; the arguments after x are those of DecoderAttention."""
        normed = self.norm1(x)
        attended, slot = self.attention(normed, positions, frequencies, mask, slot, dropout)
        x = x + (attended if self.post_norm1 is None else self.post_norm1(attended))
        if self.norm2 is not None:  # without it a parallel block: the MLP reads what attention read
            normed = self.norm2(x)
        out, routing = feed_forward(normed)
        return x + (out if self.post_norm2 is None else self.post_norm2(out)), slot, routing


# --------------------------------------------------------------------------------------------------
# The decoder
# --------------------------------------------------------------------------------------------------


class DecoderOutput(NamedTuple):
    """Names what a decoder returns."""

    hidden: Array  # [B, S, D], after the last norm
    cache: Cache | None
    routing: Routing | None  # arrays have a leading axis: the layers with experts
    # [layers + 1, B, S, D]: the embeddings, the outputs of all layers but the last, and `hidden`
    states: Array | None


class Carry(NamedTuple):
    """Holds what one layer hands to the next."""

    x: Array  # [B, S, D]
    keys: Array | None  # keys of the cache, [layers, B, kv_heads, C, head]
    values: Array | None


class LayerInputs(NamedTuple):
    """Holds what every layer has of its own; stacked over layers before it is scanned."""

    layer: DecoderLayer | None  # norms and attention only
    number: Array  # [] int32
    window: Array  # [] int32, 0 for full attention
    dropout_key: Array | None


class Forward(NamedTuple):
    """Holds what all layers of one forward pass share."""

    query: Span  # the tokens of x
    key: Span  # what x attends to: x itself, or the cache
    start: Array | int  # place of x in the cache
    before: Array | int  # x may see what lies in the places before this one, and in its own
    mask: Array | None  # [B, S, K]; None if windows make it differ between layers
    used: Array  # [B, S] bool: the tokens that experts are routed for
    training: bool


class Decoder(nnx.Module):
    """Turns token embeddings into hidden states.

    The head is a separate call (`logits`), because training makes it only on answer positions. The
    leaves of `layers` are stacked: norms and attention over all layers, `layers/mlp` over the
    layers with a plain MLP, `layers/moe` over the layers with experts. After
    `decoding.separate_layers` it is a list of layers instead.
    """

    layers: DecoderLayer | nnx.List

    def __init__(
        self,
        config: DecoderConfig,
        lora: LoraConfig,
        rngs: nnx.Rngs,
        *,
        moe: MoeConfig = MoeConfig(),
        attention: str = "auto",
        remat: str = "none",
    ):
        """Creates the embedding, the layers and the head.

        attention, remat: those of ModelConfig.
        """
        self.config = c = config
        self.moe, self.remat = moe, remat
        adapter = lora if lora.rank else None
        self.embedding = nnx.Param(normal(rngs.params(), (c.vocab, c.width), 0.02))
        layers = stack(lambda r: DecoderLayer(c, adapter, attention, r), c.depth, rngs)
        with_experts = moe.numbers(c.depth)
        if with_experts:
            plain = np.array([i for i in range(c.depth) if i not in with_experts], int)
            mlps = jax.tree.map(lambda leaf: leaf[plain], layers.mlp) if plain.size else None
            layers.mlp = mlps
            layers.moe = stack(lambda r: Moe(moe, c, r), len(with_experts), rngs)
        self.layers = layers
        self.norm = Norm(c.width, c.norm, c.norm_eps)
        head = None if c.tied_head else normal(rngs.params(), (c.width, c.vocab), 0.02)
        self.head = None if head is None else nnx.Param(head)
        self.head_bias = nnx.Param(jnp.zeros(c.vocab)) if c.head_bias else None

    def embed(self, tokens: Int[Array, "B S"], dtype) -> Float[Array, "B S D"]:
        """Looks up text embeddings and scales them if the family does.

        Visual tokens enter unscaled, as the connector makes them, like image features in Hugging
        Face's Gemma 3 and PaliGemma.
        """
        x = self.embedding[...][tokens].astype(dtype)
        return x * jnp.asarray(self.config.width**0.5, dtype) if self.config.scaled_embedding else x

    def frequencies(self, window: Int[Array, ""]) -> Float[Array | np.ndarray, "half"]:
        """Computes the rotation of a layer with that window, in radians per position."""
        c = self.config
        rotary = 2 * int(c.head_dim * c.rotary_fraction / 2)
        everywhere = rope_frequencies(rotary, c.rope_theta, c.rope_scaling)
        if c.local_rope_theta is None:
            return everywhere
        return jnp.where(window > 0, rope_frequencies(rotary, c.local_rope_theta, None), everywhere)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        span: Span,
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
        dropout_key: Key[Array, ""] | None = None,
        noise: Noise | Key[Array, ""] | None = None,
        states: bool = False,
        before: Int[Array, ""] | int | None = None,
    ) -> DecoderOutput:
        """Runs all layers and the last norm.

        With a cache, x takes its places start .. start + S - 1, which `cache.span` must already
        describe, and the filled cache is returned. A `dropout_key` means training.

        before: x sees what lies before this place of the cache. None: `start`, as places are in the
        order of the row; a cache whose places are used in turn gives their number.
        noise: of the routers, stacked over the layers with experts, or a key to draw it from. By
        default it is drawn from `dropout_key`, so evaluation has none.
        states: also return the output of every layer.
        """
        depth = self.config.depth
        windows = jnp.resize(jnp.asarray(self.config.windows or (0,), jnp.int32), (depth,))
        key_span = span if cache is None else cache.span
        if self.moe.route_padding:
            x, span = _padding_as_tokens(x, span)
        before = start if before is None else before
        mask = None if self.config.windows else visible(span, key_span, before)
        noise = self._noise_by_layer(noise, dropout_key, len(self.moe.numbers(depth)))
        used, training = span.segments != 0, dropout_key is not None
        forward = Forward(span, key_span, start, before, mask, used, training)

        dropout_keys = None if dropout_key is None else jax.random.split(dropout_key, depth)
        inputs = LayerInputs(None, jnp.arange(depth), windows, dropout_keys)
        carry = Carry(x, None, None) if cache is None else Carry(x, cache.keys, cache.values)
        run_layer = functools.partial(self._run_layer, forward)
        watch = (lambda carry: carry.x) if states else None
        if isinstance(self.layers, DecoderLayer):
            layers, mlps, moes = self.layers.parts()
            stacks = Stacks(inputs._replace(layer=layers), (moes, noise), mlps)
            plan = LayerPlan.of(tuple(i in self.moe.numbers(depth) for i in range(depth)))
            out = scan_plan(run_layer, plan, stacks, carry, remat=self.remat, watch=watch)
        else:
            out = loop_layers(run_layer, self._one_by_one(inputs, noise), carry, watch)
        carry, routing, outputs = out

        hidden = self.norm(carry.x)
        filled = None
        if carry.keys is not None and carry.values is not None:
            filled = Cache(carry.keys, carry.values, key_span)
        if outputs is not None:
            parts = [x[None], outputs[:-1], hidden[None]]
            outputs = jnp.concatenate(parts)  # [layers + 1, B, S, D]
        return DecoderOutput(hidden, filled, routing, outputs)

    def _one_by_one(self, inputs: LayerInputs, noise: Any) -> Iterator[Stacks]:
        """Gives every separate layer what it has of its own."""
        with_experts = 0
        assert not isinstance(self.layers, DecoderLayer)
        for i, layer in enumerate(self.layers):
            shared, mlp, moe = layer.parts()
            own = jax.tree.map(lambda leaf, i=i: leaf[i], inputs)._replace(layer=shared)
            experts = None
            if moe is not None:
                experts = (moe, jax.tree.map(lambda leaf, n=with_experts: leaf[n], noise))
                with_experts += 1
            yield Stacks(own, experts, mlp)

    def _run_layer(
        self,
        forward: Forward,
        carry: Carry,
        inputs: LayerInputs,
        experts: tuple[Moe, Noise | Array | None] | None,
        mlp: Mlp | None,
    ) -> tuple[Carry, Routing | None]:
        """Runs one layer, with its experts (and their noise or a key for it) or with its MLP."""
        dropout = Dropout.split(inputs.dropout_key)
        mask = forward.mask
        if mask is None:
            mask = visible(forward.query, forward.key, forward.before, inputs.window)
        slot = None
        if carry.keys is not None and carry.values is not None:
            slot = CacheSlot(carry.keys, carry.values, inputs.number, forward.start)

        def feed_forward(x: Array) -> tuple[Array, Routing | None]:
            if mlp is not None:
                return mlp(x, dropout), None
            assert experts is not None
            moe, noise = experts
            if isinstance(noise, jax.Array):
                batch, length, width = x.shape
                noise = draw_noise(noise, batch * length, width, self.moe, forward.training)
            return moe(x, forward.used, noise or Noise(), forward.training)

        frequencies = self.frequencies(inputs.window)
        positions = forward.query.positions
        assert inputs.layer is not None
        x, slot, routing = inputs.layer(
            feed_forward,
            carry.x,
            positions,
            frequencies,
            mask,
            slot,
            dropout,
        )
        return Carry(x, None, None) if slot is None else Carry(x, slot.keys, slot.values), routing

    def _noise_by_layer(
        self,
        noise: Noise | Key[Array, ""] | None,
        dropout_key: Key[Array, ""] | None,
        layers: int,
    ) -> Noise | Key[Array, "layers"] | None:
        """Resolves the argument `noise` of the call into one noise or key per layer with experts."""
        if noise is None and dropout_key is not None:
            noise = jax.random.fold_in(dropout_key, self.config.depth)
        if isinstance(noise, jax.Array):
            return jax.random.split(noise, max(layers, 1))
        return noise

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch vocab"]:
        """Computes the next-token logits in float32."""
        head = self.embedding[...].T if self.head is None else self.head[...]
        logits = (hidden @ head.astype(hidden.dtype)).astype(jnp.float32)
        if self.head_bias is not None:
            logits += broadcast_channels(self.head_bias[...].astype(jnp.float32), logits)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def empty_cache(self, span: Span, dtype) -> Cache:
        """Makes a cache of zeros for rows whose C places are described by `span`."""
        c = self.config
        rows, places = span.segments.shape
        shape = (c.depth, rows, c.kv_heads, places, c.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), span)


def _padding_as_tokens(x: Float[Array, "B S D"], span: Span) -> tuple[Float[Array, "B S D"], Span]:
    """Lets padding take part as in the published code: as zeros that attend like a real token.

    It still attends only to real tokens, because those are the only keys that are visible.
    """
    x = jnp.where((span.segments != 0)[..., None], x, 0)
    segments, prefixes = jnp.maximum(span.segments, 1), jnp.maximum(span.prefixes, 1)
    return x, span._replace(segments=segments, prefixes=prefixes)


def merge_lora(decoder: Decoder) -> Decoder:
    """Returns a copy with every adapter merged into its kernel: W + (alpha / rank) A B."""

    def merge(module: Any) -> None:
        if isinstance(module, Linear) and module.lora_a is not None:
            assert module.lora_b is not None
            kernel = module.kernel[...].astype(module.kernel[...].dtype)  # not quantised any more
            product = jnp.einsum("...ir,...ro->...io", module.lora_a[...], module.lora_b[...])
            merged_kernel = kernel + product * module.lora_scale
            module.kernel = nnx.Param(merged_kernel.astype(kernel.dtype))
            module.lora_a = module.lora_b = None

    merged = nnx.clone(decoder)
    for _, module in nnx.iter_modules(merged):
        merge(module)
    return merged
