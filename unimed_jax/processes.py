"""Several processes as one run: joining, and who may write.

A process belongs to a run of several where the environment says so (the scripts in launch/ set it):
JAX_NUM_PROCESSES=auto (the machine knows, as a TPU pod does), or a number beside JAX_PROCESS_ID and
JAX_COORDINATOR_ADDRESS. All processes run the same program; process 0 alone logs and writes what is not sharded.
(jax is imported where it is needed: the door answers --help without it.)
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

from unimed_jax.errors import UserError

DEAD_AFTER = 30  # seconds without a sign of life until a process counts as dead


def join() -> None:
    """Connects to the other processes; returns at once where there are none. To be called before any device is used."""
    count = os.environ.get("JAX_NUM_PROCESSES", "")
    if not count or count == "1":
        return
    import jax

    if count == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=DEAD_AFTER)
        return
    number, address = os.environ.get("JAX_PROCESS_ID", ""), os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not (count.isdigit() and number.isdigit() and int(number) < int(count) and ":" in address):
        raise UserError(
            f"JAX_NUM_PROCESSES={count!r} needs JAX_PROCESS_ID below it (not {number!r}) and JAX_COORDINATOR_ADDRESS="
            f"host:port (not {address!r}); set all three, or none for a single process."
        )
    jax.distributed.initialize(address, int(count), int(number), heartbeat_timeout_seconds=DEAD_AFTER)


def leads() -> bool:
    import jax

    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, flushed, from the leading process only."""
    if leads():
        print(text, flush=True)


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """Process 0 runs the block before the others do, so that these find the files that it wrote."""
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


@contextlib.contextmanager
def lost_processes_told() -> Iterator[None]:
    """Ends this process with one sentence where another one of the run has died: no step can be finished without it."""
    try:
        yield
    except RuntimeError as error:
        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        if jax.process_count() == 1 or not re.search("Gloo|NCCL|UNAVAILABLE|ABORTED|[Cc]oordination|peer", str(error)):
            raise
        print(
            f"unimed_jax: process {jax.process_index()} of {jax.process_count()} has lost another one "
            f"({str(error).splitlines()[0][:120]}); start all again: the run continues from its last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an ordinary exit would wait for the dead one
