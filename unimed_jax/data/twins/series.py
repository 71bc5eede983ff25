"""Writes twins of folders of DICOM series, with the table that a lab writes beside them."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.twins.random import count, pick, words, write_lines

SIDE = (20, 24)  # rows and columns
PATIENT = {
    "PatientName": "Twin^Synthetic",
    "PatientBirthDate": "19000101",
    "PatientAddress": "Nowhere 1",
    "ImagePresentationComments": "shown to Twin",
}
COLUMNS = ("series", "study", "task", "question", "answer", "split", "id", "template")


def nested(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes a folder for each patient, study and series, DICOMDIR, other files, and labels.csv."""
    lines = _write(folder, records, rng, lambda p, s, e, n: f"P{p:03d}/ST{s}/SE{e}/IM{n:04d}.dcm")
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *([line.get(key, "") for key in COLUMNS] for line in lines)])
    (folder / "labels.csv").write_text(text.getvalue(), encoding="utf-8-sig", newline="")
    (folder / "DICOMDIR").write_bytes(b"")
    (folder / "P000/readme.txt").write_text("written by a viewer")


def flat(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes all files of the same series into one folder, without endings, and labels.jsonl."""
    lines = _write(folder, records, rng, lambda p, s, e, n: f"{(p * 7919 + s * 101 + e * 31 + n):08x}")
    write_lines(folder / "labels.jsonl", lines)


def _write(folder: Path, records: int, rng: np.random.Generator, name: Any) -> list[dict[str, Any]]:
    """Draws patients with one or two series of a study, and returns the lines of the table.

    Files are numbered against the order of slices; one series has no positions, one no label, and one
    file is a report without pixels.
    """
    lines: list[dict[str, Any]] = []
    patient = 0
    for split in ("train", "val", "test"):
        for i in range(count(split, records)):
            study = f"1.2.826.0.1.{patient + 1}"
            for e in range(1 + i % 2):
                uid = f"{study}.{e + 1}"
                slices, modality = int(rng.integers(3, 7)), pick(rng, ("CT", "MR"))
                for n in range(slices):
                    fields = {
                        **PATIENT,
                        "PatientID": f"TWIN{patient // 2:04d}",
                        "StudyInstanceUID": study,
                        "SeriesInstanceUID": uid,
                        "SOPInstanceUID": f"{uid}.{n + 1}",
                        "SeriesNumber": 9 - e,
                        "InstanceNumber": n + 1,
                        "Modality": modality,
                    }
                    if i % 3:  # the last file lies lowest
                        fields["ImagePositionPatient"] = [-10, -10, 5.0 * (slices - n)]
                        fields["ImageOrientationPatient"] = [1, 0, 0, 0, 1, 0]
                    pixels = rng.integers(0, 1 << 12, SIDE, dtype=np.uint16)
                    _save(folder / name(patient, 0, e, n), pixels, fields)
                if (split, i, e) == ("train", 1, 1):  # a report, without pixels
                    fields["SOPInstanceUID"] = f"{uid}.99"
                    _save(folder / name(patient, 0, e, 99), None, fields)
                about = {"series": uid, "split": split}
                answer = pick(rng, ("yes", "no"))
                if (split, i, e) != ("train", 0, 0):
                    lines.append({**about, "task": "vqa", "question": "Is it clear?", "answer": answer})
            if (split, i) != ("train", 0):
                about = {"study": study, "split": split}
                text = {"answer": f"{words(rng)}.", "id": f"{split}{i}", "template": "report"}
                lines.append({**about, "task": "caption", **text})
                lines.append({**about, "task": "cls", "answer": str(1 + i % 2)})
            patient += 1
    return lines


def _save(path: Path, pixels: np.ndarray | None, fields: dict[str, Any]) -> None:
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = fields["SOPInstanceUID"]
    for keyword, value in fields.items():
        setattr(data, keyword, value)
    if pixels is not None:
        data.Rows, data.Columns = pixels.shape
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.WindowCenter, data.WindowWidth = 40, 400
        data.PixelData = pixels.tobytes()
        data["PixelData"].VR = "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
