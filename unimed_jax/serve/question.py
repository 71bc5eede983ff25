"""Makes of what both APIs were sent one question to the model, with its pictures decoded."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from unimed_jax.config import TASKS, Config
from unimed_jax.data import fitting
from unimed_jax.data.box_text import box_to_text, valid_box
from unimed_jax.data.forms import is_cut, tagged
from unimed_jax.errors import UserError, nearest
from unimed_jax.predict.request import Request
from unimed_jax.serve.fields import Fields
from unimed_jax.serve.limits import Limits, wrong
from unimed_jax.serve.pictures import content_of, picture_of

NEEDS_TEXT = ("vqa", "qa", "refer", "identify")
ONE_IMAGE = ("refer", "identify")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Says how an answer is drawn."""

    max_tokens: int
    temperature: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """Holds one question to the model."""

    request: Request  # whose images are fitted to the encoder
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each picture, upright by its EXIF


def sampling_of(fields: Fields, limits: Limits, most: str = "max_tokens") -> Sampling:
    """Reads length, temperature and seed; a length beyond the limit is cut to it, as a bound is."""
    tokens = fields.whole(most, 1, 1 << 31)
    temperature = fields.number("temperature", 0, 2) or 0.0
    if 0 < temperature < 0.01:
        raise wrong("'temperature' must be 0 (the most probable token) or from 0.01 to 2; change it.")
    seed = fields.whole("seed", -(1 << 63), (1 << 64) - 1)
    drawn = secrets.randbelow(1 << 32) if seed is None else seed % (1 << 32)
    return Sampling(min(tokens or limits.max_tokens, limits.max_tokens), temperature, drawn)


def task_of(name: str | None, text: str, has_images: bool) -> tuple[str, str]:
    """Returns task and question: by the field, else by the tag that begins the text, else by the images.

    Raises Refused for a task that is unknown, or that the tag contradicts.
    """
    tag, rest = tagged(text)
    if name is not None and name not in TASKS:
        raise wrong(
            f"the task {name[:40]!r} is unknown{nearest(name[:40], TASKS)} Choose from "
            f"{', '.join(TASKS)}.",
            "unknown_task",
        )
    if name is not None and tag is not None and tag != name:
        raise wrong(f"the text begins with [{tag}] and the task is {name!r}; leave one of them out.")
    return name or tag or ("vqa" if has_images else "qa"), rest


def question_of(
    config: Config,
    limits: Limits,
    task: str,
    question: str,
    urls: Sequence[Any],
    turns: Sequence[tuple[str, str]],
    sampling: Sampling,
    box: Sequence[float] | None = None,
) -> Asked:
    """Checks a question, decodes its pictures and fits them to the encoder.

    box: in pixels of the first picture, for `identify`. Raises Refused with one sentence.
    """
    if len(urls) > limits.images:
        raise wrong(
            f"the request has {len(urls)} images, more than the {limits.images} that are "
            "read; send fewer.",
            "too_many_images",
        )
    characters = len(question) + sum(len(asked) + len(said) for asked, said in turns)
    if characters > limits.characters or len(turns) > limits.turns:
        raise wrong(
            f"the request has {len(turns)} earlier turns and {characters} characters, and the model "
            f"reads {limits.turns} and {limits.characters} at most; leave out the oldest turns.",
            "context_length_exceeded",
        )
    for number, (asked, _) in enumerate(turns):
        tag = tagged(asked)[0]
        if tag is not None and (tag == "qa") == bool(urls):
            kept = "is text only, and the request has images" if urls else "needs an image"
            raise wrong(f"earlier question {number} begins with [{tag}], which {kept}; leave that out.")
    if task == "qa" and urls:
        raise wrong("the task 'qa' is text only; use 'vqa' for a question about an image.")
    if task != "qa" and not urls:
        raise wrong(f"the task {task!r} needs an image; send one, or use 'qa' for text alone.")
    if task in ONE_IMAGE and len(urls) > 1:
        raise wrong(f"the task {task!r} is about one image, not {len(urls)}; send one.")
    if task in NEEDS_TEXT and not question.strip() and box is None:
        needs = " or a box" if task == "identify" else ""
        raise wrong(f"the task {task!r} needs a question{needs}; send one.", "missing_field")
    if any(is_cut(words, bool(urls), task, config.text) for words in (question, *(q for q, _ in turns))):
        raise wrong(
            f"this model reads the first {config.text.max_words} words of a question, as it was "
            "trained, and this one, or an earlier one, has more; shorten it.",
            "context_length_exceeded",
        )
    if box is not None and task != "identify":
        raise wrong(f"the task {task!r} takes no box; only 'identify' does.")
    pictures, sizes = [], []
    for number, url in enumerate(urls):
        name = f"image {number}"
        found = picture_of(content_of(url, name, limits), name, config, limits)
        height, width, _ = found.pixels.shape
        sizes.append((width, height))
        pictures.append(fitting.fit(found.pixels, config.data.fit, config.model.vision))
    if task == "identify":
        question = _box_question(question, box, sizes[0])
    request = Request(
        task,
        question,
        tuple(pictures),
        tuple(turns),
        sampling.max_tokens,
        sampling.temperature,
        sampling.seed,
        id="of this call",
    )
    return Asked(request, tuple(sizes))


def _box_question(question: str, box: Sequence[float] | None, size: tuple[int, int]) -> str:
    """Returns the text form of a box, which is in pixels, or else the question's own."""
    if box is not None:
        try:
            question = box_to_text(box, *size)
        except UserError as error:
            raise wrong(str(error), "invalid_box") from error
        if valid_box(question) is None:
            raise wrong(
                "the box is thinner than a hundredth of the image; make it larger.", "invalid_box"
            )
    if valid_box(question) is None:
        raise wrong(
            "the question of 'identify' is a box: {<x1><y1><x2><y2>} in hundredths of the image, with "
            "x1 < x2 and y1 < y2, at most 100.",
            "invalid_box",
        )
    return question
