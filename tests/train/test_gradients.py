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

    def combine(self, gradients):
        return {path: g.sum(axis=0) for path, g in gradients.items()}


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
