"""Reading, resizing and normalising images."""

import numpy as np
import pytest
from PIL import Image

from unimed_jax.data import images
from unimed_jax.errors import UserError

RAMP = np.linspace(0, 255, 40 * 30).astype(np.uint8).reshape(40, 30)


def test_png_and_jpeg_come_back_as_rgb(tmp_path):
    rgb = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), rgb)
    Image.fromarray(RAMP).save(tmp_path / "g.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "g.png"), np.stack([RAMP] * 3, -1))
    Image.fromarray(RAMP).save(tmp_path / "g.jpg", quality=95)
    jpeg = images.read_image(tmp_path / "g.jpg")
    assert jpeg.shape == (40, 30, 3) and np.abs(jpeg[..., 0].astype(int) - RAMP).max() < 12


@pytest.mark.parametrize("top", [4095, 65535])
def test_sixteen_bit_grey_spans_the_range_it_uses(tmp_path, top):
    deep = np.round(np.linspace(0, top, 1200)).astype(np.uint16).reshape(40, 30)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = images.read_image(tmp_path / "deep.png")
    assert image.dtype == np.uint8 and image.min() == 0 and image.max() == 255
    np.testing.assert_allclose(image[..., 1], deep / top * 255, atol=0.51)


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="nothere.png does not exist"):
        images.read_image(tmp_path / "nothere.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="text.png cannot be read"):
        images.read_image(tmp_path / "text.png")
    noise = np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1200])
    with pytest.raises(UserError, match="cut.png cannot be read"):
        images.read_image(tmp_path / "cut.png")
    (tmp_path / "x.dcm").write_bytes(b"\0" * 128 + b"DICM nothing more")
    with pytest.raises(UserError, match="x.dcm cannot be read as DICOM"):
        images.read_image(tmp_path / "x.dcm")


def test_resize_is_antialiased_bicubic_to_a_square():
    noise = np.random.default_rng(0).integers(0, 256, (200, 100, 3), dtype=np.uint8)
    small = images.resize(noise, 10)
    assert small.shape == (10, 10, 3) and small.dtype == np.uint8
    assert small.std() < noise.std() / 4  # without antialiasing the spread would stay
    np.testing.assert_array_equal(images.resize(small, 10), small)


def dicom(path, array, **fields):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    bits = array.dtype.itemsize * 8
    data.Rows, data.Columns = array.shape[:2]
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit = bits - 1
    data.PixelRepresentation = int(array.dtype.kind == "i")
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.PixelData = array.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return images.read_image(path)


def test_dicom_rescale_and_window_and_inversion(tmp_path):
    stored = np.arange(0, 2000, dtype=np.int16).reshape(40, 50)
    fields = {"RescaleSlope": 1, "RescaleIntercept": -1000, "WindowCenter": [40, 500], "WindowWidth": [400, 2000]}
    image = dicom(tmp_path / "a.dcm", stored, **fields)[..., 0].reshape(-1)
    # PS3.3 C.11.2.1.2.1: black up to centre - 0.5 - (width - 1) / 2, white from centre - 0.5 + (width - 1) / 2.
    assert image[1000 - 160] == 0 and image[1000 - 158] > 0 and image[1000 + 238] < 255 and image[1000 + 240] == 255
    np.testing.assert_allclose(image[1000:1100], ((np.arange(100) - 39.5) / 399 + 0.5) * 255, atol=0.51)
    inverted = dicom(tmp_path / "b.dcm", stored, PhotometricInterpretation="MONOCHROME1", **fields)[..., 0]
    assert np.abs(inverted.reshape(-1).astype(int) + image - 255).max() <= 1


def test_dicom_without_a_window(tmp_path):
    eight = RAMP[:, :20].copy()
    np.testing.assert_array_equal(dicom(tmp_path / "8.dcm", eight)[..., 2], eight)
    deep = np.full((4, 4), -2000, np.int16)
    deep[1:3, 1:3] = [[-100, 0], [50, 100]]
    image = dicom(tmp_path / "16.dcm", deep, PixelPaddingValue=-2000)[..., 0]
    np.testing.assert_array_equal(image[1:3, 1:3], [[0, 128], [191, 255]])
    assert image[0, 0] == 0


def test_dicom_takes_the_first_frame(tmp_path):
    frames = np.stack([RAMP, 255 - RAMP])
    image = dicom(tmp_path / "m.dcm", frames, NumberOfFrames=2, Rows=40, Columns=30)
    np.testing.assert_array_equal(image[..., 0], RAMP)


def test_real_dicom_files_of_pydicom():
    pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    for name in ("CT_small.dcm", "MR_small.dcm", "examples_palette.dcm", "examples_rgb_color.dcm", "SC_rgb_rle.dcm"):
        image = images.read_image(str(get_testdata_file(name, download=False)))
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
        assert image.std() > 20, name
    with pytest.raises(UserError, match="rtplan.dcm cannot be read as DICOM"):
        images.read_image(str(get_testdata_file("rtplan.dcm", download=False)))
