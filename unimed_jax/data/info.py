"""Defines `Info`, the passport of a data set.

It says what the set holds, under which licence, and what to know about it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.errors import UserError, nearest
from unimed_jax.parsing import read_json

NO_LICENCE = "licence not stated"
FILE = "info.json"  # in the folder of a generic source: licence, citation, note, cluster_word
GIVEN = ("licence", "citation", "note", "cluster_word")


@dataclasses.dataclass(frozen=True)
class Info:
    """Describes a data set; every reader in data/datasets has one as `INFO`.

    `note` is what reports and model cards print about the set, for example that its images show one
    person.
    """

    name: str
    tasks: tuple[str, ...]  # of config.TASKS
    splits: tuple[str, ...] = ("train", "val", "test")  # asked of the reader, in this order
    licence: str = NO_LICENCE
    citation: str = ""
    note: str = ""
    cluster_word: str = "example"  # what `Example.cluster` names: patient, slab, case
    # patterns of files that the raw folder must hold; () if nothing is read from disk
    files: tuple[str, ...] = ()
    # Published numbers, by what is counted: examples of a split ("test"), or of these the images, the
    # clusters, those of a task, or those with a value of meta ("test answer_type=CLOSED").
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # The same of other layouts, revisions and options that are in circulation, by their name.
    other_counts: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    # Leaks between splits that the set is published with, by kind (audit/check.py), and why: no
    # fault of the files.
    by_design: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # raise it with every change to what `read` gives: prepared stores are then built again
    version: str = "1"

    @property
    def self_contained(self) -> bool:
        """Says whether the set is made from installed packages and needs no folder."""
        return not self.files


def nearest_counts(
    info: Info, count: Callable[[str], int | None]
) -> tuple[str, dict[str, tuple[int, int]]]:
    """Compares a set with the published numbers that it is nearest to.

    count: says how many there are of what `Info.counts` names; None: that cannot be counted here.
    Returns the name of those numbers ("" for `Info.counts`), and what is counted -> (number here,
    number published).
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, numbers in {"": info.counts, **info.other_counts}.items():
        here = {what: (count(what), published) for what, published in numbers.items()}
        found[name] = {what: (n, published) for what, (n, published) in here.items() if n is not None}

    def distance(name: str) -> float:
        apart = [abs(n - published) / max(published, 1) for n, published in found[name].values()]
        return sum(apart) / len(apart)

    name = min((name for name in found if found[name]), key=distance, default="")
    return name, found[name]


def described(info: Info, folder: Path | None, given: Mapping[Any, str]) -> Info:
    """Completes `info` from the folder's info.json and then from the source's own `info` settings.

    Raises UserError if info.json is not an object of texts, or has a key that `Info` does not take
    from it.
    """
    found: dict[str, str] = {}
    file = folder / FILE if folder is not None and folder.is_dir() else None
    if file is not None and file.is_file():
        found = read_json(file, "mend it or remove it")
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise UserError(f"{file} is not an object of texts; give {', '.join(GIVEN)}.")
    for key in found:
        if key not in GIVEN:
            raise UserError(
                f"{file}: key {key!r} is unknown{nearest(key, GIVEN)} Choose from {', '.join(GIVEN)}."
            )
    return dataclasses.replace(info, **{**found, **given})  # type: ignore[arg-type]
