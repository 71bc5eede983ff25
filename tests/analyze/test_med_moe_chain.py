"""The ablation of Med-MoE's third stage: variants differ in one thing each, and differences are
paired.
"""

import sys
from pathlib import Path

import pytest

from unimed_jax.config_file import load_config_file
from unimed_jax.errors import UserError
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.rules import leaf_rules
from unimed_jax.settings import from_config_dict

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import med_moe_chain as chain


@pytest.fixture(scope="module")
def variants():
    return chain.variants(from_config_dict(load_config_file("configs/med_moe/moe.py:tiny")))


def trained(config):
    """Paths that train, of those that the model has."""
    rules = leaf_rules(parameters(abstract(config.model)), config.train, config.optimizer)
    return {path for path, rule in rules.items() if rule.train}


def test_variants_differ_in_what_their_names_say(variants):
    moe = variants["moe"]
    assert list(variants) == ["moe", "dense", "dense_flops", "no_meta", "learned_router", "top2"]
    assert {config.name for config in variants.values()} == {f"med_moe_tiny/{name}" for name in variants}
    for config in variants.values():
        assert (
            config.data == moe.data
            and config.evaluate == moe.evaluate
            and config.optimizer == moe.optimizer
        )
        assert ("run", "runs/med_moe_tiny/instruct") in config.init
    by_router = {name for name, config in variants.items() if "router" in dict(config.init)}
    assert by_router == {"moe", "no_meta", "top2"}
    mlps = {path for path in trained(variants["dense"]) if path.startswith("decoder/layers/mlp/")}
    assert mlps and not any("/moe/" in path for path in trained(variants["dense"]))
    router = {"decoder/layers/moe/router/kernel", "decoder/layers/moe/router/bias"}
    assert trained(variants["learned_router"]) - trained(moe) == router and not router & trained(moe)
    assert (
        trained(moe) - trained(variants["no_meta"])
        == {p for p in trained(moe) if "/meta/" in p}
        != set()
    )
    assert trained(variants["top2"]) == trained(moe) and variants["top2"].model.moe.top_k == 2


def test_as_many_flops_are_as_many(variants):
    cost = {name: config.train.steps * chain.activated(config) for name, config in variants.items()}
    assert (
        cost["dense_flops"] == pytest.approx(cost["moe"], rel=0.005)
        and cost["dense"] < 0.9 * cost["moe"]
    )
    # Two of four layers pass one MLP more, and the router.
    decoder = variants["moe"].model.decoder
    mlp, router = 3 * decoder.width * decoder.mlp_width, decoder.width * 4 + 4
    assert chain.activated(variants["moe"]) - chain.activated(variants["dense"]) == 2 * (mlp + router)


def test_a_seeds_runs_stand_on_each_other(tmp_path):
    stages = chain.stages_of(7, tmp_path, "elsewhere", smoke=True)
    assert [s.name for s in stages] == ["align", "instruct", "router", *chain.variants(stages[3].config)]
    assert {s.config.seed for s in stages} == {7} and stages[0].config.init[-1] == ("run", "elsewhere")
    for stage in stages[3:]:
        assert ("run", str(tmp_path / "seed7" / "instruct")) in stage.config.init
        assert stage.config.train.steps in (3, 4)
    assert dict(stages[3].config.init)["router"] == str(tmp_path / "seed7" / "router" / "router")


def records(right, clusters=12):
    """Three questions a cluster, an open, a closed one and a classification.

    `right(cluster)`: which are answered.
    """
    kinds = (("vqa", "OPEN", "left lung"), ("vqa", "CLOSED", "yes"), ("cls", "", "CT"))
    return [
        {
            "id": f"{c}/{i}",
            "cluster": str(c),
            "task": task,
            "meta": {"answer_type": kind},
            "reference": answer,
        }
        | {"prediction": answer if i in right(c) else "nothing"}
        for c in range(clusters)
        for i, (task, kind, answer) in enumerate(kinds)
    ]


def test_differences_are_paired_over_seeds_and_clusters(tmp_path):
    names = ("moe", "dense", "dense_flops", "no_meta", "learned_router", "top2")
    all_right, none, half = (lambda c: (0, 1, 2)), (lambda c: ()), (lambda c: (0, 1, 2) if c % 2 else ())
    answered = {name: [records(half), records(half)] for name in names}
    answered["moe"] = [records(half), records(all_right)]
    answered["no_meta"] = [records(all_right), records(all_right)]
    answered["learned_router"] = [records(none), records(lambda c: (1,))]
    found = chain.compared(answered, resamples=500)
    pairs = {entry["pair"]: entry["scores"] for entry in found["pairs"]}
    dense = pairs["experts - dense, as many steps"]["open recall"]
    assert (
        dense["value"] == pytest.approx(25)
        and dense["seeds"] == [0, 50]
        and dense["verdict"] == "appears"
    )
    assert 0 < dense["ci95"][0] < 25 < dense["ci95"][1] <= 50
    meta = pairs["with - without meta expert"]["closed accuracy"]
    assert (
        meta["value"] == pytest.approx(-25)
        and meta["verdict"] == "reversed"
        and meta["published"] == 2.07
    )
    router = pairs["frozen - learned router"]
    assert (
        router["closed accuracy"]["value"] == pytest.approx(25) and router["open recall"]["value"] == 75
    )
    assert found["variants"]["moe"]["classification accuracy"] == {"value": 75.0, "seeds": [50.0, 100.0]}
    chain.draw(found, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    # Equal answers have no interval but zero, whatever is resampled.
    answered["dense"] = answered["moe"]
    same = chain.compared(answered, resamples=500)["pairs"][0]["scores"]["closed accuracy"]
    assert same["ci95"] == [0, 0] and same["verdict"] == "does not appear"
    text = chain.report(found, dict.fromkeys(names, (400, 1000)), (0, 1))
    assert "| dense_flops " in text and "(seeds +0.0 .. +50.0); published +3.50: appears" in text


def test_different_questions_are_not_compared():
    answered = {
        name: [records(lambda c: (0,))] for name in ("moe", "dense", "dense_flops", "no_meta", "top2")
    }
    answered["learned_router"] = [records(lambda c: (0,), clusters=11)]
    with pytest.raises(UserError, match="answered different questions"):
        chain.compared(answered)
