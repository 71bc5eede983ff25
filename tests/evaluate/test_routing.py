"""The routing report: bounded batches of fitted images, and a model that stays as it is."""

import dataclasses

import numpy as np
import pytest
from support import tiny

from unimed_jax.config import Config, EvaluateConfig
from unimed_jax.evaluate import routing
from unimed_jax.model.parameters import parameters


@pytest.fixture(scope="module")
def measured():
    """(report in one batch, report in batches of 2, sizes of the batches, leaves before and after)."""
    config = Config(model=tiny.CONFIG, evaluate=EvaluateConfig(bootstrap=20))
    model, other = tiny.model(), tiny.model(seed=1)
    before = {path: np.asarray(leaf) for path, leaf in parameters(model).items()}
    pixels = {key: tiny.image(np.random.default_rng(key)) for key in range(5)}
    read: list[int] = []

    def one(key):
        read.append(key)
        return pixels[key]

    clusters = ["a", "a", "b", "c", "c"]
    whole = routing.routing_report(model, other, config, list(pixels), pixels.__getitem__, clusters)
    parts = routing.routing_report(model, other, config, list(pixels), one, clusters, batch=2)
    assert read == list(pixels)  # each image once, in turn
    return whole, parts, before, parameters(model)


def test_batches_do_not_change_the_report(measured):
    whole, parts, *_ = measured
    assert whole["images"] == parts["images"] == 5
    np.testing.assert_allclose(parts["maps"], whole["maps"], rtol=0, atol=1e-6)
    for key in ("tv_trained", "tv_step0"):
        assert parts[key]["value"] == pytest.approx(whole[key]["value"], abs=1e-6)
        low, high = parts[key]["ci95"]
        assert low <= parts[key]["value"] <= high
    np.testing.assert_allclose(np.sum(whole["mean_weights"], axis=-1), 1, atol=1e-6)


def test_the_router_without_its_task_half_is_a_copy(measured):
    whole, _, before, after = measured
    assert abs(whole["tv_token_router"]) < 1e-6 < whole["tv_trained"]["value"]
    assert list(before) == list(after) and any("task_kernel" in path for path in after)
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[path])


def test_a_connector_without_experts_has_no_report():
    settings = tiny.config(connector={"kind": "linear", "task_tokens": 0})
    config = dataclasses.replace(Config(), model=settings)
    assert routing.routing_report(None, None, config, [], None, []) is None
