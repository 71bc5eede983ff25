"""Writes twins of multiple-choice sets, each with the columns and quirks of a public one."""

import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unimed_jax.data.twins.hub import write_shards, write_table
from unimed_jax.data.twins.random import count, pick, words, write_json, write_lines

LETTERS = "ABCDE"


class Asked(NamedTuple):
    """Holds a question, its options, the place of the right one, and pictures as PNG."""

    question: str
    options: list[str]
    right: int
    pictures: list[bytes]


def _asked(
    split: str, records: int, rng: np.random.Generator, options: int = 4, pictures: int = 1
) -> list[Asked]:
    """Draws the questions of a split with so many options and up to so many pictures."""
    found = []
    for i in range(count(split, records)):
        images = []
        for _ in range(1 + i % pictures if pictures else 0):
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            images.append(file.getvalue())
        # The last word keeps the options of a question apart.
        texts = [f"{words(rng, 1, 3)} {number + 1}" for number in range(options)]
        right = int(rng.integers(options))
        found.append(Asked(f"What is shown, {words(rng)}?", texts, right, images))
    return found


def _write_picture(path: Path, picture: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)


def _write_csv(
    path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]], tab: bool = False
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if tab else ",").writerows([columns, *rows])


def pmc_vqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes PMC-VQA: a column without a name, and options that begin with their letters."""
    columns = ["", "Figure_path", "Caption", "Question", *(f"Choice {c}" for c in "ABCD"), "Answer"]
    for split in ("train", "test"):
        rows = []
        for i, asked in enumerate(_asked(split, records, rng)):
            name = f"PMC{1000 + i}_{split}.jpg"
            _write_picture(folder / "figures" / name, asked.pictures[0])
            choices = [f" {c}:{text} " for c, text in zip("ABCD", asked.options, strict=True)]
            rows.append([i, name, words(rng), f" {asked.question}", *choices, LETTERS[asked.right]])
        _write_csv(folder / f"{split}_2.csv", columns, rows)


def medxpertqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes MedXpertQA: questions with and without pictures, which repeat their options."""
    for part, pictures in (("MM", 3), ("Text", 0)):
        for split, name in (("val", "dev"), ("test", "test")):
            rows = []
            for i, asked in enumerate(_asked(split, records, rng, 5, pictures)):
                listed = dict(zip(LETTERS, asked.options, strict=True))
                choices = " ".join(f"({letter}) {text}" for letter, text in listed.items())
                row: dict[str, Any] = {
                    "id": f"{part}-{name}-{i}",
                    "question": f"{asked.question}\nAnswer Choices: {choices}",
                    "options": listed,
                    "label": LETTERS[asked.right],
                    "body_system": "Nervous",
                }
                if pictures:
                    row["images"] = [f"{part}-{name}-{i}-{c}.jpeg" for c in "abc"[: len(asked.pictures)]]
                    for image, picture in zip(row["images"], asked.pictures, strict=True):
                        _write_picture(folder / "images" / image, picture)
                rows.append(row)
            write_lines(folder / part / f"{name}.jsonl", rows)


def omnimedvqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes OmniMedVQA: a file for each source and none for a split, answers as texts."""
    for source, options in (("ACRIMA", 2), ("ChestX", 4)):
        rows = []
        for i, asked in enumerate(_asked("train", records, rng, options)):
            image = f"Images/{source}/Im{i:03d}.png"
            _write_picture(folder / image, asked.pictures[0])
            row = {
                "dataset": source,
                "question_id": f"{source}_{i:04d}",
                "question": asked.question,
                "gt_answer": asked.options[asked.right] + pick(rng, ("", ".")),
                "image_path": image,
                "modality_type": "Fundus Photography" if options == 2 else "X-Ray",
            }
            row |= {f"option_{c}": text for c, text in zip(LETTERS, asked.options, strict=False)}
            rows.append(row)
        write_json(folder / f"QA_information/Open-access/{source}.json", rows, indent=1)


def mmmu(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes MMMU: options as the text of a list, seven columns of pictures, no answers in test."""
    names = [f"image_{number}" for number in range(1, 8)]
    for subject in ("Clinical_Medicine", "Pharmacy"):
        for split, share in (("dev", "test"), ("validation", "train"), ("test", "test")):
            rows = []
            for i, asked in enumerate(_asked(share, records, rng, pictures=3)):
                several = len(asked.pictures) > 1
                row: dict[str, Any] = {
                    "id": f"{split}_{subject}_{i + 1}",
                    "question": f"<image 1> {asked.question}" + (" See <image 2>." if several else ""),
                    "options": str(asked.options),
                    "answer": "?" if split == "test" else LETTERS[asked.right],
                    "question_type": "multiple-choice",
                }
                if i % 4 == 3:
                    row |= {"options": "[]", "question_type": "open"}
                    row["answer"] = "?" if split == "test" else str(asked.right)
                cells: list[Any] = [
                    {"bytes": picture, "path": f"{row['id']}.png"} for picture in asked.pictures
                ]
                rows.append(row | dict(zip(names, cells + [None] * 7, strict=False)))
            write_table(folder / subject / f"{split}-00000-of-00001.parquet", rows, names)


def medmcqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes MedMCQA as the hub has it: indices from 0 on, and -1 in test, which has no answers."""
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = []
        for i, asked in enumerate(_asked(split, records, rng, pictures=0)):
            row: dict[str, Any] = {"id": f"{name}-{i:08x}", "question": asked.question}
            row |= {f"op{c}": text for c, text in zip("abcd", asked.options, strict=True)}
            row |= {"cop": -1 if split == "test" else asked.right, "choice_type": "single", "exp": None}
            rows.append(row | {"subject_name": "Anatomy", "topic_name": None})
        write_shards(folder, name, rows)


def tsv(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes one table of all splits, with pictures in base64, as VLMEvalKit has them."""
    rows: list[list[Any]] = []
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        for asked in _asked(split, records, rng):
            image = base64.b64encode(asked.pictures[0]).decode()
            rows.append([len(rows), image, asked.question, *asked.options, LETTERS[asked.right], name])
    columns = ["index", "image", "question", *"ABCD", "answer", "split"]
    _write_csv(folder / "Medical_MCQ.tsv", columns, rows, tab=True)
