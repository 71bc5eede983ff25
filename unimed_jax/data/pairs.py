"""Reads tables of pictures, questions and answers, as the Hugging Face hub has many sets.

The columns are `image`, `question` and `answer`. The names of the pictures and the kinds of answers
are lost in this form.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from unimed_jax.data.example import Example
from unimed_jax.data.records import picture_of, word
from unimed_jax.data.tables import rows

Pairs = Iterator[tuple[Example, tuple[Path | bytes, ...]]]


def pairs(
    files: Iterable[Path],
    folder: Path,
    name: str,
    example: Callable[[str, str, str, str], Example],
    skipped: list[str],
) -> Pairs:
    """Yields an example of each row with its picture; a row without a picture is skipped by name.

    name: the id, with {} for the row's number over all files. example: makes the example from its
    id, question, answer and the key of its picture.
    """
    for number, (where, record) in enumerate(rows(files)):
        found = picture_of(record.get("image"), folder, where)
        if isinstance(found, str):
            skipped.append(f"{name.format(number)}: {found}")
            continue
        key, source = found
        question = word(record, "question", where, required=True)
        answer = word(record, "answer", where, numbers=True)
        yield example(name.format(number), question, answer, key), (source,)


def kind_of(answer: str) -> str:
    """Guesses the kind of a question from its answer: CLOSED if it is yes or no, else OPEN."""
    return "CLOSED" if answer.strip().lower() in ("yes", "no") else "OPEN"


def guessed(answer: str) -> dict[str, str]:
    """Describes a question whose kind no field says, and says that it is a guess."""
    kind = kind_of(answer)
    return {"template": kind.lower(), "answer_type": kind, "answer_type_from": "yes/no rule"}
