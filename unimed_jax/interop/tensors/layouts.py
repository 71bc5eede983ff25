"""Defines layouts, each of which converts blocks of our leaves to published tensors and back."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
# a start and a stop in every dimension of a leaf, or of an entry's block of it
Region = tuple[slice, ...]
ALL = slice(None)


class Layout(NamedTuple):
    """Converts between a block of one of our leaves and the tensor that a file publishes for it."""

    published_shape: Callable[[Shape], Shape]  # from our block's shape
    # A region of our block -> the region of the published tensor to read, and the part to keep after
    # `to_ours` (() keeps all): a layout that cannot be cut exactly reads more than it needs.
    to_read: Callable[[Region], tuple[Region, Region]]
    to_ours: Callable[[np.ndarray, int], np.ndarray]  # the second argument is Entry.heads
    to_published: Callable[[np.ndarray, int], np.ndarray]


def _patch_shape(block: Shape) -> Shape:
    side = math.isqrt(block[0] // 3)
    return (block[1], 3, side, side)


def _patch_to_ours(tensor: np.ndarray, _: int) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])  # [p * p * 3, out]


def _patch_to_published(block: np.ndarray, _: int) -> np.ndarray:
    side = math.isqrt(block.shape[0] // 3)
    return block.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)  # [out, 3, p, p]


def _pairs_to_ours(tensor: np.ndarray, heads: int) -> np.ndarray:
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])  # [heads, d / 2, 2, in]
    return pairs.swapaxes(1, 2).reshape(tensor.shape).T  # [in, heads * d]


def _pairs_to_published(block: np.ndarray, heads: int) -> np.ndarray:
    tensor = block.T  # [heads * d, in]
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])  # [heads, 2, d / 2, in]
    return halves.swapaxes(1, 2).reshape(tensor.shape)  # [heads * d, in]


LAYOUTS: dict[str, Layout] = {
    "same": Layout(
        published_shape=lambda block: block,
        to_read=lambda region: (region, ()),
        to_ours=lambda tensor, _: tensor,
        to_published=lambda block, _: block,
    ),
    # [out, in] <-> [in, out]
    "transpose": Layout(
        published_shape=lambda block: block[::-1],
        to_read=lambda region: (region[::-1], ()),
        to_ours=lambda tensor, _: tensor.T,
        to_published=lambda block, _: block.T,
    ),
    # [1, 1, c] <-> [c]
    "row": Layout(
        published_shape=lambda block: (1, 1, *block),
        to_read=lambda region: ((ALL, ALL, *region), ()),
        to_ours=lambda tensor, _: tensor.reshape(-1),
        to_published=lambda block, _: block[None, None],
    ),
    # [1, n, c] <-> [n, c]
    "batch": Layout(
        published_shape=lambda block: (1, *block),
        to_read=lambda region: ((ALL, *region), ()),
        to_ours=lambda tensor, _: tensor[0],
        to_published=lambda block, _: block[None],
    ),
    # A convolution over patches, [out, 3, p, p] <-> [p * p * 3, out].
    "patch": Layout(
        published_shape=_patch_shape,
        to_read=lambda region: ((region[1],), (region[0],)),
        to_ours=_patch_to_ours,
        to_published=_patch_to_published,
    ),
    # GGUF's queries and keys, [heads * (d / 2, 2), in] <-> [in, heads * (2, d / 2)]: a file holds the
    # two channels of a rotary pair next to each other, we hold the first channels of all pairs, then
    # the second. Of a bias the dimension `in` is absent.
    "pairs": Layout(
        published_shape=lambda block: block[::-1],
        to_read=lambda region: ((ALL, *region[:-1]), (*(ALL for _ in region[:-1]), region[-1])),
        to_ours=_pairs_to_ours,
        to_published=_pairs_to_published,
    ),
}
