"""DICOM files to 8 bits: windows, rescale, padding, palettes and colours by PS3.3, one frame,
bounded by headers.

Right values are worked out from the standard's formulas, written beside each case.
"""

import io
import zlib

import numpy as np
import pytest
from PIL import Image
from support.dicom_files import dicom_file, float_file, item

from unimed_jax.data import dicom, images
from unimed_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom
SIGNED_STEPS = np.array([[-2000, -1000, 0, 1000]] * 4, np.int16)
STEPS = np.array([[0, 585, 1170, 1755, 2340, 2925, 3510, 4095]] * 4, np.uint16)
SPREAD = [0, 36, 73, 109, 146, 182, 219, 255]  # of STEPS over their range
CT = np.array([[0, 824, 864, 964, 1064, 1164, 1264, 4000]] * 4, np.uint16)
BRAIN = [0, 0, 0, 64, 128, 192, 255, 255]  # of CT with rescale -1024 and window 40, 400
BRAIN_EXACT = [0, 0, 0, 64, 128, 191, 255, 255]
RAMP = np.linspace(0, 255, 40 * 30).astype(np.uint8).reshape(40, 30)
EIGHT = np.arange(8, dtype=np.uint16)[None].repeat(4, 0)  # stored 0..7


def row(file: bytes) -> list:
    """The first row of a grey picture, once all channels were seen to be alike."""
    image = images.read_image(file)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    return image[0, :, 0].tolist()


def rescale(intercept=-1024, slope=1):
    return {"RescaleSlope": slope, "RescaleIntercept": intercept}


def window(centre=40, width=400, **more):
    return {"WindowCenter": centre, "WindowWidth": width} | more


def voi(*fields, **named):
    return item(FrameVOILUTSequence=[item(**window(*fields, **named))])


def both(intercept, centre, width):
    group = voi(centre, width)
    group.PixelValueTransformationSequence = [item(**rescale(intercept))]
    return group


SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
WRONG = both(0, 2000, 10)


@pytest.mark.parametrize(
    "fields",
    [
        rescale() | window(),
        {SHARED: [both(-1024, 40, 400)]},
        {PER_FRAME: [both(-1024, 40, 400), WRONG], "NumberOfFrames": 2},
        {SHARED: [WRONG], PER_FRAME: [both(-1024, 40, 400)]},
        {SHARED: [item(PixelValueTransformationSequence=[item(**rescale())])], PER_FRAME: [voi()]},
        {SHARED: [voi()], **rescale()},
        {SHARED: [both(-1024, 40, 400)], PER_FRAME: [item(FrameVOILUTSequence=[])], **window(2000, 10)},
        {SHARED: [], **rescale(), **window([40, 2000], [400, 10])},
    ],
    ids=[
        "root",
        "shared",
        "frame",
        "frame first",
        "one each",
        "shared and root",
        "empty frame",
        "several windows",
    ],
)
def test_window_and_rescale_count_wherever_the_file_keeps_them(fields):
    assert row(dicom_file(CT, **fields)) == BRAIN


def test_linear_window_is_that_of_the_standard():
    stored = np.arange(0, 2000, dtype=np.int16).reshape(40, 50)
    fields = rescale(-1000) | window([40, 500], [400, 2000])
    image = images.read_image(dicom_file(stored, **fields))[..., 0].reshape(-1)
    # C.11.2.1.2.1: black up to centre - 0.5 - (width - 1) / 2, white from centre - 0.5 + (width -
    # 1) / 2.
    assert (
        image[1000 - 160] == 0
        and image[1000 - 158] > 0
        and image[1000 + 238] < 255
        and image[1000 + 240] == 255
    )
    np.testing.assert_allclose(image[1000:1100], ((np.arange(100) - 39.5) / 399 + 0.5) * 255, atol=0.51)
    turned = images.read_image(dicom_file(stored, PhotometricInterpretation="MONOCHROME1", **fields))[
        ..., 0
    ]
    assert np.abs(turned.reshape(-1).astype(int) + image - 255).max() <= 1


@pytest.mark.parametrize(
    "stored, fields, right",
    {
        # linear and width 1: a step at centre - 0.5; below that width, where the formula ends, the
        # exact one
        "width 1": ([98, 99, 100, 101], window(100, 1), [0, 0, 255, 255]),
        "width 1, mask": ([0, 1, 0, 1], window(1, 1), [0, 255, 0, 255]),
        "width 2": ([98, 99, 100, 101], window(100, 2), [0, 0, 255, 255]),
        "width .5": ([99, 100, 101, 102], window(100, 0.5), [0, 128, 255, 255]),
        # (x - c) / w + .5
        "exact": ([94, 95, 98, 105], window(100, 10, VOILUTFunction="LINEAR_EXACT"), [0, 0, 76, 255]),
        "exact 1": ([98, 99, 100, 101], window(100, 1, VOILUTFunction="LINEAR_EXACT"), [0, 0, 128, 255]),
        # 1 / (1 + e^(-4 (x - c) / w))
        "sigmoid": ([0, 90, 100, 110], window(100, 20, VOILUTFunction="SIGMOID"), [0, 30, 128, 225]),
        "steep sigmoid": (
            [0, 99, 100, 60000],
            window(100, 1e-3, VOILUTFunction="SIGMOID"),
            [0, 0, 128, 255],
        ),
        # without a meaning: the range of the values
        "width 0": ([0, 1, 2, 4], window(0, 0), [0, 64, 128, 255]),
        "width -5": ([0, 1, 2, 4], window(0, -5), [0, 64, 128, 255]),
        "width nan": ([0, 1, 2, 4], window(0, "nan"), [0, 64, 128, 255]),
        "centre inf": ([0, 1, 2, 4], window("inf", 4), [0, 64, 128, 255]),
        "centre alone": ([0, 1, 2, 4], {"WindowCenter": 1}, [0, 64, 128, 255]),
        "width alone": ([0, 1, 2, 4], {"WindowWidth": 1}, [0, 64, 128, 255]),
        "empty": ([0, 1, 2, 4], window(["", ""], ["", ""]), [0, 64, 128, 255]),
        "none": (
            [0, 1, 2, 4],
            {"x00281050": ("DS", None), "x00281051": ("DS", None)},
            [0, 64, 128, 255],
        ),
        "first one empty": ([98, 99, 100, 101], window(["", 100], ["", 1]), [0, 0, 255, 255]),
        "first one of width 0": ([98, 99, 100, 101], window([7, 100], [0, 1]), [0, 0, 255, 255]),
    }.values(),
)
def test_windows_at_the_edge_of_their_formula(stored, fields, right):
    assert row(dicom_file(np.array([stored] * 4, np.uint16), **fields)) == right


@pytest.mark.parametrize(
    "fields",
    [
        rescale(0, 0),
        rescale(0, 0) | window(2048, 4096),
        rescale(0, "1e308"),
        rescale("1e308", 1) | window(2048, 4096),
        rescale(0, "nan"),
        rescale("inf", 1) | window(2048, 4096),
        rescale(0, "1e-330"),
        rescale(0, "1e-9"),
        rescale(-7, "1e303"),
        {"x00281052": ("DS", None), "x00281053": ("DS", None)},
        {"x00281053": ("DS", None), "RescaleIntercept": 5},
        {"x00281052": ("DS", None), "RescaleSlope": 2},
        {SHARED: [item(PixelValueTransformationSequence=[item(**rescale(0, 0))])]},
    ],
)
def test_rescale_without_a_meaning_leaves_the_range_of_the_values(fields):
    assert row(dicom_file(STEPS, **fields)) == SPREAD


def test_one_of_slope_and_intercept_counts_alone():
    assert row(dicom_file(CT, RescaleIntercept=-1024, **window())) == BRAIN
    assert (
        row(dicom_file(CT, RescaleSlope=2, **window(2128, 800, VOILUTFunction="LINEAR_EXACT")))
        == BRAIN_EXACT
    )
    assert row(dicom_file(STEPS, RescaleSlope=-1)) == SPREAD[::-1]


@pytest.mark.parametrize("slope", [0.01, 1 / 255, 0.5, 3])
def test_eight_bits_with_a_slope_span_their_range_as_sixteen_do(slope):
    eight = np.array([[0, 36, 73, 109, 146, 182, 219, 255]] * 4, np.uint8)
    fields = rescale(0, f"{slope:.10g}")
    assert (
        row(dicom_file(eight, **fields)) == row(dicom_file(eight.astype(np.uint16), **fields)) == SPREAD
    )
    assert row(dicom_file(eight // 2, **fields))[-1] == 255


def test_eight_bits_and_fewer_stay_as_they_are():
    eight = RAMP[:, :20] // 2  # dark: nothing may brighten it
    np.testing.assert_array_equal(images.read_image(dicom_file(eight))[..., 2], eight)
    np.testing.assert_array_equal(images.read_image(dicom_file(eight, **rescale(0, 1)))[..., 2], eight)
    turned = images.read_image(dicom_file(eight, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(turned[..., 2], 255 - eight)
    four = np.array([[0, 1, 8, 15]] * 2, np.uint8)
    assert row(dicom_file(four, BitsStored=4, HighBit=3)) == [0, 17, 136, 255]
    mask = np.packbits([[0, 1, 1, 0, 0, 0, 0, 1]] * 2, bitorder="little")
    fields = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "PixelData": mask.tobytes()}
    assert row(dicom_file(np.zeros((2, 8), np.uint8), **fields)) == [0, 255, 255, 0, 0, 0, 0, 255]


@pytest.mark.parametrize(
    "stored, fields, right",
    {
        "unsigned beside signed": (SIGNED_STEPS, {"x00280120": ("US", 63536)}, [0, 0, 128, 255]),
        "signed": (SIGNED_STEPS, {"x00280120": ("SS", -2000)}, [0, 0, 128, 255]),
        "signed beside unsigned": ([63536, 0, 50, 100], {"x00280120": ("SS", -2000)}, [0, 0, 128, 255]),
        "twelve bits": (
            np.array([[-2000, -1000, 0, 1000]], np.int16),
            {"x00280120": ("US", 63536), "BitsStored": 12, "HighBit": 11},
            [0, 0, 128, 255],
        ),
        "range": ([0, 7, 10, 20], {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 7}, [0, 0, 0, 255]),
        "range backwards": (
            [0, 7, 10, 20],
            {"PixelPaddingValue": 7, "PixelPaddingRangeLimit": 0},
            [0, 0, 0, 255],
        ),
        "at the top": ([0, 50, 100, 4095], {"PixelPaddingValue": 4095}, [0, 128, 255, 0]),
        "inverted": (
            [0, 50, 100, 4095],
            {"PixelPaddingValue": 4095, "PhotometricInterpretation": "MONOCHROME1"},
            [255, 128, 0, 0],
        ),
        "inverted range": (
            [0, 50, 100, 4000],
            {
                "PixelPaddingValue": 4095,
                "PixelPaddingRangeLimit": 3900,
                "PhotometricInterpretation": "MONOCHROME1",
            },
            [255, 128, 0, 0],
        ),
        "rescaled": (SIGNED_STEPS, {"x00280120": ("US", 63536), **rescale(-9, 3)}, [0, 0, 128, 255]),
        "empty": ([0, 50, 100, 100], {"x00280120": ("US", None)}, [0, 128, 255, 255]),
        "nothing else": ([9, 9, 9, 9], {"PixelPaddingValue": 9}, [0, 0, 0, 0]),
        "with a window": (
            [0, 7, 10, 20],
            {"PixelPaddingValue": 0, **window(10.5, 21)},
            [0, 89, 128, 255],
        ),
    }.values(),
)
def test_padding_is_black_and_widens_no_range(stored, fields, right):
    array = stored if isinstance(stored, np.ndarray) else np.array([stored] * 4, np.uint16)
    assert row(dicom_file(array, **fields)) == right


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------

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
    assert row(dicom_file(EIGHT, VOILUTSequence=[table], **fields)) == right


def test_voi_table_of_signed_pixels_and_of_the_functional_groups():
    signed = np.arange(-4, 4, dtype=np.int16)[None].repeat(2, 0)
    assert row(dicom_file(signed, VOILUTSequence=[lut(WORDS, first=65532)])) == IN_ORDER
    assert row(dicom_file(signed, VOILUTSequence=[lut(WORDS, first=-4, kind="SS")])) == IN_ORDER
    group = item(FrameVOILUTSequence=[item(VOILUTSequence=[lut(WORDS)])])
    assert row(dicom_file(EIGHT, **{PER_FRAME: [group]}, **window(3, 1))) == IN_ORDER


def test_modality_table_comes_before_the_window():
    table = lut([100, 200, 300, 400], 4, first=2)
    right = [0, 0, 0, 128, 255, 255, 255, 255]
    assert (
        row(
            dicom_file(EIGHT, ModalityLUTSequence=[table], **window(200.5, 201, VOILUTFunction="LINEAR"))
        )
        == right
    )
    assert row(dicom_file(EIGHT, ModalityLUTSequence=[table])) == [0, 0, 0, 85, 170, 255, 255, 255]
    eight = lut(b"\0\x10\x20\x30", 4, bits=8)
    assert (
        row(dicom_file(EIGHT.astype(np.uint8), ModalityLUTSequence=[eight])) == [0, 85, 170] + [255] * 5
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
    assert row(dicom_file(stored, **fields)) == (right or [0, 100, 150, 200])


def test_palette_of_big_endian_and_of_three_colours():
    fields = palette(np.array([0, 10280, 20560, 25700], ">u2").tobytes(), 4)
    red = {"x00281201": ("OW", np.array([0, 65535, 0, 65535], ">u2").tobytes())}
    image = images.read_image(dicom_file(FOUR, "1.2.840.10008.1.2.2", **fields | red))
    assert image[0].tolist() == [[0, 0, 0], [255, 40, 40], [0, 80, 80], [255, 100, 100]]


# A segment that repeats itself again and again would be a list without an end.
def test_segments_without_an_end_are_bounded():
    endless = np.array([0, 1, 5, *([2, 0xFFFF, 0, 0] * 3), 0], "<u2").tobytes()
    try:
        assert row(dicom_file(FOUR, **palette(endless, 0, segmented=True)))
    except UserError as error:
        assert "cannot be read as DICOM" in str(error)


# --------------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------------

COLOURS = np.array([[[0, 0, 0], [10, 20, 30], [200, 100, 50], [255, 255, 255]]] * 2, np.uint8)


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
    assert row(float_file(values)) == [0, 32, 64, 96, 128, 159, 191, 255]
    assert (
        row(float_file(values, **window(0.5, 1, VOILUTFunction="LINEAR_EXACT")))
        == [0, 0, 0, 128] + [255] * 4
    )
    kind = "" if dtype == np.float32 else "Double"
    padded = float_file(values, **{f"{kind}FloatPixelPaddingValue": -1.0})
    assert row(padded) == [0, 0, 36, 73, 109, 146, 182, 255]
    values[:, 0], values[:, 7] = np.nan, np.inf
    assert row(float_file(values)) == [0, 0, 51, 102, 153, 204, 255, 255]
    assert row(float_file(np.full((2, 3), np.nan, dtype))) == [0, 0, 0]
    assert row(
        float_file(
            np.array([[-1.7e308, 0, 1.7e308]])
            .clip(np.finfo(dtype).min, np.finfo(dtype).max)
            .astype(dtype)
        )
    ) == [0, 128, 255]


# --------------------------------------------------------------------------------------------------
# Frames and compression
# --------------------------------------------------------------------------------------------------


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
    assert row(dicom_file(stored, BitsStored=12, HighBit=15)) == SPREAD
    signed = (SIGNED_STEPS << 4).view(np.uint16) | 5
    assert row(dicom_file(signed.view(np.int16), BitsStored=12, HighBit=15)) == [0, 85, 170, 255]


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
