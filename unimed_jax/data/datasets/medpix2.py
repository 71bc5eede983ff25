"""Reads MedPix 2.0: CT and MR images of teaching cases with captions (tasks caption and cls).

    splitted_dataset/descriptions_{train,dev,test}.jsonl   one image a line
    images/<image>.png

cls asks three things, each its template: modality (CT or MR), plane, and region of the body. A
case's region is that of all its images.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import (
    Record,
    chosen_options,
    inside,
    left_out_names,
    one_of,
    records,
    short,
    word,
)
from unimed_jax.errors import UserError

FILES = {name: f"splitted_dataset/descriptions_{found}.jsonl" for name, found in
         (("train", "train"), ("val", "dev"), ("test", "test"))}  # fmt: skip
PLACEHOLDERS = ("replace this", "in progress")  # how captions begin that nobody has written
PLANES = {"axial": "axial", "transverse": "axial", "coronal": "coronal", "sagittal": "sagittal"}
QUESTIONS = {
    "modality": "CT or MR?",
    "plane": "Axial, coronal or sagittal?",
    "region": "Abdomen, head, spine and muscles, reproductive and urinary system, or thorax?",
}

INFO = Info(
    name="medpix2",
    tasks=("caption", "cls"),
    licence="none stated in its repository; contributors to MedPix keep their rights",
    citation="Siragusa et al., MedPix 2.0, 2024",
    cluster_word="case",
    files=tuple(FILES.values()),
    counts={
        "train images": 1653,
        "val images": 197,
        "test images": 200,
        "train clusters": 535,
        "val clusters": 67,
        "test clusters": 69,
    },
)
OPTIONS = {
    "caption": "plain",  # plain: as written; facts: after its modality, plane and region
    "without": "",  # folder or list of image names that are left out (data/records.py: left_out_names)
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the caption of each image and those questions about it that have an answer.

    A placeholder in place of a caption is skipped by name; a plane that is none of three only lacks
    its question.
    """
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "medpix2")
    one_of(chosen, "caption", ("plain", "facts"), "medpix2")
    without = left_out_names(chosen["without"], folder)
    file = folder / FILES[split]
    if not file.exists():
        raise UserError(f"{file} does not exist; give MedPix 2.0's folder as path.")
    for where, record in records(file):
        name = word(record, "image", where, required=True)
        if name in without or name.rpartition("_")[2] in without:
            skipped.append(f"{name}: the image is left out by the option `without`")
            continue
        path = inside(folder, folder / "images", f"{name}.png", where)
        for example in _examples(record, name, where, chosen["caption"], skipped):
            yield example, (path,)


def _examples(record: Record, name: str, where: str, form: str, skipped: list[str]) -> Iterator[Example]:
    about = record.get("Description")
    if not isinstance(about, dict):
        raise UserError(f"{where}: 'Description' is {short(about)}; get the file again.")
    case = word(record, "U_id", where, required=True)
    facts = {
        "modality": word(record, "Type", where, required=True),
        "plane": PLANES.get(word(about, "Plane", where).lower(), ""),
        "region": word(record, "Location Category", where).lower(),
    }
    meta = {key: value for key, value in facts.items() if value}
    caption = " ".join(word(about, "Caption", where).split())
    if caption.lower().startswith(PLACEHOLDERS):
        skipped.append(f"{name}/caption: a placeholder stands for the caption ({short(caption)})")
    else:
        if form == "facts":
            plane = f"{facts['plane']} plane" if facts["plane"] else ""
            caption = (
                ", ".join(part for part in (facts["modality"], plane, facts["region"]) if part)
                + f". {caption}"
            )
        yield Example(
            f"{name}/caption", "caption", "", caption, (name,), None, case, {"template": form, **meta}
        )
    for template, question in QUESTIONS.items():
        if facts[template]:
            more = {"template": template, **meta}
            yield Example(
                f"{name}/{template}", "cls", question, facts[template], (name,), None, case, more
            )
