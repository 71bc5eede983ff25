"""Computes attention: a plain form is the reference, and some devices have fused kernels.

The mask that `cache.visible` makes is data: packed segments, prefixes that several questions
share and padding differ from row to row. Fused kernels know pairs of segment ids best, but these
cannot say that a token sees two segments. So both kernels take the mask itself: 1 byte (splash) or
2 bytes (cuDNN) for each pair of tokens and row, while the plain form writes several float32 per
pair and head. Splash also skips blocks in which no query sees a key.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from unimed_jax.errors import UserError
from unimed_jax.model.sharding import spec


def attend(
    q: Float[Array, "B S heads head"],
    k: Float[Array, "B kv_heads K head"],
    v: Float[Array, "B kv_heads K head"],
    mask: Bool[Array, "B S K"] | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "xla",
) -> Float[Array, "B S heads head"]:
    """Attends with a float32 softmax; groups of heads share keys and values (GQA).

    Scores are q k times `scale` (None: head ** -0.5); with `softcap` they become softcap *
    tanh(scores / softcap). A query that sees nothing (padding) gets finite values that nothing
    reads.

    `implementation` is a name from `config.model.attention`. "auto" takes the devices' fused kernel
    if it can take these arrays, else "xla". Raises UserError if a kernel that was asked for by name
    cannot take them.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if implementation == "auto":
        able = (name for name in _FUSED if refusal(name, q, k, mask, softcap) is None)
        implementation = next(able, "xla")
    if implementation == "xla":
        return _plain(q, k, v, mask, scale, softcap)
    reason = refusal(implementation, q, k, mask, softcap)
    if reason is not None:
        raise UserError(
            f"config.model.attention={implementation!r} cannot run here: {reason}; set 'auto'.",
        )
    if mask is not None:
        # Real tokens see themselves already. Padding must too: in these kernels a softmax over
        # nothing, or its gradient, is NaN.
        mask = mask | jnp.eye(q.shape[1], dtype=bool)[None]
    kernel = functools.partial(_FUSED[implementation], scale=scale, softcap=softcap)
    return _on_each_device(kernel, q, k, v, mask)


def refusal(name: str, q: Array, k: Array, mask: Array | None, softcap: float | None) -> str | None:
    """Says why the fused kernel `name` cannot take these arrays here; None if it can."""
    length, head = q.shape[1], q.shape[3]
    here = hardware()
    if name == "splash":
        if here != "tpu":
            return f"splash is a TPU kernel, and this is a {here}"
    else:
        if here != "nvidia":
            return f"cuDNN's kernel needs an NVIDIA GPU of Ampere or later, and this is a {here}"
        if q.dtype != jnp.bfloat16:
            return f"cuDNN's kernel computes in bfloat16, and config.model.compute_dtype is {q.dtype}"
        if head % 8 or head > 128:
            return f"cuDNN's kernel takes heads of at most 128 channels, a multiple of 8, not {head}"
        if softcap is not None:
            return "cuDNN's kernel has no soft cap, and config.model.decoder.attention_softcap is set"
    if length != k.shape[2]:
        return (
            f"{length} queries meet {k.shape[2]} keys, and only rows that attend to themselves are fused"
        )
    # Under a mask cuDNN's gradients turned NaN at some lengths (pytorch issue 196678).
    multiple = 1 if name == "cudnn" and mask is None else 128
    if length % multiple:
        return f"rows of {length} tokens are not a multiple of {multiple}"
    return None


def hardware() -> str:
    """Names what the program is traced for: "tpu", "nvidia" (Ampere or later), or another platform.

    The mesh in context decides, because a program may be compiled for devices that this machine
    lacks; without a mesh, the default device decides.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if described.platform == "gpu" and jax.devices()[0].platform != "gpu":
        # A card that this machine lacks is known by its name; those of plan/chips.py are new enough.
        return "nvidia" if "NVIDIA" in described.device_kind else "gpu"
    if described.platform == "gpu":
        # "8.0" on NVIDIA, "gfx90a" on AMD
        major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
        return "nvidia" if major.isdigit() and int(major) >= 8 else "gpu"
    return described.platform


def _on_each_device(
    run: Callable[..., Array],
    q: Float[Array, "B S heads head"],
    k: Float[Array, "B kv_heads K head"],
    v: Float[Array, "B kv_heads K head"],
    mask: Bool[Array, "B S K"] | None,
) -> Float[Array, "B S heads head"]:
    """Runs a kernel on each device's own rows and heads; the compiler cannot split it over a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q, k, v, mask)
    rows, heads = spec(k.shape[:2], ("batch", "heads"), dict(mesh.shape))
    split_q, split_k = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
    return jax.shard_map(
        run,
        in_specs=(split_q, split_k, split_k, PartitionSpec(rows)),
        out_specs=split_q,
        check_vma=False,  # Pallas kernels do not say how their outputs vary
    )(q, k, v, mask)


def _plain(
    q: Float[Array, "B S heads head"],
    k: Float[Array, "B kv_heads K head"],
    v: Float[Array, "B kv_heads K head"],
    mask: Bool[Array, "B S K"] | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B S heads head"]:
    """Attends by two batched products; G groups of R heads each share their keys."""
    batch, length, heads, head = q.shape
    groups, keys = k.shape[1], k.shape[2]
    repeats = heads // groups
    # Plain batched products over contiguous [rows, head] blocks: 2.4 x as fast on CPU as a 5-axis
    # einsum.
    q = q.reshape(batch, length, groups, repeats, head).transpose(0, 2, 3, 1, 4)  # [B, G, R, S, d]
    q = q.reshape(batch, groups, repeats * length, head) * scale  # [B, G, R * S, d]
    scores = jnp.einsum("bgsd,bgkd->bgsk", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        scores = scores.reshape(batch, heads, length, keys)  # [B, heads, S, K]
        scores = jnp.where(mask[:, None], scores, -1e30)
        scores = scores.reshape(batch, groups, repeats * length, keys)  # [B, G, R * S, K]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum(
        "bgsk,bgkd->bgsd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    out = out.reshape(batch, groups, repeats, length, head)  # [B, G, R, S, d]
    out = out.transpose(0, 3, 1, 2, 4)  # [B, S, G, R, d]
    return out.reshape(batch, length, heads, head)  # [B, S, heads, d]


def _cudnn(
    q: Float[Array, "B S heads head"],
    k: Float[Array, "B kv_heads S head"],
    v: Float[Array, "B kv_heads S head"],
    mask: Bool[Array, "B S S"] | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B S heads head"]:
    """Runs cuDNN's kernel, through jax.nn."""
    assert softcap is None  # `refusal` says so before
    if q.shape[1] % 2:
        return _cudnn_forward(q, k, v, scale)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, S, kv_heads, d]
    mask = None if mask is None else mask[:, None]  # [B, 1, S, S]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cudnn_forward(
    q: Float[Array, "B S heads head"],
    k: Float[Array, "B kv_heads S head"],
    v: Float[Array, "B kv_heads S head"],
    scale: float,
) -> Float[Array, "B S heads head"]:
    """Runs cuDNN's kernel for an odd number of tokens, as a class token and patches are.

    Its gradients take only even numbers, so what is differentiated is the plain form; a frozen
    encoder is not.
    """
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, S, kv_heads, d]
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")


_cudnn_forward.defvjp(
    lambda q, k, v, scale: jax.vjp(lambda q, k, v: _plain(q, k, v, None, scale, None), q, k, v),
    lambda scale, pull, g: pull(g),
)


def _splash(
    q: Float[Array, "B S heads head"],
    k: Float[Array, "B kv_heads S head"],
    v: Float[Array, "B kv_heads S head"],
    mask: Bool[Array, "B S S"] | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B S heads head"]:
    """Runs the Pallas kernel for TPUs, row by row; `interpret` runs it on a CPU, for tests."""
    # Imported here, because it loads a compiler.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q.shape[1:3]
    # Every block costs a step of the grid even when it is skipped, so the largest size that divides
    # the row.
    block = next(size for size in (512, 256, 128) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def row(q, k, v, mask):
        """Attends one row: q [S, heads, d], k and v [kv_heads, S, d], mask [S, S] -> [S, heads, d]."""
        everything = splash.MultiHeadMask([splash.FullMask((length, length))] * heads)
        seen = everything if mask is None else mask[None]  # [1, S, S]: one for all heads
        kernel = splash.make_splash_mha_single_device(
            seen, block_sizes=sizes, attn_logits_soft_cap=softcap, interpret=interpret
        )
        # Under jit, make_splash_mha turns this flag into an array, on which its caller then cannot
        # branch.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=None)
        return kernel(q.transpose(1, 0, 2), k, v).transpose(1, 0, 2)  # [S, heads, d]

    return jax.vmap(row)(q * scale, k, v, mask)


_FUSED: dict[str, Callable[..., Array]] = {"cudnn": _cudnn, "splash": _splash}
