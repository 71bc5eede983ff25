"""A real evaluation killed three times, on eight devices, and in two processes: the same
predictions and scores.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unimed_jax.evaluate.answers import JOURNAL

VERB = """
import sys, time
from unimed_jax import main
from unimed_jax.evaluate import answers
add = answers.Journal.add
def slowly(self, answered):
    add(self, answered)
    time.sleep({seconds})
answers.Journal.add = slowly
sys.exit(main.main(sys.argv[1:]))
"""
CONFIG = """
from support.fake_brain import tiny_config
def get_config(argument=""):
    config = tiny_config(steps=2, save_every=2)
    config.data.rows = 8
    options = dict(images=12)
    config.data.sources = (dict(name="support.squares", id="squares", questions=2, options=options),)
    config.evaluate.batch, config.evaluate.max_new_tokens = 8, 6
    return config
"""
TESTS = Path(__file__).parents[1]


def start(*words, count=1, devices=1, seconds=0.0) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for number in range(count):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        if count > 1:
            environment |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
            environment |= {"JAX_COORDINATOR_ADDRESS": address}
        command = [sys.executable, "-c", VERB.format(seconds=seconds), *map(str, words)]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return started


def finish(started) -> None:
    for process in started:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained and scored run."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "squares.py").write_text(CONFIG)
    finish(start(f"--config={folder / 'squares.py'}", f"--workdir={folder / 'run'}"))
    return folder / "run"


@pytest.fixture
def unscored(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    for name in ("metrics.json", "predictions.jsonl"):
        (copy / name).unlink()
    return copy


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("metrics.json", "predictions.jsonl")]


@pytest.mark.slow
def test_an_evaluation_killed_three_times_has_the_bytes_of_an_unbroken_one(trained, unscored):
    chance, kept = random.Random(0), 0
    for _ in range(3):
        (process,) = start("evaluate", f"--run={unscored}", seconds=0.3)
        wanted, until = kept + chance.randint(1, 30), time.time() + 200
        journal = unscored / JOURNAL
        while time.time() < until and process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(chance.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        now = journal.read_bytes().count(b"\n")
        assert now > kept and not (unscored / "metrics.json").exists()
        kept = now
    finish(start("evaluate", f"--run={unscored}"))
    assert results(unscored) == results(trained) and not (unscored / JOURNAL).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(1, 8), (2, 1)])
def test_devices_and_processes_share_an_evaluation(trained, unscored, count, devices):
    finish(start("evaluate", f"--run={unscored}", count=count, devices=devices))
    (here, there) = (
        [json.loads(line) for line in results(f)[1].splitlines()] for f in (unscored, trained)
    )
    pairs = [
        (a.pop("likelihood", None), b.pop("likelihood", None)) for a, b in zip(here, there, strict=True)
    ]
    assert here == there and sum(one is not None for one, _ in pairs) == 2 * 12
    for one, other in pairs:
        if one or other:
            logs = [given.pop("log_likelihoods") for given in (one, other)]
            assert one == other and logs[0] == pytest.approx(logs[1], abs=2e-5)
    one, other = (json.loads(results(folder)[0])["sets"] for folder in (unscored, trained))
    for scores in (one, other):
        for split in scores["squares"].values():
            believed = split["cls"].pop("likelihood")
            assert 0 <= believed["sum"]["auc"]["value"] <= 1 and believed["n"] == 12
    assert one == other


@pytest.mark.slow
def test_reliance_killed_in_a_late_pass_has_the_bytes_of_an_unbroken_one(trained, tmp_path):
    """`analyze reliance` asks every pass through the predictor, and goes on after a kill."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("analyze", "reliance", f"--run={trained}", "--config.evaluate.limit=16")
    finish(start(*words, f"--out={whole}"))
    (process,) = start(*words, f"--out={cut}", seconds=0.2)
    until = time.time() + 200
    while time.time() < until and process.poll() is None:
        if (cut / "other_image.partial.jsonl").exists():
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0][-3000:]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    kept = {file.name for file in cut.glob("*.partial.jsonl")}
    assert {"own_image.partial.jsonl", "blank_image.partial.jsonl"} <= kept
    assert not (cut / "reliance.json").exists()
    finish(start(*words, f"--out={cut}"))
    names = {"reliance.json", "reliance.jsonl", "reliance.md", "reliance.png"}
    assert {file.name for file in cut.iterdir()} - {"lock"} == names
    for name in sorted(names):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    found = json.loads((whole / "reliance.json").read_text())["sets"]["squares"]
    lines = [json.loads(line) for line in (whole / "reliance.jsonl").read_text().splitlines()]
    assert len(found) == 6 and found["vqa"]["n"] == 12 and len(lines) == 6 * 12
    assert set(found["qa"]["passes"]) == {"own_image", "wording_1", "wording_2"}
    kinds = {"own_image", "text_only", "blank_image", "other_image", "wording_1", "wording_3"}
    assert kinds <= set(found["vqa"]["passes"]) and all(
        kinds <= set(line["answers"]) for line in lines[:12]
    )
    report = {r["id"]: r["prediction"] for r in map(json.loads, results(trained)[1].splitlines())}
    assert all(line["answers"]["own_image"] == report[line["id"]] for line in lines)
