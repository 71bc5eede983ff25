"""Adds the low-rank product of an adapter to a product with a kernel, as suits the hardware.

On GPUs a product of matrices is a library's kernel, around which nothing fuses: x A B would be
written as large as the result, and read again to be added. But with a rank of a few channels B is
cheaper to multiply by in the elementwise kernel that reads the result anyway (the rotation, the
activation, the residual sum), and backward A in the one that adds up the gradients of x. On TPUs and
CPUs the plain form is as good.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from unimed_jax.model.attention import hardware

MOST = 16  # channels; with more, a product of matrices costs less than reading its result
SAVED = "low_rank"  # the name of x A, which remat saves: it is small, and x need not be read again


def add_low_rank(
    y: Float[Array, "rows out"],
    x: Float[Array, "rows in"],
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    scale: float,
) -> Float[Array, "rows out"]:
    """Computes y + scale x A B; x A is scaled, while it is small."""
    if not separate(a.shape[1]):
        return y + x @ a * scale @ b
    # Without the barrier the compiler would write the sum's other term whole, so that the kernel's
    # product can add to it.
    low = checkpoint_name(_narrow(x, a) * scale, SAVED)
    return jax.lax.optimization_barrier(y) + _widen(low, b)


def separate(rank: int) -> bool:
    """Says whether products with an adapter are kept out of those with its kernel."""
    return hardware() == "nvidia" and rank <= MOST


@jax.custom_vjp
def kernel_input(x: Float[Array, "rows in"]) -> Float[Array, "rows in"]:
    """Returns x, for the product with the kernel; its gradient is added to the adapter's in one pass."""
    return x


kernel_input.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def _outer(
    low: Float[Array, "rows rank"], wide: Float[Array, "rank width"]
) -> Float[Array, "rows width"]:
    """Multiplies by elementwise operations, in float32."""
    low32, wide32 = low.astype(jnp.float32), wide.astype(jnp.float32)
    shape = (low.shape[0], wide.shape[1])
    total = jnp.zeros(shape, jnp.float32)
    for r in range(low.shape[1]):
        total += jnp.broadcast_to(low32[:, r, None], shape) * jnp.broadcast_to(wide32[r][None], shape)
    return total.astype(low.dtype)


@jax.custom_vjp
def _widen(low: Float[Array, "rows rank"], b: Float[Array, "rank out"]) -> Float[Array, "rows out"]:
    """Computes low B elementwise, and its gradients as products of matrices."""
    return _outer(low, b)


_widen.defvjp(
    lambda low, b: (_outer(low, b), (low, b)), lambda given, g: (g @ given[1].T, given[0].T @ g)
)


@jax.custom_vjp
def _narrow(x: Float[Array, "rows in"], a: Float[Array, "in rank"]) -> Float[Array, "rows rank"]:
    """Computes x A as a product of matrices, and the gradient of x elementwise."""
    return x @ a


_narrow.defvjp(lambda x, a: (x @ a, (x, a)), lambda given, g: (_outer(g, given[1].T), given[0].T @ g))
