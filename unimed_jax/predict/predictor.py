"""Answers requests with a model, batch by batch or streamed one by one.

Evaluation, the verb `predict` and everything that serves answers go through `Predictor`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from unimed_jax.config import Config, ImageConfig
from unimed_jax.data import images, layout
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.memory import check_answering
from unimed_jax.model.generate import Sampling, generate, stream
from unimed_jax.model.sharding import inside
from unimed_jax.model.unimed import UniMed
from unimed_jax.parsing import is_text

BUCKET = 32  # prompt lengths are rounded up to multiples, so that few shapes are compiled
CUT = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to


@dataclasses.dataclass(frozen=True)
class Request:
    """Describes one question to the model.

    What is None is taken from `config.evaluate`.

    images: paths, file contents as bytes, or pixels as uint8 [H, W, 3]; history: earlier (question,
    answer) turns; seed: of the draws if the temperature is not 0; id: names the request in
    messages; wording: which instruction of the task's pool asks (data/forms.py); show_images: False
    for a prompt without the images' visual tokens, which tells what the words alone give.
    """

    task: str
    question: str = ""
    images: tuple[str | Path | bytes | np.ndarray, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    id: str = ""
    wording: int = 0
    show_images: bool = True


class Predictor:
    """Turns requests into texts with one model.

    Give the `mesh` over which the model lies, or call it inside `run.inside()`. With several
    processes all of them make the same calls and get the same texts.
    """

    def __init__(self, model: UniMed, config: Config, tokenizer: Tokenizer, mesh: Mesh | None = None):
        self._model, self._config, self._tokenizer, self._mesh = model, config, tokenizer, mesh
        self._encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)

    def answers(self, requests: Sequence[Request], batch: int | None = None) -> list[str]:
        """Answers all requests, in order, `batch` at a time (default: `config.evaluate.batch`).

        Consecutive requests share a batch if they have the same temperature and length of the
        answer, so batches depend on the order given. Raises UserError for a request that does not
        fit its task or whose prompt is longer than `text.max_prompt`.
        """
        batch = batch or self._config.evaluate.batch
        texts: list[str] = []
        while len(texts) < len(requests):
            rest = requests[len(texts) : len(texts) + batch]
            kinds = [self._kind(request) for request in rest]
            alike = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), len(rest))
            texts += self._together(rest[:alike], batch)
        return texts

    def stream(self, request: Request, chunk: int = 1) -> Iterator[str]:
        """Yields the answer in pieces as its tokens are picked, `chunk` tokens at a time.

        Joined, the pieces are `answers([request])[0]`. Raises as `answers` does.
        """
        tokens: list[int] = []
        said = ""
        parts = self._pieces(request, chunk)
        while True:
            # Not around the yield: the caller's code must not run inside the mesh's context.
            with self._inside():
                found = next(parts, None)
            text = self._text(tokens + ([] if found is None else found))
            if found is None:
                break
            tokens += found
            # white space belongs to the answer only if something follows
            whole = text.rstrip(CUT).rstrip()
            if whole.startswith(said) and whole != said:
                yield whole[len(said) :]
                said = whole
        if text != said:
            yield text[len(said) :]

    def _kind(self, request: Request) -> tuple[int, float]:
        """Returns what the requests of a batch must share.

        That is the most tokens of the answer and the temperature.
        """
        settings = self._config.evaluate
        temperature = settings.temperature if request.temperature is None else request.temperature
        return request.max_new_tokens or settings.max_new_tokens, temperature

    def _together(self, requests: Sequence[Request], batch: int) -> list[str]:
        rows = self._rows(requests, batch)
        self._check_memory(requests, rows)
        with self._inside():
            tokens = np.asarray(generate(self._model, rows, **self._how(requests, len(rows["tokens"]))))
        return [self._text(row) for row in tokens[: len(requests)]]

    def _pieces(self, request: Request, chunk: int) -> Iterator[list[int]]:
        """Yields the ids of the answer as they come."""
        rows = self._rows([request], 1)
        self._check_memory([request], rows)
        for found in stream(self._model, rows, **self._how([request], 1), chunk=chunk):
            yield found[0].tolist()

    def _rows(self, requests: Sequence[Request], batch: int) -> layout.Batch:
        prompts = [
            self._encoder.prompt(as_example(request), request.wording, request.show_images)
            for request in requests
        ]
        view = self._config.data.common_image or ImageConfig()
        pixels = [
            [_pixels(image, request, view) for image in request.images if request.show_images]
            for request in requests
        ]
        return _batch(prompts, pixels, self._config, self._tokenizer.pad, batch)

    def _check_memory(self, requests: Sequence[Request], rows: layout.Batch) -> None:
        """Raises UserError if the answers to these prompts cannot fit in memory."""
        count, tokens = rows["tokens"].shape
        check_answering(self._config.model, self._model, count, tokens + self._kind(requests[0])[0])

    def _how(self, requests: Sequence[Request], rows: int) -> dict:
        """Returns the arguments of `generate` for requests of one kind and copies of the first."""
        new, temperature = self._kind(requests[0])
        key = None
        if temperature:
            seeds = [request.seed for request in requests]
            seeds += seeds[:1] * (rows - len(seeds))
            first = jax.random.key(self._config.seed)
            key = jax.vmap(jax.random.fold_in, (None, 0))(first, np.array(seeds, np.uint32))
        return {
            "max_new_tokens": new,
            "eos": self._tokenizer.eos,
            "pad": self._tokenizer.pad,
            "sampling": Sampling(temperature, self._config.evaluate.top_p),
            "key": key,
        }

    def _text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decodes the tokens before the first end of text."""
        row = [int(token) for token in tokens]
        end = row.index(self._tokenizer.eos) if self._tokenizer.eos in row else len(row)
        return self._tokenizer.decode(row[:end]).strip()

    def _inside(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else inside(self._mesh)


def as_example(request: Request) -> Example:
    """Returns the example whose prompt asks what the request asks.

    Raises UserError for a text that is not Unicode and for earlier turns.
    """
    if not is_text(request.question):
        raise UserError(
            f"request {ascii(request.id or request.question)} holds half of a surrogate pair, which "
            "is no character; mend its question."
        )
    if request.history:
        raise UserError(
            f"request {request.id or request.question!r} has earlier turns, which no prompt form "
            "holds yet; ask it without history."
        )
    keys = tuple(f"image {i}" for i in range(len(request.images)))
    return Example(request.id or "request", request.task, request.question, "", images=keys)


def _pixels(image: str | Path | bytes | np.ndarray, request: Request, view: ImageConfig) -> np.ndarray:
    """Reads an image of a request as uint8 [H, W, 3], by the settings `view` unless it is pixels.

    Raises UserError with the request's name if it is none.
    """
    name = request.id or repr(request.question)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(
                f"request {name} has an image of {image.dtype} {list(image.shape)}; give uint8 "
                "[height, width, 3]."
            )
        return image
    try:
        return images.read_image(image, view)
    except UserError as error:
        raise UserError(f"request {name}: {error}") from error


def prompt_batch(
    encoder: layout.Encoder,
    config: Config,
    pad: int,
    examples: Sequence[Example],
    pixels: Sequence[Sequence[np.ndarray]],
    batch: int | None = None,
) -> layout.Batch:
    """Makes left-padded prompts, one a row, and copies the first up to a power of two rows.

    pixels: of each example its images, uint8 [H, W, 3]; batch: the most rows (default:
    `config.evaluate.batch`).
    """
    prompts = [encoder.prompt(example) for example in examples]
    return _batch(prompts, pixels, config, pad, batch)


def _batch(
    prompts: Sequence[layout.Encoded],
    pixels: Sequence[Sequence[np.ndarray]],
    config: Config,
    pad: int,
    batch: int | None,
) -> layout.Batch:
    """Lays prompts with their images into rows, as `prompt_batch` says."""
    vision = config.model.vision
    groups = [
        layout.Group((prompt,), tuple(images.fit(image, config.data.fit, vision) for image in own))
        for prompt, own in zip(prompts, pixels, strict=True)
    ]
    rows = min(batch or config.evaluate.batch, 1 << (len(groups) - 1).bit_length())
    groups += groups[:1] * (rows - len(groups))
    longest = max(group.questions[0].tokens for group in groups)
    shape = layout.RowShape(
        tokens=-(-longest // BUCKET) * BUCKET,
        images=max(len(group.images) for group in groups),
        answers=0,
        tokens_per_image=config.model.tokens_per_image,
        image_size=vision.image_size,
    )
    return layout.prompt_batch(groups, shape, pad)
