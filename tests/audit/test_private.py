"""What looks personal is found in texts, headers and raw files, and what only resembles it is not."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from unimed_jax.audit.private import of_files, of_headers, of_texts
from unimed_jax.data.info import Info


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("see /home/anna/scan.png", "a home folder"),
        ("C:\\Users\\anna\\scan.png", "a home folder"),
        ("/Users/anna/x", "a home folder"),
        ("write to a.b@clinic.org", "an e-mail address"),
        ("DOB: 12/3/1950", "a date of birth"),
        ("born on 3.4.1961", "a date of birth"),
        ("geboren am 3. April 1961", "a date of birth"),
        ("Patient name: X", "a patient's name or number"),
        ('"PatientID": "77"', "a patient's name or number"),
        ("MRN 123456", "a patient's name or number"),
        ("as Dr. Miller saw", "a name with a title"),
        ("DOE^JANE", "a name as DICOM writes it"),
        ("call (555) 123-4567", "a telephone number"),
        ("123-45-6789", "a social security number"),
    ],
)
def test_what_looks_personal_is_named(text, what):
    assert of_texts(["nothing here", text]) == [what]


@pytest.mark.parametrize(
    "text",
    [
        "medical record number to the radiology report",
        "born 12 hours ago",
        "the patient is identified",
        "mass of 3.2 x 100-200 mm",
        "10^3 per cell",
        "doi 10.1000/182-555-1234",
        "images/home.png",
        "drug names",
    ],
)
def test_what_only_resembles_it_is_not(text):
    assert of_texts([text]) == []


def picture(kind="PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, **settings)
    return buffer.getvalue()


def test_texts_and_tags_of_pictures_are_looked_at():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Author", "Anna")
    texts.add_itxt("Comment", "Patient name: Bea")
    assert of_headers(picture(pnginfo=texts)) == {
        "personal": ["Author in a header", "a patient's name or number in a header"]
    }
    exif = Image.Exif()
    exif[0x013B] = "Anna"  # Artist
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    exif.get_ifd(0x8769)[0xA430] = "anonymous"  # CameraOwnerName
    assert of_headers(picture("JPEG", exif=exif)) == {
        "personal": ["a place (GPS) in a header", "Artist in a header"]
    }
    assert of_headers(picture("JPEG", comment=b"sent by a.b@clinic.org")) == {
        "personal": ["an e-mail address in a header"]
    }
    assert of_headers(picture()) == of_headers(picture("JPEG")) == {}
    assert of_headers(b"no picture at all") == {}


def dicom(**tags) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    for name in (
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "ReferringPhysicianName",
        "OtherPatientIDs",
    ):
        if name in data:
            del data[name]
    for name, value in tags.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    data.save_as(buffer)
    return buffer.getvalue()


def test_dicom_headers_name_patients_and_say_what_belongs_together():
    found = [
        of_headers(dicom(PatientName="DOE^J", PatientID=id, PatientBirthDate="19500101")) for id in "aab"
    ]
    assert found[0]["personal"] == [
        f"{name} in a DICOM header" for name in ("PatientName", "PatientID", "PatientBirthDate")
    ]
    assert found[0]["patient"] == found[1]["patient"] != found[2]["patient"]
    assert "doe" not in json.dumps(found).lower()  # the values themselves are never repeated
    removed = of_headers(
        dicom(PatientName="Anonymous", PatientID="case 3", PatientIdentityRemoved="YES")
    )
    assert "personal" not in removed and removed["patient"] and removed["study"] == found[0]["study"]


def test_a_file_that_is_dicom_and_tiff_is_looked_at_as_both():
    """A DICOM file may begin with 128 free bytes, in which the header of a TIFF has room."""
    plain = dicom(PatientName="DOE^J", PatientID="a")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    shown = {256: 8, 257: 4, 258: 8, 259: 1, 262: 1, 273: 132, 277: 1, 278: 4, 279: 32}
    for tag, value in (shown | {0x013B: "Anna"}).items():
        tags[tag] = value
    both = b"II*\0" + struct.pack("<L", len(plain)) + plain[8:] + tags.tobytes(len(plain))
    assert Image.open(io.BytesIO(both)).format == "TIFF"
    found, expected = of_headers(both), of_headers(plain)
    assert expected["patient"] and expected["study"] and len(expected["personal"]) == 2
    assert found == expected | {"personal": [*expected["personal"], "Artist in a header"]}
    assert of_headers(both[: len(plain)]) == expected  # the tags are cut off


def test_raw_files_are_looked_at_beyond_what_a_reader_takes(tmp_path):
    (tmp_path / "a.xml").write_text("<annotation>\n<path>/home/anna/x.jpg</path>\n</annotation>")
    (tmp_path / "b.xml").write_text("<annotation/>")
    (tmp_path / "c.npz").write_bytes(np.frombuffer(b"/home/anna/x", np.uint8).tobytes())
    info = Info("x", ("refer",), files=("*.xml", "*.npz"))
    assert of_files(info, tmp_path) == {"a home folder": [str(tmp_path / "a.xml")]}
    assert of_files(Info("x", ("refer",)), tmp_path) == of_files(info, None) == {}
