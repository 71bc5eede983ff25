"""Several real processes as one run: the losses of one, a death that ends all, and going on afterwards.

The run of each process is the command line's, on coloured squares.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.fake_brain import Squares, tiny_config

from unimed_jax import processes
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.errors import UserError
from unimed_jax.runs.folder import load_text
from unimed_jax.settings import from_config_dict

STEPS, ROWS = 12, 8
CLI = """
import sys
from unimed_jax import main
if "--killed" in sys.argv:
    sys.argv.remove("--killed")
    import os, signal
    from unimed_jax.train.log import Log
    write = Log.write
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    Log.write = lambda self, step, values: die() if step == 10 else write(self, step, values)
if "--unscored" in sys.argv:
    sys.argv.remove("--unscored")
    from unimed_jax.analyze import chain
    chain.evaluate_run = lambda run, config: None
sys.exit(main.main(sys.argv[1:]))
"""
CONFIG = f"""
from support.fake_brain import tiny_config
def get_config(experts=""):
    config = tiny_config(steps={STEPS}, save_every=4, log_every=1)
    config.data.rows = {ROWS}
    config.evaluate.limit = 4
    if experts:
        config.model.moe.experts, config.model.moe.aux_coef, config.model.lora.rank = int(experts), 0.1, 0
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "squares.py").write_text(CONFIG)
    return folder


def start(
    place: Path, run: str, count: int, devices: int = 1, *words: str, experts: str = ""
) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for number in range(count):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        if count > 1:
            environment |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
            environment |= {"JAX_COORDINATOR_ADDRESS": address}
        config = f"--config={place / 'squares.py'}:{experts}"
        command = [sys.executable, "-c", CLI, config, f"--workdir={place / run}", *words]
        output = (place / f"{run}.{number}.txt").open("w")
        started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    return started


def said(place: Path, run: str, number: int) -> str:
    return (place / f"{run}.{number}.txt").read_text()


def finish(place: Path, run: str, started: list[subprocess.Popen]) -> None:
    for number, process in enumerate(started):
        assert process.wait(timeout=240) == 0, said(place, run, number)[-3000:]


def lines(place: Path, run: str) -> list[dict]:
    file = place / run / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(place: Path, run: str) -> list[float]:
    assert [line["step"] for line in lines(place, run)] == list(range(STEPS))
    return [line["train/loss"] for line in lines(place, run)]


@pytest.fixture(scope="module")
def alone(place):
    finish(place, "alone", start(place, "alone", 1))
    return losses(place, "alone")


def test_a_process_reads_its_block_of_the_one_batch(tmp_path):
    settings = tiny_config()
    settings.data.rows = ROWS
    config = from_config_dict(settings)
    data = [Squares()]
    pipeline = Pipeline(data, config, load_text(tmp_path, config, data))
    for shares in (2, 4):
        whole, parts = pipeline.batches(3), [pipeline.batches(3, share, shares) for share in range(shares)]
        for _ in range(2):
            expected, found = next(whole), [next(part) for part in parts]
            for name, value in expected.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in found]), value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 1), (4, 1), (2, 2)])
def test_processes_train_to_the_losses_of_one(place, alone, count, devices):
    run = f"p{count}x{devices}"
    finish(place, run, start(place, run, count, devices, *(() if (count, devices) == (2, 1) else ("--unscored",))))
    np.testing.assert_allclose(losses(place, run), alone, rtol=1e-5)
    first = said(place, run, 0)
    assert f"{count * devices} devices (data {count * devices}) of {count} processes" in first
    for number in range(1, count):  # one log, one progress bar
        assert "step/s" not in said(place, run, number) and "wrote" not in said(place, run, number)
    if (count, devices) != (2, 1):
        return
    here, there = (json.loads((place / r / "metrics.json").read_text())["sets"]["squares"] for r in (run, "alone"))
    assert there.keys() == here.keys() == {"val", "test"}
    for split, tasks in there.items():
        for task, entry in tasks.items():
            assert here[split][task]["n"] == entry["n"] > 0
            assert here[split][task]["blind"] == entry["blind"]


@pytest.fixture(scope="module")
def experts_alone(place):
    """The name of a finished run with experts in its decoder, of one process and device."""
    finish(place, "experts_alone", start(place, "experts_alone", 1, 1, "--unscored", experts="4"))
    return "experts_alone"


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"expert": 2}, {"expert": 4}, {"data": 2, "expert": 2}], ids=str)
def test_processes_share_experts(place, experts_alone, axes):
    """The decoder's experts on two processes, of one device and of two each: the losses of one process."""
    name = "_".join(f"{axis}{size}" for axis, size in axes.items())
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in axes.items()]
    devices = int(np.prod(list(axes.values()))) // 2
    words = ("--unscored", "--config.mesh.auto=False", *mesh)
    finish(place, name, start(place, name, 2, devices, *words, experts="4"))
    for key in ("train/loss", "train/grad_norm", "experts/balance"):
        one, two = ([line[key] for line in lines(place, run)] for run in (experts_alone, name))
        np.testing.assert_allclose(two, one, rtol=1e-5, err_msg=key)
        assert len(one) == STEPS


def wait_for_step(place, run, started, step):
    end = time.monotonic() + 240
    while not any(line["step"] >= step for line in lines(place, run)):
        assert time.monotonic() < end and started[0].poll() is None, said(place, run, 0)[-3000:]
        time.sleep(0.02)


@pytest.mark.slow
def test_a_death_ends_all_with_a_sentence_and_the_run_goes_on_even_with_fewer(place, alone):
    more = ("--config.train.steps=4000", "--unscored")
    started = start(place, "death", 2, 1, *more)
    wait_for_step(place, "death", started, 9)
    started[1].kill()
    assert started[0].wait(timeout=120) == 1
    assert "has lost another one" in said(place, "death", 0) and "Traceback" not in said(place, "death", 0)
    again = start(place, "death", 2, 1, *more)
    wait_for_step(place, "death", again, 40)
    again[1].send_signal(signal.SIGTERM)  # one is told, both save
    for number, process in enumerate(again):
        assert process.wait(timeout=120) == 143, said(place, "death", number)[-3000:]
    assert "saved after step" in said(place, "death", 0)
    steps = [line["step"] for line in lines(place, "death")]
    assert steps == list(range(len(steps)))
    fewer = start(place, "death", 1, 1, *more)
    wait_for_step(place, "death", fewer, len(steps) + 5)
    fewer[0].send_signal(signal.SIGTERM)
    assert fewer[0].wait(timeout=120) == 143
    steps = [line["step"] for line in lines(place, "death")]
    assert steps == list(range(len(steps)))


@pytest.fixture(scope="module")
def killed(place):
    """A run of one process and device that was killed in step 10; of its two saves the first is certainly whole."""
    (process,) = start(place, "killed", 1, 1, "--unscored", "--killed")
    assert process.wait(timeout=240) == -signal.SIGKILL
    return place / "killed"


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(1, 2), (1, 4), (1, 8), (2, 1)])
def test_a_killed_run_goes_on_elsewhere_with_the_losses_of_the_unbroken_one(place, alone, killed, count, devices):
    run = f"killed{count}x{devices}"
    shutil.copytree(killed, place / run)
    finish(place, run, start(place, run, count, devices, "--unscored"))
    first = said(place, run, 0)
    assert f"{count * devices} devices (data {count * devices}) of {count} processes" in first
    continued = losses(place, run)
    assert continued[:4] == alone[:4] and "damaged" not in first
    np.testing.assert_allclose(continued, alone, rtol=1e-5)


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='2' needs JAX_PROCESS_ID below it"):
        processes.join()
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS"):
        processes.join()
