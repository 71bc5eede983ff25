"""DICOM files to 8 bits: windows, rescale and padding by PS3.3.

Right values are worked out from the standard's formulas, written beside each case.
"""

import numpy as np
import pytest
from support.dicom_files import SIGNED_STEPS, SPREAD, STEPS, dicom_file, first_row, item, rescale, window

from unimed_jax.data import images

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom
CT = np.array([[0, 824, 864, 964, 1064, 1164, 1264, 4000]] * 4, np.uint16)
BRAIN = [0, 0, 0, 64, 128, 192, 255, 255]  # of CT with rescale -1024 and window 40, 400
BRAIN_EXACT = [0, 0, 0, 64, 128, 191, 255, 255]
RAMP = np.linspace(0, 255, 40 * 30).astype(np.uint8).reshape(40, 30)
EIGHT = np.arange(8, dtype=np.uint16)[None].repeat(4, 0)  # stored 0..7


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
    assert first_row(dicom_file(CT, **fields)) == BRAIN


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
    assert first_row(dicom_file(np.array([stored] * 4, np.uint16), **fields)) == right


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
    assert first_row(dicom_file(STEPS, **fields)) == SPREAD


def test_one_of_slope_and_intercept_counts_alone():
    assert first_row(dicom_file(CT, RescaleIntercept=-1024, **window())) == BRAIN
    assert (
        first_row(dicom_file(CT, RescaleSlope=2, **window(2128, 800, VOILUTFunction="LINEAR_EXACT")))
        == BRAIN_EXACT
    )
    assert first_row(dicom_file(STEPS, RescaleSlope=-1)) == SPREAD[::-1]


@pytest.mark.parametrize("slope", [0.01, 1 / 255, 0.5, 3])
def test_eight_bits_with_a_slope_span_their_range_as_sixteen_do(slope):
    eight = np.array([[0, 36, 73, 109, 146, 182, 219, 255]] * 4, np.uint8)
    fields = rescale(0, f"{slope:.10g}")
    assert (
        first_row(dicom_file(eight, **fields))
        == first_row(dicom_file(eight.astype(np.uint16), **fields))
        == SPREAD
    )
    assert first_row(dicom_file(eight // 2, **fields))[-1] == 255


def test_eight_bits_and_fewer_stay_as_they_are():
    eight = RAMP[:, :20] // 2  # dark: nothing may brighten it
    np.testing.assert_array_equal(images.read_image(dicom_file(eight))[..., 2], eight)
    np.testing.assert_array_equal(images.read_image(dicom_file(eight, **rescale(0, 1)))[..., 2], eight)
    turned = images.read_image(dicom_file(eight, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(turned[..., 2], 255 - eight)
    four = np.array([[0, 1, 8, 15]] * 2, np.uint8)
    assert first_row(dicom_file(four, BitsStored=4, HighBit=3)) == [0, 17, 136, 255]
    mask = np.packbits([[0, 1, 1, 0, 0, 0, 0, 1]] * 2, bitorder="little")
    fields = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "PixelData": mask.tobytes()}
    assert first_row(dicom_file(np.zeros((2, 8), np.uint8), **fields)) == [0, 255, 255, 0, 0, 0, 0, 255]


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
    assert first_row(dicom_file(array, **fields)) == right
