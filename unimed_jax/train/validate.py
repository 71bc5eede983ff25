"""Measures losses and metrics on held-out data while training: the evaluation entries with `every` above 0.

The loss of an entry is that of its answers as in training, summed over fixed batches in the shape of training rows, so
that one more program is compiled, and the training step is not compiled again.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from unimed_jax.config import Config, EntryConfig
from unimed_jax.data import images, layout, packing
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError, nearest
from unimed_jax.model import sharding
from unimed_jax.model.parameters import with_parameters
from unimed_jax.train.loss import task_losses
from unimed_jax.train.program import Program


@dataclasses.dataclass(frozen=True)
class Measured:
    """One value of an entry."""

    metric: str  # "loss", or the name of a metric
    entry: EntryConfig
    value: float

    @property
    def name(self) -> str:
        """As config.train.best names it."""
        return f"{self.metric}/{self.entry.source}/{self.entry.split}/{self.entry.task}"

    @property
    def logged(self) -> str:
        """As the log names it, next to the training curves."""
        return f"{self.entry.split}/{self.entry.source}/{self.entry.task}/{self.metric}"


class Validation:
    """The entries that run during training, with their examples chosen and laid out as rows."""

    def __init__(self, config: Config, datasets: Sequence[Dataset], tokenizer: Tokenizer, program: Program):
        """`datasets` belong to `config.data.sources`. Raises UserError for an entry that cannot be measured."""
        self.entries = tuple(entry for entry in config.evaluate.entries if entry.every)
        self._config, self._tokenizer, self._program = config, tokenizer, program
        self._sets = _by_id(config, datasets) if self.entries else {}
        self._examples = {entry: _examples(entry, self._sets, config) for entry in self.entries}
        self._rows = {entry: self._planned(entry) for entry in self.entries}
        self._check_best()
        mesh = program.mesh
        self._share, self._shares = sharding.rows_of_process(mesh, config.data.rows)

        def sums(leaves, frozen, batch):
            model = with_parameters(program.model, {**frozen, **leaves})
            losses, _ = task_losses(model, batch, config.loss, tokenizer.coordinate_start, None)
            return losses.tasks.sum(), losses.weight

        self._sums: Any = jax.jit(sums) if mesh is None else jax.jit(sums, out_shardings=sharding.everywhere(mesh))

    def due(self, done: int) -> bool:
        """Whether some entry is measured after `done` steps."""
        return any(done % entry.every == 0 for entry in self.entries)

    def measure(self, done: int, state, frozen) -> list[Measured]:
        """The entries whose turn it is after `done` steps; the same values on every process."""
        found = []
        for entry in self.entries:
            if done % entry.every:
                continue
            # All batches are started before any is waited for.
            batches = (sharding.on_devices(b, self._program.mesh, self._shares) for b in self._batches(entry))
            sums = jax.device_get([self._sums(state.leaves, frozen, batch) for batch in batches])
            total, weight = np.sum(np.asarray(sums, np.float64), axis=0)
            found.append(Measured("loss", entry, float(total / weight)))
        return found

    def compiled(self) -> int:
        """How many programs the losses took."""
        return self._sums._cache_size()

    def _planned(self, entry: EntryConfig) -> list[list[int]]:
        """Rows of example numbers, as many as whole batches need; the last ones are empty."""
        data = self._config.data
        capacity = np.array((data.row_tokens, data.row_images, data.row_answers))
        sizes = []
        for example in self._examples[entry]:
            question = self._encoded(example)
            size = (question.tokens, len(example.images), question.answer)
            if (np.array(size) > capacity).any():
                raise UserError(
                    f"{entry.source}/{example.id} needs rows of {size} tokens, images and answer tokens, more than "
                    "config.data.row_tokens, row_images and row_answers; raise them, or leave its entry's `every` 0."
                )
            sizes.append(size)
        order = np.argsort(-(np.array(sizes) / np.maximum(capacity, 1)).max(axis=1), kind="stable")
        row_of = packing.first_fit(np.array(sizes), capacity, order)
        rows = [np.flatnonzero(row_of == row).tolist() for row in range(row_of.max() + 1)]
        return rows + [[]] * (-len(rows) % data.rows)

    def _batches(self, entry: EntryConfig) -> Iterator[layout.Batch]:
        """This process's rows of each batch."""
        rows, pipeline = self._config.data.rows, self._config
        own = rows // self._shares
        data, vision = pipeline.data, pipeline.model.vision
        shape = layout.RowShape(
            data.row_tokens, data.row_images, data.row_answers, pipeline.model.tokens_per_image, vision.image_size
        )
        for first in range(self._share * own, len(self._rows[entry]), rows):
            part = self._rows[entry][first : first + own]
            groups = [[self._loaded(entry, self._examples[entry][i]) for i in row] for row in part]
            yield layout.training_batch(groups, shape, self._tokenizer.pad, str(self._config.loss.reduction))

    def _encoded(self, example: Example) -> layout.Encoded:
        # Instruction 0, always: batches must not differ from one measurement to the next.
        encoder = layout.Encoder(self._tokenizer, self._config.text, self._config.model.tokens_per_image)
        return encoder.training(example, 0)

    def _loaded(self, entry: EntryConfig, example: Example) -> layout.Group:
        fit, vision = self._config.data.fit, self._config.model.vision
        stored = (self._sets[entry.source].image(key) for key in example.images)
        return layout.Group((self._encoded(example),), tuple(images.fit(image, fit, vision) for image in stored))

    def _check_best(self) -> None:
        known = [Measured(metric, e, 0.0).name for e in self.entries for metric in ("loss", *e.metrics)]
        best = self._config.train.best
        if best and best not in known:
            raise UserError(
                f"config.train.best={best!r} is not measured during training{nearest(best, known)} Choose from "
                f"{', '.join(known)}."
            )


def _by_id(config: Config, datasets: Sequence[Dataset]) -> dict[str, Dataset]:
    """The data sets that are scored, by the id of their source."""
    if config.evaluate.sources:
        datasets = open_sources(config.held_out)
    return {dataset.id: dataset for dataset in datasets}


def _examples(entry: EntryConfig, sets: dict[str, Dataset], config: Config) -> list[Example]:
    """The examples of an entry: at most its limit, evenly spaced, always the same."""
    where = f"config.evaluate.entries: {entry.source}/{entry.split}/{entry.task}"
    if entry.source not in sets:
        raise UserError(f"{where} names no data set{nearest(entry.source, sets)} Choose from {', '.join(sets)}.")
    data = sets[entry.source]
    examples = data.examples(entry.split) if entry.split in data.splits else ()
    found = [example for example in examples if example.task == entry.task]
    if not found:
        raise UserError(f"{where} has no example; check its split and task.")
    limit = config.evaluate.limit if entry.limit is None else entry.limit
    count = min(limit or len(found), len(found))
    return [found[i * len(found) // count] for i in range(count)]
