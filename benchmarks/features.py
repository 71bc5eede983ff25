"""Measures training from a frozen encoder's cached features beside training from images.

    python benchmarks/features.py --config=configs/brain_frozen.py --config.init="(('seed',''),)"

Both sides train the config's model in one process, in turn, so that other load on the machine slows both
alike; every shape of both has run before anything counts. Two figures for each, medians over rounds (min
.. max): seconds a step as the loop takes it (the batch is read, laid out and given to the step), by the
clock and of the processor. Random weights cost what trained ones do, so any `init` will do.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import harness
import jax
import numpy as np

from unimed_jax.config_file import load_config_file
from unimed_jax.model import sharding
from unimed_jax.train.flops import useful_flops
from unimed_jax.train.start import Start, prepare
from unimed_jax.verbs.options import with_overrides

SIDES = {"images": False, "features": True}
WARM_UP = 4  # steps: the first compiles, the next fill the pipeline's buffers


class Side:
    """Takes steps of one run."""

    def __init__(self, start: Start):
        self.start = start
        self._mesh = start.program.mesh
        self._share = sharding.share_of_process(self._mesh, start.config.data.rows)
        self._batches = start.pipeline.batches(0, self._share.rows)

    def steps(self, count: int) -> dict[str, float]:
        """Takes steps, and returns the seconds of each by the clock and of the processor."""
        begun = time.perf_counter(), time.process_time()
        start = self.start
        with sharding.inside(self._mesh):
            for _ in range(count):
                batch = sharding.on_devices(next(self._batches), self._mesh, self._share)
                start.state, metrics = start.program.step(
                    start.state, start.frozen, batch, np.float32(1e-4)
                )
        loss = float(jax.block_until_ready(metrics)["loss"])
        return {
            "seconds": (time.perf_counter() - begun[0]) / count,
            "processor": (time.process_time() - begun[1]) / count,
            "loss": loss,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/brain_frozen.py")
    parser.add_argument("--freeze", action="store_true", help="the encoder; pictures then do not vary")
    parser.add_argument("--steps", type=harness.at_least(1), default=30, help="of each side in a round")
    parser.add_argument("--rounds", type=harness.at_least(1), default=5)
    parser.add_argument("--out", type=harness.output(), help="file for the figures as JSON")
    known, overrides = parser.parse_known_args()
    settings = load_config_file(known.config)
    if known.freeze:
        settings.train.rules = (dict(match="vision/*", train=False), *settings.train.rules)
        settings.data.sources = tuple(
            {key: value for key, value in source.items() if key != "augment"}
            for source in settings.data.sources
        )
    with tempfile.TemporaryDirectory() as folder:
        sides, sizes = {}, {}
        for name, cached in SIDES.items():
            words = [*overrides, f"--config.train.cache_features={cached}"]
            config = with_overrides(settings, words)
            sides[name] = Side(prepare(config, Path(folder) / name))
            sides[name].steps(WARM_UP)
            sizes[name] = sum(useful_flops(config).values()) / 1e9
        rounds = {name: [] for name in sides}
        for _ in range(known.rounds):
            for name, side in sides.items():
                rounds[name].append(side.steps(known.steps))
    print("| side | s a step | processor s | x images (processor) | useful GFLOP |")
    print("| --- | --- | --- | --- | --- |")
    for name, found in rounds.items():
        images, own = ([each["processor"] for each in some] for some in (rounds["images"], found))
        faster = harness.figure(harness.ratio(images, own))
        columns = [shown([each[what] for each in found]) for what in ("seconds", "processor")]
        print(f"| {name} | {' | '.join(columns)} | {faster} | {sizes[name]:.1f} |")
    print("last losses", {name: f"{found[-1]['loss']:.4f}" for name, found in rounds.items()})
    if known.out:
        known.out.write_text(json.dumps({"rounds": rounds, "load": os.getloadavg()}, indent=1) + "\n")


def shown(values: list[float]) -> str:
    """Writes the median of some figures with the smallest and the largest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


if __name__ == "__main__":
    harness.run(main)
