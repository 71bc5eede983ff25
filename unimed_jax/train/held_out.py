"""Lays the examples of an evaluation out as training rows, for losses and gradients on held-out data."""

from collections.abc import Iterator, Sequence

import numpy as np

from unimed_jax.config import Config
from unimed_jax.data import fitting, layout, packing
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import Unit


class HeldOut:
    """Makes batches of one unit's examples; the rows are planned once and always the same."""

    def __init__(self, unit: Unit, config: Config, tokenizer: Tokenizer, skip_long: bool = False):
        """Raises UserError for an example that does not fit into a row, or leaves it out."""
        self.unit, self._config, self._pad = unit, config, tokenizer.pad
        data = config.data
        self._capacity = np.array((data.row_tokens, data.row_images, data.row_answers))
        self._encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)
        self._sizes = self._measured(skip_long)
        self.numbers = list(self._sizes)  # of the examples that fit
        self.rows = self.plan(self.numbers)  # numbers of the examples in each row

    def batches(self, own: Sequence[int] | None = None) -> Iterator[layout.Batch]:
        """Yields the rows of each batch with these numbers (all by default); some may be empty."""
        rows = self._config.data.rows
        for first in range(0, len(self.rows), rows):
            yield self.batch(self.rows[first : first + rows], own)

    def batch(
        self,
        rows: Sequence[Sequence[int]],
        own: Sequence[int] | None = None,
    ) -> layout.Batch:
        """Makes a batch of some planned rows, after which empty ones follow.

        own: the numbers of the rows that are made; by default config.data.rows, from 0 on.
        """
        data, model = self._config.data, self._config.model
        wanted = [rows[i] if i < len(rows) else [] for i in (range(data.rows) if own is None else own)]
        groups = [[self._loaded(self.unit.examples[i]) for i in row] for row in wanted]
        sizes = (data.row_tokens, data.row_images, data.row_answers)
        shape = layout.RowShape(*sizes, model.tokens_per_image, model.vision.image_size)
        return layout.training_batch(groups, shape, self._pad, str(self._config.loss.reduction))

    def plan(self, numbers: Sequence[int]) -> list[list[int]]:
        """Packs some examples, by number, into rows."""
        if not len(numbers):
            return []
        sizes, found = np.array([self._sizes[number] for number in numbers]), np.array(numbers)
        order = np.argsort(-(sizes / np.maximum(self._capacity, 1)).max(axis=1), kind="stable")
        row_of = packing.first_fit(sizes, self._capacity, order)
        return [found[row_of == row].tolist() for row in range(row_of.max() + 1)]

    def _measured(self, skip_long: bool) -> dict[int, tuple[int, int, int]]:
        """Counts tokens, images and answer tokens of each example that fits into a row, by number."""
        sizes = {}
        for number, example in enumerate(self.unit.examples):
            question = self._encoder.training(example, 0)
            size = (question.tokens, len(example.images), question.answer)
            if (np.array(size) <= self._capacity).all():
                sizes[number] = size
            elif not skip_long:
                raise UserError(
                    f"{self.unit.id_of(example)} needs rows of {size} tokens, images and answer tokens, "
                    "more than config.data.row_tokens, row_images and row_answers; raise them, or "
                    "leave its entry's `every` 0."
                )
        return sizes

    def _loaded(self, example: Example) -> layout.Group:
        fit, vision = self._config.data.fit, self._config.model.vision
        stored = (self.unit.source.data.image(key) for key in example.images)
        # Instruction 0, always: batches must not differ from one measurement to the next.
        question = self._encoder.training(example, 0)
        return layout.Group((question,), tuple(fitting.fit(image, fit, vision) for image in stored))
