"""Experts that are switched off: what the connector then makes, and losses that were planted."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ttest_1samp
from support import tiny
from support.toy import Toy, sets_of, toy_config

from unimed_jax.analyze import ablation, ablation_report
from unimed_jax.config import VISUAL_TASKS
from unimed_jax.errors import UserError
from unimed_jax.evaluate.metrics import NotComputed
from unimed_jax.evaluate.tasks import units_of
from unimed_jax.model.parameters import parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")
TASKS = np.arange(5, dtype=np.int32)


def made(model):
    """Visual tokens [5, T, O] and weights [5, T, E] of five images, one of each task."""
    images = np.stack([tiny.image(np.random.default_rng(i)) for i in range(5)])
    out = model.encode_images(images, TASKS)
    return np.asarray(out.tokens), np.asarray(out.routing)


def changed(model, path, change):
    leaf = np.array(parameters(model)[path])
    change(leaf)
    return with_parameters(model, {path: jnp.asarray(leaf)})


def test_the_weights_of_the_others_are_scaled_to_sum_to_one():
    model = tiny.model()
    _, before = made(model)
    tokens, after = made(ablation.without_expert(model, 1))
    assert (after[..., 1] == 0).all()
    np.testing.assert_allclose(after.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(after[..., 0] / after[..., 2], before[..., 0] / before[..., 2], rtol=1e-4)

    def change(up):
        up[:, 10:20] += 1  # weights of expert 1

    other = changed(model, "connector/experts/up", change)
    np.testing.assert_array_equal(made(ablation.without_expert(other, 1))[0], tokens)
    assert model.connector.kept is None  # the model itself is as it was
    np.testing.assert_array_equal(made(model)[1], before)


def test_an_expert_that_adds_nothing_is_not_missed():
    def change(bias):
        bias[2] = -1e4  # its sigmoid is 0

    model = changed(tiny.model(), "connector/router/out_bias", change)
    tokens, weights = made(model)
    assert (weights[..., 2] == 0).all()
    np.testing.assert_allclose(made(ablation.without_expert(model, 2))[0], tokens, atol=1e-6)
    assert np.abs(made(ablation.without_expert(model, 0))[0] - tokens).max() > 0.01
    # One of two equal experts is not missed either.
    twins = tiny.model(tiny.config(connector={"experts": 2, "router": "constant", "task_tokens": 0}))
    for path in ("up", "up_bias", "down", "bias"):

        def copy(leaf, path=path):
            if path == "up":
                leaf[:, 10:] = leaf[:, :10]
            else:
                leaf[len(leaf) // 2 :] = leaf[: len(leaf) // 2]

        twins = changed(twins, f"connector/experts/{path}", copy)
    whole = made(twins)[0]
    for expert in range(2):
        np.testing.assert_allclose(made(ablation.without_expert(twins, expert))[0], whole, atol=1e-5)


@pytest.mark.parametrize("form", ["fast", "literal"])
def test_without_its_only_expert_a_task_sees_nothing(form):
    model = tiny.model(tiny.config(connector={"router": "hard", "experts": 5, "form": form}))
    whole, _ = made(model)
    tokens, weights = made(ablation.without_expert(model, 3))
    assert (tokens[3] == 0).all() and (weights[3] == 0).all()
    np.testing.assert_allclose(np.delete(tokens, 3, 0), np.delete(whole, 3, 0), atol=1e-6)


def lacks(metric, records):
    raise NotComputed("not computed: needs Java")


def test_losses_are_those_that_were_planted():
    config, toy = toy_config(), Toy()
    units = [unit for unit in units_of(config, sets_of(toy))[0] if unit.task in ("cls", "identify")]

    def records(right):
        """Answers where `right(task, i)` says so."""
        return {
            unit.name: [
                {"cluster": e.cluster, "reference": e.answer, "meta": e.meta, "task": unit.task}
                | {"prediction": e.answer if right(unit.task, i) else "nothing", "template": ""}
                | {"set": "toy"}
                for i, e in enumerate(unit.examples)
            ]
            for unit in units
        }

    answered = {
        "all": records(lambda task, i: True),
        "without 0": records(lambda task, i: True),
        "without 1": records(lambda task, i: task != "cls" or i % 4),
        "without 2": records(lambda task, i: task != "identify"),
    }
    found = ablation.losses(units, answered, config)
    for name, lost in (("toy/test/cls", (0, 0.25, 0)), ("toy/test/identify", (0, 0, 1))):
        entry = found[name]
        assert entry["whole"]["value"] == 1 and entry["clusters"] == 6 and entry["n"] == 24
        assert [off["value"] for off in entry["off"]] == pytest.approx(lost)
        assert [off["score"] for off in entry["off"]] == pytest.approx([1 - each for each in lost])
    assert found["toy/test/cls"]["off"][0]["ci95"] == [0, 0]
    low, high = found["toy/test/cls"]["off"][1]["ci95"]
    assert low < 0.25 < high
    assert [off["verdict"] for off in found["toy/test/identify"]["off"]] == ["undecided"] * 2 + ["helps"]
    # All six clusters lose all, which tells nothing of others; a seventh that loses nothing gives t = 6.
    gone = found["toy/test/identify"]["off"][2]
    assert gone["ci95"] is None and gone["p"] == pytest.approx(ttest_1samp([1] * 6 + [0], 0).pvalue)
    assert set(VISUAL_TASKS) > {"cls"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(units[0].metrics[0]), "__call__", lacks)
        with pytest.raises(UserError, match="leads the scores of toy but is not computed: needs Java"):
            ablation.losses(units, answered, config)


def hidden(model):
    """Hidden states of a batch with every task, [B, S, D]."""
    return np.asarray(model(tiny.mixed_batch(np.random.default_rng(0), rows=6)).hidden)


@pytest.mark.parametrize("path, top_k", [("grouped", 1), ("dense", 2)])
def test_an_expert_of_the_decoder_that_is_off_is_not_read(path, top_k):
    moe = {"experts": 3, "top_k": top_k, "placement": "dense", "path": path}
    model = tiny.model(tiny.config(moe=moe, lora={"rank": 0}))
    whole = hidden(model)
    off = hidden(ablation.without_decoder_expert(model, 1))
    assert np.isfinite(off).all() and np.abs(off - whole).max() > 1e-3

    def change(kernel):
        kernel[:, 1] += 1  # weights of expert 1 in every layer

    other = changed(model, "decoder/layers/moe/experts/down/kernel", change)
    assert np.abs(hidden(other) - whole).max() > 1e-3
    np.testing.assert_array_equal(hidden(ablation.without_decoder_expert(other, 1)), off)
    np.testing.assert_array_equal(hidden(model), whole)  # the model itself is as it was
    # A router that never chooses the expert loses nothing without it.

    def never(bias):
        bias[:, 1] = -1e4

    unused = changed(model, "decoder/layers/moe/router/bias", never)
    expected = hidden(unused)
    np.testing.assert_allclose(
        hidden(ablation.without_decoder_expert(unused, 1)), expected, atol=1e-5, rtol=1e-5
    )


def test_the_meta_expert_is_switched_off_in_all_layers():
    moe = {"experts": 2, "placement": "sparse"}
    model = tiny.model(tiny.config(moe=moe, lora={"rank": 0}))

    def nothing(kernel):
        kernel[:] = 0

    silent = changed(model, "decoder/layers/moe/meta/down/kernel", nothing)
    assert np.abs(hidden(silent) - hidden(model)).max() > 1e-3
    np.testing.assert_allclose(hidden(ablation.without_meta_expert(model)), hidden(silent), atol=1e-5)


def test_each_expert_has_a_name():
    config = toy_config()
    assert list(ablation.without_each(tiny.model(), config)) == [
        f"expert {e}" for e in range(config.model.connector.experts)
    ]
    of_decoder = dataclasses.replace(
        config,
        model=tiny.config(
            connector={"kind": "mlp2x_gelu", "task_tokens": 0},
            moe={"experts": 2, "placement": "dense"},
            lora={"rank": 0},
        ),
    )
    assert ablation.has_decoder_experts(of_decoder)
    # of the only expert there is no next choice, so that none could be switched off
    moe = dataclasses.replace(of_decoder.model.moe, experts=1, meta=False)
    alone = dataclasses.replace(of_decoder, model=dataclasses.replace(of_decoder.model, moe=moe))
    assert not ablation.has_decoder_experts(alone)
    model = tiny.model(of_decoder.model)
    names = ["decoder expert 0", "decoder expert 1", "meta expert"]
    assert list(ablation.without_each(model, of_decoder)) == names
    page = ablation_report.page(
        {"experts": names, "units": {}, "split": "val", "step": 1, "run": "runs/it"}
        | {"connector": "mlp2x_gelu", "router": None}
    )
    assert "next choice" in page and "visual token" not in page and "meta expert" in page
