"""Finds the series of a folder of DICOM files, puts their slices in order, and strips patient data.

Folders and files may be named and nested in any way; what belongs together is read from headers,
which are read up to where the pixels begin.
"""

import contextlib
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unimed_jax.data.dicom import inflated
from unimed_jax.data.images import read_bytes
from unimed_jax.data.pixels import one_line
from unimed_jax.errors import UserError
from unimed_jax.parsing import no_file, stand_in

# What is read of a header. Names, dates of birth and the like are not.
_TAGS = (
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "Modality",
    "SeriesNumber",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Rows",
)
# What a stripped file keeps: the groups of pixels and of how they are shown, but for texts, UIDs and
# addresses in them, and these elements. Sequences are stripped in the same way.
_PIXELS = (0x0028, 0x7FE0)
_TEXTS = ("LT", "ST", "UI", "UR", "UT")
_KEPT = (
    "SOPClassUID",
    "Modality",
    "PresentationLUTShape",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
_OWN = "2.25.1"  # stands for every UID that a file must have and that could be looked up
LINK = "it is a link; put a copy in its place"
_SAME = 1e-3  # by how much the directions of the slices of one stack may differ


class Slice(NamedTuple):
    """Holds what orders one file of a series."""

    path: Path
    instance: str
    number: float  # infinite if the file has none
    position: tuple[float, ...]  # of its first pixel in mm; () if the file has none
    direction: tuple[float, ...]  # of its rows and columns, six numbers; () if the file has none


class Series(NamedTuple):
    """Holds a series and its slices in order."""

    uid: str
    study: str
    patient: str
    modality: str  # CT, MR ...
    number: float
    slices: list[Slice]


def find_series(folder: Path, others: Sequence[str], skipped: list[str]) -> dict[str, Series]:
    """Reads the headers of all files in a folder, and returns the series by their UID.

    others: names of files that are no images and not counted. Hidden files and DICOMDIR
    are passed over. A link, a file that is not DICOM, holds no image or names no series, one whose
    series is another patient's, and a second file of the same slice are appended to `skipped` by
    their path.
    """
    found: dict[str, Series] = {}
    seen: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):
        folders.sort()
        links = [Path(place, name) for name in folders if Path(place, name).is_symlink()]
        skipped += [f"{path.relative_to(folder)}: {LINK}" for path in links]
        for name in sorted(names):
            path = Path(place, name)
            table = path.parent == folder and name in others
            if table or name.startswith(".") or name.upper() == "DICOMDIR":
                continue
            reason = _add(path, found, seen)
            if reason:
                skipped.append(f"{path.relative_to(folder)}: {reason}")
    for series in found.values():
        series.slices[:] = in_order(series.slices)
    return found


def _add(path: Path, found: dict[str, Series], seen: dict[str, Path]) -> str:
    """Adds a file to its series, or returns why it cannot be used."""
    if path.is_symlink():
        return LINK
    if reason := no_file(path):
        return f"it {reason}"
    try:
        header = _header(path)
    except UserError as error:
        return str(error).rstrip(".")
    uid, instance = _text(header, "SeriesInstanceUID"), _text(header, "SOPInstanceUID")
    if "Rows" not in header:
        return "it holds no image"
    if not uid or not instance:
        return f"it has no {'SOPInstanceUID' if uid else 'SeriesInstanceUID'}"
    study, patient = _text(header, "StudyInstanceUID"), _text(header, "PatientID")
    modality, numbers = _text(header, "Modality"), _numbers(header, "SeriesNumber")
    number = numbers[0] if numbers else math.inf
    series = found.setdefault(uid, Series(uid, study, patient, modality, number, []))
    if (series.study, series.patient) != (study, patient):
        return f"its series {uid} has files of another patient or study"
    if instance in seen:
        return f"it is the same slice as {seen[instance].name}"
    seen[instance] = path
    position, direction = (
        values if len(values) == size else ()
        for keyword, size in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6))
        for values in [_numbers(header, keyword)]
    )
    own = _numbers(header, "InstanceNumber")
    series.slices.append(Slice(path, instance, own[0] if own else math.inf, position, direction))
    return ""


def in_order(slices: Sequence[Slice]) -> list[Slice]:
    """Puts the slices of a series in order.

    A stack, whose files all say where they lie in one direction, is ordered along it (from feet to
    head if they are axial); slices at one place, and other series, by their number.
    """
    directions = [one.direction for one in slices]
    stack = all(one.position and one.direction for one in slices) and all(
        abs(a - b) < _SAME for d in directions for a, b in zip(d, directions[0], strict=True)
    )

    def place(one: Slice) -> tuple[float, float, str]:
        along = round(_along(one), 3) if stack else 0.0
        return along, one.number, one.instance

    return sorted(slices, key=place)


def _along(one: Slice) -> float:
    """Returns where a slice lies on the normal of its plane, in mm."""
    a, b, c, d, e, f = one.direction
    normal = b * f - c * e, c * d - a * f, a * e - b * d
    return sum(n * p for n, p in zip(normal, one.position, strict=True))


def stripped(path: Path) -> bytes:
    """Reads a DICOM file and leaves out whatever its pixels do not need: patient, place, dates, UIDs.

    What is burned into the pixels stays. Raises UserError for a file that cannot be read as DICOM.
    """
    from pydicom import Dataset, dcmread, uid
    from pydicom.dataset import FileMetaDataset
    from pydicom.pixels.utils import get_expected_length

    name = one_line(path)
    data = read_bytes(path)
    try:
        whole = dcmread(inflated(io.BytesIO(data), name), force=True)
        implicit, little = whole.original_encoding
        bare = _bare(whole)
        bare.file_meta = meta = FileMetaDataset()
        plain = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        plain = uid.ImplicitVRLittleEndian if implicit else plain
        syntax = uid.UID(whole.file_meta.get("TransferSyntaxUID") or plain)
        meta.TransferSyntaxUID = syntax
        if "PixelData" in bare and not syntax.is_encapsulated:
            need, there = 0, len(bare.PixelData)
            with contextlib.suppress(Exception):  # odd fields, which the decoder may do without
                need = int(get_expected_length(bare))
            if there < need:
                raise UserError(f"image {name} is cut: its pixels have {there} of {need} bytes.")
        bare.SOPClassUID = bare.get("SOPClassUID") or uid.SecondaryCaptureImageStorage
        meta.MediaStorageSOPClassUID = bare.SOPClassUID
        meta.MediaStorageSOPInstanceUID = meta.ImplementationClassUID = uid.UID(_OWN)
        meta.ImplementationVersionName = "UNIMED_JAX"  # pydicom's own changes with its version
        bare.set_original_encoding(implicit, little, [])
        out = io.BytesIO()
        Dataset.save_as(bare, out, enforce_file_format=True)
        return out.getvalue()
    except UserError:
        raise
    except Exception as error:  # pydicom raises what its many fields raise
        raise _unreadable(name, error) from error


def _bare(data: Any) -> Any:
    """Copies what is kept of a data set, and of the items of its sequences."""
    from pydicom import Dataset, Sequence
    from pydicom.tag import Tag

    kept = {Tag(keyword) for keyword in _KEPT}
    out = Dataset()
    for tag in data.keys():  # noqa: SIM118 (a data set's own iterator decodes every element)
        if tag not in kept and tag.group not in _PIXELS:
            continue
        element = data[tag]
        if tag not in kept and element.VR in _TEXTS:
            continue
        if element.VR == "SQ":
            out.add_new(tag, "SQ", Sequence([_bare(item) for item in element.value]))
        else:
            out[tag] = element
    return out


def _header(path: Path) -> Any:
    """Reads the fields of `_TAGS` from a file."""
    from pydicom import dcmread

    name = one_line(path)
    try:
        with path.open("rb") as file:
            head = file.read(132)
            file.seek(0)
            if not head:
                raise UserError("it is empty.")
            # Files without a preamble begin with group 2 or 8 in either byte order.
            if head[128:] != b"DICM" and head[:2] not in (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08"):
                found = stand_in(head)
                raise UserError(f"it {found}." if found else "it is no DICOM file.")
            return dcmread(
                inflated(file, name), stop_before_pixels=True, force=True, specific_tags=list(_TAGS)
            )
    except UserError:
        raise
    except Exception as error:  # pydicom raises what its many fields raise
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    reason = one_line(error) or type(error).__name__
    return UserError(f"image {name} cannot be read as DICOM ({reason}); get the whole file again.")


def _text(header: Any, keyword: str) -> str:
    return str(header.get(keyword) or "").strip()


def _numbers(header: Any, keyword: str) -> tuple[float, ...]:
    """Reads the numbers of a field; () if it has none, or something else."""
    value = header.get(keyword)
    try:
        some = value if isinstance(value, (list, tuple)) or hasattr(value, "__len__") else [value]
        numbers = tuple(float(one) for one in some)
    except (TypeError, ValueError):
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()
