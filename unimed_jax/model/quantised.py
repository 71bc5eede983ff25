"""Stores frozen kernels in 8 or 4 bits a number.

int8 is symmetric; nf4 is the 4-bit NormalFloat of QLoRA (arXiv 2305.14314), two codes a byte. A
kernel [..., in, out] is cut into blocks of `BLOCK` numbers along its inputs; each block has one
bfloat16 scale, so that a number takes 8.25 or 4.25 bits. Leading axes (stacked layers) are free.

Which codes a kernel gets is decided by comparisons with single float32 products, which every
platform rounds alike: a fingerprint of the codes is the same wherever they were made.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

Kind = Literal["int8", "nf4"]

BLOCK = 64  # numbers with a common scale
PARTS = ("codes", "scales")  # the arrays that a quantised kernel consists of

# The 16 numbers that NF4 codes stand for (QLoRA, appendix E), in rising order.
NF4 = np.array(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    np.float32,
)
LARGEST = 127  # of int8 codes; -128 is not used


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Stands for a kernel [..., in, out] of floats, and holds its codes and scales.

    It has the shape of the kernel and, like an array, gives the numbers themselves by `astype`.
    """

    codes: Any  # int8: int8 [..., in, out]; nf4: uint8 [..., in / 2, out]
    scales: Any  # bfloat16 [..., in / BLOCK, out]
    # in which the numbers leave the model: when they are exported, or merged with an adapter
    dtype: Any = dataclasses.field(default=np.dtype(np.float32), metadata={"static": True})

    @property
    def kind(self) -> Kind:
        return "int8" if self.codes.dtype == jnp.int8 else "nf4"

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, blocks, columns = self.scales.shape
        return (*leading, blocks * BLOCK, columns)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, index: Any) -> "Quantised":
        """Takes some of the stacked layers (or all, by `...`), which stay quantised."""
        return (
            self
            if index is ...
            else dataclasses.replace(self, codes=self.codes[index], scales=self.scales[index])
        )

    def astype(self, dtype: Any) -> Float[Array, "*layers in out"]:
        """Computes the numbers, in float32, and rounds them once to `dtype`."""
        values = self.codes.astype(jnp.float32) if self.kind == "int8" else _nf4(_unpack(self.codes))
        scales = self.scales.astype(jnp.float32)[..., None, :]  # [..., in / BLOCK, 1, out]
        return (_in_blocks(values) * scales).reshape(self.shape).astype(dtype)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.astype(self.dtype if dtype is None else dtype))


def quantise(kernel: Float[Array, "*layers in out"], kind: Kind, dtype: Any) -> Quantised:
    """Rounds a kernel to blocks of codes; `dtype` as in Quantised, and `BLOCK` divides `in`.

    Each number is at most half a step from its code's: of int8 half a scale, of nf4 0.152 scales
    (half of the widest gap between two codes) or, for the largest of a block, 1/256 of it.
    """
    blocks = _in_blocks(kernel.astype(jnp.float32))  # [..., in / BLOCK, BLOCK, out]
    largest = jnp.max(jnp.abs(blocks), axis=-2)
    scales = (largest if kind == "nf4" else largest * np.float32(1 / LARGEST)).astype(jnp.bfloat16)
    scale = scales.astype(jnp.float32)[..., None, :]  # [..., in / BLOCK, 1, out]
    scale = jnp.where(scale > 0, scale, 1)  # a block of zeros
    if kind == "nf4":
        codes = jnp.zeros(blocks.shape, jnp.uint8)
        for low, high in zip(NF4[:-1], NF4[1:], strict=True):
            codes += blocks > (low + high) / 2 * scale
        return Quantised(_pack(codes.reshape(kernel.shape)), scales, np.dtype(dtype))
    # The last bit of a quotient depends on the platform; the products below are exact.
    near = jnp.round(blocks / scale).clip(-LARGEST, LARGEST)
    up, down = blocks > (near + 0.5) * scale, blocks < (near - 0.5) * scale
    near = (near + up - down).clip(-LARGEST, LARGEST)
    return Quantised(near.astype(jnp.int8).reshape(kernel.shape), scales, np.dtype(dtype))


def described(shape: tuple[int, ...], kind: Kind, dtype: Any) -> Quantised:
    """Describes a quantised kernel of that shape by jax.ShapeDtypeStruct in place of arrays."""
    return jax.eval_shape(
        lambda kernel: quantise(kernel, kind, dtype), jax.ShapeDtypeStruct(shape, jnp.float32)
    )


def stored_like(leaf: Any, like: Any) -> Any:
    """Converts a leaf, whichever way it is stored, to the way that `like` is stored."""
    if not isinstance(like, Quantised):
        return leaf.astype(like.dtype)
    if isinstance(leaf, Quantised) and leaf.kind == like.kind:
        return dataclasses.replace(leaf, dtype=like.dtype)
    return quantise(leaf.astype(jnp.float32), like.kind, like.dtype)


def leaf_of(name: str) -> str:
    """Gives the path of the leaf that an array of a checkpoint belongs to."""
    path, _, part = name.rpartition("/")
    return path if part in PARTS else name


def _in_blocks(x: Array) -> Array:
    """Cuts [..., in, out] into [..., in / BLOCK, BLOCK, out]."""
    *leading, rows, columns = x.shape
    return x.reshape(*leading, rows // BLOCK, BLOCK, columns)


def _pack(codes: UInt8[Array, "*layers in out"]) -> UInt8[Array, "*layers half out"]:
    """Puts rows r and r + BLOCK / 2 of a block into the low and the high half of one byte."""
    *leading, rows, columns = codes.shape
    blocks = _in_blocks(codes)
    low, high = blocks[..., : BLOCK // 2, :], blocks[..., BLOCK // 2 :, :]
    return (low | high << 4).reshape(*leading, rows // 2, columns)


def _unpack(packed: UInt8[Array, "*layers half out"]) -> UInt8[Array, "*layers in out"]:
    *leading, half, columns = packed.shape
    pairs = packed.reshape(*leading, half // (BLOCK // 2), BLOCK // 2, columns)
    blocks = jnp.concatenate([pairs & 15, pairs >> 4], axis=-2)  # [..., in / BLOCK, BLOCK, out]
    return blocks.reshape(*leading, 2 * half, columns)


def _nf4(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Looks codes up in NF4 by a tree of choices, one level a bit.

    Vector units do that faster than a gather: 2.8 times on CPU.
    """
    # The first choice is between constants. As arrays they would not depend on the layer, so that a scan
    # over layers would make all 16 of them once, in a kernel's shape, and carry them along.
    ones = jnp.uint32(0) - (codes & 1).astype(jnp.uint32)  # all bits of an odd code
    bits = NF4.view(np.uint32)
    chosen = [low ^ (low ^ high) & ones for low, high in zip(bits[::2], bits[1::2], strict=True)]
    values = [jax.lax.bitcast_convert_type(each, jnp.float32) for each in chosen]
    for bit in range(1, 4):
        odd = (codes >> bit & 1) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(odd, high, low) for low, high in pairs]
    return values[0]
