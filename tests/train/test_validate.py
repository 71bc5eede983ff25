"""Validation while training: its losses, the best checkpoint, early stop, and runs that are made
longer.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from support.fake_brain import Squares, tiny_config

from unimed_jax.analyze.chain import Stage, trained
from unimed_jax.config import LossConfig, MeshConfig
from unimed_jax.data import fitting, layout
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.errors import UserError
from unimed_jax.evaluate.run import quick_scores
from unimed_jax.evaluate.tasks import open_sets, select, units_of
from unimed_jax.main import main
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.open import open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train import loop
from unimed_jax.train.log import Log
from unimed_jax.train.loss import loss_sums
from unimed_jax.train.optimizer import learning_rate
from unimed_jax.train.program import build
from unimed_jax.train.start import Progress
from unimed_jax.train.step import first_state
from unimed_jax.train.validate import Validation

pytestmark = pytest.mark.usefixtures("quick_compiles")

MAKE_MESH = sharding.make_mesh  # which other tests replace
BEST = "loss/squares/val/vqa"


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    # programs for eight devices compile slowly
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: None)


def settings(entries=(("vqa", "val", 3),), **train):
    """Entries as (task, split, every)."""
    config = tiny_config(**train)
    config.evaluate.entries = tuple(
        dict(source="squares", task=task, split=split, every=every, limit=10)
        for task, split, every in entries
    )
    return config


def run(config, folder):
    return loop.train(from_config_dict(config), folder)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def measured(folder: Path, name: str) -> dict[int, float]:
    """Steps done -> value."""
    return {line["step"] + 1: line[name] for line in lines(folder) if name in line}


def rates(folder: Path) -> list[float]:
    return [line["train/lr"] for line in lines(folder) if "train/lr" in line]


def saved(folder: Path) -> set[int]:
    return {int(path.name) for path in (folder / "checkpoints").iterdir()}


def note(folder: Path) -> dict:
    return Checkpoints(folder / "checkpoints", read_only=True).newest_note()["progress"]


class Killed(Exception):
    pass


def killed_at(step: int, config, folder: Path, monkeypatch) -> None:
    write = Log.write

    def killing(self, at, values):
        if at == step:
            raise Killed
        write(self, at, values)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Log, "write", killing)
        run(config, folder)


def test_the_losses_are_those_of_the_examples_and_training_stays_the_same(tmp_path):
    """Packed into rows of the training's shape they give what one example a row gives.

    Nothing else is touched.
    """
    plain = run(tiny_config(), tmp_path / "plain")
    entries = (("vqa", "val", 3), ("qa", "test", 4), ("refer", "val", 6))
    with_losses = run(settings(entries), tmp_path / "run")
    for path, leaf in parameters(plain.model).items():
        np.testing.assert_array_equal(parameters(with_losses.model)[path], leaf, err_msg=path)
    log = tmp_path / "run"
    assert list(measured(log, "val/squares/vqa/loss")) == [3, 6, 9, 12]
    assert list(measured(log, "test/squares/qa/loss")) == [4, 8, 12]
    assert list(measured(log, "val/squares/refer/loss")) == [6, 12]

    config, tokenizer, data = with_losses.config, with_losses.tokenizer, Squares()
    encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)
    shape = layout.RowShape(160, 1, 96, config.model.tokens_per_image, 32)
    for task, split in (("vqa", "val"), ("qa", "test"), ("refer", "val")):
        every = [example for example in data.examples(split) if example.task == task]
        chosen = select(every, 10)
        groups = []
        for example in chosen:
            pixels = tuple(
                fitting.fit(data.image(k), config.data.fit, config.model.vision) for k in example.images
            )
            groups.append([layout.Group((encoder.training(example, 0),), pixels)])
        batch = layout.training_batch(groups, shape, tokenizer.pad, str(config.loss.reduction))
        total, sums = jax.jit(lambda model, batch: loss_sums(model, batch, LossConfig(), None, None))(
            with_losses.model, batch
        )
        expected = float(total / sums["weight"])
        assert measured(log, f"{split}/squares/{task}/loss")[12] == pytest.approx(expected, rel=1e-5), (
            task
        )


def test_best_and_patience_are_the_same_after_kills(tmp_path, monkeypatch):
    """Killed before and after measurements, between saves: the same log, progress and checkpoints."""
    config = settings((("vqa", "val", 2),), best=BEST, best_mode="min", save_every=5, steps=14)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(config, straight)
    for step in (1, 7, 12):
        killed_at(step, config, broken, monkeypatch)
    run(config, broken)
    for ours, theirs in zip(lines(broken), lines(straight), strict=True):
        same = [key for key in theirs if not key.startswith(("speed/", "memory/"))]
        assert {key: ours.get(key) for key in same} == {key: theirs[key] for key in same}
    assert note(broken) == note(straight)
    assert saved(broken) == saved(straight)
    values = measured(straight, "val/squares/vqa/loss")
    assert note(straight)["best_step"] == min(values, key=values.__getitem__)
    assert note(straight)["best"] == min(values.values())


@pytest.fixture(scope="module")
def constant(quick_compiles, tmp_path_factory):
    """A run that learns nothing: the first measurement stays the best."""
    folder = tmp_path_factory.mktemp("constant")
    config = settings((("vqa", "val", 2),), best=BEST, best_mode="min", patience=3, keep=1, save_every=3)
    config.optimizer.lr = config.optimizer.min_lr = config.optimizer.warmup_lr = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *settings: None)
        return config, run(config, folder)


def test_patience_ends_a_run_and_the_best_checkpoint_stays(constant):
    config, ended = constant
    assert ended.step == 8  # measured after 2 (the best), 4, 6 and 8 steps
    assert saved(ended.folder) == {2, 8}
    assert Checkpoints(ended.folder / "checkpoints", read_only=True).best() == 2
    assert (open_run(ended.folder).step, open_run(ended.folder, which="best").step) == (8, 2)
    progress = note(ended.folder)
    assert progress["finished"] and progress["waited"] == 3 and progress["best_step"] == 2


def test_a_run_that_patience_ended_is_finished(constant):
    """For the same command, and for a chain."""
    config, ended = constant
    before = lines(ended.folder)
    again = run(config, ended.folder)
    assert again.step == 8 and lines(ended.folder) == before
    stage = Stage("constant", from_config_dict(config), ended.folder)
    assert trained(stage)


@pytest.mark.parametrize("longer", ["restart", "stretch"])
def test_steps_that_are_added_to_a_run_that_patience_ended_are_taken(constant, longer, tmp_path):
    config, ended = constant
    folder = shutil.copytree(ended.folder, tmp_path / "run")
    more = config.copy_and_resolve_references()
    more.train.steps, more.train.longer = config.train.steps + 2, longer
    assert run(more, folder).step == config.train.steps + 2 == 14  # where patience runs out again
    progress = note(folder)
    assert (progress["waited"], progress["steps"], progress["best_step"]) == (3, 14, 2)


def test_evaluate_scores_the_checkpoint_that_which_names(constant, monkeypatch, capsys):
    scored = []
    monkeypatch.setattr(
        "unimed_jax.evaluate.run.evaluate_run", lambda run, config, place: scored.append(run.step)
    )
    command = ["evaluate", f"--run={constant[1].folder}"]
    for words in ([], ["--which=newest"], ["--which=best"]):
        assert main([*command, *words]) == 0
    assert scored == [8, 8, 2]
    assert main(["evaluate", "--predictions=x.jsonl", "--config=x.py", "--which=best"]) == 2
    assert "--which chooses a checkpoint of --run=DIR" in capsys.readouterr().err


def test_metrics_that_an_entry_names_are_scored_and_may_pick_the_best(tmp_path):
    """The same as scoring the finished model; the train step is not compiled again (the loop counts)."""
    config = settings(best="token_f1/squares/val/cls", steps=6)
    metrics = ("exact_match", "unimed_jax.evaluate.metrics.text:token_f1")  # as one's own are named
    entry = dict(source="squares", task="cls", split="val", every=3, limit=10, metrics=metrics)
    config.evaluate.entries = (entry, dict(entry, task="qa", metrics=()))
    ended = run(config, tmp_path)
    names = {name for line in lines(tmp_path) for name in line if name.startswith("val/")}
    own = {"val/squares/cls/loss", "val/squares/cls/exact_match", "val/squares/cls/token_f1"}
    assert names == {*own, "val/squares/qa/loss"}
    units = [
        unit
        for unit in units_of(ended.config, open_sets(ended.config.held_out))[0]
        if unit.task == "cls"
    ]
    for name, value in quick_scores(ended.model, ended.config, ended.tokenizer, units).items():
        metric, source, split, task = name.split("/")
        assert measured(tmp_path, f"{split}/{source}/{task}/{metric}")[6] == value
    best = open_run(tmp_path, which="best")
    at_best = quick_scores(best.model, ended.config, ended.tokenizer, units)
    assert (
        at_best["token_f1/squares/val/cls"] == note(tmp_path)["best"]
        and best.step == note(tmp_path)["best_step"]
    )
    values = measured(tmp_path, "val/squares/cls/token_f1")
    assert list(values) == [3, 6] and note(tmp_path)["best"] == max(values.values())


def test_a_new_best_value_starts_the_count_again():
    config = from_config_dict(settings(best=BEST, best_mode="min", patience=2))
    progress = Progress()
    seen = []
    for done, value in enumerate((3.0, 3.0, 2.0, float("nan"), 2.5), start=1):
        progress = progress.measured(value, done, config)
        seen.append((progress.best, progress.best_step, progress.waited, progress.finished))
    assert seen == [
        (3, 1, 0, False),
        (3, 1, 1, False),
        (2, 3, 0, False),
        (2, 3, 1, False),
        (2, 3, 2, True),
    ]
    highest = from_config_dict(settings(best=BEST.replace("loss", "exact_match"), best_mode="max"))
    assert Progress(best=0.5, best_step=1).measured(0.6, 2, highest).best_step == 2
    assert Progress(best=0.5, best_step=1).measured(0.4, 2, highest).best_step == 1


@pytest.mark.parametrize("longer", ["restart", "stretch"])
def test_more_steps_restart_or_stretch_the_schedule(longer, tmp_path, monkeypatch):
    """The same after a kill before the first new checkpoint."""
    config = tiny_config(steps=4)
    run(config, tmp_path)
    (tmp_path / "metrics.json").write_text("{}")  # scores of the shorter run
    config = tiny_config(steps=9, longer=longer)
    killed_at(6, config, tmp_path, monkeypatch)
    assert run(config, tmp_path).step == 9
    optimizer = from_config_dict(config).optimizer
    before = [learning_rate(i, 4, optimizer) for i in range(4)]
    after = {
        "restart": [learning_rate(i, 5, optimizer) for i in range(5)],
        "stretch": [learning_rate(i, 9, optimizer) for i in range(4, 9)],
    }
    assert rates(tmp_path) == before + after[longer]
    kept = json.loads((tmp_path / "config.json").read_text())["train"]
    assert (kept["steps"], kept["longer"]) == (9, longer)
    assert not (tmp_path / "metrics.json").exists()


def test_a_run_that_goes_on_loses_the_scores_of_fewer_steps(tmp_path, monkeypatch):
    """They would be taken for those of its last step if the last evaluation were killed.

    Its rows are planned from where the checkpoint says.
    """
    config, marks, go_on = tiny_config(steps=4, save_every=1), [], Pipeline.go_on
    killed_at(2, config, tmp_path, monkeypatch)
    (tmp_path / "metrics.json").write_text("{}")
    monkeypatch.setattr(Pipeline, "go_on", lambda self, mark: (marks.append(mark), go_on(self, mark)))
    run(config, tmp_path)
    assert not (tmp_path / "metrics.json").exists() and marks == [[0, 0, 0, []]]
    (tmp_path / "metrics.json").write_text("{}")
    run(config, tmp_path)  # no step is left
    assert (tmp_path / "metrics.json").exists()


def test_more_steps_are_refused_unless_it_is_said_what_they_do(tmp_path):
    run(tiny_config(steps=1), tmp_path)
    with pytest.raises(UserError, match="holds no best checkpoint; set config.train.best"):
        open_run(tmp_path, which="best")
    with pytest.raises(
        UserError, match=r"config.train.steps is 1 there and 2 now.*or set config.train.longer to"
    ):
        run(tiny_config(steps=2), tmp_path)
    changed = tiny_config(steps=2, longer="stretch")
    changed.optimizer.lr = 1.0
    with pytest.raises(UserError, match="holds a run with other settings"):
        run(changed, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 1


def test_what_cannot_be_measured_is_said_before_training(tmp_path):
    unknown = settings()
    unknown.evaluate.entries = (dict(source="squars", task="vqa", split="val", every=1),)
    missing = settings((("vqa", "nowhere", 1),))
    name = "recal/squares/val/vqa"
    best = settings(best=name)
    needy = settings()
    needy.evaluate.entries = (dict(needy.evaluate.entries[0], metrics=("exact_match", "green")),)
    for number, (config, sentence) in enumerate(
        [
            (
                unknown,
                r"config.evaluate.entries: 'squars' is not the id of a data set; did you mean 'squares'",
            ),
            (missing, r"config.evaluate.entries: data set 'squares' has no example in split 'nowhere'"),
            (best, rf"config.train.best='{name}' is not measured during training.*loss/squares/val/vqa"),
            (
                needy,
                r"config.evaluate.entries: 'green' of squares/val/vqa is not computed: needs weights",
            ),
        ]
    ):
        with pytest.raises(UserError, match=sentence):
            run(config, tmp_path / str(number))
        assert not (tmp_path / str(number) / "checkpoints").exists()


def test_eight_devices_measure_what_one_does(constant):
    """Rows go over the devices; the last batch of an entry has empty ones."""
    config, ended = constant
    config = from_config_dict(settings((("vqa", "val", 2), ("caption", "val", 2))))
    found = []
    for axes in (None, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = None if axes is None else MAKE_MESH(MeshConfig(auto=False, **axes), config.data.rows)
        program = build(config, mesh)
        validation = Validation(config, ended.tokenizer, program)
        leaves = {path: np.asarray(leaf) for path, leaf in parameters(ended.model).items()}
        if mesh is not None:
            leaves = jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh))
        with sharding.inside(mesh):
            state = first_state(
                {path: leaves[path] for path in program.state.leaves}, program.optimizer, mesh
            )
            measured = validation.measure(2, state, {path: leaves[path] for path in program.frozen})
        assert validation.compiled() == 1
        found.append({each.name: each.value for each in measured})
    assert set(found[0]) == {"loss/squares/val/vqa", "loss/squares/val/caption"}
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5), name
