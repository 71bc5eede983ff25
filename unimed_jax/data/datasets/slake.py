"""Reads SLAKE: questions about radiological images (vqa), and organs in boxes (refer, identify).

The questions are in English and Chinese.

The layout is chosen by what lies in the folder:

    train.txt, validate.txt, test.txt    names of image folders, one a line (the original split)
    imgs/<name>/{source.jpg, question.json, detection.json}
or
    train.json, validate.json (or validation.json), test.json    the questions of a split in one list
    imgs/<name>/...
or
    data/<split>-00000-of-00001.parquet    of the Hugging Face hub: image, question, answer in English

The first two split the images of the Chinese questions differently: in the second 142 images are in
train in one language and in test in the other, so `language="all"` is only sound in the first. The
hub's tables have no boxes, ids, names of images or kinds of answers: a question counts as closed if
its answer is yes or no, which is a guess (355 of the 416 closed test questions).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data import grounding
from unimed_jax.data.example import Example
from unimed_jax.data.grounding import Labelled
from unimed_jax.data.image_shards import no_image
from unimed_jax.data.info import Info
from unimed_jax.data.pairs import guessed, pairs
from unimed_jax.data.records import (
    Record,
    chosen_options,
    inside,
    labelled_boxes,
    one_of,
    records,
    size_of,
    word,
)
from unimed_jax.data.tables import PARQUET, parquet_files
from unimed_jax.errors import UserError
from unimed_jax.parsing import read_text

LISTS = {"train": ("train.txt",), "val": ("validate.txt", "validation.txt"), "test": ("test.txt",)}
TABLES = {
    split: tuple(name.replace(".txt", ".json") for name in names) for split, names in LISTS.items()
}

INFO = Info(
    name="slake",
    tasks=("vqa", "refer", "identify"),
    licence="CC BY 4.0",
    citation="Liu et al., SLAKE, ISBI 2021",
    cluster_word="image",
    files=(
        *(name for names in (*LISTS.values(), *TABLES.values()) for name in names),
        *("imgs/*/question.json", "imgs/*/detection.json"),
        *PARQUET,
    ),
    counts={"train vqa": 4919, "val vqa": 1053, "test vqa": 1061, "test answer_type=CLOSED": 416},
    other_counts={
        "English and Chinese": {"train vqa": 9835, "val vqa": 2099, "test vqa": 2094},
        "Chinese": {"train vqa": 4916, "val vqa": 1046, "test vqa": 1033},
        "Hugging Face": {
            "train vqa": 4919,
            "val vqa": 1053,
            "test vqa": 1061,
            "test answer_type=CLOSED": 355,
        },
    },
)
OPTIONS = {
    "language": "en",  # of the questions: en, zh or all; Uni-Med takes en
    "boxes": True,  # whether detection.json is read; without images only the questions can be
    **grounding.OPTIONS,
    "per_image": 0,  # every box, as published
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path | bytes, ...]]]:
    """Yields the questions of a split.

    Those about an image are followed by the questions about its boxes.
    """
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "slake")
    one_of(chosen, "language", ("en", "zh", "all"), "slake")
    grounding.check_options(chosen, "slake")
    lists = [name for names in (*LISTS.values(), *TABLES.values()) for name in names]
    if not any((folder / name).exists() for name in lists):
        files = parquet_files(folder, split)
        if not any(place.exists() for name in PARQUET for place in folder.glob(name)):
            raise UserError(
                f"{folder} holds neither train.txt nor train.json nor a table of the hub; give SLAKE's "
                "folder as path."
            )
        if chosen["language"] == "zh":
            raise UserError(
                f"{folder}: the tables of the hub have no Chinese questions; get train.json."
            )
        yield from pairs(files, folder, f"{split}/row{{}}", _nameless, skipped)
        return
    if (folder / "imgs.zip").exists() and not (folder / "imgs").exists():
        raise UserError(f"{folder / 'imgs.zip'} is packed; unpack it there.")
    for name, questions in _images(folder, split, chosen["language"]):
        key = f"{name}/source.jpg"
        path = inside(folder, folder / "imgs", key, f"{folder}, {split}")
        reason = no_image(path)
        if reason:
            skipped.append(f"{name}: {reason}")
            continue
        for where, record in questions:
            yield _question(record, split, key, where), (path,)
        boxes = inside(folder, folder / "imgs", f"{name}/detection.json", f"{folder}, {split}")
        if chosen["boxes"] and boxes.exists():
            for example in _boxes(boxes, path, key, chosen, skipped):
                yield example, (path,)


def _images(folder: Path, split: str, language: str) -> Iterator[tuple[str, list[tuple[str, Record]]]]:
    """Yields the images of a split, each with the questions about it in the wanted language."""

    def wanted(record: Record, where: str) -> bool:
        return language in ("all", word(record, "q_lang", where, required=True))

    listed = next((folder / name for name in LISTS[split] if (folder / name).exists()), None)
    if listed is not None:
        for name in read_text(listed).split():
            file = inside(folder, folder / "imgs", f"{name}/question.json", str(listed))
            yield name, [(where, record) for where, record in records(file) if wanted(record, where)]
        return
    table = next((folder / name for name in TABLES[split] if (folder / name).exists()), None)
    of_image: dict[str, list[tuple[str, Record]]] = {}
    for where, record in records(table) if table else ():
        name = word(record, "img_name", where, required=True).removesuffix("/source.jpg")
        if wanted(record, where):
            of_image.setdefault(name, []).append((where, record))
    yield from of_image.items()


def _question(record: Record, split: str, key: str, where: str) -> Example:
    kind = word(record, "answer_type", where).upper()
    facts = {
        "template": kind.lower(),
        "answer_type": kind,
        "language": word(record, "q_lang", where),
        "modality": word(record, "modality", where),
        "location": word(record, "location", where),
        "content": word(record, "content_type", where),
    }
    name = f"{split}/{word(record, 'qid', where, required=True, numbers=True)}"
    question, answer = (
        word(record, "question", where, required=True),
        word(record, "answer", where, numbers=True),
    )
    meta = {key: value for key, value in facts.items() if value}
    return Example(name, "vqa", question, answer, (key,), None, key, meta)


def _nameless(name: str, question: str, answer: str, key: str) -> Example:
    return Example(
        name, "vqa", question, answer, (key,), None, key, guessed(answer) | {"language": "en"}
    )


def _boxes(
    file: Path, path: Path, key: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[Example]:
    size = size_of(path)
    if isinstance(size, str):
        skipped.append(f"{key}: {size}")
        return
    found = ((where, Labelled(label, box)) for where, label, box in labelled_boxes(file))
    things = grounding.usable(found, size, skipped)
    yield from grounding.questions(key, things, size, options, cluster=key, meta={})
