"""Describes questions to a model, and turns them into prompts and pixels."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np

from unimed_jax.config import VISUAL_TASKS, Config, ImageConfig
from unimed_jax.consistency import lacks_expert
from unimed_jax.data import fitting, images, layout
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.parsing import is_text


class Picture:
    """Names an image that is read when the model needs it, and may be asked about many times.

    Pictures of one `key` are the same image, whose visual tokens several questions may share.
    """

    def __init__(self, name: str, read: Callable[[], np.ndarray], among: Hashable = None):
        """Takes its name, a function that returns uint8 [H, W, 3], and what its name is unique in."""
        self.name, self._read = name, read
        self.key = (among, name)
        self._size: list[int] | None = None

    def read(self) -> np.ndarray:
        """Returns the pixels, which are not kept."""
        pixels = self._read()
        self._size = [pixels.shape[1], pixels.shape[0]]
        return pixels

    @property
    def size(self) -> list[int]:
        """Returns its width and height; a picture that was never read is read for that."""
        if self._size is None:
            self.read()
        assert self._size is not None
        return self._size

    def changed(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> "Picture":
        """Returns the picture after a change of its pixels, which `name` tells from others."""
        return Picture(name, lambda: change(self.read()), self.key)


Image = str | Path | bytes | np.ndarray | Picture


@dataclasses.dataclass(frozen=True)
class Request:
    """Describes one question to the model.

    What is None is taken from `config.evaluate`.

    images: paths, file contents as bytes, pixels as uint8 [H, W, 3], or pictures that are read later;
    history: earlier (question, answer) turns, laid out as `forms.Form.following` says; seed: of the
    draws if the temperature is not 0; id: names the request in messages; wording: which instruction of
    the task's pool asks (data/forms.py); show_images: False for a prompt without the images' visual
    tokens, which tells what the words alone give.
    """

    task: str
    question: str = ""
    images: tuple[Image, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    id: str = ""
    wording: int = 0
    show_images: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Holds what the model needs of a request."""

    encoded: layout.Encoded
    images: tuple[Image, ...]  # those that it is shown
    most: int  # tokens of the answer
    temperature: float
    seed: int
    name: str  # of the request, in messages


class Prompts:
    """Turns requests into prompts under the settings of one run."""

    def __init__(self, config: Config, tokenizer: Tokenizer, keeps: bool = True):
        """Takes whether the ids of texts are kept for the next time; False for texts of others."""
        self._config = config
        self._view = config.data.common_image or ImageConfig()
        self._encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image, keeps)

    def __call__(self, request: Request) -> Prompt:
        """Encodes a request; its images are not read.

        Raises UserError for a request that does not fit its task, is longer than `text.max_prompt`,
        or asks for what no answer can have.
        """
        settings = self._config.evaluate
        encoded = self._encoder.prompt(
            as_example(request), request.wording, request.show_images, request.history
        )
        name = request.id or repr(request.question)
        shown = request.images if request.show_images else ()
        if shown:
            check_expert(self._config, request.task, name)
        most = settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        temperature = settings.temperature if request.temperature is None else request.temperature
        if not 0 <= temperature <= 100:  # NaN is neither
            raise UserError(
                f"request {name} has temperature={temperature}; give 0 (the most probable token), or "
                "more, up to 100."
            )
        most = at_least_one(f"request {name}: max_new_tokens", most)
        return Prompt(encoded, shown, most, temperature, request.seed, name)

    def pixels(self, prompt: Prompt) -> tuple[np.ndarray, ...]:
        """Reads the images as the encoder takes them, uint8 [size, size, 3] each.

        They share no memory with the request's own arrays, which the caller may fill with the next
        picture while the request waits. Raises UserError with the request's name for what is no image.
        """
        fit, vision = self._config.data.fit, self._config.model.vision
        pixels = []
        for image in prompt.images:
            fitted = fitting.fit(self._read(image, prompt.name), fit, vision)
            shares = isinstance(image, np.ndarray) and np.may_share_memory(fitted, image)
            pixels.append(fitted.copy() if shares else fitted)
        return tuple(pixels)

    def _read(self, image: Image, name: str) -> np.ndarray:
        if isinstance(image, Picture):
            return image.read()
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise UserError(
                    f"request {name} has an image of {image.dtype} {list(image.shape)}; give uint8 "
                    "[height, width, 3]."
                )
            return image
        try:
            return images.read_image(image, self._view)
        except UserError as error:
            raise UserError(f"request {name}: {error}") from error


def at_least_one(name: str, number: int) -> int:
    """Returns the number; raises UserError with its name if it is less than 1."""
    if number < 1:
        raise UserError(f"{name}={number} asks for nothing; give at least 1.")
    return number


def check_expert(config: Config, task: str, name: str) -> None:
    """Raises UserError for a request with images whose task has no expert under the hard router."""
    connector = config.model.connector
    if lacks_expert(connector, task):
        raise UserError(
            f"request {name}: the hard router sends task {task!r} to expert "
            f"{VISUAL_TASKS.index(task)}, and this model has {connector.experts}; ask for another task."
        )


def shared_by(prompt: Prompt) -> Hashable:
    """Returns what is equal for questions that may enter after one copy of what they share."""
    encoded = prompt.encoded
    if not len(encoded.prefix):
        return encoded.task
    return encoded.task, encoded.prefix.tobytes(), tuple(map(_identity, prompt.images))


def _identity(image: Image) -> Hashable:
    """Returns what is equal for two images that have the same pixels as far as one can know cheaply."""
    if isinstance(image, Picture):
        return image.key
    if isinstance(image, np.ndarray):
        digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        return (image.shape, str(image.dtype), digest)
    return hashlib.blake2b(image, digest_size=16).digest() if isinstance(image, bytes) else str(image)


def as_example(request: Request) -> Example:
    """Returns the example whose prompt asks what the request asks, without earlier turns.

    Raises UserError for a text that is not Unicode.
    """
    if not all(map(is_text, [request.question, *itertools.chain(*request.history)])):
        raise UserError(
            f"request {ascii(request.id or request.question)} holds half of a surrogate pair, which "
            "is no character; mend its question."
        )
    keys = tuple(f"image {i}" for i in range(len(request.images)))
    return Example(request.id or "request", request.task, request.question, "", images=keys)
