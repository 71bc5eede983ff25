"""Defines the bounds that settings carry in their type, as in `Annotated[int, AtLeast(1)]`.

`settings.py` asks every bound of a field for its `refusal` of a value: None if the value is allowed,
else the end of the sentence that begins with the setting's name. The module also
defines a dict that can be hashed.
"""

import dataclasses
import re
from typing import Annotated, Any, NoReturn


def shown(value: Any) -> str:
    """Writes a value in one line of at most 200 characters, as a sentence about it can quote."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of many thousand digits, a list within itself, a foreign object
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-40:]}"


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Allows numbers from `least` on."""

    least: float

    def __str__(self) -> str:
        return f"at least {self.least}"

    def refusal(self, value: Any) -> str | None:
        return None if value >= self.least else f"={value}: set at least {self.least}."


@dataclasses.dataclass(frozen=True)
class AtMost:
    """Allows numbers up to `most`."""

    most: float

    def __str__(self) -> str:
        return f"at most {self.most}"

    def refusal(self, value: Any) -> str | None:
        return None if value <= self.most else f"={value}: set at most {self.most}."


@dataclasses.dataclass(frozen=True)
class Above:
    """Allows numbers greater than `limit`."""

    limit: float

    def __str__(self) -> str:
        return f"above {self.limit}"

    def refusal(self, value: Any) -> str | None:
        return None if value > self.limit else f"={value}: set a number above {self.limit}."


@dataclasses.dataclass(frozen=True)
class Below:
    """Allows numbers smaller than `limit`."""

    limit: float

    def __str__(self) -> str:
        return f"below {self.limit}"

    def refusal(self, value: Any) -> str | None:
        return None if value < self.limit else f"={value}: set a number below {self.limit}."


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
class ZeroOr:
    """Allows 0, which turns something off, and numbers from `low` to `high`."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"0 or {self.low} to {self.high}"

    def refusal(self, value: Any) -> str | None:
        allowed = value == 0 or self.low <= value <= self.high
        return None if allowed else f"={value}: set 0, or {self.low} to {self.high}."


# --------------------------------------------------------------------------------------------------
# Text and tuples
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Filled:
    """Allows text and tuples that hold something: a name of blanks names nothing."""

    def __str__(self) -> str:
        return "not empty"

    def refusal(self, value: Any) -> str | None:
        empty = not (value.strip() if isinstance(value, str) else value)
        return f" is empty ({value!r}); name at least one." if empty else None


@dataclasses.dataclass(frozen=True)
class Characters:
    """Allows text of at most `most` characters, none of them a control character.

    Text that is not `one_line` may have line ends and tabs.
    """

    most: int
    one_line: bool = True

    def __str__(self) -> str:
        return "one line" if self.one_line else "of any lines"

    def refusal(self, value: Any) -> str | None:
        if len(value) > self.most:
            return f"={shown(value)} has {len(value)} characters; set at most {self.most}."
        wrong = next((c for c in value if _is_control(c) and (self.one_line or c not in "\n\t")), None)
        return (
            None
            if wrong is None
            else f"={shown(value)} holds the control character {wrong!r}; leave it out."
        )


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f" or character in "\u2028\u2029"


@dataclasses.dataclass(frozen=True)
class FolderName:
    """Allows text that can name a folder inside another one.

    With `nested` it may be several such names, with / between them.
    """

    nested: bool = False

    def __str__(self) -> str:
        return "a relative path" if self.nested else "without /"

    def refusal(self, value: Any) -> str | None:
        if not self.nested and "/" in value:
            return f"={shown(value)} holds a /; leave it out."
        for part in value.split("/") if value else ():
            if part.strip() != part or part in ("", ".", ".."):
                return f"={shown(value)} does not name a folder inside another; use letters and digits."
            if len(part.encode()) > 200:
                return f"={shown(value)} is too long for a folder's name; set at most 200 bytes."
        return None


@dataclasses.dataclass(frozen=True)
class Distinct:
    """Allows tuples without repeated entries."""

    def __str__(self) -> str:
        return "no entry twice"

    def refusal(self, value: Any) -> str | None:
        for i, entry in enumerate(value):
            if entry in value[:i]:
                if isinstance(entry, str | int):
                    return f" names {entry!r} twice; name it once."
                return f" has the same entry at [{value.index(entry)}] and [{i}]; keep one of them."
        return None


@dataclasses.dataclass(frozen=True)
class Matches:
    """Allows text that a regular expression matches as a whole.

    choices: says in words which texts these are.
    """

    pattern: str
    choices: str

    def __str__(self) -> str:
        return self.choices

    def refusal(self, value: Any) -> str | None:
        known = re.fullmatch(self.pattern, value)
        return None if known else f": {shown(value)} is unknown; choose {self.choices}."


class FrozenDict(dict):
    """Keeps the content that it was made with, so that settings that hold it can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self):  # copies and pickles build it from a plain dict, as entries cannot be added
        return FrozenDict, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("settings cannot be changed; use dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = _refuse
    pop = popitem = clear = _refuse


# --------------------------------------------------------------------------------------------------
# Types that many settings share
# --------------------------------------------------------------------------------------------------

INT32 = 2**31 - 1  # devices count steps and places in 32 bits

Count = Annotated[int, AtLeast(1), AtMost(INT32)]
Whole = Annotated[int, AtLeast(0), AtMost(INT32)]
Size = Annotated[int, AtLeast(1), AtMost(2**20)]  # of one axis of an array; larger ones are mistakes
Pixels = Annotated[int, AtLeast(1), AtMost(8192)]
Depth = Annotated[int, AtLeast(1), AtMost(1024)]
Experts = Annotated[int, AtLeast(1), AtMost(1024)]
Length = Annotated[int, AtLeast(1), AtMost(65536)]  # rows of a batch, tokens of an answer

# of learning: Adam moves a parameter by about so much each step
Rate = Annotated[float, AtLeast(0), AtMost(10)]
Epsilon = Annotated[float, Above(0), AtLeast(1e-20), AtMost(1)]
WeightDecay = Annotated[float, AtLeast(0), AtMost(10)]
Factor = Annotated[float, Above(0), AtLeast(1e-6), AtMost(1e6)]
Weight = Annotated[float, Above(0), AtLeast(1e-6), AtMost(1e6)]
WeightOrZero = Annotated[float, AtLeast(0), AtMost(1e6)]
Share = Annotated[float, Between(0, 1)]
Zoom = Annotated[float, AtLeast(0.1), AtMost(10)]
# Not 1, nor what float32 rounds to 1: both are divided by 1 - value.
Decay = Annotated[float, AtLeast(0), Below(1), AtMost(0.999999)]
Dropout = Annotated[float, AtLeast(0), Below(1), AtMost(0.99)]

Text = Annotated[str, Characters(4096)]
Place = Annotated[str, Characters(4096)]  # path of a file or folder
Paragraph = Annotated[str, Characters(65536, one_line=False)]
Name = Annotated[str, Filled(), Characters(4096)]
Part = Annotated[str, Filled(), Characters(200), FolderName()]
Names = Annotated[tuple[Name, ...], Distinct()]
