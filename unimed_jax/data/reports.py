"""Reads reports: R2Gen's annotation, which MIMIC-CXR and IU X-Ray share, and sections of free texts.

annotation.json is {"train": [{"id", "report", "image_path": [...], ...}, ...], "val": [...],
"test": [...]}.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.records import LARGEST, Record, inside, short, word
from unimed_jax.errors import UserError
from unimed_jax.parsing import parse_json, read_text

FILE = "annotation.json"
_BOTH = r"(?i:findings?[ \t]*(?:and|&|/|,)[ \t]*impressions?)"
_KNOWN = rf"{_BOTH}|(?i:findings?)|(?i:impressions?)"
# A heading begins a line. Those that are known may be in small letters, or alone on their line without
# a colon; all others are capitals before a colon, of three signs or more.
_HEADING = re.compile(
    rf"^[ \t]*(?:(?P<known>{_KNOWN})[ \t]*(?::|$)|[A-Z][A-Z0-9 \t/&(),.'-]+[A-Z0-9)][ \t]*:)", re.M
)


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
        report = flat(word(record, "report", where))
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


def sections(report: str) -> dict[str, str]:
    """Finds the sections "findings" and "impression" of a report by their headings.

    A section ends where the next heading begins, whichever that is. One heading for both, as
    FINDINGS AND IMPRESSION, gives both the same text. Of several sections of a name the last that is
    not empty counts, since addenda follow. A name without a heading is absent.
    """
    found: dict[str, str] = {}
    headings = list(_HEADING.finditer(report.replace("\r", "\n")))
    for heading, following in zip(headings, [*headings, None][1:], strict=True):
        text = report[heading.end() : following.start() if following else len(report)].strip()
        name = (heading["known"] or "").lower()
        if text:
            found |= {part: text for part in ("findings", "impression") if part.rstrip("s") in name}
    return found


def flat(text: str) -> str:
    """Writes a text on one line with single blanks."""
    return " ".join(text.split())
