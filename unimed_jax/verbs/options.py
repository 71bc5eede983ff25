"""Parses the arguments of every verb, and lays each `--config.key=value` over the settings."""

import argparse
import ast
import importlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from unimed_jax.config import Config, default_config, to_dict
from unimed_jax.config_file import load_config_file
from unimed_jax.effects import refuse_without_effect
from unimed_jax.errors import UserError, nearest
from unimed_jax.settings import FIDELITY, from_config_dict

# The only override that concerns a finished run's tokenizer.
ACCEPTING = ("--config.text.changed=",)
CONFIG_HELP = "a file of configs/, with :argument if it takes one"


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as a UserError; otherwise it is argparse's parser."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help.")


def parser(module: str, description: str | None) -> Parser:
    """Returns the parser of the verb whose file is `module` (give __name__ and __doc__)."""
    # "analyze tug-of-war" for verbs/analyze/tug_of_war.py
    verb = module.partition(".verbs.")[2].replace(".", " ").replace("_", "-")
    return Parser(
        prog=f"python -m unimed_jax.main {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run_command(
    module: str, description: str | None, commands: Sequence[str], arguments: list[str]
) -> int | None:
    """Runs the command of a verb that has several, and returns its exit status.

    Each of `commands` is a file of the verb's folder, with _ for -. Give __name__ and __doc__ of the
    folder's module.
    """
    if arguments[:1] in (["--help"], ["-h"]):
        parser(module, description).parse_args(arguments)
    command = arguments[0] if arguments else ""
    if command not in commands:
        verb = module.rpartition(".")[2]
        raise UserError(
            f"{verb}: {command!r} is not one of {', '.join(commands)}{nearest(command, commands)}"
        )
    return importlib.import_module(f"{module}.{command.replace('-', '_')}").run(arguments[1:])


def with_overrides(
    settings: ml_collections.ConfigDict, overrides: Sequence[str], of_run: bool = False
) -> Config:
    """Lays each `--config.a.b=value` over the settings and builds the Config.

    Raises UserError for an unknown key or word, for a value that the setting does not allow, and
    for a setting without effect. With `of_run`, for a run that exists, only settings that an override
    names are checked for an effect.
    """
    named = []
    for word in overrides:
        key, equals, value = word.partition("=")
        if not key.startswith("--config.") or not equals:
            raise UserError(f"argument {word!r} is unknown; settings are given as --config.key=value.")
        *groups, name = key.removeprefix("--config.").split(".")
        place: Any = settings
        for part in [*groups, name]:
            if isinstance(place, (list, tuple)):
                raise UserError(
                    f"{key}: its group is a list; change it in the config file, or give the whole list."
                )
            if not isinstance(place, ml_collections.ConfigDict) or part not in place:
                choices = list(place.keys()) if isinstance(place, ml_collections.ConfigDict) else []
                raise UserError(f"{key} is not a setting{nearest(part, choices)}")
            parent, place = place, place[part]
        if isinstance(place, ml_collections.ConfigDict) and _is_group([*groups, name]):
            keys = ", ".join(list(place.keys())[:3])
            raise UserError(
                f"{key} is a group of settings; give one of its keys ({key}.KEY=value; {keys}, ...)."
            )
        new = _literal(value, place)
        if isinstance(place, (list, tuple)) and not isinstance(new, (list, tuple)):
            raise UserError(
                f"{key} takes a list, not {value!r}; write it in the config file, or as Python "
                f"would, in quotes: {key}=\"('first', 'second')\"."
            )
        try:
            with parent.unlocked(), parent.ignore_type():
                parent[name] = new
        # keys that a ConfigDict does not take
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{key}={value!r} is not a value of this setting ({error}).") from error
        named.append(".".join([*groups, name]))
    config = from_config_dict(settings, effects=not of_run)
    if of_run:
        refuse_without_effect(config, FIDELITY[config.fidelity], only=named)
    return config


def changed(config: Config, overrides: Sequence[str], allowed: Sequence[str]) -> Config:
    """Lays overrides over the settings of a finished run.

    Raises UserError for one that starts with none of `allowed`.
    """
    for word in overrides:
        if not word.startswith(tuple(allowed)):
            raise UserError(
                f"argument {word!r} cannot change a finished run; only {', '.join(allowed)} can."
            )
    return with_overrides(ml_collections.ConfigDict(to_dict(config)), overrides, of_run=True)


def _is_group(path: Sequence[str]) -> bool:
    """Says whether a path leads to a group of settings, not to a mapping whose keys are free."""
    place: Any = default_config()
    for part in path:
        place = place.get(part)
    return isinstance(place, ml_collections.ConfigDict) and len(place) > 0


def read_config(file: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file (`path` or `path:argument`) of one run and lays the overrides over it.

    Raises UserError for a chain, which has several runs.
    """
    settings = load_config_file(file)
    if "stages" in settings:
        raise UserError(
            f"--config={file} is a chain; name one of its stages ({', '.join(settings.stages)})."
        )
    return with_overrides(settings, overrides)


def _literal(value: str, old: Any) -> Any:
    """Reads a word as Python would; a setting that is text keeps the word as it is."""
    if isinstance(old, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # TypeError: {[]: 1}
        return {"true": True, "false": False}.get(value.lower(), value)
