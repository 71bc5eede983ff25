"""Draws which values dropout keeps.

A CPU draws by JAX's own generator (threefry). Accelerators hash each value's place with the key: of
the full-size step, threefry was two thirds of the time to compile for TPUs, and a tenth of the time
to run on a GPU. Both depend on key and place alone, so a step can be computed again, continued, and
split over any mesh.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key, UInt32

from unimed_jax.model.attention import hardware


def kept(key: Key[Array, ""], share: float, shape: tuple[int, ...]) -> Bool[Array, "rows channels"]:
    """Draws a mask that is true for about `share` of its values."""
    if hardware() == "cpu":
        return jax.random.bernoulli(key, share, shape)
    return hashed(key, shape) < jnp.uint32(min(share * 2**32, 2**32 - 1))


def hashed(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "rows channels"]:
    """Hashes key, row and channel to 32 bits for each value; the row's part is computed once a row."""
    first, second = jax.random.key_data(key).astype(jnp.uint32)
    rows = jax.lax.broadcasted_iota(jnp.uint32, (shape[0], 1), 0)
    channels = jax.lax.broadcasted_iota(jnp.uint32, (1, shape[1]), 1)
    by_row = jnp.broadcast_to(_mixed(_mixed(rows ^ first) ^ second), shape)
    # With the key in it, it differs between layers; else a scan over layers would store it whole.
    by_channel = jnp.broadcast_to(_mixed(channels + second), shape)
    return _mixed(by_row ^ by_channel)


def _mixed(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Mixes 32 bits so that each depends on all of them, without losing any.

    Its constants are those that C. Wellons found by search (github.com/skeeto/hash-prospector).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)
