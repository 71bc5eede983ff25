"""Defines `UserError`, the one exception whose text is written for the user, and makes it of system errors."""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


@contextlib.contextmanager
def explain_system_errors() -> Iterator[None]:
    """Turns what the operating system refuses (a full disk, a file, a folder, a socket) into a UserError.

    A full disk is found behind any error that it caused. Of other refusals only the `OSError` itself is turned, and
    what the library that writes arrays makes of one: an error that follows a handled `OSError` is a defect.
    A broken pipe passes, because it may be that of the program's own output.
    """
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            number = quoted = _quoted(cause)
            if isinstance(cause, OSError):
                number = cause.errno
            if number in FULL:
                raise UserError(
                    f"{os.strerror(number)}{_place(cause)}; free some space and give the same command again: a run "
                    "continues from its last checkpoint."
                ) from error
            if quoted is not None or (cause is error and isinstance(cause, OSError)):
                raise UserError(system_sentence(cause)) from error
            cause = cause.__cause__ or cause.__context__
        raise


def system_sentence(error: BaseException) -> str:
    """Says what the system refused, of which file, and what to do."""
    number = _quoted(error)
    reason = os.strerror(number) if number is not None else getattr(error, "strerror", None)
    reason = reason or " ".join(str(error).split()) or type(error).__name__
    return f"{reason}{_place(error)}; mend that, or choose another path, and give the same command again."


def _quoted(error: BaseException) -> int | None:
    """Reads the system's error number out of a ValueError of the library that writes arrays."""
    quoted = re.search(r"os_error_code='(\d+)'", str(error)) if isinstance(error, ValueError) else None
    return int(quoted[1]) if quoted else None


def _place(error: BaseException) -> str:
    """Names the file that an error is about, in parentheses; empty if it names none."""
    file = getattr(error, "filename", None) or next(iter(re.findall(r'"(/[^"]+)"', str(error))), None)
    if isinstance(file, bytes):
        file = os.fsdecode(file)
    return f" ({file})" if file is not None else ""
