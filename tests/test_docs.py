"""The pages for readers name only what exists: links, pictures, files, verbs, options and settings."""

import argparse
import functools
import importlib
import re
import shlex
from pathlib import Path

import ml_collections
import pytest

from unimed_jax.config import default_config
from unimed_jax.config_file import load_config_file, load_sweep_file
from unimed_jax.errors import UserError
from unimed_jax.main import VERBS
from unimed_jax.settings import check_values
from unimed_jax.verbs import analyze, data
from unimed_jax.verbs.options import Parser, with_overrides

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# What pages say in words that a reader replaces, or makes by another command of the page.
OTHERS = (
    "configs/my_lab.py",
    "configs/sweeps/NAME.py",
    "my_lab/my_data.py",
    "unimed_jax/verbs/agree.py",
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
GROUPS = {"data": data.COMMANDS, "analyze": analyze.COMMANDS}


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@functools.cache
def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@functools.cache
def without_code(file: Path) -> str:
    """Returns a page without its code, in which no link is meant."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text_of(file), flags=re.DOTALL)


@functools.cache
def anchors(file: Path) -> set[str]:
    """Lists the anchors that GitHub gives to the headings of a page."""
    prose = re.sub(r"```.*?```", "", text_of(file), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(file: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(file))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        if re.match("https?:", link):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), f"{name(page)}: {link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{name(page)}: {link} has no such heading"


def test_the_readme_is_short_and_leads_to_every_page_and_picture():
    readme = ROOT / "README.md"
    assert len(readme.read_bytes()) < 8000
    reached, new = set(), [readme]
    while new:
        page = new.pop()
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.is_file() and target not in reached:
                reached.add(target)
                new += [target] if target.suffix == ".md" else []
    wanted = {*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.png"), *ROOT.glob("docs/pictures/*.png")}
    assert not {name(file) for file in wanted - reached}


FOLDERS = ("benchmarks", "configs", "docs", "launch", "tests", "unimed_jax")


@functools.cache
def modules() -> list[str]:
    return [f"/{name(file)}" for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_names_exists(page):
    for found in re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./{{}},*-]*\w", text_of(page)):
        choice = re.search(r"{(.*?)}", found)
        for one in choice[1].split(",") if choice else [""]:
            path = found.replace(choice[0], one) if choice else found
            if path not in OTHERS:
                assert any(ROOT.glob(path)), f"{name(page)}: {path} does not exist"
    for found in re.findall(r"`([\w/]+\.py)`", text_of(page)):  # also `store.py` for data/store.py
        if found not in OTHERS:
            there = any(module.endswith(f"/{found}") for module in modules())
            assert there, f"{name(page)}: there is no {found}"


class Options(Exception):
    """Carries the parser of a verb out of its `run`, before anything is done."""


@functools.cache
def options_of(command: tuple[str, ...]) -> argparse.ArgumentParser:
    """Returns the parser of a verb, or of a command such as ("data", "check")."""

    def leave(self, arguments):
        raise Options(self)

    module = importlib.import_module(".".join(("unimed_jax.verbs", *command)).replace("-", "_"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", leave)
        patch.setattr(Parser, "parse_known_args", leave)
        with pytest.raises(Options) as found:
            module.run([])
    return found.value.args[0]


def test_help_shows_each_command_as_a_person_types_it():
    every = [(verb,) for verb in VERBS if verb not in GROUPS]
    every += [(group, command) for group in GROUPS for command in GROUPS[group]]
    for command in every:
        assert options_of(command).prog == f"python -m unimed_jax.main {' '.join(command)}"


def words_of(line: str) -> list[str]:
    """Splits a command as a shell would; what ends it (a pipe, a comment) is left out."""
    line = re.split(r"\s&&|;|\s\||\s>|\s#|\s\(", line)[0]
    try:
        return shlex.split(line)
    except ValueError:  # a quotation mark that a code span cuts off
        return line.split()


@functools.cache
def commands(file: Path) -> list[list[str]]:
    """Lists the words after `unimed_jax.main` of every command of a page or a docstring."""
    text = re.sub(r"\\\n\s*", " ", text_of(file))
    found = []
    if file.suffix == ".md":
        # code spans, also those that leave the beginning out (`evaluate --run=DIR`), and lines of blocks
        prose, blocks = BLOCK.sub("", text), BLOCK.findall(text)
        found += re.findall(r"`python -m unimed_jax\.main ([^`]*)`", prose)
        found += re.findall(rf"`((?:{'|'.join(VERBS)}) [^`]*--[^`]*)`", prose)
        text = "\n".join(block for language, block in blocks if language in ("", "bash"))
    found += [
        line.partition("unimed_jax.main ")[2]
        for line in text.splitlines()
        if "-m unimed_jax.main " in line
    ]
    return [words_of(line) for line in found]


def problem(words: list[str]) -> str:
    """Says what is wrong with the words of a command; empty if nothing is."""
    verb = (words.pop(0),) if words and not words[0].startswith("-") else ("train",)
    if verb[0] not in VERBS:
        return f"{verb[0]} is not a verb"
    if verb[0] in GROUPS:
        if not words or words[0] not in GROUPS[verb[0]]:
            return "" if words[:1] == ["--help"] else f"{words[:1]} is not a command of {verb[0]}"
        verb = (*verb, words.pop(0))
    known = options_of(verb)._option_string_actions
    file, settings = "", []
    for word in (word.strip("[]") for word in words):
        option, _, value = word.partition("=")
        if "$" in word:
            continue  # what a shell puts there
        if option.startswith("--config."):
            settings.append(word)
        elif option.startswith("--") and option not in known:
            return f"{' '.join(verb)} has no option {option}"
        elif option == "--config" and (ROOT / value.partition(":")[0]).is_file():
            file = value
    return settings_problem(verb, file, settings)


def settings_problem(verb: tuple[str, ...], file: str, settings: list[str]) -> str:
    """Lays the settings of a command over its config file; without one they need only exist."""
    if not file:
        unknown = [word for word in settings if not is_setting(word.partition("=")[0][2:])]
        return f"{unknown[0]} is not a setting" if unknown else ""
    try:
        if verb == ("sweep",):
            load_sweep_file(str(ROOT / file))
        elif "stages" not in (config := load_config_file(str(ROOT / file))):
            with_overrides(config, settings)
    except UserError as error:
        return str(error)
    return ""


def is_setting(path: str) -> bool:
    """Says whether `config.a.b` names a setting or a group of settings."""
    place = default_config()
    for part in path.removeprefix("config.").split("."):
        if not isinstance(place, ml_collections.ConfigDict):
            return isinstance(place, tuple)  # what a list or an own mapping holds is not told by a path
        if part not in place:
            return False
        place = place[part]
    return True


WITH_COMMANDS = [
    *PAGES,
    *ROOT.glob("configs/**/*.py"),
    *ROOT.glob("unimed_jax/verbs/*/*.py"),
]


@pytest.mark.parametrize("file", WITH_COMMANDS, ids=name)
def test_every_command_has_known_options_and_settings(file):
    for words in commands(file):
        shown = " ".join(words)
        reason = problem(words)
        assert not reason, f"{name(file)}: {shown}: {reason}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_setting_that_a_page_names_exists(page):
    for path in re.findall(r"(?<![\w/.])config\.[a-z_]+(?:\.[a-z_]+)*", text_of(page)):
        if path not in ("config.json", "config.py"):
            assert is_setting(path), f"{name(page)}: {path} is not a setting"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_between_backticks_have_an_effect(page):
    for span in re.findall(r"`(--config\.[^`]*=[^`]*)`", text_of(page)):
        with_overrides(default_config(), words_of(span))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_in_python_are_understood(page):
    """Runs blocks that fill in a config; whole files of code have tests of their own."""
    for language, block in BLOCK.findall(text_of(page)):
        if language == "python" and block.startswith("config."):
            config = default_config()
            exec(block, {"config": config})
            check_values(config.to_dict())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_benchmark_that_a_page_names_has_its_options(page):
    text = re.sub(r"\\\n\s*", " ", text_of(page))
    for file, line in re.findall(r"python benchmarks/(\w+)\.py((?: [^`\n]*)?)", text):
        words = words_of(line)
        if file == "campaign":
            file = f"campaigns/{words.pop(0)}"
        known = text_of(ROOT / f"benchmarks/{file}.py")
        for part in re.findall(r"^(?:from|import) (\w+)", known, re.MULTILINE):
            known += "".join(text_of(one) for one in ROOT.glob(f"benchmarks/{part}.py"))
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            given = f'"{option}"' in known or f'"{option[2:]}"' in known
            assert given or option.startswith("--config."), f"{name(page)}: {file} has no {option}"
