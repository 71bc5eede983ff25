"""Audits the data of a config: counts, faults, and leaks between splits and between sets."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimed_jax.audit.blind import blind_scores
from unimed_jax.audit.findings import SERIOUS, to_look_at
from unimed_jax.audit.fingerprints import RECORD, Fingerprints, fingerprints
from unimed_jax.audit.near import LIKENESS, Hashed, Hasher
from unimed_jax.audit.private import of_files, of_images
from unimed_jax.audit.questions import DICOM, GROUPS, SIMILAR, Asked, given_by_text, text_leaks
from unimed_jax.audit.survey import SHOWN, Survey, left_out, survey, wrong_boxes
from unimed_jax.audit.tokens import answer_tokens
from unimed_jax.config import Config, SourceConfig
from unimed_jax.data.datasets import distinct, open_sources, path_of, reader_of
from unimed_jax.data.example import Dataset

SCHEMA = 2
ORDER = ("train", "val", "test")  # an earlier split gives away a later one
# All kinds of leaks; those that are not serious are shown only.
KINDS = (*SERIOUS, "question_text", "repeating", "reworded")


class Pair(NamedTuple):
    """Names two images to be shown: each "<set>/<key>", that of the earlier split first."""

    kind: str
    one: str
    other: str
    likeness: float


class Split(NamedTuple):
    """Holds what leaks of one split are looked for with."""

    owner: str  # id of its set
    name: str
    asked: list[Asked]
    prints: Fingerprints
    hashed: Hashed
    mirrored: Hashed
    texts: set[str]  # that other sets may repeat
    first: np.ndarray  # of each image, the number of the first one with its pixels, int64 [images]

    @property
    def rank(self) -> int:
        """Numbers the split in ORDER; splits of other names come last."""
        return ORDER.index(self.name) if self.name in ORDER else len(ORDER)


def audit(config: Config, processes: int = 2) -> tuple[dict[str, Any], list[Pair], dict[str, Dataset]]:
    """Audits every set of config.data and config.evaluate once.

    Returns the content of check.json, the pairs of images to show, and the sets by id.
    """
    trained = open_sources(config.data)
    opened = [*trained, *open_sources(config.held_out)]
    sources = (*config.data.sources, *config.held_out.sources)
    sets = {data.id: data for data in distinct(opened)}
    source_of = {data.id: source for data, source in reversed(list(zip(opened, sources, strict=True)))}
    surveys: dict[str, Survey] = {}
    prints: dict[str, dict[str, Fingerprints]] = {}
    for name, data in sets.items():
        surveys[name] = survey(data)
        prints[name] = _fingerprints(data, surveys[name], config.data.cache_folder, processes)
    splits, hasher = _splits(surveys, prints)
    folders = {name: path_of(source_of[name], config.data) for name in sets}
    wordings = {name: _rewordings(source_of[name], folders[name]) for name in sets}
    found: dict[str, Any] = {}
    shown: list[Pair] = []
    for name, data in sets.items():
        own = [split for split in splits if split.owner == name]
        leaks, pairs = _within(own, hasher, wordings[name])
        shown += pairs
        raw = of_files(data.info, Path(folders[name]) if folders[name] else None)
        found[name] = _set(data, surveys[name], prints[name], raw) | leaks
    between, pairs = _between(splits, hasher, wordings)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "name": config.name,
        "thresholds": {"likeness": LIKENESS, "similar_question": SIMILAR},
        "leaks": _summed(found, between),
        "sets": found,
        "between": between,
        "answer_tokens": answer_tokens(config, trained, SHOWN),
    }
    content["look"] = to_look_at(content)
    return content, shown + pairs, sets


def _fingerprints(
    dataset: Dataset, surveyed: Survey, cache: Path, processes: int
) -> dict[str, Fingerprints]:
    """Computes the fingerprints of each split's images; of a set that is not stored, none."""
    folder = getattr(dataset, "folder", None)
    return {
        split: fingerprints(folder, dataset.id, keys if folder else [], cache, processes)
        for split, keys in surveyed.images.items()
        if folder is not None
    }


def _splits(
    surveys: Mapping[str, Survey], prints: Mapping[str, Mapping[str, Fingerprints]]
) -> tuple[list[Split], Hasher]:
    """Hashes the images of all splits together, so that any two can be compared."""
    hasher = Hasher([part.records["shape"] for of_set in prints.values() for part in of_set.values()])
    out = []
    for name, surveyed in surveys.items():
        for split, asked in surveyed.asked.items():
            part = prints[name].get(split) or Fingerprints([], np.empty(0, RECORD), {})
            first = _first(part)
            keys = part.keys
            names = {keys[i]: keys[other] for i, other in enumerate(first.tolist()) if other != i}
            for number, one in enumerate(asked):  # in place: of many examples there are no two lists
                asked[number] = _of_pictures(_with_headers(one, part.notes), names)
            shapes = part.records["shape"]
            hashed = hasher.hashed(shapes), hasher.hashed(shapes, mirrored=True)
            out.append(Split(name, split, asked, part, *hashed, given_by_text(asked), first))
    return sorted(out, key=lambda split: split.rank), hasher


def _first(prints: Fingerprints) -> np.ndarray:
    """Numbers for each image the first one with the same pixels, int64 [images].

    An image that cannot be read is like no other.
    """
    out = np.arange(len(prints.keys))
    readable = np.flatnonzero(prints.readable)
    pixels = prints.records["pixels"][readable]
    _, first, back = np.unique(pixels, return_index=True, return_inverse=True)
    out[readable] = readable[first][back]
    return out


def _of_pictures(asked: Asked, names: Mapping[str, str]) -> Asked:
    """Gives an example one name for each picture, however many its split has for it."""
    if names.keys().isdisjoint(asked.images):
        return asked
    return asked._replace(images=tuple(names.get(key, key) for key in asked.images))


def _with_headers(asked: Asked, notes: Mapping[str, Mapping[str, Any]]) -> Asked:
    """Adds the patients and studies that the DICOM headers of an example's images name."""
    found = {
        (kind, f"{DICOM}{notes[key][kind]}"): None
        for key in asked.images
        if key in notes
        for kind in GROUPS
        if kind in notes[key]
    }
    return asked._replace(groups=(*asked.groups, *found)) if found else asked


def _set(
    dataset: Dataset,
    surveyed: Survey,
    prints: Mapping[str, Fingerprints],
    raw: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Gathers what check.json says about one set, but for its leaks."""
    unreadable = {key: why for part in prints.values() for key, why in part.unreadable.items()}
    notes = {key: note for part in prints.values() for key, note in part.notes.items()}
    sizes: dict[str, tuple[int, int]] = {}
    for part in prints.values():
        sizes |= dict(zip(part.keys, map(tuple, part.records["size"].tolist()), strict=True))
    boxes = wrong_boxes(dataset, {key: size for key, size in sizes.items() if size != (0, 0)})
    personal: dict[str, list[str]] = {}
    # What the examples hold is in the files too.
    more = {what: files for what, files in raw.items() if what not in surveyed.personal}
    for some in (surveyed.personal, of_images(notes), more):
        for what, places in some.items():
            personal.setdefault(what, []).extend(places)
    by_design, word = dict(dataset.info.by_design), dataset.info.cluster_word
    if surveyed.ungrouped:
        by_design.setdefault("cluster", "each is its own cluster, so the other kinds say this")
    elif word in ("image", "example"):  # what a cluster is where none is given
        word = "cluster"
    for split, part in prints.items():
        pixels = part.records["pixels"][part.readable]
        if repeated := len(pixels) - len(np.unique(pixels)):
            surveyed.facts[split]["repeated"]["images"] = repeated
    return {
        "checksum": dataset.checksum,
        "licence": dataset.info.licence,
        "note": dataset.info.note,
        "cluster": word,
        "left_out": left_out(dataset),
        "published": surveyed.published,
        "splits": surveyed.facts,
        "unreadable": {
            "n": len(unreadable),
            "first": dict(itertools.islice(unreadable.items(), SHOWN)),
        },
        "wrong_boxes": {"n": len(boxes), "first": boxes[:SHOWN]},
        "personal": {what: {"n": len(some), "first": some[:SHOWN]} for what, some in personal.items()},
        "by_design": by_design,
        "blind": blind_scores(dataset),
    }


# ---- leaks -----------------------------------------------------------------------------------------


def _rewordings(source: SourceConfig, folder: str) -> Callable[[str], dict[str, list[str]]]:
    """Returns a function: split -> id -> other wordings of its question, if the set's files have any."""
    read = getattr(reader_of(source.name), "rewordings", None)

    def of(split: str) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        for name, text in read(Path(folder), split) if read is not None else ():
            out.setdefault(name, []).append(text)
        return out

    return of


def _within(
    splits: Sequence[Split], hasher: Hasher, wordings: Callable[[str], dict[str, list[str]]]
) -> tuple[dict[str, Any], list[Pair]]:
    """Looks for leaks between the splits of a set: (leaks and copier by kind, pairs of images)."""
    leaks: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    examples: dict[str, dict[str, list]] = {}
    copier: dict[str, Any] = {}
    shown: list[Pair] = []
    for earlier, later in itertools.combinations(splits, 2):
        between = f"{earlier.name}_{later.name}"
        images, same = _images(earlier, later, hasher)
        # An image that cannot be read is still itself.
        both = earlier.prints.unreadable.keys() & later.prints.unreadable.keys()
        same |= {key: (key,) for key in both}
        texts = text_leaks(
            earlier.asked, later.asked, same if later.prints.keys else None, wordings(later.name)
        )
        examples[between] = texts.pairs
        if texts.copier:
            copier[between] = texts.copier
        counts = {**texts.counts, **{kind: len(pairs) for kind, pairs in images.items()}}
        for kind in KINDS:
            leaks[kind][between] = counts.get(kind, 0)
        shown += [pair for pairs in images.values() for pair in pairs[:SHOWN]]
    return {"leaks": leaks, "leak_examples": examples, "copier": copier}, shown


def _between(
    splits: Sequence[Split],
    hasher: Hasher,
    wordings: Mapping[str, Callable[[str], dict[str, list[str]]]],
) -> tuple[dict[str, dict[str, int]], list[Pair]]:
    """Looks for images and questions that two sets share.

    Returns "<set>/<split>~<set>/<split>" -> kind -> number of images (or questions) of the second
    that the first has too, and some of the pairs. The second is the one that is held out.
    """
    found: dict[str, dict[str, int]] = {}
    shown: list[Pair] = []
    for earlier, later in itertools.combinations(splits, 2):
        if earlier.owner == later.owner:
            continue
        images, same = _images(earlier, later, hasher)
        images["name"] = _same_names(earlier, later)
        counts = {kind: len(pairs) for kind, pairs in images.items()}
        if same or earlier.texts & later.texts:
            given = wordings[later.owner](later.name) if same else {}
            counts |= text_leaks(earlier.asked, later.asked, same, given, one_set=False).counts
            counts.pop("question_text", None)
        if counts := {kind: count for kind, count in counts.items() if count}:
            found[f"{earlier.owner}/{earlier.name}~{later.owner}/{later.name}"] = counts
        shown += [pair for pairs in images.values() for pair in pairs[:SHOWN]]
    return found, shown


def _images(
    earlier: Split, later: Split, hasher: Hasher
) -> tuple[dict[str, list[Pair]], dict[str, tuple[str, ...]]]:
    """Finds equal, nearly equal and mirrored images of two splits.

    Returns by kind a pair for each image of the later one, the most alike first, and which images of
    the earlier one it (nearly) is, the most alike first. Of images with the same pixels the first one
    stands for all.
    """
    one, other = earlier.prints.keys, later.prints.keys
    readable = earlier.prints.readable.tolist()
    distinct = np.flatnonzero(earlier.first == np.arange(len(earlier.first)))
    pixels = earlier.prints.records["pixels"]
    known = {pixels[i].tobytes(): i for i in distinct.tolist() if readable[i]}
    values = [value.tobytes() for value in later.prints.records["pixels"]]
    equal = [(known[value], j, 1.0) for j, value in enumerate(values) if value in known]
    out = {"image": equal}
    same: dict[str, tuple[str, ...]] = {other[j]: (one[i],) for i, j, _ in equal}
    done = {j for _, j, _ in equal}
    for kind, hashed in (("near", later.hashed), ("mirror", later.mirrored)):
        matches = hasher.matches(earlier.hashed, hashed, distinct)
        alike = np.flatnonzero(matches.other[:, 0] >= 0).tolist()
        if kind == "near":
            for j in alike:
                near = (one[i] for i in matches.other[j].tolist() if i >= 0)
                same[other[j]] = tuple(dict.fromkeys((*same.get(other[j], ()), *near)))
        numbers = [j for j in alike if j not in done]
        triples = [(int(matches.other[j, 0]), j, float(matches.likeness[j, 0])) for j in numbers]
        out[kind] = sorted(triples, key=lambda triple: -triple[2])
        done |= set(numbers)
    pairs = {
        kind: [
            Pair(kind, f"{earlier.owner}/{one[i]}", f"{later.owner}/{other[j]}", likeness)
            for i, j, likeness in found
        ]
        for kind, found in out.items()
    }
    return pairs, same


def _same_names(earlier: Split, later: Split) -> list[Pair]:
    """Finds images of two sets whose file names end in the same name, such as synpic12345."""
    first = {own: key for key in earlier.prints.keys if (own := _own_name(key))}
    return [
        Pair("name", f"{earlier.owner}/{first[own]}", f"{later.owner}/{key}", 0.0)
        for key in later.prints.keys
        if (own := _own_name(key)) in first
    ]


def _own_name(key: str) -> str:
    """Returns the last part of a file's name if it is unlikely to be that of another picture.

    It then holds a letter and at least four digits. Any other name gives "".
    """
    last = Path(key).stem.rpartition("_")[2]
    return last if sum(c.isdigit() for c in last) >= 4 and any(c.isalpha() for c in last) else ""


def _summed(
    found: Mapping[str, Mapping[str, Any]], between: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """Adds the leaks of all sets: kind -> {train_test, train_val, val_test, ..., between}."""
    out: dict[str, Counter[str]] = {
        kind: Counter({name: 0 for name in ("train_test", "train_val", "val_test", "between")})
        for kind in (*KINDS, "name")
    }
    for one in found.values():
        for kind, counts in one["leaks"].items():
            out[kind].update(counts)
    for counts in between.values():
        for kind, count in counts.items():
            out[kind]["between"] += count
    return {kind: dict(counts) for kind, counts in out.items()}
