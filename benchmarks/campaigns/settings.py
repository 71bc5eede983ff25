"""Tries hostile values on every setting, first in the checker and then in short runs.

It shows which values are refused, in which sentence, and what a run does with the others.

Run it as `python benchmarks/campaign.py settings`; `--help` lists its options. The values are tried
twice: by the checker of settings in this process, all of them, and a sample of the accepted ones in
runs of two steps, each in a process of its own that may compute for 60 seconds and hold 2 GB.
"""

import argparse
import copy
import dataclasses
import fnmatch
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from unimed_jax.bounds import AtLeast, AtMost, Between, ZeroOr, shown
from unimed_jax.config import Config
from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict

SECONDS, GIB = 60, 2.0  # limits of one run: processor time and memory
# seconds after which a run is ended in any case, as it may wait without computing
WAIT = 300

# --------------------------------------------------------------------------------------------------
# Fields
# --------------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """Describes one setting, with the type that it is declared with."""

    path: tuple[str | int, ...]
    hint: Any

    @property
    def name(self) -> str:
        """Returns the dotted name, as sentences write it: data.sources[0].weight."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)[1:]


# What the entry of a tuple must have besides the field that is tried.
NEEDED = {
    "train.rules": {"match": "*", "train": True},
    "evaluate.entries": {"source": "brain", "task": "vqa", "split": "val"},
}
# What must be set so that a field is read at all, by pattern of its name.
CONTEXT = {
    "router_fit.*": {"job": "router", "router_fit": {"key": "modality"}},
    "model.moe.*": {"model": {"moe": {"experts": 4}, "lora": {"rank": 0}}},
    "model.moe.min_capacity": {"model": {"moe": {"experts": 4, "capacity_factor": 2.0}}},
    "model.lora.*": {"model": {"lora": {"rank": 4}}},
    "mesh.*": {"mesh": {"auto": False}},
    "data.reencode.quality": {"data": {"reencode": {"format": "jpeg"}}},
    "evaluate.top_p": {"evaluate": {"temperature": 1.0}},
    "model.connector.top_k": {"model": {"connector": {"router": "sparse"}}},
    "model.decoder.local_rope_theta": {"model": {"decoder": {"windows": (8,)}}},
    "train.best*": {
        "train": {"best": "accuracy/brain/val/vqa"},
        "evaluate": {"entries": ({"source": "brain", "task": "vqa", "split": "val", "every": 1},)},
    },
    "train.patience": {
        "train": {"best": "accuracy/brain/val/vqa"},
        "evaluate": {"entries": ({"source": "brain", "task": "vqa", "split": "val", "every": 1},)},
    },
}


def fields(kind: type = Config, path: tuple[str | int, ...] = ()) -> Iterator[Field]:
    """Yields every field of the settings, groups of fields too.

    Of a tuple of groups only the fields of its first entry are yielded.
    """
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        here = (*path, name)
        group, many = _group(hint)
        yield Field(here, hint)
        if group is not None:
            yield from fields(group, (*here, 0) if many else here)


def _group(hint: Any) -> tuple[type | None, bool]:
    """Returns the dataclass that a type holds, if it holds one, and whether it is a tuple of them."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _group(parts[0])
    if origin in (typing.Union, types.UnionType):
        return next((found for found in map(_group, parts) if found[0]), (None, False))
    if origin is tuple:
        return _group(parts[0])[0], True
    return (hint, False) if dataclasses.is_dataclass(hint) else (None, False)


def settings_with(field: Field, value: Any) -> dict:
    """Makes settings that hold this value and the values without which it would not be read.

    All others are at their default.
    """
    settings: dict = {}
    for pattern, extra in CONTEXT.items():
        if fnmatch.fnmatchcase(field.name, pattern):
            _merge(settings, extra)
    place: Any = settings
    for part, after in zip(field.path, (*field.path[1:], None), strict=True):
        if after is None:
            place[part] = value
        elif isinstance(after, int):
            name = field.name.partition("[")[0]
            place[part] = [dict(NEEDED.get(name, {}))]
            place = place[part]
        else:
            place = place[part] if isinstance(part, int) else place.setdefault(part, {})
    return settings


def _merge(into: dict, extra: Mapping) -> None:
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (
    *(
        0,
        1,
        2,
        3,
        7,
        -1,
        -2,
        10**5,
        10**9,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
        2**63,
        2**64,
        10**23,
        10**400,
    ),
    *(0.0, 0.5, 1.0, 1.5, 2.0, -0.5, -1e-3, 1e-40, 1e-30, 1e-9, 0.99999999, 1e9, 1e30, 1e38, 1e300),
    *(math.inf, -math.inf, math.nan),
)
TEXTS: tuple[Any, ...] = (
    *(
        "",
        " ",
        "x",
        "1",
        "1e-3",
        "inf",
        "nan",
        "None",
        "true",
        "a\0b",
        "a\nb",
        "a/b",
        "/a",
        "../x",
        ".",
        "\u200b",
    ),
    *("\udce9", "\x1b[31m", "x" * 300, "x" * 70000),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, b"x", 1j, print, object(), {1}, range(3)),
    *(
        (),
        [],
        ((),),
        (None,),
        ("x", "x"),
        (1, 1),
        (0.0, 0.0, 0.0),
        (1.0,) * 4,
        (math.nan,) * 3,
        (True, False),
    ),
    *(
        {},
        {"x": 1},
        {"x": {"x": -1}},
        {"x": {"x": math.inf}},
        {"x": ()},
        {1: 2},
        {"": ""},
        {"\udce9": "x"},
    ),
    *([["seed", ""]], [{"match": "*", "train": True}]),
    [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]],
)


def hostile(field: Field) -> Iterator[Any]:
    """Yields the values to try on a field.

    They are values of every type, values inside the field's own tuple or dict, and its bounds.
    """
    yield from (*NUMBERS, *TEXTS, *OTHERS)
    yield from _choices(field.hint)
    for bound in _bounds(field.hint):
        for edge in _edges(bound):
            yield edge
            yield edge + 1
            yield edge - 1
    default = _default(field)
    if isinstance(default, str):
        yield default
    if isinstance(default, tuple) and all(isinstance(entry, int | float | str) for entry in default):
        for value in (*NUMBERS, *TEXTS, None, True):
            yield (value, *default[1:])
    if isinstance(default, Mapping):
        for value in (*NUMBERS, *TEXTS, None, True):
            yield {"x": value}
            yield {"x": {"x": value}}


def _default(field: Field) -> Any:
    value: Any = Config()
    for part in field.path:
        if isinstance(part, int) or not dataclasses.is_dataclass(value):
            return None
        value = getattr(value, part)
    return value


def _bounds(hint: Any) -> Iterator[Any]:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        yield from parts[1:]
        yield from _bounds(parts[0])
    elif origin in (typing.Union, types.UnionType):
        for part in parts:
            yield from _bounds(part)


def _choices(hint: Any) -> Iterator[Any]:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        yield from parts
    elif origin is tuple:
        for choice in _choices(parts[0]):
            yield (choice,)
    elif origin in (typing.Annotated, typing.Union, types.UnionType):
        for part in parts[:1] if origin is typing.Annotated else parts:
            yield from _choices(part)


def _edges(bound: Any) -> tuple:
    match bound:
        case AtLeast(edge) | AtMost(edge):
            return (edge,)
        case Between(low, high) | ZeroOr(low, high):
            return (low, high)
    return ()


class Tried(NamedTuple):
    """Holds one value of one field, and what the checker made of it."""

    field: Field
    value: Any
    config: Config | None  # if it was accepted
    sentence: str  # if it was refused


def trials() -> Iterator[Tried]:
    """Yields every field with every value, after the checker.

    Whatever the checker raises besides UserError is passed on.
    """
    for field in fields():
        for value in hostile(field):
            try:
                yield Tried(field, value, from_config_dict(settings_with(field, value)), "")
            except UserError as error:
                yield Tried(field, value, None, str(error))


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
        _merge(settings, settings_with(one.field, one.value))
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
