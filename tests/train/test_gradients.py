"""Losses by task and strategies of combining their gradients."""

from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from unimed_jax.config import TASKS, LossConfig, TrainConfig
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.train import gradients
from unimed_jax.train.loss import loss_sums, task_losses
from unimed_jax.train.program import build
from unimed_jax.train.step import first_state

pytestmark = pytest.mark.usefixtures("quick_compiles")

EXPERTS = tiny.config(vision={"depth": 1}, moe={"experts": 2, "aux_coef": 0.1}, lora={"targets": ("q",)})
SHALLOW = tiny.config(vision={"depth": 1}, decoder={"depth": 1})


class Each:
    """Every task's own gradient, added again: what a strategy that needs them all looks like."""

    def directions(self, losses):
        return jnp.eye(losses)

    def start(self, losses):
        return ()

    def weights(self, gram, memory, orders):
        return jnp.ones(len(gram)), memory


def test_every_choice_of_the_settings_is_a_strategy():
    assert set(get_args(get_type_hints(TrainConfig)["gradients"])) == set(gradients.STRATEGIES)


@pytest.mark.parametrize("config", [SHALLOW, EXPERTS], ids=["plain", "experts"])
def test_gradients_of_each_task_are_those_of_its_answers_alone(config):
    batch = tiny.mixed_batch(np.random.default_rng(0), 8)
    leaves, model = parameters(tiny.model(config)), abstract(config)

    def losses(leaves, weights=None):
        given = batch if weights is None else {**batch, "weights": weights}
        return task_losses(with_parameters(model, leaves), given, LossConfig(), None, None)

    run = jax.jit(lambda leaves: gradients.along(jnp.eye(len(TASKS) + 1), losses, leaves))
    found, sums, _ = run(leaves)
    alone = jax.jit(jax.grad(lambda leaves, weights: losses(leaves, weights)[0].tasks.sum()))
    for t, task in enumerate(TASKS):
        own = np.where(batch["target_tasks"] == t, batch["weights"], 0)
        assert own.sum() > 0, task
        for path, expected in alone(leaves, own).items():
            size = max(np.abs(expected).max(), 1e-6)
            np.testing.assert_allclose(
                found[path][t], expected, rtol=0, atol=2e-5 * size, err_msg=f"{task} {path}"
            )
    # The last one balances the experts: the router learns from it.
    balance = np.abs(found["decoder/layers/moe/router/kernel"][-1]).max() if config is EXPERTS else 0
    assert (balance > 0) == (config is EXPERTS) == (sums.balance > 0)


@pytest.mark.parametrize("config", [SHALLOW, EXPERTS], ids=["plain", "experts"])
def test_the_total_is_the_sum_over_tasks_and_the_balancing_loss(config):
    batch = tiny.mixed_batch(np.random.default_rng(0), 8)
    model = tiny.model(config)
    total, aux = jax.jit(lambda m: loss_sums(m, batch, LossConfig(), None, None))(model)
    # By the definition before there were losses by task, in float64.
    tasks = np.asarray(aux["task_loss"], np.float64).sum()
    balance = 0.1 * np.asarray(aux["balance"], np.float64).sum() if config is EXPERTS else 0
    assert float(total) == pytest.approx(tasks + balance, rel=1e-6)
    assert float(aux["weight"]) == batch["weights"].sum() == np.asarray(aux["task_weight"]).sum()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_strategy_is_one_class(monkeypatch, accumulation):
    """Named in the settings it changes the step; one that adds what it was given steps as `sum` does."""
    monkeypatch.setitem(gradients.STRATEGIES, "each", Each)
    batch = tiny.mixed_batch(np.random.default_rng(0), 8)
    states = {}
    for name in ("sum", "each"):
        config = tiny.training(gradients=name, accumulation=accumulation)
        program = build(config, None)
        leaves = {path: jnp.array(leaf) for path, leaf in parameters(tiny.model(config.model)).items()}
        state = first_state({path: leaves[path] for path in program.state.leaves}, program.optimizer)
        states[name], _ = program.step(
            state, {p: leaves[p] for p in program.frozen}, batch, np.float32(1e-3)
        )
    means = [state.moments.mean for state in states.values()]
    for path, expected in means[0].items():
        size = np.abs(expected).max()
        assert size > 0, path
        np.testing.assert_allclose(means[1][path], expected, rtol=0, atol=2e-5 * size, err_msg=path)


# ---- gradient surgery ------------------------------------------------------------------------------


def orders_of(seed: int, tasks: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(tasks) for _ in range(tasks)])


def surgery(strategy, rows, memory, orders):
    """Weighs tasks' gradients, the rows of a matrix; the balancing loss has one of zeros here."""
    gram = np.zeros((len(rows) + 1,) * 2, np.float32)
    gram[:-1, :-1] = gradients.gram({"leaf": jnp.asarray(rows)})
    weights, memory = jax.jit(strategy.weights)(gram, memory, orders)
    assert weights[-1] == 1
    return np.asarray(weights[:-1]), memory


def test_conflicts_are_projected_away_by_hand():
    rows = np.array([[1, 0], [-1, 1]], np.float32)
    # g0 loses its part along g1: (1, 0) + 1/2 (-1, 1) = (.5, .5); g1 its part along g0: (0, 1).
    weights, _ = surgery(gradients.PCGrad(), rows, (), np.array([[0, 1], [1, 0]]))
    np.testing.assert_allclose(weights @ rows, [0.5, 1.5], atol=1e-6)
    # Without a conflict nothing changes.
    weights, _ = surgery(gradients.PCGrad(), np.abs(rows), (), np.array([[0, 1], [1, 0]]))
    np.testing.assert_array_equal(weights, [1, 1])
    # Norms of 1 and sqrt(2) become their mean.
    weights, _ = surgery(gradients.EqualNorm(), rows, (), np.array([[0, 1], [1, 0]]))
    mean = (1 + 2**0.5) / 2
    np.testing.assert_allclose(weights, [mean, mean / 2**0.5], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in gradients.STRATEGIES if name != "sum"])
def test_a_task_without_answers_changes_nothing(name):
    strategy = gradients.STRATEGIES[name]()
    rows = np.random.default_rng(3).normal(size=(3, 5)).astype(np.float32)
    orders, memory = orders_of(0, 3), strategy.start(4)
    with_zeros = np.insert(rows, 1, 0, axis=0)
    wide = np.array([[0, 1, 2, 3]] * 4)
    wide[[0, 2, 3]] = np.insert(np.where(orders > 0, orders + 1, 0), 1, 1, axis=1)
    some, _ = surgery(strategy, rows, memory, orders)
    more, _ = surgery(strategy, with_zeros, strategy.start(5), wide)
    np.testing.assert_allclose(more @ with_zeros, some @ rows, atol=1e-6)
    assert np.isfinite(more).all()


@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_surgery_equals_torchjd(name, monkeypatch):
    """On random gradients, step after step, with torchjd given the same random orders."""
    torch = pytest.importorskip("torch", reason="the peer, of the extra `parity`")
    aggregation = pytest.importorskip("torchjd.aggregation", reason="the peer, of the extra `parity`")
    torch.set_default_dtype(torch.float32)
    tasks, decay = 6, 0.3
    ours = gradients.PCGrad() if name == "pcgrad" else gradients.GradVac(decay)
    theirs = aggregation.PCGrad() if name == "pcgrad" else aggregation.GradVac(beta=decay)
    memory, differ = ours.start(tasks + 1), 0
    asked: list[int] = []  # task after task, each in its order: of all tasks, or of the others by number

    def permutation(n):
        i, order = len(asked) % tasks, orders[len(asked) % tasks]
        asked.append(n)
        return torch.tensor(order if n == tasks else [j - (j > i) for j in order if j != i])

    monkeypatch.setattr(torch, "randperm", permutation)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = (rng.normal(size=(tasks, 9)) + 0.2).astype(np.float32)
        orders = orders_of(seed, tasks)
        expected = theirs(torch.tensor(rows)).numpy()
        weights, memory = surgery(ours, rows, memory, orders)
        np.testing.assert_allclose(weights @ rows, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        differ += not np.allclose(expected, rows.sum(axis=0), atol=1e-3)
    assert differ > 15  # there was something to mend


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "equal-norm"])
def test_a_step_follows_the_strategy(name):
    """The step's first moment is the weighted sum of the tasks' gradients, computed one by one."""
    batch = tiny.mixed_batch(np.random.default_rng(0), 8)
    config = tiny.training(gradients=name)
    program, strategy = build(config, None), gradients.STRATEGIES[name]()
    model = tiny.model(config.model)
    leaves = {path: jnp.array(leaf) for path, leaf in parameters(model).items()}
    frozen = {path: leaves[path] for path in program.frozen}
    trained = {path: leaves[path] for path in program.state.leaves}

    def run(leaves):
        return task_losses(
            with_parameters(program.model, {**frozen, **leaves}), batch, LossConfig(), None, None
        )

    each, losses, _ = jax.jit(lambda t: gradients.along(jnp.eye(len(TASKS) + 1), run, t))(trained)
    each = {path: g / losses.weight for path, g in each.items()}
    key = jax.random.fold_in(jax.random.key(config.seed ^ 0x5EED), 0)
    expected, memory = gradients.combine(strategy, each, strategy.start(len(TASKS) + 1), key, len(TASKS))
    state = first_state(trained, program.optimizer, strategy=strategy)
    state, _ = program.step(state, frozen, batch, np.float32(1e-3))
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in expected.values()))
    clip = min(1.0, config.optimizer.clip / norm) if config.optimizer.clip else 1.0
    for path, g in expected.items():
        found = np.asarray(state.moments.mean[path]) / (1 - config.optimizer.betas[0])
        size = max(np.abs(g).max() * clip, 1e-7)
        np.testing.assert_allclose(found, np.asarray(g) * clip, rtol=0, atol=5e-5 * size, err_msg=path)
    for a, b in zip(jax.tree.leaves(state.memory), jax.tree.leaves(memory), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
