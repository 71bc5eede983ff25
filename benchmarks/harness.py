"""Runs the sides of a comparison in turn, each in its own process, and tabulates their figures.

A side is a script run with `--side=NAME`; it reads one JSON request a line and answers with one
(`serve`). The driver starts all sides and asks them in turn, so that other load on the machine
slows all alike.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# A checkout is enough: nothing has to be installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from unimed_jax.errors import UserError
from unimed_jax.paths import check_output_file


class Failed(Exception):
    """Reports that a side could not do what it was asked."""


def run(main: Callable[[], None]) -> None:
    """Runs a script's main; a failure ends it with one sentence, as does a mistake of its user."""
    try:
        main()
    except Failed as error:
        sys.exit(str(error))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)


def output(option: str = "--out") -> Callable[[str], Path]:
    """Makes the type of an argument that names a file to write, which is checked before any work."""

    def read(given: str) -> Path:
        file = check_output_file(given, option)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    return read


def at_least(least: int, multiple: int = 1) -> Callable[[str], int]:
    """Makes the type of an argument that is a whole number, large enough and a multiple of one."""

    def read(given: str) -> int:
        number = int(given)
        if number < least or number % multiple:
            of = f" and a multiple of {multiple}" if multiple > 1 else ""
            raise argparse.ArgumentTypeError(f"{number} is not at least {least}{of}")
        return number

    return read


class Side:
    """Holds a running side."""

    def __init__(self, name: str, script: str, arguments: Sequence[str]):
        self.name = name
        command = [sys.executable, script, f"--side={name}", *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, operation: str, **arguments) -> Any:
        """Returns what the side's operation returns; raises Failed if it failed or the side ended."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": operation, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Failed(
                f"{self.name} ended with exit code {self._process.wait()}; what it said stands above."
            )
        reply = json.loads(answer)
        if "failed" in reply:
            raise Failed(f"{self.name}: {reply['failed']}")
        return reply["result"]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


BOS, PAD = 1, 0  # ids in random batches


def full_rows(config: Any, seed: int = 0) -> dict[str, Any]:
    """Makes a batch without padding: a question for each image slot, all of the same length.

    The arrays are those of `data.layout.training_batch`: BOS, visual tokens, words, answer.
    """
    import numpy as np

    from unimed_jax.config import TASKS, VISUAL_TASKS

    rng, data, model = np.random.default_rng(seed), config.data, config.model
    rows, images, visual = data.rows, data.row_images, model.tokens_per_image
    length, answer = data.row_tokens // images, data.row_answers // images
    side = model.vision.image_size
    tokens = rng.integers(3, model.decoder.vocab, (rows, images, length))
    place = np.tile(np.arange(length), (rows, images, 1))  # [B, M, L]
    seen = (place >= 1) & (place <= visual)
    slot = np.arange(images)[None, :, None]
    ids = np.where(seen, PAD, np.where(place == 0, BOS, tokens))
    number = np.broadcast_to(slot + 1, ids.shape)
    asked = rng.integers(0, len(VISUAL_TASKS), (rows, images))
    target = length - answer + np.arange(answer)  # positions within the example
    index = np.broadcast_to(slot * length + target - 1, (rows, images, answer))
    arrays = {
        "image_tasks": asked,
        "tokens": ids,
        "visual": np.where(seen, slot * visual + place - 1, -1),
        "segments": number,
        "prefixes": number,
        "positions": place,
        "target_index": index,
        "targets": tokens[:, :, target],
        "target_tasks": np.broadcast_to(asked[..., None], index.shape),
    }
    assert TASKS[: len(VISUAL_TASKS)] == VISUAL_TASKS  # one numbering serves images and answers
    return {
        "images": rng.integers(0, 256, (rows, images, side, side, 3), np.uint8),
        **{name: x.reshape(rows, -1).astype(np.int32) for name, x in arrays.items()},
        "weights": np.ones((rows, images * answer), np.float32),
    }


DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16")


def pin(threads: int, device: str = "cpu") -> None:
    """Holds this process to a device and some cores; call it before importing torch or jax."""
    # XLA takes as many threads as it may run on, the libraries under torch as many as they are given.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    os.environ |= {"JAX_PLATFORMS": device, "HF_HUB_OFFLINE": "1"}
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the sides share the card


def serve(operations: dict[str, Callable[..., Any]]) -> None:
    """Serves a side's requests; each names an operation and its arguments."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": operations[request.pop("do")](**request)}
        except Exception as error:
            traceback.print_exc()
            reply = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(reply) + "\n")


def report(
    parts: dict[str, Callable[..., None]], scales: dict[str, Any], about: Callable[[], dict[str, Any]]
) -> None:
    """Runs one part of accelerator.py in this process: a JSON line about the machine, then one a row.

    The part is called with a scale, what earlier parts have measured, and what emits a row.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=parts)
    parser.add_argument("--size", choices=scales, required=True)
    parser.add_argument("--known", type=json.loads, default={})
    known = parser.parse_args()
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for a row

    def say(line: dict[str, Any]) -> None:
        lines.write(json.dumps(line) + "\n")

    try:
        say(about())
        parts[known.part](
            scales[known.size], known.known, lambda row, **values: say({"row": row, **values})
        )
    except Exception as error:
        traceback.print_exc()
        say({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def times(run: Callable[[], Any]) -> tuple[float, float]:
    """Returns seconds of the clock and of the processor, all threads, which other work disturbs less."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def peak_memory(device: str = "cpu") -> float:
    """Returns the GiB that torch or jax has held of the card at most, or this process of memory.

    ru_maxrss would include the driver's memory, which a child inherits.
    """
    if device == "cuda":
        if "torch" in sys.modules:
            return sys.modules["torch"].cuda.max_memory_allocated() / 2**30
        return sys.modules["jax"].devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def warm(sides: Mapping[Any, Callable[[], float]], most: int = 5) -> None:
    """Runs rounds of every side that do not count, until none is much faster than the one before.

    A round runs every shape of its side and returns its seconds. The first ones compile, fill caches
    and grow allocators; a side is warm once a round took 0.8 of the one before, or after `most`.
    """
    before = {name: run() for name, run in sides.items()}
    for _ in range(most - 1):
        now = {name: sides[name]() for name in before}
        before = {name: now[name] for name, seconds in before.items() if now[name] < 0.8 * seconds}
        if not before:
            return


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


LEAST = 3  # rounds without which there is no ratio


def ratio(reference: Sequence[float], own: Sequence[float]) -> dict[str, float] | None:
    """Divides round by round; None if there are too few rounds to say anything."""
    if len(own) < LEAST:
        return None
    return spread([a / b for a, b in zip(reference, own, strict=True)])


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Describes the machine that a figure was measured on."""
    cpu = next(
        (s.split(":")[1].strip() for s in _lines("/proc/cpuinfo") if s.startswith("model name")),
        "unknown",
    )
    packages = {}
    for name in ("jax", "jaxlib", "torch", "transformers", "peft"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    card = {} if device == "cpu" else {"card": _card()}
    return {
        **card,
        "cpu": f"{cpu} ({platform.machine()})",
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_average": os.getloadavg()[0],  # load from other processes at the start
        "python": platform.python_version(),
        **packages,
    }


def _card() -> str:
    ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays rows of text out as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def figure(values: dict[str, float] | None, digits: int = 2) -> str:
    if values is None:
        return f"needs {LEAST} rounds"
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} .. {values['max']:.{digits}f})"


def need(*packages: str, install: str = "-e '.[parity]'") -> None:
    """Raises Failed if a package that the comparison needs is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise Failed(
                f"this needs the package {name}, which is not installed; pip install {install}."
            )
