"""Finds and reads parquet tables, the form in which the Hugging Face hub keeps data sets.

A split lies in `data/<split>-00000-of-00002.parquet` and so on, of older sets with a checksum at the
end of each name (`-e9adadb4799f44d3`), or, as the hub itself converts sets, in
`<split>/0000.parquet`. Only tables are read: a loading script beside them is never run.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unimed_jax.errors import UserError
from unimed_jax.parsing import no_file, refuse_stand_in

PARQUET = ("*.parquet", "*/*.parquet", "*/*/*.parquet")  # where tables lie, for Info.files
SPELT = {
    "train": ("train", "training"),
    "val": ("validation", "validate", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
ROWS = 16  # that are decoded at once; a row may hold a picture of many MB
_SHARD = re.compile(r"(?P<name>.*?)-?(?P<number>\d{4,5})(-of-(?P<count>\d{4,5})(-[0-9a-f]{8,})?)?")


def rows(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of several tables, as `parquet_rows` does of one."""
    for file in files:
        yield from parquet_rows(file)


def parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a parquet file as (words that name the row in errors, its fields).

    Rows are counted from 0. They are decoded one row group after another, `ROWS` at a time, so that
    memory does not grow with the file.
    Raises UserError if the file is no table, or from where on it is damaged.
    """
    import pyarrow  # takes a while, and few commands read tables
    import pyarrow.parquet

    reason = no_file(file)
    if reason:
        raise UserError(f"{file} {reason}; get it again.")
    refuse_stand_in(file)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20) as table:
            names = table.schema_arrow.names
            doubled = sorted({name for name in names if names.count(name) > 1})
            for group in range(table.num_row_groups if not doubled else 0):
                for batch in table.iter_batches(ROWS, [group], use_threads=False):
                    for record in batch.to_pylist():
                        yield f"{file}, row {number}", record
                        number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{file} cannot be read from row {number} on ({error}); get it again."
        ) from error
    if doubled:
        raise UserError(f"{file} has several columns {doubled[0]!r}; rename them.")


# ---- which files -----------------------------------------------------------------------------------
def parquet_files(folder: Path, split: str) -> list[Path]:
    """Lists the tables of a split in the order of their shards; empty if there are none.

    Raises UserError if a shard is missing, if two sets of tables could be meant, or if the hub has
    converted only a part of a set.
    """
    found = {file for pattern in PARQUET for file in folder.glob(pattern)}
    sets = defaultdict(list)
    for file in found:
        if split_of(file, folder) == split:
            sets[shard_set(file)].append(file)
    if len(sets) > 1:
        one, two = (min(some) for some in list(sets.values())[:2])
        raise UserError(
            f"{folder} holds several sets of tables for {split} (with {min(one, two)} and "
            f"{max(one, two)}); give the folder of one of them as path."
        )
    files = [file for some in sets.values() for file in in_order(some)]
    if files and files[0].parent.name.startswith("partial-"):
        raise UserError(
            f"{files[0].parent} is only the part of {split} that the hub has converted; get the set's "
            "own files."
        )
    return files


def split_of(file: Path, folder: Path) -> str | None:
    """Tells a file's split by its name, or else by the folders above it within `folder`.

    train, val or test; None if no name says it or several do.
    """
    above = [part.name for part in file.parents if part != folder and part.is_relative_to(folder)]
    for name in (file.stem, *above):
        parts = re.split(r"[^a-z]+", name.lower())
        named = {split for split, words in SPELT.items() if set(words) & set(parts)}
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def shard_set(file: Path) -> tuple[str, ...]:
    """Returns what the shards of one table have in common: folder, name and number of shards."""
    found = _SHARD.fullmatch(file.stem)
    if not found:
        return str(file.parent), file.stem, ""
    return str(file.parent), found["name"], found["count"] or "?"


def in_order(files: Iterable[Path]) -> list[Path]:
    """Sorts the shards of one table by number, and raises UserError if one is missing."""
    numbered = {}
    for file in files:
        found = _SHARD.fullmatch(file.stem)
        numbered[int(found["number"]) if found else 0] = (file, found)
    last, found = numbered[max(numbered)]
    count = int(found["count"] or max(numbered) + 1) if found else 0
    for number in range(count):
        if number not in numbered:
            raise UserError(
                f"{last.parent}: shard {number} of {count} is missing beside {last.name}; get it too."
            )
    return [numbered[number][0] for number in sorted(numbered)]
