"""Makes small DICOM files: an array, and whatever else the header should say."""

import io

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from unimed_jax.data import images

STEPS = np.array([[0, 585, 1170, 1755, 2340, 2925, 3510, 4095]] * 4, np.uint16)
SPREAD = [0, 36, 73, 109, 146, 182, 219, 255]  # of STEPS over their range
COLOURS = np.array([[[0, 0, 0], [10, 20, 30], [200, 100, 50], [255, 255, 255]]] * 2, np.uint8)
SIGNED_STEPS = np.array([[-2000, -1000, 0, 1000]] * 4, np.int16)


def item(**fields) -> Dataset:
    """Makes an item of a sequence.

    A name that starts with x is a tag with its VR and value, x00283006=("OW", b"").
    """
    data = Dataset()
    put(data, fields)
    return data


def put(data: Dataset, fields: dict) -> None:
    """Sets fields by keyword or tag; None removes one."""
    for name, value in fields.items():
        if name.startswith("x"):
            data.add_new(int(name[1:], 16), *value)
        elif value is None:
            data.pop(name, None)
        else:
            setattr(data, name, value)


def dicom_file(array: np.ndarray, syntax: str = ExplicitVRLittleEndian, **fields) -> bytes:
    """Writes one frame [H, W] or [H, W, 3] of integers as a DICOM file.

    Further fields are added by the rules of `item`.
    """
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.SOPClassUID = SecondaryCaptureImageStorage
    bits = array.dtype.itemsize * 8
    data.Rows, data.Columns = array.shape[:2]
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit = bits - 1
    data.PixelRepresentation = int(array.dtype.kind == "i")
    data.SamplesPerPixel = 1 if array.ndim == 2 else 3
    data.PhotometricInterpretation = "MONOCHROME2" if array.ndim == 2 else "RGB"
    if array.ndim == 3:
        data.PlanarConfiguration = 0
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    data.PixelData = array.astype(array.dtype.newbyteorder(order)).tobytes()
    put(data, fields)
    if "PixelData" in data:
        data["PixelData"].VR = (
            "OB" if data.BitsAllocated <= 8 or data.file_meta.TransferSyntaxUID.is_compressed else "OW"
        )
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def float_file(array: np.ndarray, **fields) -> bytes:
    """Writes one frame of float32 or float64, which has no BitsStored."""
    keyword = {4: "FloatPixelData", 8: "DoubleFloatPixelData"}[array.dtype.itemsize]
    absent = dict.fromkeys(("PixelData", "BitsStored", "HighBit", "PixelRepresentation"))
    return dicom_file(array, **absent, **{keyword: array.tobytes()}, **fields)


def first_row(file: bytes) -> list:
    """Returns the first row of a grey picture, once all channels were seen to be alike."""
    image = images.read_image(file)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    return image[0, :, 0].tolist()


def rescale(intercept=-1024, slope=1) -> dict:
    """Gives the fields of a rescale, as `dicom_file` and `item` take them."""
    return {"RescaleSlope": slope, "RescaleIntercept": intercept}


def window(centre=40, width=400, **more) -> dict:
    """Gives the fields of a window, as `dicom_file` and `item` take them."""
    return {"WindowCenter": centre, "WindowWidth": width} | more
