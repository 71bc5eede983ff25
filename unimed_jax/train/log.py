"""Writes the log of a run.

It consists of one JSON line per logged step, TensorBoard, a progress bar and, if asked for, W&B.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from unimed_jax.config import TASKS, VISUAL_TASKS, Config, config_hash, to_dict
from unimed_jax.errors import UserError
from unimed_jax.files import written_whole
from unimed_jax.parsing import parse_json

DAMAGED = "log.damaged"  # file in the run's folder
NAMED = 5  # damaged lines that a message names


class Log:
    """Writes scalars by step, from step `first` on.

    The log keeps the lines of the steps before (see `continue_lines`).
    """

    def __init__(self, folder: Path, config: Config, first: int, bar_to: TextIO | None = None):
        file = folder / "log.jsonl"
        continue_lines(file, first)
        self._lines = file.open("a", buffering=1, encoding="utf-8")
        (folder / "tensorboard").mkdir(exist_ok=True)
        # Not its SummaryWriter, whose thread dies on a full disk, after which training would wait
        # for it forever.
        self._board = EventsWriter(str(folder / "tensorboard" / "events"), f".{os.getpid()}")
        # hides later steps of earlier files
        self._event(first, session_log=SessionLog(status=SessionLog.START))
        self._wandb: Any = None
        if config.train.wandb:
            self._wandb = _wandb_run(folder, config)
        steps = config.train.steps
        self._bar = tqdm(
            total=steps,
            initial=first,
            unit="step",
            file=bar_to or sys.stderr,
            mininterval=1.0,
            ncols=110,
        )

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Writes the values of one step, named `group/name`.

        None stands for what the step did not have.
        """
        self._lines.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        present = {name: value for name, value in values.items() if value is not None}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in present.items()]
        self._event(step, summary=Summary(value=scalars))
        if self._wandb is not None:
            self._wandb.log(present, step=step)

    def _event(self, step: int, **content) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **content))

    def progress(self, step: int, loss: float, examples_per_second: float) -> None:
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {examples_per_second:.0f} examples/s", refresh=False
        )
        self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """Puts everything on disk, because a run that continues must find all steps before it."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._board.flush()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # closes the others where one fails
            if self._wandb is not None:
                stack.callback(self._wandb.finish)
            stack.callback(self._board.close)
            stack.callback(self._lines.close)
            stack.callback(self._bar.close)


class Silence:
    """Takes what a process reports that leaves logging to another, and writes nothing."""

    def write(self, step: int, values: dict[str, float | None]) -> None: ...

    def progress(self, step: int, loss: float, examples_per_second: float) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


# ---- the log of the run so far ---------------------------------------------------------------------
def continue_lines(file: Path, first: int) -> None:
    """Keeps the log's lines of steps before `first`, from which the run goes on.

    It reports which of them are damaged.

    Lines of later steps, which a killed run wrote, are removed, and so is an incomplete last line. A
    damaged line (not JSON, not UTF-8, without a step, or of a later step between earlier ones) is
    moved to log.damaged; the good lines after it stay.
    """
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return
    end = 0  # bytes up to the last line of an earlier step
    odd: list[tuple[int, int, bytes, bool]] = []  # number, place, content, whether it can be read
    with file.open("rb") as lines:
        place = 0
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            step = _step(line)
            if step is None or step >= first:
                odd.append((number, place, line, step is not None))
            else:
                end = place + len(line)
            place += len(line)
    damaged = [
        (number, place, line) for number, place, line, readable in odd if place < end or not readable
    ]
    if damaged:
        _set_aside(file, end, damaged)
    elif end < size:
        os.truncate(file, end)


def _step(line: bytes) -> int | None:
    """Reads a line's step; None if it is not a line as `Log.write` makes them."""
    try:
        entry = parse_json(line, "log.jsonl")
    except UserError:
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if type(step) is int and step >= 0 else None


def _set_aside(file: Path, end: int, damaged: Sequence[tuple[int, int, bytes]]) -> None:
    """Moves damaged lines (number, place, content) out of the log, and cuts it at `end`."""
    kept = file.with_name(DAMAGED)
    with kept.open("ab") as aside:  # first, so that no kill loses them
        aside.writelines(line for _, _, line in damaged)
        aside.flush()
        os.fsync(aside.fileno())
    places = {place for _, place, _ in damaged}
    with written_whole(file) as again, file.open("rb") as lines, again.open("wb") as out:
        place = 0
        for line in lines:
            if place < end and place not in places:
                out.write(line)
            place += len(line)
    numbers = ", ".join(str(number) for number, _, _ in damaged[:NAMED]) + (
        ", ..." if len(damaged) > NAMED else ""
    )
    one = len(damaged) == 1
    print(
        f"unimed_jax: {file}: line{'' if one else 's'} {numbers} {'is' if one else 'are'} damaged "
        f"and kept in {kept}; the other lines stay.",
        file=sys.stderr,
    )


def _wandb_run(folder: Path, config: Config):
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "config.train.wandb needs the package wandb; pip install 'unimed-jax[wandb]'."
        ) from error
    identity = f"{folder.name}-{config_hash(config)}"
    return wandb.init(
        project="unimed_jax", id=identity, resume="allow", dir=str(folder), config=to_dict(config)
    )


def step_values(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Names the train step's metrics; a task or routing weight that the batch lacked is None."""
    values: dict[str, float | None] = {
        "train/loss": float(metrics["loss"]),
        "train/grad_norm": float(metrics["grad_norm"]),
    }
    for task, loss in zip(TASKS, np.asarray(metrics["task_loss"]).tolist(), strict=True):
        values[f"loss/{task}"] = loss if np.isfinite(loss) else None
    if "routing" in metrics:
        slots = np.asarray(metrics["slots"])
        for t, (task, row) in enumerate(
            zip(VISUAL_TASKS, np.asarray(metrics["routing"]).tolist(), strict=True)
        ):
            for expert, weight in enumerate(row):
                values[f"routing/{task}_{expert}"] = weight if slots[t] else None
    if "balance" in metrics:
        values["experts/balance"] = float(np.mean(metrics["balance"]))
        for expert, share in enumerate(np.mean(metrics["shares"], axis=0).tolist()):
            values[f"experts/share_{expert}"] = share
    return values


def peak_memory() -> float:
    """Returns the peak memory in GiB.

    It is the device's where that reports one, else the resident set of this process.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    kilo = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**30
