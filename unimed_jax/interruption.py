"""What ends a run early, and how: a signal, a full disk, another run in the same folder."""

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from unimed_jax.errors import UserError


class Stopped(BaseException):
    """A signal asked for the end. Says where the run stands; `status` is the exit status that goes with it."""

    def __init__(self, number: int, where: str = ""):
        super().__init__(f"stopped by {_name(number)}{where}; the same command continues.")
        self.status = 128 + number


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within it, SIGTERM and Ctrl-C raise `Stopped` at once, except where `Interruption` makes them wait."""

    def stop(number, frame):
        raise Stopped(number)

    with _handling(stop, signal.SIGTERM, signal.SIGINT):
        yield


@contextlib.contextmanager
def _handling(handler, *numbers: int) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Interruption:
    """Lets SIGTERM and the first Ctrl-C wait until the step under way is done; a second Ctrl-C ends the process.

    with Interruption() as interruption:
        for ...:
            ...  # a step
            if interruption.reached():
                ...  # save
                raise interruption.stopped(steps_done)

    Several processes must stop after the same step, whichever of them got the signal: then SIGTERM is left to
    jax's preemption service, which lets them agree, and which a handler in Python would put out of work.
    """

    def __init__(self) -> None:
        import jax  # this file is read by the door, which answers --help without it

        self._alone = jax.process_count() == 1
        self._number: int | None = None  # of the signal
        self._steps = 0  # the service knows no other steps than those of this process's life
        self._context = contextlib.ExitStack()

    def __enter__(self) -> "Interruption":
        numbers = (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,)
        self._context.enter_context(_handling(self._ask, *numbers))
        return self

    def __exit__(self, *error) -> None:
        self._context.close()
        if not self._alone:  # from here on nobody asks the service
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def _ask(self, number, frame) -> None:
        again = number == self._number == signal.SIGINT
        # Not print: a handler may run in the middle of one.
        if again:
            os.write(2, b"\nunimed_jax: stopped at once; the same command continues from the last checkpoint.\n")
            os._exit(128 + number)
        os.write(2, f"\n{_name(number)}: finishing this step and saving (Ctrl-C twice stops at once)\n".encode())
        self._number = number
        if number == signal.SIGINT and not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Whether to stop after this step; to be asked once after every step, by every process."""
        if self._alone:
            return self._number is not None
        from jax.experimental import multihost_utils

        self._steps += 1
        return multihost_utils.reached_preemption_sync_point(self._steps)

    def stopped(self, step: int) -> Stopped:
        return Stopped(self._number or signal.SIGTERM, f", saved after step {step}")


# ---- one run, one folder ---------------------------------------------------------------------------
_claims: dict[Path, TextIO] = {}


def claim(folder: Path) -> None:
    """Keeps other processes from training in `folder` until this one ends, however it ends.

    Not only until training ends: the evaluation writes there too. Of several processes the first one claims for
    all. Raises UserError where another run has it.
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
    except OSError as error:  # some network file systems know no locks
        print(f"unimed_jax: {folder} cannot be locked ({error.strerror}); start no second run in it.", file=sys.stderr)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
    lock.flush()
    _claims[file] = lock


# ---- disks -----------------------------------------------------------------------------------------
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def full_disk_told() -> Iterator[None]:
    """Turns the many errors that a full disk causes, and those that they cause in turn, into a UserError."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            # What writes arrays raises ValueErrors that quote the system's number.
            quoted = re.search(r"os_error_code='(\d+)'", str(cause))
            number = int(quoted[1]) if quoted else getattr(cause, "errno", None)
            if number in FULL:
                raise UserError(
                    f"{os.strerror(number)}{_place(cause)}; free some space and give the same command again: a run "
                    "continues from its last checkpoint."
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _place(error: BaseException) -> str:
    file = getattr(error, "filename", None) or next(iter(re.findall(r'"(/[^"]+)"', str(error))), None)
    return f" ({file})" if file else ""
