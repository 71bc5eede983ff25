"""Writes files and folders completely or not at all.

Everything is written under a temporary name next to its place, `.NAME.unimed-PID`, and renamed when
it is on the disk. The temporary one is locked while its process lives; what a killed process left is
removed by whoever writes next.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.errors import UserError

# system errors of a full disk, a quota, a limit on a file's size
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# seconds after which a temporary file counts as left over where files cannot be locked
ABANDONED = 24 * 3600.0
WORTH_KEEPING = 60.0  # seconds of work that are not done again after a mistake in the data is mended
_PROBE = 64 << 10  # bytes that a disk must take to count as not full
MARK = ".unimed-"  # in the name of whatever is temporary: nobody else's file is taken for a leftover
_LONGEST = 200  # bytes of a name that its temporary name repeats; file systems allow 255 in all


# ---- one file, one folder --------------------------------------------------------------------------
@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path; the file that is written there replaces `path` at the end.

    On an error it is removed.

    Its name has no ending that tells the format, so libraries must be given that. Raises UserError
    if the file cannot be written, whatever the library that writes it raises on a full disk.
    """
    path = Path(path)
    with _temporary(path, is_folder=False) as temporary:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file (UTF-8) completely or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file completely or not at all; numbers that are not finite raise ValueError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives a temporary folder; it becomes `path` on success and is removed on an error.

    Raises UserError if `path` exists and is not an empty folder, or if it cannot be written.
    """
    path = Path(path)
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:  # for example a name that is too long
        raise _unwritable(path, error) from error
    if taken:
        raise UserError(f"{path} exists already; choose another folder, or remove it.")
    with _temporary(path, is_folder=True) as temporary:
        yield temporary
        _flush_all(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)


@contextlib.contextmanager
def resumed_folder(path: str | Path, work: str | Path) -> Iterator[Path]:
    """Gives the folder `work`, with what an earlier try left there; it becomes `path` on success.

    It stays for the next try if the process is killed or stopped, or if a UserError ends a block
    that took longer than `WORTH_KEEPING`. It is removed on any other error, and on a full disk. The
    caller holds a lock, so that one process at a time works there. Raises UserError if it cannot be
    written.
    """
    path, work, started = Path(path), Path(work), time.monotonic()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with _explained(path):
            yield work
            _flush_all(work)
            work.replace(path)
            _flush_folder(path.parent)
    except Exception as error:
        mendable = isinstance(error, UserError) and not full_disk(error, path.parent)
        if not mendable or time.monotonic() - started < WORTH_KEEPING:
            _remove(work)
        raise


# ---- files that belong together --------------------------------------------------------------------
@contextlib.contextmanager
def written_together(folder: str | Path, names: Sequence[str]) -> Iterator[Path]:
    """Gives a temporary folder, whose content replaces what `names` lists in `folder` at the end.

    Old files of these names that have no successor go, too. Files of the old set and of the new one
    never stand side by side: a kill while they change places leaves a part of one set, without the
    last of `names`, which therefore stands for a whole set. An error leaves the old set. Raises
    UserError as `written_whole` does.
    """
    folder = Path(folder)
    with _temporary(folder / names[-1], is_folder=True) as temporary:
        yield temporary
        for name in names:
            if (folder / name).is_dir() and (temporary / name).is_file():
                raise UserError(f"{folder / name} is a folder, where a file belongs; move it away.")
        _flush_all(temporary)
        with _alone_in(folder):
            _change_places(folder, names, temporary)
        _flush_folder(folder)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process changes a set of files in `folder`, and makes others wait.

    It is no folder that this process writes under a temporary name, whose lock it holds already.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _change_places(folder: Path, names: Sequence[str], temporary: Path) -> None:
    """Moves the old files out of `folder` and the new ones into it.

    The file of the last name leaves first and arrives last.
    """
    before, placed = temporary / ".before", []
    before.mkdir()
    try:
        for name in reversed(names):
            if os.path.lexists(folder / name):
                (folder / name).rename(before / name)
        for name in names:
            if os.path.lexists(temporary / name):
                placed.append(name)
                (temporary / name).rename(folder / name)
    except BaseException:
        for name in reversed(placed):
            _remove(folder / name)
        for name in names:
            if os.path.lexists(before / name):
                (before / name).rename(folder / name)
        raise


# ---- temporary names -------------------------------------------------------------------------------
@contextlib.contextmanager
def _temporary(path: Path, is_folder: bool) -> Iterator[Path]:
    """Makes an empty file or folder next to `path`, and removes it after the block.

    It is locked inside the block.

    What a killed process left for the same path is removed before. Raises UserError if anything
    inside the block cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        temporary, lock = _locked_new(path, is_folder)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with _explained(path):
            yield temporary
    finally:
        _remove(temporary)
        os.close(lock)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns an error of the disk inside the block into a UserError about `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = full_disk(error, path.parent)  # asked before a removal, which would free space
        if full:
            raise UserError(
                f"{path} could not be written ({full}) and nothing of it was kept; free some "
                "space and give the same command again."
            ) from error
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


def _locked_new(path: Path, is_folder: bool) -> tuple[Path, int]:
    """Makes the temporary file or folder of `path`.

    Returns its path and the descriptor that holds its lock.
    """
    for attempt in range(1000):
        name = f".{_shortened(path.name)}{MARK}{os.getpid()}" + (f"-{attempt}" if attempt else "")
        temporary = path.parent / name
        try:
            if is_folder:
                temporary.mkdir()
            else:
                temporary.touch(exist_ok=False)
        # a process on another host, or in another container, may have the same number
        except FileExistsError:
            continue
        try:
            lock = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # another process has taken it for a leftover
            continue
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink and os.path.lexists(temporary):
            return temporary, lock
        os.close(lock)
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def remove_folder(path: str | Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    _remove(Path(path))


def remove_leftovers(folder: str | Path, name: str = "") -> None:
    """Removes what killed processes left in `folder` while they wrote `name`.

    Without a name, the leftovers of any file or folder are removed.

    What a living process writes is locked and stays. Where the file system has no locks, the age
    decides (`ABANDONED`).
    """
    stem = re.escape(_shortened(name)) if name else ".+"
    pattern = re.compile(rf"\.{stem}{re.escape(MARK)}\d+(-\d+)?")
    try:
        found = [Path(entry.path) for entry in os.scandir(folder) if pattern.fullmatch(entry.name)]
    except OSError:  # no folder, no leftovers
        return
    for path in found:
        with contextlib.suppress(OSError):  # it is gone already, or belongs to another user
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _abandoned(descriptor):
                    _remove(path)
            finally:
                os.close(descriptor)


def _abandoned(descriptor: int) -> bool:
    """Tells whether no process writes this file or folder any more, and takes its lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(descriptor).st_mtime > ABANDONED
    return True


def _shortened(name: str) -> str:
    """Cuts a name so that the temporary one made of it is not longer than file systems allow."""
    return os.fsdecode(os.fsencode(name)[:_LONGEST])


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# ---- the disk --------------------------------------------------------------------------------------
def full_disk(error: BaseException, *folders: Path) -> str:
    """Says what is full if a full disk caused `error`, directly or through other errors.

    The answer is empty if none did.

    Libraries raise errors of their own, some of which quote the system's number or words. For any
    other one each of `folders` is asked to take a few bytes.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        number = getattr(cause, "errno", None)
        if number not in FULL:
            quoted = re.search(r"os_error_code='(\d+)'", str(cause))
            number = int(quoted[1]) if quoted else None
        words = [os.strerror(each) for each in FULL if each == number or os.strerror(each) in str(cause)]
        if words:
            return words[0]
        cause = cause.__cause__ or cause.__context__
    return next(filter(None, map(_refusal, folders)), "")


def _refusal(folder: Path) -> str:
    """Writes a few bytes into a folder; returns the system's words if its disk is full."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return os.strerror(error.errno) if error.errno in FULL else ""
    finally:
        _remove(probe)
    return ""


def _unwritable(path: Path, error: OSError) -> UserError:
    """Says in one sentence that `path` could not be written."""
    reason = error.strerror or str(error)
    if error.filename is not None and str(path.parent) not in os.fsdecode(error.filename):
        reason += f": {os.fsdecode(error.filename)}"  # for example a file that was to be read
    return UserError(f"{path} could not be written ({reason}) and nothing of it was kept.")


def _flush_all(folder: Path) -> None:
    """Waits until everything in a folder is on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            _flush(file)


def _flush(file: Path) -> None:
    """Waits until a file's content is on the disk; a rename could get there before it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Waits until a folder's names are on the disk, where its file system can tell."""
    with contextlib.suppress(OSError):
        _flush(folder)
