"""Routing statistics where the right numbers are known: constant, hard and planted routers."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import tiny
from support.toy import Toy, sets_of, toy_config

from unimed_jax.analyze import routing
from unimed_jax.analyze.examples import held_out_units, shown_images
from unimed_jax.config import VISUAL_TASKS
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import units_of
from unimed_jax.runs.open import Run

pytestmark = pytest.mark.usefixtures("quick_compiles")


def tiny_run(**connector) -> Run:
    """A model whose every leaf is random, on the toy set's settings."""
    settings = tiny.config(connector=connector)
    config = dataclasses.replace(toy_config(), model=settings)
    return Run(Path("runs/toy"), config, SimpleNamespace(), tiny.model(settings), step=7)


def toy_units(run: Run, *toys):
    return units_of(run.config, sets_of(*(toys or (Toy(),))))[0]


@pytest.fixture(scope="module")
def constant():
    run = tiny_run(router="constant", experts=4)
    return routing.analyse(run, toy_units(run), ["plane"])


@pytest.fixture(scope="module")
def hard():
    run = tiny_run(router="hard", experts=5)
    return routing.analyse(run, toy_units(run), ["plane"])


def test_a_constant_router_gives_every_expert_the_same_weight(constant):
    assert set(constant["groups"]["task"]) == set(VISUAL_TASKS) and constant["images"] == 12
    for groups in constant["groups"].values():
        for entry in groups.values():
            np.testing.assert_allclose(entry["weights"], 1 / 4, atol=1e-6)
            np.testing.assert_allclose(entry["ci95"], 1 / 4, atol=1e-6)
            assert entry["experts_used"] == pytest.approx(4, abs=1e-5)
    for entry in constant["places"].values():
        assert np.shape(entry["weights"]) == (tiny.TOKENS, 4)
        assert np.shape(entry["ci95"]) == (tiny.TOKENS, 4, 2)
    assert np.max(constant["between_tasks"]["distance"]) == 0
    assert all(np.isnan(entry["value"]) for entry in constant["causes"].values())


def test_a_hard_router_goes_by_the_task_alone(hard):
    for number, task in enumerate(VISUAL_TASKS):
        entry = hard["groups"]["task"][task]
        np.testing.assert_allclose(entry["weights"], np.eye(5)[number], atol=1e-6)
        assert entry["experts_used"] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(hard["between_tasks"]["distance"], 1 - np.eye(5), atol=1e-6)
    assert hard["causes"]["task"]["value"] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(hard["causes"]["task"]["ci95"], 1, atol=1e-6)
    # Examples of "refer" alone name a plane; they all go to its expert.
    assert set(hard["groups"]["plane"]) == {"axial", "coronal"}
    for entry in hard["groups"]["plane"].values():
        np.testing.assert_allclose(entry["weights"], np.eye(5)[VISUAL_TASKS.index("refer")], atol=1e-6)


def test_own_tasks_and_several_sets_are_told_apart():
    run = tiny_run(experts=3)
    units = toy_units(run, Toy(id="one"), Toy(id="two", left_out=("caption",)))
    found = routing.analyse(run, units, ["plane"])
    weights, index = routing.routed(run, shown_images(units))
    assert found["images"] == len(weights) == 24 and weights.shape[1] == len(VISUAL_TASKS)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    shown = shown_images(units)
    for name in ("one", "two"):
        own = [
            weights[i, s.task].mean(0)
            for i, s in zip(index, shown, strict=True)
            if s.unit.source.id == name
        ]
        entry = found["groups"]["set"][name]
        np.testing.assert_allclose(entry["weights"], np.mean(own, axis=0), atol=1e-6)
        low, high = np.array(entry["ci95"]).T
        assert (
            (low <= entry["weights"]).all() and (high >= entry["weights"]).all() and (low < high).any()
        )
    assert found["groups"]["set"]["one"]["clusters"] == 6


@pytest.mark.parametrize("cause", ["task", "place", "image", "task and place"])
def test_variance_goes_to_the_cause_that_was_planted(cause):
    rng = np.random.default_rng(0)
    shape = {"task": (1, 5, 1), "place": (1, 1, 4), "image": (12, 1, 1), "task and place": (1, 5, 4)}
    effect = rng.standard_normal((*shape[cause], 3))
    if cause == "task and place":
        effect -= effect.mean(axis=1, keepdims=True)
        effect -= effect.mean(axis=2, keepdims=True)
    weights = np.broadcast_to(1 / 3 + 0.1 * effect, (12, 5, 4, 3)).astype(np.float32)
    clusters = [f"c{i % 6}" for i in range(12)]
    found = routing.causes(weights, clusters, resamples=50, seed=0)
    assert found[cause]["value"] == pytest.approx(1, abs=1e-4)
    assert sum(entry["value"] for entry in found.values()) == pytest.approx(1, abs=1e-4)
    noise = weights + 0.1 * rng.standard_normal(weights.shape)
    low, high = routing.causes(noise, clusters, resamples=200, seed=0)["the rest"]["ci95"]
    assert 0 < low < high < 1


def test_a_run_without_a_mixture_is_refused():
    for connector, words in (
        ({"kind": "mlp2x_gelu", "task_tokens": 0}, "'mlp2x_gelu', which has no experts"),
        ({"experts": 1, "router": "constant", "task_tokens": 0}, "has one expert"),
    ):
        config = tiny_run(**connector).config
        with pytest.raises(UserError, match=words):
            routing.refuse_without_mixture(Path("runs/it"), config)


def test_a_task_without_examples_is_refused(monkeypatch):
    monkeypatch.setattr(
        "unimed_jax.analyze.examples.open_sets", lambda data: sets_of(Toy(left_out=("cls",)))
    )
    config = tiny_run().config
    assert [unit.task for unit in held_out_units(config, "val", ["refer"], limit=3)] == ["refer"]
    for split, task, words in (
        ("val", "cls", "--task=cls has no example in split 'val', which holds vqa, refer"),
        ("val", "refr", "--task=refr is not a task; did you mean 'refer'"),
        ("tset", "refer", "no example in split 'tset'"),
    ):
        with pytest.raises(UserError, match=words):
            held_out_units(config, split, [task])
    with pytest.raises(UserError, match="no example of toy/val/qa has an image"):
        shown_images(held_out_units(config, "val", ["qa"]))
