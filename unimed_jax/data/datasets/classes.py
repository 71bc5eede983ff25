"""Reads images in classes (task cls), from one folder for each class or from a table.

    <split>/<class>/<image>      or
    <split>.csv                  columns `path` (or `image`) and `label` (or `class`)

A table has a path and a label on each line; there may be other columns, such as `cluster` (a
patient).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import chosen_options, inside, records, word
from unimed_jax.errors import UserError

TABLES = (".csv", ".tsv", ".jsonl", ".json")

INFO = Info(
    name="classes",
    tasks=("cls",),
    cluster_word="image",
    files=(
        *(f"{split}{ending}" for split in ("train", "val", "test") for ending in TABLES),
        # folders alone (a slash ends them), whose time changes with what lies in them
        *(f"{split}{below}" for split in ("train", "val", "test") for below in ("", "/*/")),
    ),
)
OPTIONS = {
    "question": "",  # what is asked; empty: the instruction says it all
    "names": {},  # class in the data -> words for it
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields an example for each image, in the order of the table or of the paths."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "classes")
    for name, path, label, cluster in _labelled(folder, split):
        answer = str(chosen["names"].get(label, label))
        facts = {"template": "class", "class": label}
        yield (
            Example(
                f"{split}/{name}", "cls", str(chosen["question"]), answer, (name,), None, cluster, facts
            ),
            (path,),
        )


def _labelled(folder: Path, split: str) -> Iterator[tuple[str, Path, str, str]]:
    """Yields (name, path, class, cluster) of each image of a split."""
    tables = [path for ending in TABLES if (path := folder / f"{split}{ending}").exists()]
    here = folder / split
    if len(tables) + here.is_dir() > 1:
        raise UserError(
            f"{folder} has {split} as {tables[0].name} and in another form; leave one of them."
        )
    if tables:
        for where, record in records(tables[0], "give a table with the columns path and label"):
            name = word(record, "path" if "path" in record else "image", where, required=True)
            label = word(
                record, "label" if "label" in record else "class", where, required=True, numbers=True
            )
            path = inside(folder, folder, name, where)
            yield name, path, label, word(record, "cluster", where) or name
    elif here.is_dir():
        for place in sorted(path for path in here.iterdir() if path.is_dir() and path.name[0] != "."):
            for path in sorted(place.rglob("*")):
                if any(part[0] == "." for part in path.relative_to(place).parts):
                    continue  # what programs keep beside data: .DS_Store, .ipynb_checkpoints
                name = str(path.relative_to(folder))
                if path.is_dir():
                    if path.is_symlink():
                        raise UserError(
                            f"{path} is a link to a folder within a class; put the folder there."
                        )
                    continue
                yield name, inside(folder, folder, name, str(place)), place.name, name
