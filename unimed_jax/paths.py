"""Checks the paths that a person gives before any work, and refuses odd ones in one sentence."""

import os
import tempfile
from pathlib import Path

from unimed_jax.errors import UserError
from unimed_jax.files import FULL

LONGEST_NAME = 255  # bytes of one name, on every usual file system
LONGEST_PATH = 4095 - 300  # bytes of a whole path on Linux, less what a run adds to its folder

# What a run's folder holds, as far as other programs could have put something else there.
FILES = (
    "config.json",
    "lock",
    "log.jsonl",
    "metrics.json",
    "predictions.jsonl",
    "likelihoods.partial.jsonl",
    "predictions.partial.jsonl",
    "environment.json",
    "report.html",
    "report.md",
    "router.json",
    "stages.json",
    "stages.md",
    "contact_sheet.png",
    "predictions.png",
    "reliability.png",
    "routing.png",
)
ANALYSES = ("analysis", "reliance")  # folders of pages that `analyze` writes
FOLDERS = ("checkpoints", "tensorboard", "tokenizer", *ANALYSES)


def check_output(path: str | Path, option: str) -> Path:
    """Returns the path of a file or folder to write; raises UserError where nothing can be written.

    option: the argument that gave it, such as "--out", which starts the sentence of an error. A
    file or folder that exists there already is not looked at.
    """
    given, place = f"{option}={path}", _existing(path, option)
    if place == Path(os.path.abspath(path)):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{given} lies below {place}, which is a file; choose another place.")
    _check_writable(place, given)
    return Path(path)


def check_output_file(path: str | Path, option: str) -> Path:
    """Returns the path of a file to write, as `check_output` does; refuses a folder or pipe, too."""
    given, file = f"{option}={path}", check_output(path, option)
    if not file.name or file.is_dir() or str(path).endswith("/"):
        raise UserError(f"{given} is a folder; add a file's name.")
    if file.exists() and not file.is_file():
        raise UserError(f"{given} is a pipe or a device; name a file.")
    return file


def check_output_folder(path: str | Path, option: str, who: str = "a folder belongs") -> Path:
    """Returns a folder, new or old, to write files in; raises UserError where none can be written.

    who: ends the part of an error's sentence that says why a file will not do.
    """
    given, place = f"{option}={path}", _existing(path, option)
    there = place == Path(os.path.abspath(path))
    if not place.is_dir():
        what = "is a file" if there else f"lies below {place}, which is a file"
        raise UserError(f"{given} {what}, where {who}; choose another.")
    _check_writable(place, given)
    return Path(path)


def check_run_folder(path: str | Path, option: str) -> Path:
    """Returns a run's folder, new or old; raises UserError where a run could not write in it.

    A folder in the place of one of its files is refused, and the reverse.
    """
    folder = check_output_folder(path, option, "a run needs a folder")
    for name in FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            what = "folder" if (folder / name).is_dir() else "pipe or a device"
            raise UserError(
                f"{folder / name} is a {what}, where a run keeps a file; remove it, or choose "
                "another run."
            )
    for name in FOLDERS:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise UserError(
                f"{folder / name} is no folder, where a run keeps one; remove it, or choose another run."
            )
    return folder


def _existing(path: str | Path, option: str) -> Path:
    """Returns the absolute path, or the nearest folder above it that exists.

    Raises UserError for a path that no file can have, or that the system does not let us look at.
    """
    given = f"{option}={path}"
    if not str(path):
        raise UserError(f"{option} is empty; give a path, or leave {option} out.")
    if "://" in str(path):
        raise UserError(
            f"{given} is not a folder or file here; mount the bucket, and give its path there."
        )
    whole = os.path.abspath(path)
    try:
        encoded = whole.encode()
    except UnicodeEncodeError:
        raise UserError(f"{given} is not UTF-8 ({whole!r}); choose a path of other letters.") from None
    longest = max(len(part) for part in encoded.split(b"/"))
    if longest > LONGEST_NAME:
        raise UserError(
            f"{option} has a name of {longest} bytes ({_cut(whole)}); file systems take {LONGEST_NAME}."
        )
    if len(encoded) > LONGEST_PATH:
        raise UserError(
            f"{option} is a path of {len(encoded)} bytes ({_cut(whole)}); give at most {LONGEST_PATH}."
        )
    place = Path(whole)
    while True:
        try:
            os.stat(place)
            return place
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise UserError(
                    f"{given}: {place} is a link to nothing; remove it, or choose another path."
                ) from None
            place = place.parent
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{given} cannot be used ({place}: {reason}); choose another path."
            ) from error


def _check_writable(place: Path, given: str) -> None:
    """Refuses a folder in which no file can be made, by making one that has no name."""
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.errno in FULL:
            raise  # the caller reports every full disk in the same words
        raise UserError(
            f"{given} cannot be written ({place}: {error.strerror}); choose another place."
        ) from error


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-10:]}"
