"""Makes questions of labelled boxes: where a thing is (refer), and what a box holds (identify).

A box that is given tight around a thing tells much of its class by its size alone; `frame` replaces
it by a square of one size around the thing's centre, so that the picture must be looked at.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unimed_jax.data.box_text import box_to_text
from unimed_jax.data.example import Example
from unimed_jax.data.records import at_least, one_of


class Labelled(NamedTuple):
    """Holds a thing in an image: its class and its box.

    The box is x1, y1, x2, y2 in pixels, with the ends outside the box.
    """

    label: str
    box: tuple[int, int, int, int]


# Options of every reader of boxes.
OPTIONS: dict[str, Any] = {
    "names": {},  # class in the file -> words for it in questions and answers
    "refer": ["unique"],  # rules by which a phrase names one thing: RULES
    "frame": 0,  # side of the square that identify shows, in pixels; 0: the tight box
    "per_image": 4,  # identify questions of an image at most, the classes in turn; 0: every box
    "seed": 0,  # of the choice among more boxes than that
}
APART = 0.02  # of the image's side: by how much a place must stand out to be named
LARGER = 0.2  # by how much a size must


def _area(box: Sequence[int]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


# rule -> (phrase, what the thing named has the most of: (box, width, height) -> number, and by how much)
RULES: dict[str, tuple[str, Callable[[Sequence[int], int, int], float], float]] = {
    "largest": ("largest {}", lambda b, w, h: float(np.log(_area(b))), LARGER),
    "smallest": ("smallest {}", lambda b, w, h: -float(np.log(_area(b))), LARGER),
    "leftmost": ("leftmost {}", lambda b, w, h: -(b[0] + b[2]) / 2 / w, APART),
    "rightmost": ("rightmost {}", lambda b, w, h: (b[0] + b[2]) / 2 / w, APART),
    "topmost": ("topmost {}", lambda b, w, h: -(b[1] + b[3]) / 2 / h, APART),
    "lowest": ("lowest {}", lambda b, w, h: (b[1] + b[3]) / 2 / h, APART),
}


def check_options(options: Mapping[str, Any], name: str) -> None:
    """Raises UserError for values of `OPTIONS` that mean nothing."""
    for rule in options["refer"]:
        one_of({"refer": rule}, "refer", ("unique", *RULES), name)
    for key in ("frame", "per_image", "seed"):
        at_least(options, key, 0, name)


def fault(box: Sequence[float], width: int, height: int) -> str:
    """Says what is wrong with a box, and returns an empty text if nothing is."""
    x1, y1, x2, y2 = box
    if x1 >= x2 or y1 >= y2:
        return f"box {tuple(box)} is empty"
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        return f"box {tuple(box)} leaves its image of {width} x {height} pixels"
    return ""


def usable(
    found: Iterable[tuple[str, Labelled]], size: tuple[int, int], skipped: list[str]
) -> list[Labelled]:
    """Returns the things whose box has an area and lies in the image of `size` (width, height).

    found: each thing after the words that name it. The others are appended to `skipped`.
    """
    things = []
    for where, thing in found:
        reason = fault(thing.box, *size)
        if reason:
            skipped.append(f"{where}: {reason}")
        else:
            things.append(thing)
    return things


def questions(
    key: str,
    things: Sequence[Labelled],
    size: tuple[int, int],
    options: Mapping[str, Any],
    cluster: str,
    meta: Mapping[str, str],
) -> Iterator[Example]:
    """Yields the refer and identify questions about the things in one image.

    key: of the image, also the start of each id. size: width and height in pixels. Of refer there
    is a question for each class and rule of `options["refer"]` that names one thing without doubt;
    its template is the rule.
    """
    width, height = size
    of_class: dict[str, list[Labelled]] = defaultdict(list)
    for thing in things:
        of_class[thing.label].append(thing)
    for label, some in sorted(of_class.items()):
        for rule in options["refer"]:
            found = _one(some, rule, width, height)
            if found is not None:
                words = (
                    RULES[rule][0].format(_name(label, options))
                    if rule != "unique"
                    else _name(label, options)
                )
                facts = {"template": rule, "prompt": words, "class": label, **meta}
                answer = box_to_text(found.box, width, height)
                yield Example(
                    f"{key}/refer/{words}", "refer", words, answer, (key,), found.box, cluster, facts
                )
    for number, thing in enumerate(_in_turn(of_class, key, options)):
        box = _framed(thing.box, options["frame"], width, height)
        facts = {
            "template": f"square of {options['frame']}" if options["frame"] else "tight box",
            **meta,
        }
        question, name = box_to_text(box, width, height), f"{key}/identify/{number}"
        yield Example(
            name,
            "identify",
            question,
            _name(thing.label, options),
            (key,),
            box,
            cluster,
            facts | {"class": thing.label},
        )


def _name(label: str, options: Mapping[str, Any]) -> str:
    return str(options["names"].get(label, label))


def _one(some: Sequence[Labelled], rule: str, width: int, height: int) -> Labelled | None:
    """Returns the thing of a class that the rule names, or None if several could be meant."""
    if rule == "unique" or len(some) == 1:
        return some[0] if rule == "unique" and len(some) == 1 else None
    _, measure, clear = RULES[rule]
    first, second, *_ = sorted(some, key=lambda thing: -measure(thing.box, width, height))
    return (
        first if measure(first.box, width, height) - measure(second.box, width, height) > clear else None
    )


def _in_turn(
    of_class: Mapping[str, Sequence[Labelled]], key: str, options: Mapping[str, Any]
) -> list[Labelled]:
    """Chooses the things that the task identify asks about.

    It takes one drawn thing of each class, then another of each, and so on.
    """
    seed = int.from_bytes(hashlib.sha256(f"{options['seed']}/{key}".encode()).digest()[:8])
    rng = np.random.default_rng(seed)
    queues = [[some[i] for i in rng.permutation(len(some))] for _, some in sorted(of_class.items())]
    turns = [
        queue[n] for n in range(max(map(len, queues), default=0)) for queue in queues if n < len(queue)
    ]
    return turns[: options["per_image"] or None]


def _framed(
    box: tuple[int, int, int, int], side: int, width: int, height: int
) -> tuple[int, int, int, int]:
    """Returns a square of `side` pixels around the centre of a box, moved into the image.

    If `side` is 0, it returns the box itself.
    """
    if not side:
        return box
    x = min(max((box[0] + box[2] - side) // 2, 0), max(width - side, 0))
    y = min(max((box[1] + box[3] - side) // 2, 0), max(height - side, 0))
    return x, y, min(x + side, width), min(y + side, height)
