"""Says which tokens see which, in packed rows and in a cache of earlier steps.

Shapes: B rows, S tokens per row, K keys that are attended (S, or the C places of a cache).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Span(NamedTuple):
    """Describes the tokens of a batch of rows; all int32 [B, S].

    positions: for the rotary embedding and for windows.
    segments: the number of a token's segment in its row, 0 for padding. A token sees its segment.
    prefixes: one more segment that the token sees, as when several questions share one image; the
    token's own segment if there is none.
    """

    positions: Array
    segments: Array
    prefixes: Array


class Cache(NamedTuple):
    """Stores keys and values of all layers for C places.

    keys, values: [layers, B, kv_heads, C, head]; span: describes the places, [B, C].
    """

    keys: Array
    values: Array
    span: Span


class CacheSlot(NamedTuple):
    """Points at the part of a cache that one layer writes for the tokens at hand."""

    keys: Array  # keys of all layers, [layers, B, kv_heads, C, head]
    values: Array  # values of all layers, in the same shape
    layer: Array | int  # the layer's number
    start: Array | int  # the place of the first token

    def write(
        self,
        keys: Float[Array, "B kv_heads S head"],
        values: Float[Array, "B kv_heads S head"],
    ) -> "CacheSlot":
        """Returns the slot of the cache in which these keys and values are written."""
        # The loop over layers carries one copy and updates it in place; as an output of the scan,
        # each layer's part would be copied into a second one.
        place = (self.layer, 0, 0, self.start, 0)
        return self._replace(
            keys=jax.lax.dynamic_update_slice(self.keys, keys[None], place),
            values=jax.lax.dynamic_update_slice(self.values, values[None], place),
        )

    def read(self) -> tuple[Float[Array, "B kv_heads C head"], Float[Array, "B kv_heads C head"]]:
        """Returns the layer's own keys and values."""
        keys = jax.lax.dynamic_index_in_dim(self.keys, self.layer, keepdims=False)
        return keys, jax.lax.dynamic_index_in_dim(self.values, self.layer, keepdims=False)


def visible(
    query: Span,
    key: Span,
    query_start: Int[Array, ""] | int = 0,
    window: Int[Array, ""] | int = 0,
) -> Bool[Array, "B S K"]:
    """Says which keys each query sees; the one mask for packed training and cached decoding.

    A query sees keys that are real tokens, not after it in the row, in its own segment or its
    prefix, and less than `window` positions back (0: at any distance). `query_start`: the place of
    the first query among the keys.
    """
    q_index = query_start + jnp.arange(query.segments.shape[1])[None, :, None]  # [1, S, 1]
    k_index = jnp.arange(key.segments.shape[1])[None, None, :]  # [1, 1, K]
    q_segment, q_prefix = query.segments[:, :, None], query.prefixes[:, :, None]  # [B, S, 1]
    k_segment = key.segments[:, None, :]  # [B, 1, K]
    real, not_after = k_segment != 0, k_index <= q_index
    mask = real & not_after & ((k_segment == q_segment) | (k_segment == q_prefix))
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    return mask & ((window == 0) | (distance < window))
