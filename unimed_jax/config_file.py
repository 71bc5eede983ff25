"""Reads a config file: runs it, finds its neighbours, and names the file and line of a mistake in it."""

import ast
import contextlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from unimed_jax.errors import UserError, nearest
from unimed_jax.settings import check_values


def load_config_file(path: str):
    """Runs `path.py` or `path.py:argument` and returns its ConfigDict.

    The file may import its neighbours, and those of a common.py one folder up, whatever the working directory. Raises
    UserError with file and line if it fails.
    """
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        folder = Path(file).parent
        have = [str(p) for p in folder.glob("*.py")] if folder.is_dir() else []
        raise UserError(f"--config={file} does not exist{nearest(file, have)}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    own, *above = Path(file).resolve().parents[:2]
    folders = [own, *(folder for folder in above if (folder / "common.py").is_file())]
    try:
        with _importable(folders):
            spec.loader.exec_module(module)
            settings = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={_place(error, file, folders)}: {' '.join(str(error).split())}") from error
    if "stages" not in settings:
        try:
            check_values(settings.to_dict())
        except UserError as error:
            raise UserError(f"--config={file}{_line_of(str(error), file, folders)}: {error}") from error
    if not settings.name:
        settings.name = Path(file).stem
    return settings


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


def _place(error: Exception, file: str, folders: list[Path]) -> str:
    """Where a config file failed, as `file, line 3`: the innermost frame in it or in its neighbours."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno or '?'}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename == file or Path(f.filename).resolve().parent in folders]
    return f"{ours[-1].filename}, line {ours[-1].lineno}" if ours else f"{file}, line ?"


def _line_of(sentence: str, file: str, folders: list[Path]) -> str:
    """Finds where a file assigns the setting that the sentence begins with; empty if that is not one line alone."""
    setting = "." + re.sub(r"\[.*?\]", "", re.split(r"[ =:,]", sentence, maxsplit=1)[0])
    if len(lines := _assigned(Path(file), setting)) == 1:
        return f", line {lines.pop()}"
    for shared in (folder / "common.py" for folder in folders if (folder / "common.py").is_file()):
        if not lines and len(there := _assigned(shared, setting)) == 1:
            return f" ({shared}, line {there.pop()})"
    return ""


def _assigned(file: Path, setting: str) -> set[int]:
    """Returns the lines with `group.setting = ...` or, without any, those with `dict(setting=...)`."""
    attributes, keywords = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Attribute) and setting.endswith(f".{ast.unparse(target)}"):
                attributes.add(target.lineno)
        if isinstance(node, ast.keyword) and setting.endswith(f".{node.arg}"):
            keywords.add(node.lineno)
    return attributes or keywords
