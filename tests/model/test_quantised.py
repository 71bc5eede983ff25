"""Quantised kernels: codes against bitsandbytes, bounds of the error, training steps, meshes, files."""

import dataclasses
import functools
import statistics
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import tiny

from unimed_jax.analyze.tug_of_war import chosen_leaves
from unimed_jax.config import MeshConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.tensors import load
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import Arrays, Entry, Table
from unimed_jax.model import sharding
from unimed_jax.model.cache import Span
from unimed_jax.model.decoder import merge_lora
from unimed_jax.model.parameters import parameters, stored_leaves, tree_bytes, with_parameters
from unimed_jax.model.quantised import (
    BLOCK,
    NF4,
    Quantised,
    described,
    quantise,
    stored_like,
)
from unimed_jax.plan.program_cost import program_cost
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.open import base_note
from unimed_jax.train.program import build
from unimed_jax.train.step import first_state

pytestmark = pytest.mark.usefixtures("quick_compiles")

KINDS = ("int8", "nf4")
ROWS = 8
WIDE = tiny.config(
    vision={"width": 64, "mlp_width": 64, "depth": 1},
    decoder={"width": 64, "head_dim": 16, "mlp_width": 128},
)

# bitsandbytes 0.50.2 on CPU: quantize_4bit(w, blocksize=64, quant_type="nf4") of `theirs()`, [out, in].
# The first of two codes is in the high half of a byte.
CODES = """
86a859dc42470624569c6d49c84358366a8946be2edb86deed927a299b2452e5
96eda07bc4e24c7f84522aad4e6e548c8421ac62b24a094878b4dbbdbb716318
7777777777777777777777777777777777777777777777777777777777777777
b76d3559552aa5835c8e4969754f715a5cb65452bd332403c6a5d86e6387b4aa
585d5646795635ea5347753b8665174459439949684ab99087757866b4a85649
9429c6a57591b69592d128e96167eb1f53e758cc1fc532843c95be24cb8d2138
454549a56597d399692e3b3b687b60485ab62cb6e636b4e4b96b2c75abaebc57
9788a7655b79424ba85766156b8b66089c675456b75785b26938b835b8789567
"""


def theirs() -> np.ndarray:
    """The kernel [4, 128], in torch's layout, that `CODES` were made of; one block is zeros."""
    values = np.random.default_rng(0).standard_normal((4, 2 * BLOCK)) * 0.02
    values = values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    values[1, :BLOCK] = 0
    return values


def kernels(shape=(3, 128, 48), seed=1) -> jax.Array:
    """Stacked kernels with outliers, zeros and widely differing columns."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 10 ** rng.uniform(-4, 1, (*shape[:-2], 1, shape[-1]))
    values[rng.random(shape) < 0.02] *= 9
    values[..., :BLOCK, 0] = 0
    return jnp.asarray(values, jnp.float32)


def test_nf4_codes_are_those_of_bitsandbytes():
    """Their scales are float32 and ours bfloat16, so the golden kernel's numbers are bfloat16."""
    packed = np.frombuffer(bytes.fromhex(CODES), np.uint8).reshape(4, BLOCK)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(4, 2 * BLOCK)  # [out, in]
    blocks = np.abs(theirs()).reshape(4, 2, BLOCK).max(axis=-1)
    expected = NF4[codes] * np.repeat(blocks, BLOCK, axis=1)
    ours = quantise(jnp.asarray(theirs().T), "nf4", "float32")
    np.testing.assert_array_equal(np.asarray(ours).T, expected)


def test_nf4_stands_for_quantiles_of_the_normal_distribution():
    """QLoRA, equation 4, with bitsandbytes' offset: 8 steps to the largest, 7 to the smallest."""
    quantile, top = statistics.NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(top, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(top, 0.5, 8)[:-1]]
    expected = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(NF4, expected, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_at_most_half_a_step(kind):
    kernel = kernels()
    quantised = quantise(kernel, kind, "float32")
    given = jax.tree.map(lambda x: (x.shape, x.dtype), described(kernel.shape, kind, "float32"))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), quantised) == given
    assert (quantised.kind, quantised.shape, quantised.size) == (kind, kernel.shape, kernel.size)
    assert tree_bytes(quantised) == kernel.size * {"int8": 8.25, "nf4": 4.25}[kind] / 8
    blocks = np.asarray(kernel, np.float64).reshape(3, 2, BLOCK, 48)
    found = np.asarray(quantised.astype("float32"), np.float64).reshape(blocks.shape)
    scale = np.asarray(quantised.scales, np.float64)[:, :, None]
    error = np.abs(found - blocks)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    steps = {"int8": 0.5, "nf4": np.diff(NF4).max() / 2}[kind]
    assert (error <= np.maximum(steps * scale, largest / 256) * (1 + 1e-6)).all()
    # Each number has the code that is nearest to it.
    every = NF4.astype(np.float64) if kind == "nf4" else np.arange(-127, 128) * 1.0
    nearest = np.abs(every[:, None, None, None, None] * scale[None] - blocks[None]).min(axis=0)
    assert (np.abs(error - nearest) <= 1e-6 * largest).all()
    assert (found[:, 0, :, 0] == 0).all()


@pytest.mark.parametrize("lean", [0.0, 1e-4, -1e-4])
def test_int8_codes_do_not_depend_on_how_a_platform_divides(monkeypatch, lean):
    """Numbers on either side of a half get the codes below and above it, however quotients are off."""
    scales = np.arange(128, 256, dtype=np.float32)[:, None] / 4096  # all 128 of a power of two, [128, 1]
    halves = (np.arange(-126, 126, dtype=np.float32) + np.float32(0.5)) * scales  # exact
    values = np.concatenate([np.nextafter(halves, np.float32(far)) for far in (-9, 9)], axis=1)
    blocks = np.zeros((BLOCK, *values.shape), np.float32)
    blocks[0], blocks[1] = values, 127 * scales
    rounded = jnp.round
    monkeypatch.setattr(jnp, "round", lambda x: rounded(x + lean))
    codes = quantise(jnp.asarray(blocks.reshape(BLOCK, -1)), "int8", "float32").codes
    below = np.arange(-126, 126)  # the code below each half, above which lies the second value of each
    expected = np.broadcast_to(np.concatenate([below, below + 1]), values.shape)
    np.testing.assert_array_equal(np.asarray(codes)[0].reshape(values.shape), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_it_stands_for_an_array(kind):
    kernel = kernels()
    quantised = quantise(kernel, kind, "bfloat16")
    numbers = quantised.astype("float32")
    assert quantised[...] is quantised and quantised.ndim == 3
    np.testing.assert_array_equal(quantised[1].astype("float32"), numbers[1])
    np.testing.assert_array_equal(np.asarray(quantised), numbers.astype("bfloat16"))
    again = quantise(numbers, kind, "bfloat16")  # rounding twice is rounding once
    jax.tree.map(np.testing.assert_array_equal, again, quantised)
    like = described(kernel.shape, kind, "float32")
    kept = stored_like(quantised, like)
    assert kept.dtype == np.float32 and kept.codes is quantised.codes
    other = stored_like(
        quantised, described(kernel.shape, "int8" if kind == "nf4" else "nf4", "float32")
    )
    assert other.kind != kind
    plain = stored_like(quantised, jax.ShapeDtypeStruct(kernel.shape, "bfloat16"))
    np.testing.assert_array_equal(plain, numbers.astype("bfloat16"))


# ---- the model --------------------------------------------------------------------------------------
def settings(kind: str, **model):
    model = dataclasses.replace(WIDE, frozen_kernels=kind, **model)
    return dataclasses.replace(tiny.training(model, rows=ROWS))


def step_of(config, numbers: bool, mesh=None):
    """The state and the metrics after one step; `numbers`: from the numbers that the codes stand for."""
    leaves = stored_leaves(config)
    drawn = parameters(tiny.model(config.model))
    frozen = {path: stored_like(leaf, leaves[path]) for path, leaf in drawn.items()}
    if numbers:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, frozen_kernels="plain")
        )
        frozen = {path: leaf.astype(leaf.dtype) for path, leaf in frozen.items()}
    program = build(config, mesh)
    frozen = {path: frozen[path] for path in program.frozen}
    batch = tiny.mixed_batch(np.random.default_rng(0), ROWS)
    if mesh is not None:
        frozen = jax.device_put(frozen, sharding.parameter_shardings(frozen, mesh))
        batch = sharding.on_devices(batch, mesh)
        described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), (frozen, batch))
        assert described == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), (program.frozen, program.batch)
        )
    trained = {path: jnp.array(drawn[path]) for path in program.state.leaves}
    with sharding.inside(mesh):
        state = first_state(trained, program.optimizer, mesh)
        state, metrics = program.step(state, frozen, batch, np.float32(1e-3))
    return jax.device_get((state, metrics))


def same_step(found, expected, tolerance: float):
    (state, metrics), (other, others) = found, expected
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=tolerance)
    np.testing.assert_allclose(metrics["grad_norm"], others["grad_norm"], rtol=tolerance)
    for path, gradient in other.moments.mean.items():  # a tenth of the gradient, after one step
        most = np.abs(gradient).max()
        assert most > 0 or "lora_a" in path, path
        np.testing.assert_allclose(
            state.moments.mean[path], gradient, rtol=0, atol=tolerance * most, err_msg=path
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_with_the_numbers(kind):
    mlp = tiny.model(WIDE).decoder.layers.mlp
    codes = {
        path: quantise(leaf, kind, "float32") if path.endswith("kernel") else leaf
        for path, leaf in parameters(mlp).items()
    }
    numbers = {path: leaf.astype("float32") for path, leaf in codes.items()}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 64)), jnp.float32)

    @jax.jit
    def gradients(x, leaves):
        trained = {path: leaf for path, leaf in leaves.items() if "lora" in path}

        def loss(x, trained):
            stacked = with_parameters(mlp, {**leaves, **trained})
            return jax.lax.scan(lambda x, layer: (layer(x), None), x, stacked)[0].std()

        return jax.value_and_grad(loss, argnums=(0, 1))(x, trained)

    found, expected = gradients(x, codes), gradients(x, numbers)
    assert len(jax.tree.leaves(expected)) == 8
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        most = np.abs(theirs).max()
        assert most > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * most)


@pytest.mark.slow
@pytest.mark.parametrize("kind, remat", [("nf4", "full"), ("int8", "none")])
def test_a_step_equals_that_with_the_numbers(kind, remat):
    config = settings(kind, remat=remat)
    expected = step_of(config, numbers=True)
    same_step(step_of(config, numbers=False), expected, 2e-5)
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, frozen_kernels="plain"))
    float_base = step_of(whole, numbers=False)  # the codes are what is computed with
    assert abs(float_base[1]["loss"] - expected[1]["loss"]) > 1e-4


@pytest.mark.slow
def test_a_step_on_eight_devices_equals_that_on_one():
    config = settings("nf4")
    mesh = sharding.make_mesh(MeshConfig(auto=False, data=2, fsdp=2, tensor=2), ROWS)
    same_step(step_of(config, numbers=False, mesh=mesh), step_of(config, numbers=False), 2e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_backward_pass_keeps_no_numbers_of_the_kernels(remat):
    """Seven layers, so that they are a loop: forward and backward pass then share nothing."""
    depth, tokens = 7, 6
    config = dataclasses.replace(
        WIDE, decoder=dataclasses.replace(WIDE.decoder, depth=depth), remat=remat
    )
    decoder = tiny.model(config).decoder
    stored = {
        path: quantise(leaf, "nf4", "float32") if path.endswith("kernel") else leaf
        for path, leaf in parameters(decoder).items()
    }
    whole = with_parameters(decoder, stored)
    places = jnp.arange(tokens)[None]
    span = Span(places, jnp.ones_like(places), jnp.zeros_like(places))

    def residuals(x, decoder):
        _, backward = jax.vjp(lambda x: decoder(x, span).hidden, x)
        return backward

    x = jnp.ones((1, tokens, 64))
    kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(residuals, x, whole))
            if jnp.issubdtype(leaf.dtype, jnp.floating)]  # fmt: skip
    inside = {(64, 64), (64, 32), (64, 128), (128, 64)}
    assert not [shape for shape in kept if shape[-2:] in inside], kept
    # what remat is about is kept as it is without codes: outputs of linears
    assert any(shape[-2:] == (tokens, 128) for shape in kept) == (remat != "full"), kept


def seven_layers(kind: str, **sizes: int):
    """Leaves of a decoder whose layers are a loop, inputs, and the gradients of its adapters."""
    decoder = tiny.model(
        dataclasses.replace(WIDE, decoder=dataclasses.replace(WIDE.decoder, depth=7, **sizes))
    ).decoder
    leaves = {
        path: leaf if kind == "plain" or not path.endswith("kernel") else quantise(leaf, kind, "float32")
        for path, leaf in parameters(decoder).items()
    }
    places = jnp.tile(jnp.arange(6)[None], (ROWS, 1))
    span = Span(places, jnp.ones_like(places), jnp.zeros_like(places))
    width = decoder.config.width
    x = np.random.default_rng(0).standard_normal((ROWS, 6, width)).astype(np.float32)

    def gradients(leaves, x):
        adapters = {path: leaf for path, leaf in leaves.items() if "lora" in path}

        def loss(adapters):
            whole = with_parameters(decoder, {**leaves, **adapters})
            return jnp.square(whole(x, span).hidden[..., 0]).mean()

        return jax.grad(loss)(adapters)

    return leaves, x, gradients


@pytest.mark.parametrize("kind, dtype", [("plain", "float32"), ("plain", "bfloat16")]
                         + [(kind, "float32") for kind in KINDS])  # fmt: skip
def test_a_loop_over_layers_neither_copies_kernels_nor_carries_anything_as_large(kind, dtype):
    leaves, x, gradients = seven_layers(kind)
    jaxpr = jax.make_jaxpr(gradients)(leaves, x.astype(dtype))
    forward, backward = [each for each in jaxpr.eqns if each.primitive.name == "scan"]
    kernel = {(64, 64), (64, 32), (64, 128), (128, 64), (32, 64), (32, 32), (32, 128)}  # or its codes
    for scan in (forward, backward):
        shapes = [each.aval.shape for each in scan.invars]
        constants = [shape for shape in shapes if shape[:1] != (7,)]
        stacked = [each.aval.shape for each in scan.outvars]
        assert not [shape for shape in (*constants, *stacked) if shape[-2:] in kernel]
    assert any(each.aval.shape == (7, 8 * 6, 128) for each in forward.outvars)  # activations are stacked


@pytest.mark.parametrize("kind", KINDS)
def test_devices_send_codes_to_each_other(kind):
    leaves, x, gradients = seven_layers(kind, width=128)  # two blocks of inputs
    mesh = sharding.make_mesh(MeshConfig(auto=False, data=4, fsdp=2), ROWS)
    whole = {f"decoder/{path}": leaf for path, leaf in leaves.items()}
    places = sharding.parameter_shardings(whole, mesh)
    split = {path: jax.device_put(leaf, places[f"decoder/{path}"]) for path, leaf in leaves.items()}
    with sharding.inside(mesh):
        rows = jax.device_put(x, sharding.row_sharding(x.shape, mesh))
        compiled = jax.jit(gradients).lower(split, rows).compile()
    sent = program_cost(compiled.as_text(), dict(mesh.shape)).collectives
    found = sum(each.bytes for each in sent if each.axes == ("fsdp",) and each.kind == "all-gather")
    # Of each kernel a device sends its half, forward and backward. CPUs send scales as float32.
    kernels = [leaf for leaf in leaves.values() if isinstance(leaf, Quantised)]
    expected = sum(leaf.codes.nbytes + 4 * leaf.scales.size for leaf in kernels)
    assert 0.9 * expected < found < 1.1 * expected
    alone = jax.jit(gradients)(leaves, x)
    for path, gradient in compiled(split, rows).items():
        most = np.abs(alone[path]).max()
        np.testing.assert_allclose(gradient, alone[path], rtol=0, atol=2e-5 * most, err_msg=path)


@pytest.mark.parametrize("rows, whole", [(1, False), (4, False), (8, True)])
def test_codes_stay_where_they_are_for_fewer_rows_than_devices(rows, whole):
    mesh = sharding.make_mesh(MeshConfig(auto=False, data=4, fsdp=2), ROWS)
    kernel = quantise(kernels(), "nf4", "float32")
    place = jax.sharding.NamedSharding(mesh, P(None, "fsdp", None))
    with sharding.inside(mesh):
        layer = jax.device_put(kernel, place)[0]
        found = jax.jit(functools.partial(sharding.gathered, names=("embed", "mlp"), rows=rows))(layer)
    for part in (found.codes, found.scales):
        assert part.sharding.is_fully_replicated == whole


def test_codes_and_scales_lie_where_their_kernel_does():
    mesh = sharding.make_mesh(MeshConfig(auto=False, data=2, fsdp=2, tensor=2), ROWS)
    leaves = stored_leaves(settings("nf4"))
    quantised = {path for path, leaf in leaves.items() if isinstance(leaf, Quantised)}
    frozen = {path for path in build(settings("plain"), None).frozen if path.endswith("kernel")}
    assert quantised == frozen - {"vision/patch/kernel"}
    places = sharding.parameter_shardings(leaves, mesh)
    assert places["decoder/layers/mlp/down/kernel"].spec == P(None, ("tensor",), ("fsdp",))
    # one block of inputs cannot be split
    assert places["decoder/layers/mlp/up/kernel"].spec == P(None, None, ("tensor",))
    shapes = sharding.placed(leaves, places)["decoder/layers/mlp/down/kernel"]
    assert shapes.codes.sharding == shapes.scales.sharding
    assert shapes.codes.sharding.shard_shape(shapes.codes.shape) == (2, 32, 32)


def test_what_trains_is_float32_and_what_cannot_be_cut_is_named():
    config = settings("int8")
    rules = (dataclasses.replace(tiny.ADAPT[0], match="*/q/kernel"), *tiny.ADAPT)
    train = dataclasses.replace(config.train, rules=rules)
    leaves = stored_leaves(dataclasses.replace(config, train=train))
    assert leaves["decoder/layers/attention/q/kernel"].dtype == jnp.float32
    assert leaves["decoder/layers/attention/k/kernel"].codes.dtype == jnp.int8
    narrow = dataclasses.replace(tiny.CONFIG, frozen_kernels="nf4")
    with pytest.raises(UserError, match=r"blocks of 64 numbers, and decoder/.*/kernel has 16 inp"):
        stored_leaves(dataclasses.replace(config, model=narrow))


def test_codes_have_no_gradient_that_could_be_compared():
    path = "decoder/layers/mlp/up/kernel"
    model = tiny.model(WIDE)
    model = with_parameters(model, {path: quantise(parameters(model)[path], "nf4", "float32")})
    run = SimpleNamespace(model=model, folder="runs/a")
    with pytest.raises(UserError, match=f"--match names {path}, which runs/a stores as nf4 codes"):
        chosen_leaves(run, ["decoder/*"])  # type: ignore[arg-type]
    assert chosen_leaves(run, ["connector/*"])  # type: ignore[arg-type]


def test_merging_an_adapter_gives_numbers():
    decoder = tiny.model(WIDE).decoder
    path = "layers/mlp/up/kernel"
    quantised = quantise(parameters(decoder)[path], "nf4", "float32")
    with_codes = with_parameters(decoder, {path: quantised})
    with_numbers = with_parameters(decoder, {path: quantised.astype("float32")})
    found, expected = (parameters(merge_lora(each))[path] for each in (with_codes, with_numbers))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# ---- files ------------------------------------------------------------------------------------------
def files_of(kernel: np.ndarray):
    """The kernel as torch would write it, a tensor a layer."""
    entries = [Entry(f"layer{i}.weight", "a/kernel", (i,), "transpose") for i in range(len(kernel))]
    return Table(tuple(entries)), Arrays({f"layer{i}.weight": k.T for i, k in enumerate(kernel)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strip", [1, 1 << 20])
def test_files_are_rounded_strip_by_strip(kind, strip, monkeypatch):
    monkeypatch.setattr(load, "STRIP", strip)
    kernel = np.asarray(kernels())
    table, tensors = files_of(kernel)
    like = {"a/kernel": described(kernel.shape, kind, "bfloat16")}
    mesh = sharding.make_mesh(MeshConfig(auto=False, fsdp=2, tensor=4), 8)
    place = jax.sharding.NamedSharding(mesh, P(None, "fsdp", "tensor"))
    expected = jax.jit(functools.partial(quantise, kind=kind, dtype="bfloat16"))(kernel)
    for shardings in (None, {"a/kernel": place}):
        found = load_leaves(table, tensors, Destination(like, shardings))["a/kernel"]
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert shardings is None or found.codes.sharding.is_equivalent_to(place, 3)


def test_codes_in_a_file_are_said_to_be_rounded_twice(capsys):
    kernel = np.asarray(kernels())
    table, tensors = files_of(kernel)
    tensors.origin, tensors.quantisation = "model.gguf", lambda name: "Q4_1"
    to = Destination({"a/kernel": described(kernel.shape, "nf4", "float32")})
    load_leaves(table, tensors, to)
    assert (
        "model.gguf holds kernels as Q4_1, which are rounded once more, to nf4"
        in capsys.readouterr().out
    )


def test_a_checkpoint_holds_codes_and_scales(tmp_path):
    weights = {"a/kernel": quantise(kernels(), "nf4", "bfloat16"), "a/bias": jnp.ones(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, weights, (jnp.int32(1),), {})
    checkpoints.close()
    opened = Checkpoints(tmp_path, read_only=True)
    assert opened.saved_weights() == set(weights)
    like = {"a/kernel": described((3, 128, 48), "nf4", "bfloat16"), "a/bias": weights["a/bias"]}
    found, _, _ = opened.restore(like)
    assert isinstance(found["a/kernel"], Quantised) and found["a/kernel"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, found, weights)
    sources = dict.fromkeys(weights, "hf x")
    numbers = base_note(weights, sources)["a/kernel"]["fingerprint"]
    scales = weights["a/kernel"].scales.at[0, 0, 1].mul(2)
    changed = {"a/kernel": dataclasses.replace(weights["a/kernel"], scales=scales)}
    assert 0 <= numbers != base_note(changed, sources)["a/kernel"]["fingerprint"]
