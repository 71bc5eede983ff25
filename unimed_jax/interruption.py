"""Ends a run in an orderly way after a signal or when the system refuses something.

A run whose folder is in use by another one ends as well.
"""

import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from unimed_jax.errors import UserError
from unimed_jax.files import full_disk

REMIND_SECONDS = 0.2  # between two tries to end the block after something swallowed the exception
STUCK_SECONDS = 10.0  # until a signal ends a process that is inside one long call of a library
ONE_SIGNAL_SECONDS = 1.0  # a launcher may send SIGTERM to a process and to its group: that counts once


class Stopped(BaseException):
    """Ends the program because a signal asked for it; `status` is the exit status to end with.

    `where` continues the sentence after the signal's name, as in ", saved after step 6".
    """

    def __init__(self, number: int, where: str = "", then: str = "continues"):
        super().__init__(f"stopped by {_name(number)}{where}; the same command {then}.")
        self.status = 128 + number


def _name(number: int) -> str:
    """Names a signal as a user knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


# ---- signals ---------------------------------------------------------------------------------------
class Stoppable:
    """Makes SIGTERM and Ctrl-C raise `Stopped` inside the block, unless `Interruption` delays them.

    Python raises it wherever the main thread is. In a destructor, in a callback of the garbage
    collector or in a library that catches everything it would be lost; then it is raised again
    until it leaves the block. The second signal of a kind ends the process at once. Both happen
    even while the main thread is inside a long call of a library, where Python handles no signals:
    a thread of its own listens to them.
    """

    current: "Stoppable | None" = None  # the object whose block runs

    def __init__(self, numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self.number: int | None = None  # the first signal, once the main thread has seen it
        self.delayed = False  # whether an `Interruption` delays the signal
        self.doing = "finishing this step and saving"  # while it is delayed
        self.passes_on = False  # Ctrl-C, as SIGTERM, to the service by which processes agree
        self._numbers = numbers
        self._seen: dict[int, float] = {}  # signal -> when the main thread saw the first of it
        self._leaves = False  # the handler only notes, since the block ends
        self._reminds = False  # the next signal is a reminder of the first one
        self._context = contextlib.ExitStack()

    def __enter__(self) -> "Stoppable":
        later = self._context.callback
        self._main = threading.get_ident()
        self._ear, self._mouth = os.pipe()
        for descriptor in (self._ear, self._mouth):
            os.set_blocking(descriptor, False)
            later(os.close, descriptor)
        later(setattr, Stoppable, "current", Stoppable.current)
        Stoppable.current = self
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        later(setattr, sys, "unraisablehook", self._hook_before)
        for number in self._numbers:
            later(signal.signal, number, signal.signal(number, self._handle))
        later(signal.set_wakeup_fd, signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False))
        thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        thread.start()
        later(thread.join)
        later(os.write, self._mouth, b"\0")  # ends the thread
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leaves = True
        self._context.close()
        if (
            self.number is not None
            and not isinstance(error, Stopped)
            and (error is None or _follows_stop(error))
        ):
            raise Stopped(self.number) from error

    def _handle(self, number: int, frame: Any) -> None:
        """Notes a signal, in the main thread, and raises `Stopped` where that can end the block."""
        if self._reminds:
            self._reminds = False
        else:
            _note(self._seen, number)
            if self.delayed:
                _tell(f"\n{_name(number)}: {self.doing} (Ctrl-C twice stops at once)\n")
            self.number = self.number or number
            if self.delayed and self.passes_on and number == signal.SIGINT:
                os.kill(os.getpid(), signal.SIGTERM)
        if not (self.delayed or self._leaves or _follows_stop(sys.exception())):
            raise Stopped(self.number or number)

    def _listen(self) -> None:
        """Counts signals in its own thread; sends a lost one again, ends a process that is stuck."""
        seen: dict[int, float] = {}
        echo = False  # a reminder is on its way, and will be read here
        while True:
            if select.select([self._ear], [], [], REMIND_SECONDS if seen else None)[0]:
                for number in os.read(self._ear, 64):
                    if number == 0:
                        return
                    if echo:
                        echo = False
                    elif number in self._numbers:
                        _note(seen, number)
            elif self.delayed or self._leaves or echo:
                continue
            elif self.number is not None:
                self._reminds = echo = True
                signal.pthread_kill(self._main, self.number)
            elif time.monotonic() - min(seen.values()) > STUCK_SECONDS:
                _end(min(seen), str(Stopped(min(seen))))

    def _unraisable(self, unraisable: Any) -> None:
        """Keeps Python from printing a swallowed `Stopped`, which will be raised again."""
        if not isinstance(unraisable.exc_value, Stopped):
            self._hook_before(unraisable)


def _follows_stop(error: BaseException | None) -> bool:
    """Says whether a `Stopped` is being raised or handled: the error, or one that it followed."""
    for _ in range(100):
        if error is None or isinstance(error, Stopped):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, Stopped)


def _note(seen: dict[int, float], number: int) -> None:
    """Keeps when the first signal of a kind came; ends the process if this is the second."""
    now = time.monotonic()
    if number in seen and (number == signal.SIGINT or now - seen[number] > ONE_SIGNAL_SECONDS):
        _end(number, "stopped at once; the same command continues from the last checkpoint.")
    seen.setdefault(number, now)


def _tell(text: str) -> None:
    """Writes to stderr without Python's buffers.

    A signal may come in the middle of a print, which uses them.
    """
    with contextlib.suppress(OSError):  # a closed or broken pipe
        os.write(2, text.encode())


def _end(number: int, sentence: str) -> NoReturn:
    """Ends the process as it is; whatever was being written is under a temporary name."""
    _tell(f"\nunimed_jax: {sentence}\n")
    os._exit(128 + number)


def _in_child() -> None:
    """Keeps signals that a forked child gets from its parent's thread."""
    if Stoppable.current is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_child)


class Interruption:
    """Delays SIGTERM and the first Ctrl-C until the step is done; a second one ends the process.

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
        self._steps = 0  # the service counts from the start of the process, not of the run
        self._context = contextlib.ExitStack()

    def __enter__(self) -> "Interruption":
        numbers = (signal.SIGTERM, signal.SIGINT) if self._single else (signal.SIGINT,)
        self._signals = Stoppable.current or self._context.enter_context(Stoppable(numbers))
        self._signals.delayed, self._signals.passes_on = True, not self._single
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        self._signals.delayed = False
        if not self._single:
            # Nothing asks the service any more, so SIGTERM goes back to Python's handler.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        self._context.__exit__(kind, error, trace)
        if error is None and self._signals.number is not None:  # the signal came after the last question
            raise Stopped(self._signals.number)

    def reached(self) -> bool:
        """Says whether to stop now; every process must ask exactly once after every step."""
        if self._single:
            return self._signals.number is not None
        from jax.experimental import multihost_utils

        self._steps += 1
        return multihost_utils.reached_preemption_sync_point(self._steps)

    def stopped(self, step: int) -> Stopped:
        """Makes the exception to raise once step number `step` has been saved."""
        return Stopped(self._signals.number or signal.SIGTERM, f", saved after step {step}")


# ---- one run, one folder ---------------------------------------------------------------------------
_claims: dict[Path, TextIO] = {}  # lock file -> the open file that holds the lock until the process ends


def claim(folder: Path, otherwise: str = "choose another --workdir") -> None:
    """Locks `folder` against other runs until this process or its command ends, however it ends.

    Whoever trains and then evaluates claims the folder before both. If a run has several processes,
    the first one locks for all. Raises UserError if another run has the lock (`otherwise` is what
    can be done instead of waiting), or if the folder cannot exist.
    """
    import jax

    file = folder.resolve() / "lock"
    if jax.process_index() != 0 or file in _claims:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = file.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{folder} cannot hold a run ({error.strerror}); {otherwise}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise UserError(
            f"{folder} is in use by the run of {owner}; wait until that has ended, or {otherwise}."
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


@contextlib.contextmanager
def claims_end() -> Iterator[None]:
    """Gives back the folders that were claimed inside the block, when it ends.

    It can decorate a function, too: its call is then the block.
    """
    before = set(_claims)
    try:
        yield
    finally:
        for file in set(_claims) - before:
            _claims.pop(file).close()


def owner(folder: Path) -> str:
    """Names the process that has claimed a run's folder; empty without one, and for this process."""
    file = folder.resolve() / "lock"
    if file in _claims:
        return ""
    try:
        with file.open(encoding="utf-8", errors="replace") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "another process"
    except OSError:  # there is no such run, or the file system has no locks
        pass
    return ""


# ---- what the system refuses -----------------------------------------------------------------------
@contextlib.contextmanager
def explain_system_errors() -> Iterator[None]:
    """Turns what the operating system refuses into a UserError.

    It may refuse a file, a folder or a socket, or the disk may be full.

    A full disk is recognised as the cause of any error, however that is worded. Of other refusals
    only the `OSError` itself is turned, and what the library that writes arrays makes of one: an
    error that follows an `OSError` which was handled is a defect. A broken pipe passes, because it
    may be that of the program's own output.
    """
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        full = full_disk(error, *(lock.parent for lock in _claims))
        if full:
            raise UserError(
                f"{full}{_place(error)}; free some space and give the same command again: a run "
                "continues from its last checkpoint."
            ) from error
        if isinstance(error, OSError) or _quoted(error) is not None:
            raise UserError(system_sentence(error)) from error
        raise


def system_sentence(error: BaseException) -> str:
    """Says what the system refused, of which file, and what to do."""
    number = _quoted(error)
    reason = os.strerror(number) if number is not None else getattr(error, "strerror", None)
    reason = reason or " ".join(str(error).split()) or type(error).__name__
    return (
        f"{reason}{_place(error)}; mend that, or choose another path, and give the same command again."
    )


def _quoted(error: BaseException) -> int | None:
    """Reads the system's error number out of a ValueError of the library that writes arrays."""
    quoted = re.search(r"os_error_code='(\d+)'", str(error)) if isinstance(error, ValueError) else None
    return int(quoted[1]) if quoted else None


def _place(error: BaseException | None) -> str:
    """Names the file that an error, or what caused it, is about, in parentheses.

    The answer is empty if no error names a file.
    """
    while error is not None:
        file = getattr(error, "filename", None) or next(
            iter(re.findall(r'"(/[^"]+)"', str(error))), None
        )
        if file:
            return f" ({os.fsdecode(file) if isinstance(file, bytes) else file})"
        error = error.__cause__ or error.__context__
    return ""
