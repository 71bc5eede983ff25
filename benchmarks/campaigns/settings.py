"""Tries hostile values on every setting, first in the checker and then in short runs.

It shows which values are refused, in which sentence, and what a run does with the others.

Run it as `python benchmarks/campaign.py settings`; `--help` lists its options. The values are tried
twice: by the checker of settings in this process, all of them, and a sample of the accepted ones in
runs of two steps, each in a process of its own that may compute for 60 seconds and hold 2 GB.
"""

import argparse
import fnmatch
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from campaigns.fuzz_settings import Tried, fields, merge, settings_with, trials

from unimed_jax.bounds import shown
from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict

SECONDS, GIB = 60, 2.0  # limits of one run: processor time and memory
# seconds after which a run is ended in any case, as it may wait without computing
WAIT = 300

# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

# Settings that say how much work there is: a run that is not finished in time does what it was
# asked for.
WORK = (
    "train.steps",
    "train.accumulation",
    "evaluate.bootstrap",
    "*max_new_tokens",
    "*depth",
    "router_fit.epochs",
)


class Outcome(NamedTuple):
    """Holds the outcome of one run."""

    kind: str  # "ran", "refused", "at work"; anything else is a finding
    text: str
    seconds: float  # processor time
    gib: float  # most memory that it held


def sampled(accepted: list[Tried], seed: int) -> Iterator[Tried]:
    """Yields accepted values endlessly, of one field after another in a random order."""
    rng = random.Random(seed)
    by_field: dict[str, list[Tried]] = {}
    for one in accepted:
        if not isinstance(one.value, str | bool | None) and one.value not in ((), {}, []):
            by_field.setdefault(one.field.name, []).append(one)
    for values in by_field.values():
        rng.shuffle(values)
    names = list(by_field)
    while by_field:
        rng.shuffle(names)
        for name in names:
            if by_field.get(name):
                yield by_field[name].pop()
            else:
                by_field.pop(name, None)


def attempt(one: Tried, folder: Path) -> Outcome:
    """Trains and scores the tests' smallest model with one value, in a process of its own.

    Training takes two steps.
    """
    begun, seconds, most = time.monotonic(), 0.0, 0.0
    said = folder / "said.txt"
    folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        os._exit(_run(one, folder, said))
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        most = max(most, _resident(child))
        seconds = max(seconds, _computed(child))
        if most > GIB or seconds > SECONDS or time.monotonic() - begun > WAIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            works = any(fnmatch.fnmatchcase(one.field.name, pattern) for pattern in WORK)
            kind = "memory" if most > GIB else "at work" if works else "time"
            return Outcome(kind, "", seconds, most)
        time.sleep(0.05)
    text = said.read_text() if said.is_file() else "error: the process died"
    kind, _, rest = text.partition(": ")
    return Outcome(kind, rest, seconds, most)


def _run(one: Tried, folder: Path, said: Path) -> int:
    """Trains and scores in the child process, and writes the outcome into `said`."""
    import jax
    from support.fake_brain import tiny_config

    from unimed_jax import memory
    from unimed_jax.analyze.chain import train_and_evaluate

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    # tiny programs, each compiled once and run twice
    jax.config.update("jax_disable_most_optimizations", True)
    memory.available_bytes = lambda: GIB * 2**30  # as on a machine with only that much memory
    try:
        settings = tiny_config(steps=2).to_dict()
        settings["evaluate"].update(splits=("val",), limit=2, batch=2, max_new_tokens=4, bootstrap=10)
        merge(settings, settings_with(one.field, one.value))
        train_and_evaluate(from_config_dict(settings), folder / "run")
        said.write_text("ran: ")
    except UserError as error:
        said.write_text(f"refused: {error}")
    except BaseException as error:  # any exception is a finding
        said.write_text(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return 0


def _computed(process: int) -> float:
    """Returns the processor seconds that a process has used."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _resident(process: int) -> float:
    """Returns the memory that a process holds, in GiB."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmRSS:")), 0.0)


def run(arguments: list[str]) -> None:
    """Prints a row for each group of settings and each finding, then totals."""
    options = argparse.ArgumentParser(prog="python benchmarks/campaign.py settings", description=__doc__)
    options.add_argument("--seconds", type=float, default=420.0, help="for the runs together; 0: none")
    options.add_argument("--seed", type=int, default=0, help="of the sample of accepted values")
    known = options.parse_args(arguments)

    begun, rows, accepted, longest = time.monotonic(), Counter[tuple[str, str]](), [], 0
    for one in trials():
        group = one.field.name.rpartition(".")[0].partition("[")[0] or "config"
        rows[group, "values"] += 1
        rows[group, "refused"] += one.config is None
        longest = max(longest, len(one.sentence))
        if one.config is not None:
            accepted.append(one)
    named = Counter(field.name.rpartition(".")[0].partition("[")[0] or "config" for field in fields())
    for group, count in named.items():
        values, refused = rows[group, "values"], rows[group, "refused"]
        print(
            f"{group:28} {count:3} fields {values:6} values {refused:6} refused "
            f"{values - refused:5} accepted"
        )
    values, refused = sum(v for (_, what), v in rows.items() if what == "values"), 0
    refused = sum(v for (_, what), v in rows.items() if what == "refused")
    print(
        f"checker: {named.total()} fields, {values} values, {refused} refused in a sentence of at "
        f"most {longest} characters, {values - refused} accepted; {time.monotonic() - begun:.1f} s"
    )
    if known.seconds:
        _runs(accepted, known.seconds, known.seed)


def _runs(accepted: list[Tried], seconds: float, seed: int) -> None:
    base = Path(tempfile.mkdtemp(prefix="unimed_jax_settings_"))
    _prepare(base)
    begun, kinds, slowest, most = time.monotonic(), Counter[str](), 0.0, 0.0
    fields_run = set()
    try:
        for number, one in enumerate(sampled(accepted, seed)):
            if time.monotonic() - begun > seconds:
                break
            outcome = attempt(one, base / str(number))
            shutil.rmtree(base / str(number), ignore_errors=True)
            kinds[outcome.kind] += 1
            fields_run.add(one.field.name)
            slowest, most = max(slowest, outcome.seconds), max(most, outcome.gib)
            what = f"{one.field.name}={shown(one.value)}: {outcome.kind} {outcome.text}"
            print(f"{what} ({outcome.seconds:.0f} s, {outcome.gib:.2f} GiB)", flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(
        f"runs, seed {seed}: {kinds.total()} values of {len(fields_run)} fields: {counted}; slowest "
        f"{slowest:.0f} s, most memory {most:.2f} GiB"
    )


def _prepare(base: Path) -> None:
    """Imports what the runs need, so that each of them starts as a copy of this process.

    JAX starts only in the copies.
    """
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # compiles tiny programs in half the time; an unknown flag ends a process
    if version("jaxlib").startswith("0.10."):
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(base / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    import support.fake_brain  # noqa: F401

    import unimed_jax.analyze.chain  # noqa: F401
