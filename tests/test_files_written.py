"""Files and folders are written whole or not at all, whatever happens at whichever operation on
files.
"""

import contextlib
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import faults
from support.faults import TEXT, WORK

from unimed_jax import files
from unimed_jax.errors import UserError
from unimed_jax.interruption import explain_system_errors


def at_every_operation(kind: str, what: str, place: Path) -> list[tuple[Path, int]]:
    """-> (folder, exit status) of each number of an operation."""
    done = subprocess.run(
        [sys.executable, faults.__file__, kind, what, place], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [(place / number, int(status)) for number, status in map(str.split, done.stdout.splitlines())]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def words(folder: Path) -> dict[str, str]:
    """Name -> "old" or "new" of every file that is not hidden; each must be whole."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not name.parts[0].startswith("."):
            found[str(name)] = next(word for word, text in TEXT.items() if path.read_text() == text)
    return found


@pytest.mark.parametrize("what", list(WORK))
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(what, tmp_path):
    does, before, after = WORK[what]
    old, new = dict.fromkeys(before, "old"), dict.fromkeys(after, "new")
    *killed, (last, status) = at_every_operation("kill", what, tmp_path)
    assert status == 0 and words(last) == new and {status for _, status in killed} == {-9}
    left = [hidden(folder) for folder, _ in killed]
    assert len(killed) >= 5 and any(left)
    seen = [words(folder) for folder, _ in killed]
    assert old in seen and new in seen
    for found in seen:
        # while a set changes places: a part of one of them, without its last name
        if found not in (old, new):
            assert what == "set" and len(set(found.values())) <= 1 and "c.json" not in found
    for folder, _ in killed:  # the next start
        does(folder)
        assert words(folder) == new and not hidden(folder)


@pytest.mark.parametrize("what", list(WORK))
def test_a_disk_that_is_full_from_any_operation_on_leaves_the_old(what, tmp_path):
    _, before, after = WORK[what]
    *refused, (last, status) = at_every_operation("full", what, tmp_path)
    assert status == 0 and words(last) == dict.fromkeys(after, "new")
    assert len(refused) >= 2 and {status for _, status in refused} == {2}
    for folder, _ in refused:
        assert words(folder) == dict.fromkeys(before, "old") and not hidden(folder)


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    code = "import sys; from unimed_jax import files\n"
    code += "with files.new_folder(sys.argv[1]) as made: print(made, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    out = tmp_path / "out"
    alive, dead = (subprocess.Popen([sys.executable, "-c", code, str(out)], **pipes) for _ in range(2))
    theirs, left = (Path(process.stdout.readline().strip()) for process in (alive, dead))
    dead.kill()
    dead.wait()
    assert theirs.is_dir() and left.is_dir()
    files.remove_leftovers(tmp_path)
    assert theirs.is_dir() and not left.exists()
    alive.communicate()
    assert alive.returncode == 0 and out.is_dir() and not hidden(tmp_path)


def test_only_names_of_ours_are_leftovers(tmp_path):
    other = ".other.unimed-12"
    kept = [".out.unimed-12a", "out.unimed-12", other, ".unimed-12", ".out.unimed-", ".out.12"]
    kept.append(".notes.2024")
    for name in (*kept, ".out.unimed-12", ".out.unimed-12-1"):
        (tmp_path / name).write_text("")
    files.write_text(tmp_path / "out", "x")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "out"}
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "out"} - {other}


def test_without_locks_age_tells(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    young, old = tmp_path / ".a.unimed-1", tmp_path / ".a.unimed-2"
    for path in (young, old):
        path.write_text("")
    os.utime(old, (0, 0))
    files.write_text(tmp_path / "a", "x")
    assert young.exists() and not old.exists() and (tmp_path / "a").read_text() == "x"


def test_a_name_as_long_as_file_systems_allow_can_be_written(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        files.write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
    with pytest.raises(UserError, match="could not be written .File name too long"):
        files.write_text(tmp_path / ("n" * 256), "x")
    with pytest.raises(UserError, match="File name too long"), files.new_folder(tmp_path / ("n" * 256)):
        pass


def test_a_set_does_not_replace_a_folder_by_a_file(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    sentence = "b is a folder, where a file belongs; move it away"
    with pytest.raises(UserError, match=sentence), files.written_together(tmp_path, ("a", "b")) as made:
        for name in ("a", "b"):
            (made / name).write_text("new")
    assert (tmp_path / "a").read_text() == "old" and (tmp_path / "b").is_dir() and not hidden(tmp_path)


def test_a_set_waits_for_another_one_that_changes_places(tmp_path, monkeypatch):
    names, paused, goes_on = ("a", "b", "c"), threading.Event(), threading.Event()
    rename = Path.rename

    def pausing(path: Path, target: Path) -> Path:
        if threading.current_thread().name == "first" and not paused.is_set():
            paused.set()
            assert goes_on.wait(60)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", pausing)

    def write() -> None:
        with files.written_together(tmp_path, names) as made:
            for name in names:
                (made / name).write_text(threading.current_thread().name)

    first, second = (threading.Thread(target=write, name=name) for name in ("first", "second"))
    first.start()
    assert paused.wait(60)
    second.start()
    second.join(0.5)
    waits = second.is_alive()
    goes_on.set()
    for thread in (first, second):
        thread.join(60)
    assert waits and not hidden(tmp_path)
    assert [(tmp_path / name).read_text() for name in names] == ["second"] * 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("write() failed: No space left on device; writing /x; at byte 5; Failed to close"),
        ValueError("Failed writing: \"/a/b\": No space left on device [os_error_code='28']"),
        RuntimeError("write() failed: File too large; at byte 50000; Failed to close chunk_writer"),
    ],
)
def test_a_full_disk_is_one_sentence_in_the_words_of_any_library(error, tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with (
        pytest.raises(UserError, match="x could not be written .* free some space"),
        files.written_whole(path),
    ):
        raise error
    with (
        pytest.raises(UserError, match="free some space and give the same command again"),
        explain_system_errors(),
    ):
        raise KeyError from error
    assert path.read_text() == "old"


def test_a_full_disk_is_noticed_whatever_a_library_says(tmp_path, small_disk):
    with pytest.raises(RuntimeError, match="chunk"), files.written_whole(tmp_path / "x"):
        raise RuntimeError("chunk writer")
    sentence = (
        "x could not be written .No space left on device. and nothing of it was kept; free some space"
    )
    with pytest.raises(UserError, match=sentence), files.written_whole(small_disk / "x") as file:
        with contextlib.suppress(OSError):
            file.write_bytes(bytes(1 << 30))
        raise RuntimeError("chunk writer")
    assert not list(small_disk.iterdir())


def test_twenty_kills_leave_no_more_on_the_disk_than_the_last_one_wrote(tmp_path):
    """Each start removes what the one before left, so that the disk does not fill."""
    code = "import pathlib, sys; from support import faults\n"
    code += "work = lambda: faults.one_folder(place)\n"
    code += "for number in range(20): print(faults.run('kill', 6 + number % 5, work))"
    code = code.replace("\nfor", "\nplace = pathlib.Path(sys.argv[1])\nfor")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout.split().count("-9") == 20 and len(hidden(tmp_path)) <= 1
    faults.one_folder(tmp_path)
    on_disk = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in on_disk) == 2 * len(TEXT["new"])
