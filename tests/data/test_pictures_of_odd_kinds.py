"""Rare but valid PNG, TIFF and DICOM files: planes, depths, signs and tables of odd kinds.

Right values are worked out by hand from the formats' standards.
"""

import io

import numpy as np
import pytest
from PIL import Image
from support.dicom_files import dicom_file, item
from support.picture_files import png, tiff

from unimed_jax.data import images
from unimed_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = np.array([[0, 40, 80, 120, 160, 200]] * 4, np.uint8)
SIGNED = np.array([[-100, -60, -20, 20, 60, 100]] * 4)
SPREAD = [0, 51, 102, 153, 204, 255]
COLOURS = np.stack([STEPS, STEPS[:, ::-1], 255 - STEPS], -1)


def first(file: bytes) -> list:
    return images.read_image(file)[0].tolist()


def row(file: bytes) -> list:
    return images.read_image(file)[0, :, 0].tolist()


# --------------------------------------------------------------------------------------------------
# PNG and TIFF
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "depth, data, width, clear, right",
    [
        (1, 0b01010000, 4, 1, [0, 255, 0, 255]),  # what is clear is white as well
        (2, 0b00011011, 4, 1, [0, 255, 170, 255]),
        (2, 0b00011011, 4, 2, [0, 85, 255, 255]),
        (4, 0x38, 2, 3, [255, 136]),
        (4, 0x38, 2, 8, [51, 255]),
        (8, 0x38, 1, 0x38, [255]),
    ],
)
def test_transparent_grey_of_few_bits(depth, data, width, clear, right):
    assert row(png(0, depth, bytes([data]), width, (b"tRNS", bytes([0, clear])))) == right


def test_transparent_colour_of_sixteen_bits_is_refused():
    deep = np.array([[0x0905] * 3, [0x0906] * 3], ">u2").tobytes()
    with pytest.raises(UserError, match="one of its colours of 16 bits a channel is transparent"):
        images.read_image(png(2, 16, deep, 2, (b"tRNS", b"\x09\x05" * 3)))
    assert row(png(2, 16, deep, 2)) == [9, 9]


@pytest.mark.parametrize("order", "<>")
def test_signed_bytes_span_their_range(order):
    assert row(tiff(SIGNED.astype(np.int8).tobytes(), 8, 2, order=order)) == SPREAD


@pytest.mark.parametrize("order", "<>")
def test_white_is_zero_in_floats_too(order):
    values = SIGNED.astype(f"{order}f4").tobytes()
    assert row(tiff(values, 32, 3, photometric=0, order=order)) == SPREAD[::-1]
    assert row(tiff(values, 32, 3, photometric=1, order=order)) == SPREAD


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_planes_of_a_tiff_that_lie_one_after_the_other(kind, order):
    deep = COLOURS.astype(order + kind) * (257 if kind == "u2" else 1)
    bits = 8 * deep.dtype.itemsize
    planes = deep.transpose(2, 0, 1).astype(order + kind).tobytes()
    assert first(tiff(planes, bits, photometric=2, order=order, samples=3, planes=True)) == (
        COLOURS[0].tolist()
    )


def test_alpha_that_is_multiplied_into_the_grey_shows_paper():
    # grey 0..200 at half alpha: the stored half, and half of the paper
    half = np.stack([STEPS // 2, np.full_like(STEPS, 128)], -1)
    right = (STEPS[0] // 2 + 127).tolist()
    got = row(tiff(half.tobytes(), 8, samples=2, extra=1))
    assert np.abs(np.array(got) - right).max() <= 1


def test_kinds_of_tiff_that_are_not_read_are_named_as_tiff():
    for bits, form in ((16, 3), (64, 3), (24, 1), (64, 1)):
        with pytest.raises(UserError, match="a TIFF that is damaged or of a kind that is not read"):
            images.read_image(tiff(bytes(24 * bits // 8), bits, form))


# --------------------------------------------------------------------------------------------------
# DICOM
# --------------------------------------------------------------------------------------------------

IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
SYNTAXES = (IMPLICIT, EXPLICIT, BIG)


def line(*values, kind=np.uint16) -> np.ndarray:
    return np.array([values] * 2, kind)


def table(descriptor: list, data, kind="US") -> "item":
    return item(
        x00283002=(kind, descriptor),
        x00283004=("LO", "US"),
        x00283006=("OW" if isinstance(data, bytes) else "US", data),
    )


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_inputs_of_a_table_are_signed_as_the_modality_is(syntax):
    # Implicit files write the first input as signed as the stored pixels, whose rescale is not.
    stored = line(-32768, 7231, 7232, 7233, 7234, 32767, kind=np.int16)
    fields = {"RescaleSlope": 1, "RescaleIntercept": 32768}
    voi = table([3, 40000, 8], [0, 128, 255])
    assert row(dicom_file(stored, syntax, VOILUTSequence=[voi], **fields)) == [0, 0, 0, 128, 255, 255]
    modality = table([4, -2, 16], [0, 100, 200, 300], "SS")
    signed = line(-2, -1, 0, 1, kind=np.int16)
    assert row(dicom_file(signed, syntax, ModalityLUTSequence=[modality])) == [0, 85, 170, 255]
    both = {"VOILUTSequence": [table([2, 100, 8], [0, 255])], "ModalityLUTSequence": [modality]}
    assert row(dicom_file(signed, syntax, **both)) == [0, 0, 255, 255]


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("inverted", [False, True])
def test_every_window_function_and_its_inversion(syntax, inverted):
    x = np.array([0, 50, 90, 100, 110, 150, 200])
    shown = {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
    scale = {"RescaleSlope": 2, "RescaleIntercept": -100}
    for function, white in {
        "SIGMOID": 1 / (1 + np.exp(-4 * (2 * x - 100 - 100) / 50)),
        "LINEAR_EXACT": (2 * x - 100 - 100) / 50 + 0.5,
        "LINEAR": (2 * x - 100 - 99.5) / 49 + 0.5,
        "linear_exact ": (2 * x - 100 - 100) / 50 + 0.5,
        "OF_ITS_OWN": (2 * x - 100 - 99.5) / 49 + 0.5,  # what is unknown is linear
    }.items():
        white = np.clip(white, 0, 1)
        right = np.round(255 * (1 - white if inverted else white)).astype(int).tolist()
        fields = {"WindowCenter": 100, "WindowWidth": 50, "VOILUTFunction": function} | scale | shown
        assert row(dicom_file(line(*x), syntax, **fields)) == right, function


def test_tables_that_say_nothing_count_as_absent():
    eight = line(0, 1, 2, 3, 4)
    window = {"WindowCenter": 2.5, "WindowWidth": 5}
    right = row(dicom_file(eight, **window))
    for sequence in ("VOILUTSequence", "ModalityLUTSequence"):
        for nothing in ([], [item()], [item(x00283002=("US", None), x00283006=("US", None))]):
            assert row(dicom_file(eight, **{sequence: nothing}, **window)) == right


@pytest.mark.parametrize(
    "half, words",
    [
        (item(x00283002=("US", [3, 0, 8])), "a lookup table without entries"),
        (item(x00283006=("US", [1, 2, 3])), "a lookup table without a descriptor of three numbers"),
        (table([3, 0], [1, 2, 3]), "a lookup table without a descriptor of three numbers"),
    ],
)
def test_half_a_table_is_named(half, words):
    with pytest.raises(UserError, match=f"cannot be read as DICOM .{words}"):
        images.read_image(dicom_file(line(0, 1, 2, 3), VOILUTSequence=[half]))


def test_eight_bit_tables_of_big_endian_files_lie_in_words():
    swapped = bytes([40, 0, 255, 80])
    four = line(0, 1, 2, 3, kind=np.uint8)
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in range(3):
        palette[f"x{0x00281101 + colour:08x}"] = ("US", [4, 0, 8])
        palette[f"x{0x00281201 + colour:08x}"] = ("OW", swapped)
    assert row(dicom_file(four, BIG, **palette)) == [0, 40, 80, 255]
    voi = table([4, 0, 8], swapped)
    assert row(dicom_file(four, BIG, VOILUTSequence=[voi])) == [0, 40, 80, 255]


@pytest.mark.parametrize("shown", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_stored_bits_wherever_they_lie(syntax, shown):
    right = np.array([0, 85, 170, 255])
    for stored, bits, high, signed in (
        (line(0, 21 | 64, 42 | 128, 63 | 192, kind=np.uint8), 6, 5, 0),  # overlays above
        (line(0x8000, 341 | 0x400, 682 | 0xFC00, 1023), 10, 9, 0),
        (line(7, 341 << 3 | 0x8000, 682 << 3 | 1, 1023 << 3), 10, 12, 0),  # both ends
        (line(0, 341 << 6, 682 << 6, 1023 << 6), 10, 15, 0),
        (line(0x800, 0xD55, 0x2AA, 0x7FF), 12, 11, 1),  # signs that are not extended
        (line(0, 1 << 30, 2 << 30, 3 << 30, kind=np.uint32), 32, 31, 0),
        (line(-128, -43, 42, 127, kind=np.int8), 8, 7, 1),
    ):
        fields = {"BitsStored": bits, "HighBit": high, "PixelRepresentation": signed}
        got = row(dicom_file(stored, syntax, PhotometricInterpretation=shown, **fields))
        assert got == (right if shown == "MONOCHROME2" else 255 - right).tolist(), (bits, high)


def test_planes_in_the_header_of_a_compressed_file_mean_nothing():
    from pydicom.encaps import encapsulate

    colours = np.kron(COLOURS, np.ones((8, 8, 1), np.uint8))

    def coded(kind, **options):
        file = io.BytesIO()
        Image.fromarray(colours).save(file, kind, **options)
        return encapsulate([file.getvalue()])

    for syntax, data, shown, near in (
        ("1.2.840.10008.1.2.4.50", coded("JPEG", quality=100, subsampling=0), "YBR_FULL_422", 4),
        ("1.2.840.10008.1.2.4.90", coded("JPEG2000", no_jp2=True, mct=1), "YBR_RCT", 0),
        ("1.2.840.10008.1.2.4.90", coded("JPEG2000", no_jp2=True, mct=0), "RGB", 0),
    ):
        for planes in (0, 1, None):
            fields = {"PhotometricInterpretation": shown, "PlanarConfiguration": planes}
            image = images.read_image(dicom_file(colours, syntax, PixelData=data, **fields))
            assert np.abs(image.astype(int) - colours).max() <= near, (syntax, planes)


def test_bits_of_a_mask_are_inverted_and_windowed_as_others():
    packed = np.packbits([0, 1, 1, 0, 1] * 2, bitorder="little").tobytes()
    fields = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "PixelData": packed}
    plain = np.zeros((2, 5), np.uint8)
    assert row(dicom_file(plain, **fields)) == [0, 255, 255, 0, 255]
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    assert row(dicom_file(plain, **fields, **inverted)) == [255, 0, 0, 255, 0]
    windowed = {"WindowCenter": 1, "WindowWidth": 1}
    assert row(dicom_file(plain, **fields, **windowed)) == [0, 255, 255, 0, 255]
