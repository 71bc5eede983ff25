"""Writes files and folders completely or not at all, so that a crash leaves no half of one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from unimed_jax.errors import UserError


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives a temporary folder; it becomes `path` on success and is removed on an error.

    Raises UserError if `path` exists and is not an empty folder, or if it cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; choose another folder, or remove it.")
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        temporary.replace(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritable(path, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path; its file replaces `path` on success and is removed on an error.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _unwritable(path: Path, error: OSError) -> UserError:
    """Says in one sentence that `path` could not be written."""
    return UserError(f"{path} could not be written ({error.strerror or error}) and nothing of it was kept.")


def _flush(file: Path) -> None:
    """Waits until a file's content is on the disk; a rename could get there before it."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
