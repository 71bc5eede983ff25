"""Finds every field of the settings by introspection and makes hostile values for each of them.

`trials` gives them all to the checker of settings.
"""

import copy
import dataclasses
import fnmatch
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from unimed_jax.bounds import AtLeast, AtMost, Between, ZeroOr
from unimed_jax.config import Config
from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict

# --------------------------------------------------------------------------------------------------
# Fields
# --------------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """Describes one setting, with the type that it is declared with."""

    path: tuple[str | int, ...]
    hint: Any

    @property
    def name(self) -> str:
        """Returns the dotted name, as sentences write it: data.sources[0].weight."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)[1:]


# What the entry of a tuple must have besides the field that is tried.
NEEDED = {
    "train.rules": {"match": "*", "train": True},
    "evaluate.entries": {"source": "brain", "task": "vqa", "split": "val"},
}
# What must be set so that a field is read at all, by pattern of its name.
CONTEXT = {
    "router_fit.*": {"job": "router", "router_fit": {"key": "modality"}},
    "model.moe.*": {"model": {"moe": {"experts": 4}, "lora": {"rank": 0}}},
    "model.moe.min_capacity": {"model": {"moe": {"experts": 4, "capacity_factor": 2.0}}},
    "model.lora.*": {"model": {"lora": {"rank": 4}}},
    "mesh.*": {"mesh": {"auto": False}},
    "data.reencode.quality": {"data": {"reencode": {"format": "jpeg"}}},
    "evaluate.top_p": {"evaluate": {"temperature": 1.0}},
    "model.connector.top_k": {"model": {"connector": {"router": "sparse"}}},
    "model.decoder.local_rope_theta": {"model": {"decoder": {"windows": (8,)}}},
    "train.best*": {
        "train": {"best": "accuracy/brain/val/vqa"},
        "evaluate": {"entries": ({"source": "brain", "task": "vqa", "split": "val", "every": 1},)},
    },
    "train.patience": {
        "train": {"best": "accuracy/brain/val/vqa"},
        "evaluate": {"entries": ({"source": "brain", "task": "vqa", "split": "val", "every": 1},)},
    },
}


def fields(kind: type = Config, path: tuple[str | int, ...] = ()) -> Iterator[Field]:
    """Yields every field of the settings, groups of fields too.

    Of a tuple of groups only the fields of its first entry are yielded.
    """
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        here = (*path, name)
        group, many = _group(hint)
        yield Field(here, hint)
        if group is not None:
            yield from fields(group, (*here, 0) if many else here)


def _group(hint: Any) -> tuple[type | None, bool]:
    """Returns the dataclass that a type holds, if it holds one, and whether it is a tuple of them."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _group(parts[0])
    if origin in (typing.Union, types.UnionType):
        return next((found for found in map(_group, parts) if found[0]), (None, False))
    if origin is tuple:
        return _group(parts[0])[0], True
    return (hint, False) if dataclasses.is_dataclass(hint) else (None, False)


def settings_with(field: Field, value: Any) -> dict:
    """Makes settings that hold this value and the values without which it would not be read.

    All others are at their default.
    """
    settings: dict = {}
    for pattern, extra in CONTEXT.items():
        if fnmatch.fnmatchcase(field.name, pattern):
            merge(settings, extra)
    place: Any = settings
    for part, after in zip(field.path, (*field.path[1:], None), strict=True):
        if after is None:
            place[part] = value
        elif isinstance(after, int):
            name = field.name.partition("[")[0]
            place[part] = [dict(NEEDED.get(name, {}))]
            place = place[part]
        else:
            place = place[part] if isinstance(part, int) else place.setdefault(part, {})
    return settings


def merge(into: dict, extra: Mapping) -> None:
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (
    *(
        0,
        1,
        2,
        3,
        7,
        -1,
        -2,
        10**5,
        10**9,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
        2**63,
        2**64,
        10**23,
        10**400,
    ),
    *(0.0, 0.5, 1.0, 1.5, 2.0, -0.5, -1e-3, 1e-40, 1e-30, 1e-9, 0.99999999, 1e9, 1e30, 1e38, 1e300),
    *(math.inf, -math.inf, math.nan),
)
TEXTS: tuple[Any, ...] = (
    *(
        "",
        " ",
        "x",
        "1",
        "1e-3",
        "inf",
        "nan",
        "None",
        "true",
        "a\0b",
        "a\nb",
        "a/b",
        "/a",
        "../x",
        ".",
        "\u200b",
    ),
    *("\udce9", "\x1b[31m", "x" * 300, "x" * 70000),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, b"x", 1j, print, object(), {1}, range(3)),
    *(
        (),
        [],
        ((),),
        (None,),
        ("x", "x"),
        (1, 1),
        (0.0, 0.0, 0.0),
        (1.0,) * 4,
        (math.nan,) * 3,
        (True, False),
    ),
    *(
        {},
        {"x": 1},
        {"x": {"x": -1}},
        {"x": {"x": math.inf}},
        {"x": ()},
        {1: 2},
        {"": ""},
        {"\udce9": "x"},
    ),
    *([["seed", ""]], [{"match": "*", "train": True}]),
    [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]],
)


def hostile(field: Field) -> Iterator[Any]:
    """Yields the values to try on a field.

    They are values of every type, values inside the field's own tuple or dict, and its bounds.
    """
    yield from (*NUMBERS, *TEXTS, *OTHERS)
    yield from _choices(field.hint)
    for bound in _bounds(field.hint):
        for edge in _edges(bound):
            yield edge
            yield edge + 1
            yield edge - 1
    default = _default(field)
    if isinstance(default, str):
        yield default
    if isinstance(default, tuple) and all(isinstance(entry, int | float | str) for entry in default):
        for value in (*NUMBERS, *TEXTS, None, True):
            yield (value, *default[1:])
    if isinstance(default, Mapping):
        for value in (*NUMBERS, *TEXTS, None, True):
            yield {"x": value}
            yield {"x": {"x": value}}


def _default(field: Field) -> Any:
    value: Any = Config()
    for part in field.path:
        if isinstance(part, int) or not dataclasses.is_dataclass(value):
            return None
        value = getattr(value, part)
    return value


def _bounds(hint: Any) -> Iterator[Any]:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        yield from parts[1:]
        yield from _bounds(parts[0])
    elif origin in (typing.Union, types.UnionType):
        for part in parts:
            yield from _bounds(part)


def _choices(hint: Any) -> Iterator[Any]:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        yield from parts
    elif origin is tuple:
        for choice in _choices(parts[0]):
            yield (choice,)
    elif origin in (typing.Annotated, typing.Union, types.UnionType):
        for part in parts[:1] if origin is typing.Annotated else parts:
            yield from _choices(part)


def _edges(bound: Any) -> tuple:
    match bound:
        case AtLeast(edge) | AtMost(edge):
            return (edge,)
        case Between(low, high) | ZeroOr(low, high):
            return (low, high)
    return ()


class Tried(NamedTuple):
    """Holds one value of one field, and what the checker made of it."""

    field: Field
    value: Any
    config: Config | None  # if it was accepted
    sentence: str  # if it was refused


def trials() -> Iterator[Tried]:
    """Yields every field with every value, after the checker.

    Whatever the checker raises besides UserError is passed on.
    """
    for field in fields():
        for value in hostile(field):
            try:
                yield Tried(field, value, from_config_dict(settings_with(field, value)), "")
            except UserError as error:
                yield Tried(field, value, None, str(error))
