"""Runs a verb: `python -m unimed_jax.main [verb] --config=FILE | --run=DIR`.

Every file of verbs/ is a verb; its first line says what it does, and `<verb> --help` lists its
arguments.
"""

import importlib
import io
import os
import pkgutil
import select
import signal
import sys
from collections.abc import Sequence

from unimed_jax import processes, verbs
from unimed_jax.errors import UserError, nearest
from unimed_jax.interruption import (
    Stoppable,
    Stopped,
    claims_end,
    explain_system_errors,
    system_sentence,
)

VERBS = sorted(name for _, name, _ in pkgutil.iter_modules(verbs.__path__) if name != "options")


def main(argv: list[str] | None = None) -> int:
    """Runs a verb (`train` if none is named) and returns the exit status.

    A mistake that the user can mend is one sentence on stderr and status 2, a failure outside this
    machine status 1; a stop by SIGTERM or Ctrl-C is one sentence and status 143 or 130. If nobody
    reads the output any more, as in `| head -1`, it ends silently with status 141, that of
    SIGPIPE.
    """
    argv = sys.argv[1:] if argv is None else argv
    # transformers would miss PyTorch, which nothing here needs
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        try:
            return _answer(argv)
        finally:
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()  # here, since Python would only print the error
    except BrokenPipeError as error:
        if closed := _closed_outputs():
            _redirect(closed)
            return 128 + signal.SIGPIPE
        return _say(system_sentence(error), UserError.status)
    except OSError as error:  # the flush fails, for example on a full disk
        _redirect([1])
        return _say(system_sentence(error), UserError.status)


def _answer(argv: list[str]) -> int:
    """Runs what the arguments ask for; turns its errors into sentences and exit statuses."""
    _keep_printable()
    try:
        _check_words(argv)
        if argv[:1] in (["--help"], ["-h"]):
            print(_help())
            return 0
        verb = argv[0] if argv and not argv[0].startswith("-") else "train"
        if verb not in VERBS:
            raise UserError(
                f"{verb!r} is not a verb{nearest(verb, VERBS)} Choose from {', '.join(VERBS)}."
            )
        with (
            processes.quiet(),
            Stoppable(),
            claims_end(),
            explain_system_errors(),
            processes.explain_lost_process(),
        ):
            _check_working_directory()
            processes.join()
            return _module(verb).run(argv[1:] if argv[:1] == [verb] else argv) or 0
    except UserError as error:
        return _say(str(error), error.status)
    except Stopped as stop:
        return _say(str(stop), stop.status)
    except KeyboardInterrupt:  # raised by code, since a signal is a `Stopped`
        return _say("stopped; the same command goes on.", 128 + signal.SIGINT)
    return 0


def _say(sentence: str, status: int) -> int:
    """Prints a sentence on stderr, on one line whatever it quotes, and returns the status."""
    line = " ".join(sentence.splitlines())
    shown = line.translate({code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]})
    for stream in (sys.stderr, sys.__stderr__):
        if stream is not None and not stream.closed:  # as a config file may have done with the first
            print(f"unimed_jax: {shown}", file=stream)
            break
    return status


def _keep_printable() -> None:
    """Lets a letter that the terminal's encoding lacks be printed as its code; Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_words(words: Sequence[str]) -> None:
    """Refuses an argument that is not valid text, which no settings, path or prompt could hold."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = word.encode(errors="backslashreplace").decode().replace("\\udc", "\\x")
            encoding = sys.getfilesystemencoding()
            raise UserError(
                f"argument {shown} is not text in {encoding}; write it in that encoding, or in "
                "plain letters."
            ) from None


def _check_working_directory() -> None:
    """Refuses a working directory that somebody has removed."""
    try:
        os.getcwd()
    except OSError:
        raise UserError(
            "the working directory does not exist any more; change to one that does."
        ) from None


def _closed_outputs() -> list[int]:
    """Returns which of stdout and stderr are pipes that nobody reads any more."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)  # reports errors only
    return [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]


def _redirect(descriptors: Sequence[int]) -> None:
    """Sends what Python still holds back to nowhere, so that its end says nothing of a broken pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _module(verb: str):
    return importlib.import_module(f"unimed_jax.verbs.{verb}")


def _help() -> str:
    lines = [f"  {verb:10} {(_module(verb).__doc__ or '').splitlines()[0]}" for verb in VERBS]
    return f"{__doc__}\nverbs (without one: train):\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
