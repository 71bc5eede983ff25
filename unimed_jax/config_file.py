"""Reads a config file: runs it, finds its neighbours, and says where a mistake in it lies.

The place of a mistake is given as a file and a line.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from unimed_jax.bounds import FrozenDict
from unimed_jax.config_sweep import SweepConfig
from unimed_jax.errors import UserError, nearest
from unimed_jax.interruption import Stopped
from unimed_jax.parsing import no_file
from unimed_jax.settings import check_group, check_values

LONGEST = 300  # characters of what a config file raises that are shown
MOST_LINES = 3  # lines that a message names


def load_config_file(path: str) -> ml_collections.ConfigDict:
    """Runs `path.py` or `path.py:argument` and returns its ConfigDict, which has a name.

    The file may import its neighbours, and those of a common.py one folder up, whatever the working
    directory. Raises UserError, with the file and where possible the line, for a file that cannot
    be read, for whatever it raises, and for what it returns if that is neither the settings of a
    run nor the stages of a chain.
    """
    returned, file, folders = _returned(path)
    if _is_sweep(returned):
        raise UserError(
            f"--config={file} is a sweep of several runs; give it to the verb `sweep`, or name its base."
        )
    settings = _settings(returned, file)
    if "stages" in settings:
        _check_chain(settings, file)
    else:
        try:
            check_values(settings.to_dict())
        except UserError as error:
            raise UserError(f"--config={file}{_line_of(str(error), file, folders)}: {error}") from error
    return settings


def load_sweep_file(path: str) -> SweepConfig:
    """Runs `path.py` or `path.py:argument` and returns the checked settings of its sweep.

    The sweep has a name, and its files are named from the working directory. Raises UserError as
    `load_config_file` does, and for a file that describes no sweep.
    """
    returned, file, _ = _returned(path)
    if not _is_sweep(returned):
        raise UserError(
            f"--config={file}: get_config() describes no sweep; let it return a dict with base, "
            "variants and baseline (docs/analysis.md), such as those of configs/sweeps."
        )
    try:
        sweep = check_group(SweepConfig, returned, "sweep")
    except UserError as error:
        raise UserError(f"--config={file}: {error}") from error
    argument = path.partition(":")[2]
    name = sweep.name or "_".join(filter(None, (Path(file).stem, argument)))

    def placed(other: str) -> str:
        return os.path.normpath(Path(file).parent / other)

    stages = FrozenDict({name: placed(other) for name, other in sweep.stages.items()})
    return dataclasses.replace(sweep, name=name, base=placed(sweep.base), stages=stages)


def _is_sweep(returned: Any) -> bool:
    return isinstance(returned, dict) and "variants" in returned


def _returned(path: str) -> tuple[Any, str, list[Path]]:
    """Runs `path.py` or `path.py:argument`.

    Gives what it returns, the file, and the folders whose files it may import.
    """
    file, _, argument = path.partition(":")
    _check_file(file)
    own, *above = Path(file).resolve().parents[:2]
    folders = [own, *(folder for folder in above if (folder / "common.py").is_file())]
    try:
        with _importable(folders):
            return _call(_module(file), file, [argument] if argument else []), file, folders
    except (UserError, Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:  # a config file may raise anything, even SystemExit
        where = f"--config={_place(error, file, folders)}"
        raise UserError(f"{where}: {_words(error)}") from error


def _check_file(file: str) -> None:
    """Refuses what is not a Python file."""
    reason, place = no_file(file), Path(file)
    if reason == "does not exist":
        have = [str(p) for p in place.parent.glob("*.py")] if place.parent.is_dir() else []
        raise UserError(f"--config={file} does not exist{nearest(file, have)}")
    if reason:
        raise UserError(f"--config={file} {reason}; name a Python file, such as one of configs/.")
    if place.suffix != ".py":
        raise UserError(
            f"--config={file} is not a Python file, whose name ends in .py; name one of configs/."
        )


def _module(file: str) -> Any:
    """Runs the file as a module."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(module: Any, file: str, arguments: list[str]) -> Any:
    """Returns what get_config(argument) or get_config() returns."""
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"--config={file} defines no function get_config(); define one that returns a ConfigDict."
        )
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise UserError(
                f"--config={file}: its get_config() takes no argument; leave {arguments[0]!r} out."
            ) from None
        raise UserError(
            f"--config={file}: its get_config() needs an argument; write {file}:ARGUMENT."
        ) from None
    except ValueError:  # a function of C has no signature
        pass
    return get_config(*arguments)


def _settings(returned: Any, file: str) -> ml_collections.ConfigDict:
    """Checks that a config file returned settings, and names unnamed settings after the file."""
    if isinstance(returned, ml_collections.FrozenConfigDict):
        returned = returned.as_configdict()
    if not isinstance(returned, ml_collections.ConfigDict):
        what = "None" if returned is None else f"a value of type {type(returned).__name__}"
        raise UserError(
            f"--config={file}: get_config() returned {what}; let it return the ConfigDict that "
            "default_config() makes."
        )
    try:
        returned.to_dict()  # fails for a value that the file has promised and not given
        sorted(returned)  # fails for keys that are no text
        if not returned.get("name"):
            with returned.unlocked(), returned.ignore_type():
                returned.name = Path(file).stem
    except Exception as error:  # ml_collections raises many kinds
        raise UserError(
            f"--config={file}: {_words(error)}; mend the settings that it returns."
        ) from error
    return returned


def _check_chain(settings: ml_collections.ConfigDict, file: str) -> None:
    """Refuses a chain whose name is not text, or whose stages are not the names of config files."""
    stages = settings.stages
    if (
        not isinstance(stages, (list, tuple))
        or not stages
        or not all(isinstance(s, str) and s for s in stages)
    ):
        given = (
            stages if stages is None or isinstance(stages, (int, str, tuple)) else type(stages).__name__
        )
        given = " ".join(f"{given!r}".split())[:LONGEST]
        raise UserError(
            f"--config={file}: stages must name at least one stage, each by its config file, not "
            f"{given}."
        )
    if not isinstance(settings.name, str):
        raise UserError(f"--config={file}: config.name must be str, not {settings.name!r}.")


@contextlib.contextmanager
def _importable(folders: list[Path]) -> Iterator[None]:
    """Lets files in the folders be imported by name; afterwards path and modules are as before."""
    names = {file.stem for folder in folders for file in folder.glob("*.py")}
    path, before = list(sys.path), {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    sys.path[:0] = map(str, folders)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


# ---- mistakes --------------------------------------------------------------------------------------
def _words(error: BaseException) -> str:
    """Returns what an error says, on one line, with its kind where the words say too little."""
    try:
        words = " ".join(str(error).split())
    except Exception:  # the config file may define the error's class
        words = ""
    if isinstance(error, SystemExit):
        return f"it ends the program (exit status {words or '0'}); let it return settings."
    if " " not in words:  # such as the key of a KeyError, or nothing
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."


def _place(error: BaseException, file: str, folders: list[Path]) -> str:
    """Names the place where a config file failed, as `file, line 3`.

    It is the innermost frame in the file or in its neighbours.
    """
    if isinstance(error, SyntaxError):
        named = error.filename if error.filename and Path(error.filename).suffix == ".py" else file
        return f"{named}, line {error.lineno}" if error.lineno else named
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename == file or Path(f.filename).resolve().parent in folders]
    return f"{ours[-1].filename}, line {ours[-1].lineno}" if ours else file


def _line_of(sentence: str, file: str, folders: list[Path]) -> str:
    """Finds the lines that assign the setting that the sentence begins with.

    The result is empty if there are none, or more than three.
    """
    setting = "." + re.sub(r"\[.*?\]", "", re.split(r"[ =:,]", sentence, maxsplit=1)[0])
    if lines := _assigned(Path(file), setting):
        return f", {_lines(lines)}" if len(lines) <= MOST_LINES else ""
    for shared in (folder / "common.py" for folder in folders if (folder / "common.py").is_file()):
        if 0 < len(lines := _assigned(shared, setting)) <= MOST_LINES:
            return f" ({shared}, {_lines(lines)})"
    return ""


def _lines(numbers: set[int]) -> str:
    *others, last = map(str, sorted(numbers))
    return f"lines {', '.join(others)} and {last}" if others else f"line {last}"


def _assigned(file: Path, setting: str) -> set[int]:
    """Returns the lines of a file that assign a setting.

    These have `group.setting = ...` or, if there are none, the one with `dict(setting=...)`.
    """
    attributes, keywords = set(), set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        targets = node.targets if isinstance(node, ast.Assign) else ()
        for target in [node.target] if isinstance(node, ast.AugAssign) else targets:
            if isinstance(target, ast.Attribute) and setting.endswith(f".{ast.unparse(target)}"):
                attributes.add(target.lineno)
        if isinstance(node, ast.keyword) and setting.endswith(f".{node.arg}"):
            keywords.add(node.lineno)
    return attributes or (keywords if len(keywords) == 1 else set())
