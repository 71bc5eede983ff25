"""Reads the records of raw data files and their fields, for the readers in data/datasets.

Every function that raises names the file and the record, so that whoever holds the file can mend it.
"""

import csv
import functools
import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.data.images import upright_size
from unimed_jax.data.tables import parquet_rows
from unimed_jax.errors import UserError, misspelt, nearest
from unimed_jax.parsing import json_lines, parse_json, read_text

Record = dict[str, Any]

LARGEST = 8 << 30  # bytes of a file of records; the largest public ones have one
FORM = "give a list of records, or one record a line"


def records(
    file: Path, form: str = FORM, spellings: Sequence[str] = (), any_key: bool = False
) -> Iterator[tuple[str, Record]]:
    """Yields the records of a .json, .jsonl, .csv, .tsv or .parquet file, the texts also as .gz.

    Before each record come the words that name it in errors. JSON is a list of objects or, whatever
    the file's ending, one object a line. form: how the file should look, for errors. spellings: of
    one key, that occur side by side. any_key: keys are words of the data. Raises UserError if the file
    cannot be read or is something else, or if a key of a record looks like a misspelling of one that
    others have, unless any_key.
    """
    if file.suffix == ".parquet":
        yield from parquet_rows(file)
        return
    text = read_text(file, "restore it", LARGEST)
    if re.match(r"\s*<(!doctype|\?xml)", text[:200], re.IGNORECASE):
        raise UserError(f"{file} is a web page, not the data itself; download the file again.")
    kind = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    if kind in (".csv", ".tsv"):
        yield from _rows(text, file, "\t" if kind == ".tsv" else ",")
        return
    if re.match(r"\s*\{", text):
        numbered = json_lines(text, str(file), form, characters=False)
        named: Iterator[tuple[str, Any]] = (
            (f"{file}, line {number}", record) for number, record in numbered
        )
    else:
        found = parse_json(text, str(file), "restore it", characters=False)
        if not isinstance(found, list):
            raise UserError(f"{file} is not a list of records; {form}.")
        named = ((f"{file}, record {number}", record) for number, record in enumerate(found))
    seen: dict[str, None] = {}
    for where, record in named:
        if not isinstance(record, dict):
            raise UserError(f"{where} is no object, so this is not a list of records; {form}.")
        for key in [key for key in record if key not in seen]:
            other = misspelt(key, [known for known in seen if known not in record])
            if other and key not in spellings and not any_key:
                raise UserError(f"{where}: key {key!r} is unknown; did you mean {other!r}?")
            seen[key] = None
        yield where, record


def _rows(text: str, file: Path, delimiter: str) -> Iterator[tuple[str, Record]]:
    """Yields the rows of a table whose first line names its columns."""
    limit = csv.field_size_limit(len(text) + 1)  # the default cuts long reports and pictures in base64
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = next(rows, [])
        if len(set(names)) < len(names) or not all(names[1:]) or names == [""]:  # "": pandas' index
            raise UserError(
                f"{file}: its first line does not name each column once ({short(names)}); mend it."
            )
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if row and len(row) != len(names):
                raise UserError(
                    f"{where} has {len(row)} fields, not {len(names)} as the first line; mend the line."
                )
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{file} is not a table ({error} near line {rows.line_num}); mend it."
        ) from error
    finally:
        csv.field_size_limit(limit)


def repeated_images(file: Path) -> dict[str, str]:
    """Finds the pictures of a table that other rows name by the `index` of the row that holds them.

    VLMEvalKit's tables hold a picture in base64 once, and that index in its place in other rows.
    Returns index -> picture.
    """
    named = {
        cell for _, record in records(file) if (cell := str(record.get("image") or "").strip()).isdigit()
    }
    return {
        index: record["image"]
        for _, record in (records(file) if named else ())
        if (index := str(record.get("index")).strip()) in named and not record["image"].isdigit()
    }


# ---- fields ----------------------------------------------------------------------------------------
def word(
    record: Mapping[str, Any], key: str, where: str, required: bool = False, numbers: bool = False
) -> str:
    """Returns the text of a key without blanks at its ends, or "" where it is absent or null.

    numbers: a number is taken as its text. Raises UserError for anything else, or if a required key
    is absent.
    """
    value = record.get(key) if required else optional(record, key, where)
    if value is None and not required:
        return ""
    if not (isinstance(value, str) or (numbers and type(value) in (int, float))):
        if key in record:
            raise UserError(f"{where}: {key!r} is {short(value)}; give a text, or leave it out.")
        raise UserError(f"{where}: {key!r} is missing{nearest(key, record) or '.'}")
    return str(value).strip()


def optional(record: Mapping[str, Any], key: str, where: str) -> Any:
    """Returns the value of a key that a record may lack, then None.

    Raises UserError if it is absent, but another key looks like a misspelling of it.
    """
    if key not in record and (other := _misspelt(key, tuple(record))):
        raise UserError(f"{where}: key {other!r} is unknown; did you mean {key!r}?")
    return record.get(key)


@functools.lru_cache(1024)
def _misspelt(key: str, keys: tuple[str, ...]) -> str:
    return misspelt(key, keys)


def check_keys(record: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises UserError for a key that is not known, which is a misspelling as a rule."""
    for key in record:
        if key not in known:
            raise UserError(
                f"{where}: key {key!r} is unknown{nearest(key, known)} Choose from {', '.join(known)}."
            )


def chosen_options(options: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Completes a source's options by a reader's defaults.

    Raises UserError for an option that the reader lacks, and for a value of another type.
    """
    for key, value in options.items():
        if key not in defaults:
            choices = ", ".join(defaults) or "none"
            raise UserError(
                f"config.data.sources: {name} has no option {key!r}{nearest(key, defaults)} It has: "
                f"{choices}."
            )
        if type(value) is not type(defaults[key]):
            raise UserError(
                f"config.data.sources: option {key}={short(value)} of {name} is not of the same type as "
                f"its default {defaults[key]!r}."
            )
    return {**defaults, **options}


def one_of(options: Mapping[str, Any], key: str, choices: Sequence[Any], name: str) -> Any:
    """Returns the value of an option, and raises UserError if it is not one of the choices."""
    if options[key] not in choices:
        raise UserError(
            f"config.data.sources: option {key}={options[key]!r} of {name} is none of "
            f"{', '.join(map(repr, choices))}."
        )
    return options[key]


def at_least(options: Mapping[str, Any], key: str, least: int, name: str) -> int:
    """Returns the number that an option holds, and raises UserError if it is less than `least`."""
    if options[key] < least:
        raise UserError(
            f"config.data.sources: option {key}={options[key]!r} of {name} is less than {least}."
        )
    return options[key]


def short(value: Any) -> str:
    """Writes a value for an error's sentence, in ASCII and at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- images ----------------------------------------------------------------------------------------
def inside(folder: Path, images: Path, name: str, where: str) -> Path:
    """Returns the path `images`/`name`, and raises UserError if it leads out of `folder`.

    It may do so by its words (absolute, or ..) or by a link on its way. Images in a folder outside
    `folder`, which only a setting can name, may not leave that. where: starts the sentence.
    """
    folder, images = Path(os.path.normpath(folder)), Path(os.path.normpath(images))
    root = folder if images.is_relative_to(folder) else images
    path = Path(os.path.normpath(images / name))
    if not path.is_relative_to(root):
        raise UserError(
            f"{where}: image {short(name)} lies outside {root}; give its path within {images}."
        )
    try:
        real, homes = os.path.realpath(path), _homes(root)
    except (OSError, ValueError):  # a name that no file can have is reported when it is opened
        return path
    if not any(Path(real).is_relative_to(home) for home in homes):
        raise UserError(
            f"{where}: {path} is a link to {real}, which lies outside {root}; put a copy in the link's "
            "place."
        )
    return path


def _homes(root: Path) -> list[str]:
    """Lists the real folders in which the links of a data set may end.

    That is its own, and `blobs` for one in the cache of Hugging Face, whose files are all links.
    """
    real = os.path.realpath(root)
    cached = re.match(r"(.*/(?:datasets|models)--[^/]+)/snapshots/[^/]+(/|$)", real)
    return [real, f"{cached[1]}/blobs"] if cached else [real]


def check_links(folder: Path, patterns: Sequence[str]) -> None:
    """Raises UserError if a file of a data set is a link that leads out of its folder.

    patterns: of the files, as in `Info.files`.
    """
    if folder.is_dir():
        for pattern in patterns:
            for path in folder.glob(pattern):
                inside(folder, folder, str(path.relative_to(folder)), f"{folder}")


def picture_of(cell: Any, folder: Path, where: str) -> tuple[str, Path | bytes] | str:
    """Returns the key and the source of the picture in a table's cell, or why there is none.

    A cell is {"bytes", "path"}, of which either may be null, as the Hugging Face hub has it, or just
    bytes or a path from `folder` on. Bytes are known by a hash of them: their path is no name, since
    many pictures of a set may share it. Raises UserError for another type.
    """
    if isinstance(cell, dict) and cell.keys() <= {"bytes", "path"}:
        cell = cell["path"] if cell.get("bytes") is None else cell["bytes"]
    if cell is None or cell in ("", b""):
        return "it has no image"
    if isinstance(cell, bytes):
        return hashlib.sha256(cell).hexdigest()[:16], cell
    if not isinstance(cell, str):
        raise UserError(f"{where}: its image is {short(cell)}; give bytes or a path.")
    return cell, inside(folder, folder, cell, where)


def size_of(path: Path) -> tuple[int, int] | str:
    """Reads (width, height) from the header of an image, upright as EXIF says, or why it cannot."""
    try:
        return upright_size(path)
    except UserError as error:
        return str(error).rstrip(".")


def other_size(path: Path, size: tuple[int, int]) -> str:
    """Says that an image has another size than its annotation gives it, or "" if it has the same."""
    found = size_of(path)
    if isinstance(found, str) or found == size:
        return ""  # a file that is not a picture is reported when it is stored
    return f"image {path} has {found[0]} x {found[1]} pixels, its annotation says {size[0]} x {size[1]}"


def left_out_names(given: str, folder: Path) -> frozenset[str]:
    """Reads which images a source leaves out because another set has them.

    Returns their names, without folder and ending. given: a folder, whose files' names count, or a
    text file with a name a line; from `folder` on. If it is empty, none is left out.
    """
    if not given:
        return frozenset()
    path = folder / given
    if path.is_dir():
        return frozenset(found.stem for found in path.iterdir() if found.is_file())
    return frozenset(
        Path(line.strip()).stem for line in read_text(path, "check the option `without`").splitlines()
    )


def labelled_boxes(file: Path) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """Yields the labelled boxes of a file as (where, label, box).

    The file holds [{label: [x, y, width, height]}, ...]; a box is x1, y1, x2, y2 in pixels.
    """
    form = "give a list of {label: [x, y, width, height]}"
    for where, record in records(file, form, any_key=True):
        for label, sides in record.items():
            if (
                not isinstance(sides, list)
                or len(sides) != 4
                or not all(type(v) in (int, float) for v in sides)
            ):
                raise UserError(f"{where}: {label!r} is {short(sides)}; give [x, y, width, height].")
            x, y, width, height = sides
            yield where, label.strip(), (round(x), round(y), round(x + width), round(y + height))
