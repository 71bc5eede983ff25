"""Adapters as GPUs compute them equal the plain form, in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import tiny

from unimed_jax.config import LoraConfig, LossConfig
from unimed_jax.model import low_rank
from unimed_jax.model.layers import ACTIVATIONS, REMAT, Linear
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.quantised import quantise
from unimed_jax.train.loss import loss_sums

pytestmark = pytest.mark.usefixtures("quick_compiles")

RANK = 3


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(low_rank, "hardware", lambda: "nvidia")


def linear(rank: int = RANK, dtype=jnp.float32, quantised: bool = False) -> Linear:
    lora = LoraConfig(rank=rank, alpha=2.0, dropout=0.25)
    made = Linear(64, 10, lora=lora, rngs=nnx.Rngs(0))
    made.lora_b = nnx.Param(jnp.asarray(np.random.default_rng(1).standard_normal((rank, 10)), dtype))
    if quantised:
        made.kernel = nnx.Param(quantise(made.kernel[...], "int8", np.float32))
    return made


def values_and_gradients(layer: Linear, x, key):
    """-> output, and the gradients of a weighted sum by x, kernel (unless quantised), bias, A and B."""
    weights = jnp.cos(jnp.arange(10.0))[None, None].astype(x.dtype)
    trained = {name: getattr(layer, name)[...] for name in ("bias", "lora_a", "lora_b")}
    if isinstance(layer.kernel[...], jax.Array):
        trained["kernel"] = layer.kernel[...]

    def run(x, leaves):
        own = nnx.clone(layer)
        for name, leaf in leaves.items():
            setattr(own, name, nnx.Param(leaf))
        out = own(x, key)
        return (out * weights).sum(dtype=jnp.float32), out

    (_, out), grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(x, trained)
    return out, grads


@pytest.mark.parametrize("case", ["no dropout", "dropout", "quantised", "bfloat16"])
def test_equals_the_plain_form(monkeypatch, case):
    dtype = jnp.bfloat16 if case == "bfloat16" else jnp.float32
    layer = linear(quantised=case == "quantised")
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 7, 64)), dtype)
    key = jax.random.key(3) if case == "dropout" else None
    expected, wanted = values_and_gradients(layer, x, key)
    outer, seen = low_rank._outer, []
    monkeypatch.setattr(low_rank, "hardware", lambda: "nvidia")
    monkeypatch.setattr(low_rank, "_outer", lambda *a: (seen.append(a[1].shape), outer(*a))[1])
    actual, grads = values_and_gradients(layer, x, key)
    assert seen == [(RANK, 10), (RANK, 64)]  # forward by B, backward by A
    tolerance = 0.02 if case == "bfloat16" else 2e-6
    for own, other in zip(
        jax.tree.leaves((actual, grads)), jax.tree.leaves((expected, wanted)), strict=True
    ):
        own, other = np.asarray(own, np.float32), np.asarray(other, np.float32)
        scale = np.abs(other).max()
        assert scale > 0.1
        np.testing.assert_allclose(own, other, rtol=0, atol=tolerance * scale)


def test_many_channels_take_the_plain_form(on_gpu, monkeypatch):
    monkeypatch.setattr(low_rank, "_outer", None)  # calling it would raise
    layer = linear(rank=low_rank.MOST + 1)
    values_and_gradients(layer, jnp.ones((1, 2, 64)), None)
    with pytest.raises(TypeError):
        values_and_gradients(linear(rank=low_rank.MOST), jnp.ones((1, 2, 64)), None)


def test_remat_does_not_compute_the_small_product_again(on_gpu):
    layer, x = linear(), jnp.ones((4, 64))

    def products(policy):
        def run(b):
            own = nnx.clone(layer)
            own.lora_b = nnx.Param(b)
            return jnp.sin(own(x)).sum()

        run = jax.checkpoint(run, policy=policy)
        return str(jax.make_jaxpr(jax.grad(run))(layer.lora_b[...])).count("dot_general")

    assert products(REMAT["full"]) == products(None) - 1


@pytest.mark.slow
def test_gradients_of_a_decoder_with_remat(monkeypatch):
    """Of adapters, kernels and what lies below the decoder, with dropout, layers computed again."""
    settings = dataclasses.replace(tiny.config(vision={"depth": 1}, lora={"dropout": 0.5}), remat="full")
    leaves = parameters(tiny.model(settings))
    parts = ("decoder/layers/attention/q/", "decoder/layers/mlp/", "connector/experts/bias")
    given = {path: leaf for path, leaf in leaves.items() if path.startswith(parts)}
    batch = tiny.mixed_batch(np.random.default_rng(0))

    def gradients():
        def loss(given):
            model = with_parameters(tiny.abstract(settings), {**leaves, **given})
            return loss_sums(model, batch, LossConfig(reduction="token"), None, jax.random.key(0))[0]

        return jax.jit(jax.grad(loss))(given)

    expected = gradients()
    monkeypatch.setattr(low_rank, "hardware", lambda: "nvidia")
    assert low_rank.separate(settings.lora.rank)
    for path, own in gradients().items():
        scale = np.abs(np.asarray(expected[path])).max()
        assert scale > 0, path
        np.testing.assert_allclose(own, expected[path], rtol=0, atol=1e-5 * scale, err_msg=path)


def test_gelu_in_16_bits_is_the_exact_one_rounded():
    x = jnp.linspace(-9, 9, 4001).astype(jnp.bfloat16)
    exact = np.asarray(jax.nn.gelu(x.astype(jnp.float32), approximate=False))
    np.testing.assert_allclose(
        np.asarray(ACTIVATIONS["gelu"](x), np.float32), exact, rtol=2**-8, atol=1e-6
    )
    slope = jax.vmap(jax.grad(lambda x: ACTIVATIONS["gelu"](x).astype(jnp.float32)))(x)
    steep = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x.astype(jnp.float32))
    np.testing.assert_allclose(np.asarray(slope, np.float32), steep, rtol=2**-7, atol=1e-5)
