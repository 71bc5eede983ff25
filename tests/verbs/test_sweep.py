"""The verb sweep, from its config to the table: trained, adopted, failed, continued, moved."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest

from unimed_jax import main as cli
from unimed_jax.analyze import chain
from unimed_jax.analyze.sweep import run as running
from unimed_jax.analyze.sweep.plan import check_folders, planned
from unimed_jax.config_file import load_sweep_file
from unimed_jax.errors import UserError
from unimed_jax.runs.folder import write_config
from unimed_jax.verbs.options import with_overrides

BASE = """
from support.fake_brain import tiny_config
def get_config():
    config = tiny_config(steps=3)
    config.name = "{name}"
    config.init = {init}
    config.data.sources = (dict(name="support.squares", id="squares", tasks=("vqa", "cls")),)
    config.evaluate.splits, config.evaluate.max_new_tokens = ("test",), 4
    return config
"""
SWEEP = """
def get_config():
    return dict(
        name="squares_sweep",
        base="base.py",
        stages={"first": "first.py"},
        variants={
            "cmoe": {},
            "short": {"data.row_tokens": 20},
            "linear": {"model.connector.kind": "linear"},
        },
        baseline="cmoe",
        seeds=(0, 1),
    )
"""


def write_sweep(folder) -> str:
    (folder / "first.py").write_text(BASE.format(name="tiny/first", init=(("seed", ""),)))
    init = (("seed", ""), ("run", "runs/tiny/first"))
    (folder / "base.py").write_text(BASE.format(name="tiny/base", init=init))
    (folder / "sweep.py").write_text(SWEEP)
    return f"--config={folder / 'sweep.py'}"


@pytest.fixture
def trains(monkeypatch):
    """Lists the folders of the runs that are trained."""
    known, inner = [], chain.train_and_evaluate
    monkeypatch.setattr(
        running, "train_and_evaluate", lambda c, folder: (known.append(folder), inner(c, folder))
    )
    return known


@pytest.mark.slow
def test_a_sweep_from_its_config_to_its_table(on_one_device, tmp_path, trains, capsys, monkeypatch):
    config, folder = write_sweep(tmp_path), tmp_path / "runs"
    command = ["sweep", config, f"--workdir={folder}"]

    # one seed: a run fails, the others go on
    assert cli.main([*command, "--seeds=0"]) == 1
    titles = [f"{place.parent.name}/{place.name}" for place in trains]
    assert titles == ["first/seed0", "cmoe/seed0", "short/seed0", "linear/seed0"]
    found = json.loads((folder / "sweep.json").read_text())
    sentence = found["failed"]["short/seed0"]
    assert list(found["failed"]) == ["short/seed0"] and found["missing"] == []
    assert "row_tokens" in sentence and f"failed: {sentence}" in (folder / "sweep.md").read_text()
    said = capsys.readouterr().out
    assert f"short/seed0 failed: {sentence}" in said and "1, 1 of" not in said
    assert found["variants"]["linear"]["change"]["verdict"] == "undecided"
    settings = json.loads((folder / "cmoe/seed0/config.json").read_text())
    assert settings["init"] == [["seed", ""], ["run", str(folder / "first/seed0")]]
    cost = json.loads((folder / "cmoe/seed0/cost.json").read_text())
    assert cost["seconds"] > 0 and cost["bytes"] > 1000

    # the second seed: two of its runs by hand, as the sweep names them
    plan = planned(load_sweep_file(str(tmp_path / "sweep.py")), folder, with_overrides)
    by_hand = {run.title: shlex.split(run.command)[3:] for run in plan.runs}
    for title in ("first/seed1", "linear/seed1"):
        assert cli.main(by_hand[title]) == 0
    trains.clear()
    capsys.readouterr()
    assert cli.main([*command, "--variants=cmoe,linear"]) == 0
    assert trains == [folder / "cmoe/seed1"]
    assert "cmoe/seed1, 1 of 1 that are left, about " in capsys.readouterr().out
    found = json.loads((folder / "sweep.json").read_text())
    change = found["variants"]["linear"]["change"]
    assert len(change["seeds"]) == 2 and change["verdict"] in ("better", "worse", "undecided")
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert found["columns"][0]["label"] == "squares vqa exact_match"

    # elsewhere: finished runs are compared as they are, those with other settings are refused
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    shutil.rmtree(moved / "short")
    words = ["sweep", config, f"--workdir={moved}", "--only-table", "--variants=cmoe,linear"]
    assert cli.main(words) == 0
    there = json.loads((moved / "sweep.json").read_text())
    assert there["variants"]["linear"]["change"] == change
    file = moved / "linear/seed1/config.json"
    file.write_text(file.read_text().replace('"steps": 3', '"steps": 4'))
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "linear/seed1 holds a run with other settings" in capsys.readouterr().err


def test_no_variant_starts_from_a_stage_that_is_not_trained(tmp_path, capsys, monkeypatch):
    """Neither where the stage failed, nor where another process trains it."""
    write_sweep(tmp_path)
    plan = planned(load_sweep_file(str(tmp_path / "sweep.py")), tmp_path, with_overrides, seeds=(0,))
    stage, *variants = plan.runs
    begun = []

    def fails(config, folder):
        begun.append(folder)
        write_config(folder, config)
        raise UserError("the disk is full.")

    monkeypatch.setattr(running, "train_and_evaluate", fails)
    running.run_all(plan, plan.runs)
    assert begun == [stage.folder] and running.failure(stage) == "the disk is full."
    said = capsys.readouterr().out
    assert "linear/seed0, 4 of 4 that are left: left out, as first/seed0 is not trained" in said
    assert not any(run.folder.exists() or running.failure(run) for run in variants)
    monkeypatch.setattr(running, "owner", lambda folder: "process 7" if folder == stage.folder else "")
    running.run_all(plan, plan.runs)
    assert begun == [stage.folder]
    write_config(variants[0].folder, variants[0].config)
    with pytest.raises(UserError, match="cmoe/seed0 started from another .*first/seed0 than will be"):
        check_folders(plan)


def test_a_stage_that_scores_nothing_is_finished_once_it_is_trained(tmp_path, monkeypatch):
    write_sweep(tmp_path)
    plan = planned(load_sweep_file(str(tmp_path / "sweep.py")), tmp_path, with_overrides, seeds=(0,))
    monkeypatch.setattr(chain, "trained", lambda stage: True)
    stage = plan.runs[0]
    assert not chain.finished(stage)
    silent = dataclasses.replace(stage.config.evaluate, splits=())
    config = dataclasses.replace(stage.config, evaluate=silent)
    assert chain.finished(dataclasses.replace(stage, config=config))


def test_a_run_of_another_process_is_left_to_it(tmp_path, trains, capsys, monkeypatch):
    plan = planned(
        load_sweep_file("configs/sweeps/router_input.py"), tmp_path, with_overrides, seeds=(0,)
    )
    monkeypatch.setattr(running, "owner", lambda folder: "process 7 on host x")
    running.run_all(plan, plan.runs)
    assert not trains and "token/seed0, 2 of 3 that are left: process 7" in capsys.readouterr().out


def test_a_run_that_another_process_took_first_has_not_failed(tmp_path, capsys, monkeypatch):
    plan = planned(
        load_sweep_file("configs/sweeps/router_input.py"), tmp_path, with_overrides, seeds=(0,)
    )
    owners = iter(["", "process 7 on host x"])

    def taken(config, folder):
        raise UserError(f"{folder} is in use by the run of process 7 on host x.")

    monkeypatch.setattr(running, "owner", lambda folder: next(owners))
    monkeypatch.setattr(running, "train_and_evaluate", taken)
    running.run_all(plan, plan.runs[:1])
    assert not running.failure(plan.runs[0])
    assert f"{plan.runs[0].title}: process 7 on host x trains it" in capsys.readouterr().out


def test_runs_with_the_same_text_share_a_tokenizer(tmp_path, monkeypatch):
    sweep = load_sweep_file("configs/sweeps/router_input.py")
    plan = planned(sweep, tmp_path, with_overrides, seeds=(0,))
    first, second, third = plan.runs
    monkeypatch.setattr(running, "finished", lambda run: run == first)
    write_config(first.folder, first.config)
    (first.folder / "tokenizer").mkdir()
    (first.folder / "tokenizer" / "tokenizer.json").write_text("{}")
    running._share_tokenizer(plan, second)
    assert (second.folder / "tokenizer" / "tokenizer.json").read_text() == "{}"
    words = ["--config.data.root=elsewhere"]
    other = planned(sweep, tmp_path, with_overrides, words, seeds=(0,)).runs[2]
    running._share_tokenizer(plan, other)
    assert not (third.folder / "tokenizer").exists()


def test_what_breaks_a_run_is_kept_with_it(tmp_path, capsys, monkeypatch):
    """Whatever a run raises; the sentence goes when it is tried again."""
    plan = planned(
        load_sweep_file("configs/sweeps/router_input.py"), tmp_path, with_overrides, seeds=(0,)
    )
    raised = iter([UserError("the loss is not finite."), MemoryError("no more"), None])

    def broken(config, folder):
        if error := next(raised):
            raise error

    monkeypatch.setattr(running, "train_and_evaluate", broken)
    running.run_all(plan, plan.runs)
    assert [running.failure(run) for run in plan.runs] == [
        "the loss is not finite.",
        "MemoryError: no more",
        "",
    ]
    raised = iter([None] * 3)
    running.run_all(plan, plan.runs)
    assert not any(map(running.failure, plan.runs))


def test_what_failed_after_its_scores_is_tried_again_without_training(tmp_path, trains, monkeypatch):
    plan = planned(
        load_sweep_file("configs/sweeps/router_input.py"), tmp_path, with_overrides, seeds=(0,)
    )
    run, tried = plan.runs[0], []
    monkeypatch.setattr(running, "finished", lambda run: True)
    monkeypatch.setattr(running, "write_expert_load", lambda run, stages: tried.append(run))
    running.run_all(plan, plan.runs)
    assert not tried
    run.folder.mkdir(parents=True)
    (run.folder / "failed.json").write_text('{"sentence": "the disk is full."}')
    running.run_all(plan, plan.runs)
    assert tried == [run] and not trains and not running.failure(run)


def test_a_run_that_is_trained_by_hand_has_not_failed(tmp_path, monkeypatch):
    (tmp_path / "failed.json").write_text('{"sentence": "the disk is full."}')

    def ends(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(chain, "claim", ends)
    with pytest.raises(KeyboardInterrupt):
        chain.train_and_evaluate(planned_config(), tmp_path)
    assert not (tmp_path / "failed.json").exists()


def planned_config():
    sweep = load_sweep_file("configs/sweeps/router_input.py")
    return planned(sweep, Path("unused"), with_overrides, seeds=(0,)).runs[0].config


def test_a_shard_without_the_baseline_ends_well_and_a_failed_baseline_does_not(
    tmp_path, capsys, monkeypatch
):
    """No table yet is no mistake of a shard; where runs failed the status is 1, with a table or not."""
    command = ["sweep", "--config=configs/sweeps/router_input.py", f"--workdir={tmp_path}", "--seeds=0"]
    monkeypatch.setattr(running, "train_and_evaluate", lambda config, folder: None)
    assert cli.main([*command, "--shard=2/3"]) == 0
    ended = capsys.readouterr()
    assert "no table: sweep 'router_input' in" in ended.out and not ended.err

    def broken(config, folder):
        raise UserError("the loss is not finite.")

    monkeypatch.setattr(running, "train_and_evaluate", broken)
    assert cli.main([*command, "--shard=1/3"]) == 1
    monkeypatch.setattr(running, "train_and_evaluate", lambda config, folder: None)
    assert cli.main([*command, "--shard=3/3"]) == 0  # another shard's failure is not this one's


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--shard=3/2"], "--shard=3/2: write which part of how many"),
        (["--variants=token,token"], "--variants=token,token has 'token' twice"),
        (["--seeds=0,,1"], "--seeds=0,,1 has an empty name"),
        (["--seeds=0,x"], "'x' is not a seed"),
        (["--seeds=1,01"], "--seeds=1,01 has 1 twice"),
        (["--seeds=" + 5000 * "9"], "is not a seed; write whole numbers"),
        (["--workdir=gs://bucket/sweep"], "is not a folder or file here; mount the bucket"),
        (["--variants=toke"], "'toke' is not a variant of sweep 'router_input'; did you mean 'token'?"),
        (["--baseline=toke"], "the baseline 'toke' is not among the variants"),
        (["--config.seed=3"], "'--config.seed=3' cannot change a sweep"),
        (["--shard=1/2", "--only-table"], "--shard divides what --only-table leaves out"),
        (["--only-table"], "has no finished run of the baseline 'task_token'"),
    ],
)
def test_mistakes(words, sentence, tmp_path, capsys):
    command = ["sweep", "--config=configs/sweeps/router_input.py", f"--workdir={tmp_path}"]
    assert cli.main([*command, *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
