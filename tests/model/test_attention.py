"""Fused kernels equal the plain form in values and gradients and are chosen where they can run.

Remat saves memory.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support import tiny

from unimed_jax.config import LossConfig
from unimed_jax.errors import UserError
from unimed_jax.model import attention
from unimed_jax.model.attention import attend
from unimed_jax.model.cache import Span, visible
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.sharding import MESH_AXES
from unimed_jax.train.loss import loss_sums

pytestmark = pytest.mark.usefixtures("quick_compiles")

LENGTH = 384  # three blocks of 128
NVIDIA = jax.default_backend() == "gpu" and "NVIDIA" in jax.devices()[0].device_kind


def span_of_rows() -> Span:
    """Two rows: questions after a shared prefix, then examples of one segment.

    A last block that is all padding.
    """
    rows = [
        [(70, 1, 1), (60, 2, 1), (40, 3, 1), (50, 4, 4), (164, 0, 0)],
        [(200, 1, 1), (30, 2, 2), (20, 3, 2), (61, 4, 2), (73, 0, 0)],
    ]  # (tokens, segment, prefix)
    segments = [np.concatenate([np.full(n, segment) for n, segment, _ in row]) for row in rows]
    prefixes = [np.concatenate([np.full(n, prefix) for n, _, prefix in row]) for row in rows]
    positions = []
    for row in rows:
        lengths = {segment: n for n, segment, _ in row}  # a question goes on where its prefix ends
        starts = [0 if segment == prefix else lengths[prefix] for _, segment, prefix in row]
        positions.append(
            np.concatenate([start + np.arange(n) for start, (n, _, _) in zip(starts, row, strict=True)])
        )
    return Span(*(jnp.asarray(np.stack(x), jnp.int32) for x in (positions, segments, prefixes)))


def arrays(dtype=jnp.float32, heads=4, kv_heads=2, head=16, length=LENGTH, keys=None, rows=2):
    rng = np.random.default_rng(0)
    shapes = (
        (rows, length, heads, head),
        (rows, kv_heads, keys or length, head),
        (rows, kv_heads, keys or length, head),
    )
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def values_and_gradients(arrays, mask, real, **how):
    """-> the outputs at real tokens, all outputs, and the gradients by q, k and v of a sum weighted
    at random.
    """
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape), jnp.float32)

    def run(q, k, v):
        out = attend(q, k, v, mask, **how)
        return jnp.sum(jnp.where(real[..., None, None], out, 0).astype(jnp.float32) * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return jnp.where(real[..., None, None], out, 0), out, gradients


def assert_same(arrays, mask, real, tolerance, reference=None, implementation="splash", **how):
    actual, everywhere, gradients = values_and_gradients(
        arrays, mask, real, implementation=implementation, **how
    )
    expected, _, wanted = values_and_gradients(reference or arrays, mask, real, **how)
    assert np.isfinite(np.asarray(everywhere, np.float32)).all()  # padding too
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, rtol=0, atol=tolerance)
    for own, other in zip(gradients, wanted, strict=True):
        scale = np.abs(np.asarray(other, np.float32)).max()
        assert scale > 0.5  # of a size at which the tolerance says something
        np.testing.assert_allclose(np.asarray(own, np.float32), other, rtol=0, atol=tolerance * scale)


@pytest.fixture
def on_tpu(monkeypatch):
    """Splash as on a TPU, interpreted; -> the shapes of the queries that it was given."""
    seen = []

    def interpreted(q, *rest, **how):
        seen.append(q.shape)
        return attention._splash(q, *rest, **how, interpret=True)

    monkeypatch.setattr(attention, "hardware", lambda: "tpu")
    monkeypatch.setitem(attention._FUSED, "splash", interpreted)
    return seen


# ---------------------------------------------------------------------------------------------
# Fused against plain
# ---------------------------------------------------------------------------------------------

CASES = {
    "shared prefixes, padding, grouped heads": {},
    "a window of positions": {"window": 40},
    "a soft cap": {"softcap": 0.7},
    "a scale and a soft cap": {"scale": 0.6, "softcap": 0.7},
    "no mask": {"masked": False},
}


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_plain(on_tpu, case):
    settings = {"window": 0, "scale": None, "softcap": None, "masked": True} | CASES[case]
    span = span_of_rows()
    mask = visible(span, span, window=settings["window"]) if settings["masked"] else None
    real = span.segments != 0 if settings["masked"] else jnp.ones((2, LENGTH), bool)
    assert_same(arrays(), mask, real, 2e-6, scale=settings["scale"], softcap=settings["softcap"])
    assert on_tpu


def test_splash_on_a_mesh(on_tpu):
    """Every device has its own rows and heads.

    The key heads (2) split over 2 devices, the rows over 2.
    """
    span = span_of_rows()
    mesh = jax.make_mesh(
        (2, 1, 2, 1), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4, devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
        assert_same(arrays(), visible(span, span), span.segments != 0, 2e-6)
    assert set(on_tpu) == {(1, LENGTH, 2, 16)}


def test_decoder_with_splash(on_tpu):
    """The whole decoder under its scan, with adapters: hidden states and every parameter's gradient."""
    settings = tiny.config(decoder={"depth": 5})
    plain = tiny.model(settings)
    span = span_of_rows()
    tokens = np.random.default_rng(2).integers(0, settings.decoder.vocab, (2, LENGTH))
    weights = (
        np.random.default_rng(3).standard_normal((2, LENGTH, 16))
        * (np.asarray(span.segments) != 0)[..., None]
    )

    def gradients(model):
        def loss(leaves):
            decoder = with_parameters(model, leaves).decoder
            hidden, *_ = decoder(decoder.embed(tokens, jnp.float32), span)
            return jnp.sum(hidden * weights)

        leaves = {path: leaf for path, leaf in parameters(plain).items() if path.startswith("decoder/")}
        return jax.jit(jax.value_and_grad(loss))(leaves)

    expected, wanted = gradients(plain)
    fused = with_parameters(
        tiny.abstract(dataclasses.replace(settings, attention="splash")), parameters(plain)
    )
    actual, own = gradients(fused)
    assert on_tpu
    assert actual == pytest.approx(float(expected), rel=1e-5)
    for path, gradient in wanted.items():
        worst = np.abs(np.asarray(own[path] - gradient)).max() / max(
            np.abs(np.asarray(gradient)).max(), 1e-3
        )
        assert worst < 1e-4, path


@pytest.mark.skipif(not NVIDIA, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("length", [LENGTH, 196, 257], ids=["masked", "no mask", "an odd length"])
def test_cudnn_equals_plain(length, scale):
    """bfloat16 against the plain form in float32: values to 2 %, gradients to 2 % of the largest."""
    span, masked = span_of_rows(), length == LENGTH
    given = arrays(jnp.bfloat16, head=64, length=length)
    mask, real = (
        (visible(span, span), span.segments != 0) if masked else (None, jnp.ones((2, length), bool))
    )
    reference = tuple(x.astype(jnp.float32) for x in given)
    assert_same(given, mask, real, 0.02, reference=reference, scale=scale, implementation="cudnn")


def test_an_odd_length_is_fused_unless_it_is_differentiated(monkeypatch):
    """An image with a class token: cuDNN's kernel forward, the plain form where gradients pass."""
    monkeypatch.setattr(attention, "hardware", lambda: "nvidia")
    calls, real = [], jnp.ones((2, 9), bool)

    def kernel(q, k, v, *, scale, implementation):
        calls.append(implementation)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        return attention._plain(q, k, v, None, scale, None)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    given = arrays(jnp.bfloat16, length=9)
    expected = attend(*given, None)
    np.testing.assert_array_equal(attend(*given, None, implementation="cudnn"), expected)
    assert calls == ["cudnn"]
    reference = tuple(x.astype(jnp.float32) for x in given)
    assert_same(given, None, real, 0.02, reference=reference, implementation="cudnn")
    assert calls == ["cudnn"]


@pytest.mark.slow
def test_compiles_for_tpu():
    """Ahead of time for a v5e, without one: the decoder, forward and backward, takes splash."""
    pytest.importorskip("libtpu", reason="compiling for TPUs: pip install libtpu")
    # In a process of its own: libtpu reads XLA_FLAGS too, and an unknown one ends it.
    ours = {"XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    ours["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", "import test_attention; test_attention.compile_for_tpu()"],
        **{"cwd": Path(__file__).parent, "env": os.environ | ours, "capture_output": True, "text": True},
    )
    assert run.returncode == 0, run.stderr[-4000:]


def compile_for_tpu() -> None:
    """A decoder's gradients on 4 devices that split rows and heads."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices).reshape(2, 1, 2, 1), MESH_AXES)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wide = {"width": 256, "heads": 2, "kv_heads": 2, "head_dim": 128, "depth": 6, "mlp_width": 256}
    decoder = tiny.abstract(tiny.config(decoder=wide)).decoder

    def loss(leaves, tokens, *span):
        model = with_parameters(decoder, leaves)
        return model(model.embed(tokens, jnp.bfloat16), Span(*span)).hidden.astype(jnp.float32).sum()

    leaves = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=everywhere)
        for path, x in parameters(decoder).items()
    }
    row = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=everywhere)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(leaves, row, row, row, row).compile()
    assert "splash_mha_dkv" in compiled.as_text()  # picked by "auto", its gradient too


# ---------------------------------------------------------------------------------------------
# Which one runs
# ---------------------------------------------------------------------------------------------

PICKED = {
    "a laptop": ("cpu", {}, "xla"),
    "an AMD GPU": ("gpu", {"dtype": jnp.bfloat16}, "xla"),
    "a TPU": ("tpu", {}, "splash"),
    "a TPU, bfloat16, a soft cap": ("tpu", {"dtype": jnp.bfloat16, "softcap": 5.0}, "splash"),
    "a TPU, a length of no 128": ("tpu", {"length": 200}, "xla"),
    "a TPU, an image with a class token": ("tpu", {"length": 257, "masked": False}, "xla"),
    "a TPU, keys of a cache": ("tpu", {"keys": 512}, "xla"),
    "a GPU": ("nvidia", {"dtype": jnp.bfloat16}, "cudnn"),
    "a GPU, float32": ("nvidia", {}, "xla"),
    "a GPU, an image": ("nvidia", {"dtype": jnp.bfloat16, "length": 196, "masked": False}, "cudnn"),
    "a GPU, an image with a class token": (
        "nvidia",
        {"dtype": jnp.bfloat16, "length": 257, "masked": False},
        "cudnn",
    ),
    "a GPU, a length of no 128 under a mask": ("nvidia", {"dtype": jnp.bfloat16, "length": 196}, "xla"),
    "a GPU, a soft cap": ("nvidia", {"dtype": jnp.bfloat16, "softcap": 5.0}, "xla"),
    "a GPU, large heads": ("nvidia", {"dtype": jnp.bfloat16, "head": 256}, "xla"),
    "a GPU, odd heads": ("nvidia", {"dtype": jnp.bfloat16, "head": 20}, "xla"),
    "a GPU, one query": ("nvidia", {"dtype": jnp.bfloat16, "length": 1, "keys": 128}, "xla"),
}


@pytest.mark.parametrize("case", PICKED)
def test_auto(monkeypatch, case):
    """What "auto" picks, and that a kernel asked for by name is refused where "auto" does not pick
    it.
    """
    hardware, given, expected = PICKED[case]
    given = dict(given)
    softcap, masked = given.pop("softcap", None), given.pop("masked", True)
    monkeypatch.setattr(attention, "hardware", lambda: hardware)
    picked = []
    for name in attention._FUSED:
        monkeypatch.setitem(
            attention._FUSED, name, lambda q, *_, name=name, **__: (picked.append(name), q)[1]
        )
    q, k, v = arrays(**{"length": 256, **given})
    mask = jnp.ones((2, q.shape[1], k.shape[2]), bool) if masked else None
    run = functools.partial(attend, q, k, v, mask, softcap=softcap)
    run(implementation="auto")
    assert (picked or ["xla"]) == [expected]
    for name in attention._FUSED:
        if name == expected:
            run(implementation=name)
        else:
            with pytest.raises(
                UserError, match=f"^config.model.attention='{name}' cannot run here: .*; set 'auto'.$"
            ):
                run(implementation=name)


REFUSED = {
    "splash, no TPU": ("splash", "cpu", {}, "a TPU kernel, and this is a cpu"),
    "splash, length": ("splash", "tpu", {"length": 200}, "rows of 200 tokens are not a multiple of 128"),
    "cudnn, no GPU": ("cudnn", "cpu", {}, "an NVIDIA GPU of Ampere or later, and this is a cpu"),
    "cudnn, dtype": ("cudnn", "nvidia", {}, "config.model.compute_dtype is float32"),
    "cudnn, heads": (
        "cudnn",
        "nvidia",
        {"dtype": jnp.bfloat16, "head": 20},
        "at most 128 channels, a multiple of 8",
    ),
    "keys": ("splash", "tpu", {"keys": 512}, "256 queries meet 512 keys"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_why(monkeypatch, case):
    name, hardware, given, words = REFUSED[case]
    monkeypatch.setattr(attention, "hardware", lambda: hardware)
    q, k, _ = arrays(**{"length": 256, **given})
    mask = jnp.ones((2, q.shape[1], k.shape[2]), bool)
    assert words in attention.refusal(name, q, k, mask, None)


def test_hardware(monkeypatch):
    """This machine's, another's that is compiled for, and which GPUs cuDNN's kernel is for."""
    assert attention.hardware() == ("nvidia" if NVIDIA else jax.default_backend())
    described = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((4,), ("data",), abstract_device=described)
    ):
        assert attention.hardware() == "tpu"
    for kind, expected in {"NVIDIA H100 80GB HBM3": "nvidia", "AMD Instinct MI300X": "gpu"}.items():
        card = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
        mesh = jax.sharding.AbstractMesh((4,), ("data",), abstract_device=card)
        with jax.sharding.use_abstract_mesh(mesh):
            assert attention.hardware() == expected or NVIDIA
    for capability, expected in {
        "7.5": "gpu",
        "8.0": "nvidia",
        "10.3": "nvidia",
        "gfx90a": "gpu",
    }.items():
        gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda gpu=gpu: [gpu])
        assert attention.hardware() == expected, capability


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a laptop refuses")
def test_a_model_with_a_kernel_by_name():
    """Rows are refused in a sentence.

    Decoding from a cache, which is always plain, and the vision encoder work.
    """
    model = tiny.abstract(dataclasses.replace(tiny.CONFIG, attention="splash"))
    span = Span(*(jnp.ones((1, 128), jnp.int32) for _ in range(3)))
    x = jnp.ones((1, 128, tiny.CONFIG.decoder.width))
    with pytest.raises(
        UserError, match=r"^config.model.attention='splash' cannot run here: splash is a TPU kernel"
    ):
        jax.eval_shape(lambda decoder: decoder(x, span), model.decoder)
    jax.eval_shape(lambda decoder: decoder(x, span, decoder.empty_cache(span, x.dtype)), model.decoder)
    jax.eval_shape(lambda vision: vision(jnp.zeros((1, 16, 16, 3))), model.vision)


# ---------------------------------------------------------------------------------------------
# Remat
# ---------------------------------------------------------------------------------------------


def kept_by_a_layer(part: str, **how) -> int:
    """Bytes that one more layer of the vision encoder or the decoder keeps for the backward pass,
    weights apart.
    """
    rows = jnp.ones((8, 128), jnp.int32)
    images, span = jnp.ones((8, 16, 16, 3)), Span(rows, rows, rows)

    def kept(depth):
        model = tiny.abstract(dataclasses.replace(tiny.config(**{part: {"depth": depth}}), **how))
        leaves = {path: leaf for path, leaf in parameters(model).items() if path.startswith(part)}

        def residuals(leaves):
            def run(leaves):
                of = getattr(with_parameters(model, leaves), part)
                return of(images) if part == "vision" else of(of.embed(rows, jnp.float32), span)[0]

            return jax.vjp(run, leaves)[1]

        arrays_ = jax.tree.leaves(jax.eval_shape(residuals, leaves))
        return sum(x.size * x.dtype.itemsize for x in arrays_) - sum(4 * x.size for x in leaves.values())

    return kept(6) - kept(5)


def test_splash_keeps_no_scores(on_tpu):
    """Neither the float32 scores of each head nor one more copy of the mask."""
    plain, fused = (kept_by_a_layer("decoder", attention=name) for name in ("xla", "splash"))
    assert fused < plain - 4 * 8 * 4 * 128**2


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_remat_keeps_less(part):
    """Of each layer its input alone with "full", the plain products besides with "dots"."""
    layer = {remat: kept_by_a_layer(part, remat=remat) for remat in ("none", "dots", "full")}
    assert layer["full"] == pytest.approx(
        4 * (8 * 17 * 12 if part == "vision" else 8 * 128 * 16), rel=0.01
    )
    assert 3 * layer["full"] < layer["dots"] < layer["none"] / 2, layer


def test_remat_changes_no_gradient():
    """Of the whole model, with dropout in its adapters: a layer computed again draws the same
    numbers.
    """
    settings = tiny.config(lora={"dropout": 0.5})
    given = parameters(tiny.model(settings))
    batch = tiny.mixed_batch(np.random.default_rng(0))
    gradients, loops = {}, {}
    for remat in ("none", "dots", "full"):
        model = tiny.abstract(dataclasses.replace(settings, remat=remat))

        def loss(leaves, model=model):
            model = with_parameters(model, leaves)
            return loss_sums(model, batch, LossConfig(reduction="token"), None, jax.random.key(0))[0]

        lowered = jax.jit(jax.grad(loss)).lower(given)
        loops[remat] = lowered.as_text().count("stablehlo.while")
        gradients[remat] = lowered.compile()(given)
    # Few layers are written out, unless they are computed again: the compiler would merge the two
    # computations.
    assert loops["none"] + 4 <= min(loops["dots"], loops["full"])
    for remat in ("dots", "full"):
        for path, expected in gradients["none"].items():
            scale = np.abs(np.asarray(expected)).max()
            assert scale > 0, path
            np.testing.assert_allclose(
                gradients[remat][path], expected, rtol=0, atol=1e-5 * scale, err_msg=path
            )
