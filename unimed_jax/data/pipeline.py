"""Turns examples into batches that are mixed by weight, packed, and cut for processes.

A batch depends on (seed, step) alone.

sources -> groups (image, task) -> global order of draws -> questions and instructions of a draw
        -> rows (one draw each, or packed) -> rows of this process -> batch
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np

from unimed_jax import processes
from unimed_jax.config import TASKS, AugmentConfig, Config, SourceConfig
from unimed_jax.data import augment, fitting, layout, lengths, packing
from unimed_jax.data.columns import NONE, Columns, columns_of
from unimed_jax.data.example import Dataset, Example, Features
from unimed_jax.data.forms import form_of
from unimed_jax.data.layout import Batch, Encoded, Group
from unimed_jax.data.order import global_order, group_examples
from unimed_jax.data.selection import chosen, draw_weights
from unimed_jax.data.store import CHUNK, Rows
from unimed_jax.errors import UserError

CACHED = 1 << 18  # encoded questions held, about 400 bytes each

Question = tuple[int, int, int]  # source, row among its examples, instruction


@dataclasses.dataclass(frozen=True)
class Draw:
    """Holds one draw of the global order: some questions of one image and task.

    Each question has its own instruction.
    """

    source: int  # index in config.data.sources
    task: str
    rows: tuple[int, ...]  # of the source's examples
    variants: tuple[int, ...]  # instruction of each
    size: tuple[int, int, int]  # tokens, image slots, answer tokens


class _Asked(NamedTuple):
    """Holds a question as tokens, its image keys and, where pictures vary, what was encoded."""

    encoded: Encoded
    images: tuple[str, ...]
    example: Example | None


class Pipeline:
    """Makes the training batches of `config.data.sources`.

    `datasets[i]` belongs to `config.data.sources[i]` (one data set may serve several). Raises
    UserError for a source without data or with a record that cannot be trained on.
    """

    def __init__(self, datasets: Sequence[Dataset], config: Config, tokenizer, split: str = "train"):
        """Opens `split` of the data sets for training with a `tokenizer.Tokenizer`."""
        data = config.data
        if not data.sources:
            raise UserError("config.data.sources is empty; name at least one data set.")
        self._config, self._pad = config, tokenizer.pad
        self._seed = config.seed % 2**32  # numpy's and grain's take no sign
        self.shape = layout.RowShape(
            tokens=data.row_tokens,
            images=data.row_images,
            answers=data.row_answers,
            tokens_per_image=config.model.tokens_per_image,
            image_size=config.model.vision.image_size,
        )
        self._form = form_of(config.text)
        self._encoder = layout.Encoder(tokenizer, config.text, self.shape.tokens_per_image)
        self._questions = _Recent(CACHED, lambda _: 1)
        self._pixels = _Recent(data.image_cache_mib << 20, lambda pixels: pixels.nbytes)
        self._features: Features | None = None
        # A draw is asked for twice: by the packing plan, and some windows later when its row is
        # assembled.
        self.draw = functools.lru_cache(maxsize=8 * data.window)(self._draw)
        self._sources = [
            _Source(dataset, source, split, config, tokenizer, self.shape)
            for dataset, source in zip(datasets, data.sources, strict=True)
        ]
        _say_cut(self._sources, config)
        _say_dropped(self._sources, config)
        self._order = global_order(self._sources, config)
        # Row -> its draws, endless.
        self._rows: grain.MapDataset[list[int]]
        self._packing: packing.PackingPlan | None = None
        if data.packing:
            capacity = (data.row_tokens, data.row_images, data.row_answers)
            self._packing = packing.PackingPlan(
                lambda draw: self.draw(draw).size, capacity, data.window, self._seed
            )
            self._rows = grain.MapDataset.source(self._packing)
        else:
            self._rows = grain.MapDataset.range(packing.ENDLESS).map(lambda row: [row])

    def use(self, features: Features) -> None:
        """Makes batches of an encoder's features from now on, in place of pixels."""
        self._features = features
        self.shape = dataclasses.replace(self.shape, features=features.shape)

    def mark(self, step: int) -> list | None:
        """Returns the state from which rows from `step` on are planned; None if rows are not packed."""
        return None if self._packing is None else list(self._packing.mark(step * self._config.data.rows))

    def go_on(self, mark: list | None) -> None:
        """Plans rows from a state that `mark` returned, instead of all rows since step 0."""
        if self._packing is not None and mark is not None:
            self._packing.go_on(packing.Mark(*mark))

    def pictures(self) -> Iterator[tuple[Dataset, str]]:
        """Yields every image that training may draw, as a data set and a key."""
        for source in self._sources:
            # Examples with the same images share a number, so one of them is read.
            numbers, rows = np.unique(source.columns.image_set, return_index=True)
            rows = np.sort(rows[numbers != NONE])
            for start in range(0, len(rows), CHUNK):
                for example in source.read(rows[start : start + CHUNK].tolist()):
                    yield from ((source.dataset, key) for key in example.images)

    def fitted(self, dataset: Dataset, key: str) -> np.ndarray:
        """Decodes an image and fits it to the encoder, uint8 [image_size, image_size, 3]."""
        return fitting.fit(dataset.image(key), self._config.data.fit, self._config.model.vision)

    def plan(self, step: int) -> list[list[Draw]]:
        """Lists the draws in each row of the global batch of `step`."""
        rows = self._config.data.rows
        return [
            [self.draw(d) for d in self.draws_of_row(row)]
            for row in range(step * rows, (step + 1) * rows)
        ]

    def draws_of_row(self, row: int) -> list[int]:
        """Returns the numbers of the draws that share row `row`, counted over all steps."""
        return list(self._rows[row])

    def _draw(self, number: int) -> Draw:
        """Makes draw `number` of the global order."""
        place = self._order[number]
        source = self._sources[place[0]]
        group = source.groups[place[1]]
        task = TASKS[source.columns.task[group[0]]]
        rng = random.Random(self._seed << 64 | number)
        count = min(self._config.data.sources[place[0]].questions, len(group))
        pool = self._form.variants(task)
        rows: list[int] = []
        variants: list[int] = []
        tokens = answers = 0
        for i in rng.sample(range(len(group)), count):
            row, variant = int(group[i]), rng.randrange(pool)
            # The first one brings the tokens that all share. One that no longer fits waits for
            # another draw.
            more = source.lengths.suffix(row, variant) + (0 if rows else source.lengths.prefix(row))
            answer = source.lengths.answer(row)
            if tokens + more <= self.shape.tokens and answers + answer <= self.shape.answers:
                rows.append(row)
                variants.append(variant)
                tokens, answers = tokens + more, answers + answer
        size = (tokens, int(source.columns.images[group[0]]), answers)
        return Draw(place[0], task, tuple(rows), tuple(variants), size)

    def record(self, draw: Draw, i: int) -> str:
        """Returns the name of question `i` of a draw, `<data set>/<id>`."""
        source = self._sources[draw.source]
        return f"{source.dataset.id}/{source.examples[draw.rows[i]].id}"

    def batches(self, start_step: int = 0, own: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yields batches from `start_step` on, without end.

        A batch holds the arrays of `layout.training_batch`, with the B rows of the global batch whose
        numbers are `own` (by default all).
        """
        rows = self._config.data.rows
        own = range(rows) if own is None else own
        picked = grain.MapDataset.range(packing.ENDLESS).map(
            lambda i: self._rows[i // len(own) * rows + own[i % len(own)]]
        )
        batched = picked.batch(len(own), drop_remainder=True, batch_fn=self._assemble)
        threads = self._config.data.threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(batched[start_step:].to_iter_dataset(options))

    def record_ids(self, step: int) -> list[str]:
        """Names every example in the global batch of `step`: `<data set>/<record>`."""
        return [
            self.record(draw, i)
            for row in self.plan(step)
            for draw in row
            for i in range(len(draw.rows))
        ]

    def stats(self, batch: Batch) -> dict[str, float]:
        """Measures how much of a batch is unused, and counts its examples and tokens.

        Unused are the shares of row tokens and of image slots that hold nothing.
        """
        used, slots, answered = batch["segments"] > 0, batch["image_tasks"] >= 0, batch["weights"] > 0
        # Between two answers of a row lies at least the end of the first and a prompt.
        first = np.diff(batch["target_index"], axis=1, prepend=-2) != 1
        return {
            "padding_waste": float(1 - used.mean()),
            "vision_waste": float(1 - slots.mean()) if slots.size else 0.0,
            "examples": int((first & answered).sum()),
            "tokens": int(used.sum()),
        }

    def _assemble(self, rows: Sequence[list[int]]) -> Batch:
        """Turns rows of draws into arrays."""
        draws = [[self.draw(number) for number in row] for row in rows]
        asked = self._asked([draw for row in draws for draw in row])
        groups = [
            [self._group(number, draw, asked) for number, draw in zip(row, drawn, strict=True)]
            for row, drawn in zip(rows, draws, strict=True)
        ]
        return layout.training_batch(groups, self.shape, self._pad, str(self._config.loss.reduction))

    def _asked(self, draws: Sequence[Draw]) -> dict[Question, _Asked]:
        """Returns the draws' questions. Records are read in one call per source."""
        wanted = {
            (draw.source, *pair) for draw in draws for pair in zip(draw.rows, draw.variants, strict=True)
        }
        out = {
            question: found
            for question in wanted
            if (found := self._questions.get(question)) is not None
        }
        missing = sorted(wanted - out.keys())
        for s, questions in itertools.groupby(missing, key=lambda question: question[0]):
            some = list(questions)
            for question, example in zip(
                some, self._sources[s].read([row for _, row, _ in some]), strict=True
            ):
                encoded = self._encoder.training(example, question[2])
                # Examples take several times the memory of their tokens.
                kept = example if self._varies(s) else None
                out[question] = _Asked(encoded, example.images, kept)
                self._questions.put(question, out[question])
        return out

    def _group(self, number: int, draw: Draw, asked: Mapping[Question, _Asked]) -> Group:
        """Loads the pictures of draw `number` and puts its questions with them."""
        own = [asked[draw.source, row, v] for row, v in zip(draw.rows, draw.variants, strict=True)]
        varied = self._varied(number, draw, own) if own[0].images and self._varies(draw.source) else None
        if varied is not None:
            return varied
        pictures = tuple(self._picture(draw.source, key) for key in own[0].images)
        return Group(tuple(one.encoded for one in own), pictures)

    def _varies(self, source: int) -> bool:
        return not augment.is_off(self._config.data.sources[source].augment)

    def _varied(self, number: int, draw: Draw, own: Sequence[_Asked]) -> Group | None:
        """Loads the pictures of draw `number`, varied, and puts its questions with them.

        Returns None if a question's boxes need more tokens than were counted for it: no form of a box
        was longer, but its four numbers together are, in this tokenizer. Then the draw stays as it is.
        """
        config, source = self._config, self._sources[draw.source]
        settings, vision = config.data.sources[draw.source].augment, config.model.vision
        examples = [one.example for one in own if one.example is not None]
        pictures = [self._working(draw.source, key, settings) for key in examples[0].images]
        drawn = augment.variation(settings, self._seed, number, examples)
        # Boxes are of the first picture.
        size = pictures[0].size
        boxes = [box for example in examples for box in augment.boxes_of(example, size).values()]
        maps = [augment.map_of(drawn, p.size, boxes if i == 0 else ()) for i, p in enumerate(pictures)]
        encoded = [one.encoded for one in own]
        if boxes:
            encoded = [
                self._encoder.training(augment.moved(example, maps[0], size), variant)
                for example, variant in zip(examples, draw.variants, strict=True)
            ]
            if not all(
                source.lengths.holds(row, variant, one)
                for row, variant, one in zip(draw.rows, draw.variants, encoded, strict=True)
            ):
                return None
        pixels = tuple(
            augment.lit(fitting.fit(augment.seen(picture, by), config.data.fit, vision), drawn)
            for picture, by in zip(pictures, maps, strict=True)
        )
        return Group(tuple(encoded), pixels)

    def _picture(self, source: int, key: str) -> np.ndarray:
        """Returns an image as a row holds it, from the disk or from memory: features, or pixels."""
        dataset = self._sources[source].dataset
        cached = self._pixels.get((dataset.id, key))
        if cached is None:
            if self._features is None:
                cached = self.fitted(dataset, key)
            else:
                cached = self._features.read(dataset.digest(key))
            self._pixels.put((dataset.id, key), cached)
        return cached

    def _working(self, source: int, key: str, settings: AugmentConfig) -> augment.Working:
        """Returns an image from which variations are made, decoded or from the cache."""
        dataset = self._sources[source].dataset
        name = (dataset.id, key, settings.scale[1])
        cached = self._pixels.get(name)
        if cached is None:
            size = self._config.model.vision.image_size
            cached = augment.working(dataset.image(key), settings, size)
            self._pixels.put(name, cached)
        return cached


class _Recent:
    """Holds the values that were used last, up to a total size."""

    def __init__(self, limit: int, size_of: Callable[[Any], int]):
        self._limit, self._size_of, self._total = limit, size_of, 0
        self._lock = threading.Lock()
        self._values: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def get(self, key: Any) -> Any | None:
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
            return found

    def put(self, key: Any, value: Any) -> None:
        size = self._size_of(value)
        with self._lock:
            if key in self._values or size > self._limit:
                return
            self._values[key] = value
            self._total += size
            while self._total > self._limit:
                self._total -= self._size_of(self._values.popitem(last=False)[1])


class _Picked(Sequence[Example]):
    """Shows some of a sequence's examples, by number."""

    def __init__(self, examples: Sequence[Example], numbers: np.ndarray):
        self._examples, self._numbers = examples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i):
        return self._examples[int(self._numbers[i])]


class _Source:
    """Holds what the pipeline knows of one source.

    That is its examples by number, and their columns, lengths and groups.
    """

    def __init__(
        self, dataset: Dataset, source: SourceConfig, split: str, config: Config, tokenizer, shape
    ):
        where = f"config.data.sources: {source.name!r}"
        self.dataset = dataset
        self.examples: Sequence[Example]
        if split not in getattr(dataset, "splits", (split,)):
            raise UserError(
                f"{where} has no {split} examples (its splits: {', '.join(dataset.splits)})."
            )
        everything = columns_of(dataset, split)
        keep = chosen(everything, source)
        weights = draw_weights(everything, source)
        (numbers,) = np.nonzero(keep & (weights > 0))
        if not len(numbers):
            has = ", ".join(sorted({TASKS[task] for task in np.unique(everything.task)})) or "nothing"
            raise UserError(
                f"{where} has no {split} examples of {', '.join(source.tasks) or 'any task'} (it "
                f"has {has}); check its path, tasks, filters and weights."
            )
        self.columns: Columns = everything.at(numbers)
        examples = dataset.examples(split)
        self.examples = (
            examples.at(numbers) if isinstance(examples, Rows) else _Picked(examples, numbers)
        )
        if shape.images < 1 and self.columns.images.any():
            raise UserError(
                f"config.data.row_images={shape.images}, but {source.name!r} has images; set 1 or more."
            )
        rows = hashlib.sha256(numbers.astype(np.int64).tobytes()).hexdigest()
        stored = getattr(dataset, "folder", None)
        measured: Sequence[Example] = self.examples
        kept = ""
        # A coordinate that is one token is as long as any other.
        if not augment.is_off(source.augment) and getattr(tokenizer, "coordinate_start", None) is None:
            measured, kept = augment.Longest(self.examples, tokenizer), "/longest boxes"
        self.lengths = lengths.measure(
            measured,
            tokenizer,
            config.text,
            shape.tokens_per_image,
            None if stored is None else config.data.cache_folder,
            f"{dataset.checksum}/{split}/{_rule(source, split)}/{rows}{kept}",
        )
        lengths.check(self.lengths, self.columns.images, self.examples, dataset.id, shape, config.text)
        self.groups, self.buckets = group_examples(self.columns, weights[numbers], source.questions)

    def read(self, rows: Sequence[int]) -> list[Example]:
        """Reads examples by number, in one call if they are on disk."""
        if isinstance(self.examples, Rows):
            return list(self.examples.at(np.array(rows)))
        return [self.examples[row] for row in rows]


def _rule(source: SourceConfig, split: str) -> str:
    # Row numbers count within a selection; these settings say which selection it is.
    return f"{sorted(source.splits.items())}/{source.only}"


def _say_cut(sources: Sequence[_Source], config: Config) -> None:
    """Says once how many training answers are cut.

    A cut answer teaches the model not to end.
    """
    cut, total = sum(s.lengths.cut for s in sources), sum(len(s.columns) for s in sources)
    if cut:
        processes.say(
            f"{cut} of {total} training answers are cut to "
            f"config.text.max_answer={config.text.max_answer} tokens and lose their end of text; "
            "raise it (and config.data.row_answers) to keep them whole."
        )


def _say_dropped(sources: Sequence[_Source], config: Config) -> None:
    """Says once how many earlier turns the prompt form leaves out.

    It names some of the records that have such turns.
    """
    for source in sources:
        (rows,) = np.nonzero(source.lengths.dropped)
        if not len(rows):
            continue
        named = [f"{source.dataset.id}/{source.examples[int(row)].id}" for row in rows[: lengths.NAMED]]
        more = " ..." if len(rows) > lengths.NAMED else ""
        processes.say(
            f"config.text.form={config.text.form!r} trains on the last turn of {len(rows)} "
            f"conversations and leaves out the {int(source.lengths.dropped.sum())} turns before "
            f"({', '.join(named)}{more}); choose stablelm or phi to train on all of them."
        )
