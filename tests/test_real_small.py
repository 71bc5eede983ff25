"""configs/real_small.py on synthetic twins of its four data sets, cut short."""

import json
import os
import subprocess
import sys

import pytest

from unimed_jax.config import TASKS
from unimed_jax.data.twins import write_twin

FOLDERS = {"vqa_rad": "vqa_rad", "medpix2": "medpix2", "voc": "bccd", "pubmedqa": "pubmedqa"}


@pytest.mark.slow
def test_one_model_for_six_tasks_on_twins(tmp_path):
    """A few steps with varied pictures, and a score for each set, task and template."""
    for name, folder in FOLDERS.items():
        write_twin(name, tmp_path / "data" / folder, 24, "", 0)
    command = [
        *(sys.executable, "-m", "unimed_jax.main", "--config=configs/real_small.py"),
        *(f"--workdir={tmp_path / 'run'}", f"--config.data.root={tmp_path / 'data'}"),
        *(f"--config.data.cache={tmp_path}", "--config.train.steps=4", "--config.evaluate.limit=6"),
        *("--config.evaluate.max_new_tokens=8", "--config.data.threads=0"),
        "--config.evaluate.splits=('test',)",
    ]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # programs are run once or twice
    done = subprocess.run(command, capture_output=True, text=True, env=quick)
    assert done.returncode == 0, done.stderr[-2000:]
    sets = json.loads((tmp_path / "run/metrics.json").read_text())["sets"]
    scored = {task for name in sets for task in sets[name]["test"]}
    assert scored == set(TASKS) and set(sets) == {"bccd", "vqa_rad", "medpix2", "pubmedqa"}
    cls = sets["medpix2"]["test"]["cls"]["templates"]
    assert all(part["margin"] is not None for part in cls.values())
    # Whatever its weight, each task is drawn.
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert any("train/lr" in line for line in log)
