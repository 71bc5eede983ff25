"""The language decoder: one pre-norm block for all families, layers stacked and scanned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from unimed_jax.config import DecoderConfig, LoraConfig, MoeConfig
from unimed_jax.model.attention import attend
from unimed_jax.model.dispatch import Moe
from unimed_jax.model.layers import Linear, Mlp, Norm, normal, rope_frequencies, rotate, scan_layers, spread, stack
from unimed_jax.model.routing import Noise, Routing, draw_noise


class Span(NamedTuple):
    """Where the tokens of a batch of rows stand; all int32 [B, S].

    segments: 0 is padding, else the segment's number in its row. prefixes: the segment whose tokens are
    visible besides a token's own (several questions behind one image); its own number where there is none.
    """

    positions: Array
    segments: Array
    prefixes: Array


class Cache(NamedTuple):
    """Keys and values of all layers [layers, B, kv_heads, C, head], and the span of the C places."""

    keys: Array
    values: Array
    span: Span


def visible(
    query: Span, key: Span, query_start: Int[Array, ""] | int = 0, window: Int[Array, ""] | int = 0
) -> Bool[Array, "B S K"]:
    """Which keys a query sees: real ones, not behind it in the row, of its own segment or its prefix,
    and at most `window` positions back (0: any). The one mask for packed training and cached decoding."""
    q_index = query_start + jnp.arange(query.segments.shape[1])[None, :, None]  # [1, S, 1]
    k_index = jnp.arange(key.segments.shape[1])[None, None, :]  # [1, 1, K]
    q_segment, q_prefix, k_segment = query.segments[:, :, None], query.prefixes[:, :, None], key.segments[:, None, :]
    mask = (k_segment != 0) & (k_index <= q_index) & ((k_segment == q_segment) | (k_segment == q_prefix))
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    return mask & ((window == 0) | (distance < window))


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, implementation: str, rngs: nnx.Rngs):
        self.config = c = config
        self.implementation = implementation

        def linear(name: str, width_in: int, width_out: int, std: float | None = None) -> Linear:
            adapter = lora if lora and name in lora.targets else None
            bias = name in c.attention_bias
            return Linear(width_in, width_out, bias=bias, std=std, lora=adapter, rngs=rngs)

        self.q = linear("q", c.width, c.heads * c.head_dim)
        self.k = linear("k", c.width, c.kv_heads * c.head_dim)
        self.v = linear("v", c.width, c.kv_heads * c.head_dim)
        self.o = linear("o", c.heads * c.head_dim, c.width, std=(2 * c.depth * c.heads * c.head_dim) ** -0.5)
        self.q_norm = Norm(c.head_dim, c.norm, c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head_dim, c.norm, c.norm_eps) if c.qk_norm else None

    def __call__(self, x, span: Span, frequencies, mask, cached, dropout):
        """x [B, S, D], frequencies [half] of the rotation -> ([B, S, D], (all keys, all values) or None).

        `cached` (all keys, all values, this layer's number, first place): x's keys and values are written there
        and the layer's are attended instead of x's own.
        """
        c = self.config
        batch, length, _ = x.shape
        q = self.q(x, dropout[0]).reshape(batch, length, c.heads, c.head_dim)  # [B, S, heads, d]
        k = self.k(x, dropout[1]).reshape(batch, length, c.kv_heads, c.head_dim)  # [B, S, kv_heads, d]
        v = self.v(x, dropout[2]).reshape(batch, length, c.kv_heads, c.head_dim)  # [B, S, kv_heads, d]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, span.positions, frequencies), rotate(k, span.positions, frequencies)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, kv_heads, S, d]
        filled = None
        if cached is not None:
            # Written in place into the loop's one copy; a layer's share as scan output would copy all of it.
            *caches, layer, start = cached
            place = (layer, 0, 0, start, 0)
            filled = tuple(
                jax.lax.dynamic_update_slice(old, new[None], place) for old, new in zip(caches, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(all_, layer, keepdims=False) for all_ in filled)  # [B, kv_heads, C, d]
        # A cache is read by a few queries at a time, which no fused kernel is made for.
        implementation = self.implementation if cached is None else "xla"
        out = attend(q, k, v, mask, scale=c.query_scale, softcap=c.attention_softcap, implementation=implementation)
        return self.o(out.reshape(batch, length, -1), dropout[3]), filled  # [B, S, heads * d] in


class DecoderOutput(NamedTuple):
    hidden: Array  # [B, S, D], after the last norm
    cache: Cache | None
    routing: Routing | None  # of the layers with experts, which are its arrays' first axis
    states: Array | None  # [layers + 1, B, S, D]: the embeddings, the output of each layer but the last, and `hidden`


class Layer(nnx.Module):
    """Norms and attention; the MLP, or the experts in its place, come as an argument: not all layers hold the same."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, implementation: str, rngs: nnx.Rngs):
        def norm(there: bool) -> Norm | None:
            return Norm(config.width, config.norm, config.norm_eps) if there else None

        self.norm1 = Norm(config.width, config.norm, config.norm_eps)
        self.attention = Attention(config, lora, implementation, rngs)
        self.post_norm1 = norm(config.post_norms)
        self.norm2 = norm(not config.parallel_block)
        self.post_norm2 = norm(config.post_norms)
        self.mlp: Mlp | None = nnx.data(Mlp(config, lora, rngs))
        self.moe: Moe | None = nnx.data(None)

    def __call__(self, feed_forward, x, span: Span, frequencies, mask, cached, dropout):
        """`feed_forward`: x [B, S, D] -> ([B, S, D], Routing or None)."""
        normed = self.norm1(x)
        attended, filled = self.attention(normed, span, frequencies, mask, cached, dropout)
        x = x + (attended if self.post_norm1 is None else self.post_norm1(attended))
        if self.norm2 is not None:  # else a parallel block: the MLP reads what attention read
            normed = self.norm2(x)
        out, routing = feed_forward(normed)
        return x + (out if self.post_norm2 is None else self.post_norm2(out)), filled, routing


class Decoder(nnx.Module):
    """Token embeddings in, hidden states out; the head is a separate call, made on answer positions only.

    Leaves of `layers` are stacked: norms and attention over all layers, `layers/mlp` over those with a plain MLP,
    `layers/moe` over those with experts.
    """

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
        """`attention` and `remat` as in ModelConfig."""
        self.config = c = config
        self.moe, self.remat = moe, remat
        adapter = lora if lora.rank else None
        self.embedding = nnx.Param(normal(rngs.params(), (c.vocab, c.width), 0.02))
        self.layers = stack(lambda r: Layer(c, adapter, attention, r), c.depth, rngs)
        numbers = moe.numbers(c.depth)
        if numbers:
            plain = np.array([i for i in range(c.depth) if i not in numbers], int)
            self.layers.mlp = jax.tree.map(lambda leaf: leaf[plain], self.layers.mlp) if plain.size else None
            self.layers.moe = stack(lambda r: Moe(moe, c, r), len(numbers), rngs)
        self.norm = Norm(c.width, c.norm, c.norm_eps)
        self.head = None if c.tied_head else nnx.Param(normal(rngs.params(), (c.width, c.vocab), 0.02))
        self.head_bias = nnx.Param(jnp.zeros(c.vocab)) if c.head_bias else None

    def embed(self, tokens: Int[Array, "B S"], dtype) -> Float[Array, "B S D"]:
        """Text's embeddings, scaled where the family does. Visual tokens take their places as the connector makes
        them, as image features do in Hugging Face's Gemma 3 and PaliGemma."""
        x = self.embedding[...][tokens].astype(dtype)
        return x * jnp.asarray(self.config.width**0.5, dtype) if self.config.scaled_embedding else x

    def frequencies(self, window: Int[Array, ""]) -> Float[Array | np.ndarray, "half"]:
        """Of the rotation in a layer with that window, in radians per position."""
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
    ) -> DecoderOutput:
        """With a cache, x stands at its places start .. start + S - 1 (`cache.span` must already say so) and the
        filled cache comes back. A `dropout_key` means training.

        noise: of the routers, stacked over the layers with experts, or a key to draw it from; by default it is drawn
        from `dropout_key`, and there is none at evaluation. states: give all layers' outputs back too.
        """
        c, depth, training = self.config, self.config.depth, dropout_key is not None
        windows = jnp.resize(jnp.asarray(c.windows or (0,), jnp.int32), (depth,))
        key_span = span if cache is None else cache.span
        if self.moe.route_padding:
            # As published: padding enters as zeros, and asks for the row's tokens as if it were one of them.
            x = jnp.where((span.segments != 0)[..., None], x, 0)
            span = span._replace(segments=jnp.maximum(span.segments, 1), prefixes=jnp.maximum(span.prefixes, 1))
        shared_mask = None if c.windows else visible(span, key_span, start)
        numbers = self.moe.numbers(depth)
        if noise is None and dropout_key is not None:
            noise = jax.random.fold_in(dropout_key, depth)
        if isinstance(noise, jax.Array):
            noise = jax.random.split(noise, max(len(numbers), 1))
        used = span.segments != 0

        def one_layer(carry, inputs, experts, mlp):
            """Layer with `experts` (a Moe, its noise) or `mlp` -> carry, Routing or None."""
            x, filled = carry
            layer, number, window, key = inputs
            dropout = [None] * 7 if key is None else list(jax.random.split(key, 7))
            mask = visible(span, key_span, start, window) if shared_mask is None else shared_mask
            cached = None if filled is None else (*filled, number, start)

            def feed_forward(x):
                if mlp is not None:
                    return mlp(x, dropout[4:]), None
                moe, noise = experts
                if isinstance(noise, jax.Array):
                    noise = draw_noise(noise, x.shape[0] * x.shape[1], x.shape[2], self.moe, training)
                return moe(x, used, noise or Noise(), training)

            x, filled, routing = layer(feed_forward, x, span, self.frequencies(window), mask, cached, dropout[:4])
            return (x, filled), routing

        keys = None if dropout_key is None else jax.random.split(dropout_key, depth)
        layers = nnx.clone(self.layers)
        layers.mlp = layers.moe = None
        stacks = ((layers, jnp.arange(depth), windows, keys), (self.layers.moe, noise), self.layers.mlp)
        carry = (x, None if cache is None else (cache.keys, cache.values))
        kinds = tuple(i in numbers for i in range(depth))
        carry, routing, between = _through(one_layer, kinds, stacks, carry, self.remat, states)
        last, filled = carry
        hidden = self.norm(last)
        return DecoderOutput(
            hidden,
            None if filled is None else Cache(filled[0], filled[1], key_span),
            routing,
            None if between is None else jnp.concatenate([x[None], between[:-1], hidden[None]]),
        )

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch vocab"]:
        """float32 logits."""
        head = self.embedding[...].T if self.head is None else self.head[...]
        logits = (hidden @ head.astype(hidden.dtype)).astype(jnp.float32)
        if self.head_bias is not None:
            logits += spread(self.head_bias[...].astype(jnp.float32), logits)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def empty_cache(self, span: Span, dtype) -> Cache:
        """A cache of zeros for rows whose C places are described by `span`."""
        c = self.config
        rows, places = span.segments.shape
        shape = (c.depth, rows, c.kv_heads, places, c.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), span)


def runs(kinds: tuple[bool, ...]) -> list[tuple[int, tuple[bool, ...], int]]:
    """Layers as few repetitions of short units, (first layer, unit, repeats) each, so that each is one scan."""
    out, first = [], 0
    while first < len(kinds):
        best = (1, 1)  # length of the unit, repeats
        for size in range(1, (len(kinds) - first) // 2 + 1):
            unit, repeats = kinds[first : first + size], 1
            while kinds[first + repeats * size : first + (repeats + 1) * size] == unit:
                repeats += 1
            if repeats > 1 and repeats * size > best[0] * best[1]:
                best = (size, repeats)
        out.append((first, kinds[first : first + best[0]], best[1]))
        first += best[0] * best[1]
    return out


def _through(layer, kinds: tuple[bool, ...], stacks, carry, remat: str, states: bool):
    """`carry` through all layers -> carry, stacked routing of those with experts, stacked outputs (None unless asked).

    stacks: what all layers have, those with experts, and the others, each over its own layers.
    """
    outputs = []
    for first, unit, repeats in runs(kinds):
        before, within = sum(kinds[:first]), sum(unit)
        sizes = ((first, len(unit)), (before, within), (first - before, len(unit) - within))
        inputs = [_cut(stacked, at, size, repeats) for stacked, (at, size) in zip(stacks, sizes, strict=True)]

        def body(carry, inputs, unit=unit):
            shared, experts, mlps = inputs
            routings, seen = [], []
            for i, is_moe in enumerate(unit):
                nth = sum(unit[:i])
                feed = (_at(experts, nth), None) if is_moe else (None, _at(mlps, i - nth))
                carry, routing = layer(carry, _at(shared, i), *feed)
                routings += [routing] if is_moe else []
                seen += [carry[0]] if states else []
            return carry, [jax.tree.map(lambda *a: jnp.stack(a), *x) if x else None for x in (routings, seen)]

        carry, out = scan_layers(body, carry, inputs, repeats, remat)
        outputs.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out))  # [layers of this run, ...]
    return carry, *(_joined(parts) for parts in zip(*outputs, strict=True))


def _cut(stacked, first: int, size: int, repeats: int):
    """Of every leaf [layers, ...] the part [repeats, size, ...] that starts at layer `first`."""
    if size == 0:
        return None
    return jax.tree.map(lambda a: a[first : first + size * repeats].reshape(repeats, size, *a.shape[1:]), stacked)


def _at(stacked, index: int):
    return jax.tree.map(lambda a: a[index], stacked)


def _joined(parts):
    """The outputs of several runs as one, layers first; None where there is none."""
    parts = [part for part in parts if part is not None]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if parts else None


def merge_lora(decoder: Decoder) -> Decoder:
    """The decoder with every adapter folded into its kernel: W + (alpha / rank) A B, and no adapters left."""

    def merge(module):
        if isinstance(module, Linear) and module.lora_a is not None:
            assert module.lora_b is not None
            update = jnp.einsum("...ir,...ro->...io", module.lora_a[...], module.lora_b[...]) * module.lora_scale
            module.kernel = nnx.Param((module.kernel[...] + update).astype(module.kernel[...].dtype))
            module.lora_a = module.lora_b = None

    merged = nnx.clone(decoder)
    for _, module in nnx.iter_modules(merged):
        merge(module)
    return merged
