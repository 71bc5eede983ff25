"""Ends a run in an orderly way: after a signal, on a full disk, or if its folder is in use."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from unimed_jax.errors import UserError
from unimed_jax.files import full_disk


class Stopped(BaseException):
    """Ends the program because a signal asked for it; `status` is the exit status to end with.

    `where` continues the sentence after the signal's name, as in ", saved after step 6".
    """

    def __init__(self, number: int, where: str = ""):
        super().__init__(f"stopped by {_name(number)}{where}; the same command continues.")
        self.status = 128 + number


def _name(number: int) -> str:
    """Names a signal as a user knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C raise `Stopped` inside the block, unless `Interruption` delays them."""

    def stop(number, frame):
        raise Stopped(number)

    with _handling(stop, signal.SIGTERM, signal.SIGINT):
        yield


@contextlib.contextmanager
def _handling(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Handles these signals inside the block, and restores the old handlers after it."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Interruption:
    """Delays SIGTERM and the first Ctrl-C until the step is done; a second Ctrl-C ends the process.

    with Interruption() as interruption:
        for ...:
            ...  # a step
            if interruption.reached():
                ...  # save
                raise interruption.stopped(steps_done)

    Several processes must stop after the same step, whichever of them got the signal. They agree on
    it through jax's preemption service, which listens for SIGTERM itself and stops working if
    Python installs its own handler.
    """

    def __init__(self) -> None:
        import jax  # imported here, so that --help does not wait for it

        self._single = jax.process_count() == 1
        self._number: int | None = None  # of the signal
        self._steps = 0  # the service counts from the start of the process, not of the run
        self._context = contextlib.ExitStack()

    def __enter__(self) -> "Interruption":
        numbers = (signal.SIGINT, signal.SIGTERM) if self._single else (signal.SIGINT,)
        self._context.enter_context(_handling(self._ask, *numbers))
        return self

    def __exit__(self, *error) -> None:
        self._context.close()
        if not self._single:
            # Nothing asks the service any more, so SIGTERM goes back to Python's handler.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def _ask(self, number: int, frame: Any) -> None:
        """Notes a signal; the second Ctrl-C ends the process."""
        again = number == self._number == signal.SIGINT
        # os.write, because the signal may come in the middle of a print.
        if again:
            os.write(
                2,
                b"\nunimed_jax: stopped at once; the same command continues from the last checkpoint.\n",
            )
            os._exit(128 + number)
        os.write(
            2,
            f"\n{_name(number)}: finishing this step and saving (Ctrl-C twice stops at once)\n".encode(),
        )
        self._number = number
        if number == signal.SIGINT and not self._single:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Says whether to stop now; every process must ask exactly once after every step."""
        if self._single:
            return self._number is not None
        from jax.experimental import multihost_utils

        self._steps += 1
        return multihost_utils.reached_preemption_sync_point(self._steps)

    def stopped(self, step: int) -> Stopped:
        """Makes the exception to raise once step number `step` has been saved."""
        return Stopped(self._number or signal.SIGTERM, f", saved after step {step}")


# ---- one run, one folder ---------------------------------------------------------------------------
_claims: dict[Path, TextIO] = {}  # lock file -> the open file that holds the lock until the process ends


def claim(folder: Path) -> None:
    """Locks `folder` against other runs until this process ends, however it ends.

    The lock outlives training, because the evaluation writes there, too. If a run has several
    processes, the first one locks for all. Raises UserError if another run has the lock.
    """
    import jax

    file = folder.resolve() / "lock"
    if jax.process_index() != 0 or file in _claims:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = file.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise UserError(
            f"{folder} is in use by the run of {owner}; wait until that has ended, or choose another --workdir."
        ) from error
    except OSError as error:  # some network file systems do not support locks
        print(
            f"unimed_jax: {folder} cannot be locked ({error.strerror}); start no second run in it.",
            file=sys.stderr,
        )
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
    lock.flush()
    _claims[file] = lock


# ---- disks -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def explain_full_disk() -> Iterator[None]:
    """Turns an error that a full disk caused, in whatever words, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = full_disk(error, *(lock.parent for lock in _claims))
        if not full:
            raise
        raise UserError(
            f"{full}{_place(error)}; free some space and give the same command again: a run continues from its last "
            "checkpoint."
        ) from error


def _place(error: BaseException | None) -> str:
    """Names the file that an error, or what caused it, is about, in parentheses; empty if none names one."""
    while error is not None:
        file = getattr(error, "filename", None) or next(iter(re.findall(r'"(/[^"]+)"', str(error))), None)
        if file:
            return f" ({file})"
        error = error.__cause__ or error.__context__
    return ""
