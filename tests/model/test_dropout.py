"""What dropout keeps on accelerators: as many as asked for, independent of neighbours and of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unimed_jax.config import LoraConfig, MeshConfig
from unimed_jax.model import dropout, sharding
from unimed_jax.model.layers import Linear

SHAPE = (512, 384)


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(dropout, "hardware", lambda: "tpu")


def mask(seed: int, share: float = 0.5) -> np.ndarray:
    return np.asarray(dropout.kept(jax.random.key(seed), share, SHAPE))


def test_a_cpu_draws_as_before():
    expected = jax.random.bernoulli(jax.random.key(3), 0.9, SHAPE)
    np.testing.assert_array_equal(mask(3, 0.9), expected)


def test_the_share_that_is_kept(accelerator):
    for share in (0.05, 0.5, 0.95):
        kept = mask(0, share)
        spread = (share * (1 - share) / kept.size) ** 0.5
        assert abs(kept.mean() - share) < 4 * spread
        for axis in (0, 1):  # no row or channel is kept much more often than another
            sizes = kept.mean(axis=axis)
            expected = (share * (1 - share) / SHAPE[axis]) ** 0.5
            assert 0.9 < sizes.std() / expected < 1.1
    assert mask(0, 1.0).all()


def test_values_and_keys_are_independent(accelerator):
    """Correlations of neighbours, of far values and of consecutive keys are those of chance."""
    signs = 2.0 * mask(0) - 1
    bound = 4 / signs.size**0.5
    for rows, channels in ((0, 1), (1, 0), (1, 1), (0, 128), (256, 0), (1, 383)):
        moved = np.roll(signs, (rows, channels), axis=(0, 1))
        assert abs((signs * moved).mean()) < bound, (rows, channels)
    keys = [jax.random.key(0), jax.random.key(1), *jax.random.split(jax.random.key(0), 3)]
    keys += [jax.random.fold_in(jax.random.key(9), n) for n in range(3)]
    drawn = [2.0 * np.asarray(dropout.kept(key, 0.5, SHAPE)) - 1 for key in keys]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs((one * other).mean()) < bound
    bits = np.asarray(dropout.hashed(jax.random.key(7), SHAPE))
    shares = [(bits >> n & 1).mean() for n in range(32)]
    assert np.abs(np.array(shares) - 0.5).max() < bound
    assert len(np.unique(bits)) > 0.9999 * bits.size
    # Each half of a key matters by itself, for rows and channels alike.
    halves = [jax.random.wrap_key_data(jnp.array(pair, jnp.uint32)) for pair in ((1, 2), (3, 2), (1, 4))]
    signs, *others = [2.0 * np.asarray(dropout.kept(key, 0.5, SHAPE)) - 1 for key in halves]
    for other in others:
        assert abs((signs * other).mean()) < bound


def test_a_mesh_draws_the_same(accelerator):
    """Each device draws the values of its own rows, and of any two meshes they are equal."""
    mesh = sharding.make_mesh(MeshConfig(auto=False, data=4, tensor=2), 8)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    drawn = jax.jit(lambda: dropout.kept(jax.random.key(5), 0.5, SHAPE), out_shardings=place)
    np.testing.assert_array_equal(drawn(), mask(5))
    text = drawn.lower().compile().as_text()
    assert "all-gather" not in text and "u32[512,384]" not in text


def test_adapters_keep_their_mean(accelerator):
    linear = Linear(64, 16, lora=LoraConfig(rank=2, dropout=0.25), rngs=nnx.Rngs(0))
    linear.kernel[...] *= 0
    linear.lora_b[...] = jnp.ones((2, 16))
    x = jnp.ones((4096, 64))
    dropped, plain = linear(x, jax.random.key(0)), linear(x)
    assert (dropped[:, 0] != plain[:, 0]).mean() > 0.99
    np.testing.assert_allclose(dropped.mean(axis=0), plain.mean(axis=0), rtol=0.05, atol=0.02)
