"""Measures losses and metrics on held-out data while training.

It does so for the entries with `every` above 0.

The loss of an entry is that of its answers as in training, summed over fixed batches in the shape of
training rows, so that one more program is compiled, and the training step is not compiled again.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from unimed_jax.config import Config
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError, nearest
from unimed_jax.evaluate.answers import Answered
from unimed_jax.evaluate.metrics import NotComputed
from unimed_jax.evaluate.records import records_of
from unimed_jax.evaluate.run import quick_scores
from unimed_jax.evaluate.tasks import Unit, open_sets, units_of
from unimed_jax.model import sharding
from unimed_jax.model.parameters import with_parameters
from unimed_jax.train.held_out import HeldOut
from unimed_jax.train.loss import task_losses
from unimed_jax.train.optimizer import Leaves
from unimed_jax.train.program import Program
from unimed_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Measured:
    """Holds one value of a unit (a task of a data set on a split)."""

    metric: str  # "loss", or the name of a metric
    unit: Unit
    value: float

    @property
    def name(self) -> str:
        """Names the value as config.train.best does."""
        return f"{self.metric}/{self.unit.name}"

    @property
    def logged(self) -> str:
        """Names the value as the log does, next to the training curves."""
        return f"{self.unit.split}/{self.unit.source.id}/{self.unit.task}/{self.metric}"


class Validation:
    """Measures the units that run during training; their examples are laid out as rows once."""

    def __init__(self, config: Config, tokenizer: Tokenizer, program: Program):
        """Raises UserError for an entry that cannot be measured."""
        self._config, self._tokenizer, self._program = config, tokenizer, program
        # Metrics need generated answers, which take long: only those that an entry names are measured.
        every = [entry for entry in config.evaluate.entries if entry.every]
        named = {f"{entry.source}/{entry.split}/{entry.task}" for entry in every if entry.metrics}
        units = units_of(config, open_sets(config.held_out))[0] if every else []
        self.units = [unit for unit in units if unit.every]
        self._metrics = {
            unit.name: [metric.name for metric in unit.metrics] if unit.name in named else []
            for unit in self.units
        }
        self._check_computed()
        self._held_out = {unit.name: HeldOut(unit, config, tokenizer) for unit in self.units}
        self._check_best()
        mesh = program.mesh
        self._share = sharding.share_of_process(mesh, config.data.rows)

        def sums(leaves, frozen, batch):
            model = with_parameters(program.model, {**frozen, **leaves})
            losses, _ = task_losses(model, batch, config.loss, tokenizer.coordinate_start, None)
            return losses.tasks.sum(), losses.weight

        self._sums: Any = (
            jax.jit(sums) if mesh is None else jax.jit(sums, out_shardings=sharding.everywhere(mesh))
        )

    def due(self, done: int) -> bool:
        """Says whether some unit is measured after `done` steps."""
        return any(done % unit.every == 0 for unit in self.units)

    def measure(self, done: int, state: TrainState, frozen: Leaves) -> list[Measured]:
        """Measures the units whose turn it is after `done` steps; the same values on every process."""
        found = []
        for unit in self.units:
            if done % unit.every:
                continue
            found.append(Measured("loss", unit, self._loss(unit, state, frozen)))
            if metrics := self._metrics[unit.name]:
                model = with_parameters(self._program.model, {**frozen, **state.leaves})
                scores = quick_scores(model, self._config, self._tokenizer, [unit])
                found += [Measured(metric, unit, scores[f"{metric}/{unit.name}"]) for metric in metrics]
        return found

    def _loss(self, unit: Unit, state: TrainState, frozen: Leaves) -> float:
        # All batches are started before any is waited for.
        own = self._held_out[unit.name].batches(self._share.rows)
        batches = (sharding.on_devices(b, self._program.mesh, self._share) for b in own)
        sums = jax.device_get([self._sums(state.leaves, frozen, batch) for batch in batches])
        total, weight = np.sum(np.asarray(sums, np.float64), axis=0)
        return float(total / weight)

    def compiled(self) -> int:
        """Counts the programs that were compiled for the losses."""
        return self._sums._cache_size()

    def _check_computed(self) -> None:
        """Raises UserError for a metric that lacks something here, by scoring two references."""
        for unit in self.units:
            if not self._metrics[unit.name]:
                continue
            two = dataclasses.replace(unit, examples=unit.examples[:2])
            said = {unit.id_of(e): Answered(e.answer, [100, 100]) for e in two.examples}
            records = records_of(two, said, {})
            for metric in unit.metrics:
                try:
                    metric(records)
                except NotComputed as missing:
                    raise UserError(
                        f"config.evaluate.entries: {metric.name!r} of {unit.name} is {missing}; leave "
                        "it out, or set `every` to 0, and it is tried after training alone."
                    ) from missing

    def _check_best(self) -> None:
        known = [
            f"{metric}/{name}"
            for name, metrics in self._metrics.items()
            for metric in ("loss", *metrics)
        ]
        best = self._config.train.best
        if best and best not in known:
            raise UserError(
                f"config.train.best={best!r} is not measured during training{nearest(best, known)} "
                f"Choose from {', '.join(known)}, or name more metrics in its entry."
            )
