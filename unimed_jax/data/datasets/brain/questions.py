"""Asks about the brain slices: five visual tasks, generated from a seed.

Every answer follows from the picture's own geometry (`Slice`): nothing is asked of structures that
are tiny or cut off, and no side is named in a sagittal slice. Questions of vqa are balanced: for
each wording, every answer is correct equally often in each split, so that the words alone do not
give it away.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from unimed_jax.config import VISUAL_TASKS
from unimed_jax.data.box_text import box_to_text
from unimed_jax.data.datasets.brain.volume import MAPS, PAIRED, PIXEL, PLANES, SIDES, SIZE, Slice
from unimed_jax.data.example import Example

CLS_QUESTIONS = {
    "plane": "Axial, coronal or sagittal?",
    "map": "T1 image, grey matter map or white matter map?",
}

# vqa template -> questions per image on average in train; in val and test all templates get the
# same number.
VQA_SHARE = {
    "visible": 2.0,
    "choice": 1.0,
    "plane": 0.4,
    "is_plane": 0.4,
    "map": 0.4,
    "level": 0.8,
    "anterior": 0.3,
    "order": 0.3,
}
CLOSED = ("visible", "is_plane", "order")
# Questions per image and task at most, and examples per task of a split where it is thinned.
PER_IMAGE = {
    "train": {"refer": 4, "identify": 4, "cls": 2},
    "held_out": {"refer": 4, "identify": 4, "cls": 2},
}
TOTAL = {"val": 120, "test": 400}

_PLURAL = {
    "thalamus": "thalami",
    "caudate nucleus": "caudate nuclei",
    "putamen": "putamina",
    "hippocampus": "hippocampi",
    "amygdala": "amygdalae",
    "lateral ventricle": "lateral ventricles",
}
# Borders between levels, in mm; they lie in gaps between slabs.
_LEVELS = {
    "axial": ((-34.5, "low"), (15.5, "middle"), (math.inf, "high")),
    "coronal": ((-46.5, "back"), (19.5, "middle"), (math.inf, "front")),
    "sagittal": ((36.5, "medial"), (math.inf, "lateral")),
}


class Candidate(NamedTuple):
    """Holds a question that could be asked of the slice with number `at`.

    Questions of one `group` are balanced among their answers.
    """

    group: Hashable
    at: int
    question: str
    answer: str
    structure: str = ""


# Slice number, template, question, answer, more meta, box.
_Draft = tuple[int, str, str, str, dict[str, str], tuple[int, int, int, int] | None]


def level(plane: str, position: int) -> str:
    return next(name for border, name in _LEVELS[plane] if position < border)


def ask(slices: Sequence[Slice], split: str, rng: np.random.Generator) -> list[list[Example]]:
    """Asks about each slice of one split, in the order of `slices`.

    Ids are `<slice>/<task>/<number>`.
    """
    limits = PER_IMAGE["train" if split == "train" else "held_out"]
    # A head with one map is not asked which one it shows.
    kinds = sorted(CLS_QUESTIONS if len({piece.map for piece in slices}) > 1 else {"plane"})
    drafts: dict[str, list[_Draft]] = {task: [] for task in VISUAL_TASKS}
    for at, piece in enumerate(slices):
        names = sorted(piece.boxes)
        for task in ("refer", "identify"):
            for name in rng.permutation(names)[: limits[task]].tolist():
                box = piece.boxes[name]
                text = box_to_text(box, SIZE, SIZE)
                question, answer = (name, text) if task == "refer" else (text, name)
                meta = {"structure": name} | ({"prompt": name} if task == "refer" else {})
                drafts[task].append((at, task, question, answer, meta, box))
        for template in rng.permutation(kinds)[: limits["cls"]].tolist():
            answer = piece.plane if template == "plane" else MAPS[piece.map]
            drafts["cls"].append((at, template, CLS_QUESTIONS[template], answer, {}, None))
        drafts["caption"].append((at, "report", "", report(piece), {}, None))
    for template, candidates in _vqa(slices, rng).items():
        total = VQA_SHARE[template] * len(slices) if split == "train" else TOTAL[split] / len(VQA_SHARE)
        kind = {"answer_type": "CLOSED" if template in CLOSED else "OPEN"}
        for c in balanced(candidates, round(total), rng):
            meta = kind | ({"structure": c.structure} if c.structure else {})
            drafts["vqa"].append((c.at, template, c.question, c.answer, meta, None))

    asked: list[list[Example]] = [[] for _ in slices]
    numbers: dict[tuple[int, str], int] = defaultdict(int)
    for task, rows in drafts.items():
        if split in TOTAL and task != "caption" and len(rows) > TOTAL[split]:
            alike = [
                (row[1], row[4].get("structure") if task in ("refer", "identify") else "")
                for row in rows
            ]
            rows = [rows[i] for i in take_turns(alike, TOTAL[split], rng)]
        for at, template, question, answer, more, place in rows:
            piece = slices[at]
            name = f"{piece.key}/{task}/{numbers[at, task]}"
            numbers[at, task] += 1
            facts = {"template": template, "plane": piece.plane, "map": piece.map} | more
            asked[at].append(
                Example(name, task, question, answer, (piece.key,), place, piece.slab.name, facts)
            )
    return asked


def take_turns(kinds: Sequence[Hashable], total: int, rng: np.random.Generator) -> list[int]:
    """Draws `total` items so that kinds take turns: none prevails while others are left.

    Returns rising indices.
    """
    queues: dict[Hashable, list[int]] = defaultdict(list)
    for i in rng.permutation(len(kinds)).tolist():
        queues[kinds[i]].append(i)
    turns = [queue[n] for n in range(len(kinds)) for queue in queues.values() if n < len(queue)]
    return sorted(turns[:total])


def balanced(candidates: list[Candidate], total: int, rng: np.random.Generator) -> list[Candidate]:
    """Draws about `total` candidates so that all answers of a group occur equally often.

    Groups take turns; each turn adds one candidate of every answer. A group with a single answer
    gives none.
    """
    groups: dict[Hashable, dict[str, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for i in rng.permutation(len(candidates)):
        groups[candidates[i].group][candidates[i].answer].append(candidates[i])
    queues = [answers for answers in groups.values() if len(answers) > 1]
    chosen: list[Candidate] = []
    seen: set[tuple[int, str]] = set()
    while queues and len(chosen) < total:
        rest = []
        for answers in queues:
            turn = []
            for queue in answers.values():
                while queue and (queue[-1].at, queue[-1].question) in seen:
                    queue.pop()
                turn += [queue.pop()] if queue else []
            if len(turn) == len(answers) and len(chosen) < total:
                chosen += turn
                seen |= {(c.at, c.question) for c in turn}
                rest.append(answers)
        queues = rest
    return sorted(chosen, key=lambda c: c.at)


def _vqa(slices: Sequence[Slice], rng: np.random.Generator) -> dict[str, list[Candidate]]:
    """Returns template -> all that could be asked."""
    found: dict[str, list[Candidate]] = {template: [] for template in VQA_SHARE}
    add: Callable = lambda template, *rest: found[template].append(Candidate(*rest))  # noqa: E731
    for i, piece in enumerate(slices):
        visible = sorted(piece.boxes)
        for name in visible:
            add("visible", name, i, f"Is the {name} visible?", "yes", name)
        for name in piece.absent:
            add("visible", name, i, f"Is the {name} visible?", "no", name)
        for name, other in itertools.product(visible, piece.absent):
            first, second = (
                sorted((name, other)) if rng.integers(2) else sorted((name, other), reverse=True)
            )
            question = f"Which is visible, the {first} or the {second}?"
            add("choice", frozenset((name, other)), i, question, name, name)
        add("plane", "plane", i, "In which plane is this slice?", piece.plane)
        for plane in PLANES:
            add(
                "is_plane",
                plane,
                i,
                f"Is this {_article(plane)} slice?",
                "yes" if plane == piece.plane else "no",
            )
        add("map", "map", i, "What kind of image is this?", MAPS[piece.map])
        add(
            "level",
            "level",
            i,
            "At which level of the brain is this slice?",
            level(piece.plane, piece.position),
        )
        if piece.plane != "sagittal":
            continue
        # Mirrored at random, so only the picture tells left from right.
        add(
            "anterior",
            "anterior",
            i,
            "Which side of the image is anterior?",
            "right" if piece.mirrored else "left",
        )
        for name, other in itertools.permutations(visible, 2):
            a, b = piece.boxes[name], piece.boxes[other]
            apart = (a[0] + a[2] - b[0] - b[2]) / 2  # pixels between the centres
            if abs(apart) >= 4:
                question = f"Is the {name} to the left of the {other} in the image?"
                add("order", (name, other), i, question, "yes" if apart < 0 else "no", name)
    return found


def _article(plane: str) -> str:
    return f"an {plane}" if plane[0] in "aeiou" else f"a {plane}"


# --------------------------------------------------------------------------------------------------
# Reports
# --------------------------------------------------------------------------------------------------


def report(piece: Slice) -> str:
    """Writes a report of one image: what it shows, then place and size of up to four structures.

    A pair of structures counts as one. Places are thirds of the image; sizes are those of the box
    in mm as shown, to the nearest 5 mm.
    """
    found: list[tuple[int, str]] = []
    merged = set()
    for name in PAIRED:
        pair = [piece.boxes[n] for side in SIDES if (n := f"{side} {name}") in piece.boxes]
        if len(pair) == 2:
            merged |= {f"{side} {name}" for side in SIDES}
            _, y1, _, y2 = np.mean(pair, axis=0)
            row = _third((y1 + y2) / 2, ("upper part", "middle", "lower part"))
            width, height = (
                _mm((a[i + 2] - a[i] + b[i + 2] - b[i]) / 2) for a, b in [pair] for i in (0, 1)
            )
            text = f"Both {_PLURAL[name]} are in the {row}, {width} x {height} mm each."
            found.append((_area(pair[0]) + _area(pair[1]), text))
    for name, box in sorted(piece.boxes.items()):
        if name not in merged:
            row = _third((box[1] + box[3]) / 2, ("upper ", "", "lower "))
            column = _third((box[0] + box[2]) / 2, ("left", "centre", "right"))
            size = f"{_mm(box[2] - box[0])} x {_mm(box[3] - box[1])} mm"
            text = f"The {name} is at the {row}{column}, {size}."
            found.append((_area(box), text))
    found.sort(key=lambda item: (-item[0], item[1]))
    sentences = [
        f"{piece.plane.capitalize()} {MAPS[piece.map]}, {level(piece.plane, piece.position)} level."
    ]
    sentences += [text for _, text in found[:4]] or [
        "None of the structures is large enough to measure."
    ]
    if piece.plane == "sagittal":
        sentences.append(f"Anterior is on the {'right' if piece.mirrored else 'left'}.")
    return " ".join(sentences)


def _third(pixel: float, words: tuple[str, str, str]) -> str:
    return words[0] if pixel < SIZE * 0.42 else words[2] if pixel > SIZE * 0.58 else words[1]


def _mm(pixels: float) -> int:
    return 5 * max(1, round(pixels * PIXEL / 5))


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
