"""Runs that are killed at random moments, and lose nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.logs import logged_values

CONFIG = "from support.fake_brain import tiny_config as get_config\n"

# Importing takes half of a restart, so one process imports, then forks one child for each line that
# it reads.
FORKS = """
import os, sys
from unimed_jax import main as cli
from unimed_jax.analyze import chain
from unimed_jax.train import loop
chain.evaluate_run = lambda run, config: None
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.exit(cli.main(line.split()))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
STEPS = 240
SEEDS = range(20)


class Runs:
    """One run's command, in a new process every time."""

    def __init__(self, folder: Path, compiled: Path):
        self.folder, config = folder, folder.with_suffix(".py")
        config.write_text(CONFIG)
        self.command = f"--config={config} --workdir={folder} --config.train.steps={STEPS}"
        self.command += " --config.train.save_every=3"
        self.said = folder.with_suffix(".txt")
        environment = os.environ | {
            "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self.said.open("w"),
            "text": True,
        }
        self.forks = subprocess.Popen([sys.executable, "-c", FORKS], env=environment, **pipes)

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *error) -> None:
        self.forks.stdin.close()
        self.forks.wait()

    def start(self) -> int:
        """-> process id"""
        self.forks.stdin.write(self.command + "\n")
        self.forks.stdin.flush()
        return int(self.forks.stdout.readline())

    def end(self) -> int:
        """-> exit status, or minus the signal"""
        for line in self.forks.stdout:
            if line.strip().lstrip("-").isdecimal():  # not what the run prints
                return int(line)
        raise AssertionError(self.said.read_text()[-2000:])

    def finish(self) -> None:
        self.start()
        assert self.end() == 0, self.said.read_text()[-2000:]

    def logged(self) -> int:
        log = self.folder / "log.jsonl"
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    def starts(self) -> int:
        """How often it came to where steps begin."""
        return len(list(self.folder.glob("tensorboard/*")))

    def saving(self) -> bool:
        return any(path.name.endswith("-tmp") for path in self.folder.glob("checkpoints/*"))

    def stop(self, seed: int, number: int = signal.SIGKILL) -> str:
        """Starts, and stops at a moment that the seed chooses.

        -> "save" (inside one), "step" or "start".
        """
        rng = random.Random(seed)
        moment = rng.choice(["save", "save", "step", "start"])
        starts = self.starts()
        process = self.start()
        if moment == "start":
            time.sleep(rng.uniform(0, 4))
        else:
            self.wait(lambda: self.starts() > starts)
            before, steps = self.logged(), rng.randrange(1, 9)
            self.wait(lambda: self.logged() >= before + steps)
            if moment == "save":
                self.wait(self.saving)
            time.sleep(rng.uniform(0, 0.03))
        os.kill(process, signal.SIGSTOP)
        saving = self.saving()
        os.kill(process, number)
        os.kill(process, signal.SIGCONT)
        assert self.end() == (-number if number == signal.SIGKILL else 128 + number), (
            self.said.read_text()[-2000:]
        )
        return "save" if saving else moment

    def wait(self, what) -> None:
        for _ in range(60_000):
            if what():
                return
            time.sleep(0.002)
        raise AssertionError(self.said.read_text()[-2000:])


@pytest.mark.slow
def test_twenty_kills_leave_the_losses_of_an_unbroken_run(tmp_path):
    """Two runs, each killed ten times, then asked to stop, then left alone."""
    compiled, folders = tmp_path / "compiled", [tmp_path / "a", tmp_path / "b"]
    with Runs(tmp_path / "unbroken", compiled) as unbroken:
        unbroken.finish()

    def chain(folder: Path, seeds) -> list[str]:
        with Runs(folder, compiled) as runs:
            moments = [runs.stop(seed) for seed in seeds]
            runs.stop(100 + seeds[0], signal.SIGTERM)
            runs.finish()
        return moments

    with ThreadPoolExecutor(2) as pool:
        moments = sum(pool.map(chain, folders, [SEEDS[:10], SEEDS[10:]]), [])
    assert moments.count("save") >= 4, moments
    for folder in folders:
        assert (
            logged_values(folder) == logged_values(unbroken.folder)
            and len(logged_values(folder)) == STEPS
        )
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            str(STEPS - 3),
            str(STEPS),
        ]
