"""Measures how likely a model finds each of the texts that could answer a question.

The rows are those of training (data/layout.py): the texts of one question share its images, and several
questions share a row. One program is compiled for all batches. What it gives for a text is, token by
token, the log-probability of which the training loss is the negative mean.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unimed_jax.config import Config
from unimed_jax.data import fitting, layout, packing
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.memory import check_answering
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import Batch, UniMed, answer_logits
from unimed_jax.predict.request import check_expert

ROW = 512  # tokens that a row holds at most, unless one text needs more
BUCKET = 32  # rows are rounded up to multiples, so that few shapes are compiled
LOGITS = 1 << 28  # bytes of the logits of a batch, over all devices
BOUNDLESS = 1 << 40


class Asked(NamedTuple):
    """Holds a question with the texts that could answer it."""

    example: Example
    texts: tuple[str, ...]
    turns: tuple[tuple[str, str], ...] = ()  # asked and answered before


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Holds the log-likelihood of each text of a question, end of text included."""

    sums: list[float]  # natural logarithms, added over the tokens of each text
    tokens: list[int]  # how many tokens each text has
    # float64 [tokens of the text] for each text: the logarithms that `sums` adds up
    each: list[np.ndarray] = dataclasses.field(default_factory=list, repr=False)


class _Share(NamedTuple):
    """Says which texts of a question come together after one copy of its images."""

    question: int  # its place in the batch
    first: int
    end: int


@jax.jit
def log_probabilities(model: UniMed, batch: Batch) -> jax.Array:
    """Computes the log-probability of each target of a batch of rows, float32 [B, A]."""
    # Routers that are noisy in evaluation draw as for the first token of a generated answer.
    noise = jax.random.key(0) if model.config.moe.eval_noise else None
    logits = answer_logits(model, model(batch, noise=noise).hidden, batch)
    found = jnp.take_along_axis(
        jax.nn.log_softmax(logits, axis=-1), batch["targets"][..., None], axis=-1
    )
    return constrain(found[..., 0], None, None)  # every process reads all of it


class Likelihoods:
    """Measures batches of questions with one model, in rows of one shape.

    It is to be called inside `run.inside()`, by all processes alike. With experts of limited capacity
    in the decoder, a row's texts compete for them, as in training.
    """

    def __init__(
        self,
        model: UniMed,
        config: Config,
        tokenizer: Tokenizer,
        batches: Sequence[Sequence[Asked]],
        few_programs: bool = False,
    ):
        """Takes all batches that will be measured, since they decide the shape of the rows.

        few_programs: measures row by row, in rows of a power of two that have place for most questions,
        so that a server which asks again and again compiles hardly anything, and keeps no ids of texts.
        Raises UserError for a prompt of more than config.text.max_prompt tokens, and for images of a
        task without an expert.
        """
        self._model, self._config, self._pad = model, config, tokenizer.pad
        self._encoder = layout.Encoder(
            tokenizer, config.text, config.model.tokens_per_image, keeps=not few_programs
        )
        sizes = [[self._size(asked) for asked in batch] for batch in batches]
        for example in (asked.example for batch in batches for asked in batch):
            if example.images:
                check_expert(config, example.task, example.id)
        every = [size for batch in sizes for size in batch]
        alone = max(prefix + max(texts) for prefix, texts, *_ in every)
        together = max(prefix + sum(texts) for prefix, texts, *_ in every)
        tokens = -(-max(alone, min(together, ROW)) // BUCKET) * BUCKET
        if few_programs:
            longest = config.text.max_prompt + config.evaluate.max_new_tokens
            tokens = 1 << (max(tokens, min(ROW, longest)) - 1).bit_length()
        seen = [len(asked.example.images) for batch in batches for asked in batch]
        mean = sum(min(prefix + sum(texts), tokens) for prefix, texts, *_ in every) / len(every)
        # As many slots for images as rows of questions of the mean length need.
        slots = max(seen) if few_programs else max(max(seen), round(np.mean(seen) * tokens / mean))
        self._shape = layout.RowShape(
            tokens, slots, 0, config.model.tokens_per_image, config.model.vision.image_size
        )
        plans = [self._plan(batch, own) for batch, own in zip(batches, sizes, strict=True)]
        answers = tokens if few_programs else max(sum(answers) for rows in plans for answers in rows)
        self._shape = dataclasses.replace(self._shape, answers=answers)
        self._rows = 1 if few_programs else self._rows_of_a_call(max(map(len, plans)))
        check_answering(config.model, model, self._rows, tokens)

    def of(self, batch: Sequence[Asked], pixels: Sequence[Sequence[np.ndarray]]) -> list[Likelihood]:
        """Measures the questions of a batch, in order; pixels: of each its images, uint8 [H, W, 3]."""
        fit, vision = self._config.data.fit, self._config.model.vision
        fitted = [tuple(fitting.fit(image, fit, vision) for image in own) for own in pixels]
        encoded = [self._encoded(asked) for asked in batch]
        rows = self._packed(batch, [_size(texts) for texts in encoded])
        each: list[list[np.ndarray]] = [[np.zeros(0)] * len(asked.texts) for asked in batch]
        for start in range(0, len(rows), self._rows):
            chosen = rows[start : start + self._rows]
            groups = [
                [layout.Group(tuple(encoded[q][first:end]), fitted[q]) for q, first, end in row]
                for row in chosen
            ]
            groups += [[] for _ in range(self._rows - len(groups))]
            arrays = layout.training_batch(groups, self._shape, self._pad, "token")
            found = np.asarray(log_probabilities(self._model, arrays), np.float64)
            for values, row in zip(found, chosen, strict=False):
                at = 0
                for q, first, end in row:
                    for text in range(first, end):
                        count = encoded[q][text].answer
                        each[q][text] = values[at : at + count].copy()
                        at += count
        return [
            Likelihood([float(one.sum()) for one in own], [text.answer for text in texts], own)
            for own, texts in zip(each, encoded, strict=True)
        ]

    def _encoded(self, asked: Asked) -> list[layout.Encoded]:
        return [self._encoder.answered(asked.example, text, asked.turns) for text in asked.texts]

    def _size(self, asked: Asked) -> "_Size":
        return _size(self._encoded(asked))

    def _plan(self, batch: Sequence[Asked], sizes: Sequence["_Size"]) -> list[list[int]]:
        """Returns the numbers of answer tokens that stand in each row of a batch."""
        return [
            [sum(sizes[q].answers[first:end]) for q, first, end in row]
            for row in self._packed(batch, sizes)
        ]

    def _packed(self, batch: Sequence[Asked], sizes: Sequence["_Size"]) -> list[list[_Share]]:
        """Divides the texts of a batch over rows: those of a question together if they fit one."""
        shares: list[_Share] = []
        counts: list[tuple[int, int, int]] = []
        for q, (asked, size) in enumerate(zip(batch, sizes, strict=True)):
            first, total = 0, size.prefix
            for text, length in enumerate(size.texts):
                if text > first and total + length > self._shape.tokens:
                    shares.append(_Share(q, first, text))
                    counts.append((total, len(asked.example.images), 0))
                    first, total = text, size.prefix
                total += length
            shares.append(_Share(q, first, len(size.texts)))
            counts.append((total, len(asked.example.images), 0))
        needed = np.array(counts)
        order = np.argsort(-needed[:, 0], kind="stable")
        capacity = np.array((self._shape.tokens, self._shape.images, BOUNDLESS))
        row_of = packing.first_fit(needed, capacity, order)
        rows: list[list[_Share]] = [[] for _ in range(row_of.max() + 1)]
        for share, row in zip(shares, row_of, strict=True):
            rows[row].append(share)
        return rows

    def _rows_of_a_call(self, needed: int) -> int:
        """Chooses how many rows are measured at once: those of a batch, or as many as logits allow."""
        a_row = 4 * max(self._shape.answers, 1) * self._config.model.decoder.vocab
        calls = -(-needed // max(1, LOGITS // a_row))
        rows = -(-needed // calls)
        unit = max(8, jax.device_count())  # whole shares for each device
        return -(-rows // unit) * unit if rows > unit // 2 else 1 << (rows - 1).bit_length()


class _Size(NamedTuple):
    """Counts the tokens of a question: of what its texts share, of each text's rest and answer."""

    prefix: int
    texts: tuple[int, ...]
    answers: tuple[int, ...]


def _size(encoded: Sequence[layout.Encoded]) -> _Size:
    return _Size(
        len(encoded[0].prefix),
        tuple(len(text.suffix) for text in encoded),
        tuple(text.answer for text in encoded),
    )
