"""DICOM files of several frames and compressed ones: one frame is read, bounded by headers."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image
from support.dicom_files import COLOURS, SIGNED_STEPS, SPREAD, STEPS, dicom_file, first_row

from unimed_jax.data import dicom, images
from unimed_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom
RAMP = np.linspace(0, 255, 40 * 30).astype(np.uint8).reshape(40, 30)


def jpeg(array: np.ndarray, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def framed(frames, syntax="1.2.840.10008.1.2.4.50", like=RAMP, table=True, pieces=1, **fields) -> bytes:
    from pydicom.encaps import encapsulate

    data = encapsulate(frames, fragments_per_frame=pieces, has_bot=table)
    return dicom_file(like, syntax, PixelData=data, **fields)


@pytest.mark.parametrize("count", [None, 0, 1, 2, 3, 99])
def test_first_frame_is_read_whatever_the_number_of_frames_says(count):
    two = np.stack([RAMP, 255 - RAMP]).tobytes()
    native = dicom_file(RAMP, PixelData=two, NumberOfFrames=count)
    np.testing.assert_array_equal(images.read_image(native)[..., 0], RAMP)
    first = np.asarray(Image.open(io.BytesIO(jpeg(RAMP))))
    for options in ({"table": True}, {"table": False}, {"table": False, "pieces": 3}):
        file = framed([jpeg(RAMP), jpeg(255 - RAMP)], NumberOfFrames=count, **options)
        np.testing.assert_array_equal(images.read_image(file)[..., 0], first)


def test_number_of_frames_may_be_no_number():
    good = dicom_file(RAMP, NumberOfFrames=11)
    np.testing.assert_array_equal(
        images.read_image(good.replace(b"IS\2\x0011", b"IS\2\x001A"))[..., 0], RAMP
    )


def test_only_the_wanted_frame_is_decoded():
    frames = [jpeg(RAMP)] + [b"\xff\xd8 no picture at all \xff\xd9"] * 5
    assert images.read_image(framed(frames, NumberOfFrames=6)).shape == (40, 30, 3)
    cut = dicom_file(RAMP, NumberOfFrames=1000)  # whose other frames are not even there
    np.testing.assert_array_equal(images.read_image(cut)[..., 0], RAMP)


def rle(*segments: bytes, starts=None) -> bytes:
    starts = starts or [64 + sum(map(len, segments[:i])) for i in range(len(segments))]
    return b"".join(
        n.to_bytes(4, "little") for n in [len(segments), *starts, *[0] * (15 - len(starts))]
    ) + b"".join(segments)


RLE = "1.2.840.10008.1.2.5"


@pytest.mark.parametrize("count", [None, 2, 5])
@pytest.mark.parametrize("table", [True, False])
def test_rle_frames(count, table):
    first, second = rle(b"\xfd\x07\x03\1\2\3\4"), rle(b"\xf9\x09")  # four 7, then 1 2 3 4; eight 9
    file = framed([first, second], RLE, np.zeros((2, 4), np.uint8), table, NumberOfFrames=count)
    assert images.read_image(file)[..., 0].tolist() == [[7] * 4, [1, 2, 3, 4]]


def test_high_bits_of_old_files():
    # what stands in the lowest bits is none of the picture's
    stored = (STEPS.astype(np.uint16) << 4) | 5
    assert first_row(dicom_file(stored, BitsStored=12, HighBit=15)) == SPREAD
    signed = (SIGNED_STEPS << 4).view(np.uint16) | 5
    assert first_row(dicom_file(signed.view(np.int16), BitsStored=12, HighBit=15)) == [0, 85, 170, 255]


def test_deflated_file_is_read_and_bounded(monkeypatch):
    syntax = "1.2.840.10008.1.2.1.99"
    np.testing.assert_array_equal(images.read_image(dicom_file(RAMP, syntax))[..., 0], RAMP)
    small = dicom_file(RAMP, syntax)
    # What stands after the meta information is packed: 3 MiB in 3 KB.
    monkeypatch.setattr(dicom, "_MOST_UNPACKED", 2 << 20)
    start = 144 + int.from_bytes(small[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(bytes(3 << 20)) + packer.flush()
    with pytest.raises(UserError, match=r"unpacks from \d+ bytes to more than the 2 MiB"):
        images.read_image(small[:start] + body)


@pytest.mark.parametrize(
    "file, sentence",
    {
        "sides": (
            dicom_file(RAMP, Rows=60000, Columns=60000),
            "has 60000 x 60000 pixels of 1 bytes by its header",
        ),
        "rle": (framed([rle(b"\x81\0")], RLE, Rows=60000, Columns=60000), "has 60000 x 60000 pixels"),
        "bytes": (
            dicom_file(COLOURS.astype(np.uint32), Rows=8192, Columns=8192),
            "8192 x 8192 pixels of 12 bytes by its header",
        ),
        "rle too short": (
            framed([rle(b"\x81\0")], RLE, Rows=600, Columns=600),
            "cannot hold its 360000",
        ),
        "coded size": (
            framed([jpeg(RAMP)], Rows=40, Columns=31),
            "is 31 x 40, and its compressed pixels say 30 x 40",
        ),
        "coded size, 2000": (
            framed([jpeg(RAMP, "JPEG2000", no_jp2=True)], "1.2.840.10008.1.2.4.90", Rows=4, Columns=4),
            "is 4 x 4, and its compressed pixels say 30 x 40",
        ),
        "endless boxes": (
            framed([b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\0box "], "1.2.840.10008.1.2.4.90"),
            "say no size at all",
        ),
        "no header": (framed([b"\xff\xd8\xff\xd9"]), "say no size at all"),
        "no frame": (framed([b"\0"]), "cannot be read as DICOM|no size at all"),
        "cut": (dicom_file(RAMP)[:-100], "is cut: its pixels have 1100 of 1200 bytes"),
        "no rows": (dicom_file(RAMP, Rows=0), "has no pixels"),
        "no pixels": (dicom_file(RAMP, PixelData=None), "there are no pixels in it"),
        "scans": (
            framed([jpeg(RAMP).replace(b"\xff\xda", b"\xff\xfe\0\2" + b"\xff\xda" * 99)]),
            "scans",
        ),
        "film": (framed([b"\0\0"], "1.2.840.10008.1.2.4.102"), "is MPEG-4 .* which is not read"),
        "unknown": (framed([b"\0\0"]).replace(b".1.2.4.50", b".1.2.4.99"), "which is not read"),
    }.values(),
)
def test_what_does_not_fit_is_refused_by_the_header(file, sentence):
    with pytest.raises(UserError, match=sentence):
        images.read_image(file)


def test_jpeg_2000_in_boxes_and_bare():
    for bare in (True, False):
        file = framed(
            [jpeg(RAMP, "JPEG2000", no_jp2=bare, irreversible=False)], "1.2.840.10008.1.2.4.90"
        )
        np.testing.assert_array_equal(images.read_image(file)[..., 0], RAMP)


@pytest.mark.parametrize(
    "shown, like", [("RGB", RAMP), ("MONOCHROME2", COLOURS), ("PALETTE COLOR", COLOURS)]
)
def test_samples_that_contradict_the_colours_are_refused(shown, like):
    with pytest.raises(UserError, match=f"samples a pixel and the colours {shown}"):
        images.read_image(dicom_file(like, PhotometricInterpretation=shown))


def test_rle_that_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(dicom, "MOST_BYTES", 1 << 16)
    bomb = framed([rle(b"\x81\0" * 4000)], RLE, np.zeros((2, 4), np.uint8))
    with pytest.raises(UserError, match="unpacks to more than its 8 bytes"):
        images.read_image(bomb)
    long = framed([rle(b"\x81\0" * 4000)], RLE, np.zeros((512, 1000), np.uint8))
    assert images.read_image(long).shape == (512, 1000, 3)


def test_files_without_meta_information():
    whole = dicom_file(RAMP, "1.2.840.10008.1.2")
    bare = whole[144 + int.from_bytes(whole[140:144], "little") :]
    assert bare[:2] == b"\x08\0"
    np.testing.assert_array_equal(images.read_image(bare)[..., 0], RAMP)
    explicit = dicom_file(RAMP)
    np.testing.assert_array_equal(
        images.read_image(explicit[144 + int.from_bytes(explicit[140:144], "little") :])[..., 0], RAMP
    )


NEEDS_CODEC = (
    "SC_rgb_jpeg_gdcm.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "JPEGLSNearLossless_08.dcm",
    "JPGExtended.dcm",
)


@pytest.mark.parametrize("name", NEEDS_CODEC)
def test_codecs_are_named_or_decode(name):
    from pydicom import dcmread
    from pydicom.data import get_testdata_file
    from pydicom.pixels import get_decoder

    path = str(get_testdata_file(name, download=False))
    decoder = get_decoder(dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID)
    if "pylibjpeg" in decoder.available_plugins:
        assert images.read_image(path).std() > 5
        return
    if set(decoder.available_plugins) - {"pillow"}:
        pytest.skip("another codec than those of the extra `dicom` is installed")
    with pytest.raises(
        UserError, match=r"is compressed as JPEG.* bits, .* run pip install 'unimed_jax\[dicom\]'"
    ):
        images.read_image(path)


def test_lossless_jpeg_equals_the_plain_file():
    pytest.importorskip("libjpeg", reason="a codec of the extra `dicom`: pip install -e '.[dicom]'")
    from pydicom.data import get_testdata_file

    plain, coded = (str(get_testdata_file(n, download=False)) for n in ("MR_small.dcm", NEEDS_CODEC[1]))
    np.testing.assert_array_equal(images.read_image(coded), images.read_image(plain))


def test_real_dicom_files_of_pydicom():
    from pydicom.data import get_testdata_file

    for name in (
        "CT_small.dcm",
        "MR_small.dcm",
        "examples_palette.dcm",
        "examples_rgb_color.dcm",
        "SC_rgb_rle.dcm",
    ):
        image = images.read_image(str(get_testdata_file(name, download=False)))
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
        assert image.std() > 20, name
    with pytest.raises(UserError, match="rtplan.dcm cannot be read as DICOM"):
        images.read_image(str(get_testdata_file("rtplan.dcm", download=False)))
