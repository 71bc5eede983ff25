"""Reads MIMIC-CXR-JPG as PhysioNet publishes it: three tables, images, and reports as texts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unimed_jax.data.archives import packed
from unimed_jax.data.example import Example
from unimed_jax.data.records import inside, records, short, word
from unimed_jax.data.reports import flat, sections
from unimed_jax.errors import UserError
from unimed_jax.parsing import no_file, read_text

TABLES = ("split", "metadata", "chexpert")  # the last one may be absent
ENDINGS = (".csv", ".csv.gz")
FILES = tuple(f"mimic-cxr-*-{table}{ending}" for table in TABLES for ending in ENDINGS)
SPLITS = {"train": "train", "validate": "val", "test": "test"}
REPORTS = ("files", "mimic-cxr-reports/files", "mimic-cxr-reports")  # where reports lie
ARCHIVE = "mimic-cxr-reports.zip"
TEXTS = ("findings", "impression", "both")
FOUND = {"1.0": "positive", "0.0": "negative", "-1.0": "uncertain"}  # CheXpert's labels


class Study(NamedTuple):
    """Holds a study: its patient, and its images in the order of the table."""

    patient: str
    dicoms: list[str]


def studies(
    folder: Path, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the studies of a split in the order of the table, each with its first images.

    options: `images`, `text` and `views` of the reader. A study whose report is missing or lacks the
    sections that are asked for is appended to `skipped`, and so is an image of unknown view.
    """
    found = _studies(folder, split)
    views = _views(folder, {dicom for study in found.values() for dicom in study.dicoms})
    labels = _labels(folder, found)
    wanted = TEXTS[:2] if options["text"] == "both" else (options["text"],)
    order = {view: number for number, view in enumerate(options["views"])}
    for name, study in found.items():
        home = f"p{study.patient[:2]}/p{study.patient}/s{name}"
        report = _report(folder, home)
        if report is None:
            skipped.append(f"s{name}: no report {folder / REPORTS[0] / home}.txt")
            continue
        found_here = sections(report)
        lacking = [part for part in wanted if not found_here.get(part)]
        if lacking:
            skipped.append(f"s{name}: its report has no {' and no '.join(lacking)}")
            continue
        # Findings and impression under one heading are one text.
        text = flat(" ".join(dict.fromkeys(found_here[part] for part in wanted)))
        some = sorted(study.dicoms, key=lambda dicom: order.get(views.get(dicom, ""), len(order)))
        some = some[: options["images"]]
        lost = [dicom for dicom in study.dicoms if dicom not in views]
        skipped += [f"s{name}: the table of metadata lacks image {dicom}" for dicom in lost]
        keys = tuple(f"{home}/{dicom}.jpg" for dicom in some)
        facts = {
            "template": f"{len(keys)} view" + "s" * (len(keys) > 1),
            "study": name,
            "view": ", ".join(views.get(dicom) or "unknown" for dicom in some),
            **labels.get(name, {}),
        }
        paths = tuple(inside(folder, folder / "files", key, f"{folder}: study {name}") for key in keys)
        yield Example(f"{split}/{some[0]}", "caption", "", text, keys, None, study.patient, facts), paths


def _studies(folder: Path, split: str) -> dict[str, Study]:
    """Reads the studies of a split by their number."""
    found: dict[str, Study] = {}
    for where, row in records(_table(folder, "split")):
        part = word(row, "split", where, required=True)
        if part not in SPLITS:
            raise UserError(f"{where}: split {short(part)} is none of {', '.join(SPLITS)}.")
        if SPLITS[part] != split:
            continue
        patient, name = _number(row, "subject_id", where), _number(row, "study_id", where)
        study = found.setdefault(name, Study(patient, []))
        if study.patient != patient:
            raise UserError(f"{where}: study {name} is of patient {study.patient} too; mend the table.")
        dicom = word(row, "dicom_id", where, required=True)
        if dicom in study.dicoms:
            raise UserError(
                f"{where}: image {short(dicom)} of study {name} stands twice; mend the table."
            )
        study.dicoms.append(dicom)
    return found


def _views(folder: Path, wanted: set[str]) -> dict[str, str]:
    """Reads the view position of each image."""
    rows = records(_table(folder, "metadata"))
    found: dict[str, str] = {}
    for where, row in rows:
        dicom = word(row, "dicom_id", where, required=True)
        if dicom in found:
            raise UserError(f"{where}: image {short(dicom)} stands twice; get the table again.")
        if dicom in wanted:
            found[dicom] = word(row, "ViewPosition", where, required=True)
    return found


def _labels(folder: Path, wanted: Mapping[str, Study]) -> dict[str, dict[str, str]]:
    """Reads CheXpert's labels of each study: finding -> positive, negative or uncertain."""
    found: dict[str, dict[str, str]] = {}
    file = _table(folder, "chexpert", required=False)
    for where, row in records(file) if file else ():
        name = _number(row, "study_id", where)
        if name not in wanted:
            continue
        found[name] = {}
        for column, value in row.items():
            if column in ("subject_id", "study_id") or not value.strip():
                continue
            spelt = value.strip() if "." in value else f"{value.strip()}.0"
            if spelt not in FOUND:
                choices = ", ".join(FOUND)
                raise UserError(f"{where}: {column!r} is {short(value)}, which is none of {choices}.")
            found[name]["_".join(column.lower().split())] = FOUND[spelt]
    return found


def _table(folder: Path, name: str, required: bool = True) -> Any:
    """Finds a table, plain or packed; returns None if it is not required and not there."""
    for ending in ENDINGS:
        some = sorted(folder.glob(f"mimic-cxr-*-{name}{ending}"))
        if len(some) > 1:
            names = ", ".join(path.name for path in some)
            raise UserError(f"{folder} has several tables of {name} ({names}); leave one of them.")
        if some:
            return some[0]
    if required:
        raise UserError(
            f"{folder} holds neither annotation.json nor mimic-cxr-2.0.0-{name}.csv (or .csv.gz); give "
            "R2Gen's annotation, or the official tables."
        )
    return None


def _number(row: Mapping[str, Any], key: str, where: str) -> str:
    text = word(row, key, where, required=True)
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{where}: {key!r} is {short(text)}, which is no whole number; mend the table.")
    return text


def _report(folder: Path, home: str) -> str | None:
    """Reads the report of a study; returns None if there is none."""
    places = [folder / root / f"{home}.txt" for root in REPORTS]
    path = next((path for path in places if no_file(path) != "does not exist"), None)
    if path is None:
        archive = folder / ARCHIVE
        if archive.is_file() and not any((folder / root).is_dir() for root in REPORTS[1:]):
            raise UserError(packed(archive))
        return None
    return read_text(path, "get it again")
