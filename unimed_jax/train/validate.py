"""Measures losses and metrics on held-out data while training.

It does so for the entries with `every` above 0.

The loss of an entry is that of its answers as in training, summed over fixed batches in the shape of
training rows, so that one more program is compiled, and the training step is not compiled again.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from unimed_jax.config import Config
from unimed_jax.data import images, layout, packing
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError, nearest
from unimed_jax.evaluate.run import quick_scores
from unimed_jax.evaluate.tasks import Unit, open_sets, units_of
from unimed_jax.model import sharding
from unimed_jax.model.parameters import with_parameters
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
        self._encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)
        # Metrics need generated answers, which take long: only those that an entry names are measured.
        every = [entry for entry in config.evaluate.entries if entry.every]
        self._metrics = {f"{entry.source}/{entry.split}/{entry.task}": entry.metrics for entry in every}
        units = units_of(config, open_sets(config.held_out))[0] if self._metrics else []
        self.units = [unit for unit in units if unit.every]
        self._rows = {unit.name: self._planned(unit) for unit in self.units}
        self._check_best()
        mesh = program.mesh
        self._share, self._shares = sharding.rows_of_process(mesh, config.data.rows)

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
        batches = (sharding.on_devices(b, self._program.mesh, self._shares) for b in self._batches(unit))
        sums = jax.device_get([self._sums(state.leaves, frozen, batch) for batch in batches])
        total, weight = np.sum(np.asarray(sums, np.float64), axis=0)
        return float(total / weight)

    def compiled(self) -> int:
        """Counts the programs that were compiled for the losses."""
        return self._sums._cache_size()

    def _planned(self, unit: Unit) -> list[list[int]]:
        """Plans rows of example numbers, as many as whole batches need; the last ones are empty."""
        data = self._config.data
        capacity = np.array((data.row_tokens, data.row_images, data.row_answers))
        sizes = []
        for example in unit.examples:
            question = self._encoder.training(example, 0)
            size = (question.tokens, len(example.images), question.answer)
            if (np.array(size) > capacity).any():
                raise UserError(
                    f"{unit.id_of(example)} needs rows of {size} tokens, images and answer tokens, "
                    "more than config.data.row_tokens, row_images and row_answers; raise them, or "
                    "leave its entry's `every` 0."
                )
            sizes.append(size)
        order = np.argsort(-(np.array(sizes) / np.maximum(capacity, 1)).max(axis=1), kind="stable")
        row_of = packing.first_fit(np.array(sizes), capacity, order)
        rows = [np.flatnonzero(row_of == row).tolist() for row in range(row_of.max() + 1)]
        return rows + [[]] * (-len(rows) % data.rows)

    def _batches(self, unit: Unit) -> Iterator[layout.Batch]:
        """Yields this process's rows of each batch."""
        data, model = self._config.data, self._config.model
        own = data.rows // self._shares
        sizes = (data.row_tokens, data.row_images, data.row_answers)
        shape = layout.RowShape(*sizes, model.tokens_per_image, model.vision.image_size)
        rows = self._rows[unit.name]
        for first in range(self._share * own, len(rows), data.rows):
            groups = [
                [self._loaded(unit, unit.examples[i]) for i in row] for row in rows[first : first + own]
            ]
            yield layout.training_batch(
                groups, shape, self._tokenizer.pad, str(self._config.loss.reduction)
            )

    def _loaded(self, unit: Unit, example: Example) -> layout.Group:
        fit, vision = self._config.data.fit, self._config.model.vision
        stored = (unit.source.data.image(key) for key in example.images)
        # Instruction 0, always: batches must not differ from one measurement to the next.
        question = self._encoder.training(example, 0)
        return layout.Group((question,), tuple(images.fit(image, fit, vision) for image in stored))

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
