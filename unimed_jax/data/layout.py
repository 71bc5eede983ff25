"""Lays prompt, images and answer out as ids, image slots, positions and segments.

This is done for training and for generation.

The token stream of one example is BOS, left ids, T visual positions, right ids, answer with its end
of text. Questions of one image and task may share its tokens: the stream up to the image's last
token is the PREFIX, the rest of each question a SUFFIX that sees the prefix and itself. Every
suffix starts at position len(prefix), so a question has the same ids and positions alone, shared or
packed. Attention over a row: query i sees key j where `segments[j] != 0`, `j <= i` and
`segments[j]` is `segments[i]` or `prefixes[i]`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

from unimed_jax.config import TASKS, VISUAL_TASKS, TextConfig
from unimed_jax.data.example import Example
from unimed_jax.data.forms import Piece, Turns, form_of, runs_of
from unimed_jax.errors import UserError

VISUAL = -1  # stands in a stream where a visual token goes

Batch = dict[str, np.ndarray]


class PromptTooLong(UserError):
    """Reports a prompt of more tokens than `text.max_prompt`."""

    def __init__(self, sentence: str, tokens: int, most: int):
        super().__init__(sentence)
        self.tokens, self.most = tokens, most


class Specials(Protocol):
    """Names the ids that layout itself puts in; `tokenizer.Tokenizer` has them."""

    bos: int
    eos: int
    pad: int


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """Holds one example as ids.

    `prefix` is empty for text alone, and a generation prompt has no targets.
    """

    record: str  # the example's id
    task: str
    prefix: np.ndarray  # int32 [P]: up to and with the last visual token, which are VISUAL
    suffix: np.ndarray  # int32 [L]: the rest
    targets: np.ndarray  # int32 [A]: where in the suffix the answers' ids are, rising

    @property
    def answer(self) -> int:
        """Counts the tokens of the example that are targets."""
        return len(self.targets)

    @property
    def tokens(self) -> int:
        return len(self.prefix) + len(self.suffix)


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Holds one image (or several, or none) with the questions that share it.

    All have one task and one prefix.
    """

    questions: tuple[Encoded, ...]
    # uint8 [image_size, image_size, 3] each, or bfloat16 [patches, width], in stream order
    images: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Says how much a row holds."""

    tokens: int  # S, visual ones included
    images: int  # M slots
    answers: int  # A answer tokens
    tokens_per_image: int  # T
    image_size: int  # pixels, square
    # patches of an image and their width, if rows hold an encoder's features in place of pixels
    features: tuple[int, int] | None = None


def encode_ids(
    segments: Sequence[Sequence[int]],
    answer: Sequence[int],
    tokens_per_image: int,
    bos: int,
    *,
    task: str,
    record: str = "",
    double_bos: bool = False,
) -> Encoded:
    """Turns ids of the text around the images and of the answer into an `Encoded`.

    There is one image between two segments; one segment is text alone. `answer` is used as it is
    given. `double_bos`: two BOS, as in the published evaluation prompts.
    """
    head = [bos] * (2 if double_bos else 1)
    *before, last = segments
    if not before:
        head, last = [], [*head, *last]
    for segment in before:
        head += [*segment, *[VISUAL] * tokens_per_image]
    suffix = np.array([*last, *answer], np.int32)
    return Encoded(
        record, task, _prefix(tuple(head)), suffix, np.arange(len(last), len(suffix), dtype=np.int32)
    )


@functools.lru_cache(maxsize=256)
def _prefix(ids: tuple[int, ...]) -> np.ndarray:
    # Prefixes are the same few id lists over and over: one array serves all examples.
    prefix = np.array(ids, np.int32)
    prefix.flags.writeable = False
    return prefix


def piece_ids(
    pieces: Sequence[Piece],
    tokenise: Callable[[str], Sequence[int]],
    eos: int,
    image: Sequence[int],
    together: Callable[[Sequence[str], bool], Sequence[Sequence[int]]] | None = None,
) -> tuple[list[int], list[bool]]:
    """Turns pieces into ids, and says which of the ids are targets.

    Each image becomes the ids in `image`. together: tokenises as one text those pieces that no image
    and no end of text parts, and gives each its ids (`Tokenizer.encode_together`); without it each
    is tokenised by itself.
    """
    runs = runs_of(pieces)
    parts = _ids_of_runs(runs, tokenise, together)
    ids: list[int] = []
    targets: list[bool] = []
    for run, part in zip(runs, parts, strict=True):
        before = len(ids)
        ids += image if run.image else part
        if run.ends:
            ids.append(eos)
        targets += [run.target] * (len(ids) - before)
    return ids, targets


def _ids_of_runs(
    runs: Sequence[Piece],
    tokenise: Callable[[str], Sequence[int]],
    together: Callable[[Sequence[str], bool], Sequence[Sequence[int]]] | None,
) -> list[Sequence[int]]:
    """Returns the ids of each run, which are () for an image."""
    if together is None:
        return [tokenise(run.text) if run.text else () for run in runs]
    ids: list[Sequence[int]] = []
    start, begins = 0, True
    for i, run in enumerate(runs):
        last = run.image or run.ends or i + 1 == len(runs) or runs[i + 1].image
        if not last:
            continue
        texts = [part.text for part in runs[start : i + 1] if not part.image]
        ids += together(texts, begins) if "".join(texts) else [()] * len(texts)
        ids += [()] if run.image else []
        start, begins = i + 1, not run.ends  # what follows an image is a text by itself, as published
    return ids


class Encoder:
    """Turns examples into ids under one tokenizer and one set of text settings."""

    def __init__(self, tokenizer, text: TextConfig, tokens_per_image: int, keeps: bool = True):
        """Takes a `tokenizer.Tokenizer`, or whatever has its `encode`, `bos` and `eos`.

        keeps: whether the ids of texts are kept for the next time; False for texts of others.
        """
        self._tokenizer, self._text, self._tokens_per_image = tokenizer, text, tokens_per_image
        self._form = form_of(text)
        self._together = getattr(tokenizer, "together", None) if self._form.joined else None
        # The head of a prompt is always the same, short answers and questions often.
        self._ids = functools.lru_cache(maxsize=(1 << 16) * keeps)(
            lambda string: tuple(tokenizer.encode(string))
        )

    def training(self, example: Example, variant: int) -> Encoded:
        """Returns the example with its answer, under instruction number `variant` of its task."""
        return self._encode(example, self._form.training(example, variant), training=True)

    def prompt(
        self, example: Example, variant: int = 0, with_images: bool = True, turns: Turns = ()
    ) -> Encoded:
        """Returns the generation prompt of an example, under instruction number `variant`, no answer.

        Evaluation's instruction is number 0. Without images the prompt lacks their visual tokens, and is
        the same otherwise. turns: asked and answered before, as `Form.following` says.
        """
        pieces = self._prompt(example, variant, turns)
        shown = pieces if with_images else [piece for piece in pieces if not piece.image]
        return self._encode(example, shown, training=False)

    def answered(self, example: Example, answer: str, turns: Turns = ()) -> Encoded:
        """Returns the generation prompt of an example with a text that could be its answer."""
        pieces = [*self._prompt(example, 0, turns), self._form.said(answer)]
        return self._encode(example, pieces, training=False)

    def _prompt(self, example: Example, variant: int, turns: Turns) -> list[Piece]:
        return (
            self._form.following(example, turns, variant)
            if turns
            else self._form.prompt(example, variant)
        )

    def _encode(self, example: Example, pieces: Sequence[Piece], training: bool) -> Encoded:
        image = [VISUAL] * self._tokens_per_image
        ids, targets = piece_ids(pieces, self._ids, self._tokenizer.eos, image, self._together)
        first = self._form.beginnings(training)
        ids, targets = [self._tokenizer.bos] * first + ids, [False] * first + targets
        start = len(ids) - ids[::-1].index(VISUAL) if VISUAL in ids else 0
        suffix, where = ids[start:], [i for i, target in enumerate(targets[start:]) if target]
        # it loses its end of text, as published
        if self._form.cut and len(where) > self._text.max_answer:
            where = where[: self._text.max_answer]
            suffix = suffix[: where[-1] + 1]
        encoded = Encoded(
            example.id,
            example.task,
            _prefix(tuple(ids[:start])),
            np.array(suffix, np.int32),
            np.array(where, np.int32),
        )
        return self._checked(encoded)

    def _checked(self, encoded: Encoded) -> Encoded:
        length = encoded.tokens - encoded.answer
        if length > self._text.max_prompt:
            images = int((encoded.prefix == VISUAL).sum()) // self._tokens_per_image
            seen = f" ({images * self._tokens_per_image} of {images} images)" if images > 1 else ""
            raise PromptTooLong(
                f"record {encoded.record}: its prompt has {length} tokens{seen}, more than "
                f"config.text.max_prompt={self._text.max_prompt}; "
                f"{'ask about fewer images, ' if images > 1 else ''}shorten the question or raise the "
                "limit.",
                length,
                self._text.max_prompt,
            )
        return encoded


def training_batch(rows: Sequence[Sequence[Group]], shape: RowShape, pad: int, reduction: str) -> Batch:
    """Turns rows of groups into the arrays of a training batch.

    It has B rows; a row has S tokens, M image slots and A answer tokens.

    images uint8 [B, M, H, W, 3] (unused slots 0), or if `shape.features` says so in their place features
    bfloat16 [B, M, patches, width]; image_tasks int32 [B, M] (index in VISUAL_TASKS, unused -1); tokens
    int32 [B, S] (`pad` at padding and visual positions), visual int32 [B, S] (slot * T + t, else -1),
    segments int32 [B, S] (0 = padding, else from 1 within the row), prefixes int32 [B, S] (the segment
    whose tokens are visible too; own number where there is none), positions int32 [B, S]; target_index
    int32 [B, A] (the row position that predicts the target), targets int32 [B, A], weights float32
    [B, A] (unused 0; `reduction` "token": 1, "example": 1 / length of the answer), target_tasks int32
    [B, A] (index in TASKS, unused -1). The groups of a row must fit `shape`.
    """
    batch = _empty(len(rows), shape, pad) | _empty_targets(len(rows), shape.answers)
    for b, groups in enumerate(rows):
        cursor = _Cursor()
        for group in groups:
            _place(batch, b, cursor, group, shape.tokens_per_image, reduction)
    return batch


def prompt_batch(prompts_: Sequence[Group], shape: RowShape, pad: int) -> Batch:
    """Makes the arrays of `training_batch` without targets, for prompts.

    There is one prompt in a row, LEFT padded to `shape.tokens`. Positions count the real tokens
    from 0 (published: cumsum(mask) - 1); padding has position 0. Raises UserError for a prompt
    longer than the rows.
    """
    batch = _empty(len(prompts_), shape, pad)
    for b, group in enumerate(prompts_):
        (question,) = group.questions
        if question.tokens > shape.tokens:
            raise UserError(
                f"record {question.record}: its prompt of {question.tokens} tokens is longer than "
                f"the rows of {shape.tokens}; choose longer rows."
            )
        _place(
            batch,
            b,
            _Cursor(token=shape.tokens - question.tokens),
            group,
            shape.tokens_per_image,
            "token",
        )
    return batch


def _empty(rows: int, shape: RowShape, pad: int) -> Batch:
    side, slots = shape.image_size, (rows, shape.images)
    pictures = (
        {"images": np.zeros((*slots, side, side, 3), np.uint8)}
        if shape.features is None
        else {"features": np.zeros((*slots, *shape.features), ml_dtypes.bfloat16)}
    )
    return pictures | {
        "image_tasks": np.full((rows, shape.images), -1, np.int32),
        "tokens": np.full((rows, shape.tokens), pad, np.int32),
        "visual": np.full((rows, shape.tokens), -1, np.int32),
        "segments": np.zeros((rows, shape.tokens), np.int32),
        "prefixes": np.zeros((rows, shape.tokens), np.int32),
        "positions": np.zeros((rows, shape.tokens), np.int32),
    }


def _empty_targets(rows: int, answers: int) -> Batch:
    return {
        "target_index": np.zeros((rows, answers), np.int32),
        "targets": np.zeros((rows, answers), np.int32),
        "weights": np.zeros((rows, answers), np.float32),
        "target_tasks": np.full((rows, answers), -1, np.int32),
    }


@dataclasses.dataclass
class _Cursor:
    """Says where the next group of a row goes."""

    token: int = 0
    slot: int = 0
    segment: int = 1
    answer: int = 0


def _place(
    batch: Batch, b: int, at: _Cursor, group: Group, tokens_per_image: int, reduction: str
) -> None:
    """Writes one group into row `b` at the cursor, and moves the cursor past it."""
    task, prefix = group.questions[0].task, group.questions[0].prefix
    shared, length = at.segment, len(prefix)
    if length:
        here = slice(at.token, at.token + length)
        seen = prefix == VISUAL
        count = int(seen.sum())
        slots = slice(at.slot, at.slot + count // tokens_per_image)
        batch["tokens"][b, here] = np.where(seen, batch["tokens"][b, here], prefix)
        batch["visual"][b, here][seen] = at.slot * tokens_per_image + np.arange(count)
        batch["segments"][b, here] = batch["prefixes"][b, here] = shared
        batch["positions"][b, here] = np.arange(length)
        if count:
            batch["image_tasks"][b, slots] = VISUAL_TASKS.index(task)
        # those of the next group would take the place of images that the prompt does not mark
        assert len(group.images) <= slots.stop - slots.start, "images without a mark in the prompt"
        pictures = batch["features" if "features" in batch else "images"]
        for i, image in enumerate(group.images):
            pictures[b, at.slot + i] = image
        at.token, at.slot = here.stop, slots.stop
    end = at.token
    for i, question in enumerate(group.questions):
        # A question alone is one segment: the published row. Several each need a segment beside the
        # shared one.
        at.segment = shared if len(group.questions) == 1 else shared + 1 + i
        here = slice(at.token, at.token + len(question.suffix))
        batch["tokens"][b, here] = question.suffix
        batch["segments"][b, here] = at.segment
        batch["prefixes"][b, here] = shared
        batch["positions"][b, here] = np.arange(length, length + len(question.suffix))
        if question.answer:
            out = slice(at.answer, at.answer + question.answer)
            # What follows the shared tokens is predicted from the last of them, wherever it stands.
            before = np.where(question.targets > 0, here.start + question.targets, end) - 1
            batch["target_index"][b, out] = before
            batch["targets"][b, out] = question.suffix[question.targets]
            batch["weights"][b, out] = 1 if reduction == "token" else 1 / question.answer
            batch["target_tasks"][b, out] = TASKS.index(task)
            at.answer = out.stop
        at.token = here.stop
    at.segment += 1
