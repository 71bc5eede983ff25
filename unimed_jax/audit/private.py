"""Looks for what may be personal: in texts, in the headers of images, and in raw files.

Found values are never repeated, only what they look like and where they are.
"""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from unimed_jax.data.columns import hash_of
from unimed_jax.data.images import READABLE
from unimed_jax.data.info import Info

# What looks like a person's data; each is a pattern and the words for it.
PERSONAL = {
    "a home folder": re.compile(
        r"(?:/home/|/Users/|[A-Za-z]:\\{1,2}(?:Users|Documents and Settings)\\)\w+"
    ),
    "an e-mail address": re.compile(r"\b[\w.+-]+@[\w-]+\.\w{2,}\b"),
    "a date of birth": re.compile(
        r"\b(?:dob|birth ?date|date of birth)\b[ :=\"]*\d"
        r"|\b(?:born|geboren|geb\.)(?: on| am)? (?:\d{1,4}[./-]\d{1,2}[./-]\d|\d{1,2}\.? \w+ \d{4})",
        re.IGNORECASE,
    ),
    "a patient's name or number": re.compile(
        r"\b(?:patient(?:'s)?[ _]?(?:name|id)|name of (?:the )?patient|mrn|medical record number)\b"
        r"[\"']? ?(?:[:#=]+ ?[\"']?\w|[\"']?\d)",
        re.IGNORECASE,
    ),
    "a name with a title": re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof)\b\.? ?[A-Z][a-z]+"),
    "a name as DICOM writes it": re.compile(r"\b[A-Za-z]{2,}\^[A-Za-z]{2,}\b"),
    "a telephone number": re.compile(
        r"(?<![\d./-])(?:\+\d{1,3}[ -]?)?\(?\d{3}\)?[ -]\d{3}[ -]\d{4}(?![\d.-])"
    ),
    "a social security number": re.compile(r"(?<![\d.-])\d{3}-\d{2}-\d{4}(?![\d.-])"),
}
LINE = 10_000  # characters of a line of a raw file that are looked at
# Values that stand where a name was removed.
_REMOVED = re.compile(r"(?i)[\W_]*(?:anon\w*|unknown|none|null|n/?a|removed|deidentified|x+|0+)?[\W_]*")
# EXIF and TIFF tags, and keys of PNG and JPEG texts, whose very presence may name somebody.
_TAGS = {
    "Artist",
    "Author",
    "BodySerialNumber",
    "CameraOwnerName",
    "HostComputer",
    "LensSerialNumber",
    "OwnerName",
    "XPAuthor",
}
_DICOM = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientMotherBirthName",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "NameOfPhysiciansReadingStudy",
    "OperatorsName",
    "InstitutionAddress",
)
_STAND_IN = "PatientID"  # that a file whose identity was removed may keep


def of_texts(texts: Iterable[str]) -> list[str]:
    """Says what in some texts looks personal."""
    whole = "\n".join(texts)
    return [what for what, pattern in PERSONAL.items() if pattern.search(whole)]


def of_headers(data: bytes) -> dict[str, Any]:
    """Reads from the bytes of an image what its headers say of a person, {} if nothing.

    personal: words for what was found. patient, study: hashes of these identifiers in DICOM, which
    tell that two images belong together.
    """
    # A file may be both: the 128 bytes before the mark of DICOM are free for the header of a TIFF.
    is_dicom = data[128:132] == b"DICM"
    picture: dict[str, Any] = {}
    dicom: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # whatever a damaged header makes a library raise
        try:
            picture = _picture(data)
        except UnidentifiedImageError:
            is_dicom = True  # perhaps, as the mark may lack
    with contextlib.suppress(Exception):
        dicom = _dicom(data) if is_dicom else {}
    personal = [*dicom.get("personal", ()), *picture.get("personal", ())]
    return dicom | ({"personal": personal} if personal else {})


def _picture(data: bytes) -> dict[str, Any]:
    found: dict[str, None] = {}
    with Image.open(io.BytesIO(data), formats=READABLE) as image:
        entries = list(image.info.items())
        entries += [(ExifTags.TAGS.get(tag, str(tag)), value) for tag, value in image.getexif().items()]
        entries += [
            (ExifTags.TAGS.get(tag, str(tag)), value)
            for tag, value in image.getexif().get_ifd(ExifTags.IFD.Exif).items()
        ]
        if image.getexif().get_ifd(ExifTags.IFD.GPSInfo):
            found["a place (GPS) in a header"] = None
    for name, value in entries:
        if name in ("exif", "icc_profile", "transparency"):
            continue
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        text = text.replace("\0", "")  # of UTF-16
        if str(name) in _TAGS and not _REMOVED.fullmatch(text):
            found[f"{name} in a header"] = None
        for what in of_texts([f"{name}: {text[:LINE]}"]):
            found[f"{what} in a header"] = None
    return {"personal": list(found)} if found else {}


def _dicom(data: bytes) -> dict[str, Any]:
    from pydicom import dcmread

    headers = dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
    removed = str(headers.get("PatientIdentityRemoved", "")).upper() == "YES"
    found = [
        f"{name} in a DICOM header"
        for name in _DICOM
        if not _REMOVED.fullmatch(str(headers.get(name) or "")) and not (removed and name == _STAND_IN)
    ]
    out: dict[str, Any] = {"personal": found} if found else {}
    for group, name in (("patient", "PatientID"), ("study", "StudyInstanceUID")):
        value = str(headers.get(name) or "")
        if not _REMOVED.fullmatch(value):
            out[group] = f"{hash_of(value):016x}"
    return out


def of_files(info: Info, folder: Path | None) -> dict[str, list[str]]:
    """Looks for what is personal in the raw files that a set's `Info` names.

    They may hold more than a reader takes, such as the paths in annotations. Returns words for what
    was found -> the files. Only files of text are looked at, line by line.
    """
    out: dict[str, list[str]] = {}
    for file in _text_files(info, folder):
        found: dict[str, None] = {}
        with contextlib.suppress(OSError), file.open(encoding="utf-8", errors="replace") as stream:
            while line := stream.readline(LINE):
                found |= dict.fromkeys(of_texts([line]))
        for what in found:
            out.setdefault(what, []).append(str(file))
    return out


def _text_files(info: Info, folder: Path | None) -> Iterator[Path]:
    if folder is None or info.self_contained:
        return
    named = [folder] if folder.is_file() else sorted({f for p in info.files for f in folder.glob(p)})
    yield from (
        file
        for file in named
        if file.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".txt", ".xml") and file.is_file()
    )


def gathered(found: Iterable[tuple[str, Iterable[str]]]) -> dict[str, list[str]]:
    """Turns (place, words for what is there) into words -> places."""
    out: dict[str, list[str]] = {}
    for place, words in found:
        for what in words:
            out.setdefault(what, []).append(place)
    return out


def of_images(set_notes: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Gathers what the headers of images say, from notes by image key."""
    return gathered((f"image {key}", note.get("personal", ())) for key, note in set_notes.items())
