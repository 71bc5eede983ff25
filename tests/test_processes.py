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
from unimed_jax.errors import PassingError, UserError
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
if "--ring" in sys.argv:
    sys.argv.remove("--ring")
    import jax, numpy
    make = jax.make_mesh
    def in_a_ring(*shape, devices=None, **words):
        by_process = sorted(jax.devices(), key=lambda d: d.id)
        return make(*shape, devices=[by_process[i] for i in (0, 2, 3, 1)], **words)
    jax.make_mesh = in_a_ring
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
        config.model.moe.experts, config.model.moe.aux_coef = int(experts), 0.1
        config.model.lora.rank = 0
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
            "XLA_FLAGS": (
                f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
            ),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
            ),
        }
        if count > 1:
            environment |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
            environment |= {"JAX_COORDINATOR_ADDRESS": address}
        config = f"--config={place / 'squares.py'}:{experts}"
        command = [sys.executable, "-c", CLI, config, f"--workdir={place / run}", *words]
        output = (place / f"{run}.{number}.txt").open("w")
        started.append(
            subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        )
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
        whole, parts = (
            pipeline.batches(3),
            [pipeline.batches(3, own.tolist()) for own in np.split(np.arange(ROWS), shares)],
        )
        for _ in range(2):
            expected, found = next(whole), [next(part) for part in parts]
            for name, value in expected.items():
                np.testing.assert_array_equal(
                    np.concatenate([part[name] for part in found]), value, err_msg=name
                )


@pytest.mark.slow
def test_a_process_may_hold_rows_that_are_no_neighbours(place, alone):
    """As on a slice of TPUs, whose chips are ordered along a ring: here rows 0 and 3, and 1 and 2."""
    finish(place, "ring", start(place, "ring", 2, 2, "--ring", "--unscored"))
    np.testing.assert_allclose(losses(place, "ring"), alone, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 1), (4, 1), (2, 2)])
def test_processes_train_to_the_losses_of_one(place, alone, count, devices):
    run = f"p{count}x{devices}"
    finish(
        place,
        run,
        start(place, run, count, devices, *(() if (count, devices) == (2, 1) else ("--unscored",))),
    )
    np.testing.assert_allclose(losses(place, run), alone, rtol=1e-5)
    first = said(place, run, 0)
    assert f"{count * devices} devices (data {count * devices}) of {count} processes" in first
    for number in range(1, count):  # one log, one progress bar
        assert "step/s" not in said(place, run, number) and "wrote" not in said(place, run, number)
    if (count, devices) != (2, 1):
        return
    here, there = (
        json.loads((place / r / "metrics.json").read_text())["sets"]["squares"] for r in (run, "alone")
    )
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
    """The decoder's experts on two processes, of one device and of two each: the losses of one
    process.
    """
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
    assert "has lost another one" in said(place, "death", 0) and "Traceback" not in said(
        place, "death", 0
    )
    again = start(place, "death", 2, 1, *more)
    wait_for_step(place, "death", again, 40)
    again[1].send_signal(signal.SIGTERM)  # one gets the signal, both save
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
    """A run of one process and device that was killed in step 10.

    Of its two saves the first is certainly whole.
    """
    (process,) = start(place, "killed", 1, 1, "--unscored", "--killed")
    assert process.wait(timeout=240) == -signal.SIGKILL
    return place / "killed"


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(1, 2), (1, 4), (1, 8), (2, 1)])
def test_a_killed_run_goes_on_elsewhere_with_the_losses_of_the_unbroken_one(
    place, alone, killed, count, devices
):
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


# ---- a start that cannot succeed -------------------------------------------------------------------
@pytest.fixture
def port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def as_process(monkeypatch, number: int, address: str, seconds: str = "1") -> None:
    for name, value in {
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
        "JAX_COORDINATOR_ADDRESS": address,
        "UNIMED_START_SECONDS": seconds,
    }.items():
        monkeypatch.setenv(name, value)


def test_a_taken_port_is_refused_at_once(port, monkeypatch):
    as_process(monkeypatch, 0, f"localhost:{port}")
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match="Address already in use.; choose another"),
    ):
        processes.join()


def test_a_coordinator_that_nobody_is_at_is_waited_for_no_longer_than_said(port, monkeypatch):
    as_process(monkeypatch, 1, f"localhost:{port}")
    begun = time.monotonic()
    with pytest.raises(
        PassingError, match=f"=localhost:{port} within 1 s .Connection refused.; start it"
    ):
        processes.join()
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 70, "two..dots", "\u80ba", "256.256.256.256"])
def test_a_host_that_nobody_knows_is_named_soon(host, monkeypatch):
    """Not as late as a coordinator that has a name.

    A cluster may learn the names of its machines late.
    """
    monkeypatch.setattr(processes, "NAME_SECONDS", 0)
    as_process(monkeypatch, 1, f"{host}:1234", "60")
    with pytest.raises(PassingError, match=r"cannot be reached at .*\((the host is unknown: )?"):
        processes.join()


def test_a_host_that_does_not_answer_is_named(monkeypatch):
    def silent(address, timeout):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    as_process(monkeypatch, 1, "localhost:1234")
    with pytest.raises(PassingError, match="within 1 s .timed out.; start it"):
        processes.join()


@pytest.mark.parametrize(
    "address", ["localhost", ":1234", "localhost:", "localhost:x", "localhost:0", "localhost:65536"]
)
def test_an_address_that_is_none_is_refused(address, monkeypatch):
    as_process(monkeypatch, 1, address)
    with pytest.raises(
        UserError, match="needs JAX_PROCESS_ID below it .* and JAX_COORDINATOR_ADDRESS=host:port"
    ):
        processes.join()


@pytest.mark.parametrize("seconds", ["", "0", "-1", "x", "1.5", "nan"])
def test_a_wait_that_is_no_number_is_refused(seconds, monkeypatch):
    as_process(monkeypatch, 1, "localhost:1234", seconds)
    with pytest.raises(UserError, match=f"UNIMED_START_SECONDS='{seconds}' is not a number of seconds"):
        processes.join()


def command(place: Path, **environment: str) -> subprocess.Popen:
    """`params` with this environment."""
    names = (
        os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"} | environment
    )
    words = [sys.executable, "-m", "unimed_jax.main", "params", f"--config={place / 'squares.py'}"]
    return subprocess.Popen(words, env=names, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# The environment, the exit status, and what the sentence says.
CANNOT_START = {
    "no such platform": (
        {"JAX_PLATFORMS": "nonsense"},
        2,
        "(Unable to initialize backend 'nonsense': Backend",
    ),
    "no GPU": ({"JAX_PLATFORMS": "cuda"}, 2, "JAX cannot start with JAX_PLATFORMS='cuda'"),
    "no TPU": ({"JAX_PLATFORMS": "tpu"}, 2, "JAX cannot start with JAX_PLATFORMS='tpu'"),
    "no truth value": (
        {"JAX_ENABLE_X64": "maybe"},
        2,
        "with JAX_ENABLE_X64='maybe' in the environment (invalid",
    ),
    "no precision": ({"JAX_DEFAULT_MATMUL_PRECISION": "foo"}, 2, "JAX_DEFAULT_MATMUL_PRECISION='foo'"),
    "a flag of another release": (
        {"XLA_FLAGS": "--xla_nonsense"},
        2,
        "(Unknown flag in XLA_FLAGS: --xla_nonsense);",
    ),
    "a wrong value": (
        {"XLA_FLAGS": "--xla_gpu_autotune_level=x"},
        2,
        "(Couldn't interpret value x for flag xla_gpu",
    ),
    "no such file of flags": (
        {"XLA_FLAGS": "/no/such/file"},
        2,
        '(Could not open file "/no/such/file" to read flags',
    ),
    "no number of devices": (
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=-3"},
        2,
        "XLA_FLAGS='--xla_force",
    ),
    "nobody knows the others": (
        {"JAX_NUM_PROCESSES": "auto"},
        2,
        "JAX_NUM_PROCESSES=auto: the processes",
    ),
}
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in list(CANNOT_START)[2:]]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (i > 1)) for i, c in enumerate(CANNOT_START)]
)
def test_a_jax_that_cannot_start_is_one_sentence(case, place):
    environment, status, words = CANNOT_START[case]
    if case == "no GPU" and shutil.which("nvidia-smi"):
        pytest.skip("there may be a GPU")
    started = command(place, **environment)
    out, err = started.communicate(timeout=120)
    (said,) = err.splitlines()
    assert (
        (started.returncode, out) == (status, "") and said.startswith("unimed_jax: ") and words in said
    ), said


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_others_that_do_not_come_are_one_sentence_in_time(number, place, port):
    """Process 0 without process 1, and process 1 at a port where something else than process 0
    listens.
    """
    server = socket.create_server(("", port)) if number else None
    address = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
    }
    started = command(place, UNIMED_START_SECONDS="3", **address)
    out, err = started.communicate(timeout=60)
    if server is not None:
        server.close()
    (said,) = err.splitlines()
    assert (started.returncode, out) == (1, "")
    assert said.endswith("not all processes of the run came within 3 s; start all of them again.")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "stop"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_ends_the_wait_for_others(number, stop, place, port):
    address = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
    }
    started = command(place, **address)
    time.sleep(4)
    begun = time.monotonic()
    started.send_signal(stop)
    out, err = started.communicate(timeout=60)
    assert time.monotonic() - begun < 5
    (said,) = err.splitlines()
    assert (started.returncode, out) == (128 + stop, "") and said.startswith("unimed_jax: stopped by"), (
        said
    )
