"""Lets several processes work as one run: how they connect, and which one writes.

The environment says whether a process belongs to a run of several (the scripts in launch/ set it):
JAX_NUM_PROCESSES=auto if the machine knows the others, as a TPU pod does, else a number together
with JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS. All processes run the same program; only process 0
logs and writes what is not sharded. The functions import jax themselves, so that --help does not
wait for it.
"""

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from unimed_jax.errors import UserError

DEAD_AFTER = 30  # seconds without a heartbeat until a process counts as dead


def join() -> None:
    """Connects to the other processes of the run, if any, before any device is used.

    Raises UserError if the environment is incomplete.
    """
    count = os.environ.get("JAX_NUM_PROCESSES", "")
    if not count or count == "1":
        return
    import jax

    if count == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=DEAD_AFTER)
        return
    number, address = (
        os.environ.get("JAX_PROCESS_ID", ""),
        os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
    )
    if not (count.isdigit() and number.isdigit() and int(number) < int(count) and ":" in address):
        raise UserError(
            f"JAX_NUM_PROCESSES={count!r} needs JAX_PROCESS_ID below it (not {number!r}) and JAX_COORDINATOR_ADDRESS="
            f"host:port (not {address!r}); set all three, or none for a single process."
        )
    jax.distributed.initialize(
        address,
        int(count),
        int(number),
        heartbeat_timeout_seconds=DEAD_AFTER,
    )


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
    """Returns process 0's `value` (anything JSON holds) on every process; to be called by all of them."""
    return gathered(value if leads() else None)[0]


def gathered(value: Any) -> list[Any]:
    """Returns every process's `value` (anything JSON holds), in the order of processes, on all of them."""
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
    except RuntimeError as error:
        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        if jax.process_count() == 1 or not re.search(
            "Gloo|NCCL|UNAVAILABLE|ABORTED|[Cc]oordination|peer",
            str(error),
        ):
            raise
        print(
            f"unimed_jax: process {jax.process_index()} of {jax.process_count()} has lost another one "
            f"({str(error).splitlines()[0][:120]}); start all again: the run continues from its last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an ordinary exit would wait for the dead process


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what libraries print next to the errors that they raise; what was set before comes back at the end.

    orbax reports every file that it touches, and prints through asyncio the errors that it also raises. After a write
    that failed, writes that finish later hit a closed event loop, and each would print the same error. transformers
    warns of every tokenizer folder whose config.json is of a model that it does not know.
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
        yield
    finally:
        absl.setLevel(level)
        sys.unraisablehook = hook_before
        for name, keep in filters.items():
            logging.getLogger(name).removeFilter(keep)
