"""Keeps what a run has cost beside it: seconds of work and bytes on the disk."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from unimed_jax import files, processes
from unimed_jax.errors import UserError
from unimed_jax.parsing import read_json

FILE = "cost.json"


@contextlib.contextmanager
def measured(folder: Path) -> Iterator[None]:
    """Adds the time of the block to cost.json in the run's folder, however the block ends.

    {"seconds": of all sessions that were not killed, "bytes": of the folder}
    """
    begun = time.monotonic()
    try:
        yield
    finally:
        if processes.leads() and (folder / "config.json").is_file():
            known = kept(folder)
            seconds = time.monotonic() - begun + (known["seconds"] if known else 0.0)
            # what hinders it has been said by the block, or will be by the next write
            with contextlib.suppress(UserError):
                files.write_json(folder / FILE, {"seconds": round(seconds, 1), "bytes": size(folder)})


def kept(folder: Path) -> dict[str, float] | None:
    """Reads what a run has cost, and returns None if that is not known."""
    try:
        found = read_json(folder / FILE)
        return {"seconds": float(found["seconds"]), "bytes": int(found["bytes"])}
    except (UserError, KeyError, TypeError, ValueError):
        return None


def size(folder: Path) -> int:
    """Adds up the bytes of all files in a folder, without links."""
    return sum(
        file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()
    )
