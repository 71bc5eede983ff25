"""Whole runs, from training to scores, on sets that differ from the demo: without images, splits or
tasks.
"""

import json

import pytest
from support.fake_brain import tiny_config

from unimed_jax.analyze.chain import train_and_evaluate
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import open_sets
from unimed_jax.model import sharding
from unimed_jax.settings import from_config_dict

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    # programs for eight devices compile slowly
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: None)


def settings(**source):
    config = tiny_config(steps=2, save_every=2)
    config.data.sources = (dict(name="support.squares", id="squares", options={"images": 8}) | source,)
    config.evaluate.max_new_tokens = 2
    return config


def scored(config, folder):
    """Trains and evaluates.

    Returns (tasks of each split in the predictions, notes, log lines of training).
    """
    train_and_evaluate(from_config_dict(config), folder)
    tasks: dict[str, set[str]] = {}
    for line in (folder / "predictions.jsonl").read_text().splitlines():
        found = json.loads(line)
        tasks.setdefault(found["split"], set()).add(found["task"])
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return tasks, json.loads((folder / "metrics.json").read_text())["notes"], log


def test_a_set_without_images_trains_and_is_scored(tmp_path):
    config = settings(tasks=("qa",))
    config.data.row_images = 0
    tasks, _, log = scored(config, tmp_path)
    assert tasks == {"val": {"qa"}, "test": {"qa"}}
    assert all(line["loss/qa"] > 0 for line in log if "loss/qa" in line)
    assert (tmp_path / "report.md").is_file()


def test_a_set_without_a_validation_split_is_scored_on_its_test_split(tmp_path):
    tasks, notes, _ = scored(settings(name="support.squares_without_val", tasks=("vqa",)), tmp_path)
    assert tasks == {"test": {"vqa"}}
    assert "squares: it has no example in split 'val'" in notes


def test_a_task_that_its_source_leaves_out_is_neither_trained_nor_scored(tmp_path):
    tasks, notes, log = scored(settings(tasks=("vqa", "cls")), tmp_path)
    assert tasks == {"val": {"vqa", "cls"}, "test": {"vqa", "cls"}}
    assert not any("no example of task" in note for note in notes)
    assert all(line["loss/qa"] is None for line in log if "loss/qa" in line)


def test_only_tasks_that_a_set_says_it_has_are_missed():
    config = from_config_dict(settings(name="support.squares_without_val"))
    assert open_sets(config.data)["squares"].tasks == ("vqa", "cls")


def test_one_overlong_test_question_is_named_before_training(tmp_path):
    config = settings(tasks=("vqa",), options={"images": 8, "long": "test3"})
    with pytest.raises(
        UserError, match=r"squares/test/vqa .* record test3/vqa: .* config.text.max_prompt=512"
    ):
        train_and_evaluate(from_config_dict(config), tmp_path)
    assert not (tmp_path / "log.jsonl").exists()
