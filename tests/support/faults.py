"""Kills a process, or fills its disk, at one chosen operation on files.

Operations are those that Python reports to audit hooks. As a program it forks a child for each
number; the child does a piece of work (WORK below) in a folder of its own and meets the fault at
the operation of that number.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from unimed_jax import files
from unimed_jax.errors import UserError

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir")
TEXT = {word: f"{word} " * 5000 for word in ("old", "new")}
SET = ("a.md", "b.png", "c.json")


def one_file(folder: Path) -> None:
    files.write_text(folder / "a.json", TEXT["new"])


def one_folder(folder: Path) -> None:
    files.remove_leftovers(folder)
    if not (folder / "model").exists():
        with files.new_folder(folder / "model") as made:
            for name in ("a", "b"):
                (made / name).write_text(TEXT["new"])


def one_set(folder: Path) -> None:
    with files.written_together(folder, SET) as made:
        for name in ("a.md", "c.json"):  # b.png has no successor
            (made / name).write_text(TEXT["new"])


# Work -> (what does it, the files before, the files after).
WORK: dict[str, tuple[Callable[[Path], None], tuple[str, ...], tuple[str, ...]]] = {
    "file": (one_file, ("a.json",), ("a.json",)),
    "folder": (one_folder, (), ("model/a", "model/b")),
    "set": (one_set, SET, ("a.md", "c.json")),
}


def meet(kind: str, number: int) -> None:
    """Makes this process meet the fault at its operation `number` ("full": also at later ones)."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in OPERATIONS:
            return
        count += 1
        if kind == "kill" and count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        makes = event == "os.mkdir" or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if kind == "full" and count >= number and makes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(hook)


def run(kind: str, number: int, work: Callable[[], None]) -> int:
    """Works in a child that meets the fault; returns 0, 2 (a sentence), 3 (an error) or -signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 0
    meet(kind, number)
    try:
        work()
    except UserError as error:
        status = 2 if os.strerror(errno.ENOSPC) in str(error) else 3
    except BaseException:
        status = 3
    os._exit(status)


if __name__ == "__main__":
    kind, what, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    does, before, _ = WORK[what]
    for number in range(1, 100):
        folder = place / str(number)
        folder.mkdir()
        for name in before:
            (folder / name).write_text(TEXT["old"])
        status = run(kind, number, lambda folder=folder: does(folder))
        print(number, status, flush=True)
        if status == 0:
            break
