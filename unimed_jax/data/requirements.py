"""Checks what every example must be, whichever reader gives it."""

import unicodedata
from collections.abc import Iterator
from typing import Any

from unimed_jax import parsing
from unimed_jax.config import TASKS, VISUAL_TASKS
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError

# categories of Unicode's white space, control and format characters
INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that show nothing


def check(example: Example, name: str) -> None:
    """Raises UserError for an example that no task can use, or whose texts are not texts."""
    where = f"record {name}/{example.id}"
    named = ascii(where)[1:-1]  # an id that is not text cannot be printed
    for field, text in _texts(example):
        if not isinstance(text, str):
            raise UserError(
                f"{ascii(where)[1:-1]}: its {field} is {ascii(text)[:80]}, which is no text; mend "
                "the record."
            )
        if not parsing.is_text(text):
            raise UserError(
                f"{named}: its {field} holds half of a surrogate pair, which is no character "
                f"({ascii(text)[1:-1][:80]}); mend the record."
            )
    if example.task not in TASKS:
        raise UserError(f"{where}: task {example.task!r} is unknown; choose from {', '.join(TASKS)}.")
    visual = example.task in VISUAL_TASKS
    if visual != bool(example.images):
        raise UserError(
            f"{where}: task {example.task!r} "
            + ("needs an image." if visual else "is text alone and takes no image; use 'vqa' for it.")
        )


def _texts(example: Example) -> Iterator[tuple[str, Any]]:
    """Yields every text of an example with the words that name it in errors."""
    yield from (
        ("id", example.id),
        ("task", example.task),
        ("question", example.question),
        ("answer", example.answer),
    )
    yield from (("image", key) for key in example.images)
    yield "cluster", example.cluster
    yield from (("meta", text) for pair in example.meta.items() for text in pair)
    yield from (("earlier turn", text) for turn in example.history for text in turn)


def unanswered(example: Example) -> str:
    """Says which answer of an example is empty or blank, so that nothing can be learnt from it.

    Returns an empty text if none is.
    """
    if _blank(example.answer):
        return "its answer is empty"
    return "an earlier answer is empty" if any(_blank(answer) for _, answer in example.history) else ""


def _blank(text: str) -> bool:
    """Says whether a text shows nothing.

    Such a text holds only white space, control and format characters, and fillers.
    """
    return all(unicodedata.category(c) in INVISIBLE or c in FILLERS for c in text)
