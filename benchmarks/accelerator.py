"""Measures how near full-size Uni-Med comes to the limits of one accelerator, within eight minutes.

    eval "$(launch/xla_flags.sh gpu)"
    python benchmarks/accelerator.py --out=accelerator.jsonl
    python benchmarks/accelerator.py --out=toy.jsonl --size=toy

The second command runs the same rows at toy size, on a CPU within a minute or two.

Rows are grouped into parts, those that are worth most first. Each part runs in a process of its own with
a time limit of its own, so that one that hangs, or that runs out of memory, costs its own rows alone.
A row is written as soon as it is measured: a JSON line to --out, and the table so far to the same name
with the ending .md. A row that was not measured says why. A part that would not end within --budget is
left out.

What the rows are, and what their limits mean, is said by accelerator_rows.py, accelerator_decode.py and
accelerator_kernels.py (ours; they need jax, flax, optax and numpy) and by accelerator_torch.py (the
peers; torch, and for its rows transformers and peft).
Weights and batches are random, made on the device.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).parent
BUDGET = 480  # seconds
START = 12  # of which a process takes so many to start, imports and driver
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """Names rows that one process measures, one after the other."""

    name: str  # of the function in `script`, which takes the rest of the arguments
    rows: tuple[str, ...]
    estimate: float  # seconds on an H100, with starting and compiling
    limit: float  # after which it is ended
    script: str = "accelerator_rows.py"


TORCH = "accelerator_torch.py"
BATCHES = (1, 8, 32)
PARTS = (
    Part("limits", ("copy", "product of matrices"), 25, 60),
    Part("train", ("train",), 75, 140),
    Part("decode", tuple(f"decode, batch {rows}" for rows in BATCHES), 90, 150),
    Part("kernels", ("attention", "experts"), 50, 90),
    Part("torch_train", ("torch train, eager", "torch train, compiled"), 110, 150, TORCH),
    Part("torch_decode", tuple(f"torch decode, batch {rows}" for rows in BATCHES), 80, 120, TORCH),
    Part("train_full_remat", ("train, full remat",), 50, 90),
    Part("train_long", ("train, rows of 1,024",), 50, 90),
    Part("train_plain_attention", ("train, plain attention",), 50, 90),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=harness.output(),
        required=True,
        help="file of JSON lines; the table is written next to it",
    )
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds, for all parts together")
    parser.add_argument("--only", nargs="+", default=(), help="names of parts to run")
    arguments = parser.parse_args()
    names = [part.name for part in PARTS]
    if unknown := [name for name in arguments.only if name not in names]:
        parser.error(f"--only={unknown[0]} is no part; choose from {', '.join(names)}.")
    parts = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    results = measure(parts, arguments.size, arguments.budget, arguments.out)
    print(arguments.out.with_suffix(".md").read_text())
    sys.exit(any("missing" in result for result in results))


def measure(parts: Sequence[Part], size: str, budget: float, out: Path) -> list[Values]:
    """Runs the parts within `budget` seconds and writes every row at once; returns the rows."""
    print(schedule(parts, budget), flush=True)
    report, begun = Report(out), time.monotonic()
    for part in parts:
        left = budget - (time.monotonic() - begun)
        if size == "full" and part.estimate > left:
            reason = f"its part takes about {part.estimate:.0f} s, and {left:.0f} s are left"
        else:
            reason = run(part, size, report, min(part.limit, left))
        for row in part.rows:
            if row not in report.rows:
                report.add({"row": row, "missing": reason})
    return list(report.rows.values())


def schedule(parts: Sequence[Part], budget: float) -> str:
    """Says what will run and how long it takes on an H100."""
    total = sum(part.estimate for part in parts)
    each = ", ".join(f"{part.name} {part.estimate:.0f}" for part in parts)
    return f"planned: {min(total, budget):.0f} s of at most {budget:.0f}, in seconds on an H100: {each}"


class Report:
    """Keeps the rows, and writes each at once to a file of JSON lines and a table."""

    def __init__(self, out: Path):
        self.out, self.about, self.rows = out, Values(), dict[str, Values]()
        out.write_text("")

    def add(self, line: Values) -> None:
        """Takes a row, or what is said about the machine."""
        if "row" in line:
            self.rows[line["row"]] = line
        else:  # every process says it; those of torch have another version to say
            line = {key: value for key, value in line.items() if key not in self.about}
            if not line:
                return
            self.about |= line
        text = json.dumps(line)
        with self.out.open("a") as lines:
            lines.write(text + "\n")
        self.out.with_suffix(".md").write_text(table(self.about, self.rows.values()))
        print(text, flush=True)


def run(part: Part, size: str, report: Report, limit: float) -> str:
    """Runs a part in a process of its own; returns why rows are missing, if any are."""
    command = [sys.executable, str(HERE / part.script), part.name, f"--size={size}"]
    known = {name: row for name, row in report.rows.items() if "missing" not in row}
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93", **os.environ}
    if "XLA_CLIENT_MEM_FRACTION" in os.environ:  # its new name, which jax refuses beside the old one
        environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION")
    process = subprocess.Popen(
        [*command, f"--known={json.dumps(known)}"],
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout
    end, rest, failed = time.monotonic() + limit, b"", ""
    try:
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while (left := end - time.monotonic()) > 0:
                if not ready.select(left):
                    break
                read = os.read(process.stdout.fileno(), 1 << 16)
                if not read:
                    status = process.wait()
                    return failed or f"its process ended with status {status}; what it said stands above"
                *lines, rest = (rest + read).split(b"\n")
                for line in map(_parsed, lines):
                    failed = line.get("failed", failed)
                    if line and "failed" not in line:
                        report.add(line)
        return f"its process was ended after {limit:.0f} s"
    finally:  # also where someone stops this one
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _parsed(line: bytes) -> Values:
    """Reads a line of a part; what a library printed in place of a row is passed on and left out."""
    try:
        return dict(json.loads(line))
    except (TypeError, ValueError):
        print(line.decode(errors="replace"), file=sys.stderr)
        return {}


def table(about: Values, rows: Any) -> str:
    """Writes Markdown: what was measured on, then a line for each row."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += ["| row | measured |", "| --- | --- |"]
    for row in rows:
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key != "row"
        )
        lines.append(f"| {row['row']} | {', '.join(shown)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    harness.run(main)
