"""Compiles programs ahead of time, each in a process of its own, and keeps what came of them.

Flags of XLA and libtpu belong to a process, and a compiler may run out of memory: so every program
is compiled by `child.py` in a new process, which is watched and ended if it takes too much. What is
found is kept in a folder named by all that it depends on, so that no program is compiled twice.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import unimed_jax
from unimed_jax import files
from unimed_jax.config import Config, config_hash, to_dict
from unimed_jax.errors import UserError
from unimed_jax.parsing import read_json
from unimed_jax.plan.topology import Topology, environment

# What a compiled program depends on, in this package; the rest only reads it.
SOURCES: tuple[str, ...] = (
    *("model", "train", "config.py", "config_model.py", "rules.py"),
    *("predict/sizes.py", "plan/programs.py", "plan/child.py", "plan/topology.py", "plan/chips.py"),
)
COMPILERS = ("jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
WATCH_SECONDS = 0.2
RESULT, PROGRAM = "result.json", "program.txt.gz"  # as child.py names them
WORK = ".compile-"  # begins the name of a folder in which a process compiles
LONGEST = 7 * 24 * 3600  # seconds; --minutes allows less


@dataclasses.dataclass(frozen=True)
class Job:
    """Names a program of a config that is compiled for a topology."""

    config: Config
    topology: Topology
    program: str
    label: str = ""  # tells jobs of one topology and program apart for the reader

    @property
    def shown(self) -> str:
        return f"{self.name} ({self.label})" if self.label else self.name

    @property
    def name(self) -> str:
        return f"{self.topology.text} {self.program}"

    @property
    def key(self) -> str:
        """Names everything that the result depends on."""
        parts = (config_hash(self.config), self.topology.text, self.program, code(), versions())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds what one compilation may take of this machine."""

    seconds: float
    memory: float  # bytes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds what came of a job; `failed` is a sentence if this machine could not compile it."""

    job: Job
    result: dict[str, Any]  # as child.py writes it
    folder: Path
    seconds: float
    kept: bool  # found, not compiled now
    failed: str = ""

    @property
    def text(self) -> str:
        """Reads the compiled program; empty if there is none."""
        file = self.folder / PROGRAM
        if not file.is_file():
            return ""
        with gzip.open(file, "rt", encoding="utf-8") as text:
            return text.read()


def code() -> str:
    """Returns a checksum of the files that the compiled programs depend on."""
    root = Path(unimed_jax.__file__).parent
    found = hashlib.sha256()
    for source in SOURCES:
        place = root / source
        for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Lists the versions of the compilers that are installed here, and jax's."""
    found = {}
    for name in ("jax", *COMPILERS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def compile_all(
    jobs: Sequence[Job], cache: Path, limits: Limits, say: Callable[[str], None] = print
) -> Iterator[Outcome]:
    """Yields the outcome of each job in turn, and says before each how long the rest may take."""
    _remove_leftovers(cache)
    seconds = _earlier(cache)
    kept = {job.key: outcome for job in jobs if (outcome := _kept(job, cache)) is not None}
    waiting = [job for job in jobs if job.key not in kept]
    done = 0
    for job in jobs:
        if job.key in kept:
            say(f"{job.shown}: kept from before")
            yield kept[job.key]
            continue
        done += 1
        if (cache / job.key).exists():
            say(f"{job.shown}: what was kept of it in {cache / job.key} is damaged, and is replaced")
        left = [_estimate(other, seconds) for other in waiting[done - 1 :]]
        known = [x for x in left if x is not None]
        about = f"about {_time(sum(known) * len(left) / len(known))} left" if known else "time unknown"
        say(f"{job.shown}: compiling ({done} of {len(waiting)}, {about})")
        outcome = compile_one(job, cache, limits)
        if not outcome.failed:
            seconds[job.name] = outcome.seconds
            files.write_json(cache / "seconds.json", seconds)
        say(f"{job.shown}: {'ended' if outcome.failed else 'done'} after {_time(outcome.seconds)}")
        yield outcome


def compile_one(job: Job, cache: Path, limits: Limits) -> Outcome:
    """Compiles a job in a new process, within the limits, and keeps its result in `cache`."""
    with _explained(cache):
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=WORK, dir=cache))
    begun = time.monotonic()
    try:
        description = {
            "config": to_dict(job.config),
            "topology": job.topology.text,
            "program": job.program,
        }
        files.write_json(work / "job.json", description)
        failed = _run(job, work, limits)
        taken = time.monotonic() - begun
        if failed:
            return Outcome(job, {}, work, taken, False, failed)
        result = read_json(work / RESULT, "compile it again")
        if "refused" in result:
            return Outcome(job, {}, work, taken, False, result["refused"])
        result["taken"] = taken
        files.write_json(work / RESULT, result | {"checksum": _checksum(work, result)})
        target = cache / job.key
        shutil.rmtree(target, ignore_errors=True)
        with _explained(cache):
            work.rename(target)
        return Outcome(job, result, target, taken, False)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(job: Job, work: Path, limits: Limits) -> str:
    """Runs the compiling process; returns one sentence if it did not get to its result."""
    # Flags of this machine's own compiler would change the result, which the key does not name.
    environ = {
        k: v for k, v in os.environ.items() if not k.startswith("JAX_") and k != "LIBTPU_INIT_ARGS"
    }
    root = str(Path(unimed_jax.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, environ.get("PYTHONPATH"))))
    environ |= {**environment(job.topology), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "unimed_jax.plan.child", str(work)]
    with open(work / "said.txt", "wb") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            env=environ,
            start_new_session=True,
        )
    ended = ""
    try:
        end = time.monotonic() + limits.seconds
        while process.poll() is None and not ended:
            time.sleep(WATCH_SECONDS)
            if time.monotonic() > end:
                ended = (
                    f"was ended after {_time(limits.seconds)}; raise --minutes={limits.seconds / 60:g}"
                )
            elif _resident(process.pid) > limits.memory:
                ended = (
                    f"took more than {limits.memory / 2**30:.1f} GiB of this machine's memory and was "
                    "ended; raise --memory, or plan on a larger machine"
                )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
    if ended:
        return f"compiling {job.program} for {job.topology.text} {ended}."
    if (work / RESULT).is_file():
        return ""
    return _death(job, work, process.returncode, (work / "said.txt").read_text(errors="replace"))


def _death(job: Job, work: Path, status: int, said: str) -> str:
    """Says in one sentence how a compiling process ended that left no result."""
    what = f"compiling {job.program} for {job.topology.text}"
    if status == -signal.SIGKILL:
        return (
            f"{what} was killed, as the system does when memory runs out; free some, or plan on a "
            "larger machine."
        )
    if re.search("bad_alloc|MemoryError|[Cc]annot allocate memory|[Oo]ut of memory", said):
        return f"{what} ran out of this machine's memory; free some, or plan on a larger machine."
    if re.search("No space left on device|Disk quota exceeded", said):
        return f"{what} found no space left in {work.parent}; free some, or give another --cache=DIR."
    if re.search("already in use|libtpu_lockfile|multi-process lock", said):
        return f"{what} found libtpu held by another process; end that one, or wait for it."
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = (lines or ["it said nothing"])[-1][:300].rstrip(".")
    return f"{what} ended with status {status} ({reason}); report it with the config."


def _resident(pid: int) -> float:
    """Returns the bytes of memory that a process holds; 0 where the system does not tell."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return float(found[1]) * 1024 if found else 0.0


def _kept(job: Job, cache: Path) -> Outcome | None:
    """Returns what was kept of an earlier compilation; None if there is none, or it is damaged."""
    folder = cache / job.key
    try:
        result = read_json(folder / RESULT)
        checksum = result.pop("checksum")
    except (UserError, AttributeError, KeyError, TypeError):
        return None
    if checksum != _checksum(folder, result):
        return None
    return Outcome(job, result, folder, result["taken"], True)


def _checksum(folder: Path, result: dict[str, Any]) -> str:
    """Computes a checksum of a result and of the compiled program beside it."""
    found = hashlib.sha256(json.dumps(result, sort_keys=True).encode())
    with contextlib.suppress(FileNotFoundError):
        found.update((folder / PROGRAM).read_bytes())
    return found.hexdigest()[:16]


def _remove_leftovers(cache: Path) -> None:
    """Removes folders of compilations that were killed, once none can still be at work in them."""
    for folder in cache.glob(f"{WORK}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > LONGEST:
                shutil.rmtree(folder, ignore_errors=True)


def _earlier(cache: Path) -> dict[str, float]:
    """Reads how long earlier compilations took, by the name of their job."""
    try:
        found = read_json(cache / "seconds.json")
        return {str(name): float(value) for name, value in found.items()}
    except (UserError, AttributeError, TypeError, ValueError):
        return {}


def _estimate(job: Job, seconds: dict[str, float]) -> float | None:
    """Estimates how long a job takes: as it did before, else as others of its program did."""
    if job.name in seconds:
        return seconds[job.name]
    alike = [value for name, value in seconds.items() if name.endswith(f" {job.program}")]
    return sum(alike) / len(alike) if alike else None


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: what is compiled cannot be kept there ({error.strerror}); give another "
            "--cache=DIR."
        ) from error
