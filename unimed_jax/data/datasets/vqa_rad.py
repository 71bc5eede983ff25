"""Reads VQA-RAD: questions about radiological images (task vqa).

The layout is chosen by what lies in the folder:

    VQA_RAD Dataset Public.json   the original; its test questions have a phrase_type test_*
    VQA_RAD Image Folder/
or
    trainset.json, testset.json   in circulation since MMQ; leaks test questions into train
    images/

The official split is by question: almost every test question is about an image that train asks
about too.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import Record, chosen_options, inside, left_out_names, records, word
from unimed_jax.errors import UserError

ORIGINAL, PICTURES = "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"
SPLITS = {"train": "trainset.json", "test": "testset.json"}
# By its paper; a head may be CT or MR, which no field says.
MODALITIES = {"chest": "X-Ray", "abd": "CT"}

INFO = Info(
    name="vqa_rad",
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
    files=(ORIGINAL, *SPLITS.values()),
)
OPTIONS = {
    "images": "",  # folder of the images, from the set's folder on; empty: that of the layout
    "without": "",  # folder or list of image names that are left out (data/records.py: left_out_names)
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the questions of a split in the order of the file; the template is open or closed."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "vqa_rad")
    without = left_out_names(chosen["without"], folder)
    original = (folder / ORIGINAL).exists()
    images = folder / (chosen["images"] or (PICTURES if original else "images"))
    for where, record in _records(folder, split, original):
        name = word(record, "image_name", where, required=True)
        example = _example(
            record, f"{split}/{word(record, 'qid', where, required=True, numbers=True)}", where, name
        )
        if Path(name).stem in without:
            skipped.append(f"{example.id}: image {name} is left out by the option `without`")
        else:
            yield example, (inside(images, images, name, where),)


def _records(folder: Path, split: str, original: bool) -> Iterator[tuple[str, Record]]:
    if original:
        for where, record in records(folder / ORIGINAL):
            if word(record, "phrase_type", where).startswith("test_") == (split == "test"):
                yield where, record
        return
    if not (folder / SPLITS[split]).exists():
        raise UserError(
            f"{folder} holds neither {ORIGINAL!r} nor {SPLITS[split]}; give VQA-RAD's folder as path."
        )
    yield from records(folder / SPLITS[split])


def _example(record: Record, name: str, where: str, image: str) -> Example:
    kind = word(record, "answer_type", where).upper()
    facts = {
        "template": kind.lower(),
        "answer_type": kind,
        "organ": (organ := word(record, "image_organ", where).lower()),
        "modality": MODALITIES.get(organ, ""),
        "phrase": word(record, "phrase_type", where).removeprefix("test_"),
    }
    question, answer = (
        word(record, "question", where, required=True),
        word(record, "answer", where, numbers=True),
    )
    meta = {key: value for key, value in facts.items() if value}
    return Example(
        name, "vqa", " ".join(question.split()), " ".join(answer.split()), (image,), None, image, meta
    )
