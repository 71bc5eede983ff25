"""Plans of sweeps: runs, their folders and commands; every mistake before anything begins."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from unimed_jax.analyze import params
from unimed_jax.analyze.sweep import plan as planning
from unimed_jax.analyze.sweep.plan import check_folders, of_shard, planned
from unimed_jax.analyze.sweep.table import size
from unimed_jax.config_file import load_config_file, load_sweep_file
from unimed_jax.config_sweep import SweepConfig
from unimed_jax.errors import UserError
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.rules import leaf_rules
from unimed_jax.runs.folder import write_config
from unimed_jax.settings import check_group
from unimed_jax.train.flops import useful_flops
from unimed_jax.verbs.options import read_config, with_overrides

ROUTER = "model.connector.router"


def plan_of(name, folder=Path("runs/x"), **chosen):
    return planned(load_sweep_file(f"configs/sweeps/{name}"), folder, with_overrides, **chosen)


def small(folder=Path("runs/x"), only=(), **fields):
    """A plan of a sweep on the brain set, of which `fields` are changed."""
    known = {
        "base": "configs/brain_tiny.py",
        "variants": {"cmoe": {}, "hard": {ROUTER: "hard"}},
        "baseline": "cmoe",
        "seeds": (0, 7),
        "name": "s",
    }
    sweep = check_group(SweepConfig, known | fields, "sweep")
    return planned(sweep, folder, with_overrides, variants=only)


SHIPPED = [
    *("connector", "connector.py:full", "experts", "experts.py:real", "aggregation"),
    *("aggregation.py:real", "lora_rank", "lora_rank.py:full", "router_input", "gradients"),
    *("med_moe.py:tiny", "med_moe.py:real"),
    *(f"evidence.py:{regime}" for regime in ("brain", "frozen", "narrow", "real")),
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps(name):
    """Every run differs from the baseline in what its variant says, and its command makes the same."""
    plan = plan_of(name if ":" in name else f"{name}.py", seeds=(3,))
    found = {run.name: run for run in plan.runs}
    assert len(found) == len(plan.runs) and plan.sweep.baseline in plan.variants
    base = found[plan.sweep.baseline].config
    for run in plan.runs:
        assert run.folder == Path(f"runs/x/{run.name}/seed3") and run.config.seed == 3
        python, m, module, config, *words, workdir = shlex.split(run.command)
        assert (python, m, module) == ("python", "-m", "unimed_jax.main")
        assert workdir == f"--workdir={run.folder}"
        assert read_config(config.removeprefix("--config="), words) == run.config
        if not run.is_stage:
            assert (run.config.data.sources, run.config.evaluate) == (base.data.sources, base.evaluate)


@pytest.mark.parametrize("regime", ["brain", "narrow"])
def test_evidence_compares_connectors_of_one_size(regime):
    """mlp2x_b has the parameters of all experts, mlp2x_c those of experts, router and task tokens."""
    sizes = {run.name: size(run.config) for run in plan_of(f"evidence.py:{regime}", seeds=(0,)).runs}
    near = pytest.approx
    cmoe = sizes["cmoe"]
    assert sizes["mlp2x_b"]["connector"] == near(cmoe["connector without router"], rel=0.001)
    assert sizes["mlp2x_c"]["connector"] == near(cmoe["connector"], rel=0.002)
    assert sizes["mlp2x_c"]["trained"] == near(cmoe["trained"], rel=0.002)
    assert sizes["constant"]["connector"] == cmoe["connector without router"]
    assert sizes["mlp2x_b"]["flops"] == near(sizes["constant"]["flops"], rel=0.001)
    assert cmoe["activated connector"] == cmoe["connector"] > sizes["hard"]["activated connector"]
    assert 4.5 * sizes["mlp2x"]["connector"] < sizes["mlp2x_b"]["connector"]


def test_a_new_connector_between_frozen_parts():
    runs = {run.name: run for run in plan_of("evidence.py:frozen", seeds=(4,)).runs}
    run, dense, constant = runs["cmoe"], runs["mlp2x_b"], runs["constant"]
    flops = [useful_flops(which.config)["connector"] for which in (dense, constant)]
    assert flops[0] == flops[1]  # the same two products, forward and backward
    rules = leaf_rules(parameters(abstract(run.config.model)), run.config.train, run.config.optimizer)
    for path, rule in rules.items():
        assert rule.train == (path.startswith("connector/") or "/lora_" in path), path
    assert run.config.init[1:] == (("run", "runs/x/start/seed4"), ("seed", "connector/*"))


# ---- Med-MoE ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def med_moe():
    return {run.name: run.config for run in plan_of("med_moe.py:tiny", seeds=(7,)).runs}


def trained(config):
    """Paths that train, of those that the model has."""
    rules = leaf_rules(parameters(abstract(config.model)), config.train, config.optimizer)
    return {path for path, rule in rules.items() if rule.train}


def activated(config) -> int:
    """The decoder parameters that a token is multiplied with; its embedding is only looked up."""
    modules = params.count(config)["modules"]
    inside = [name for name in modules if name.startswith("decoder/") and name != "decoder/embedding"]
    return sum(modules[name]["activated"] for name in inside)


def test_variants_of_the_third_stage_differ_in_what_their_names_say(med_moe):
    moe = med_moe["moe"]
    variants = ["moe", "dense", "dense_flops", "no_meta", "learned_router", "top2"]
    assert list(med_moe) == ["align", "instruct", "router", *variants]
    for name in variants:
        config = med_moe[name]
        assert (config.data, config.optimizer) == (moe.data, moe.optimizer)
        assert ("run", "runs/x/instruct/seed7") in config.init
    by_router = {name for name in variants if "router" in dict(med_moe[name].init)}
    assert by_router == {"moe", "no_meta", "top2"}
    assert dict(moe.init)["router"] == "runs/x/router/seed7/router"
    mlps = {path for path in trained(med_moe["dense"]) if path.startswith("decoder/layers/mlp/")}
    assert mlps and not any("/moe/" in path for path in trained(med_moe["dense"]))
    router = {"decoder/layers/moe/router/kernel", "decoder/layers/moe/router/bias"}
    assert trained(med_moe["learned_router"]) - trained(moe) == router and not router & trained(moe)
    meta = {path for path in trained(moe) if "/meta/" in path}
    assert trained(moe) - trained(med_moe["no_meta"]) == meta != set()
    assert trained(med_moe["top2"]) == trained(moe) and med_moe["top2"].model.moe.top_k == 2


@pytest.mark.parametrize("form", ["tiny", "real"])
def test_as_many_flops_are_as_many(form):
    configs = {run.name: run.config for run in plan_of(f"med_moe.py:{form}", seeds=(7,)).runs}
    names = ("moe", "dense", "dense_flops")
    cost = {name: configs[name].train.steps * activated(configs[name]) for name in names}
    assert cost["dense_flops"] == pytest.approx(cost["moe"], rel=0.005)
    assert cost["dense"] < 0.9 * cost["moe"]


# ---- mistakes --------------------------------------------------------------------------------------
def two(name="b", **changes):
    """Two variants, the second of which has these changes (a__b for the setting a.b)."""
    return {"variants": {"cmoe": {}, name: {k.replace("__", "."): v for k, v in changes.items()}}}


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"baseline": "cmo"}, "the baseline 'cmo' is not among the variants; did you mean 'cmoe'?"),
        ({"variants": {}}, "sweep.variants is empty"),
        ({"seeds": (1, 1)}, "sweep.seeds names 1 twice"),
        ({"seeds": ()}, "sweep.seeds is empty"),
        ({"bases": "x"}, "sweep.bases is not a setting; did you mean 'base'?"),
        ({"stages": {"hard": "configs/brain_tiny.py"}}, "a stage and a variant are both called 'hard'"),
        (two("a/b"), "holds a /"),
        (two(model__connector__router="soft"), "variants 'cmoe' and 'b' of sweep 's' have the same"),
        (two(model__connector__router="sof"), "variant 'b' of sweep 's': config.model.connector.router"),
        (two(model__conector__kind="linear"), "did you mean 'connector'?"),
        (two(seed=3), "sets config.seed, which the sweep sets itself"),
        (
            two(model__connector__kind="linear", model__connector__router="hard"),
            "variant 'b' of sweep 's': config.model.connector.router='hard' has no effect, because",
        ),
        ({"base": "configs/med_moe/all.py:tiny"}, "is a chain; name its stages one by one"),
        ({"scores": {"vqa": ()}}, "sweep.scores['vqa'] is empty"),
        ({"scores": {"vqa": ("exact",)}}, "scores of sweep 's': 'exact' is not a metric; did you mean"),
        ({"scores": {"vqa": ("miou",)}}, "scores of sweep 's': metric 'miou' reads answers of refer"),
        ({"variants": {"cmoe": {}}}, "compares variants with its baseline, and 'cmoe' is alone; add"),
        ({"settings": {"evaluate.splits": ()}}, "scores nothing"),
        ({"settings": {"job": "router", "router_fit.key": "x"}}, "trains a router alone"),
    ],
)
def test_mistakes_in_a_sweep(fields, sentence):
    with pytest.raises(UserError) as error:
        small(**fields)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_mistakes_in_what_is_asked_for():
    with pytest.raises(UserError, match="'hart' is not a variant of sweep 's'; did you mean 'hard'"):
        small(only=("hart",))
    with pytest.raises(UserError, match="the baseline 'cmoe' of sweep 's' is not among --variants=hard"):
        small(only=("hard",))
    with pytest.raises(UserError, match="'cmoe' is alone; add another one to --variants"):
        small(only=("cmoe",))
    for shard in ("3/2", "0/2", "1", "a/b", "/", "1/0", "\u0661/\u0662", "1/9999999999"):
        with pytest.raises(UserError, match=f"--shard={shard}: write which part of how many"):
            of_shard(small(), shard)
    with pytest.raises(UserError, match="--shard=1/9: there are 4 runs"):
        of_shard(small(), "1/9")
    with pytest.raises(UserError, match="is a sweep of several runs; give it to the verb `sweep`"):
        load_config_file("configs/sweeps/experts.py")
    with pytest.raises(UserError, match="describes no sweep"):
        load_sweep_file("configs/brain_tiny.py")
    with pytest.raises(UserError, match="evidence.py needs a regime, not ''"):
        load_sweep_file("configs/sweeps/evidence.py")


def test_shards_hold_every_run_once():
    plan = small(seeds=(0, 1, 2))
    parts = [of_shard(plan, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(run.title for part in parts for run in part) == sorted(run.title for run in plan.runs)
    chained = small(seeds=(0, 1, 2), stages={"first": "configs/brain_tiny.py"})
    for i, seeds in ((1, {0, 2}), (2, {1})):
        part = of_shard(chained, f"{i}/2")
        assert {run.seed for run in part} == seeds and len(part) == 3 * len(seeds)
    with pytest.raises(UserError, match="there are 3 seeds, by which a sweep with stages is divided"):
        of_shard(chained, "1/4")


def test_a_folder_of_other_settings_is_refused(tmp_path):
    plan = small(tmp_path)
    run = plan.runs[1]
    write_config(run.folder, run.config)
    check_folders(plan)
    write_config(plan.runs[0].folder, dataclasses.replace(plan.runs[0].config, seed=5))
    with pytest.raises(UserError, match="cmoe/seed0 holds a run with other settings"):
        check_folders(plan)
    with pytest.raises(UserError, match="still needs the finished run runs/nowhere"):
        check_folders(small(tmp_path, settings={"init": (("seed", ""), ("run", "runs/nowhere"))}))


def test_finished_runs_are_compared_where_their_data_are_not(tmp_path, monkeypatch):
    """Their folders may come from other machines; who trains one of them still needs what it lacks."""
    plan = small(tmp_path, settings={"init": (("seed", ""), ("run", "runs/nowhere"))})
    check_folders(plan, trains=False)
    monkeypatch.setattr(planning, "finished", lambda run: True)
    check_folders(plan)
    for i, run in enumerate(plan.runs):  # each was trained where its data lay
        data = dataclasses.replace(run.config.data, root=f"/data{i}", cache=f"/cache{i}")
        write_config(run.folder, dataclasses.replace(run.config, data=data))
    check_folders(plan, trains=False)
    for run in plan.runs:
        (run.folder / "config.json").unlink()
    monkeypatch.setattr(planning, "finished", lambda run: run.title != "hard/seed7")
    with pytest.raises(UserError, match="still needs the finished run runs/nowhere"):
        check_folders(plan)
