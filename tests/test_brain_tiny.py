"""The README's first command on the real brain set, cut short."""

import json
import subprocess
import sys

import pytest

from unimed_jax.config import TASKS


@pytest.mark.slow
def test_the_default_config_goes_from_mri_to_a_scored_answer(tmp_path):
    """A few steps of configs/brain_tiny.py in a process of its own; continued; asked one question."""
    cli = [sys.executable, "-m", "unimed_jax.main"]
    settings = [
        f"--config.data.cache={tmp_path}",
        "--config.evaluate.limit=24",
        "--config.train.save_every=10",
    ]
    train = [*cli, "--config=configs/brain_tiny.py", f"--workdir={tmp_path / 'run'}", *settings]
    done = subprocess.run([*train, "--config.train.steps=20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert all(metrics["sets"]["brain"]["test"][task]["n"] == 24 for task in TASKS)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["waste/padding"] < 0.1 and log[-1]["waste/vision"] < 0.1
    assert {"contact_sheet.png", "predictions.png", "routing.png", "report.md"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    ask = [
        *cli,
        "predict",
        f"--run={tmp_path / 'run'}",
        "--task=qa",
        "--text=Which chapter holds G 3 0 . 1?",
    ]
    assert subprocess.run(ask, capture_output=True, text=True).returncode == 0
