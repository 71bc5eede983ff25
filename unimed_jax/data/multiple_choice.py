"""Reads the options of multiple-choice questions and finds the right one, however they are written."""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unimed_jax.data.records import Record, short
from unimed_jax.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Options = dict[str, str]  # letter -> text
UNFOLDED = {
    "Question": "question",
    "Options": "options",
    "Correct Option": "answer_idx",
    "Correct Answer": "answer",
}
FORMS = ("auto", "letter", "index", "text")  # of an answer


def unfolded(record: Record) -> Record:
    """Gives a record the keys of MedQA where it holds `data` as the hub's openlifescienceai has it.

    There {"Question", "Options", "Correct Option", "Correct Answer"} stand in `data`.
    """
    data = record.get("data")
    if not isinstance(data, dict):
        return record
    return {**record, **{UNFOLDED.get(str(key), str(key)): value for key, value in data.items()}}


def options_of(value: Any, where: str, key: str = "options") -> Options:
    """Reads the options of a question as letter -> text; those that are null or empty are left out.

    They may be {letter: text}, [text], [{"key": letter, "value": text}], {"label": [], "text": []},
    or any of these as a text in the syntax of JSON or Python. Raises UserError for anything else, for
    two options of one letter, and for a list of more texts than there are letters.
    """
    found = parsed(value)
    pairs: list[tuple[Any, Any]] | None = None
    if isinstance(found, dict) and found.keys() == {"label", "text"}:
        labels, texts = found["label"], found["text"]
        if isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts):
            pairs = list(zip(labels, texts, strict=True))
    elif isinstance(found, dict):
        pairs = list(found.items())
    elif isinstance(found, list) and found and all(isinstance(entry, dict) for entry in found):
        pairs = [(entry.get("key"), entry.get("value")) for entry in found]
    elif isinstance(found, list):
        count = 1 + max((i for i, text in enumerate(found) if _text(text)), default=-1)
        if count > len(LETTERS):
            raise UserError(
                f"{where}: {key!r} has {count} options, and there are {len(LETTERS)} letters; give "
                "fewer, or an object with a name for each."
            )
        pairs = list(zip(LETTERS, found, strict=False))
    if pairs is None or not all(
        isinstance(letter, str) and (text is None or type(text) in (str, int, float))
        for letter, text in pairs
    ):
        raise UserError(f"{where}: {key!r} is {short(value)}; give a text for each letter.")
    given = {letter.strip(): _text(text) for letter, text in pairs}
    if len(given) < len(pairs):
        raise UserError(f"{where}: {key!r} is {short(value)}; give a letter of its own for each text.")
    return {letter: text for letter, text in given.items() if text}


def _text(option: Any) -> str:
    return "" if option is None else str(option).strip()


def parsed(value: Any) -> Any:
    """Reads a list or object that is written as text, and returns anything else as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return value


def with_options(question: str, options: Mapping[str, str]) -> str:
    """Returns the question followed by its options."""
    return question + "".join(f" ({letter}) {text}" for letter, text in options.items())


def shown_options(question: str) -> Options:
    """Finds the options that `with_options` put after a question; {} if there are none.

    They are (A), (B), (C) ... without a gap, as many as there are: a letter within an option ("both (A)
    and (B)") is none.
    """
    best: Options = {}
    for first in re.finditer(r" \(A\) ", question):
        starts = [first]
        while len(starts) < len(LETTERS):
            mark = re.compile(rf" \({LETTERS[len(starts)]}\) ")
            following = mark.search(question, starts[-1].end() - 1)
            if following is None:
                break
            starts.append(following)
        ends = [*(mark.start() for mark in starts[1:]), len(question)]
        texts = [question[mark.end() : end] for mark, end in zip(starts, ends, strict=True)]
        if len(texts) >= max(len(best), 2) and all(text.strip() for text in texts):
            best = dict(zip(LETTERS, texts, strict=False))
    return best


def _begins(text: str, letter: str, option: str) -> bool:
    """Says whether a text is an option with its letter before it, as in "(B) lung"."""
    return _plain(_bare(text, letter)) == _plain(option)


def _bare(text: str, letter: str) -> str:
    return re.sub(rf"^\(?{re.escape(letter)}\s*[:.)]\s*", "", text, flags=re.IGNORECASE)


def without_letters(options: Options) -> Options:
    """Drops the letters with which the texts themselves begin ("A: lung"), if all of them do."""
    bare = {letter: _bare(text, letter) for letter, text in options.items()}
    return bare if all(bare[letter] != options[letter] for letter in options) else options


def _with_empty(letters: list[str]) -> list[str]:
    """Adds the letters whose options are empty, as B to A and C; other names than letters stay alone."""
    for known in (LETTERS, LETTERS.lower()):
        if letters and set(letters) <= set(known) and letters == sorted(letters):
            return list(known[: known.index(letters[-1]) + 1])
    return letters


def right_letter(
    options: Options, answer: Any, where: str, form: str = "auto", first: int = 0
) -> tuple[str, str]:
    """Finds the right option of a question as (its letter, why there is none).

    answer: a letter, an index counted from `first` (a number or its digits), or the option's text.
    form: which of them it is, or "auto". Raises UserError for an index out of range, which shows
    that `first` is wrong, and for an answer that could mean two options.
    """
    if isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 1:
        (answer,) = answer
    if answer is None or answer == "" or (type(answer) is float and math.isnan(answer)):
        return "", "it has no answer"
    if type(answer) not in (str, int, float):
        return "", f"its answer is {short(answer)}, not one option"
    text = str(int(answer)) if type(answer) is float and answer.is_integer() else str(answer).strip()
    letters = list(options)
    found: dict[str, str] = {}  # form -> letter
    if form in ("auto", "text") and isinstance(answer, str):
        same = [letter for letter in letters if _plain(options[letter]) == _plain(text)]
        same = same or [letter for letter in letters if _begins(text, letter, options[letter])]
        found |= {"text": same[0]} if same else {}
    if form in ("auto", "letter") and isinstance(answer, str):
        letter = re.sub(r"^\(?(?:option[ _])?([a-z])[).:]?$", r"\1", text.lower())
        same = [known for known in letters if known.lower() == letter]
        found |= {"letter": same[0]} if same else {}
    if form in ("auto", "index") and re.fullmatch(r"-?\d{1,9}", text):
        at = int(text) - first
        if int(text) < 0:
            return "", f"it has no answer ({text})"
        given = _with_empty(letters)  # which an index counts, too
        if 0 <= at < len(given):
            if given[at] not in options:
                return "", f"its right option, {given[at]}, is empty"
            found["index"] = given[at]
        elif not found:
            raise UserError(
                f"{where}: answer {text} is none of {first} to {first + len(given) - 1}, by which its "
                "options are counted; set the option `first`, or mend the record."
            )
    if len({options[letter] for letter in found.values()}) > 1:
        raise UserError(
            f"{where}: answer {short(answer)} may be a {' or a '.join(found)}; set the option `answers`."
        )
    if not found:
        return "", f"its answer {short(answer)} is none of its options"
    return next(iter(found.values())), ""


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")
