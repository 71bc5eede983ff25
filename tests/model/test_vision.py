"""The vision encoder: biases, positions, patches, pixels (published towers: test_interop_towers.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import tiny

from unimed_jax.interop.tensors.table import LAYOUTS
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.vision import (
    VisionEncoder,
    normalise,
    patchify,
    resize_positions,
    sincos_positions,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"

encode = jax.jit(lambda vision, images: vision(images))


def pictures(count=2):
    return np.random.default_rng(5).standard_normal((count, 16, 16, 3)).astype(np.float32)


def vision(seed=0, **fields):
    return tiny.model(tiny.config(vision=fields), seed).vision


def test_qkv_biases():
    """qv: no bias on k (EVA); a bias on k shifts all scores of a query alike and so changes nothing."""
    has = {
        kind: {p for p in parameters(vision(qkv_bias=kind)) if "_bias" in p}
        for kind in ("none", "qv", "qkv")
    }
    q, k, v = (f"blocks/attention/{n}_bias" for n in "qkv")
    assert has == {"none": set(), "qv": {q, v}, "qkv": {q, k, v}}
    full = vision(qkv_bias="qkv")
    leaves = parameters(full)
    out = {"qkv": encode(full, pictures())}
    for kind in ("qv", "none"):
        model = vision(qkv_bias=kind)
        out[kind] = encode(with_parameters(model, {p: leaves[p] for p in parameters(model)}), pictures())
    np.testing.assert_allclose(out["qv"], out["qkv"], rtol=0, atol=1e-5)
    assert np.abs(np.asarray(out["none"] - out["qv"])).max() > 1e-2


def test_patchify_is_a_convolution():
    torch = pytest.importorskip("torch", reason=NEEDS)
    weight = np.random.default_rng(1).standard_normal((12, 3, 4, 4)).astype(np.float32)
    pixels = pictures().transpose(0, 3, 1, 2).copy()  # [N, 3, H, W]
    expected = torch.nn.functional.conv2d(torch.tensor(pixels), torch.tensor(weight), stride=4)
    kernel = LAYOUTS["patch"].to_ours(weight, 0)
    ours = np.asarray(patchify(pictures(), 4)) @ kernel
    np.testing.assert_allclose(ours, expected.flatten(2).transpose(1, 2).numpy(), rtol=0, atol=1e-5)


def test_patchify_by_hand():
    """Patch 1 is right of patch 0; within a patch row, column, channel."""
    image = np.arange(4 * 4 * 3).reshape(1, 4, 4, 3)
    patches = np.asarray(patchify(image, 2))
    np.testing.assert_array_equal(patches[0, 1], image[0, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(patches[0, 2], image[0, 2:, :2].reshape(-1))


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("old, new", [(4, 7), (7, 4), (4, 16), (5, 5)])
def test_position_resize_is_bicubic(old, new, extra):
    torch = pytest.importorskip("torch", reason=NEEDS)
    table = np.random.default_rng(2).standard_normal((extra + old * old, 6)).astype(np.float32)
    grid = torch.tensor(table[extra:]).reshape(1, old, old, 6).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    expected = grid.permute(0, 2, 3, 1).reshape(new * new, 6).numpy()
    resized = resize_positions(table, new, extra)
    np.testing.assert_array_equal(resized[:extra], table[:extra])
    np.testing.assert_allclose(resized[extra:], expected, rtol=0, atol=1e-5)


def test_position_resize_to_the_same_grid_is_the_identity():
    table = np.random.default_rng(2).standard_normal((17, 6)).astype(np.float32)
    assert (resize_positions(table, 4, 1) == table).all()


def test_sincos_positions():
    """Every patch has its own; neighbours are closer than strangers.

    Rows in the first half of the channels.
    """
    table = sincos_positions(8, 16)
    assert table.shape == (64, 16) and table.dtype == np.float32
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert (distance[~np.eye(64, dtype=bool)] > 0.1).all()
    assert distance[0, 1] < distance[0, 3] and distance[0, 8] < distance[0, 24]
    np.testing.assert_array_equal(table[0, :8], table[7, :8])  # one row
    np.testing.assert_array_equal(table[0, 8:], table[56, 8:])  # one column
    settings = tiny.config(vision={"position_init": "sincos"})
    built = jax.jit(lambda key: VisionEncoder(settings.vision, nnx.Rngs(key)))(jax.random.key(0))
    np.testing.assert_array_equal(built.positions[...][1:], sincos_positions(4, 12))


def test_feature_layer_counts_from_the_end():
    """The output of the last block but one is that of an encoder without the last block, which is
    not built.
    """
    deep, shallow = (vision(depth=3, feature_layer=-2), vision(depth=2))
    assert parameters(deep)["blocks/up/kernel"].shape[0] == 2
    same = with_parameters(deep, parameters(shallow))
    np.testing.assert_array_equal(encode(same, pictures()), encode(shallow, pictures()))


def test_pixels_of_each_picture_by_itself():
    """Dark and bright pictures become alike, channel by channel; what is the same all over is 0."""
    config = dataclasses.replace(tiny.CONFIG.vision, normalise="picture")
    pixels = np.random.default_rng(3).integers(0, 120, (2, 3, 6, 4, 3)).astype(np.uint8)
    found = np.asarray(normalise(jnp.asarray(pixels), config, "float32"))
    np.testing.assert_allclose(found.mean((2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(found.std((2, 3)), 1, atol=1e-5)
    brighter = np.asarray(normalise(jnp.asarray(2 * pixels + 9), config, "float32"))
    np.testing.assert_allclose(brighter, found, atol=1e-5)
    flat = jnp.full((1, 4, 4, 3), 200, jnp.uint8)
    assert not np.asarray(normalise(flat, config, "float32")).any()
    as_given = jnp.asarray(found)
    np.testing.assert_array_equal(normalise(as_given, config, "float32"), found)


def test_pixels():
    """uint8 becomes (x / 255 - mean) / std; floats are taken as they are."""
    config = tiny.CONFIG.vision
    pixels = np.random.default_rng(3).integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)
    mean, std = (np.asarray(values, np.float32) for values in (config.mean, config.std))
    expected = (pixels / np.float32(255) - mean) / std
    np.testing.assert_allclose(
        normalise(jnp.asarray(pixels), config, "float32"), expected, rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(normalise(jnp.asarray(expected), config, "float32"), expected)
    exact = dataclasses.replace(config, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    one = normalise(jnp.asarray([[[[0, 255, 51]]]], jnp.uint8), exact, "float32")
    np.testing.assert_allclose(one[0, 0, 0], [-1.0, 3.0, 0.2], rtol=1e-6)
    assert normalise(jnp.asarray(pixels), config, "bfloat16").dtype == jnp.bfloat16
    other = dataclasses.replace(config, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(
        normalise(jnp.asarray(pixels), other, "float32"), pixels / 127.5 - 1, atol=1e-6
    )
