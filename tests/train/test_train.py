"""The loop on coloured squares: stop and continue, one compile, non-finite steps, what a run leaves."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support.fake_brain import tiny_config

from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.folder import write_config
from unimed_jax.runs.open import initial_leaves, initial_model, open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train import loop
from unimed_jax.train.log import Log
from unimed_jax.train.start import Progress

pytestmark = pytest.mark.usefixtures("quick_compiles")


def one_device(*settings):
    """No mesh (test_processes.py trains on several devices): programs for eight compile slowly."""


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", one_device)


@pytest.fixture(scope="module")
def straight(quick_compiles, built_once):
    """A run that is never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", one_device)
        return open_run(
            built_once("straight", lambda folder: loop.train(from_config_dict(tiny_config()), folder))
        )


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def stop_at(monkeypatch, step):
    write = Log.write

    def stopping(self, at, values):
        if at == step:
            raise Killed
        write(self, at, values)

    monkeypatch.setattr(Log, "write", stopping)


def test_stop_and_continue_is_bit_for_bit(straight, tmp_path, monkeypatch):
    config = from_config_dict(tiny_config())
    for step in (6, 9):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Killed):
                loop.train(config, tmp_path)
    run = loop.train(config, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == list(range(12))
    for ours, theirs in zip(lines(tmp_path), lines(straight.folder), strict=True):
        same = [key for key in theirs if not key.startswith(("speed/", "memory/"))]
        assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    for path, leaf in parameters(straight.model).items():
        np.testing.assert_array_equal(parameters(run.model)[path], leaf, err_msg=path)


def test_a_finished_run_opens_and_trains_no_further(straight, tmp_path):
    folder = shutil.copytree(straight.folder, tmp_path / "run")  # a run is claimed while it trains
    again = loop.train(straight.config, folder)
    opened = open_run(folder)
    assert opened.step == 12 and len(lines(folder)) == 12
    for path, leaf in parameters(straight.model).items():
        np.testing.assert_array_equal(parameters(opened.model)[path], leaf, err_msg=path)
        np.testing.assert_array_equal(parameters(again.model)[path], leaf, err_msg=path)


def test_a_checkpoint_that_holds_all_leaves_needs_no_earlier_run(straight):
    settings = tiny_config()
    settings.init = (("run", "a run that was removed"),)
    config = from_config_dict(settings)
    assert initial_leaves(config, straight.tokenizer, None, wanted=[]) == ({}, {})
    with pytest.raises(UserError, match="a run that was removed"):
        initial_leaves(config, straight.tokenizer, None, wanted=["decoder/*"])


def test_the_loss_falls_and_everything_is_logged(straight):
    log = lines(straight.folder)
    assert log[-1]["train/loss"] < log[0]["train/loss"] - 0.4
    assert {key.split("/")[0] for key in log[0]} >= {
        "train",
        "loss",
        "routing",
        "speed",
        "waste",
        "memory",
    }
    assert any(line["loss/qa"] is not None for line in log)
    assert list((straight.folder / "tensorboard").iterdir())
    assert Image.open(straight.folder / "contact_sheet.png").size[0] > 100


def test_bfloat16_steps_like_float32(straight, tmp_path):
    settings = tiny_config(steps=6)
    settings.model.compute_dtype = "bfloat16"
    loop.train(from_config_dict(settings), tmp_path)
    for low, full in zip(lines(tmp_path), lines(straight.folder), strict=False):
        assert low["train/loss"] == pytest.approx(full["train/loss"], rel=0.02)


def test_a_step_that_is_not_finite_stops_the_run_with_its_records(tmp_path, monkeypatch):
    settings = tiny_config(save_every=1)
    # No setting allows such a rate, after which the parameters are finite and the next loss is not.
    monkeypatch.setattr(Progress, "learning_rate", lambda self, step, config: 1e30)
    with pytest.raises(UserError, match=r"step [1-9]: .*not finite.*squares/train\d+/"):
        loop.train(from_config_dict(settings), tmp_path)
    kept = [line["train/loss"] for line in lines(tmp_path)]
    assert np.isfinite(kept).all()
    weights = parameters(open_run(tmp_path).model)
    assert all(np.isfinite(leaf).all() for leaf in weights.values())


def test_a_folder_belongs_to_one_set_of_settings(straight, tmp_path):
    folder = shutil.copytree(straight.folder, tmp_path / "run")
    settings = tiny_config()
    settings.optimizer.lr = 1e-3
    with pytest.raises(UserError, match=r"config.optimizer.lr is 0.003 there and 0.001 now.*--workdir"):
        loop.train(from_config_dict(settings), folder)


def test_a_checkpoint_of_another_model_is_refused(straight, tmp_path):
    settings = tiny_config()
    settings.model.decoder.mlp_width = 64
    write_config(tmp_path, from_config_dict(settings))
    (tmp_path / "checkpoints").symlink_to(straight.folder / "checkpoints")
    (tmp_path / "tokenizer").symlink_to(straight.folder / "tokenizer")
    with pytest.raises(
        UserError, match=r"another model: decoder/layers/mlp/down/kernel is \(1, 48, 32\) there"
    ):
        open_run(tmp_path)


def test_frozen_leaves_stay_and_are_saved_when_nothing_else_could_give_them_back(tmp_path):
    settings = tiny_config(
        rules=(dict(match="vision/*", train=False), dict(match="*", train=True)), steps=4
    )
    run = loop.train(from_config_dict(settings), tmp_path)
    initial, _ = initial_model(run.config, run.tokenizer)
    before, after, opened = (
        parameters(initial),
        parameters(run.model),
        parameters(open_run(tmp_path).model),
    )
    for path in before:
        assert np.array_equal(before[path], after[path]) == path.startswith("vision/"), path
        np.testing.assert_array_equal(opened[path], after[path])


def test_a_run_starts_from_another(straight, tmp_path):
    settings = tiny_config(steps=1)
    settings.init = (("seed", ""), ("run", str(straight.folder)))
    model, sources = initial_model(from_config_dict(settings), straight.tokenizer)
    assert set(sources.values()) == {f"run {straight.folder}"}
    np.testing.assert_array_equal(
        parameters(model)["decoder/head"], parameters(straight.model)["decoder/head"]
    )


def test_a_run_stands_on_the_weights_that_it_was_trained_on(straight, tmp_path):
    """Frozen leaves of another run are not copied: told, when that has changed."""
    base = tmp_path / "base"
    shutil.copytree(straight.folder, base)
    settings = tiny_config(
        rules=(dict(match="vision/*", train=False), dict(match="*", train=True)), steps=2
    )
    settings.init = (("seed", ""), ("run", str(base)))
    run = loop.train(from_config_dict(settings), tmp_path / "run")
    opened = open_run(tmp_path / "run")
    for path, leaf in parameters(run.model).items():
        np.testing.assert_array_equal(parameters(opened.model)[path], leaf, err_msg=path)
    saved = Checkpoints(tmp_path / "run/checkpoints").saved_weights()
    assert saved == {path for path in parameters(run.model) if not path.startswith("vision/")}
    shutil.rmtree(base / "checkpoints" / str(straight.step))  # an older checkpoint is left
    with pytest.raises(UserError, match=f"was trained on other weights than run {base} holds now"):
        open_run(tmp_path / "run")


def test_weights_without_a_source_are_named(straight):
    settings = tiny_config()
    settings.init = (("sed", ""),)
    with pytest.raises(UserError, match="'sed' is not a source of weights; did you mean 'seed'"):
        initial_model(from_config_dict(settings), straight.tokenizer)
    settings.init = (("hf", ""),)
    with pytest.raises(UserError, match=r"config.init gives no connector/.*put \('seed', ''\) first"):
        initial_leaves(from_config_dict(settings), straight.tokenizer, wanted=("connector/*",))


def test_fidelity_paper_trains_one_example_a_row(tmp_path):
    settings = tiny_config(steps=3)
    settings.fidelity = "paper"
    settings.model.lora.rank = 2
    run = loop.train(from_config_dict(settings), tmp_path)
    assert run.config.data.mixing == "per_batch" and len(lines(tmp_path)) == 3


def test_experts_start_from_a_dense_run(straight, tmp_path):
    """Copies of its MLPs, then their own way; the routers' balance and shares are logged."""
    settings = tiny_config()
    settings.model.moe.update(experts=2, aux_coef=0.01, top_k=2, meta=False)
    settings.model.lora.rank = 0
    settings.init = (("seed", ""), ("run", str(straight.folder)))
    settings.train.steps = 2
    config = from_config_dict(settings)
    leaves, sources = initial_leaves(config, straight.tokenizer)
    dense = parameters(straight.model)
    numbers = config.model.moe.numbers(config.model.decoder.depth)
    for path, leaf in leaves.items():
        if path.startswith("decoder/layers/moe/experts/"):
            theirs = dense[path.replace("moe/experts", "mlp")]
            for nth, i in enumerate(numbers):
                for expert in leaf[nth]:
                    np.testing.assert_array_equal(expert, theirs[i])
        assert sources[path] == ("seed" if "/moe/router/" in path else f"run {straight.folder}")
    run = loop.train(config, tmp_path)
    up = parameters(run.model)["decoder/layers/moe/experts/up/kernel"]
    assert (up[:, 0] != up[:, 1]).any()
    values = lines(tmp_path)[-1]
    assert values["experts/balance"] >= 0.99 and values["experts/share_0"] + values[
        "experts/share_1"
    ] == pytest.approx(1)
