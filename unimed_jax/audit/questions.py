"""Finds questions and answers of one split that another already gives away."""

import difflib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unimed_jax.data.columns import hash_of

SIMILAR = 0.8  # ratio of matching letters, above which two questions are nearly the same
WORDS = 5  # of a report at least, so that its repetition means something
LONG = 200  # letters, from which a text is only kept as its hash where equality is all that counts
DICOM = "DICOM "  # how names of groups begin that are the same in every set
GROUPS = ("patient", "case", "study")  # of which all examples belong into one split
COMBINED = 256  # choices of earlier images that several images of one example are compared as


class Asked(NamedTuple):
    """Holds what the audit needs of an example, with texts in small letters and single blanks."""

    id: str
    task: str
    images: tuple[str, ...]
    question: str
    answer: str
    cluster: str
    template: str
    groups: tuple[tuple[str, str], ...] = ()  # of GROUPS: (kind, name)


class Leaks(NamedTuple):
    """Counts the examples of one split that an earlier one gives away.

    It also holds the first few of each kind.
    """

    counts: dict[str, int]
    pairs: dict[str, list[tuple[str, str]]]  # kind -> (id in the earlier split, id in this one)
    copier: dict[str, Any]  # score of answering with the most similar question of the earlier split


def words_of(question: str) -> str:
    """Keeps of a question only the letters, numbers and blanks, and the brackets in a box.

    Questions that differ only by a question mark are then equal. One of signs alone stays as it is.
    """
    return " ".join(re.sub(r"[^\w\s<>]", "", question).split()) or question


def plain(text: str) -> str:
    """Writes a text in small letters, with one blank between words."""
    return " ".join(text.lower().split())


def kept(text: str) -> str:
    """Returns a text, or the hash of a long one: they only serve to tell equal ones."""
    return text if len(text) < LONG else f"{hash_of(text):016x}"


def question_key(question: str) -> str:
    """Returns what is equal for questions with the same words: these, or their hash if they are long."""
    return kept(words_of(question))


def given_by_text(asked: Sequence[Asked]) -> set[str]:
    """Names the questions without image, the reports and the groups that other examples may repeat."""
    found: set[str] = set()
    for one in asked:
        if one.question and not one.images:
            found.add(f"question {one.task} {question_key(one.question)}")
        if _report(one):
            found.add(f"report {one.answer}")
        found.update(f"{kind} {name}" for kind, name in one.groups if name.startswith(DICOM))
    return found


def _report(asked: Asked) -> bool:
    # a long text is kept as its hash, a single word
    long = len(asked.answer) == 16 and " " not in asked.answer
    return asked.task == "caption" and (long or len(asked.answer.split()) >= WORDS)


def text_leaks(
    earlier: Sequence[Asked],
    later: Sequence[Asked],
    same: Mapping[str, Sequence[str]] | None = None,
    rewordings: Mapping[str, Sequence[str]] | None = None,
    one_set: bool = True,
    shown: int = 20,
) -> Leaks:
    """Compares two splits; each example of the later one counts at most once for each kind.

    question: the same question about the same image, or of the same text alone. question_answer:
    and the same answer. similar_question: a question about the same image that is nearly the same
    (SIMILAR) and has the same answer. rewording: a question about the same image in words that the
    raw files give as another wording of the later one. report: the same caption, word for word.
    cluster: an example of the same cluster; patient, case, study: of the same one by its own name.
    question_text: the same question about whatever image, which gives nothing away by itself.
    repeating and reworded count the examples of the EARLIER split that ask a question of the later
    one, and that ask it in other words.

    same: image of the later split -> those of the earlier split that are (nearly) the same, the most
    alike first; None: equal keys are the same image. rewordings: id in the later split -> other
    wordings. one_set: whether both splits are of one set, where clusters and groups of equal name are
    the same ones.
    """
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    by_question: dict[tuple, list[Asked]] = defaultdict(list)
    by_image: dict[tuple, list[Asked]] = defaultdict(list)
    texts: set[str] = set()
    reports: dict[str, Asked] = {}
    groups: dict[tuple[str, str], Asked] = {}
    for asked in earlier:
        if asked.question:
            words = question_key(asked.question)
            by_question[asked.task, asked.images, words].append(asked)
            texts.add(words)
            if asked.images:
                by_image[asked.task, asked.images].append(asked)
        if _report(asked):
            reports.setdefault(asked.answer, asked)
        for group in _groups(asked, one_set):
            groups.setdefault(group, asked)
    repeated: set[str] = set()
    reworded: set[str] = set()
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for asked in later:
        images = [asked.images]
        if same is not None:  # none if the earlier split lacks an image
            choices = itertools.product(*(same.get(key, ()) for key in asked.images))
            images = list(itertools.islice(choices, COMBINED))
        if asked.question:
            words = question_key(asked.question)
            found = [
                other for some in images for other in by_question.get((asked.task, some, words), ())
            ]
            if found:
                repeated.update(other.id for other in found)
                pairs["question"].append((found[0].id, asked.id))
            copied = next((other for other in found if other.answer == asked.answer), None)
            if copied:
                pairs["question_answer"].append((copied.id, asked.id))
            if asked.images and words in texts:
                pairs["question_text"].append(("", asked.id))
        others = [
            other
            for wording in (rewordings or {}).get(asked.id, ())
            for some in images
            for other in by_question.get((asked.task, some, question_key(plain(wording))), ())
        ]
        if others:
            reworded.update(other.id for other in others)
            pairs["rewording"].append((others[0].id, asked.id))
        if _report(asked) and asked.answer in reports:
            pairs["report"].append((reports[asked.answer].id, asked.id))
        for kind, name in _groups(asked, one_set):
            if (kind, name) in groups:
                pairs[kind].append((groups[kind, name].id, asked.id))
        if asked.task == "vqa" and asked.question:
            total[asked.template] += 1
            about = [other for some in images for other in by_image.get((asked.task, some), ())]
            most, near = _most_similar(asked, about)
            right[asked.template] += most is not None and most.answer == asked.answer
            if near is not None:
                pairs["similar_question"].append((near.id, asked.id))
    copier: dict[str, Any] = {}
    if total:
        copier = {"n": total.total(), "value": right.total() / total.total()}
        copier["templates"] = {
            name: {"n": n, "value": right[name] / n} for name, n in sorted(total.items())
        }
    counts = {kind: len(some) for kind, some in pairs.items()}
    counts |= {"repeating": len(repeated), "reworded": len(reworded)}
    firsts = {kind: some[:shown] for kind, some in pairs.items() if kind != "question_text"}
    return Leaks(counts, firsts, copier)


def _groups(asked: Asked, one_set: bool) -> list[tuple[str, str]]:
    if one_set:
        return [*([("cluster", asked.cluster)] if asked.cluster else []), *asked.groups]
    return [(kind, name) for kind, name in asked.groups if name.startswith(DICOM)]


def _most_similar(asked: Asked, others: Sequence[Asked]) -> tuple[Asked | None, Asked | None]:
    """Returns the question whose letters match best, and the first near one with the same answer."""
    most = near = None
    best = -1.0
    for other in others:
        matcher = difflib.SequenceMatcher(None, asked.question, other.question)
        wanted = near is None and other.answer == asked.answer
        # The quick ratio is an upper bound.
        if matcher.quick_ratio() <= (min(best, SIMILAR) if wanted else best):
            continue
        ratio = matcher.ratio()
        if ratio > best:
            most, best = other, ratio
        if wanted and ratio > SIMILAR:
            near = other
    return most, near
