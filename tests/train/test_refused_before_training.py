"""What is found before the first step: settings without effect, data that cannot be scored, too
little memory.

And what is found after a step: parameters that are not finite are neither saved nor opened.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fake_brain import tiny_config

from unimed_jax import main as cli
from unimed_jax import memory
from unimed_jax.config import Config, MeshConfig, default_config
from unimed_jax.effects import REFUSED, SAID, without_effect
from unimed_jax.errors import UserError
from unimed_jax.finite import not_finite, refuse_not_finite
from unimed_jax.model import sharding
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.rules import refuse_idle_rules
from unimed_jax.runs import checkpoint
from unimed_jax.runs import open as opening
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.open import initial_leaves, open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train import checks, loop, start

pytestmark = pytest.mark.usefixtures("quick_compiles")
NAN = float("nan")


def tiny(**settings) -> Config:
    """Settings of the tiny run with `group__key=value` changed."""
    config = tiny_config(steps=2, save_every=1)
    config.evaluate.splits, config.evaluate.limit = ("val",), 4
    for key, value in settings.items():
        *groups, name = key.split("__")
        place = config
        for group in groups:
            place = place[group]
        place[name] = value
    return from_config_dict(config)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: None)


@pytest.fixture(scope="module")
def run(quick_compiles, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *settings: None)
        return loop.train(tiny(), tmp_path_factory.mktemp("run"))


# ---- settings without effect ---------------------------------------------------------------------
WITHOUT_EFFECT = [
    ({"model.connector.top_k": 3}, "model.connector.top_k=3"),
    ({"model.connector.router": "hard", "model.connector.top_k": 1}, "model.connector.top_k=1"),
    (
        {"model.vision.output_norm": False, "model.vision.output_norm_eps": 1e-3},
        "model.vision.output_norm_eps=0.001",
    ),
    ({"model.decoder.local_rope_theta": 1e4}, "model.decoder.local_rope_theta=10000.0"),
    (
        {"model.decoder.rope_scaling": {"kind": "linear", "low_freq_factor": 2.0}},
        "model.decoder.rope_scaling.low_freq_factor=2.0",
    ),
    ({"model.moe.capacity_factor": 2.0}, "model.moe.capacity_factor=2.0"),
    ({"model.moe.aux_coef": 0.1}, "model.moe.aux_coef=0.1"),
    ({"model.moe.layers": (1,)}, "model.moe.layers=(1,)"),
    (
        {"model.moe.experts": 2, "model.moe.layers": (1,), "model.moe.placement": "dense"},
        "model.moe.placement='dense'",
    ),
    ({"model.lora.alpha": 8.0}, "model.lora.alpha=8.0"),
    ({"model.lora.targets": ("q",)}, "model.lora.targets=('q',)"),
    ({"text.form": "plain", "text.chat_template": False}, "text.chat_template=False"),
    ({"text.form": "phi", "text.double_bos": True}, "text.double_bos=True"),
    ({"mesh.data": 8}, "mesh.data=8"),
    ({"evaluate.top_p": 0.9}, "evaluate.top_p=0.9"),
    ({"train.best_mode": "min"}, "train.best_mode='min'"),
]


def with_settings(changes):
    settings = default_config()
    for key, value in changes.items():
        *groups, name = key.split(".")
        place = settings
        for group in groups:
            place = place[group]
        place[name] = value
    return settings


@pytest.mark.parametrize("changes, named", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(changes, named):
    with pytest.raises(UserError) as error:
        from_config_dict(with_settings(changes))
    assert str(error.value).startswith(f"config.{named} has no effect, because ") and "\n" not in str(
        error.value
    )
    # A run that was trained so before opens all the same.
    from_config_dict(with_settings(changes).to_dict(), effects=False)


def test_what_fidelity_fills_in_is_not_held_against_anybody():
    from_config_dict(with_settings({"fidelity": "paper", "text.form": "plain"}))


def test_minor_settings_without_effect_are_named_at_the_start(run, monkeypatch):
    config = tiny(
        **{
            "model__connector__experts": 7,
            "model__connector__kind": "linear",
            "model__connector__hidden": 9,
            "model__connector__activation": "silu",
            "optimizer__warmup_steps": 0,
        },
        **{"data__packing": False, "optimizer__warmup_lr": 1e-4, "router_fit__epochs": 3},
        evaluate__entries=(dict(source="squares", task="vqa", split="val", every=5),),
    )
    said = []
    monkeypatch.setattr(checks.processes, "say", said.append)
    checks.check_start(config, run.tokenizer, parameters(abstract(config.model)))
    names = [
        "model.connector.experts=7",
        "model.connector.hidden=9",
        "model.connector.activation='silu'",
        "data.window=32",
        "evaluate.splits=('val',)",
        "optimizer.warmup_lr=0.0001",
        "router_fit.epochs=3",
    ]
    names.append("evaluate.entries[0].every=5")
    for name in names:
        assert any(sentence.startswith(f"config.{name} has no effect") for sentence in said), name


def test_every_need_names_settings_that_exist():
    config = Config()
    for need in (*REFUSED, *SAID):
        group = config
        for part in need.group.split(".")[: 2 if "rope_scaling" in need.group else None]:
            group = getattr(group, part)
        for field in need.fields.split():
            assert "rope_scaling" in need.group or hasattr(group, field), (need.group, field)
    assert not list(without_effect(config, {}))


CONTRADICTIONS = [
    (
        {"model.decoder.windows": (8, 0, 8, 0, 8)},
        "config.model.decoder.windows names 5 layers of depth=4",
    ),
    ({"model.decoder.rotary_fraction": 2.0}, "config.model.decoder.rotary_fraction=2.0: set 0 to 1."),
    ({"model.moe.experts": 4, "model.moe.path": "capacity"}, "path='capacity' needs"),
    (
        {"model.moe.experts": 4, "model.moe.min_capacity": 8},
        "config.model.moe.min_capacity=8 limits a capacity",
    ),
    ({"model.moe.experts": 4, "model.moe.layers": (2, 1)}, "in rising order"),
    ({"model.moe.experts": 4, "model.moe.layers": (2, 2)}, "config.model.moe.layers names 2 twice"),
    (
        {"model.moe.experts": 4, "model.moe.top_k": 2, "model.moe.gate_noise": "rsample"},
        "gate_noise='rsample'",
    ),
    (
        {"text.coordinate_tokens": False, "loss.coordinate_sd": 1.5},
        "config.loss.coordinate_sd=1.5 is for box",
    ),
    (
        {"text.coordinate_tokens": False, "loss.coordinate_weight": 2.0},
        "config.loss.coordinate_weight=2.0 is for",
    ),
    ({"init": (("seed", "1"),)}, "config.init: 'seed' takes its number from config.seed"),
    ({"init": (("run", ""),)}, "config.init: 'run' needs the folder of a run"),
    ({"init": (("seed", ""), ("seed", ""))}, "config.init has the same entry at [0] and [1]"),
    ({"train.rules": ({"match": "*", "train": False},)}, "config.train.rules freezes every parameter"),
    (
        {
            "train.rules": (
                {"match": "a", "train": False, "lr_scale": 2.0},
                {"match": "*", "train": True},
            )
        },
        "config.train.rules[0].lr_scale has no effect",
    ),
    (
        {"train.rules": ({"match": "*", "train": True}, {"match": "vision/*", "train": False})},
        "config.train.rules[1].match='vision/*' never applies",
    ),
    ({"job": "router", "router_fit.key": " "}, "config.job='router' needs classes"),
    ({"job": "router", "router_fit.key": "m", "router_fit.classes": ("CT",)}, "name at least two"),
    ({"evaluate.splits": ("val", "val")}, "config.evaluate.splits names 'val' twice"),
    ({"evaluate.splits": ("va/l",)}, "config.evaluate.splits[0]='va/l' holds a /"),
    ({"evaluate.bootstrap": 1}, "config.evaluate.bootstrap=1: set at least 2."),
    ({"name": "/tmp/x"}, "config.name='/tmp/x' does not name a folder"),
    ({"name": "../x"}, "config.name='../x' does not name a folder"),
    ({"name": "a\0"}, "config.name='a\\x00' holds the character NUL"),
    ({"name": "a\x1b[31m"}, "config.name='a\\x1b[31m' holds the control character"),
    ({"name": "\udce9"}, "holds half of a surrogate pair"),
]


@pytest.mark.parametrize("changes, words", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(UserError) as error:
        from_config_dict(with_settings(changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_rules_that_leave_nothing_to_train_or_never_apply():
    config = tiny()
    paths = list(parameters(abstract(config.model)))

    def refused(*rules) -> str:
        with pytest.raises(UserError) as error:
            refuse_idle_rules(paths, tiny(train__rules=[dict(match=m, train=t) for m, t in rules]).train)
        return str(error.value)

    assert "freezes every parameter" in refused(("[a-z]*", False), ("*", True))
    sentence = refused(("decoder/*", False), ("decoder/head", True), ("*", True))
    assert sentence.startswith("config.train.rules[1]: 'decoder/head' never applies")
    refuse_idle_rules(
        paths, tiny(train__rules=[dict(match="?*", train=True), dict(match="*", train=True)]).train
    )


def test_coordinate_targets_need_coordinate_tokens():
    config, tokenizer = tiny(loss__coordinate_sd=1.0), types.SimpleNamespace(coordinate_start=None)
    with pytest.raises(
        UserError, match=r"config.loss.coordinate_sd=1.0 has no effect, because the tokenizer"
    ):
        checks.check_start(config, tokenizer, parameters(abstract(config.model)))


def test_a_source_of_weights_that_gives_nothing_is_refused(run):
    config = tiny(init=(("run", str(run.folder)), ("seed", "")))
    with pytest.raises(UserError, match=r"config.init: .*fits this model|gives no parameter"):
        initial_leaves(config, run.tokenizer)
    config = tiny(init=(("seed", ""), ("router", "nowhere")))  # for experts, which this decoder has not
    with pytest.raises(
        UserError, match=r"config.init: \('router', 'nowhere'\) gives no parameter of this model"
    ):
        initial_leaves(config, run.tokenizer)


def test_several_devices_are_not_asked_of_one(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    with pytest.raises(UserError, match="config.mesh asks for 8 devices, but there is one"):
        sharding.make_mesh(MeshConfig(auto=False, data=4, tensor=2), rows=16)
    assert sharding.make_mesh(MeshConfig(auto=False), rows=16) is None


# ---- data ------------------------------------------------------------------------------------------
WRONG_DATA = [
    ({"evaluate__splits": ("vall",)}, "no example in split 'vall'; did you mean 'val'?"),
    ({"evaluate__splits": ("val", "dev")}, "no example in split 'dev'"),
    ({"evaluate__entries": (dict(source="squares", task="vqa", split="tset"),)}, "did you mean 'test'?"),
    (
        {"evaluate__entries": (dict(source="square", task="vqa", split="test"),)},
        "did you mean 'squares'?",
    ),
    (
        {"evaluate__entries": (dict(source="squares", task="vqa", split="test", metrics=("acuracy",)),)},
        "'acuracy' is not a metric",
    ),
    ({"text__max_prompt": 6}, "cannot be evaluated"),
    (
        {
            "data__sources": (
                dict(name="support.squares", id="squares", only={"template": ("vqa",)}, tasks=("cls",)),
            )
        },
        "match no example",
    ),
]


@pytest.mark.parametrize("settings, words", WRONG_DATA)
def test_what_ends_an_evaluation_is_found_before_the_first_step(settings, words, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "build", lambda *arguments: pytest.fail("the program was built"))
    with pytest.raises(UserError) as error:
        start.prepare(tiny(**settings), tmp_path)
    assert words in str(error.value) and not (tmp_path / "checkpoints").exists()


def test_an_evaluation_of_nothing_keeps_the_report(run, capsys):
    report = run.folder / "metrics.json"
    report.write_text(json.dumps({"scores": 1}))
    assert cli.main(["evaluate", f"--run={run.folder}", "--config.evaluate.splits=()"]) == 2
    assert "nothing would be scored; name a split" in capsys.readouterr().err
    assert json.loads(report.read_text()) == {"scores": 1}


# ---- memory ----------------------------------------------------------------------------------------
TOO_LARGE = [
    ({"model__decoder__width": 2**20, "model__decoder__mlp_width": 2**20}, "this model needs at least"),
    ({"model__decoder__depth": 1024, "model__decoder__mlp_width": 2**20}, "this model needs at least"),
    ({"data__rows": 65536, "data__row_tokens": 2**20}, "config.data.rows=65536 rows needs at least"),
    ({"evaluate__max_new_tokens": 65536, "model__decoder__head_dim": 65536}, "prompts at once"),
]


@pytest.mark.parametrize("settings, words", TOO_LARGE)
def test_what_no_memory_holds_is_refused_before_anything_is_allocated(
    settings, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(start, "initial_leaves", lambda *arguments: pytest.fail("weights were made"))
    monkeypatch.setattr(memory, "available_bytes", lambda: 24 * 2**30)
    with pytest.raises(UserError, match=words):
        start.prepare(tiny(**settings), tmp_path)


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    for text, most in (("max", None), (str(2**20), 2**20)):
        limit.write_text(f"{text}\n")
        monkeypatch.setattr(memory, "LIMITS", (str(limit), str(tmp_path / "absent")))
        assert memory.available_bytes() == most if most else memory.available_bytes() > 2**28
    with pytest.raises(
        UserError, match="^this needs at least 1.0 GiB of memory, and there are 0.0; lower that.$"
    ):
        memory.refuse_too_large(2**30, "this", "that")


def test_the_process_with_the_least_memory_counts_for_all(monkeypatch):
    alone = memory.available_bytes()
    monkeypatch.setattr(memory.processes, "gathered", lambda own: [own, own / 4])
    monkeypatch.setattr(memory.jax, "process_count", lambda: 2)
    assert memory.available_bytes() == alone / 2


# ---- parameters that are not finite ------------------------------------------------------------------
def test_an_update_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, monkeypatch):
    """Also the very last one, after which no loss would show it."""
    rate = start.Progress.learning_rate
    for last in (0, 1):
        monkeypatch.setattr(
            start.Progress,
            "learning_rate",
            lambda self, i, c, at=last: np.inf if i == at else rate(self, i, c),
        )
        folder = tmp_path / str(last)
        with pytest.raises(
            UserError, match=rf"^step {last}: .* parameters of .*connector.* are not finite after the"
        ):
            loop.train(tiny(), folder)
        assert Checkpoints(folder / "checkpoints", read_only=True).latest() == (last or None)


def test_leaves_that_are_not_finite_are_named():
    leaves = {
        "a/b": jnp.ones(3),
        "a/c": jnp.array([1.0, np.inf]),
        "d": jnp.array(3),
        "e/f": jnp.array([NAN], "bfloat16"),
    }
    assert not_finite(leaves) == ["a/c", "e/f"]
    with pytest.raises(
        UserError, match=r"^here: 2 parameters of a, e are not finite \(NaN or infinity\); look\.$"
    ):
        refuse_not_finite(leaves, "here", "look")
    with pytest.raises(UserError, match="parameter a/c is not finite"):
        refuse_not_finite({"a/c": leaves["a/c"]}, "here", "look")


def test_a_checkpoint_that_is_not_finite_is_neither_written_nor_opened(
    run, tmp_path, monkeypatch, capsys
):
    leaves = {"a": jnp.array([1.0, NAN])}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="step 3: parameter a is not finite"):
        checkpoints.save(3, leaves, {}, {})
    assert checkpoints.latest() is None
    checkpoints.close()

    # One from before this check: neither opened, nor exported, nor answered from, nor continued
    # from as a base.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "refuse_not_finite", lambda *arguments: None)
        patch.setattr(loop.Reporter, "now", lambda self: None)
        patch.setattr(start.Progress, "learning_rate", lambda self, i, config: np.inf)
        loop.train(tiny(), tmp_path / "old")
    with pytest.raises(UserError, match=rf"{tmp_path}/old: .* not finite .*; train again"):
        open_run(tmp_path / "old")
    for verb in (
        ["export", "--format=model", f"--out={tmp_path}/out"],
        ["predict", "--task=qa", "--text=1?"],
        ["evaluate"],
    ):
        assert cli.main([*verb, f"--run={tmp_path}/old"]) == 2
        assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_base_weights_that_are_not_finite_are_refused_before_training(tmp_path, monkeypatch):
    made = opening.initial_leaves

    def damaged(*arguments):
        leaves, sources = made(*arguments)
        path = next(iter(leaves))
        return leaves | {path: leaves[path] * NAN}, sources

    monkeypatch.setattr(start, "initial_leaves", damaged)
    with pytest.raises(UserError, match="the weights of config.init: parameter .* is not finite"):
        start.prepare(tiny(), tmp_path)


def test_only_the_leading_process_removes_unfinished_files(tmp_path, monkeypatch):
    """Where locks hold on one machine alone, a file that the leader writes looks abandoned to others."""
    removed = []

    def ends(folder, config):
        raise UserError("no further")

    monkeypatch.setattr(start.files, "remove_leftovers", removed.append)
    monkeypatch.setattr(start, "write_config", ends)
    for leads in (False, True):
        monkeypatch.setattr(start.processes, "leads", lambda leads=leads: leads)
        with pytest.raises(UserError, match="no further"):
            start.prepare(tiny(), tmp_path)
        assert removed == [tmp_path] * leads
