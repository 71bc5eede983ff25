"""The decoder's experts: ways to run them that mean the same, on one device and on eight; padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from unimed_jax.config import DecoderConfig, LoraConfig, LossConfig, MeshConfig, MoeConfig
from unimed_jax.errors import UserError
from unimed_jax.model import dispatch, sharding
from unimed_jax.model.dispatch import Moe, upcycled
from unimed_jax.model.layer_plan import LayerPlan
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.model.routing import Noise, draw_noise, expert_capacity, positions_in_expert, route
from unimed_jax.model.unimed import span_of
from unimed_jax.settings import check_model
from unimed_jax.train.loss import loss_sums

pytestmark = pytest.mark.usefixtures("quick_compiles")

D, F = 16, 24
GATED = DecoderConfig(vocab=8, width=D, depth=1, heads=1, kv_heads=1, head_dim=4, mlp_width=F)
PLAIN = dataclasses.replace(GATED, gated_mlp=False, mlp_bias=True, activation="gelu_tanh")


def settings(decoder=GATED, **moe):
    moe = {"experts": 4, "placement": "dense", **moe}
    return dataclasses.replace(
        tiny.CONFIG, decoder=decoder, moe=MoeConfig(**moe), lora=LoraConfig(rank=0)
    )


def layer(config, skew: str = "even", seed: int = 0) -> Moe:
    """A layer of random leaves. skew "one": every token goes to expert 1; "idle": none to expert 2."""
    moe = jax.tree.map(lambda leaf: leaf[0], tiny.model(config, seed).decoder.layers.moe)
    push = {"even": {}, "one": {1: 100.0}, "idle": {2: -100.0}}[skew]
    for expert, logit in push.items():
        moe.router.bias[...] = moe.router.bias[...].at[expert].set(logit)
    return moe


@jax.jit
def value_and_gradients(moe: Moe, x, used, noise, cotangent):
    """-> output, (gradient of the layer, of x); the balancing loss has its share in them."""

    def loss(moe, x):
        y, routing = moe(x, used, noise, training=True)
        return (y * cotangent).sum() + 0.3 * routing.aux, (y, routing)

    (_, (y, routing)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(moe, x)
    return y, routing, grads


def inputs(batch: int, length: int = 7, seed: int = 1):
    rng = np.random.default_rng(seed)
    x, cotangent = rng.standard_normal((2, batch, length, D)).astype(np.float32)
    used = np.arange(length)[None] < rng.integers(3, length + 1, (batch, 1))
    return x, used, cotangent


def same(actual, expected, what):
    """Values within 1e-5.

    Of each expert (and of each other leaf) the worst gradient within 1e-4 of its largest.
    """
    (y, routing, (d_moe, dx)), (y_, routing_, (d_moe_, dx_)) = actual, expected
    assert np.abs(y - y_).max() <= 1e-5, what
    np.testing.assert_array_equal(routing.experts, routing_.experts)
    np.testing.assert_array_equal(routing.counts, routing_.counts)
    flat, flat_ = (
        jax.tree_util.tree_flatten_with_path((m, x))[0] for m, x in ((d_moe, dx), (d_moe_, dx_))
    )
    for (path, leaf), (_, leaf_) in zip(flat, flat_, strict=True):
        name = jax.tree_util.keystr(path)
        experts = zip(leaf, leaf_, strict=True) if "experts" in name else [(leaf, leaf_)]
        for e, (part, part_) in enumerate(experts):
            worst, size = np.abs(part - part_).max(), np.abs(part_).max()
            assert worst <= 1e-4 * max(size, 1e-3), (
                f"{what}: {name} of expert {e}: {worst:.1e} of {size:.1e}"
            )


CASES = {
    "top-1": (GATED, {}, "even"),
    "top-2": (GATED, {"top_k": 2}, "even"),
    "all to one": (GATED, {}, "one"),
    "one idle": (PLAIN, {"top_k": 2, "residual": True}, "idle"),
    "one expert": (PLAIN, {"experts": 1, "meta": False}, "even"),
    "full": (PLAIN, {"capacity_factor": 0.6}, "even"),
    "full, top-2": (GATED, {"capacity_factor": 0.6, "top_k": 2}, "even"),
}


def by(way, monkeypatch) -> None:
    """Lets grouped products be multiplied as on another platform."""
    monkeypatch.setattr(dispatch, "way", lambda *_: way)
    value_and_gradients.clear_cache()  # it does not know


WAYS = {"grouped": "blocks", "by experts": "experts", "by megablox": "megablox"}


@pytest.mark.parametrize("case", CASES)
def test_dispatches_agree(case, monkeypatch):
    """Grouped, by its three products, and capacity dispatch give what the dense one gives."""
    decoder, moe, skew = CASES[case]
    x, used, cotangent = inputs(3)  # a batch of 3 is a trap of the original
    # enough for all, except in the cases "full"
    moe = {"capacity_factor": float(moe.get("experts", 4)), **moe}
    results = {}
    ways = WAYS if case in ("one idle", "full, top-2") else ("grouped",)  # test_grouped.py has more
    for path in ("dense", "capacity", *ways):
        by(WAYS.get(path), monkeypatch)
        config = settings(decoder, path="grouped" if path in WAYS else path, **moe)
        noise = draw_noise(jax.random.key(3), x.shape[0] * x.shape[1], D, config.moe, training=True)
        results[path] = value_and_gradients(layer(config, skew), x, used, noise, cotangent)
    for path in ("capacity", *ways):
        same(results[path], results["dense"], path)
    routing, gradient = results["grouped"][1:]
    counts = np.asarray(routing.counts)
    assert counts.sum() == used.sum()
    if "full" in case:
        assert routing.kept.sum() < used.sum() * routing.kept.shape[1]
    else:
        assert routing.kept[used.reshape(-1)].all()
    if case == "all to one":
        assert counts[1] == used.sum()
    if case == "one idle":
        assert counts[2] == 0
    for e in range(len(counts)):
        idle = not (routing.kept & (routing.experts == e)).any()
        assert idle == (not np.any(gradient[0].experts.up.kernel[...][e]))


MESHES = {
    # Rows over the axis of the experts, three rows over none; a phantom expert beside five.
    "4 on 4": ({"data": 2, "expert": 4}, 4, 8, GATED, {}),
    "5 on 2": ({"data": 2, "expert": 2, "tensor": 2}, 5, 8, PLAIN, {"top_k": 2}),
    "5 on 2, fsdp": ({"fsdp": 2, "expert": 2, "data": 2}, 5, 8, GATED, {}),
    "4 on 2, 3 rows": ({"data": 4, "expert": 2}, 4, 3, PLAIN, {}),
    "no experts' axis": ({"data": 2, "tensor": 4}, 3, 8, PLAIN, {"top_k": 2}),
}


PATHS = ("grouped", "capacity", "dense")
# Experts over the axis of the rows with split hidden units, and experts over another axis.
FAST = ("5 on 2", "4 on 2, 3 rows")
OTHER_WAYS = [
    pytest.param(name, path, marks=() if name in FAST else pytest.mark.slow)
    for name in MESHES
    for path in ("by experts", "by megablox")
]


@pytest.mark.parametrize(
    ("name", "path"), [*((name, path) for name in MESHES for path in PATHS), *OTHER_WAYS]
)
def test_devices(name, path, monkeypatch):
    """Over a mesh as on one device, gradients of every expert included."""
    by(WAYS.get(path), monkeypatch)
    path = "grouped" if path in WAYS else path
    axes, experts, batch, decoder, moe = MESHES[name]
    moe = {"experts": experts, "capacity_factor": float(experts), "random": False, **moe}
    x, used, cotangent = inputs(batch)
    alone = value_and_gradients(
        layer(settings(decoder, path="dense", **moe)), x, used, Noise(), cotangent
    )
    mesh = sharding.make_mesh(MeshConfig(auto=False, **axes), rows=8)
    config = settings(decoder, path=path, **moe)
    leaves = {f"decoder/layers/moe/{path}": leaf for path, leaf in parameters(layer(config)).items()}
    places = sharding.parameter_shardings(leaves, mesh)
    spread = {
        path.removeprefix("decoder/layers/moe/"): jax.device_put(leaf, places[path])
        for path, leaf in leaves.items()
    }
    shares = axes.get("expert", 1)
    up = spread["experts/up/kernel"]
    assert up.sharding.shard_shape(up.shape)[0] == (experts if experts % shares else experts // shares)
    with sharding.inside(mesh):
        same(
            value_and_gradients(with_parameters(layer(config), spread), x, used, Noise(), cotangent),
            alone,
            name,
        )


def test_padding_is_left_out():
    """What stands in padding changes nothing of real tokens, of counts or of the balancing loss."""
    x, used, cotangent = inputs(3)
    other = np.where(used[..., None], x, 7.0).astype(np.float32)
    moe = layer(settings(capacity_factor=0.6, random=False))
    (y, routing, _), (y_, routing_, _) = (
        value_and_gradients(moe, a, used, Noise(), cotangent) for a in (x, other)
    )
    np.testing.assert_array_equal(np.asarray(y)[used], np.asarray(y_)[used])
    np.testing.assert_array_equal(routing.counts, routing_.counts)
    assert routing.aux == routing_.aux and routing.counts.sum() == used.sum()
    everywhere = np.ones_like(used)
    assert value_and_gradients(moe, other, everywhere, Noise(), cotangent)[1].counts.sum() == used.size


def test_random_token_selection():
    """In training any of an expert's tokens may be the ones that fit.

    Without the noise the first ones fit.
    """
    logits = jnp.zeros((40, 2)).at[:, 0].set(1.0)
    first = route(logits, 1, capacity=8)
    np.testing.assert_array_equal(np.nonzero(first.kept[:, 0])[0], np.arange(8))
    config = MoeConfig(experts=2, capacity_factor=0.4)
    assert expert_capacity(40, config, training=True) == 8
    assert expert_capacity(40, config, training=False) is None
    drawn = [draw_noise(jax.random.key(i), 40, D, config, training=True) for i in range(50)]
    kept = np.stack([route(logits, 1, 8, noise=noise).kept[:, 0] for noise in drawn])
    assert (kept.sum(axis=1) == 8).all() and kept.any(axis=0).all()
    routing = route(logits, 1, 8, noise=drawn[0])
    at = positions_in_expert(routing.experts, routing.kept, 2)
    np.testing.assert_array_equal(at[at >= 0], np.arange(8))
    assert draw_noise(jax.random.key(0), 40, D, config, training=False) == Noise()


def test_second_choice_is_drawn():
    logits = jnp.tile(jnp.array([[5.0, 1.0, 0.5]]), (200, 1))
    config = MoeConfig(experts=3, top_k=2)
    noise = draw_noise(jax.random.key(0), 200, D, config, training=True)
    seconds = np.bincount(route(logits, 2, noise=noise).experts[:, 1], minlength=3)
    assert seconds[0] == 0 and seconds[1] > seconds[2] > 0
    assert (route(logits, 2).experts == jnp.array([[0, 1]])).all()


def test_layer_plan():
    """Few units, repeated: depth does not make the program longer."""
    kinds = {
        "sparse": (True, False) * 12,
        "second_half": (False,) * 12 + (True,) * 12,
        "dense": (True,) * 24,
    }
    stretches = {name: LayerPlan.of(pattern).stretches for name, pattern in kinds.items()}
    assert stretches["sparse"] == ((0, (True, False), 12),)
    assert stretches["second_half"] == ((0, (False,), 12), (12, (True,), 12))
    assert stretches["dense"] == ((0, (True,), 24),)
    assert LayerPlan.of((True, False, True, False, True)).stretches == (
        (0, (True, False), 2),
        (4, (True,), 1),
    )
    for placement, pattern in kinds.items():
        numbers = MoeConfig(experts=2, placement=placement).numbers(24)
        assert tuple(i in numbers for i in range(24)) == pattern
    assert MoeConfig(experts=2, placement="first_half").numbers(5) == (0, 1)
    assert MoeConfig(experts=0).numbers(24) == ()


@pytest.mark.parametrize("layers", [(0, 2), (1, 2, 3), (3,), (0, 1, 2, 3)])
def test_upcycled_is_the_dense_decoder(layers):
    """Copies of the MLP, each weighted by its probability: with top-2 and no meta expert the dense
    decoder itself.

    Whatever layers hold the experts, and with all outputs by layer.
    """
    decoder = dataclasses.replace(tiny.CONFIG.decoder, depth=4)
    dense = dataclasses.replace(tiny.CONFIG, decoder=decoder, lora=LoraConfig(rank=0))
    moe = MoeConfig(experts=3, layers=layers, top_k=2, meta=False)
    mixed = dataclasses.replace(dense, moe=moe)
    source, target = tiny.model(dense), tiny.model(mixed, seed=1)
    leaves = parameters(source)
    prefix = "decoder/layers/mlp/"
    mlp = {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}
    new = {f"decoder/layers/{path}": leaf for path, leaf in upcycled(mlp, moe, 4).items()}
    shapes = parameters(abstract(mixed))
    assert {path: leaf.shape for path, leaf in new.items()} == {path: shapes[path].shape for path in new}
    routers = {p for p in shapes if "/router/" in p}
    assert (
        set(shapes) == (set(leaves) - {p for p in leaves if p.startswith(prefix)}) | set(new) | routers
    )
    target = with_parameters(
        target, {p: leaf for p, leaf in leaves.items() if p in shapes and p not in new} | new
    )
    batch = tiny.mixed_batch(np.random.default_rng(0), rows=3)

    @jax.jit
    def run(model):
        x, _ = model.embed(batch)
        return model.decoder(x, span_of(batch), states=True)

    expected, actual = run(source), run(target)
    real = batch["segments"] != 0
    for states, states_ in zip(expected.states, actual.states, strict=True):
        np.testing.assert_allclose(np.asarray(states_)[real], np.asarray(states)[real], atol=2e-5)
    assert actual.states.shape[0] == 5 and expected.routing is None
    np.testing.assert_array_equal(actual.states[-1], actual.hidden)
    assert actual.routing.experts.shape == (len(layers), real.size, 2)
    assert (actual.routing.counts.sum(axis=1) == real.sum()).all()


def test_loss():
    """The balancing loss enters with its coefficient, whatever the weights of the answers."""
    decoder = dataclasses.replace(tiny.CONFIG.decoder, depth=4)
    config = dataclasses.replace(
        tiny.CONFIG, decoder=decoder, moe=MoeConfig(experts=3), lora=LoraConfig(rank=0)
    )
    with_loss = dataclasses.replace(config, moe=dataclasses.replace(config.moe, aux_coef=0.5))
    leaves = parameters(tiny.model(config))
    batch = tiny.mixed_batch(np.random.default_rng(0), reduction="example")
    run = jax.jit(lambda model: loss_sums(model, batch, LossConfig(reduction="example"), None, None))
    (plain, _), (total, aux) = (run(with_parameters(abstract(c), leaves)) for c in (config, with_loss))
    weight, balance = aux["weight"], np.asarray(aux["balance"] / aux["weight"])
    assert balance.shape == (2,) and (balance > 0.9).all() and aux["tokens"].shape == (2, 3)
    np.testing.assert_allclose((total - plain) / weight, 0.5 * balance.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "moe, words",
    [
        ({"top_k": 3}, "top_k=3 of 4"),
        ({"experts": 1, "top_k": 2}, "top_k=2 of 1"),
        ({"layers": (0, 7)}, "layers"),
        ({"layers": (1, 0)}, "rising"),
        ({"path": "capacity"}, "capacity_factor"),
        ({"capacity_factor": 0.0}, "above 0"),
        ({"gate_noise": "rsample", "top_k": 2}, "rsample"),
        ({"gate_noise": "loud"}, "unknown"),
        ({"placement": "here"}, "unknown"),
    ],
)
def test_refusals(moe, words):
    with pytest.raises(UserError, match=words):
        check_model(settings(dataclasses.replace(GATED, depth=4), **moe))
    check_model(settings(dataclasses.replace(GATED, depth=4)))


def test_adapters_of_experts_are_refused():
    with pytest.raises(UserError, match="experts take no adapters"):
        check_model(dataclasses.replace(settings(), lora=LoraConfig(rank=2)))
    check_model(dataclasses.replace(settings(), lora=LoraConfig(rank=2, targets=("q", "v"))))
