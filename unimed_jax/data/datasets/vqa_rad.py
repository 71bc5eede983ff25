"""Reads VQA-RAD: questions about radiological images (task vqa).

The layout is chosen by what lies in the folder:

    VQA_RAD Dataset Public.json   the original; its test questions have a phrase_type test_*
    VQA_RAD Image Folder/
or
    trainset.json, testset.json   in circulation since MMQ; leaks test questions into train
    images/
or
    data/{train,test}-00000-of-00001.parquet   of the Hugging Face hub: image, question, answer

The official split is by question: almost every test question is about an image that train asks
about too. The hub's tables lack names of images and kinds of answers: a question counts as closed
if its answer is yes or no, which is a guess (251 of the 272 closed test questions).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.pairs import guessed, pairs
from unimed_jax.data.records import Record, chosen_options, inside, left_out_names, records, word
from unimed_jax.data.tables import PARQUET, parquet_files
from unimed_jax.errors import UserError

ORIGINAL, PICTURES = "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"
SPLITS = {"train": "trainset.json", "test": "testset.json"}
# By its paper; a head may be CT or MR, which no field says.
MODALITIES = {"chest": "X-Ray", "abd": "CT"}

INFO = Info(
    name="vqa_rad",
    version="2",
    tasks=("vqa",),
    splits=("train", "test"),
    licence="CC0 1.0",
    citation=(
        "Lau et al., A dataset of clinically generated visual questions and answers, Scientific "
        "Data 2018"
    ),
    note=(
        "By design of its split, 446 of the 451 test questions are about an image that train asks "
        "about too."
    ),
    cluster_word="image",
    by_design={"image": "the official split is by question"},
    files=(ORIGINAL, *SPLITS.values(), *PARQUET),
    counts={
        "train": 1797,
        "test": 451,
        "train phrase=freeform": 1206,
        "train phrase=para": 591,
        "test phrase=freeform": 308,
        "test phrase=para": 143,
        "test answer_type=CLOSED": 272,
    },
    other_counts={
        "MMQ": {"train": 3064, "test": 451, "train phrase=frame": 1267},
        "a random re-split": {"train": 1798, "test": 450},
        "Hugging Face": {"train": 1793, "test": 451, "test answer_type=CLOSED": 251},
    },
)
OPTIONS = {
    "images": "",  # folder of the images, from the set's folder on; empty: that of the layout
    "without": "",  # folder or list of image names that are left out (data/records.py: left_out_names)
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path | bytes, ...]]]:
    """Yields the questions of a split in the order of the file; the template is open or closed."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "vqa_rad")
    without = left_out_names(chosen["without"], folder)
    original = (folder / ORIGINAL).exists()
    files = [] if original or (folder / SPLITS[split]).exists() else parquet_files(folder, split)
    if files:
        if without:
            raise UserError(
                f"{files[0]}: the option `without` of vqa_rad names images, and tables of the hub have "
                "no names; leave it out."
            )
        yield from pairs(files, folder, f"{split}/row{{}}", _nameless, skipped)
        return
    images = folder / (chosen["images"] or (PICTURES if original else "images"))
    for where, record in _records(folder, split, original):
        name = word(record, "image_name", where, required=True)
        example = _example(
            record, f"{split}/{word(record, 'qid', where, required=True, numbers=True)}", where, name
        )
        if Path(name).stem in without:
            skipped.append(f"{example.id}: image {name} is left out by the option `without`")
        else:
            yield example, (inside(folder, images, name, where),)


def rewordings(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    """Yields other wordings of questions (id, text), which the original file has besides each.

    The layout of MMQ trains on them. `data check` looks for them in other sets.
    """
    for where, record in _records(folder, split, True) if (folder / ORIGINAL).exists() else ():
        for key in ("question_frame", "question_rephrase"):
            text = word(record, key, where)
            if text and text != "NULL":
                yield f"{split}/{word(record, 'qid', where, required=True, numbers=True)}", text


def _records(folder: Path, split: str, original: bool) -> Iterator[tuple[str, Record]]:
    if original:
        for where, record in records(folder / ORIGINAL):
            if word(record, "phrase_type", where).startswith("test_") == (split == "test"):
                yield where, record
        return
    if not (folder / SPLITS[split]).exists():
        raise UserError(
            f"{folder} holds neither {ORIGINAL!r} nor {SPLITS[split]} nor a table {split}*.parquet; "
            "give VQA-RAD's folder as path."
        )
    yield from records(folder / SPLITS[split])


def _example(record: Record, name: str, where: str, image: str) -> Example:
    kind = word(record, "answer_type", where).upper()
    about = {
        "template": kind.lower(),
        "answer_type": kind,
        "organ": (organ := word(record, "image_organ", where).lower()),
        "modality": MODALITIES.get(organ, ""),
        "phrase": word(record, "phrase_type", where).removeprefix("test_"),
    }
    facts = {key: value for key, value in about.items() if value}
    question = word(record, "question", where, required=True)
    return _asked(name, question, word(record, "answer", where, numbers=True), image, facts)


def _nameless(name: str, question: str, answer: str, image: str) -> Example:
    return _asked(name, question, answer, image, guessed(answer))


def _asked(name: str, question: str, answer: str, image: str, facts: dict[str, str]) -> Example:
    """Makes the example; tabs and line breaks, which stand in some questions, are blanks."""
    question, answer = " ".join(question.split()), " ".join(answer.split())
    return Example(name, "vqa", question, answer, (image,), None, image, facts)
