"""Turns plain settings into a checked `Config`.

Types, choices and bounds are checked here, against the annotations in config.py; what must hold across
fields in consistency.py, and what changes nothing in effects.py.
"""

import collections.abc
import dataclasses
import math
import types
import typing

import ml_collections

from unimed_jax.bounds import FrozenDict, Paragraph, shown
from unimed_jax.config import Config, ModelConfig, to_dict
from unimed_jax.consistency import check, check_parts
from unimed_jax.effects import refuse_without_effect
from unimed_jax.errors import UserError, nearest
from unimed_jax.parsing import is_text

# --------------------------------------------------------------------------------------------------
# Fidelity
# --------------------------------------------------------------------------------------------------

# What `fidelity` sets where a config has None: (default, paper).
_KNOBS: dict[str, tuple[typing.Any, typing.Any]] = {
    "text.max_words": (None, 50),
    "text.double_bos": (False, True),
    "text.training_blank": (False, True),
    "data.mixing": ("per_example", "per_batch"),
    "data.packing": (True, False),
    "loss.reduction": ("example", "token"),
    "model.moe.eval_noise": (False, True),
    "model.moe.route_padding": (False, True),
    "optimizer.skip_unused": (False, True),
    "evaluate.scoring": ("corrected", "published"),
}
DEEPEST = 16  # levels of lists and dicts in a setting of JSON values
FIDELITY = {
    name: {key: pair[i] for key, pair in _KNOBS.items()} for i, name in enumerate(("default", "paper"))
}


def _filled(part: typing.Any, path: list[str], value: typing.Any) -> typing.Any:
    """Returns the settings with `value` at the path if there is None."""
    name, *rest = path
    old = getattr(part, name)
    new = _filled(old, rest, value) if rest else value if old is None else old
    return dataclasses.replace(part, **{name: new})


# --------------------------------------------------------------------------------------------------
# Types, choices and bounds
# --------------------------------------------------------------------------------------------------


def from_config_dict(settings, effects: bool = True) -> Config:
    """Turns a ConfigDict, or the dict of a run's config.json, into a Config, and checks all of it.

    What is None and belongs to `fidelity` is filled in. Raises UserError for an unknown key, a
    wrong type or value, settings that do not go together and, with `effects`, those that change
    nothing. Runs that exist are read without the last check, so that they open as before.
    """
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    config = _build(Config, settings, "config")
    for key, value in FIDELITY[config.fidelity].items():
        config = _filled(config, key.split("."), value)
    check(config)
    if effects:
        refuse_without_effect(config, FIDELITY[config.fidelity])
    return config


def checked(kind: type, key: str, value: typing.Any, where: str) -> typing.Any:
    """Checks a value by itself, as that of field `key` of a group of settings; raises UserError."""
    return _build(typing.get_type_hints(kind, include_extras=True)[key], value, where)


def check_group(kind: type, settings: dict, where: str) -> typing.Any:
    """Makes a group of settings, such as a sweep's, of plain ones; raises UserError.

    Each is checked by itself.
    """
    return _build(kind, settings, where)


def check_values(settings: dict) -> None:
    """Checks every key and value by itself, without what holds across fields; raises UserError."""
    _build(Config, settings, "config")


def _build(kind: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """Turns plain data into the annotated type `kind`, and checks each value by itself.

    It works recursively.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        built = _build(parts[0], value, where)
        for bound in parts[1:]:
            if refusal := bound.refusal(built):
                raise UserError(where + refusal)
        return built
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        given = [part for part in parts if part is not type(None)]
        return _build(next((part for part in given if _takes(part, value)), given[-1]), value, where)
    if origin is typing.Literal:
        return _choice(parts, value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _group(kind, value, where)
    if origin is tuple:
        return _tuple(parts, value, where)
    if origin is collections.abc.Mapping:
        return _mapping(parts, value, where)
    return _json(value, where) if kind is typing.Any else _scalar(kind, value, where)


def _takes(kind: typing.Any, value: typing.Any) -> bool:
    """Says whether a value is of the sort that one type of several is for: word, list or number."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _takes(parts[0], value)
    if origin is typing.Literal:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, (tuple, list))
    return type(value) is kind


def _choice(choices: tuple, value: typing.Any, where: str) -> typing.Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    known = ", ".join(str(choice) or "''" for choice in choices)
    raise UserError(f"{where}: {shown(value)} is unknown; choose from {known}.")


def _group(kind: typing.Any, value: typing.Any, where: str) -> typing.Any:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a group of settings, not {shown(value)}.")
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in value:
        if key not in hints:
            name = key if isinstance(key, str) and key.isidentifier() else shown(key)
            raise UserError(f"{where}.{name} is not a setting{nearest(name, hints)}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in value:
            raise UserError(f"{where} needs {field.name}; add it to {shown(value)}.")
    return kind(**{key: _build(hints[key], entry, f"{where}.{key}") for key, entry in value.items()})


def _tuple(kinds: tuple, value: typing.Any, where: str) -> tuple:
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
        raise UserError(f"{where} must be a tuple, not {shown(value)}.")
    kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    if len(kinds) != len(value):
        raise UserError(f"{where} must have {len(kinds)} entries, not {len(value)}: {shown(value)}.")
    return tuple(
        _build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
    )


def _mapping(kinds: tuple, value: typing.Any, where: str) -> FrozenDict:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a dict, not {shown(value)}.")
    keys = [_build(kinds[0], key, f"{where}, key {shown(key)}") for key in value]
    return FrozenDict({key: _build(kinds[1], value[key], f"{where}[{shown(key)}]") for key in keys})


def _json(value: typing.Any, where: str, depth: int = 0) -> typing.Any:
    """Returns a JSON value whose lists are tuples and whose dicts are frozen."""
    if depth > DEEPEST:
        raise UserError(
            f"{where.partition('[')[0]} is nested more than {DEEPEST} deep; make it flatter."
        )
    if isinstance(value, dict):
        for key in value:
            _build(Paragraph, key, f"{where}, key {shown(key)}")
        return FrozenDict(
            {key: _json(entry, f"{where}[{shown(key)}]", depth + 1) for key, entry in value.items()}
        )
    if isinstance(value, (tuple, list)):
        return tuple(_json(entry, f"{where}[{i}]", depth + 1) for i, entry in enumerate(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _build(Paragraph, value, where)
    if not isinstance(value, (int, float)):
        raise UserError(f"{where} must be text, a number, a list or a dict, not {shown(value)}.")
    return _scalar(type(value), value, where)


def _scalar(kind: type, value: typing.Any, where: str) -> typing.Any:
    if kind is float and type(value) is int:
        # A whole number that no float holds is refused below, as one that float32 cannot hold.
        value = float(value) if abs(value) < 2**128 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where} must be {kind.__name__}, not {shown(value)}.")
    if isinstance(value, str) and not is_text(value):
        raise UserError(
            f"{where}={shown(value)} holds half of a surrogate pair, which is no character; write "
            "another text."
        )
    if isinstance(value, str) and "\0" in value:
        raise UserError(
            f"{where}={shown(value)} holds the character NUL, which no path may have; write another "
            "text."
        )
    if isinstance(value, float) and not (value == 0 or 1e-37 < abs(value) < 1e38):
        raise UserError(f"{where}={value}: set a number that float32 can hold.")
    if isinstance(value, int) and abs(value) >= 2**32:
        raise UserError(f"{where}={shown(value)}: set a number of at most 32 bits.")
    return value


def check_model(model: ModelConfig) -> None:
    """Refuses a model that cannot be built or, as the original's `broken` cases, cannot run."""
    _build(ModelConfig, to_dict(model), "config.model")
    check_parts(model)
