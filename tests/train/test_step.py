"""One training step: accumulation, frozen leaves, losses per task, dropout, soft coordinates, one
compile.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import tiny

from unimed_jax.config import (
    TASKS,
    VISUAL_TASKS,
    Config,
    LossConfig,
    OptimizerConfig,
    RuleConfig,
    TrainConfig,
)
from unimed_jax.data import layout
from unimed_jax.model.layers import Linear
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.rules import leaf_rules
from unimed_jax.train import step
from unimed_jax.train.loss import answer_logits, cross_entropy
from unimed_jax.train.optimizer import Optimizer
from unimed_jax.train.step import TrainState, make_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

SHALLOW = tiny.config(vision={"depth": 1}, decoder={"depth": 1})
ADAPT = (RuleConfig("connector/*", True), RuleConfig("*/lora_?", True), RuleConfig("*", False))
ALL = (RuleConfig("*", True),)
RATE = np.float32(1e-3)


def compiled(accumulation=1, rules=ADAPT, dropout=0.0, seed=0):
    """-> (step, optimizer), the same for all tests that ask for the same settings.

    `loss.reduction` is in the weights of a batch; the step does not know it.
    """
    return _compiled(accumulation, rules, dropout, seed)


@functools.cache
def _compiled(accumulation, rules, dropout, seed):
    model = dataclasses.replace(SHALLOW, lora=dataclasses.replace(SHALLOW.lora, dropout=dropout))
    config = Config(
        seed=seed,
        model=model,
        optimizer=OptimizerConfig(skip_unused=False, eps=1e-6),
        train=TrainConfig(accumulation=accumulation, rules=rules),
    )
    given = leaf_rules(parameters(abstract(model)), config.train, config.optimizer)
    optimizer = Optimizer(config.optimizer, given)
    return make_step(abstract(model), config, optimizer, None), optimizer


def start(optimizer, seed=0):
    """-> (fresh state, frozen leaves); a state's arrays are given away to the step."""
    leaves = parameters(tiny.model(SHALLOW, seed))
    trainable = {path: jnp.array(leaf) for path, leaf in leaves.items() if optimizer.rules[path].train}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trainable}
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable)), frozen


def rows_of(rng, count=8) -> list[list[layout.Group]]:
    """Tasks in turn, 1 to 3 questions an image, answers of 2, 3 or 4 tokens."""
    tasks = [(*VISUAL_TASKS, "qa")[row % 6] for row in range(count)]
    return [
        [tiny.group(rng, task, questions=1 + row % 3, images=int(task != "qa"), answer=2 + row % 3)]
        for row, task in enumerate(tasks)
    ]


def batch_of(seed=0, reduction="token", count=8):
    return layout.training_batch(
        rows_of(np.random.default_rng(seed), count), tiny.shape(), tiny.PAD, reduction
    )


def gradients_of(state):
    """Adam's first mean is (1 - beta1) times the gradient."""
    return {path: np.asarray(mean) / (1 - 0.9) for path, mean in state.moments.mu.items()}


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_accumulation_equals_the_whole_batch(reduction):
    """Four micro-batches of unequal weight give the loss, gradients and leaves of the batch in one."""
    batch = batch_of(reduction=reduction)
    weights = batch["weights"].reshape(4, -1).sum(axis=1)
    assert len(set(np.round(weights, 4))) == 3
    results = []
    for accumulation in (1, 4):
        step, optimizer = compiled(accumulation, rules=ALL)
        state, metrics = step(*start(optimizer), batch, RATE)
        results.append((gradients_of(state), state.leaves, jax.device_get(metrics)))
    (whole, leaves, metrics), (parts, split_leaves, split_metrics) = results
    assert split_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    for path, gradient in whole.items():
        size = np.abs(gradient).max()
        assert size > 0, path
        assert np.abs(parts[path] - gradient).max() <= 1e-6 * max(size, 1), path
        np.testing.assert_allclose(split_leaves[path], leaves[path], rtol=0, atol=1e-6, err_msg=path)
    assert split_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_losses_by_hand(reduction):
    """The loss is the mean over tokens, or over examples of their mean.

    A task's loss the same over its own.
    """
    rng = np.random.default_rng(1)
    rows = rows_of(rng)
    batch = layout.training_batch(rows, tiny.shape(), tiny.PAD, reduction)
    model = tiny.model(SHALLOW)
    out = jax.jit(lambda model, batch: answer_logits(model, model(batch).hidden, batch))(model, batch)
    log_p = np.asarray(jax.nn.log_softmax(out), np.float64)
    token_losses: dict[str, list] = {}
    for row, (group,) in enumerate(rows):
        done = 0
        for question in group.questions:
            losses = [-log_p[row, done + i, t] for i, t in enumerate(question.suffix[question.targets])]
            done += question.answer
            token_losses.setdefault(question.task, []).append(losses)
    per_example = {
        task: [np.mean(x) if reduction == "example" else x for x in v]
        for task, v in token_losses.items()
    }
    by_task = {task: np.mean(np.hstack(losses)) for task, losses in per_example.items()}
    overall = np.mean(np.hstack([x for losses in per_example.values() for x in losses]))
    step, optimizer = compiled()
    _, metrics = step(*start(optimizer), batch, RATE)
    assert float(metrics["loss"]) == pytest.approx(overall, rel=1e-5)
    for task, loss in zip(TASKS, np.asarray(metrics["task_loss"]), strict=True):
        assert float(loss) == pytest.approx(by_task[task], rel=1e-5), task
    np.testing.assert_array_equal(metrics["slots"], [2, 2, 1, 1, 1])


def test_routing_metrics():
    """Mean expert weights over the slots of a task; unused slots count nowhere."""
    step, optimizer = compiled()
    batch = batch_of(2)
    _, metrics = step(*start(optimizer), batch, RATE)
    model = tiny.model(SHALLOW)
    _, routing = jax.jit(lambda model, batch: model.embed(batch))(model, batch)
    routing = np.asarray(routing).reshape(8, 2, tiny.TOKENS, 3)
    for t in range(len(VISUAL_TASKS)):
        here = batch["image_tasks"] == t
        assert metrics["slots"][t] == here.sum() > 0
        np.testing.assert_allclose(metrics["routing"][t], routing[here].mean(axis=(0, 1)), rtol=1e-5)


def test_many_steps_compile_once():
    """Any content of one shape, the state of the step before, another rate: one program.

    The loss falls.
    """
    step, optimizer = compiled()
    state, frozen = start(optimizer)
    before = jax.device_get(frozen)
    first = jax.device_get(state.leaves)
    losses = []
    for i in range(6):
        state, metrics = step(state, frozen, batch_of(i % 2), np.float32(1e-2 / (i + 1)))
        losses.append(float(metrics["loss"]))
        assert bool(metrics["finite"])
    assert step._cache_size() == 1
    assert int(state.step) == 6
    assert losses[4] < losses[0] and losses[5] < losses[1]
    # What is frozen has no state, no gradient and is not given away; all else moved.
    assert state.leaves.keys() == state.moments.mu.keys() == first.keys()
    assert not set(frozen) & set(first) and {path.split("/")[0] for path in frozen} == {
        "vision",
        "decoder",
    }
    for path, leaf in before.items():
        np.testing.assert_array_equal(frozen[path], leaf)
    assert all(np.any(np.asarray(state.leaves[path]) != leaf) for path, leaf in first.items())


def test_not_finite_is_reported():
    step, optimizer = compiled()
    batch = batch_of()
    batch["weights"][0, 0] = np.nan
    _, metrics = step(*start(optimizer), batch, RATE)
    assert not bool(metrics["finite"])


def test_text_alone():
    """A batch without an image: the connector has a gradient of zero, the loss is finite."""
    rng = np.random.default_rng(3)
    rows = [[tiny.group(rng, "qa", images=0)] for _ in range(8)]
    step, optimizer = compiled()
    state, metrics = step(
        *start(optimizer), layout.training_batch(rows, tiny.shape(), tiny.PAD, "token"), RATE
    )
    assert bool(metrics["finite"]) and not np.any(metrics["slots"])
    # a task without an answer has no loss
    assert np.isnan(metrics["task_loss"]).tolist() == [True] * 5 + [False]
    for path, gradient in gradients_of(state).items():
        assert np.any(gradient) != path.startswith("connector/"), path


# ---------------------------------------------------------------------------------------------
# Dropout of adapters
# ---------------------------------------------------------------------------------------------


def test_dropout_depends_on_seed_and_step_alone():
    def loss(seed, at, dropout=0.5):
        step, optimizer = compiled(dropout=dropout, seed=seed)
        state, frozen = start(optimizer)
        return float(step(state._replace(step=jnp.int32(at)), frozen, batch_of(), RATE)[1]["loss"])

    off = loss(0, 0, dropout=0.0)
    assert loss(0, 7, dropout=0.0) == off
    on = loss(0, 0)
    assert loss(0, 0) == on
    assert len({off, on, loss(0, 1), loss(0, 2), loss(1, 0)}) == 5


def test_micro_batches_drop_on_their_own():
    """Twice the same rows, under two task names: with dropout each micro-batch draws its own masks."""
    half = batch_of(count=4)
    batch = {key: np.concatenate([value, value]) for key, value in half.items()}
    batch["target_tasks"] = np.repeat([[0], [1]], 4, axis=0) * np.ones(
        (1, batch["targets"].shape[1]), np.int32
    )
    step, optimizer = compiled(accumulation=2, dropout=0.5)
    _, metrics = step(*start(optimizer), batch, RATE)
    first, second = np.asarray(metrics["task_loss"])[:2]
    assert abs(first - second) > 1e-3
    step, optimizer = compiled()
    _, metrics = step(*start(optimizer), batch, RATE)
    first, second = np.asarray(metrics["task_loss"])[:2]
    assert first == pytest.approx(second, rel=1e-6)


def test_dropout_is_off_in_evaluation():
    settings = dataclasses.replace(SHALLOW, lora=dataclasses.replace(SHALLOW.lora, dropout=0.9))
    hidden = jax.jit(lambda model, batch: model(batch).hidden)
    batch = batch_of()
    np.testing.assert_array_equal(
        hidden(tiny.model(settings), batch), hidden(tiny.model(SHALLOW), batch)
    )


def test_dropout_of_one_linear():
    """Only the adapter's input is dropped, kept entries grow by 1 / (1 - rate), the mean stays."""
    lora = dataclasses.replace(SHALLOW.lora, rank=4, alpha=8.0, dropout=0.25)
    linear = Linear(16, 4, lora=lora, rngs=nnx.Rngs(0))
    linear.lora_a[...] = jnp.eye(16)[:, :4]
    linear.lora_b[...] = jnp.eye(4)
    x = jnp.ones((4000, 16))
    base = linear(x) - 2.0  # alpha / rank times the identity
    dropped = np.asarray(linear(x, jax.random.key(1)) - base)
    kept = dropped > 1
    np.testing.assert_allclose(dropped[kept], 2 / 0.75, rtol=1e-5)
    np.testing.assert_allclose(dropped[~kept], 0, atol=1e-5)
    assert kept.mean() == pytest.approx(0.75, abs=0.02)


# ---------------------------------------------------------------------------------------------
# Soft targets of coordinates
# ---------------------------------------------------------------------------------------------

START = tiny.COORDINATE_START


def random_logits(answers=4):
    return jnp.asarray(np.random.default_rng(4).standard_normal((2, answers, 120)), jnp.float32)


TARGETS = jnp.array([[START, START + 50, START + 100, START - 1], [5, START + 101, START + 3, 0]])


def test_soft_coordinates_by_hand():
    """A Gaussian over the 101 coordinates, cut at the ends and normalised.

    Other tokens one-hot with weight 1.
    """
    logits = random_logits()
    nll, factor = cross_entropy(
        logits, TARGETS, LossConfig(coordinate_sd=2.0, coordinate_weight=3.0), START
    )
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    for b, a in np.ndindex(2, 4):
        target = int(TARGETS[b, a])
        centre = target - START
        if not 0 <= centre <= 100:
            assert (
                float(nll[b, a]) == pytest.approx(-log_p[b, a, target], rel=1e-5)
                and float(factor[b, a]) == 1
            )
            continue
        soft = np.exp(-((np.arange(101) - centre) ** 2) / (2 * 2.0**2))
        expected = -(soft / soft.sum()) @ log_p[b, a, START : START + 101]
        assert float(nll[b, a]) == pytest.approx(expected, rel=1e-5) and float(factor[b, a]) == 3


def test_narrow_coordinates_are_one_hot():
    logits = random_logits()
    hard, ones = cross_entropy(logits, TARGETS, LossConfig(), START)
    narrow, _ = cross_entropy(logits, TARGETS, LossConfig(coordinate_sd=1e-3), START)
    # a tokenizer without coordinates
    none, _ = cross_entropy(logits, TARGETS, LossConfig(coordinate_sd=2.0), None)
    np.testing.assert_allclose(narrow, hard, rtol=1e-6)
    np.testing.assert_array_equal(none, hard)
    assert (np.asarray(ones) == 1).all()


@pytest.mark.parametrize("sd", [1e-3, 0.5, 30.0])
def test_soft_coordinates_have_finite_gradients(sd):
    """Also after labels that are no coordinate, far from all of them."""

    def total(logits):
        return cross_entropy(logits, TARGETS, LossConfig(coordinate_sd=sd), START)[0].sum()

    gradient = np.asarray(jax.grad(total)(random_logits()))
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-5)
    for b, a in ((0, 3), (1, 0)):  # one-hot: probabilities, less 1 at the target
        expected = np.asarray(jax.nn.softmax(random_logits()[b, a])).copy()
        expected[int(TARGETS[b, a])] -= 1
        np.testing.assert_allclose(gradient[b, a], expected, atol=1e-6)


@pytest.mark.parametrize("here", ["cpu", "tpu"])
def test_the_options_of_the_compiler_are_those_of_the_hardware(monkeypatch, here):
    given = []
    monkeypatch.setattr(step, "hardware", lambda: here)
    monkeypatch.setattr(jax, "jit", lambda function, **how: given.append(how["compiler_options"]))
    _compiled.__wrapped__(1, ADAPT, 0.0, 0)
    assert given == [step.OPTIONS.get(here)]
    assert (given[0] is None) == (here == "cpu")
