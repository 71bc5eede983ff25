"""Keeps beside a run on what it was trained, and by which command."""

import contextlib
import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from unimed_jax import files, processes
from unimed_jax.errors import UserError
from unimed_jax.parsing import read_json
from unimed_jax.provenance import code_version

FILE = "environment.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")


def keep(folder: Path) -> None:
    """Adds this session's environment to environment.json in a run's folder, if it is another one.

    {"sessions": [{command, code_version, python, system, devices, packages}]}, the newest one last;
    nothing about the machine's name, its user or the time but what the command says. It is called on
    all processes; the leader writes.
    """
    if not processes.leads():
        return
    now, before = environment(), kept(folder)
    if now not in before[-1:]:
        files.write_json(folder / FILE, {"sessions": [*before, now]})


def kept(folder: Path) -> list[dict[str, Any]]:
    """Reads the sessions of a run, the newest one last; none where that is not known."""
    try:
        return [dict(session) for session in read_json(folder / FILE)["sessions"]]
    except (UserError, KeyError, TypeError, ValueError):
        return []


def environment() -> dict[str, Any]:
    """Describes what this process runs on; the command is empty unless it is the program's own."""
    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    own = Path(sys.argv[0]).parts[-2:] == ("unimed_jax", "main.py")
    return {
        "command": shlex.join(["python", "-m", "unimed_jax.main", *sys.argv[1:]]) if own else "",
        "code_version": code_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "packages": packages,
    }
