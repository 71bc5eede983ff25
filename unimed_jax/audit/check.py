"""Audits the data of a config: counts, faults, and leaks between splits and between sets."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.audit.fingerprints import DISTANCE, LIKENESS, Fingerprints, fingerprints, near_pairs
from unimed_jax.audit.questions import SIMILAR, text_leaks
from unimed_jax.audit.survey import SHOWN, Survey, survey
from unimed_jax.config import Config
from unimed_jax.data.datasets import distinct, open_sources
from unimed_jax.data.example import Dataset

SCHEMA = 1
ORDER = ("train", "val", "test")  # an earlier split gives away a later one
# Leaks that must be looked at; the others are shown only.
SERIOUS = (
    "image",
    "near",
    "mirror",
    "question",
    "question_answer",
    "similar_question",
    "report",
    "cluster",
)
KINDS = (*SERIOUS, "repeating")

# kind, image in the earlier split, image in the later one; both "<set>/<key>"
Pair = tuple[str, str, str]


def audit(config: Config, processes: int = 2) -> tuple[dict[str, Any], list[Pair], dict[str, Dataset]]:
    """Audits every set of config.data and config.evaluate once.

    Returns the content of check.json, the pairs of images to show, and the sets by id.
    """
    sources = (*open_sources(config.data), *open_sources(config.held_out))
    sets = {dataset.id: dataset for dataset in distinct(sources)}
    found: dict[str, Any] = {}
    surveys, prints = {}, {}
    shown: list[Pair] = []
    for name, dataset in sets.items():
        surveys[name] = survey(dataset)
        prints[name] = _fingerprints(dataset, surveys[name], config.data.cache_folder, processes)
        leaks, pairs = _leaks(name, surveys[name], prints[name])
        shown += pairs
        found[name] = _set(dataset, surveys[name], prints[name], leaks)
    between, pairs = _between(prints, surveys)
    content = {
        "schema": SCHEMA,
        "name": config.name,
        "thresholds": {
            "distance": DISTANCE,
            "of_bits": 256,
            "likeness": LIKENESS,
            "similar_question": SIMILAR,
        },
        "sets": found,
        "between": between,
    }
    content["look"] = _to_look_at(content)
    return content, shown + pairs, sets


def _set(
    dataset: Dataset, surveyed: Survey, prints: Mapping[str, Fingerprints], leaks: Mapping[str, Any]
) -> dict[str, Any]:
    """Gathers what check.json says about one set."""
    unreadable = {key: reason for split in prints.values() for key, reason in split.unreadable.items()}
    return {
        "checksum": dataset.checksum,
        "licence": dataset.info.licence,
        "cluster": dataset.info.cluster_word,
        "left_out": getattr(dataset, "skipped", 0),
        "expected": dict(dataset.info.counts),
        "splits": surveyed.facts,
        "unreadable": {
            "n": len(unreadable),
            "first": dict(itertools.islice(unreadable.items(), SHOWN)),
        },
        "boxes_too_small": {"n": len(surveyed.boxes), "first": surveyed.boxes[:SHOWN]},
        "personal": {
            what: {"n": len(some), "first": some[:SHOWN]} for what, some in surveyed.personal.items()
        },
        "by_design": dict(dataset.info.by_design),
        **leaks,
    }


def _fingerprints(
    dataset: Dataset, surveyed: Survey, cache: Path, processes: int
) -> dict[str, Fingerprints]:
    """Computes the fingerprints of each split's images."""
    folder = getattr(dataset, "folder", None)
    if folder is None:
        return {}
    return {
        split: fingerprints(folder, keys, cache, processes) for split, keys in surveyed.images.items()
    }


def _leaks(
    name: str, surveyed: Survey, prints: Mapping[str, Fingerprints]
) -> tuple[dict[str, Any], list[Pair]]:
    """Looks for leaks between the splits of a set: (leaks and copier by kind, pairs of images)."""
    leaks: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    examples: dict[str, dict[str, list]] = {}
    copier: dict[str, Any] = {}
    shown: list[Pair] = []
    splits = [split for split in ORDER if split in surveyed.asked] + sorted(
        set(surveyed.asked) - set(ORDER)
    )
    for earlier, later in itertools.combinations(splits, 2):
        between = f"{earlier}_{later}"
        texts = text_leaks(surveyed.asked[earlier], surveyed.asked[later])
        found = {**dict.fromkeys(KINDS, 0), **texts.counts}
        examples[between] = texts.pairs
        if texts.copier:
            copier[between] = texts.copier
        if earlier in prints and later in prints:
            for kind, pairs in _image_pairs(prints[earlier], prints[later]).items():
                found[kind] = len({j for _, j in pairs})
                a, b = prints[earlier].keys, prints[later].keys
                shown += [(kind, f"{name}/{a[i]}", f"{name}/{b[j]}") for i, j in pairs[:SHOWN]]
        for kind, count in found.items():
            leaks[kind][between] = count
    return {"leaks": leaks, "leak_examples": examples, "copier": copier}, shown


def _between(
    prints: Mapping[str, Mapping[str, Fingerprints]], surveys: Mapping[str, Survey]
) -> tuple[dict[str, dict[str, int]], list[Pair]]:
    """Looks for images and questions that two sets share.

    Returns "<set>/<split>~<set>/<split>" -> kind -> number of images (or questions) of the second
    that the first has too, and some of the pairs.
    """
    found: dict[str, dict[str, int]] = {}
    shown: list[Pair] = []
    for (one, splits), (other, others) in itertools.combinations(prints.items(), 2):
        for (a, first), (b, second) in itertools.product(splits.items(), others.items()):
            kinds = _image_pairs(first, second)
            kinds["name"] = _same_names(first.keys, second.keys)
            counts = {kind: len({j for _, j in pairs}) for kind, pairs in kinds.items() if pairs}
            texts = text_leaks(surveys[one].asked[a], surveys[other].asked[b])  # images by their keys
            counts |= {
                kind: n for kind, n in texts.counts.items() if n and kind in ("question", "repeating")
            }
            if counts:
                found[f"{one}/{a}~{other}/{b}"] = counts
            for kind, pairs in kinds.items():
                shown += [
                    (kind, f"{one}/{first.keys[i]}", f"{other}/{second.keys[j]}")
                    for i, j in pairs[:SHOWN]
                ]
    return found, shown


def _image_pairs(earlier: Fingerprints, later: Fingerprints) -> dict[str, list[tuple[int, int]]]:
    """Finds equal, nearly equal and mirrored images of two splits, as pairs of their numbers."""
    first = {
        value.tobytes(): i for i, value in enumerate(earlier.records["pixels"]) if earlier.readable[i]
    }
    equal = [
        (first[value.tobytes()], j)
        for j, value in enumerate(later.records["pixels"])
        if value.tobytes() in first
    ]
    same = {j for _, j in equal}
    places = [np.nonzero(some.readable)[0] for some in (earlier, later)]
    one, other = earlier.records[places[0]], later.records[places[1]]
    out = {"image": equal}
    for kind in ("near", "mirror"):
        pairs = near_pairs(one, other, mirrored=kind == "mirror")
        numbers = [(int(places[0][i]), int(places[1][j])) for i, j in pairs]
        out[kind] = [(i, j) for i, j in numbers if j not in same]
        same |= {j for _, j in out[kind]}
    return out


def _same_names(earlier: Any, later: Any) -> list[tuple[int, int]]:
    """Finds images of two sets whose file names end in the same name, such as synpic12345."""
    first = {stem: i for i, key in enumerate(earlier) if (stem := _own_name(key))}
    return [(first[stem], j) for j, key in enumerate(later) if (stem := _own_name(key)) in first]


def _own_name(key: str) -> str:
    """Returns the last part of a file's name if it is unlikely to be that of another picture.

    It then holds a letter and at least four digits. Any other name gives "".
    """
    last = Path(key).stem.rpartition("_")[2]
    return last if sum(c.isdigit() for c in last) >= 4 and any(c.isalpha() for c in last) else ""


def _to_look_at(content: Mapping[str, Any]) -> list[str]:
    """Says in sentences what somebody must look at before training."""
    out = []
    for name, found in content["sets"].items():
        for kind, counts in found["leaks"].items():
            for between, count in counts.items():
                if (
                    count
                    and kind in SERIOUS
                    and kind not in found["by_design"]
                    and not (kind == "cluster" and _is_image(found))
                ):
                    earlier, _, later = between.partition("_")
                    out.append(f"{name}: {count} of {later} are given away by {earlier} ({kind})")
        for split, count in found["expected"].items():
            has = found["splits"].get(split, {}).get("examples", 0)
            if has != count:
                out.append(f"{name}: {split} has {has} examples, not {count} as published")
        for words, key in (
            ("images cannot be read", "unreadable"),
            ("boxes are empty in hundredths", "boxes_too_small"),
        ):
            if found[key]["n"]:
                out.append(f"{name}: {found[key]['n']} {words}")
        out += [f"{name}: {some['n']} examples hold {what}" for what, some in found["personal"].items()]
        if found["left_out"]:
            out.append(f"{name}: {found['left_out']} records were left out (skipped.txt)")
    for between, counts in content["between"].items():
        if "test" in between or "val" in between:
            shared = ", ".join(
                f"{kind} {count}" for kind, count in counts.items() if kind != "repeating"
            )
            out.append(f"{between.replace('~', ' and ')} share images or questions ({shared})")
    return out


def _is_image(found: Mapping[str, Any]) -> bool:
    """Says whether a set's clusters are its images, so that a shared one is said already."""
    return found["cluster"] in ("image", "example")
