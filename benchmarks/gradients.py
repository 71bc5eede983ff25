"""Measures what each strategy of `config.train.gradients` costs a training step.

    python benchmarks/gradients.py --config=configs/brain_tiny.py --out=gradients.json

The same model, batch and optimizer under each strategy, in one process and in turn, so that other
load on the machine slows all alike. The batch has no padding, and its tasks are mixed. Figures are
medians over rounds (min .. max): processor time of a step (all threads), its ratio to that of `sum`
in the same round, and the temporary memory that the compiled step asks for.
"""

import argparse
import functools
import json
import time
from typing import Any

import harness
import jax
import numpy as np
from flax import nnx

from unimed_jax.model.parameters import parameters
from unimed_jax.model.unimed import UniMed
from unimed_jax.train.gradients import STRATEGIES
from unimed_jax.train.program import build
from unimed_jax.train.step import first_state
from unimed_jax.verbs.options import read_config

RATE = np.float32(1e-4)


class Side:
    """Holds a compiled step with a state of its own."""

    def __init__(self, file: str, strategy: str, batch: dict[str, np.ndarray]):
        config = read_config(file, [f"--config.train.gradients={strategy}"])
        program = build(config, None)
        model = config.model
        leaves = jax.jit(lambda: parameters(UniMed(model, nnx.Rngs(0))))()
        self.frozen = {path: leaves[path].astype(leaf.dtype) for path, leaf in program.frozen.items()}
        trained = {path: leaves[path] for path in program.state.leaves}
        self.state = first_state(trained, program.optimizer, strategy=STRATEGIES[strategy]())
        self.batch = batch
        self.step = program.step.lower(self.state, self.frozen, batch, RATE).compile()
        memory = self.step.memory_analysis()
        self.temporary = 0 if memory is None else memory.temp_size_in_bytes / 2**20

    def round(self, steps: int) -> float:
        """Returns the processor seconds of a step."""
        start = time.process_time()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.frozen, self.batch, RATE)
            metrics["loss"].block_until_ready()
        return (time.process_time() - start) / steps


def measure(file: str, steps: int, rounds: int) -> dict[str, Any]:
    """Times all strategies in turn, after rounds that do not count."""
    batch = harness.full_rows(read_config(file))
    sides = {name: Side(file, name, batch) for name in STRATEGIES}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    harness.warm({name: functools.partial(side.round, 1) for name, side in sides.items()})
    for _ in range(rounds):
        for name, side in sides.items():
            taken[name].append(side.round(steps))
    return {
        name: {
            "cpu_seconds": harness.spread(values),
            "x_sum": harness.ratio(values, taken["sum"]),
            "temporary_mib": sides[name].temporary,
        }
        for name, values in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/brain_tiny.py")
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=harness.output(), help="where the figures go as JSON")
    arguments = parser.parse_args()
    found = measure(arguments.config, arguments.steps, arguments.rounds)
    rows = [
        [name, harness.figure(side["cpu_seconds"]), harness.figure(side["x_sum"]),
         f"{side['temporary_mib']:.0f}"]
        for name, side in found.items()
    ]  # fmt: skip
    print(harness.table(["strategy", "CPU s a step", "x sum", "temporary MiB"], rows))
    if arguments.out:
        described = {"machine": harness.machine(2), "strategies": found}
        arguments.out.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    harness.run(main)
