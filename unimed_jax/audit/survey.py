"""Surveys one data set by split and task: what it holds, and what of it is at fault.

Faults are what is empty, cut, outside the image or personal.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from unimed_jax.audit.private import gathered, of_texts
from unimed_jax.audit.questions import GROUPS, Asked, kept, plain, question_key
from unimed_jax.data.box_text import text_to_box
from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.grounding import fault
from unimed_jax.data.info import Info, nearest_counts
from unimed_jax.data.store import SKIPPED

CUT = 50  # words, after which Uni-Med's text processor cuts a question or a report
FACTS = ("answer_type", "language", "modality", "template")  # keys of meta that are counted
SHOWN = 20  # examples of each finding that are named
VALUES = 50  # different values of a key of meta that are counted; of more, the others together
GROUNDED = ("refer", "identify")


class Survey(NamedTuple):
    """Holds what was found in a set: facts by split, and the parts that leaks are looked for in."""

    facts: dict[str, Any]  # split -> numbers
    personal: dict[str, list[str]]  # words for what was found -> places
    asked: dict[str, list[Asked]]  # split -> its examples
    images: dict[str, list[str]]  # split -> its image keys, each once
    published: dict[str, Any]  # comparison with the published numbers
    ungrouped: bool  # every example is in a cluster of its own name, or of that of one of its images


def survey(dataset: Dataset) -> Survey:
    """Reads every example of a set once; images are not looked at."""
    facts: dict[str, Any] = {}
    asked: dict[str, list[Asked]] = {}
    images: dict[str, list[str]] = {}
    personal: list[tuple[str, list[str]]] = []
    values: dict[str, Counter[str]] = {}  # split -> "key=value" -> examples
    compared = _keys(dataset.info)
    ungrouped = True
    for split in dataset.splits:
        counts: dict[str, Counter[str]] = {key: Counter() for key in ("task", *FACTS)}
        values[split] = Counter()
        lengths: dict[str, Counter[int]] = defaultdict(Counter)  # task -> words of an answer
        clusters, keys = set(), dict[str, None]()
        cut: Counter[str] = Counter()
        seen: set[int] = set()
        captions: set[int] = set()
        repeated: Counter[str] = Counter()
        asked[split] = []
        for example in dataset.examples(split):
            counts["task"][example.task] += 1
            for key in FACTS:
                if key in example.meta:
                    counts[key][example.meta[key]] += 1
            facts_of = {**example.meta, "answer": example.answer}
            values[split].update(f"{key}={facts_of[key]}" for key in compared if key in facts_of)
            words = len(example.answer.split())
            lengths[example.task][words] += 1
            if words > CUT or len(example.question.split()) > CUT:
                cut[example.task] += 1
            cluster = example.cluster or example.id
            clusters.add(cluster)
            ungrouped = ungrouped and cluster in (example.id, *example.images)
            keys.update(dict.fromkeys(example.images))
            if found := _personal(example):
                personal.append((f"{split}: {example.id}", found))
            one = _asked(example)
            same = hash((one.task, one.images, one.question, one.answer))
            repeated["examples"] += same in seen
            seen.add(same)
            if example.task == "caption":
                same = hash((cluster, one.answer))
                repeated["captions of a cluster"] += same in captions
                captions.add(same)
            asked[split].append(one)
        images[split] = list(keys)
        facts[split] = {
            "examples": sum(counts["task"].values()),
            "images": len(keys),
            "clusters": len(clusters),
            **{key: _most(counter) for key, counter in counts.items() if counter},
            "answer_words": {task: _lengths(some) for task, some in sorted(lengths.items())},
            "over_50_words": {"n": cut.total(), **dict(sorted(cut.items()))},
            "repeated": {what: n for what, n in repeated.items() if n},
        }
    published = _published(dataset, facts, values)
    return Survey(facts, gathered(personal), asked, images, published, ungrouped)


def _most(counter: Counter[str]) -> dict[str, int]:
    """Sorts counts by name; of many different ones, the rare ones are counted together."""
    common = dict(counter.most_common(VALUES))
    rest = {"(others)": counter.total() - sum(common.values())} if len(counter) > VALUES else {}
    return dict(sorted(common.items())) | rest


def _lengths(counter: Counter[int]) -> dict[str, int]:
    """Says of numbers of words the median and the largest, and how many are at most one word."""
    ordered = sorted(counter.elements())
    return {"median": ordered[len(ordered) // 2], "most": ordered[-1], "one": counter[1] + counter[0]}


def _keys(info: Info) -> set[str]:
    """Names the keys of meta, or "answer", by whose values the published numbers count."""
    every = [what for numbers in (info.counts, *info.other_counts.values()) for what in numbers]
    return {what.split(" ")[1].partition("=")[0] for what in every if "=" in what}


def _published(
    dataset: Dataset, facts: Mapping[str, Any], values: Mapping[str, Counter[str]]
) -> dict[str, Any]:
    """Compares a set with the published numbers that it is nearest to.

    {} if there are none. A set that its options, filters or made splits change is compared too: the
    difference is then what they do.
    """

    def count(what: str) -> int | None:
        split, _, part = what.partition(" ")
        of_split = facts.get(split, {})
        if not part:
            return of_split.get("examples", 0)
        if part in ("images", "clusters"):
            return of_split.get(part, 0)
        key, equals, _ = part.partition("=")
        if not equals:
            return of_split.get("task", {}).get(part, 0)
        if not any(name.startswith(f"{key}=") for some in values.values() for name in some):
            return None  # a layout without this key
        return values[split][part] if split in values else 0

    name, compared = nearest_counts(dataset.info, count)
    numbers = {what: {"here": here, "published": n} for what, (here, n) in compared.items()}
    return (
        {"name": name or dataset.info.citation or dataset.info.name, "counts": numbers}
        if numbers
        else {}
    )


def left_out(dataset: Dataset) -> dict[str, Any]:
    """Counts the records that were left out by reason, and names some.

    Names, numbers and paths are taken out of a reason, so that like ones count together.
    """
    folder = getattr(dataset, "folder", None)
    file = folder / SKIPPED if folder is not None else None
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
    reasons: Counter[str] = Counter()
    for line in lines:
        *_, reason = line.split(": ", 2)
        reason = re.sub(r"\(.*\)|'[^']*'|\"[^\"]*\"|\S*[/\\.]\w\S*|-?\d+(?:\.\d+)?", "...", reason)
        reasons[reason] += 1
    return {"n": len(lines), "reasons": dict(reasons.most_common(VALUES)), "first": lines[:SHOWN]}


def wrong_boxes(dataset: Dataset, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Names the examples whose box is empty or leaves its image.

    sizes: image key -> (height, width). Boxes in pixels are compared with the image, and those in a
    text (hundredths of the image, as a model writes them) must not be empty after rounding.
    """
    found: list[str] = []
    if not set(dataset.info.tasks) & set(GROUNDED):
        return found
    for split in dataset.splits:
        for example in dataset.examples(split):
            if example.task in GROUNDED and (why := _wrong(example, sizes)):
                found.append(f"{split}: {example.id}: {why}")
    return found


def _wrong(example: Example, sizes: Mapping[str, tuple[int, int]]) -> str:
    if example.box is not None and example.images[0] in sizes:
        height, width = sizes[example.images[0]]
        if why := fault(example.box, width, height):
            return why
    box = text_to_box(example.answer if example.task == "refer" else example.question)
    if box is None:
        return "no box in its text"
    if not (box[0] < box[2] <= 100 and box[1] < box[3] <= 100):
        return f"box {box} is empty in hundredths of the image"
    return ""


def _asked(example: Example) -> Asked:
    question = plain(example.question)
    return Asked(
        example.id,
        example.task,
        example.images,
        question if example.task == "vqa" else question_key(question),  # compared by letters, too
        kept(plain(example.answer)),
        example.cluster,
        example.meta.get("template", ""),
        tuple((kind, example.meta[kind]) for kind in GROUPS if example.meta.get(kind)),
    )


def _personal(example: Example) -> list[str]:
    turns = [text for turn in example.history for text in turn]
    return of_texts(
        (example.id, example.question, example.answer, *example.images, *example.meta.values(), *turns)
    )
