"""Products of blocks with the kernels of their owners: every platform's way against the plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from unimed_jax.config import MeshConfig, MoeConfig
from unimed_jax.model import grouped, sharding
from unimed_jax.model.dispatch import way_of
from unimed_jax.model.grouped import block_product, gradient_tiles, tiles, way

pytestmark = pytest.mark.usefixtures("quick_compiles")

OWNERS = {
    "all experts": [0, 0, 1, 2, 2, 3],
    "one has everything, two blocks are empty": [1, 1, 1, 1, 4, 4],
    "none has any": [4] * 6,
    "two have none": [0, 3, 3, 4, 4, 4],
}


@pytest.mark.parametrize("small_tiles", [False, True], ids=["whole", "several tiles"])
def test_ways_agree(monkeypatch, small_tiles):
    """Values and both gradients to float32 rounding, by the largest difference of each expert."""
    if small_tiles:  # no tile is the whole of a product
        monkeypatch.setattr(grouped, "_CORE_MEMORY", 0)
        monkeypatch.setattr(grouped, "_INNER", 128)
        assert tiles(128, 256, 384, 4) == gradient_tiles(128, 256, 384, 4) == (128, 128)
    rng = np.random.default_rng(0)
    shapes = ((6, 128, 256), (6, 128, 384), (4, 256, 384))
    x, cotangent, kernels = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)

    @jax.jit
    def run(owners):
        found = {}
        for name in grouped.SHOWN:

            def product(x, kernels, name=name):
                return block_product(x, kernels, owners, name)

            y, gradients = jax.vjp(product, x, kernels)
            found[name] = (y, *gradients(cotangent))
        return found

    with jax.default_matmul_precision("highest"):
        for case, owners in OWNERS.items():
            found = run(jnp.array(owners, jnp.int32))
            for name in ("experts", "megablox"):
                for actual, expected in zip(found[name], found["blocks"], strict=True):
                    for part, part_ in zip(actual, expected, strict=True):  # of a block or an expert
                        assert np.abs(part - part_).max() <= 1e-5 * np.abs(part_).max(), (case, name)
            y, dx, dkernels = found["blocks"]
            for e in range(4):
                assert np.any(dkernels[e]) == (e in owners)
            for m, owner in enumerate(owners):
                assert np.any(y[m]) == np.any(dx[m]) == (owner < 4)


@pytest.mark.parametrize(
    "platform, expected", [("cpu", "blocks"), ("nvidia", "experts"), ("gpu", "experts")]
)
def test_way_of_a_platform(monkeypatch, platform, expected):
    monkeypatch.setattr(grouped, "hardware", lambda: platform)
    assert way(jnp.bfloat16, 2048, 5632) == expected


def test_rows_of_a_block(monkeypatch):
    """Those that four experts may leave empty are at most half of the tokens, once these are many."""
    cases = {
        ("cpu", "blocks"): {8: 8, 64: 32, 2048: 64, 65536: 64},
        ("nvidia", "experts"): {8: 8, 64: 32, 2048: 256, 8192: 512, 16384: 1024, 1 << 20: 1024},
        ("tpu", "megablox"): {8: 128, 1024: 256, 65536: 256},
    }
    for (platform, name), sizes in cases.items():
        monkeypatch.setattr(grouped, "hardware", lambda platform=platform: platform)
        assert {n: grouped.block_rows(n, 4, name) for n in sizes} == sizes
        for n, size in sizes.items():
            assert n < 2048 or 4 * size <= n / 2


def test_way_of_a_model(monkeypatch):
    """A mesh that splits the hidden units leaves parts that megablox may not be able to take."""
    model = dataclasses.replace(tiny.CONFIG, compute_dtype="bfloat16")
    assert way_of(model) is None  # it has no experts
    decoder = dataclasses.replace(model.decoder, width=128, mlp_width=256)
    with_experts = dataclasses.replace(model, decoder=decoder, moe=MoeConfig(experts=2))
    assert way_of(with_experts) == "blocks"
    dense = dataclasses.replace(with_experts, moe=MoeConfig(experts=2, path="dense"))
    assert way_of(dense) is None
    monkeypatch.setattr(grouped, "hardware", lambda: "tpu")
    assert way_of(with_experts) == "megablox"
    with sharding.inside(sharding.make_mesh(MeshConfig(auto=False, data=2, tensor=4), rows=8)):
        assert way_of(with_experts) == "experts"


@pytest.mark.parametrize(
    "dtype, width, hidden, words",
    [
        (jnp.bfloat16, 2048, 5632, None),
        (jnp.float32, 2560, 10240, None),
        (jnp.float16, 2048, 5632, "float16"),
        (jnp.bfloat16, 2048, 1000, "2048 x 1000"),
    ],
)
def test_way_of_tpus(monkeypatch, dtype, width, hidden, words):
    monkeypatch.setattr(grouped, "hardware", lambda: "tpu")
    reason = grouped.megablox_refusal(dtype, width, hidden)
    assert (reason is None) if words is None else words in reason
    assert way(dtype, width, hidden) == ("experts" if reason else "megablox")


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("inner, outer", [(2048, 5632), (5632, 2048), (2560, 10240), (10240, 2560)])
def test_tiles_of_published_sizes(inner, outer, item):
    """They divide the sizes and leave half of a TPU v5e's 16 MiB for what the compiler adds."""
    for choose in (tiles, gradient_tiles):
        k, n = choose(256, inner, outer, item)
        assert inner % k == 0 == outer % n and k % 128 == 0 == n % 128
        assert 2 * item * (256 * k + 256 * n + k * n) <= 12 * 2**20
    assert tiles(256, inner, outer, item)[0] >= 512
