"""AdamW against torch and optax, the published schedule, which leaves train and which take part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny

from unimed_jax.config import VISUAL_TASKS, OptimizerConfig, RuleConfig, TrainConfig
from unimed_jax.errors import UserError
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.rules import LeafRule, leaf_rules
from unimed_jax.train.optimizer import (
    Optimizer,
    learning_rate,
    participation,
    per_leaf,
    stochastic_bfloat16,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
SHAPES = {"decoder/kernel": (5, 4), "connector/task_tokens": (5, 3), "connector/router/bias": (4,)}


def leaves_and_gradients(steps=5):
    rng = np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in SHAPES.items()
    }
    gradients = [
        {
            path: jnp.asarray(rng.standard_normal(shape) * 10.0**-i, jnp.float32)
            for path, shape in SHAPES.items()
        }
        for i in range(steps)
    ]
    return leaves, gradients


def rules(decay=0.05, scale=1.0) -> dict[str, LeafRule]:
    return {path: LeafRule(True, scale, 0.0 if path.endswith("bias") else decay) for path in SHAPES}


def all_used(leaves) -> dict:
    return {path: jnp.ones((), jnp.int32) for path in leaves}


def run(optimizer: Optimizer, leaves, gradients, rates, used=None):
    state = optimizer.init(leaves)
    update = jax.jit(optimizer.update)
    for i, (gradient, lr) in enumerate(zip(gradients, rates, strict=True)):
        leaves, state, norm = update(gradient, state, leaves, lr, used[i] if used else all_used(leaves))
    return leaves, state, norm


RATES = (1e-2, 3e-2, 1e-2, 5e-3, 1e-3)


@pytest.mark.parametrize("skip_unused", [False, True])
def test_equals_torch(skip_unused):
    """Five steps with two decay groups.

    With all leaves in use the participation rule changes nothing.
    """
    torch = pytest.importorskip("torch", reason=NEEDS)
    leaves, gradients = leaves_and_gradients()
    peers = {path: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for path, leaf in leaves.items()}
    groups = [
        {"params": [peer for path, peer in peers.items() if path.endswith("bias")], "weight_decay": 0.0},
        {
            "params": [peer for path, peer in peers.items() if not path.endswith("bias")],
            "weight_decay": 0.05,
        },
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-6)
    for gradient, lr in zip(gradients, RATES, strict=True):
        for group in adamw.param_groups:
            group["lr"] = lr
        for path, peer in peers.items():
            peer.grad = torch.tensor(np.asarray(gradient[path]))
        adamw.step()
    config = OptimizerConfig(betas=(0.9, 0.98), eps=1e-6, skip_unused=skip_unused)
    ours, _, _ = run(Optimizer(config, rules()), leaves, gradients, RATES)
    for path, peer in peers.items():
        np.testing.assert_allclose(ours[path], peer.detach().numpy(), rtol=0, atol=1e-6, err_msg=path)


def test_equals_optax():
    leaves, gradients = leaves_and_gradients()
    mask = {path: not path.endswith("bias") for path in leaves}
    adamw = optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
        0.0, weight_decay=0.05, mask=mask
    )
    state, expected = adamw.init(leaves), leaves
    for gradient, lr in zip(gradients, RATES, strict=True):
        state.hyperparams["learning_rate"] = jnp.float32(lr)
        updates, state = adamw.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
    ours, _, _ = run(Optimizer(OptimizerConfig(skip_unused=False), rules()), leaves, gradients, RATES)
    for path in leaves:
        np.testing.assert_allclose(ours[path], expected[path], rtol=0, atol=1e-6, err_msg=path)


def test_leaf_rate_and_decay():
    """A rule's scale multiplies the rate of update and decay alike.

    Decay alone moves a leaf towards 0.
    """
    leaves, _ = leaves_and_gradients()
    zero = [jax.tree.map(jnp.zeros_like, leaves)]
    given = rules() | {"decoder/kernel": LeafRule(True, 0.5, 0.1)}
    ours, _, norm = run(Optimizer(OptimizerConfig(skip_unused=False), given), leaves, zero, [0.2])
    assert norm == 0
    np.testing.assert_allclose(
        ours["decoder/kernel"], leaves["decoder/kernel"] * (1 - 0.2 * 0.5 * 0.1), rtol=1e-6
    )
    token = "connector/task_tokens"
    np.testing.assert_allclose(ours[token], leaves[token] * (1 - 0.2 * 0.05), rtol=1e-6)
    np.testing.assert_array_equal(ours["connector/router/bias"], leaves["connector/router/bias"])


def test_clipping():
    """The global norm is cut to `clip`, and reported uncut; a smaller one stays."""
    leaves, gradients = leaves_and_gradients(2)
    norms = [float(optax.tree.norm(g)) for g in gradients]
    assert norms[0] > 1 > norms[1]
    # A large eps makes the update grow with the gradient, which Adam's own scaling would hide.
    config = OptimizerConfig(clip=1.0, eps=10.0, skip_unused=False)
    clipped, _, norm = run(Optimizer(config, rules()), leaves, gradients, RATES[:2])
    assert norm == pytest.approx(norms[1], rel=1e-6)
    by_hand = [jax.tree.map(lambda g: g / norms[0], gradients[0]), gradients[1]]
    unclipped = Optimizer(dataclasses.replace(config, clip=0.0), rules())
    expected, _, _ = run(unclipped, leaves, by_hand, RATES[:2])
    raw, _, norm = run(unclipped, leaves, gradients[:1], RATES[:1])
    assert norm == pytest.approx(norms[0], rel=1e-6)
    for path in leaves:
        np.testing.assert_allclose(clipped[path], expected[path], rtol=1e-6, atol=1e-7)
    assert np.abs(np.asarray(raw["decoder/kernel"] - expected["decoder/kernel"])).max() > 1e-4


def test_unused_leaves_are_left_alone():
    """Out of the graph: value, moments and count stay, whatever the others do; an exact zero takes part.

    A leaf that joins later starts its bias correction from its own count, as torch's does.
    """
    leaves, gradients = leaves_and_gradients(3)
    path, token = "decoder/kernel", "connector/task_tokens"
    gradients[0] = gradients[0] | {path: jnp.zeros((5, 4))}
    rows = jnp.array([1, 0, 0, 0, 1], jnp.int32)[:, None]
    idle = jnp.zeros((), jnp.int32)
    used = [
        all_used(leaves) | {token: rows, "connector/router/bias": idle},
        all_used(leaves) | {token: rows * 0, "connector/router/bias": idle},
        all_used(leaves),
    ]
    optimizer = Optimizer(OptimizerConfig(skip_unused=True), rules())
    one, state, _ = run(optimizer, leaves, gradients[:1], RATES[:1], used)
    # decayed and counted
    np.testing.assert_allclose(one[path], leaves[path] * (1 - RATES[0] * 0.05), rtol=1e-6)
    assert int(state.count[path]) == 1
    np.testing.assert_array_equal(one["connector/router/bias"], leaves["connector/router/bias"])
    np.testing.assert_array_equal(one[token][1:4], leaves[token][1:4])
    assert (np.asarray(one[token] != leaves[token])[[0, 4]]).all()
    assert (np.asarray(state.mean[token]).any(axis=1) == [1, 0, 0, 0, 1]).all()
    three, state, _ = run(optimizer, leaves, gradients, RATES[:3], used)
    np.testing.assert_array_equal(state.count[token][:, 0], [2, 1, 1, 1, 2])
    assert int(state.count["connector/router/bias"]) == 1
    bias = "connector/router/bias"
    fresh, _, _ = run(optimizer, leaves, gradients[2:], RATES[2:3])
    # its first step, as if the others had not been
    np.testing.assert_allclose(three[bias], fresh[bias], rtol=1e-6)
    np.testing.assert_allclose(three[token][1:4], fresh[token][1:4], rtol=1e-6)


def test_participation():
    """The connector with an image, a task's token with an image of that task, all else always."""
    leaves = parameters(abstract(tiny.CONFIG))

    def used(tasks, reads=True):
        return participation(leaves, jnp.array(tasks, jnp.int32), reads)

    images = used([[0, -1], [3, 3]])
    np.testing.assert_array_equal(images["connector/task_tokens"][:, 0], [1, 0, 0, 1, 0])
    assert all(int(images[p]) == 1 for p in leaves if p != "connector/task_tokens")
    assert not np.any(used([[0, -1], [3, 3]], reads=False)["connector/task_tokens"])
    text = used([[-1, -1]])
    for path, value in text.items():
        assert np.all(np.asarray(value) == (0 if path.startswith(("connector/", "vision/")) else 1)), (
            path
        )
    assert used(np.zeros((2, 0)))["connector/task_tokens"].shape == (len(VISUAL_TASKS), 1)


# ---------------------------------------------------------------------------------------------
# Rules and rates
# ---------------------------------------------------------------------------------------------

PATHS = (
    "vision/blocks/up/kernel",
    "decoder/layers/attention/q/lora_a",
    "connector/task_tokens",
    "connector/x/up_bias",
)


def rules_of(*patterns) -> dict[str, LeafRule]:
    return leaf_rules(PATHS, TrainConfig(rules=patterns), OptimizerConfig())


def test_first_match_wins():
    given = rules_of(
        RuleConfig("vision/*", False),
        RuleConfig("*/lora_a", True, lr_scale=2.0, weight_decay=0.3),
        RuleConfig("*", True, lr_scale=0.5),
        RuleConfig("connector/*", False),
    )
    assert [given[path].train for path in PATHS] == [False, True, True, True]
    assert given[PATHS[1]] == LeafRule(True, 2.0, 0.3)
    # the published grouping: task tokens are decayed
    assert given[PATHS[2]] == LeafRule(True, 0.5, 0.05)
    assert given[PATHS[3]] == LeafRule(True, 0.5, 0.0)  # biases are not


def test_published_decay_groups():
    """Of all leaves of the model, those that the published rule spares: one dimension, or a bias."""
    leaves = parameters(
        abstract(tiny.config(decoder={"attention_bias": ("q",)}, vision={"qkv_bias": "qv"}))
    )
    given = leaf_rules(leaves, TrainConfig(), OptimizerConfig(weight_decay=0.07))
    spared = {path for path, rule in given.items() if rule.weight_decay == 0}
    assert all(rule.weight_decay in (0, 0.07) for rule in given.values())
    for path in leaves:
        name = path.split("/")[-1]
        assert (path in spared) == ("bias" in name or name == "scale"), path
    assert {
        "connector/router/out_bias",
        "connector/experts/bias",
        "vision/blocks/attention/q_bias",
    } <= spared


@pytest.mark.parametrize(
    "patterns, sentence",
    [
        (
            (RuleConfig("vision/*", True),),
            "no pattern matches the parameter 'decoder/layers/attention/q/lora_a'",
        ),
        (
            (RuleConfig("conector/*", True), RuleConfig("*", False)),
            "'conector/.' matches no parameter; did you mean 'connector/",
        ),
    ],
    ids=["a leaf without a rule", "a rule without a leaf"],
)
def test_bad_rules(patterns, sentence):
    with pytest.raises(UserError, match=f"config.train.rules: {sentence}"):
        rules_of(*patterns)


def test_schedule():
    """Warm-up to the peak, then a cosine over all steps: a small drop at the joint, the floor at
    the end.
    """
    config = OptimizerConfig(lr=1e-3, min_lr=1e-5, warmup_lr=1e-4, warmup_steps=100)

    def rate(step):
        return learning_rate(step, 1000, config)

    assert rate(0) == 1e-4
    assert rate(50) == pytest.approx((1e-4 + 1e-3) / 2)
    assert rate(99) == pytest.approx(1e-3 - 9e-6)
    assert rate(100) == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * 0.1)))
    assert 0.95e-3 < rate(100) < 0.99e-3
    assert rate(500) == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate(1000) == pytest.approx(1e-5)
    assert learning_rate(0, 10, dataclasses.replace(config, warmup_steps=0)) == 1e-3


@pytest.mark.parametrize("skip_unused", [False, True])
def test_moments_in_bfloat16_follow_those_in_float32(skip_unused):
    """A second moment of 500 steps, each of which is less than half a step of bfloat16."""
    config = OptimizerConfig(skip_unused=skip_unused)
    small = dataclasses.replace(config, moments_dtype="bfloat16")
    shapes = {"decoder/kernel": (40, 50), "connector/task_tokens": (5, 300)}
    leaves = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    given = {path: LeafRule(True, 1.0, 0.0) for path in shapes}

    def after(config):
        optimizer = Optimizer(config, given)

        def body(carry, number):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), len(shapes))
            gradients = {
                path: 1 + jax.random.normal(key, shape)
                for (path, shape), key in zip(shapes.items(), keys, strict=True)
            }
            leaves, state, _ = optimizer.update(gradients, carry[1], carry[0], 1e-3, all_used(shapes))
            return (leaves, state), None

        (_, state), _ = jax.lax.scan(body, (leaves, optimizer.init(leaves)), jnp.arange(500))
        return per_leaf(state)

    exact, kept = after(config), after(small)
    for path in shapes:
        assert kept.mean[path].dtype == kept.square[path].dtype == jnp.bfloat16
        assert (kept.count[path] == 500).all()
        mean, square = (np.asarray(x[path], np.float32) for x in (kept.mean, kept.square))
        assert abs(mean.mean() / exact.mean[path].mean() - 1) < 2e-3
        assert abs(square.mean() / exact.square[path].mean() - 1) < 2e-3
        assert np.abs(square / exact.square[path] - 1).max() < 0.2


def test_stochastic_rounding_keeps_the_mean_and_what_is_bfloat16_already():
    x = jnp.full((100, 300), np.float32(1 + 2**-9 + 2**-11))  # 5/16 of the way to the next
    rounded = stochastic_bfloat16(x, jnp.int32(3), 1).astype(jnp.float32)
    assert set(np.unique(rounded)) == {np.float32(1), np.float32(1 + 2**-7)}
    assert abs(float(rounded.mean() - x[0, 0])) < 5 * 2**-7 * (0.25 / x.size) ** 0.5
    assert not np.array_equal(rounded, stochastic_bfloat16(x, jnp.int32(4), 1).astype(jnp.float32))
    assert not np.array_equal(rounded, stochastic_bfloat16(x, jnp.int32(3), 2).astype(jnp.float32))
    exact = jnp.array([0.0, -0.0, 1.5, -3e38, 1e-38, np.inf, -np.inf, np.nan])
    exact = exact.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(stochastic_bfloat16(exact, jnp.int32(0), 0).astype(jnp.float32), exact)
