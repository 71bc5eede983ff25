"""Reads the fields of a JSON object that somebody sent; whatever is wrong with one is a sentence."""

from collections.abc import Sequence
from typing import Any

from unimed_jax.errors import nearest
from unimed_jax.serve.limits import wrong

KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class Fields:
    """Reads one object; a field that is null counts as absent."""

    def __init__(self, value: Any, where: str, known: Sequence[str] = ()):
        """Takes the object and how sentences call it; known: names beside which none is allowed."""
        if not isinstance(value, dict):
            raise wrong(f"{where} is {kind(value)}, not an object; send a JSON object.", "invalid_type")
        unknown = [name for name in value if known and name not in known]
        if unknown:
            raise wrong(
                f"{where} has an unknown field {unknown[0][:60]!r}{nearest(unknown[0][:60], known)}",
                "unknown_field",
            )
        self._value, self._where = value, where

    def has(self, name: str) -> bool:
        return self._value.get(name) is not None

    def get(self, name: str) -> Any:
        return self._value.get(name)

    def text(self, name: str, most: int, default: str | None = "") -> str:
        """Reads a text of at most so many characters; a default of None means that it is needed."""
        value = self._value.get(name)
        if value is None:
            if default is None:
                raise wrong(f"{self._name(name)} is missing; give a text.", "missing_field")
            return default
        return text(value, self._name(name), most)

    def flag(self, name: str) -> bool:
        value = self._value.get(name, False)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._type(name, "true or false")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self._value.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._type(name, "a number")
        if not low <= value <= high:
            raise wrong(f"{self._name(name)} must lie from {low:g} to {high:g}; change it.")
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self._value.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._type(name, "a whole number")
        if not low <= value <= high:
            raise wrong(f"{self._name(name)} must lie from {low} to {high}; change it.")
        return value

    def listing(self, name: str, most: int) -> list[Any]:
        """Reads a list, which is empty where the field is absent."""
        value = self._value.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._type(name, "a list")
        if len(value) > most:
            raise wrong(
                f"{self._name(name)} has {len(value)} entries, more than the {most} that are "
                "read; send fewer.",
                "too_many",
            )
        return value

    def _name(self, name: str) -> str:
        return f"{name!r} of {self._where}"

    def _type(self, name: str, wanted: str):
        return wrong(
            f"{self._name(name)} is {kind(self._value[name])}, not {wanted}; change it.", "invalid_type"
        )


def kind(value: Any) -> str:
    """Names what a JSON value is."""
    return KINDS.get(type(value), "something else")


def text(value: Any, name: str, most: int) -> str:
    """Returns a value that must be a text of at most `most` characters."""
    if not isinstance(value, str):
        raise wrong(f"{name} is {kind(value)}, not a text; send a text.", "invalid_type")
    if len(value) > most:
        raise wrong(
            f"{name} has {len(value)} characters, more than the {most} that are read; shorten it.",
            "string_above_max_length",
        )
    return value
