"""Reads what the names of SA-Med2D's files say.

An image is <modality>--<set>--<case>--<slice>.png; a mask adds --<class>_<instance>, both numbers.
"""

import hashlib
from typing import NamedTuple

# The first word of a modality's name stands for it (ct_00, mr_t1ce), but for these.
_WHOLE = {"x_ray": "x_ray", "x": "x_ray"}


class Name(NamedTuple):
    """Holds the parts of an image's name."""

    modality: str  # ct, mr, pet, ultrasound, x_ray, fundus, endoscopy, dermoscopy
    set: str
    case: str


def parse(stem: str) -> Name | None:
    """Reads the name of an image without its ending; returns None if it is not of that form."""
    parts = stem.split("--")
    if len(parts) < 4 or not all(parts):
        return None
    head = parts[0].partition("_")[0]
    return Name(_WHOLE.get(parts[0], _WHOLE.get(head, head)), parts[1], "--".join(parts[2:-1]))


def parse_mask(stem: str) -> tuple[str, int, int] | None:
    """Reads image, class and instance from the name of a mask; returns None for another name."""
    image, _, tail = stem.rpartition("--")
    kind, _, instance = tail.partition("_")
    if not (image and _is_number(kind) and _is_number(instance)):
        return None
    return image, int(kind), int(instance)


def cluster_of(stem: str) -> str:
    """Returns what keeps the slices of one patient together: set and case."""
    name = parse(stem)
    return f"{name.set}--{name.case}" if name else stem


def rank(seed: int, text: str) -> int:
    """Returns a number of 64 bits by which names are drawn: the same for the same name and seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest())


def _is_number(text: str) -> bool:
    return len(text) <= 5 and text.isascii() and text.isdigit()
