"""Defines `UserError`, the one exception whose text is written for the user."""

import difflib
import re
from collections.abc import Iterable

LONGEST = 2000  # characters of a sentence that are kept: whatever a file says may be quoted in it
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """Reports a mistake that the user can mend: one sentence of what is wrong, where, what to do.

    Control characters that it quotes are escaped, and of a very long one the middle is left out.
    """

    status = 2  # the exit status of the program; launchers do not repeat a command that ended so

    def __init__(self, sentence: str):
        sentence = " ".join(sentence.splitlines())
        sentence = _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], sentence)
        if len(sentence) > LONGEST:
            sentence = f"{sentence[: LONGEST - 300]} ... {sentence[-295:]}"
        super().__init__(sentence)


class PassingError(UserError):
    """Reports a failure outside this machine that may be over at the next try.

    Its exit status lets launchers repeat the command.
    """

    status = 1


def misspelt(word: str, words: Iterable[str]) -> str:
    """Returns the first of some words that differs from a word as a misspelling does, or "".

    One letter is missing, added, wrong or swapped with the next one; or only capitals and signs
    between the letters differ. Words of up to three letters are never taken for another, and neither
    are those that differ in a digit.
    """
    wanted = _letters(word)
    for other in words:
        a, b = wanted, _letters(other)
        while a and b and a[0] == b[0]:
            a, b = a[1:], b[1:]
        while a and b and a[-1] == b[-1]:
            a, b = a[:-1], b[:-1]
        one = max(len(a), len(b)) < 2 or (len(a) == 2 and a == b[::-1])
        if one and len(wanted) > 3 and other != word and not re.search(r"\d", a + b):
            return other
    return ""


def _letters(word: str) -> str:
    return "".join(c for c in word.casefold() if c.isalnum())


def nearest(word: str, choices) -> str:
    """Ends a sentence with `; did you mean 'X'?` if a choice is similar, else with a full stop.

    Capitals play no part.
    """
    folded = {str(choice).casefold(): str(choice) for choice in choices}
    match = difflib.get_close_matches(str(word).casefold(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[match[0]]!r}?" if match else "."
