"""Starts JAX and lets several processes work as one run: how they connect, and which one writes.

The environment says whether a process belongs to a run of several (the scripts in launch/ set it):
JAX_NUM_PROCESSES=auto if the machine knows the others, as a TPU pod does, else a number together
with JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS. All processes run the same program; only process 0
logs and writes what is not sharded. UNIMED_START_SECONDS says how long they wait for each other. The
functions import jax themselves, so that --help does not wait for it.
"""

import contextlib
import functools
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

from unimed_jax.errors import PassingError, UserError

DEAD_AFTER = 30  # seconds without a heartbeat until a process counts as dead
# for which processes wait for each other at the start; UNIMED_START_SECONDS changes it
START_SECONDS = 300
# for which a coordinator's name may be unknown: a cluster learns the names of its machines late
NAME_SECONDS = 30


# ---- start -----------------------------------------------------------------------------------------
def start() -> None:
    """Imports JAX and finds its devices, so that what hinders either is one sentence (UserError)."""
    flags = os.environ.get("XLA_FLAGS", "")
    if reason := _wrong_flag(flags):
        raise UserError(
            f"JAX cannot start with XLA_FLAGS={flags!r} in the environment ({reason}); change or "
            "unset it."
        )
    try:
        import jax

        jax.devices()
    except Exception as error:  # JAX and its plugins raise many kinds
        # Without its hint, which takes JAX_PLATFORMS for what is wrong.
        reason = re.sub(r" \((set|you may) .*JAX_PLATFORMS.*\)$", "", _reason(error))
        reason = reason or "no device of the kind that is asked for"
        named = [
            name for name in os.environ if name.startswith("JAX_") and name.lower() in reason.lower()
        ]
        wanted = named or ["JAX_PLATFORMS", *(["XLA_FLAGS"] if flags else [])]
        given = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in wanted)
        kind = PassingError if os.environ.get("JAX_NUM_PROCESSES", "1") != "1" else UserError
        raise kind(
            f"JAX cannot start with {given} in the environment ({reason}); change or unset them."
        ) from error


@functools.cache
def _wrong_flag(flags: str) -> str:
    """Says which of XLA's flags is wrong, such as one of another release; empty if none is.

    A wrong one ends the process with a dump of the C++ stack, so another process reads them first.
    """
    if not flags:
        return ""
    code = "from jaxlib import _jax; _jax.CompileOptions()"
    environment = os.environ | {"XLA_FLAGS": flags}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return ""  # JAX will say what is wrong itself
    said = done.stderr.decode(errors="replace")
    found = re.search(r"(?:parse_flags_from_env|command_line_flags)\.cc:\d+\] (.*)", said)
    return found[1][:300].rstrip(".") if found and done.returncode else ""


def _reason(error: BaseException) -> str:
    """Returns the first words of an error on one line, without a full stop."""
    return " ".join(str(error).split())[:300].removesuffix(".")


def join() -> None:
    """Connects to the other processes of the run, if any, before any device is used.

    Raises UserError if the environment is incomplete or the coordinator's port is taken,
    PassingError if the others have not come in time. A signal ends the wait.
    """
    count = os.environ.get("JAX_NUM_PROCESSES", "")
    if not count or count == "1":
        return
    seconds = _start_seconds()
    number, address = os.environ.get("JAX_PROCESS_ID", ""), os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if count == "auto":
        _connect(seconds, "JAX_NUM_PROCESSES=auto")
        return
    host, _, port = address.rpartition(":")
    numbers = count.isdecimal() and number.isdecimal() and int(number) < int(count)
    if not (numbers and host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"JAX_NUM_PROCESSES={count!r} needs JAX_PROCESS_ID below it (not {number!r}) and "
            f"JAX_COORDINATOR_ADDRESS=host:port (not {address!r}); set all three, or none for a "
            "single process."
        )
    end = time.monotonic() + seconds
    if int(number) == 0:
        _check_port(int(port), address)
    else:
        _await_coordinator(host.strip("[]"), int(port), end)
    left = max(1.0, end - time.monotonic())
    _connect(left, f"JAX_COORDINATOR_ADDRESS={address}", address, int(count), int(number))


def _start_seconds() -> float:
    """Reads how many seconds the processes may take to start, from UNIMED_START_SECONDS."""
    given = os.environ.get("UNIMED_START_SECONDS", str(START_SECONDS))
    if not (given.isdecimal() and int(given) > 0):
        raise UserError(f"UNIMED_START_SECONDS={given!r} is not a number of seconds; give 1 or more.")
    return float(given)


def _check_port(port: int, address: str) -> None:
    """Refuses a port on which another program of this machine listens."""
    kind = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(kind) as probe:
        # a port that was in use a minute ago is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS={address}: this process cannot listen there "
                f"({error.strerror}); choose another port, the same for all processes."
            ) from error


def _await_coordinator(host: str, port: int, end: float) -> None:
    """Waits until something listens at the coordinator's address; JAX would end with a dump."""
    begun, reason = time.monotonic(), "no answer"
    while True:
        left = end - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(left, 5.0))):
                return
        except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a name that no host can have
            reason = f"the host is unknown: {getattr(error, 'strerror', None) or error}"
            left = min(left, begun + NAME_SECONDS - time.monotonic())
        except OSError as error:
            reason = error.strerror or str(error)
        if left <= 0:
            raise PassingError(
                f"process 0 cannot be reached at JAX_COORDINATOR_ADDRESS={host}:{port} within "
                f"{time.monotonic() - begun:.0f} s ({reason}); start it, mend the address, or raise "
                "UNIMED_START_SECONDS."
            )
        time.sleep(min(0.5, max(left, 0)))


def _connect(
    seconds: float,
    what: str,
    address: str | None = None,
    count: int | None = None,
    number: int | None = None,
) -> None:
    """Calls JAX's own start in a thread, which neither a signal nor the clock could end here."""
    import jax

    failure: list[Exception] = []

    def call() -> None:
        try:
            # Its own time limit ends the process with a dump of the C++ stack; it must never strike.
            jax.distributed.initialize(
                address,
                count,
                number,
                initialization_timeout=int(seconds) + 3600,
                heartbeat_timeout_seconds=DEAD_AFTER,
            )
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=call, name="start", daemon=True)
    end = time.monotonic() + seconds
    thread.start()
    try:
        while thread.is_alive() and time.monotonic() < end:
            thread.join(0.1)
    except BaseException as stop:  # a signal
        _leave(str(stop), getattr(stop, "status", 1))
    if thread.is_alive():
        _leave(
            f"{what}: not all processes of the run came within {seconds:.0f} s; start all of them "
            "again.",
            1,
        )
    if failure:
        raise UserError(
            f"{what}: the processes of the run cannot be joined ({_reason(failure[0])}); set "
            "JAX_NUM_PROCESSES, JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS, or none of them for a "
            "single process."
        ) from failure[0]


def _leave(sentence: str, status: int) -> NoReturn:
    """Prints a sentence and ends the process at once.

    An ordinary end would wait for the thread that waits for other processes.
    """
    print(f"unimed_jax: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)


# ---- several processes -----------------------------------------------------------------------------
def leads() -> bool:
    """Says whether this is process 0, which logs and writes for all."""
    import jax

    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, flushed, from the leading process only."""
    if leads():
        print(text, flush=True)


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """Lets process 0 run the block before the others, so that they find the files that it wrote."""
    import jax

    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    if not leads():
        multihost_utils.sync_global_devices(name)
    yield
    if leads():
        multihost_utils.sync_global_devices(name)


def from_leader(value: Any) -> Any:
    """Returns process 0's `value` (anything JSON holds) on every process; all of them call it."""
    return gathered(value if leads() else None)[0]


def gathered(value: Any) -> list[Any]:
    """Returns the `value` (anything JSON holds) of each process, in their order, on all of them."""
    import jax

    if jax.process_count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(text)], np.int32)).ravel()  # [processes]
    padded = np.pad(text, (0, int(lengths.max()) - len(text)))
    rows = multihost_utils.process_allgather(padded)  # [processes, longest]
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Ends this process with one sentence if another one has died: no step can finish then."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        import jax

        # What fails while it is started, not while it runs, is a ValueError with the same words.
        if not isinstance(error, jax.errors.JaxRuntimeError) and not re.match("[A-Z]+: ", str(error)):
            raise
        if jax.process_count() == 1 or not re.search(
            "Gloo|NCCL|UNAVAILABLE|ABORTED|[Cc]oordination|peer",
            str(error),
        ):
            raise
        print(
            f"unimed_jax: process {jax.process_index()} of {jax.process_count()} has lost another "
            f"one ({str(error).splitlines()[0][:120]}); start all again: the run continues from its "
            "last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an ordinary exit would wait for the dead process


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what libraries print next to the errors that they raise, inside the block.

    orbax reports every file that it touches, and prints through asyncio the errors that it also
    raises. After a write that failed, writes that finish later hit a closed event loop, and each
    would print the same error. transformers warns of every tokenizer folder whose config.json is of
    a model that it does not know, matplotlib of every letter that its font lacks.
    """

    def keeps_orbax_out(record: logging.LogRecord) -> bool:
        return "orbax" not in record.getMessage()

    def keeps_model_types_out(record: logging.LogRecord) -> bool:
        return "to instantiate a model of type ``" not in record.getMessage()

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook_before(unraisable)

    absl, hook_before = logging.getLogger("absl"), sys.unraisablehook
    filters = {"asyncio": keeps_orbax_out, "transformers.configuration_utils": keeps_model_types_out}
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    sys.unraisablehook = hook
    for name, keep in filters.items():
        logging.getLogger(name).addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ ")
            yield
    finally:
        absl.setLevel(level)
        sys.unraisablehook = hook_before
        for name, keep in filters.items():
            logging.getLogger(name).removeFilter(keep)
