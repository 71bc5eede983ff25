"""Pipeline: examples to batches, mixed by weight, packed and cut for processes; a batch depends on (seed, step) alone.

sources -> groups (image, task) -> global order of draws -> questions and instructions of a draw
        -> rows (one draw each, or packed) -> rows of this process -> batch
"""

import functools
import random
import threading
from collections.abc import Iterator, Sequence

import grain.python as grain
import numpy as np

from unimed_jax.config import VISUAL_TASKS, Config, SourceConfig
from unimed_jax.data import images, layout, packing
from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.forms import form_of
from unimed_jax.data.layout import Batch, Encoded, Group
from unimed_jax.errors import UserError

CACHED = 1 << 20  # encoded questions held, about 400 bytes each


class Pipeline:
    """Training batches of `config.data.sources`.

    `datasets[i]` belongs to `config.data.sources[i]` (one data set may serve several). Raises UserError for a
    source without data or with a record that cannot be trained on.
    """

    def __init__(self, datasets: Sequence[Dataset], config: Config, tokenizer, split: str = "train"):
        """`tokenizer`: a `tokenizer.Tokenizer`."""
        data = config.data
        if not data.sources:
            raise UserError("config.data.sources is empty; name at least one data set.")
        self._config, self._datasets, self._pad = config, datasets, tokenizer.pad
        self._seed = config.seed % 2**32  # numpy's and grain's take no sign
        self._examples = [
            _select(dataset, source, split, data.row_images)
            for dataset, source in zip(datasets, data.sources, strict=True)
        ]
        # All groups in one list, source after source: (source, example indices).
        self._groups: list[tuple[int, tuple[int, ...]]] = []
        bounds = [0]
        for s, examples in enumerate(self._examples):
            self._groups += [(s, group) for group in _group(examples)]
            bounds.append(len(self._groups))
        self.shape = layout.RowShape(
            tokens=data.row_tokens,
            images=data.row_images,
            answers=data.row_answers,
            tokens_per_image=config.model.tokens_per_image,
            image_size=config.model.vision.image_size,
        )
        self._form = form_of(config.text)
        self._encoder = layout.Encoder(tokenizer, config.text, self.shape.tokens_per_image)
        self._encode = functools.lru_cache(maxsize=CACHED)(self._encode_question)
        self._order = _order(bounds, config)
        # Row -> its draws, endless.
        self._rows: grain.MapDataset[list[int]]
        if data.packing:
            capacity = (data.row_tokens, data.row_images, data.row_answers)
            self._rows = grain.MapDataset.source(packing.PackingPlan(self._size, capacity, data.window, self._seed))
        else:
            self._rows = grain.MapDataset.range(packing.ENDLESS).map(lambda row: [row])

    def batches(self, start_step: int = 0, share: int = 0, shares: int = 1) -> Iterator[Batch]:
        """Batches from `start_step` on, without end: arrays of `layout.training_batch`, B = rows / shares.

        Each holds share number `share` of the global batch's rows, cut into `shares` blocks of neighbours.
        """
        rows = self._config.data.rows
        if rows % shares:
            raise UserError(
                f"config.data.rows={rows} cannot be shared by {shares} processes; choose a multiple of {shares}."
            )
        own = rows // shares
        picked = grain.MapDataset.range(packing.ENDLESS).map(
            lambda i: self._rows[i // own * rows + share * own + i % own]
        )
        batched = picked.batch(own, drop_remainder=True, batch_fn=self._assemble)
        threads = self._config.data.threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(batched[start_step:].to_iter_dataset(options))

    def record_ids(self, step: int) -> list[str]:
        """`<data set>/<record>` of every example in the global batch of `step`."""
        rows = self._config.data.rows
        return [
            f"{self._datasets[source].name}/{question.record}"
            for row in range(step * rows, (step + 1) * rows)
            for draw in self._rows[row]
            for source, _, questions in [self._draw(draw)]
            for question in questions
        ]

    def stats(self, batch: Batch) -> dict[str, float]:
        """Shares of row tokens and of image slots that hold nothing; numbers of examples and of row tokens used."""
        used, slots, answered = batch["segments"] > 0, batch["image_tasks"] >= 0, batch["weights"] > 0
        # Between two answers of a row lies at least the end of the first and a prompt.
        first = np.diff(batch["target_index"], axis=1, prepend=-2) != 1
        return {
            "padding_waste": float(1 - used.mean()),
            "vision_waste": float(1 - slots.mean()) if slots.size else 0.0,
            "examples": int((first & answered).sum()),
            "tokens": int(used.sum()),
        }

    def _encode_question(self, source: int, example: int, variant: int) -> Encoded:
        encoded = self._encoder.training(self._examples[source][example], variant)
        for need, room, key in (
            (encoded.tokens, self.shape.tokens, "row_tokens"),
            (encoded.answer, self.shape.answers, "row_answers"),
        ):
            if need > room:
                raise UserError(
                    f"record {self._datasets[source].name}/{encoded.record} needs {need} of config.data.{key}={room}; "
                    f"raise it, or lower config.text.max_answer (the answer has {encoded.answer} tokens)."
                )
        return encoded

    def _draw(self, draw: int) -> tuple[int, tuple[str, ...], list[Encoded]]:
        """Draw number `draw` of the global order: its source, image keys and questions, each under an instruction."""
        source, group = self._groups[self._order[draw]]
        first = self._examples[source][group[0]]
        rng = random.Random(self._seed << 64 | draw)
        chosen = rng.sample(group, min(self._config.data.sources[source].questions, len(group)))
        pool = self._form.variants(first.task)
        questions: list[Encoded] = []
        tokens = answers = 0
        for example in chosen:
            question = self._encode(source, example, rng.randrange(pool))
            # The first one brings the tokens that all share. One that no longer fits waits for another draw.
            more = len(question.suffix) if questions else question.tokens
            if tokens + more <= self.shape.tokens and answers + question.answer <= self.shape.answers:
                questions.append(question)
                tokens, answers = tokens + more, answers + question.answer
        return source, first.images, questions

    def _size(self, draw: int) -> tuple[int, int, int]:
        """Tokens, image slots and answer tokens of a draw."""
        _, keys, questions = self._draw(draw)
        suffixes = sum(len(q.suffix) for q in questions)
        return len(questions[0].prefix) + suffixes, len(keys), sum(q.answer for q in questions)

    def _assemble(self, rows: Sequence[list[int]]) -> Batch:
        """Rows of draws -> arrays."""
        groups = [[self._load(*self._draw(draw)) for draw in row] for row in rows]
        return layout.training_batch(groups, self.shape, self._pad, str(self._config.loss.reduction))

    def _load(self, source: int, keys: tuple[str, ...], questions: list[Encoded]) -> Group:
        fit, vision = self._config.data.fit, self._config.model.vision
        pixels = (images.fit(self._datasets[source].image(key), fit, vision) for key in keys)
        return Group(tuple(questions), tuple(pixels))


def source_order(weights: Sequence[float], seed: int) -> Iterator[int]:
    """The source of step 0, 1, ... under per-batch mixing: the published order of Python's own generator."""
    generator = random.Random(seed)
    while True:
        yield generator.choices(range(len(weights)), weights)[0]


class _PerBatchOrder:
    """Draws in which each step has one source; a source goes on where its last step ended."""

    def __init__(self, sources: Sequence[grain.MapDataset], weights: Sequence[float], rows: int, seed: int):
        self._sources, self._rows = sources, rows
        self._choices = source_order(weights, seed)
        self._lock = threading.Lock()
        self._steps: list[tuple[int, int]] = []  # step -> source, and how often it came before
        self._seen = [0] * len(sources)

    def __getitem__(self, draw: int) -> int:
        step, row = divmod(draw, self._rows)
        with self._lock:
            while len(self._steps) <= step:
                source = next(self._choices)
                self._steps.append((source, self._seen[source]))
                self._seen[source] += 1
            source, before = self._steps[step]
        return self._sources[source][before * self._rows + row]


def _order(bounds: Sequence[int], config: Config) -> "grain.MapDataset | _PerBatchOrder":
    """The global order: draw -> group. Source i has the groups bounds[i] to bounds[i + 1]."""
    weights = [source.weight for source in config.data.sources]
    shuffled = []
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        seed = int(np.random.SeedSequence([config.seed % 2**32, s]).generate_state(1)[0])
        shuffled.append(grain.MapDataset.range(start, stop).shuffle(seed=seed).repeat())
    if config.data.mixing == "per_batch":
        return _PerBatchOrder(shuffled, weights, config.data.rows, config.seed)
    return grain.MapDataset.mix(shuffled, weights)


def _select(dataset: Dataset, source: SourceConfig, split: str, row_images: int) -> list[Example]:
    """The examples of one source, checked."""
    where = f"config.data.sources: {source.name!r}"
    everything = dataset.examples(split)
    chosen = [e for e in everything if not source.tasks or e.task in source.tasks]
    if not chosen:
        has = ", ".join(sorted({e.task for e in everything})) or "nothing"
        raise UserError(
            f"{where} has no {split} examples of {', '.join(source.tasks) or 'any task'} (it has {has}); check its "
            "path and tasks."
        )
    for example in chosen:
        visual = example.task in VISUAL_TASKS
        if visual != bool(example.images):
            raise UserError(
                f"record {dataset.name}/{example.id}: task {example.task!r} "
                + ("needs an image." if visual else "is text alone and takes no image; use 'vqa' for it.")
            )
        if visual and row_images < 1:
            raise UserError(f"config.data.row_images={row_images}, but {source.name!r} has images; set 1 or more.")
    return chosen


def _group(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """Example indices by (images, task), in the order of their first; text alone stays single."""
    groups: dict[tuple, list[int]] = {}
    for i, example in enumerate(examples):
        key = (example.task, example.images) if example.images else (i,)
        groups.setdefault(key, []).append(i)
    return [tuple(group) for group in groups.values()]
