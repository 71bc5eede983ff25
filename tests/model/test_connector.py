"""The connector: the fast form equals the literal one in values and gradients, and both the
published rules.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from unimed_jax.model.connector import aggregate, expert_weights, visual_features
from unimed_jax.model.parameters import parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

AGGREGATIONS = [("projection", 2), ("projection", 4), ("block", 4), ("avgpool", 4), ("maxpool", 4)]
ROUTERS = [
    *itertools.product(("soft", "sparse"), ("task_token", "token", "task")),
    ("hard", "task_token"),
    ("constant", "task_token"),
]


def variant(index: int, kind: str, aggregation, router) -> dict:
    """One of the grid.

    What the grid does not name (experts 3..7, top 1..3, task tokens, widths) goes round.
    """
    reads_task = router[0] in ("soft", "sparse") and router[1] != "token"
    return {
        **{"kind": kind, "aggregation": aggregation[0], "rate": aggregation[1]},
        **{
            "router": router[0],
            "router_input": router[1],
            "experts": 3 + index % 5,
            "top_k": 1 + index % 3,
        },
        **{"task_tokens": 1 if reads_task else index % 2, "task_token_width": (None, 7)[index % 2]},
        **{"hidden": (None, 10)[index // 2 % 2], "router_hidden": (None, 14)[index // 3 % 2]},
    }


GRID = [
    variant(i, *fields)
    for i, fields in enumerate(itertools.product(("moe_linear", "moe_mlp"), AGGREGATIONS, ROUTERS))
]
# Each kind with each router, once, on the five aggregations in turn.
EVERY_ROUTER = [
    variant(i, kind, AGGREGATIONS[i % 5], router)
    for i, (kind, router) in enumerate(itertools.product(("moe_mlp", "moe_linear"), ROUTERS))
]


def name_of(connector: dict) -> str:
    names = ("kind", "aggregation", "rate", "router", "router_input", "experts", "top_k", "task_tokens")
    return "-".join(str(connector[name]) for name in names)


def inputs(seed=0, images=3):
    """Patch features [N, 16, 12] of images of all kinds of task, and cotangents to weigh the
    outputs with.
    """
    rng = np.random.default_rng(seed)
    return rng.standard_normal((images, 16, 12)).astype(np.float32), np.array(
        [2, 0, 2][:images], np.int32
    )


def literal_twin(connector):
    twin = with_parameters(connector, {})
    twin.config = dataclasses.replace(connector.config, form="literal")
    return twin


@jax.jit
def values_and_gradients(connector, patches, tasks, cotangent):
    """-> outputs, and gradients of a weighted sum of the tokens by every leaf and by the patches."""

    def loss(leaves, patches):
        out = with_parameters(connector, leaves)(patches, tasks)
        return (out.tokens * cotangent).sum(), out

    leaves = parameters(connector)
    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(leaves, patches)
    return out, {**grads[0], "patches": grads[1]}


def check_forms(connector: dict):
    connector = tiny.model(tiny.config(connector=connector)).connector
    patches, tasks = inputs()
    count = 16 // connector.config.rate
    cotangent = np.random.default_rng(1).standard_normal((3, count, 16)).astype(np.float32)
    fast, fast_grads = values_and_gradients(connector, patches, tasks, cotangent)
    slow, slow_grads = values_and_gradients(literal_twin(connector), patches, tasks, cotangent)
    relative(fast.tokens, slow.tokens, "tokens")
    relative(fast.routing, slow.routing, "routing")
    assert fast_grads.keys() == slow_grads.keys()
    for path, gradient in slow_grads.items():
        relative(fast_grads[path], gradient, f"gradient of {path}")
    used = {path for path, gradient in slow_grads.items() if np.any(gradient)}
    idle = set(slow_grads) - used
    routed = connector.config.router in ("soft", "sparse")
    # a constant weight of 1
    top_one = connector.config.router == "sparse" and connector.config.top_k == 1
    for path in idle:
        assert "task_tokens" in path or (path.startswith("router") and top_one), path
    if routed and not top_one and connector.config.router_input != "token":
        assert "task_tokens" in used


def relative(actual, expected, what, tolerance=1e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, what
    worst, size = np.abs(actual - expected).max(), np.abs(expected).max()
    assert worst <= tolerance * size, f"{what}: {worst:.1e} of {size:.1e}"


@pytest.mark.parametrize("connector", EVERY_ROUTER, ids=name_of)
def test_fast_equals_literal(connector):
    check_forms(connector)


@pytest.mark.slow
@pytest.mark.parametrize("connector", GRID, ids=name_of)
def test_fast_equals_literal_everywhere(connector):
    check_forms(connector)


# ---------------------------------------------------------------------------------------------
# The published rules, written out
# ---------------------------------------------------------------------------------------------


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5))


def test_aggregation_by_hand():
    """Strips of consecutive patches; squares; pools over squares.

    Patch p of a 4 x 4 grid holds p, p + 100.
    """
    x = (np.arange(16)[:, None] + np.array([0, 100])).astype(np.float32)[None]  # [1, 16, 2]

    def tokens(kind, rate):
        return np.asarray(aggregate(jnp.asarray(x), kind, rate))[0]

    for rate in (2, 4):
        strip = tokens("projection", rate)
        assert strip.shape == (16 // rate, 2 * rate)
        np.testing.assert_array_equal(strip[1], x[0, rate : 2 * rate].reshape(-1))
    squares = np.array([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    np.testing.assert_array_equal(tokens("block", 4), x[0, squares].reshape(4, 8))
    np.testing.assert_array_equal(tokens("avgpool", 4), x[0, squares].mean(axis=1))
    np.testing.assert_array_equal(tokens("maxpool", 4), x[0, squares].max(axis=1))


def test_routing_rules():
    logits = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    tasks = jnp.array([3, 1])

    def weights(kind, top_k=2):
        return np.asarray(expert_weights(jnp.asarray(logits), kind, top_k, tasks, 5))

    sigmoid = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(weights("soft"), sigmoid / sigmoid.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(weights("hard")[:, 0], np.eye(5)[[3, 1]])
    np.testing.assert_array_equal(weights("constant"), np.full((2, 1, 5), np.float32(0.2)))
    for k in (1, 2, 3):
        kept = np.argsort(-logits, axis=-1)[..., :k]
        expected = np.zeros_like(logits)
        chosen = np.exp(np.take_along_axis(logits, kept, axis=-1))
        np.put_along_axis(expected, kept, chosen / chosen.sum(-1, keepdims=True), axis=-1)
        np.testing.assert_allclose(weights("sparse", k), expected, rtol=1e-5)
        assert ((weights("sparse", k) > 0).sum(-1) == k).all()


def routing_of(tasks, **connector):
    model = tiny.model(tiny.config(connector=connector)).connector
    patches, _ = inputs()
    return np.asarray(
        model(np.repeat(patches[:1], len(tasks), axis=0), np.array(tasks, np.int32)).routing
    )


@pytest.mark.parametrize("level", [0.0, -50.0, -200.0])
def test_soft_routing_has_finite_gradients_at_any_common_level(level):
    logits = jnp.array([0.0, 0.5, -0.3, 1.0, 0.2])[None, None] + level
    value = jnp.arange(5.0)[None, None]

    def weighted(logits):
        return (expert_weights(logits, "soft", 1, jnp.zeros(1, jnp.int32), 5) * value).sum()

    gradient = np.asarray(jax.grad(weighted)(logits))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.1


def test_router_inputs():
    """task_token reads both, token the image alone, task the task alone.

    One image under tasks 0, 1 and 1.
    """
    both, token, task = (
        routing_of([0, 1, 1], router_input=name) for name in ("task_token", "token", "task")
    )
    for routing in (both, token, task):
        np.testing.assert_allclose(routing.sum(-1), 1, rtol=1e-6)
        np.testing.assert_array_equal(routing[1], routing[2])
    assert np.abs(both[0] - both[1]).max() > 1e-2 and np.ptp(both[0], axis=0).max() > 1e-2
    assert (token[0] == token[1]).all() and np.ptp(token[0], axis=0).max() > 1e-2
    assert np.abs(task[0] - task[1]).max() > 1e-2 and not np.ptp(task[0], axis=0).any()


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
@pytest.mark.parametrize("hidden", [None, 10])
def test_dense_connectors(kind, hidden):
    """Linear layers with the exact GELU between them, no routing; the task changes nothing."""
    connector = tiny.model(tiny.config(connector={"kind": kind, "hidden": hidden})).connector
    inner = [layer.kernel[...].shape[1] for layer in connector.layers][:-1]
    assert inner == [hidden or 16] * (len(connector.layers) - 1)
    patches, tasks = inputs()
    out = connector(patches, tasks)
    x = patches.reshape(3, 4, 48).astype(np.float64)
    for i, layer in enumerate(connector.layers):
        x = gelu(x) if i else x
        x = x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)
    assert len(connector.layers) == (1 if kind == "linear" else int(kind[3]))
    assert out.routing is None
    np.testing.assert_allclose(out.tokens, x, rtol=0, atol=1e-5)


def test_experts_by_hand():
    """sum_e w_e * expert_e(x) in float64 from the stored leaves, for one token."""
    connector = tiny.model(tiny.config(connector={"experts": 4})).connector
    patches, tasks = inputs(images=1)
    out = connector(patches, tasks)
    p = {path: np.asarray(leaf, np.float64) for path, leaf in parameters(connector.experts).items()}
    x, total = patches[0, 4:8].reshape(-1).astype(np.float64), 0.0
    for e in range(4):
        part = slice(10 * e, 10 * (e + 1))
        y = gelu(x @ p["up"][:, part] + p["up_bias"][part]) @ p["down"][part] + p["bias"][e]
        total += float(out.routing[0, 1, e]) * y
    np.testing.assert_allclose(out.tokens[0, 1], total, rtol=0, atol=1e-5)


def test_half_precision_and_empty_slots():
    """Tokens come in the compute dtype, routing in float32; a slot of task -1 is finite."""
    connector = tiny.model().connector
    patches, _ = inputs()
    out = connector(jnp.asarray(patches, jnp.bfloat16), np.array([-1, 0, 4], np.int32))
    assert out.tokens.dtype == jnp.bfloat16 and out.routing.dtype == jnp.float32
    assert np.isfinite(np.asarray(out.tokens, np.float32)).all()
    exact = connector(jnp.asarray(patches), np.array([-1, 0, 4], np.int32))
    relative(np.asarray(out.tokens, np.float32), exact.tokens, "bfloat16", tolerance=0.05)


def test_visual_features():
    for (aggregation, rate), expected in zip(AGGREGATIONS, (24, 48, 48, 12, 12), strict=True):
        assert (
            visual_features(tiny.config(connector={"aggregation": aggregation, "rate": rate}))
            == expected
        )
