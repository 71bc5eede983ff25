"""DICOM tables and colours to 8 bits: VOI and modality tables, palettes, RGB and YBR by PS3.3.

Right values are worked out from the standard's formulas, written beside each case.
"""

import numpy as np
import pytest
from support.dicom_files import COLOURS, dicom_file, first_row, float_file, item, rescale, window

from unimed_jax.data import images
from unimed_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom
EIGHT = np.arange(8, dtype=np.uint16)[None].repeat(4, 0)  # stored 0..7

WORDS = np.array([0, 10000, 20000, 30000, 40000, 50000, 60000, 65535], "<u2").tobytes()
IN_ORDER = [0, 39, 78, 117, 156, 195, 233, 255]


def lut(data, count=8, first=0, bits=16, kind="US"):
    """A table; data: bytes (OW) or a list of numbers (US)."""
    return item(
        x00283002=(kind, [count, first, bits]),
        x00283006=("OW" if isinstance(data, bytes) else "US", data),
    )


@pytest.mark.parametrize(
    "table, fields, right",
    {
        "below its first input": (lut(WORDS), rescale(-4), [0, 0, 0, 0, 0, 39, 78, 117]),
        "first input negative": (lut(WORDS, first=-4, kind="SS"), rescale(-4), IN_ORDER),
        "first input negative, written unsigned": (lut(WORDS, first=65532), rescale(-4), IN_ORDER),
        "first input high": (lut(WORDS, first=65532), rescale(65532), IN_ORDER),
        "beyond its last input": (lut(WORDS), rescale(4), [156, 195, 233, 255, 255, 255, 255, 255]),
        "beyond sixteen bits": (lut(WORDS), rescale(0, 1e6), [0, 255, 255, 255, 255, 255, 255, 255]),
        "rounded inputs": (lut(WORDS), rescale(0, 0.29), [0, 0, 39, 39, 39, 39, 78, 78]),
        # white is 2^depth - 1
        "twelve bits": (lut([0, 2048, 4095], 3, bits=12), {}, [0, 128, 255, 255, 255, 255, 255, 255]),
        "ten bits": (lut([0, 512, 1023], 3, bits=10), {}, [0, 128, 255, 255, 255, 255, 255, 255]),
        "dark": (lut([0, 4096, 8192], 3), {}, [0, 16, 32, 32, 32, 32, 32, 32]),
        "eight bits in words": (
            lut(b"\0\0\x80\0\xff\0", 3, bits=8),
            {},
            [0, 128, 255, 255, 255, 255, 255, 255],
        ),
        "eight bits in bytes": (
            lut(b"\0\x40\x80\xff", 4, bits=8),
            {},
            [0, 64, 128, 255, 255, 255, 255, 255],
        ),
        "one entry": (lut([65535], 1), {}, [255] * 8),
        "before a window": (lut(WORDS), window(1, 1), IN_ORDER),
    }.values(),
)
def test_voi_table(table, fields, right):
    assert first_row(dicom_file(EIGHT, VOILUTSequence=[table], **fields)) == right


def test_voi_table_of_signed_pixels_and_of_the_functional_groups():
    signed = np.arange(-4, 4, dtype=np.int16)[None].repeat(2, 0)
    assert first_row(dicom_file(signed, VOILUTSequence=[lut(WORDS, first=65532)])) == IN_ORDER
    assert first_row(dicom_file(signed, VOILUTSequence=[lut(WORDS, first=-4, kind="SS")])) == IN_ORDER
    group = item(FrameVOILUTSequence=[item(VOILUTSequence=[lut(WORDS)])])
    functional = {"PerFrameFunctionalGroupsSequence": [group]}
    assert first_row(dicom_file(EIGHT, **functional, **window(3, 1))) == IN_ORDER


def test_modality_table_comes_before_the_window():
    table = lut([100, 200, 300, 400], 4, first=2)
    right = [0, 0, 0, 128, 255, 255, 255, 255]
    assert (
        first_row(
            dicom_file(EIGHT, ModalityLUTSequence=[table], **window(200.5, 201, VOILUTFunction="LINEAR"))
        )
        == right
    )
    assert first_row(dicom_file(EIGHT, ModalityLUTSequence=[table])) == [0, 0, 0, 85, 170, 255, 255, 255]
    eight = lut(b"\0\x10\x20\x30", 4, bits=8)
    assert (
        first_row(dicom_file(EIGHT.astype(np.uint8), ModalityLUTSequence=[eight]))
        == [0, 85, 170] + [255] * 5
    )


@pytest.mark.parametrize("bad", [lut(b"", 4), lut([1, 2], 2, bits=0), lut([1, 2], 2, bits=40)])
def test_tables_that_are_none_are_one_sentence(bad):
    with pytest.raises(UserError, match=r"of \d+ bytes cannot be read as DICOM .*lookup table"):
        images.read_image(dicom_file(EIGHT, VOILUTSequence=[bad]))


def palette(
    data: bytes, count: int, bits: int = 16, first: int = 0, segmented: bool = False, **fields
) -> dict:
    """Fields of a palette whose colours are all alike."""
    tags = (0x00281221, 0x00281222, 0x00281223) if segmented else (0x00281201, 0x00281202, 0x00281203)
    fields = {"PhotometricInterpretation": "PALETTE COLOR", **fields}
    fields |= {f"x{0x00281101 + i:08x}": ("US", [count, first, bits]) for i in range(3)}
    return fields | {f"x{tag:08x}": ("OW", data) for tag in tags}


FOUR = np.array([[0, 1, 2, 3]] * 4, np.uint8)
# one entry 0, three up to white, two entries
LINES = np.array([0, 1, 0, 1, 3, 65535, 0, 2, 9, 8], "<u2").tobytes()


@pytest.mark.parametrize(
    "stored, fields, right",
    {
        "sixteen bits": (
            FOUR,
            palette(np.array([0, 10280, 20560, 25700], "<u2").tobytes(), 4),
            [0, 40, 80, 100],
        ),
        "dark": (FOUR, palette(np.array([0, 257, 514, 771], "<u2").tobytes(), 4), [0, 1, 2, 3]),
        "eight bits": (FOUR, palette(bytes([0, 40, 80, 100]), 4, 8), [0, 40, 80, 100]),
        "eight bits, odd": (FOUR, palette(bytes([0, 40, 80, 0]), 3, 8), [0, 40, 80, 80]),
        "eight bits in words": (
            FOUR,
            palette(bytes([0, 0, 40, 0, 80, 0, 100, 0]), 4, 8),
            [0, 40, 80, 100],
        ),
        "first input": (FOUR + 10, palette(bytes([0, 40]), 2, 8, first=11), [0, 0, 40, 40]),
        "many entries of eight bits": (
            FOUR.astype(np.uint16) * 100 + 100,
            palette(bytes(i // 2 for i in range(402)), 402, 8),
            [50, 100, 150, 200],
        ),
        "segments": (FOUR, palette(LINES, 6, segmented=True), [0, 85, 170, 255]),
        "segments, eight bits": (
            FOUR,
            palette(bytes([0, 2, 0, 100, 1, 2, 200, 0]), 4, 8, segmented=True),
            None,
        ),
        "segments again": (
            np.array([[0, 1, 3, 4]], np.uint8),
            palette(
                np.array([0, 2, 0, 65535, 0, 1, 257, 2, 1, 0, 0], "<u2").tobytes(), 5, segmented=True
            ),
            [0, 255, 0, 255],
        ),
    }.values(),
)
def test_palettes_are_white_by_their_depth(stored, fields, right):
    assert first_row(dicom_file(stored, **fields)) == (right or [0, 100, 150, 200])


def test_palette_of_big_endian_and_of_three_colours():
    fields = palette(np.array([0, 10280, 20560, 25700], ">u2").tobytes(), 4)
    red = {"x00281201": ("OW", np.array([0, 65535, 0, 65535], ">u2").tobytes())}
    image = images.read_image(dicom_file(FOUR, "1.2.840.10008.1.2.2", **fields | red))
    assert image[0].tolist() == [[0, 0, 0], [255, 40, 40], [0, 80, 80], [255, 100, 100]]


# A segment that repeats itself again and again would be a list without an end.
def test_segments_without_an_end_are_bounded():
    endless = np.array([0, 1, 5, *([2, 0xFFFF, 0, 0] * 3), 0], "<u2").tobytes()
    try:
        assert first_row(dicom_file(FOUR, **palette(endless, 0, segmented=True)))
    except UserError as error:
        assert "cannot be read as DICOM" in str(error)


# --------------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------------


def test_rgb_is_white_by_its_depth():
    np.testing.assert_array_equal(images.read_image(dicom_file(COLOURS)), COLOURS)
    deep = COLOURS.astype(np.uint16)
    np.testing.assert_array_equal(images.read_image(dicom_file(deep * 257)), COLOURS)
    np.testing.assert_array_equal(
        images.read_image(dicom_file(deep)), np.round(COLOURS / 257).astype(np.uint8)
    )
    twelve = np.round(COLOURS / 255 * 4095).astype(np.uint16)
    np.testing.assert_array_equal(
        images.read_image(dicom_file(twelve, BitsStored=12, HighBit=11)), COLOURS
    )
    planes = {"PlanarConfiguration": 1, "PixelData": COLOURS.transpose(2, 0, 1).tobytes()}
    np.testing.assert_array_equal(images.read_image(dicom_file(COLOURS, **planes)), COLOURS)
    np.testing.assert_array_equal(
        images.read_image(dicom_file(COLOURS, PlanarConfiguration=None)), COLOURS
    )


def test_ybr_becomes_rgb_at_any_depth():
    from pydicom.pixels import convert_color_space

    ybr = convert_color_space(COLOURS, "RGB", "YBR_FULL")
    right = convert_color_space(ybr, "YBR_FULL", "RGB")
    np.testing.assert_array_equal(
        images.read_image(dicom_file(ybr, PhotometricInterpretation="YBR_FULL")), right
    )
    deep = dicom_file(ybr.astype(np.uint16) << 8, PhotometricInterpretation="YBR_FULL")
    assert np.abs(images.read_image(deep).astype(int) - COLOURS).max() <= 3
    half = np.array([[[76, 85, 255]] * 2 + [[150, 44, 21]] * 2], np.uint8)  # red, red, green, green
    packed = np.array([76, 76, 85, 255, 150, 150, 44, 21], np.uint8).tobytes()
    fields = {"PhotometricInterpretation": "YBR_FULL_422"}
    right = images.read_image(dicom_file(half, PhotometricInterpretation="YBR_FULL"))
    np.testing.assert_array_equal(images.read_image(dicom_file(half, PixelData=packed, **fields)), right)
    np.testing.assert_array_equal(
        images.read_image(dicom_file(half, PixelData=packed * 2, **fields)), right
    )
    # not halved at all
    np.testing.assert_array_equal(images.read_image(dicom_file(half, **fields)), right)


@pytest.mark.parametrize("colours", ["HSV", "YBR_PARTIAL_422", "YBR_ICT"])
def test_colours_that_are_not_read_are_named(colours):
    with pytest.raises(UserError, match=f"has the colours {colours}, which are not read"):
        images.read_image(dicom_file(COLOURS, PhotometricInterpretation=colours))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_pixels(dtype):
    values = np.array([[-1, -0.5, 0, 0.5, 1, 1.5, 2, 3]] * 2, dtype)
    assert first_row(float_file(values)) == [0, 32, 64, 96, 128, 159, 191, 255]
    assert (
        first_row(float_file(values, **window(0.5, 1, VOILUTFunction="LINEAR_EXACT")))
        == [0, 0, 0, 128] + [255] * 4
    )
    kind = "" if dtype == np.float32 else "Double"
    padded = float_file(values, **{f"{kind}FloatPixelPaddingValue": -1.0})
    assert first_row(padded) == [0, 0, 36, 73, 109, 146, 182, 255]
    values[:, 0], values[:, 7] = np.nan, np.inf
    assert first_row(float_file(values)) == [0, 0, 51, 102, 153, 204, 255, 255]
    assert first_row(float_file(np.full((2, 3), np.nan, dtype))) == [0, 0, 0]
    assert first_row(
        float_file(
            np.array([[-1.7e308, 0, 1.7e308]])
            .clip(np.finfo(dtype).min, np.finfo(dtype).max)
            .astype(dtype)
        )
    ) == [0, 128, 255]
