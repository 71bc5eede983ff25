"""Bounds that settings carry in their type, as `Annotated[int, AtLeast(1)]`, and a dict that can be hashed.

`settings.py` asks every bound of a field for its `refusal` of a value: None if the value is allowed, else the end of
the sentence that begins with the setting's name.
"""

import dataclasses
import re
from typing import Annotated, Any, NoReturn


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Allows numbers from `least` on."""

    least: float

    def __str__(self) -> str:
        return f"at least {self.least}"

    def refusal(self, value: Any) -> str | None:
        return None if value >= self.least else f"={value}: set at least {self.least}."


@dataclasses.dataclass(frozen=True)
class Above:
    """Allows numbers greater than `limit`."""

    limit: float

    def __str__(self) -> str:
        return f"above {self.limit}"

    def refusal(self, value: Any) -> str | None:
        return None if value > self.limit else f"={value}: set a number above {self.limit}."


@dataclasses.dataclass(frozen=True)
class Between:
    """Allows numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"

    def refusal(self, value: Any) -> str | None:
        return None if self.low <= value <= self.high else f"={value}: set {self.low} to {self.high}."


@dataclasses.dataclass(frozen=True)
class Below:
    """Allows numbers smaller than `limit`."""

    limit: float

    def __str__(self) -> str:
        return f"below {self.limit}"

    def refusal(self, value: Any) -> str | None:
        return None if value < self.limit else f"={value}: set a number below {self.limit}."


@dataclasses.dataclass(frozen=True)
class Filled:
    """Allows text and tuples that hold something: a name of blanks names nothing."""

    def __str__(self) -> str:
        return "not empty"

    def refusal(self, value: Any) -> str | None:
        empty = not (value.strip() if isinstance(value, str) else value)
        return f" is empty ({value!r}); name at least one." if empty else None


@dataclasses.dataclass(frozen=True)
class Distinct:
    """Allows tuples without repeated entries."""

    def __str__(self) -> str:
        return "no entry twice"

    def refusal(self, value: Any) -> str | None:
        twice = [entry for i, entry in enumerate(value) if entry in value[:i]]
        return f" names {twice[0]!r} twice; name it once." if twice else None


@dataclasses.dataclass(frozen=True)
class Matches:
    """Allows text that matches the regular expression as a whole; `choices` says in words what that is."""

    pattern: str
    choices: str

    def __str__(self) -> str:
        return self.choices

    def refusal(self, value: Any) -> str | None:
        known = re.fullmatch(self.pattern, value)
        return None if known else f": {value!r} is unknown; choose {self.choices}."


class FrozenDict(dict):
    """A dict that never changes and can be hashed, so that settings which hold one stay frozen and hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self):  # copies and pickles build it from a plain dict, as entries cannot be added
        return FrozenDict, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("settings cannot be changed; use dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = _refuse
    pop = popitem = clear = _refuse


# Types that many settings share.
Count = Annotated[int, AtLeast(1)]
Whole = Annotated[int, AtLeast(0)]
Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, Between(0, 1)]
Decay = Annotated[float, AtLeast(0), Below(1)]
Name = Annotated[str, Filled()]
Names = Annotated[tuple[Name, ...], Distinct()]
