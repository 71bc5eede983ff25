"""Surveys one data set by split and task: what it holds, and what of it is at fault.

Faults are what is empty, cut, outside the image or personal.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from unimed_jax.audit.questions import Asked, plain
from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.forms import text_to_box

CUT = 50  # words, after which Uni-Med's text processor cuts a question or a report
FACTS = ("answer_type", "language", "modality")  # keys of meta that are counted
SHOWN = 20  # examples of each finding that are named

# What looks like a person's data; each is a pattern and the words for it.
PERSONAL = {
    "a home folder": re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\Users\\)\w+"),
    "an e-mail address": re.compile(r"\b[\w.+-]+@[\w-]+\.\w{2,}\b"),
    "a date of birth": re.compile(r"\b(?:dob|date of birth|born(?: on)?)\b[ :]*\d", re.IGNORECASE),
    "a patient's name or number": re.compile(
        r"\b(?:patient(?:'s)? name|name of (?:the )?patient|mrn|medical record number)\b[ :#]*\w",
        re.IGNORECASE,
    ),
    "a telephone number": re.compile(r"(?<!\d)(?:\+\d{1,3}[ -]?)?\(?\d{3}\)?[ -]\d{3}[ -]\d{4}(?!\d)"),
}


class Survey(NamedTuple):
    """Holds what was found in a set: facts by split, and the parts that leaks are looked for in."""

    facts: dict[str, Any]  # split -> numbers
    personal: dict[str, list[str]]  # words for a pattern -> places
    boxes: list[str]  # ids of examples whose box is empty or leaves its image, by its text
    asked: dict[str, list[Asked]]  # split -> its examples
    images: dict[str, list[str]]  # split -> its image keys, each once


def survey(dataset: Dataset) -> Survey:
    """Reads every example of a set once; images are not looked at."""
    facts: dict[str, Any] = {}
    asked: dict[str, list[Asked]] = {}
    images: dict[str, list[str]] = {}
    personal: dict[str, list[str]] = {}
    boxes: list[str] = []
    for split in dataset.splits:
        counts: dict[str, Counter[str]] = {key: Counter() for key in ("task", *FACTS)}
        lengths: list[int] = []
        clusters, keys = set(), dict[str, None]()
        cut = 0
        asked[split] = []
        for example in dataset.examples(split):
            counts["task"][example.task] += 1
            for key in FACTS:
                if key in example.meta:
                    counts[key][example.meta[key]] += 1
            words = len(example.answer.split())
            lengths.append(words)
            cut += words > CUT or len(example.question.split()) > CUT
            clusters.add(example.cluster or example.id)
            keys.update(dict.fromkeys(example.images))
            for what in _personal(example):
                personal.setdefault(what, []).append(f"{split}: {example.id}")
            if _wrong_box(example):
                boxes.append(f"{split}: {example.id}")
            asked[split].append(_asked(example))
        images[split] = list(keys)
        lengths.sort()
        facts[split] = {
            "examples": len(lengths),
            "images": len(keys),
            "clusters": len(clusters),
            **{key: dict(sorted(counter.items())) for key, counter in counts.items() if counter},
            "answer_words": {"median": lengths[len(lengths) // 2], "most": lengths[-1]},
            "over_50_words": cut,
        }
    return Survey(facts, personal, boxes, asked, images)


def _asked(example: Example) -> Asked:
    return Asked(
        example.id,
        example.task,
        example.images,
        plain(example.question),
        plain(example.answer),
        example.cluster,
        example.meta.get("template", ""),
    )


def _personal(example: Example) -> list[str]:
    texts: Iterable[str] = (example.question, example.answer, *example.images, *example.meta.values())
    whole = "\n".join(texts)
    return [what for what, pattern in PERSONAL.items() if pattern.search(whole)]


def _wrong_box(example: Example) -> bool:
    """Says whether the box of an example is empty in hundredths of the image.

    A model has to write it in hundredths.
    """
    if example.task not in ("refer", "identify"):
        return False
    box = text_to_box(example.answer if example.task == "refer" else example.question)
    return box is None or not (box[0] < box[2] <= 100 and box[1] < box[3] <= 100)
