"""Reads Path-VQA: questions about pictures of pathology (task vqa).

The layout is chosen by what lies in the folder:

    qas/{train,val,test}_vqa.pkl     the original; its pickles are never executed
    images/<split>/<img_id>.jpg
or
    PathVQA_{TRAIN,VAL,TEST}.tsv     columns index, image (base64, or the index of the row that has
                                     it), question, answer
or
    data/<split>-00000-of-00007.parquet     of the Hugging Face hub: image, question, answer

There is no field that says so, so a question counts as closed if its answer is yes or no, which is
exact for this set.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.pairs import kind_of, pairs
from unimed_jax.data.records import (
    chosen_options,
    inside,
    picture_of,
    records,
    repeated_images,
    short,
    word,
)
from unimed_jax.data.tables import PARQUET, parquet_files
from unimed_jax.errors import UserError
from unimed_jax.parsing import no_file, refuse_stand_in
from unimed_jax.pickles import Refused, read_pickle

PICKLES = {split: f"qas/{split}_vqa.pkl" for split in ("train", "val", "test")}
TABLES = {split: f"PathVQA_{split.upper()}.tsv" for split in PICKLES}
ENDINGS = (".jpg", ".jpeg", ".png", "")

INFO = Info(
    name="path_vqa",
    tasks=("vqa",),
    licence="MIT",
    citation="He et al., PathVQA: 30000+ questions for medical visual question answering, 2020",
    cluster_word="image",
    files=(*PICKLES.values(), *TABLES.values(), *PARQUET),
    counts={"train": 19654, "val": 6259, "test": 6719},
)

Found = Iterator[tuple[Example, tuple[Path | bytes, ...]]]


def read(folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]) -> Found:
    """Yields the questions of a split in the order of its file; the template is open or closed."""
    assert folder is not None  # INFO names files
    chosen_options(options, {}, "path_vqa")
    if (folder / PICKLES[split]).exists():
        yield from _from_pickle(folder, split)
    elif (folder / TABLES[split]).exists():
        yield from _from_table(folder, split, skipped)
    elif files := parquet_files(folder, split):
        yield from pairs(files, folder, f"{split}/{{}}", _example, skipped)
    elif not any(place.exists() for name in INFO.files for place in folder.glob(name)):
        raise UserError(
            f"{folder} holds neither {PICKLES[split]} nor {TABLES[split]} nor a table of the hub; give "
            "Path-VQA's folder as path."
        )


def _from_pickle(folder: Path, split: str) -> Found:
    file = folder / PICKLES[split]
    if reason := no_file(file):
        raise UserError(f"{file} {reason}; get it again.")
    try:
        refuse_stand_in(file)
        data = file.read_bytes()
        content = read_pickle(data, "", len(data))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); get it again.") from error
    except UserError:
        raise
    except Refused as error:
        raise UserError(
            f"{file} holds code or objects besides plain data ({error}); get it again from where "
            "you trust it."
        ) from error
    except Exception as error:  # a damaged pickle fails at any of its steps
        raise UserError(f"{file} is not a whole pickle ({error}); get it again.") from error
    if not isinstance(content, list):
        raise UserError(f"{file} is not a list of questions; get it again.")
    for number, record in enumerate(content):
        where = f"{file}, record {number}"
        label = record.get("label") if isinstance(record, dict) else None
        if (
            not isinstance(label, dict)
            or not label
            or not all(isinstance(answer, str) for answer in label)
        ):
            raise UserError(
                f"{where} is no question with its answers ({short(record)}); get the file again."
            )
        name = word(record, "img_id", where, required=True)
        paths = [
            inside(folder, folder / "images" / split, f"{name}{ending}", where) for ending in ENDINGS
        ]
        path = next((path for path in paths if path.exists()), paths[0])
        scores = {
            answer: score if isinstance(score, (int, float)) else 0 for answer, score in label.items()
        }
        answer = max(scores, key=lambda answer: scores[answer])
        question = word(record, "sent", where, required=True)
        yield _example(f"{split}/{number}", question, answer, name), (path,)


def _from_table(folder: Path, split: str, skipped: list[str]) -> Found:
    file = folder / TABLES[split]
    repeated = repeated_images(file)
    for number, (where, record) in enumerate(records(file)):
        cell = word(record, "image", where)
        try:
            image = base64.b64decode(repeated.get(cell, cell), validate=True)
        except binascii.Error as error:
            raise UserError(f"{where}: 'image' is not base64 ({error}); get the file again.") from error
        found = picture_of(image, folder, where)
        if isinstance(found, str):
            skipped.append(f"{split}/{number}: {found}")
            continue
        question, answer = word(record, "question", where, required=True), word(record, "answer", where)
        yield _example(f"{split}/{number}", question, answer, found[0]), (found[1],)


def _example(name: str, question: str, answer: str, image: str) -> Example:
    """Makes the example; the same picture in another split is another one, as the files have it."""
    kind, key = kind_of(answer), f"{name.partition('/')[0]}/{image}"
    facts = {"template": kind.lower(), "answer_type": kind, "modality": "pathology"}
    return Example(name, "vqa", question, answer.strip(), (key,), None, key, facts)
