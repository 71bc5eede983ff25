"""Finds questions and answers of one split that another already gives away."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

SIMILAR = 0.8  # ratio of matching letters, above which two questions are nearly the same
WORDS = 5  # of a report at least, so that its repetition means something


class Asked(NamedTuple):
    """Holds what the audit needs of an example, with texts in small letters and single blanks."""

    id: str
    task: str
    images: tuple[str, ...]
    question: str
    answer: str
    cluster: str
    template: str


class Leaks(NamedTuple):
    """Counts the examples of one split that an earlier one gives away.

    It also holds the first few of each kind.
    """

    counts: dict[str, int]
    pairs: dict[str, list[tuple[str, str]]]  # kind -> (id in the earlier split, id in this one)
    copier: dict[str, Any]  # score of answering with the most similar question of the earlier split


def _words(question: str) -> str:
    """Keeps only the letters, numbers and blanks of a question.

    Questions that differ only by a question mark are then equal.
    """
    return " ".join(re.sub(r"[^\w\s]", "", question).split())


def plain(text: str) -> str:
    """Writes a text in small letters, with one blank between words."""
    return " ".join(text.lower().split())


def text_leaks(earlier: Sequence[Asked], later: Sequence[Asked], shown: int = 20) -> Leaks:
    """Compares two splits; each example of the later one counts at most once for each kind.

    question: the same question about the same image, or of the same text alone. question_answer:
    and the same answer. similar_question: a question about the same image that is nearly the same
    (SIMILAR) and has the same answer. report: the same caption, word for word. cluster: an example
    of the same cluster. repeating counts the examples of the EARLIER split that ask a question of
    the later one.
    """
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    by_question: dict[tuple, list[Asked]] = defaultdict(list)
    by_image: dict[tuple, list[Asked]] = defaultdict(list)
    reports: dict[str, Asked] = {}
    clusters: dict[str, Asked] = {}
    for asked in earlier:
        by_question[asked.task, asked.images, _words(asked.question)].append(asked)
        if asked.images and asked.question:
            by_image[asked.task, asked.images].append(asked)
        if asked.task == "caption" and len(asked.answer.split()) >= WORDS:
            reports.setdefault(asked.answer, asked)
        if asked.cluster:
            clusters.setdefault(asked.cluster, asked)
    repeated: set[str] = set()
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for asked in later:
        if asked.question:
            same = by_question.get((asked.task, asked.images, _words(asked.question)), [])
            if same:
                repeated.update(other.id for other in same)
                pairs["question"].append((same[0].id, asked.id))
            copied = next((other for other in same if other.answer == asked.answer), None)
            if copied:
                pairs["question_answer"].append((copied.id, asked.id))
        if asked.task == "caption" and asked.answer in reports:
            pairs["report"].append((reports[asked.answer].id, asked.id))
        if asked.cluster in clusters:
            pairs["cluster"].append((clusters[asked.cluster].id, asked.id))
        if asked.task == "vqa" and asked.question:
            total[asked.template] += 1
            others = by_image.get((asked.task, asked.images), [])
            alike = [difflib.SequenceMatcher(None, asked.question, o.question).ratio() for o in others]
            if others:
                most = others[alike.index(max(alike))]
                right[asked.template] += most.answer == asked.answer
            near = [
                o
                for o, ratio in zip(others, alike, strict=True)
                if ratio > SIMILAR and o.answer == asked.answer
            ]
            if near:
                pairs["similar_question"].append((near[0].id, asked.id))
    copier: dict[str, Any] = {}
    if total:
        copier = {"n": total.total(), "value": right.total() / total.total()}
        copier["templates"] = {
            name: {"n": n, "value": right[name] / n} for name, n in sorted(total.items())
        }
    counts = {kind: len(some) for kind, some in pairs.items()} | {"repeating": len(repeated)}
    return Leaks(counts, {kind: some[:shown] for kind, some in pairs.items()}, copier)
