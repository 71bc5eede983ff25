"""Norms, distances and moves of experts that were planted."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.toy_run import toy_run, toy_units

from unimed_jax.analyze import expert_weights, experts_report, updates
from unimed_jax.analyze.examples import shown_images
from unimed_jax.model.parameters import parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")
EXPERTS, HIDDEN = 3, 10


def connector_of(model):
    return {path: leaf for path, leaf in parameters(model).items() if path.startswith("connector/")}


def planted(order):
    """Experts 0 and 1 are equal but for the order of expert 1's hidden units; expert 2 is another."""
    model = tiny.model()
    leaves = {path: np.array(leaf) for path, leaf in connector_of(model).items()}
    up = leaves["connector/experts/up"].reshape(-1, EXPERTS, HIDDEN)
    up[:, 1] = up[:, 0][:, order]
    bias = leaves["connector/experts/up_bias"].reshape(EXPERTS, HIDDEN)
    bias[1] = bias[0][order]
    down = leaves["connector/experts/down"].reshape(EXPERTS, HIDDEN, -1)
    down[1] = down[0][order]
    leaves["connector/experts/bias"][1] = leaves["connector/experts/bias"][0]
    return {path: jnp.asarray(leaf) for path, leaf in leaves.items()}


@pytest.mark.parametrize("shuffled", [False, True])
def test_equal_experts_have_no_distance_in_what_they_make(shuffled):
    order = np.random.default_rng(0).permutation(HIDDEN) if shuffled else np.arange(HIDDEN)
    leaves = planted(order)
    run = toy_run()
    run.model = with_parameters(run.model, leaves)
    of_weights = expert_weights.weights(leaves, None, EXPERTS)
    apart = np.array(of_weights["relative_distance"])
    if shuffled:
        assert apart[0, 1] > 0.5
    else:
        assert apart[0, 1] == apart[1, 0] == of_weights["distance"][0][1] == 0
    assert apart[0, 2] > 0.5 and (np.diagonal(apart) == 0).all() and "moved" not in of_weights
    assert of_weights["norm"][0] == pytest.approx(of_weights["norm"][1], rel=1e-6)
    made = expert_weights.outputs(run, shown_images(toy_units(run)))
    apart = np.array(made["relative_distance"])
    assert apart[0, 1] < 1e-5 < 0.2 < apart[0, 2] and made["norm"][0] == pytest.approx(made["norm"][1])
    low, high = made["ci95"][0][2]
    assert low <= apart[0, 2] <= high and made["images"] == 12


def test_norms_and_moves_are_those_that_were_planted():
    now = connector_of(tiny.model())
    start = dict(now)
    up = np.array(now["connector/experts/up"])  # [C, E * H]
    up[:, HIDDEN : 2 * HIDDEN] -= 0.1  # expert 1
    start["connector/experts/up"] = jnp.asarray(up)
    start["connector/router/bias"] = now["connector/router/bias"] + 1
    found = expert_weights.weights(now, start, EXPERTS)
    moved = 0.1 * np.sqrt(up.shape[0] * HIDDEN)
    np.testing.assert_allclose(found["moved"], [0, moved, 0], rtol=1e-5)
    np.testing.assert_allclose(found["leaves"]["up"]["moved"], [0, moved, 0], rtol=1e-5)
    assert found["leaves"]["down"]["moved"] == [0, 0, 0]
    assert found["move_cosine"][1][1] == pytest.approx(1)
    assert np.isnan(found["move_cosine"][0][1])  # expert 0 did not move, and so has no direction
    made = {"ci95": None, "relative_distance": np.zeros((3, 3))}
    assert experts_report._pairs(found, made)[0][-1] == "-"
    router = found["others"]["router"]
    assert router["moved"] == pytest.approx(np.sqrt(start["connector/router/bias"].size), rel=1e-5)
    assert found["others"]["task tokens"]["moved"] == 0
    own = [expert_weights.of_expert(p, leaf, EXPERTS) for p, leaf in now.items() if "/experts/" in p]
    every = np.concatenate(own, axis=1)  # [E, n]
    np.testing.assert_allclose(found["norm"], np.linalg.norm(every, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["distance"][0][2], np.linalg.norm(every[0] - every[2]), rtol=1e-5)
    assert every.size == sum(leaf.size for path, leaf in now.items() if "/experts/" in path)


def test_updates_that_were_planted_agree_as_much_as_they_should():
    rng = np.random.default_rng(0)
    common, noise = rng.standard_normal(400), rng.standard_normal((3, 400))
    # The same update in each repeat; its opposite, ten times as large; another one in each repeat.
    vectors = np.stack([np.tile(common, (3, 1)), np.tile(-10 * common, (3, 1)), noise])  # [U, R, n]
    gram = np.einsum("urn,vsn->urvs", vectors, vectors)
    found = updates.similarity(gram, seed=0)
    cosine = np.array(found["cos"])
    assert cosine[0, 1] == pytest.approx(-1) and found["ci95"][0][1] == pytest.approx([-1, -1])
    assert found["norm"][1] == pytest.approx(10 * found["norm"][0])
    assert np.diagonal(cosine)[:2] == pytest.approx(1) and abs(cosine[2, 2]) < 0.1
    low, high = found["ci95"][0][2]
    assert low <= cosine[0, 2] <= high and low < high and abs(cosine[0, 2]) < 0.2
    still = gram.copy()  # an expert that the second task never reaches in its first repeat
    still[1, 0], still[:, :, 1, 0] = 0, 0
    there = updates.similarity(still, seed=0)
    assert [there["cos"][u][1] for u in range(3)] == [None] * 3 == there["cos"][1]
    assert there["ci95"][0][1] is None and there["cos"][0][2] == found["cos"][0][2]
    alone = updates.similarity(gram[:, :1, :, :1], seed=0)
    assert alone["cos"][0][0] is None and alone["ci95"] is None and found["ci95"][0][0] is None
    assert alone["cos"][0][1] == pytest.approx(-1)
    # As alike as the batches let them be: half of each update is common, half is its own.
    half = common / np.linalg.norm(common) + rng.standard_normal((2, 3, 400)) / 20
    found = np.array(updates.similarity(np.einsum("urn,vsn->urvs", half, half), seed=0)["cos"])
    np.testing.assert_allclose(found, 0.5, atol=0.1)
