"""Reads studies with their reports in R2Gen's form, which MIMIC-CXR and IU X-Ray share.

annotation.json is {"train": [{"id", "report", "image_path": [...], ...}, ...], "val": [...],
"test": [...]}.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.records import LARGEST, Record, inside, short, word
from unimed_jax.errors import UserError
from unimed_jax.parsing import parse_json, read_text

FILE = "annotation.json"


def studies(
    folder: Path, images: Path, split: str, largest: int, cluster: str
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the studies of a split as examples of task caption, in the order of the file.

    images: folder of the images. largest: number of images of a study that are shown, its first
    ones. cluster: key of a record that names what belongs together. Raises UserError for anything
    in the file that is not as above.
    """
    file = folder / FILE
    content = parse_json(read_text(file, "give R2Gen's annotation", LARGEST), str(file))
    listed: Any = content.get(split) if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(record, dict) for record in listed):
        raise UserError(f"{file} has no list of studies under {split!r}; give R2Gen's annotation.")
    for number, record in enumerate(listed):
        where = f"{file}, {split} {number}"
        names = _names(record, where)[:largest]
        name = word(record, "id", where, required=True, numbers=True)
        group = word(record, cluster, where, numbers=True) or name
        report = " ".join(word(record, "report", where).split())
        paths = tuple(inside(folder, images, found, where) for found in names)
        views = f"{len(names)} view" + "s" * (len(names) > 1)
        yield (
            Example(
                f"{split}/{name}", "caption", "", report, tuple(names), None, group, {"template": views}
            ),
            paths,
        )


def _names(record: Record, where: str) -> list[str]:
    found = record.get("image_path")
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        raise UserError(f"{where}: 'image_path' is {short(found)}; give a list of paths.")
    return found
