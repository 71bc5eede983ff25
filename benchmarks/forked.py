"""Runs commands of unimed_jax in processes forked from one that has imported everything.

This halves the time that a command takes to start.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]

_SERVER = """
import json, os, sys
import jax, orbax.checkpoint, transformers
import array_record.python.array_record_module, matplotlib.figure, PIL.Image
from unimed_jax import main as cli
from unimed_jax.analyze import chain
from unimed_jax.interop import targets
from unimed_jax.evaluate import questions, run
from unimed_jax.predict import engine, predictor
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(asked["folder"])
        os.environ.update(asked["environment"])
        said = os.open(asked["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = 1
        try:
            status = cli.main(asked["words"])
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Starts commands in child processes, one at a time."""

    def __init__(self, environment: Mapping[str, str]):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, "-c", _SERVER], env=dict(environment), **pipes)
        self.child = 0
        self.said = Path(tempfile.mkstemp(prefix="said-")[1])

    def start(self, words: Sequence[str], folder: Path, **environment: str) -> None:
        asked = {
            "words": list(words),
            "folder": str(folder),
            "environment": environment,
            "said": str(self.said),
        }
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        self.child = int(self._server.stdout.readline())

    def alive(self) -> bool:
        """Says whether the command still runs.

        A child that has ended stays in the process table until `end` asks for its status.
        """
        try:
            return Path(f"/proc/{self.child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)

    def end(self) -> int:
        """Waits for the command; returns its exit status, or minus the number of the signal."""
        return int(self._server.stdout.readline())

    def run(self, words: Sequence[str], folder: Path, **environment: str) -> int:
        self.start(words, folder, **environment)
        return self.end()

    def last_words(self) -> str:
        return self.said.read_text(errors="replace")[-1500:]

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self.said.unlink(missing_ok=True)


@contextlib.contextmanager
def commands(place: Path, count: int = 1) -> Iterator[list[Commands]]:
    """Gives `count` servers that run commands and share what they have compiled."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
    }
    started = [Commands(environment) for _ in range(count)]
    try:
        yield started
    finally:
        for each in started:
            each.close()


def wait_until(what, seconds: float = 120.0, pause: float = 0.001) -> bool:
    """Waits until a condition is true; returns False if it is not after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(pause)
    return False
