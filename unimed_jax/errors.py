"""Defines `UserError`, the one exception whose text is written for the user."""

import difflib


class UserError(Exception):
    """Reports a mistake that the user can mend: one sentence of what is wrong, where, what to do."""

    status = 2  # the exit status of the program; launchers do not repeat a command that ended so


class PassingError(UserError):
    """Reports a failure outside this machine that may be over at the next try, so launchers repeat the command."""

    status = 1


def nearest(word: str, choices) -> str:
    """Ends a sentence with `; did you mean 'X'?` if a choice is similar, else with a full stop."""
    match = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else "."
