"""Measures what logging and saving cost of a training run's step time.

    python benchmarks/logging_and_saving.py --config=configs/brain_tiny.py --out=logging_and_saving.json

Each side is a call of `train` in a new folder. The sides are taken in turn, so that other load on the
machine slows all alike:

- `neither`: no step is logged and none saved;
- `logging`: every step is logged;
- `saving`: every tenth of the run's steps is saved, in the background as always.

Two figures for each, medians over rounds (min .. max), in ms a logged step or a save:

- *inside*: how long the loop waits in the calls that log and save;
- *more*: how much longer the same steps took than in the same round's `neither`. This has the work
  in the background too, and the machine's noise.

The shares are of the step time, at the intervals that the config sets (`train.log_every`,
`train.save_every`).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import jax

from unimed_jax.config import Config
from unimed_jax.config_file import load_config_file
from unimed_jax.data.datasets import open_sources
from unimed_jax.train import loop, start
from unimed_jax.verbs.options import with_overrides

SIDES = ("neither", "logging", "saving")
WARM_UP = 4  # steps: the first compiles, the next fill the pipeline's buffers


class Watch:
    """Notes when each step ends, and how long calls took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.inside = 0.0
        self.until_end = 0.0  # time in the calls until the last step

    def at_end(self, reached):
        """Notes the time; `reached` is asked once a step, after everything else except its save."""

        def asked(interruption) -> bool:
            self.ends.append(time.perf_counter())
            if len(self.ends) == WARM_UP:
                self.inside = 0.0
            self.until_end = self.inside
            return reached(interruption)

        return asked

    def timed(self, call):
        def timing(*arguments, **keywords):
            start = time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                self.inside += time.perf_counter() - start

        return timing


CALLS = {"logging": (loop.Log, ("write", "progress")), "saving": (start.Checkpoints, ("save", "check"))}


def run(side: str, settings: Any, steps: int) -> tuple[float, float]:
    """Returns the seconds from warm-up to the last step, and those spent inside the calls."""
    settings.train.steps = steps
    settings.train.log_every = 1 if side == "logging" else steps + 1
    settings.train.save_every = steps // 10 if side == "saving" else steps + 1
    watch = Watch()
    patched = [(loop.Interruption, "reached", watch.at_end)]
    if side in CALLS:
        owner, names = CALLS[side]
        patched += [(owner, name, watch.timed) for name in names]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    for owner, name, wrap in patched:
        setattr(owner, name, wrap(getattr(owner, name)))
    try:
        with tempfile.TemporaryDirectory() as folder:
            loop.train(with_overrides(settings, []), Path(folder))
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
    return watch.ends[-1] - watch.ends[WARM_UP - 1], watch.until_end


def measure(config: Config, settings: Any, steps: int, rounds: int) -> dict[str, Any]:
    counted = steps - WARM_UP
    # The last step's save, which every side makes, comes after its end.
    events = {
        "logging": counted,
        "saving": len([done for done in range(WARM_UP, steps) if done % (steps // 10) == 0]),
    }
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    inside: dict[str, list[float]] = {side: [] for side in SIDES}
    run("neither", settings, WARM_UP + 1)  # compiles
    for number in range(rounds):
        for side in SIDES if number % 2 else reversed(SIDES):
            taken, waited = run(side, settings, steps)
            seconds[side].append(taken)
            inside[side].append(waited)
    step_ms = harness.spread([1e3 * s / counted for s in seconds["neither"]])
    intervals = {"logging": config.train.log_every, "saving": config.train.save_every}
    result: dict[str, Any] = {"step_ms": step_ms, "steps": counted, "rounds": rounds}
    for side, n in events.items():
        more = [a - b for a, b in zip(seconds[side], seconds["neither"], strict=True)]
        figures = {
            "inside_ms": harness.spread([1e3 * s / n for s in inside[side]]),
            "more_ms": harness.spread([1e3 * s / n for s in more]),
            "every": intervals[side],
        }
        for name in ("inside", "more"):
            figures[f"{name}_share"] = (
                figures[f"{name}_ms"]["median"] / intervals[side] / step_ms["median"]
            )
        result[side] = figures
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/brain_tiny.py")
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args()
    if arguments.steps < 20:
        parser.error("--steps must be 20 or more.")
    settings = load_config_file(arguments.config)
    config = with_overrides(settings, [])
    datasets = open_sources(config.data)
    start.open_sources = lambda data: datasets  # built once
    with tempfile.TemporaryDirectory() as compiled:
        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        result = {"machine": harness.machine(len(jax.devices())), "config": config.name}
        result |= measure(config, settings, arguments.steps, arguments.rounds)
    print(json.dumps(result["machine"]))
    print(f"\nstep without logging and saving: {harness.figure(result['step_ms'])} ms\n")
    rows = [
        [
            side,
            harness.figure(result[side]["inside_ms"]),
            harness.figure(result[side]["more_ms"]),
            str(result[side]["every"]),
            f"{100 * result[side]['inside_share']:.2f} %",
            f"{100 * result[side]['more_share']:.2f} %",
        ]
        for side in SIDES[1:]
    ]
    print(
        harness.table(
            ["", "inside, ms each", "more, ms each", "every", "inside, share", "more, share"], rows
        )
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
