"""Separation scores of clouds that were planted, and of visual tokens that are known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_samples
from support.toy_run import toy_run, toy_units

from unimed_jax.analyze import tokens
from unimed_jax.analyze.examples import labelled, shown_images
from unimed_jax.errors import UserError
from unimed_jax.model.parameters import parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")


def clouds(apart: float, each: int = 1) -> tokens.Tokens:
    """Three clouds of 40 points of spread 1 in 8 dimensions, their centres `apart` from each other."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 40)
    centres = apart * np.eye(8)[np.repeat(range(3), 40)] / 2**0.5
    values = centres + rng.standard_normal((120, 8)) / 8**0.5
    clusters, images = np.array([f"c{i % 20}" for i in range(120)]), np.arange(120) // each
    return tokens.Tokens(values, labels, clusters, images, each)


def test_clouds_far_apart_score_near_one_and_mixed_ones_near_zero():
    far = tokens.separation(clouds(60.0), resamples=50, seed=0)
    assert far["value"] > 0.95 and far["ci95"][0] > 0.95 and far["shuffled"][1] < 0.1
    assert set(far["by_label"]) == {"a", "b", "c"} and far["n"] == 120
    mixed = tokens.separation(clouds(0.0), resamples=50, seed=0)
    assert abs(mixed["value"]) < 0.05 and mixed["shuffled"][0] - 0.02 < mixed["value"]
    assert mixed["value"] < mixed["shuffled"][1] + 0.02
    assert tokens.classified(clouds(60.0), 50, 0)["value"] == 1
    by_chance = tokens.classified(clouds(0.0), 50, 0)
    assert by_chance["chance"] == pytest.approx(1 / 3) and abs(by_chance["value"] - 1 / 3) < 0.15
    assert by_chance["ci95"][0] < by_chance["value"] < by_chance["ci95"][1]
    few = clouds(2.0)
    ours = tokens.silhouettes(cdist(few.values, few.values), few.labels)
    np.testing.assert_allclose(ours, silhouette_samples(few.values, few.labels), atol=1e-9)
    points, shares = tokens.flat(clouds(60.0), "pca", 0)
    fewer = dataclasses.replace(few, values=few.values[::5])  # t-SNE is slow
    assert tokens.flat(fewer, "tsne", 0)[0].shape == (24, 2)
    assert points.shape == (120, 2) and sum(shares) > 0.95


def test_every_fold_learns_every_label():
    """Folds of equal size would hold both clusters of "few" in one, and never learn that label."""
    labels = np.repeat(["few", "many"], [20, 40])
    clusters = np.repeat(["f1", "f2", "m1", "m2", "m3"], [10, 10, 15, 9, 16])
    values = np.random.default_rng(0).standard_normal((60, 3)) + 20.0 * (labels == "few")[:, None]
    found = tokens.classified(tokens.Tokens(values, labels, clusters, np.arange(60)), 20, 0)
    assert found["value"] == 1
    alone = dataclasses.replace(clouds(1.0), clusters=clouds(1.0).labels)
    assert tokens.classified(alone, 20, 0) is None


def test_tokens_of_an_image_keep_one_label_when_labels_are_shuffled():
    shuffled = clouds(1.0, each=4).shuffled(np.random.default_rng(0)).reshape(-1, 4)
    assert (shuffled == shuffled[:, :1]).all() and len(set(shuffled[:, 0])) == 3
    assert (shuffled[:, 0] != clouds(1.0).labels[::4]).any()


def test_images_under_every_task_stay_so_when_labels_are_shuffled():
    """Else what tasks do not change at all would always lie outside of the shuffles' range."""
    rng, outside = np.random.default_rng(0), 0
    for seed in range(20):
        values = np.tile(rng.standard_normal((12, 8)), (4, 1)) + 0.1 * rng.standard_normal((48, 8))
        labels, images = np.repeat(list("abcd"), 12), np.tile(np.arange(12), 4)
        every = tokens.Tokens(values, labels, images.astype(str), images)
        shuffled = every.shuffled(rng)
        assert all(set(shuffled[images == image]) == set("abcd") for image in range(12))
        score = tokens.separation(every, resamples=20, seed=seed)
        low, high = score["shuffled"]
        outside += not low <= score["value"] <= high
    assert outside <= 4
    some = dataclasses.replace(every, labels=labels[:20], images=images[:20])  # eight of two labels
    shuffled = some.shuffled(rng)
    assert sorted(shuffled) == sorted(labels[:20])
    assert all(len(set(shuffled[images[:20] == image])) == 2 for image in range(8))


@pytest.mark.parametrize("settings", [{"kind": "linear", "router_hidden": None}, {"router": "constant"}])
def test_a_connector_that_no_task_changes_has_no_picture_of_the_change(settings):
    run = toy_run(**settings, hidden=None) if "kind" in settings else toy_run(**settings)
    shown, labels = labelled(shown_images(toy_units(run)), "task")
    found, points = tokens.analyse(run, shown, labels, most=40, how="pca")
    assert list(found["views"]) == list(points) == ["before", "after", "same"]
    (note,) = found["notes"]
    assert note.startswith("this connector makes the same tokens under every task")
    alike = dataclasses.replace(clouds(1.0), values=np.ones((120, 8), np.float32))
    for how in ("pca", "tsne"):
        places, shares = tokens.flat(alike, how, 0)
        assert (places == 0).all() and places.shape == (120, 2) and shares is None


def test_one_group_is_refused():
    one = dataclasses.replace(clouds(1.0), labels=np.array(["a"] * 119 + ["b"]))
    with pytest.raises(UserError, match="tokens of a 119, b 1 alone"):
        tokens.separation(one, 10, 0)
    run = toy_run()
    shown = shown_images([unit for unit in toy_units(run) if unit.task == "cls"])
    with pytest.raises(UserError, match="--by=task gives the one group 'cls'.*template"):
        labelled(shown, "task")
    with pytest.raises(UserError, match="--by=plain gives no group"):
        labelled(shown, "plain")


def test_tasks_that_a_connector_separates_are_seen_apart_only_behind_it():
    run = toy_run(router="hard", experts=5, kind="moe_linear")
    leaves = parameters(run.model)
    bias = 100 * np.eye(5, leaves["connector/experts/bias"].shape[1], dtype=np.float32)
    run.model = with_parameters(run.model, {"connector/experts/bias": jnp.asarray(bias)})
    shown, labels = labelled(shown_images(toy_units(run)), "task")
    found, points = tokens.analyse(run, shown, labels, most=200, how="pca")
    scores = {name: view["separation"] for name, view in found["views"].items()}
    assert list(scores) == list(tokens.VIEWS) and found["images"] == 12
    assert scores["before"]["value"] < 0.1
    assert all(scores[name]["value"] > 0.9 for name in ("after", "same", "shift"))
    assert scores["after"]["value"] > scores["after"]["shuffled"][1]
    assert found["views"]["shift"]["classified"]["value"] == 1
    assert points["same"][0].shape == (12 * 5, 2)
