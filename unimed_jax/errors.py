"""`UserError`, the one exception whose text a person reads, and the suggestion of a nearest word."""

import difflib


class UserError(Exception):
    """A mistake that a person can mend: one sentence of what, where and what to do."""


def nearest(word: str, choices) -> str:
    """The end of a sentence: `; did you mean 'X'?` when something close is among `choices`, else a full stop."""
    match = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else "."
