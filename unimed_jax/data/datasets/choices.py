"""Reads any set of multiple-choice questions, with 0 to n images a question (tasks vqa and qa).

Every .csv, .tsv, .json, .jsonl and .parquet file of the folder is read, or those that `files`
names, or the one file that is given as path. The split is said by a file's name, by a folder above
it, or by a column; a file that says none is for training. A record has

    its question         `question`
    its options          `options` or `choices`: {"A": ...}, [...], or either written as text; or columns
                         such as A, B, C ...; Choice A ...; option_a ...; opa ...; option1 ...
    its right answer     a letter, an index or the text of an option: `answer`, `label`, `cop` ...
    its images, if any   paths, {"bytes", "path"} or base64, also in lists: `image`, `image_1` ...

Columns are found by such names, whatever their capitals and blanks, or named by options. PMC-VQA,
MedXpertQA, OmniMedVQA, MMMU and MedMCQA read without an option that names one. A question without
options keeps its answer as it is.
"""

import base64
import binascii
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.multiple_choice import (
    FORMS,
    LETTERS,
    Options,
    options_of,
    parsed,
    right_letter,
    unfolded,
    with_options,
    without_letters,
)
from unimed_jax.data.records import (
    Record,
    chosen_options,
    inside,
    one_of,
    optional,
    picture_of,
    records,
    repeated_images,
    short,
    word,
)
from unimed_jax.data.tables import SPELT, in_order, shard_set, split_of
from unimed_jax.errors import UserError, nearest

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
NO_RECORDS = ("info.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Names of columns in small letters, without blanks and signs; the first that a record has counts.
QUESTION = ("question",)
LISTED = ("options", "choices")
COLUMNS = ("choice", "option", "op", "")  # before a letter, or before a number from 1 on
ANSWER = (
    "answeridx", "answerlabel", "answerindex", "correctoption", "label", "cop", "gtanswer",
    "correctanswer", "answer",
)  # fmt: skip
IMAGE = ("image", "images", "imagepath", "imagepaths", "imgpath", "figurepath", "imagefile", "imgname")
ID = ("id", "questionid", "qid", "index")
MODALITY = ("modality", "modalitytype")

INFO = Info(
    name="choices",
    version="3",
    tasks=("vqa", "qa"),
    cluster_word="image",
    files=tuple(f"{place}*{ending}" for place in ("", "*/", "*/*/", "*/*/*/") for ending in ENDINGS),
)
OPTIONS: dict[str, Any] = {
    "files": [],  # which files are read, as patterns from the folder on; empty: all
    # names of columns, where they are not found by themselves
    "question": "",
    "choices": [],  # one that holds all options, or one for each
    "answer": "",
    "image": [],
    "id": "",
    "cluster": "",  # what belongs together; without it the first image, or the question itself
    "split": "",  # train, val (or validation, dev) or test
    "meta": {},  # key of Example.meta -> column
    "answers": "auto",  # how the right one is written: auto, letter, index or text
    "first": 0,  # the index of the first option: 0 or 1
    "shown": True,  # whether the options stand in the question
    "images": "",  # folder of the images, from the set's folder on; empty: sought by their paths
}

Found = Iterator[tuple[Example, tuple[Path | bytes, ...]]]


def read(folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]) -> Found:
    """Yields the questions of a split in the order of the files' names and their rows.

    A record without an answer, or whose answer is none of its options, is skipped by name.
    """
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "choices")
    one_of(chosen, "answers", FORMS, "choices")
    one_of(chosen, "first", (0, 1), "choices")
    root = folder if folder.is_dir() else folder.parent
    number = -1
    for file in _files(folder, split, chosen):
        repeated = repeated_images(file) if file.suffix == ".tsv" else {}
        for where, folded in records(file, "give a list of questions, or one a line"):
            record = unfolded(folded)
            if chosen["split"] and _split(record, chosen["split"], where) != split:
                continue
            number += 1
            given = _column(record, chosen["id"], ID, where)
            given = word(record, given, where, numbers=True) if given else ""
            name = f"{split}/{given or number}"
            example = _example(record, name, where, chosen)
            if isinstance(example, str):
                skipped.append(f"{name}: {example}")
                continue
            cells = _cells(record, chosen, where)
            cells = [repeated.get(cell, cell) if isinstance(cell, str) else cell for cell in cells]
            found = [_image(cell, root, file, chosen, where) for cell in cells]
            lost = next((picture for picture in found if isinstance(picture, str)), "")
            if lost:
                skipped.append(f"{name}: {lost}")
                continue
            pictures = [picture for picture in found if isinstance(picture, tuple)]
            yield (
                _with_images(example, [key for key, _ in pictures], record, chosen, where),
                tuple(source for _, source in pictures),
            )


# ---- files -----------------------------------------------------------------------------------------
def _files(folder: Path, split: str, chosen: Mapping[str, Any]) -> list[Path]:
    """Lists the files of a split, or all files if a column says the split."""
    if folder.is_file():
        said = split_of(folder, folder.parent) or "train"
        return [folder] if chosen["split"] or said == split else []
    patterns = chosen["files"] or INFO.files
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    found = {
        path
        for path in found
        if path.suffix in ENDINGS
        and path.name not in NO_RECORDS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not found:
        raise UserError(
            f"{folder} holds no {', '.join(chosen['files']) or 'table (' + ', '.join(ENDINGS) + ')'}; "
            "give the folder of the questions as path."
        )
    of_split = [
        path for path in found if chosen["split"] or (split_of(path, folder) or "train") == split
    ]
    sets = defaultdict(list)
    for path in of_split:
        sets[shard_set(path), path.suffix].append(path)
    if not chosen["files"] and not chosen["split"]:
        _refuse_doubles(list(sets.values()), folder, split)
    return [path for key in sorted(sets) for path in in_order(sets[key])]


def _refuse_doubles(sets: Sequence[Sequence[Path]], folder: Path, split: str) -> None:
    """Raises UserError if two files beside each other name the same split by the same word."""
    first: dict[tuple[Path, str], Path] = {}
    for file in sorted(min(paths) for paths in sets):
        named = set(re.split(r"[^a-z]+", file.stem.lower())) & set(SPELT[split])
        if not named:
            continue  # a folder says it, or nothing does
        other = first.setdefault((file.parent, min(named)), file)
        if other != file:
            raise UserError(
                f"{folder}: {other.name} and {file.name} both hold {split}, perhaps the same questions; "
                "name those to read by the option `files`."
            )


def _split(record: Record, column: str, where: str) -> str:
    _check(record, column, where)
    text = word(record, column, where, required=True)
    found = split_of(Path(text or "-"), Path())
    if found is None:
        raise UserError(f"{where}: split {short(text)} is none of train, val, test.")
    return found


# ---- columns ---------------------------------------------------------------------------------------
def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", str(name).lower())


def _check(record: Record, column: str, where: str) -> None:
    if column not in record:
        raise UserError(f"{where}: {column!r} is missing{nearest(column, record)}")


def _column(record: Record, given: str, known: Sequence[str], where: str) -> str:
    """Returns the name of a column: the given one, or the first that is known; "" if there is none."""
    if given:
        _check(record, given, where)
        return given
    bare = {_bare(name): name for name in reversed(list(record))}
    found = next((bare[name] for name in known if name in bare), "")
    for name in () if found else known:
        optional(record, name, where)
    return found


def _options(record: Record, chosen: Mapping[str, Any], where: str) -> Options:
    """Reads the options of a record from one column or from one for each; {} if it has none."""
    given = chosen["choices"]
    for name in given:
        _check(record, name, where)
    bare = {_bare(name): name for name in record}
    one = given[0] if len(given) == 1 else next((bare[name] for name in LISTED if name in bare), "")
    if one and len(given) < 2:
        value = parsed(record[one])
        return options_of(value, where, one) if value else {}
    names = given
    numbers = [str(number) for number in range(1, 2 + max(len(LETTERS), len(record)))]
    for prefix in COLUMNS if not given else ():
        for marks in (LETTERS.lower(), numbers):
            there = [f"{prefix}{mark}" in bare for mark in marks]
            count = there.index(False) if False in there else len(there)
            if any(there[count:]) and sum(there) > 1:
                raise UserError(
                    f"{where}: option {prefix}{marks[count]} is missing, and later ones are there "
                    f"({short(list(record))}); name the columns by the option `choices`."
                )
            if count > 1 and not names:
                names = [bare[f"{prefix}{mark}"] for mark in marks[:count]]
                rest = {name: None for name in record if name not in names}
                for mark in marks[count : count + 1]:
                    optional(rest, f"{prefix}{mark}", where)
    for name in () if names else LISTED:
        optional(record, name, where)
    cells = [record[name] for name in names]
    return without_letters(options_of(cells, where, ", ".join(names))) if names else {}


def _example(record: Record, name: str, where: str, chosen: Mapping[str, Any]) -> Example | str:
    """Makes the example of a record, still without its images, or says why it cannot be used."""
    column = _column(record, chosen["question"], QUESTION, where)
    if not column:
        raise UserError(
            f"{where}: no column is called question ({short(list(record))}); name it by the option "
            "`question`."
        )
    question = _plain(word(record, column, where, required=True))
    options = {letter: _plain(text) for letter, text in _options(record, chosen, where).items()}
    column = _column(record, chosen["answer"], ANSWER, where)
    if not column:
        raise UserError(
            f"{where}: no column holds the answer ({short(list(record))}); name it by the option "
            "`answer`."
        )
    if record[column] == "?":  # MMMU, whose test has no answers
        return "it has no answer (?)"
    if not options:
        answer = _plain(word(record, column, where, numbers=True))
        return Example(name, "qa", question, answer, meta={"template": "open", "answer_type": "OPEN"})
    letter, reason = right_letter(options, record[column], where, chosen["answers"], chosen["first"])
    if reason:
        return reason
    text = next((record[key] for key in record if _bare(key) == "answer" and key != column), None)
    if not chosen["answer"] and isinstance(text, str) and text.strip():
        other, reason = right_letter(options, text, where, "auto", chosen["first"])
        if reason or options[other] != options[letter]:
            return f"{column!r} says {letter}, its answer {short(text)}"
    facts = {"template": "multiple choice", "answer_type": "CLOSED" if chosen["shown"] else "OPEN"}
    if chosen["shown"]:
        question = with_options(question, options)
    return Example(name, "qa", question, options[letter], meta=facts | {"letter": letter})


def _plain(text: str) -> str:
    """Returns a text without marks for its images and without options that are repeated in it."""
    text = re.sub(r"<image[ _]?(\d+)>", r"image \1", text.partition("Answer Choices:")[0])
    return text.replace("<image>", " ").strip()


# ---- images ----------------------------------------------------------------------------------------
def _cells(record: Record, chosen: Mapping[str, Any], where: str) -> list[Any]:
    """Lists the images of a record as they stand in it; those that are null or empty are none."""
    names = chosen["image"]
    for name in names:
        _check(record, name, where)
    if not names:
        one = _column(record, "", IMAGE, where)
        numbered = {
            int(found[1]): name for name in record if (found := re.fullmatch(r"image(\d+)", _bare(name)))
        }
        names = ([one] if one else []) + [numbered[number] for number in sorted(numbered)]
    cells: list[Any] = []
    for name in names:
        value = parsed(record[name])
        cells += value if isinstance(value, list) else [value]
    return [cell for cell in cells if cell is not None and cell != ""]


def _image(
    cell: Any, root: Path, file: Path, chosen: Mapping[str, Any], where: str
) -> tuple[str, Path | bytes] | str:
    """Returns key and source of an image, or why it cannot be used."""
    if isinstance(cell, dict) and cell.get("bytes") is None and isinstance(cell.get("path"), str):
        cell = cell["path"]
    if not isinstance(cell, str):
        return picture_of(cell, root, where)
    data = _from_base64(cell, where)
    if data is not None:
        return picture_of(data, root, where)
    if chosen["images"]:
        return cell, inside(root, root / chosen["images"], cell, where)
    places = (file.parent, root, root / "images", root / "figures")
    paths = [inside(root, place, cell, where) for place in places]
    found = next((path for path in paths if path.exists()), None)
    if found == paths[0] and file.parent != root:  # other tables may name another picture so
        return str(found.relative_to(root)), found
    if found is None and (packed := sorted(root.glob("*.zip"))) and not places[2].exists():
        raise UserError(f"{where}: there is no image {paths[1]}; unpack {packed[0].name} there.")
    return cell, found or paths[1]


def _from_base64(text: str, where: str) -> bytes | None:
    """Decodes a picture that stands in a text, or returns None if the text is a path."""
    text = text.partition("base64,")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        if len(text) > 1000:  # longer than a path
            raise UserError(
                f"{where}: its image is not base64 ({error}); get the file again."
            ) from error
        return None
    return data if len(text) > 1000 or data.startswith(PICTURES) else None


PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")  # as they begin


def _with_images(
    example: Example, keys: Sequence[str], record: Record, chosen: Mapping[str, Any], where: str
) -> Example:
    """Completes an example by its images, by what it belongs to, and by what `meta` names."""
    cluster = keys[0] if keys else example.id
    if chosen["cluster"]:
        _check(record, chosen["cluster"], where)
        cluster = word(record, chosen["cluster"], where, required=True, numbers=True)
    columns = dict(chosen["meta"])
    modality = _column(record, "", MODALITY, where)
    if modality:
        columns = {"modality": modality} | columns
    facts = {}
    for key, column in columns.items():
        _check(record, column, where)
        facts[key] = word(record, column, where, numbers=True)
    return dataclasses.replace(
        example,
        task="vqa" if keys else "qa",
        images=tuple(keys),
        cluster=cluster,
        meta={**example.meta, **{key: text for key, text in facts.items() if text}},
    )
