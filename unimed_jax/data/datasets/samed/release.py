"""Chooses images and masks of SA-Med2D's full release from the names of its files.

Two folders hold 3,772,180 images and about 16 million masks, so each is listed once, as a stream.
What is kept are the names of chosen images and 16 bytes for each of their masks. What is chosen
depends on names, options and seed alone, whatever the order in which a disk lists them.
"""

import heapq
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.datasets.samed.names import Name, parse, parse_mask, rank
from unimed_jax.data.records import at_least, short
from unimed_jax.errors import UserError, nearest
from unimed_jax.parsing import is_text, read_json

CLASSES = "SAMed2D_v1_class_mapping_id.json"
ROOTS = ("", "SAMed2Dv1/", "raw/SAMed2Dv1/")  # where images and masks lie, from the given folder on
PLACES = tuple(f"{root}{inner}" for root in ROOTS for inner in ("", "annotations/"))  # of CLASSES
UNION = "union_"  # begins a class that unites others
_MASK = np.dtype([("image", "<u4"), ("class", "<u4"), ("instance", "<u4"), ("label", "<u4")])
_BLOCK = 1 << 13  # names that are looked up at once


def place(folder: Path) -> Path | None:
    """Finds the folder that holds images and masks, or returns None."""
    roots = (folder / root for root in ROOTS)
    return next((root for root in roots if all((root / n).is_dir() for n in ("images", "masks"))), None)


def refuse_choice(options: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError for an option that chooses among masks, where there are none."""
    for key, value in defaults.items():
        if key != "seed" and options[key] != value:
            raise UserError(
                f"config.data.sources: option {key}={short(options[key])} of samed chooses from the "
                f"full release, and {folder} holds a subset in boxes; leave it out."
            )


def chosen(
    root: Path, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields the chosen images, in the order of modalities and ids, each with its chosen masks.

    An image is <modality>/<id>, a mask its number ("0000_001") and class. First `fraction` draws
    cases, then `per_modality` images, then `per_class` images for each class of a modality; an image
    keeps the masks of those classes for which it was drawn, all of a class. Raises UserError for
    options that mean nothing and for a damaged table of classes.
    """
    _check(options)
    classes = _classes(root)
    faults: list[str] = []
    keys, seen = _images(root, options, faults)
    own = np.array([rank(options["seed"], _stem(key)) for key in keys], np.uint64)
    found, labels = _masks(root, options, keys, own, seen, classes, faults)
    skipped += sorted(faults)  # whatever the order of the disk
    found.sort(order=("image", "class", "instance"))
    starts = np.searchsorted(found["image"], np.arange(len(keys) + 1))
    kept = _drawn(found, own, labels, options)
    for number, key in enumerate(keys):
        here = slice(starts[number], starts[number + 1])
        if here.start == here.stop:
            skipped.append(f"{key}: it has no mask")
        some = found[here][kept[here]]
        if len(some):
            yield key, [(_mask(m["class"], m["instance"]), labels[m["label"]][1]) for m in some]


def _check(options: Mapping[str, Any]) -> None:
    for key in ("seed", "per_modality", "per_class"):
        at_least(options, key, 0, "samed")
    at_least(options, "least_area", 1, "samed")
    if not 0 < options["fraction"] <= 1:
        raise UserError(
            f"config.data.sources: option fraction={options['fraction']!r} of samed is not above 0 and "
            "at most 1."
        )


def _images(root: Path, options: Mapping[str, Any], skipped: list[str]) -> tuple[list[str], np.ndarray]:
    """Lists the images once.

    Returns the keys of those that are drawn, ascending, and the ranks of all, ascending.
    """
    seed, most = options["seed"], options["per_modality"]
    below = int(options["fraction"] * 2**64)
    keys: list[str] = []  # if there is no `per_modality`
    drawn: dict[str, list[tuple[int, str]]] = defaultdict(list)  # else by modality: (-rank, key)
    modalities: set[str] = set()
    everything = _Numbers()
    for stem in _stems(root / "images", skipped):
        name = parse(stem)
        if name is None:
            skipped.append(f"{stem}: its name is not <modality>--<set>--<case>--<slice>")
            continue
        number, key = rank(seed, stem), f"{name.modality}/{stem}"
        everything.add(number)
        modalities.add(name.modality)
        if not _wanted(name, options, seed, below):
            continue
        if not most:
            keys.append(key)
        elif len(drawn[name.modality]) < most:
            heapq.heappush(drawn[name.modality], (-number, key))
        else:
            heapq.heappushpop(drawn[name.modality], (-number, key))
    for modality in options["modalities"]:
        if modality not in modalities:
            raise UserError(
                f"config.data.sources: option modalities of samed names {modality!r}, of which {root} "
                f"has no image{nearest(modality, modalities)}"
            )
    keys += [key for some in drawn.values() for _, key in some]
    return sorted(keys), np.sort(everything.array())


def _wanted(name: Name, options: Mapping[str, Any], seed: int, below: int) -> bool:
    if options["modalities"] and name.modality not in options["modalities"]:
        return False
    if name.set in options["without"]:
        return False
    return options["fraction"] == 1 or rank(seed, f"{name.set}--{name.case}") < below


def _masks(
    root: Path,
    options: Mapping[str, Any],
    keys: Sequence[str],
    own: np.ndarray,
    seen: np.ndarray,
    classes: Mapping[str, Mapping[int, str]],
    skipped: list[str],
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Lists the masks once.

    Returns those of drawn images as `_MASK`, and the labels that they number: (modality, class),
    where class is empty if it is unknown or a union that is left out.
    """
    order = np.argsort(own)
    ranks = own[order]
    of_label: dict[tuple[str, str], int] = {}
    blocks: list[np.ndarray] = []
    unions = 0
    for block in _blocks(_stems(root / "masks", skipped)):
        parsed = [(stem, parse_mask(stem)) for stem in block]
        skipped += [f"{stem}: no mask's name" for stem, found in parsed if found is None]
        some = [found for _, found in parsed if found is not None]
        numbers = np.array([rank(options["seed"], image) for image, _, _ in some], np.uint64)
        for i in np.nonzero(~_among(numbers, seen))[0]:
            image, kind, instance = some[i]
            skipped.append(f"{image}: there is no image of mask {_mask(kind, instance)}")
        rows = []
        for i in np.nonzero(_among(numbers, ranks))[0]:
            image, kind, instance = some[i]
            number = int(order[np.searchsorted(ranks, numbers[i])])
            name = parse(image)
            label = classes.get(name.set, {}).get(kind, "") if name else ""
            if not label:
                where = f"{keys[number]}: mask {_mask(kind, instance)}"
                skipped.append(f"{where}: {CLASSES} has no class {kind} of its set, or several")
            union = label.startswith(UNION) and not options["unions"]
            unions += union
            pair = keys[number].partition("/")[0], "" if union else _words(label)
            rows.append((number, kind, instance, of_label.setdefault(pair, len(of_label))))
        blocks.append(np.array(rows, _MASK))
    if unions:
        skipped.append(f"masks: {unions} that unite other classes (option `unions`)")
    labels = list(of_label)
    known = {label for _, label in labels}
    for label in options["classes"]:
        if label not in known:
            raise UserError(
                f"config.data.sources: option classes of samed names {label!r}, of which no chosen "
                f"image has a mask{nearest(label, known)}"
            )
    return np.concatenate([np.zeros(0, _MASK), *blocks]), labels


def _drawn(
    found: np.ndarray, own: np.ndarray, labels: Sequence[tuple[str, str]], options: Mapping[str, Any]
) -> np.ndarray:
    """Marks the masks whose class is asked for and whose image is drawn for it, bool [N]."""
    wanted = np.array(
        [bool(label) and label in (options["classes"] or [label]) for _, label in labels], bool
    )
    kept = wanted[found["label"]] if len(found) else np.zeros(0, bool)
    most = options["per_class"]
    if most and kept.any():
        at = np.nonzero(kept)[0]
        order = at[np.lexsort((found["image"][at], own[found["image"][at]], found["label"][at]))]
        label, image = found["label"][order], found["image"][order]
        first = np.r_[True, label[1:] != label[:-1]]
        other = first | np.r_[True, image[1:] != image[:-1]]
        count = np.cumsum(other)  # distinct images of a class, counted on from class to class
        before = np.maximum.accumulate(np.where(first, count - 1, 0))
        kept[order] = count - before <= most
    return kept


def _classes(root: Path) -> dict[str, dict[int, str]]:
    """Reads set -> number -> class; a number that two classes share has none."""
    file = next(
        (root / n / CLASSES for n in ("", "annotations") if (root / n / CLASSES).is_file()), None
    )
    if file is None:
        raise UserError(f"{root / CLASSES} does not exist; get it again, since it names the classes.")
    content = read_json(file, "get it again")
    out: dict[str, dict[int, str]] = {}
    for name, numbers in content.items() if isinstance(content, dict) else [("", content)]:
        if not isinstance(numbers, dict):
            raise UserError(f"{file}: {name!r} holds {short(numbers)}; give {{set: {{class: number}}}}.")
        own: dict[int, str] = {}
        for label, number in numbers.items():
            if not (type(number) is int or (isinstance(number, str) and number.strip().isdecimal())):
                raise UserError(
                    f"{file}: class {label!r} of {name!r} is {short(number)}; give its number."
                )
            own[int(number)] = "" if int(number) in own else label
        out[name] = own
    return out


def _stem(key: str) -> str:
    return key.partition("/")[2]


def _mask(kind: int, instance: int) -> str:
    return f"{kind:04d}_{instance:03d}"


def _words(label: str) -> str:
    return " ".join(label.replace("_", " ").split())


def _stems(folder: Path, skipped: list[str]) -> Iterator[str]:
    """Yields the names of a folder's PNG files without their ending, as the disk lists them."""
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, ending = os.path.splitext(entry.name)
            if not is_text(stem):
                skipped.append(f"{folder.name}/{ascii(entry.name)[1:-1]}: its name is no text")
            elif ending.lower() == ".png":
                yield stem
            elif not entry.name.startswith("."):
                skipped.append(f"{folder.name}/{entry.name}: no PNG")


def _blocks(stems: Iterator[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for stem in stems:
        block.append(stem)
        if len(block) == _BLOCK:
            yield block
            block = []
    yield block


def _among(numbers: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Marks the numbers that occur in an ascending array, bool [N]."""
    if not len(ascending):
        return np.zeros(len(numbers), bool)
    at = np.minimum(np.searchsorted(ascending, numbers), len(ascending) - 1)
    return ascending[at] == numbers


class _Numbers:
    """Collects numbers of 64 bits in eight bytes each."""

    def __init__(self):
        self._blocks: list[np.ndarray] = []
        self._last: list[int] = []

    def add(self, number: int) -> None:
        self._last.append(number)
        if len(self._last) == _BLOCK:
            self._blocks.append(np.array(self._last, np.uint64))
            self._last = []

    def array(self) -> np.ndarray:
        return np.concatenate([*self._blocks, np.array(self._last, np.uint64)])
