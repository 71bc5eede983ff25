"""Reads MedPix in RadFM's tables: radiological images, their captions and questions about them.

    MedPix_single_{train,test}.csv     name, context, type: caption, or modality or plane (task cls)
    MedPix_multi_{train,test}.csv      name (several, with commas), context, type, history (vqa)
    MedPix_questions_{train,test}.csv  name, question, answer, explanation (vqa; qa without an image)
    images/<name>                      or where the option `images` says

Uni-Med takes the captions of the first table, and so does this reader unless `tables` names others.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import Record, chosen_options, inside, records, short, word
from unimed_jax.errors import UserError

TABLES = ("single", "multi", "questions")
QUESTIONS = {  # what is asked for the `context` of a row, by its type
    "single": {
        "caption": "",
        "modality": "What is the modality of this image?",
        "plane": "What is the plane of this image?",
    },
    "multi": {
        "findings": "What are the findings?",
        "diagnosis": "What is the diagnosis?",
        "ddx": "What is the differential diagnosis?",
        "dxHow": "How was the diagnosis made?",
        "exam": "What did the examination show?",
        "txFollowup": "What treatment and follow-up does the patient need?",
        "discussion": "What is known about this condition?",
    },
}
TAKEN = {"single": ("caption",), "multi": tuple(QUESTIONS["multi"])}  # types, if none are chosen

INFO = Info(
    name="medpix",
    tasks=("caption", "cls", "vqa", "qa"),
    splits=("train", "test"),
    licence="contributors to MedPix keep their rights",
    citation="Wu et al., RadFM, 2023; images and captions of medpix.nlm.nih.gov",
    cluster_word="image",
    files=tuple(f"MedPix_{table}_{split}.csv" for table in TABLES for split in ("train", "test")),
)
OPTIONS = {
    "images": "images",  # folder of the images, from the set's folder on
    "tables": ["single"],  # which are read: single, multi, questions
    "types": [],  # of rows that are taken from single and multi; empty: captions, and all of multi
    "history": False,  # whether a patient's history stands before the question, where multi has one
}

Found = Iterator[tuple[Example, tuple[Path, ...]]]


def read(folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]) -> Found:
    """Yields the rows of the chosen tables, in their order.

    A row whose image is missing is skipped by name.
    """
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "medpix")
    types = [kind for questions in QUESTIONS.values() for kind in questions]
    for key, known in (("tables", TABLES), ("types", types)):
        for value in chosen[key]:
            if value not in known:
                raise UserError(
                    f"config.data.sources: option {key} of medpix names {short(value)}; choose from "
                    f"{', '.join(known)}."
                )
    for table in chosen["tables"]:
        file = folder / f"MedPix_{table}_{split}.csv"
        if not file.exists():
            raise UserError(f"{file} does not exist; give the folder of RadFM's tables as path.")
        for number, (where, record) in enumerate(records(file)):
            name = f"{split}/{number}" if table == "single" else f"{split}/{table}/{number}"
            images = [part.strip() for part in word(record, "name", where).split(",") if part.strip()]
            if table == "questions":
                example = _question(record, name, images, where)
            else:
                kind = word(record, "type", where, required=True)
                if kind not in (chosen["types"] or TAKEN[table]):
                    if kind not in QUESTIONS[table]:
                        skipped.append(f"{name}: its type {short(kind)} is unknown")
                    continue
                if not images:
                    skipped.append(f"{name}: it names no image")
                    continue
                example = _described(record, name, images, kind, table, where)
                if chosen["history"] and (history := word(record, "history", where)):
                    question = f"{' '.join(history.split())} {example.question}"
                    example = dataclasses.replace(example, question=question)
            yield example, tuple(inside(folder, folder / chosen["images"], key, where) for key in images)


def _described(
    record: Record, name: str, images: list[str], kind: str, table: str, where: str
) -> Example:
    """Makes the example of a row that says something of its images."""
    task = "vqa" if table == "multi" else "caption" if kind == "caption" else "cls"
    text = " ".join(word(record, "context", where).split())
    question = QUESTIONS[table][kind]
    return Example(name, task, question, text, tuple(images), None, images[0], {"template": kind})


def _question(record: Record, name: str, images: list[str], where: str) -> Example:
    """Makes the example of a row with a question of its own, which may be about no image."""
    question = " ".join(word(record, "question", where, required=True).split())
    answer = " ".join(word(record, "answer", where, numbers=True).split())
    task, cluster = ("vqa", images[0]) if images else ("qa", name)
    return Example(name, task, question, answer, tuple(images), None, cluster, {"template": "question"})
