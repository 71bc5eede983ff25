"""Runs that are stopped, killed, started twice or out of disk: what they say, and that they go on
as if nothing was.
"""

import contextlib
import errno
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from support.fake_brain import Squares, tiny_config
from support.logs import logged_values

from unimed_jax import files, interruption
from unimed_jax import main as cli
from unimed_jax.analyze import chain
from unimed_jax.data import datasets
from unimed_jax.errors import UserError
from unimed_jax.interruption import Interruption, Stoppable, Stopped, claim, explain_system_errors
from unimed_jax.model.parameters import parameters
from unimed_jax.runs.folder import load_text, write_config
from unimed_jax.runs.open import open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train import loop
from unimed_jax.train.log import Log

CONFIG = "from support.fake_brain import tiny_config as get_config\n"


@pytest.fixture(scope="module")
def compiled_once(quick_compiles, tmp_path_factory):
    """What one run of this file compiled, the next ones load."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def patched(compiled_once, monkeypatch):
    """The command trains on squares and leaves out the evaluation."""
    monkeypatch.setattr(chain, "evaluate_run", lambda run, config: None)


@pytest.fixture(scope="module")
def straight(compiled_once, tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    return loop.train(from_config_dict(tiny_config()), folder)


@pytest.fixture
def command(tmp_path):
    """What trains in `tmp_path / "run"`: arguments of the cli."""
    file = tmp_path / "squares.py"
    file.write_text(CONFIG)
    return [f"--config={file}", f"--workdir={tmp_path / 'run'}"]


def at_step(monkeypatch, step, action):
    """Calls `action` in the training, before step `step` (from 0) is logged.

    The next step is under way by then.
    """
    write = Log.write

    def acting(self, at, values):
        if at == step:
            action()
        write(self, at, values)

    monkeypatch.setattr(Log, "write", acting)


# ---- signals ---------------------------------------------------------------------------------------
def test_sigterm_saves_and_the_same_command_continues(
    straight, patched, command, tmp_path, monkeypatch, capsys
):
    """Stopped after step 6, whose checkpoint then loses a file: continued from 4."""
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        assert cli.main(command) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "unimed_jax: stopped by SIGTERM, saved after step 6; the same command continues."
    assert open_run(tmp_path / "run").step == 6 and len(logged_values(tmp_path / "run")) == 6
    shutil.rmtree(tmp_path / "run/checkpoints/6/optimizer")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints/6/weights")
    assert open_run(tmp_path / "copy").step == 4
    assert cli.main(command) == 0
    assert "checkpoints/6 is damaged" in capsys.readouterr().err
    assert logged_values(tmp_path / "run") == logged_values(straight.folder)
    for path, leaf in parameters(open_run(tmp_path / "run").model).items():
        np.testing.assert_array_equal(leaf, parameters(straight.model)[path], err_msg=path)


def test_ctrl_c_waits_for_the_step(capfd):
    # a shell may have started this in the background, deaf to Ctrl-C
    before = signal.getsignal(signal.SIGINT)
    sentence = "stopped by Ctrl-C, saved after step 3; the same command continues"
    with pytest.raises(Stopped, match=sentence) as stopped, Interruption() as stop:
        assert not stop.reached()
        signal.raise_signal(signal.SIGINT)
        assert stop.reached()
        raise stop.stopped(3)
    assert stopped.value.status == 130 and "finishing this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once():
    code = """
import signal, time
from unimed_jax.interruption import Interruption
with Interruption():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    try:
        print("waits", flush=True)
        signal.raise_signal(signal.SIGINT)
    finally:
        print("still there")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "waits\n"
    assert done.stderr.splitlines()[-1].startswith("unimed_jax: stopped at once")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_is_a_sentence(command, monkeypatch, capsys, number, status):
    """While data is built; the evaluation is no other place."""
    monkeypatch.setattr(datasets, "prepared", lambda *given: signal.raise_signal(number))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert cli.main(command) == status
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("unimed_jax: stopped by") and said.endswith("; the same command continues.")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def lose_in_a_destructor():
    class Held:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    Held()


def lose_in_the_garbage_collector():
    def collected(phase, info):
        gc.callbacks.remove(collected)
        signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(collected)
    gc.collect()


def lose_in_a_weak_reference():
    class Held:
        pass

    held = Held()
    reference = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGTERM))
    del held
    assert reference() is None


def lose_in_a_library():
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)


def turn_into_another_error():
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException as error:
        raise RuntimeError("what a library makes of it") from error


LOST = (lose_in_a_destructor, lose_in_the_garbage_collector, lose_in_a_weak_reference, lose_in_a_library)


@pytest.mark.parametrize("lose", [*LOST, turn_into_another_error])
def test_a_signal_is_never_lost(lose, capfd):
    """Whatever Python runs when it comes; what belongs to the block is gone afterwards."""
    gc.collect()  # files that earlier tests left to it
    descriptors, threads = os.listdir("/proc/self/fd"), threading.active_count()
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command"), Stoppable():
        lose()
        time.sleep(5)
        raise AssertionError("it went on")
    assert capfd.readouterr().err == ""
    assert (
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
        sys.unraisablehook,
    ) == handlers
    assert os.listdir("/proc/self/fd") == descriptors and threading.active_count() == threads


def test_a_reminder_does_not_disturb_what_tidies_up():
    """The signal has arrived; the end takes longer than the time between two reminders."""
    tidied = False
    with pytest.raises(Stopped), Stoppable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(3 * interruption.REMIND_SECONDS)
            tidied = True
    assert tidied


def test_a_signal_after_the_last_step_is_not_lost():
    with pytest.raises(Stopped), Stoppable(), Interruption() as stop:
        assert not stop.reached()
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped), Interruption():
        signal.raise_signal(signal.SIGTERM)


STUCK = """
import ctypes, sys, threading
from unimed_jax import interruption
interruption.STUCK_SECONDS = float(sys.argv[1])
with interruption.Stoppable():
    print("ready", flush=True)
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)  # a long call of a library, in which Python handles no signal
"""


@pytest.mark.parametrize(
    ("numbers", "patience"), [((signal.SIGTERM,), 0.2), ((signal.SIGINT, signal.SIGINT), 60)]
)
def test_signals_end_a_process_inside_a_long_call(numbers, patience):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(patience)], **pipes)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    for number in numbers:
        time.sleep(0.2)
        process.send_signal(number)
    assert process.wait(timeout=20) == 128 + numbers[0]
    (said,) = process.stderr.read().strip().splitlines()
    assert said.startswith("unimed_jax: stopped")


def test_one_sigterm_that_comes_twice_saves_and_a_later_one_ends_at_once():
    """A launcher may send it to the process and to its group."""
    code = """
import signal, time
from unimed_jax import interruption
interruption.ONE_SIGNAL_SECONDS = 0.1
with interruption.Interruption():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    print("waits", flush=True)
    time.sleep(0.2)
    signal.raise_signal(signal.SIGTERM)
    print("still there")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 143 and done.stdout == "waits\n"
    assert done.stderr.splitlines()[-1].startswith("unimed_jax: stopped at once")


PROCESS = """
import signal, sys, time
import jax
from unimed_jax.interruption import Interruption
address, number, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
jax.distributed.initialize(address, 2, number)
with Interruption() as interruption:
    print("ready", flush=True)
    for step in range(1, 2000):
        time.sleep(pause)
        if interruption.reached():
            print(interruption.stopped(step), interruption.stopped(step).status)
            break
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_processes_stop_after_the_same_step_whichever_gets_the_signal(number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, address, str(i), pause], **pipes)
        for i, pause in enumerate(["0.02", "0.03"])
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()[-2000:]
    time.sleep(0.3)
    processes[1].send_signal(number)
    said = [process.communicate(timeout=60)[0].split("; ") for process in processes]
    steps = [words[0].rsplit(" ", 1)[1] for words in said]
    assert steps[0] == steps[1] and int(steps[0]) > 5, said
    assert said[1][1].split()[-1] == str(128 + number)


def test_a_kill_while_the_folder_is_made_leaves_no_half_of_it(tmp_path, monkeypatch):
    config, data = from_config_dict(tiny_config()), [Squares()]
    make = {
        "config.json": lambda: write_config(tmp_path, config),
        "tokenizer": lambda: load_text(tmp_path, config, data),
    }

    def killed(self, target):
        raise Stopped(signal.SIGKILL)

    for name, what in make.items():
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Path, "replace", killed)
            patch.setattr(files, "_remove", lambda path: None)
            what()
        assert list(tmp_path.glob(f".{name}.*")) and not (tmp_path / name).exists()
        what()
        assert (tmp_path / name).exists() and not list(tmp_path.glob(f".{name}.*"))
        what()


# ---- one run, one folder ---------------------------------------------------------------------------
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path, command, capsys):
    code = "import sys, time, pathlib; from unimed_jax.interruption import claim\n"
    code += "claim(pathlib.Path(sys.argv[1])); print('claimed', flush=True); time.sleep(600)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "claimed\n"
    assert cli.main(command) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert f"in use by the run of process {other.pid} on host {socket.gethostname()};" in said
    other.kill()  # leaves no time to tidy up
    other.wait()
    claim(tmp_path / "run")
    claim(tmp_path / "run")  # it is ours
    assert (
        tmp_path / "run/lock"
    ).read_text() == f"process {os.getpid()} on host {socket.gethostname()}\n"


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(interruption.fcntl, "flock", refuse)
    claim(tmp_path)
    assert "cannot be locked (No locks available); start no second run" in capsys.readouterr().err


# ---- full disks ------------------------------------------------------------------------------------
def test_errors_of_a_full_disk_become_one_sentence():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with (
            pytest.raises(UserError, match=rf"{os.strerror(number)} \(/there\); free some space"),
            explain_system_errors(),
        ):
            raise OSError(number, "words", "/there")
    with pytest.raises(UserError, match=r"No space left on device \(/a/b\)"), explain_system_errors():
        try:
            raise ValueError("Failed writing: \"/a/b\": No space left on device [os_error_code='28']")
        finally:
            raise RuntimeError("while closing")


def test_what_the_system_refuses_becomes_one_sentence_and_a_defect_stays_one():
    for error, words in {
        OSError(errno.ENOENT, "No such thing", "/there"): r"No such thing \(/there\); mend that",
        OSError("odd"): "odd; mend that",
        TimeoutError(): "TimeoutError; mend that",
        ValueError("\"/a/b\": os_error_code='13'"): r"Permission denied \(/a/b\); mend that",
    }.items():
        with pytest.raises(UserError, match=words), explain_system_errors():
            raise error
    for error in (KeyError("x"), TypeError("y"), BrokenPipeError(errno.EPIPE, "pipe")):
        with pytest.raises(type(error)), explain_system_errors():
            raise error
    with pytest.raises(TypeError), explain_system_errors():  # a defect that comes to light in a handler
        try:
            raise FileNotFoundError(errno.ENOENT, "words", "/there")
        except OSError:
            raise TypeError("a defect")  # noqa: B904


def fill(disk: Path, free: int) -> None:
    """Leaves `free` bytes, once the checkpoint under way is written."""
    while not (disk / "run/checkpoints/4").exists():
        time.sleep(0.01)
    there = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(there - free))


def test_a_full_disk_stops_the_run_with_a_sentence_and_costs_nothing_saved(
    straight, patched, command, small_disk, monkeypatch, capsys
):
    """First no checkpoint fits any more, then no line of the log does; then there is space again."""
    command[-1] = f"--workdir={small_disk / 'run'}"
    for free, step, place in ((64 << 10, 5, "checkpoints/8"), (0, 6, "")):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda free=free: fill(small_disk, free))
            assert cli.main(command) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("unimed_jax: No space left on device") and place in said, said
        assert [path.name for path in (small_disk / "run/checkpoints").iterdir()] == ["4"]
        (small_disk / "ballast").unlink()
    assert cli.main(command) == 0
    assert logged_values(small_disk / "run") == logged_values(straight.folder)
    assert all(path.name.isdigit() for path in (small_disk / "run/checkpoints").iterdir())


def test_a_log_that_may_not_grow_stops_the_run(tmp_path):
    """Files of 30 kB at most, in a child: the limit and the signal that comes with it stay there."""
    code = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from support.fake_brain import tiny_config
from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict
from unimed_jax.interruption import explain_system_errors
from unimed_jax.train.log import Log
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
log = Log(Path(sys.argv[1]), from_config_dict(tiny_config()), 0)
try:
    with explain_system_errors():
        for step in range(10_000):
            log.write(step, {"train/loss": 1.0})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("File too large")
