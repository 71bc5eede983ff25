"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from unimed_jax.errors import UserError


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when all went well and vanishes when not.

    Raises UserError where `path` holds something already.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; choose another folder, or remove it.")
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        beside.mkdir(parents=True)
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                _flush(file)
        beside.replace(path)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when all went well and vanishes when not."""
    path = Path(path)
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        _flush(beside)
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: BaseException) -> BaseException:
    if isinstance(error, OSError):
        return UserError(f"{path} could not be written ({error.strerror or error}) and nothing of it was kept.")
    return error


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
