"""Writes twins of the sets of reports, MIMIC-CXR and IU X-Ray."""

import csv
import gzip
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unimed_jax.data.twins.random import count, pick, picture, words, write_json

SIZE = (48, 40)  # width and height
LABELS = ("Atelectasis", "Pleural Effusion", "No Finding", "Support Devices")


class Study(NamedTuple):
    """Holds a study of MIMIC-CXR."""

    split: str
    patient: int
    number: int
    dicoms: dict[str, tuple[str, np.ndarray]]  # view and pixels; what is shown first is the first
    findings: str
    impression: str


def _studies(records: int, rng: np.random.Generator) -> list[Study]:
    """Draws the studies, of which two are of one patient; of some, one image is a side view."""
    found = []
    for part, split in enumerate(("train", "val", "test")):
        for i in range(count(split, records)):
            views = [pick(rng, ("PA", "AP"))] + ["LATERAL"] * (i % 3 == 0) + [""] * (i % 5 == 4)
            dicoms = {
                "-".join(f"{n:08x}" for n in rng.integers(1 << 32, size=5)): (
                    view,
                    rng.integers(0, 256, (SIZE[1], SIZE[0]), dtype=np.uint8),
                )
                for view in views
            }
            patient, number = 10_000_000 + 1000 * part + i // 2, 50_000_000 + 1000 * part + i
            text = f"{words(rng, 10, 20)}.\n {words(rng, 4, 9)}.", f"{words(rng)}, ___."
            found.append(Study(split, patient, number, dicoms, *text))
    return found


def _home(study: Study) -> str:
    return f"p{str(study.patient)[:2]}/p{study.patient}/s{study.number}"


def mimic_cxr(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes R2Gen's annotation of MIMIC-CXR, which shows one image of each study."""
    content: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for study in _studies(records, rng):
        name, (_, pixels) = next(iter(study.dicoms.items()))
        image = f"{_home(study)}/{name}.jpg"
        _save(folder / "files" / image, pixels)
        about = {"id": name, "study_id": study.number, "subject_id": study.patient, "split": study.split}
        content[study.split].append(about | {"report": study.findings, "image_path": [image]})
    write_json(folder / "annotation.json", content)


def mimic_cxr_official(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the official files of the same studies: tables, some packed, all images, and reports.

    Headings of reports vary; one study more has no findings, and one has no report.
    """
    rows: dict[str, list[list[Any]]] = {
        "split": [["dicom_id", "study_id", "subject_id", "split"]],
        "metadata": [["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"]],
        "chexpert": [["subject_id", "study_id", *LABELS]],
    }
    drawn = _studies(records, rng)
    first = drawn[0]
    more = [
        first._replace(number=first.number + 500 + i, dicoms={f"{i:08x}-0": ("PA", pixels)}, findings="")
        for i, (_, pixels) in enumerate(list(first.dicoms.values()) * 2)
    ][:2]
    for number, study in enumerate([*drawn, *more]):
        split = "validate" if study.split == "val" else study.split
        for name, (view, pixels) in reversed(study.dicoms.items()):
            rows["split"].append([name, study.number, study.patient, split])
            rows["metadata"].append([name, study.patient, study.number, view, *pixels.shape])
            _save(folder / "files" / _home(study) / f"{name}.jpg", pixels)
        labels = [pick(rng, ("1.0", "0.0", "-1.0", "")) for _ in LABELS]
        rows["chexpert"].append([study.patient, study.number, *labels])
        if study is not more[-1]:
            file = folder / "files" / f"{_home(study)}.txt"
            file.write_text(_report(study, number))
    for table, some in rows.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(some)
        file = folder / f"mimic-cxr-2.0.0-{table}.csv"
        if table == "metadata":
            file.write_text(text.getvalue())
        else:
            packed = gzip.compress(text.getvalue().encode(), mtime=0)
            file.with_name(f"{file.name}.gz").write_bytes(packed)


def _report(study: Study, number: int) -> str:
    """Writes a report as they are written, in one of several manners."""
    head = (
        " " * 33
        + "FINAL REPORT\n EXAMINATION:  CHEST (PORTABLE AP)\n \n INDICATION:  History: ___F.  \n \n"
    )
    if not study.findings:
        return f"{head} IMPRESSION:  \n \n {study.impression}\n"
    names = (("FINDINGS", "IMPRESSION"), ("Findings", "Impression"), ("FINDINGS", "IMPRESSIONS"))
    findings, impression = names[number % 3]
    last = f"\n \n {impression}:  {study.impression}\n \n RECOMMENDATION(S):  None.\n" * (number % 4 > 0)
    return f"{head} {findings}:  \n \n {study.findings}{last}"


def iu_xray(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes R2Gen's annotation of IU X-Ray, with one to five views a study.

    Removed words are XXXX.
    """
    content: dict[str, list[dict[str, Any]]] = {}
    for part, split in enumerate(("train", "val", "test")):
        content[split] = []
        for i in range(count(split, records)):
            name = f"CXR{1000 * part + i}_IM-{i:04d}"
            images = [f"{name}/{view}.png" for view in range(1 + i % 5)]
            for image in images:
                picture(folder / "images" / image, rng, SIZE, grey=True)
            content[split].append(
                {"id": name, "report": f"{words(rng, 6, 15)} XXXX.", "image_path": images}
            )
    write_json(folder / "annotation.json", content)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
