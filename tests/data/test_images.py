"""Reading, resizing and normalising pictures of any kind."""

import contextlib
import io
import logging
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from support.picture_files import png, tiff

from unimed_jax.config import ImageConfig, VisionConfig
from unimed_jax.data import fitting, images
from unimed_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
RAMP = np.linspace(0, 255, 40 * 30).astype(np.uint8).reshape(40, 30)
STEPS = np.array([[0, 40, 80, 120, 160, 200]] * 4, np.uint8)


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def row(file: bytes) -> list:
    return images.read_image(file)[0, :, 0].tolist()


def test_png_and_jpeg_come_back_as_rgb(tmp_path):
    rgb = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), rgb)
    Image.fromarray(RAMP).save(tmp_path / "g.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "g.png"), np.stack([RAMP] * 3, -1))
    Image.fromarray(RAMP).save(tmp_path / "g.jpg", quality=95)
    jpeg = images.read_image(tmp_path / "g.jpg")
    assert jpeg.shape == (40, 30, 3) and np.abs(jpeg[..., 0].astype(int) - RAMP).max() < 12


def test_every_format_that_is_named_is_read_and_no_other():
    rgb = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        np.testing.assert_array_equal(images.read_image(saved(rgb, kind)), rgb)
    np.testing.assert_array_equal(images.read_image(saved(rgb, "WEBP", lossless=True)), rgb)
    np.testing.assert_array_equal(images.read_image(saved(rgb, "JPEG2000", irreversible=False)), rgb)
    assert (
        images.read_image(saved(rgb, "GIF")).shape
        == images.read_image(saved(rgb, "JPEG")).shape
        == rgb.shape
    )
    assert set(images.READABLE) == {"PNG", "TIFF", "BMP", "PPM", "WEBP", "JPEG2000", "GIF", "JPEG"}
    for kind in ("EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "IM", "DDS", "ICNS", "SPIDER"):
        source = Image.new("F" if kind == "SPIDER" else "RGB", (16, 16))
        with pytest.raises(
            UserError, match="is of none of the formats that are read.*; give a whole PNG, JPEG, TIFF"
        ):
            images.read_image(saved(source, kind))


def test_postscript_under_any_name_starts_no_program(tmp_path, monkeypatch):
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("a.png", "a.eps", "a.dcm", "a.jpg"):
        (tmp_path / name).write_bytes(saved(Image.new("RGB", (16, 16)), "EPS"))
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            images.read_image(tmp_path / name)
    assert not (tmp_path / "started").exists()


# --------------------------------------------------------------------------------------------------
# Depth, sign, colours
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [4095, 65535])
def test_sixteen_bit_grey_spans_its_twelve_or_sixteen_bits(tmp_path, top):
    deep = np.round(np.linspace(0, top, 1200)).astype(np.uint16).reshape(40, 30)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = images.read_image(tmp_path / "deep.png")
    assert image.dtype == np.uint8 and image.min() == 0 and image.max() == 255
    np.testing.assert_allclose(image[..., 1], deep / top * 255, atol=0.51)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bit_grey_is_white_by_its_depth_however_dark(kind, mode):
    deep = STEPS.astype(np.uint16) * 128  # at most half of 65535, and above twelve bits
    image = Image.frombytes(mode, (6, 4), deep.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    assert row(saved(image, kind)) == [0, 20, 40, 60, 80, 100]


def test_sixteen_bit_pnm_and_jpeg_2000_are_white_by_their_depth():
    dark = STEPS.astype(np.uint16)
    assert row(saved(Image.fromarray(dark.astype(np.int32)), "PPM")) == [0, 0, 0, 0, 1, 1]
    assert row(b"P5 6 1 4095\n" + (dark[0] * 8).astype(">u2").tobytes()) == [0, 20, 40, 60, 80, 100]
    assert row(saved(dark, "JPEG2000", irreversible=False)) == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 0.16, 0.32, 0.48, 0.64, 0.8]] * 4, np.float32),
        np.array([[-1000, -600, -200, 200, 600, 1000]] * 4, np.float32),
        np.array([[-1000, -600, -200, 200, 600, 1000]] * 4, np.int32),
        np.array([[0, 1 << 28, 2 << 28, 3 << 28, 4 << 28, 5 << 28]] * 4, np.int64),
        np.array([[-3e38, -1.8e38, -6e37, 6e37, 1.8e38, 3e38]] * 4, np.float32),
    ],
    ids=["unit", "hounsfield", "signed", "large", "huge"],
)
def test_float_and_signed_pictures_span_their_range(values):
    assert row(
        saved(Image.fromarray(values.astype(np.int32) if values.dtype == np.int64 else values), "TIFF")
    ) == [
        0,
        51,
        102,
        153,
        204,
        255,
    ]


@pytest.mark.parametrize("order", "<>")
def test_tiff_of_any_sign_and_order(order):
    sixteen = np.array([[-1000, -600, -200, 200, 600, 1000]] * 4)
    spread = [0, 51, 102, 153, 204, 255]
    for kind, bits in (("i2", 16), ("i4", 32)):
        assert row(tiff(sixteen.astype(order + kind).tobytes(), bits, 2, order=order)) == spread
    assert row(tiff(sixteen.astype(order + "f4").tobytes(), 32, 3, order=order)) == spread
    deep = (STEPS.astype(np.uint64) * 257).astype(order + "u2").tobytes()
    assert row(tiff(deep, 16, order=order)) == STEPS[0].tolist()
    unsigned = np.array([[0, 1, 2, 3, 4, 5]] * 4, np.uint64) * 858993459
    if order == "<":  # Pillow knows the other order of signed ones alone
        assert row(tiff(unsigned.astype("<u4").tobytes(), 32, order=order)) == spread
        assert row(tiff(deep, 16, photometric=0, order=order)) == (255 - STEPS[0]).tolist()
    assert row(tiff(STEPS.tobytes(), 8, photometric=0, order=order)) == (255 - STEPS[0]).tolist()


def test_float_pictures_with_no_number_and_without_a_range():
    values = np.array([[0, 1, np.nan, np.inf, -np.inf, 2]] * 4, np.float32)
    assert row(saved(Image.fromarray(values), "TIFF")) == [0, 128, 0, 255, 0, 255]
    assert row(saved(Image.fromarray(np.full((4, 6), 7, np.float32)), "TIFF")) == [0] * 6


def test_colours_of_other_modes_become_rgb():
    red = [[255, 0, 0]] * 2
    for mode in ("P", "CMYK", "YCbCr", "HSV"):
        kind = {"P": "PNG", "CMYK": "TIFF", "YCbCr": "TIFF", "HSV": None}[mode]
        image = Image.new("RGB", (2, 2), "red").convert(mode)
        if kind:
            assert np.abs(images.read_image(saved(image, kind))[0].astype(int) - red).max() <= 1
    one = Image.fromarray(np.array([[0, 255, 255, 0]] * 2, np.uint8)).convert("1")
    assert row(saved(one)) == row(saved(one, "TIFF")) == row(saved(one, "BMP")) == [0, 255, 255, 0]
    grey, lab = Image.new("RGB", (2, 2), (119, 119, 119)), ImageCms.createProfile("LAB")
    changed = ImageCms.profileToProfile(grey, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    assert np.abs(images.read_image(saved(changed, "TIFF")).astype(int) - 119).max() <= 1
    sixteen = saved(Image.new("RGB", (2, 2), (10, 20, 30)))
    assert images.read_image(sixteen)[0].tolist() == [[10, 20, 30]] * 2


def test_deep_colours_are_white_by_their_depth():
    dark = np.array([[0, 10, 20], [40, 50, 60]], ">u2") * 257
    assert images.read_image(png(2, 16, dark.tobytes(), 2))[0].tolist() == [[0, 10, 20], [40, 50, 60]]


@pytest.mark.parametrize(
    "file, right",
    {
        "LA": (saved(Image.fromarray(np.stack([STEPS * 0, STEPS], -1))), (255 - STEPS[0]).tolist()),
        "LA on grey": (png(4, 8, bytes([100, 255, 100, 0, 0, 255]), 3), [100, 255, 0]),
        "LA of 16 bits": (png(4, 16, bytes([100, 0, 255, 255, 100, 0, 0, 0]), 2), [100, 255]),
        "RGBA": (
            saved(
                np.array(
                    [[[10, 200, 30, 0], [250, 250, 250, 255], [100, 0, 0, 255], [0, 0, 0, 51]]], np.uint8
                )
            ),
            [255, 250, 100, 204],
        ),
        "RGBA in WebP": (
            saved(
                np.array([[[10, 200, 30, 0], [250, 250, 250, 255]]], np.uint8),
                "WEBP",
                lossless=True,
                exact=True,
            ),
            [255, 250],
        ),
        "RGBA in TIFF": (
            saved(np.array([[[10, 200, 30, 0], [250, 250, 250, 255]]], np.uint8), "TIFF"),
            [255, 250],
        ),
        "P": (
            png(
                3,
                8,
                bytes([0, 1, 2]),
                3,
                (b"PLTE", bytes([9, 9, 9, 100, 100, 100, 7, 7, 7])),
                (b"tRNS", b"\0\xff"),
            ),
            [255, 100, 7],
        ),
        "RGB with one clear colour": (
            png(2, 8, bytes([9, 9, 9, 8, 8, 8]), 2, (b"tRNS", b"\0\x09" * 3)),
            [255, 8],
        ),
        "L with one clear grey": (png(0, 8, bytes([9, 8]), 2, (b"tRNS", b"\0\x09")), [255, 8]),
        "L of 16 bits": (png(0, 16, bytes([0, 9, 255, 255]), 2, (b"tRNS", b"\xff\xff")), [0, 255]),
        "L of 16 bits, black": (
            png(0, 16, bytes([0, 9, 0x80, 0]), 2, (b"tRNS", b"\x00\x09")),
            [255, 128],
        ),
        "1": (png(0, 1, b"\x50", 4, (b"tRNS", b"\0\0")), [255, 255, 255, 255]),
    }.values(),
)
def test_what_is_transparent_shows_paper(file, right):
    assert row(file) == right


def test_transparent_gif_and_opaque_alpha():
    image = Image.fromarray(np.array([[0, 1, 2]] * 2, np.uint8), "P")
    image.putpalette([9, 9, 9, 100, 100, 100, 7, 7, 7])
    assert row(saved(image, "GIF", transparency=0)) == [255, 100, 7]
    rgba = np.concatenate(
        [np.random.default_rng(0).integers(0, 256, (9, 9, 3)), np.full((9, 9, 1), 255)], -1
    )
    np.testing.assert_array_equal(images.read_image(saved(rgba.astype(np.uint8))), rgba[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_pictures_are_turned_upright(kind, orientation, tmp_path):
    # Stored as a camera held that way would, its upright picture is always the same (EXIF 2.3, tag 274).
    upright = np.full((32, 48), 200, np.uint8)
    upright[:8, :16] = 0  # a dark corner at the top left, wider than high
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    (tmp_path / "held").write_bytes(saved(np.ascontiguousarray(stored), kind, exif=exif, **options))
    assert images.upright_size(tmp_path / "held") == (48, 32)
    image = images.read_image(tmp_path / "held")
    assert image.shape == (32, 48, 3)
    assert np.abs(image[..., 0].astype(int) - upright).max() < 12


def test_deep_and_transparent_pictures_are_turned_too():
    exif = Image.Exif()
    exif[274] = 3
    deep = STEPS.astype(np.uint16) * 257
    assert row(saved(deep, exif=exif)) == STEPS[0, ::-1].tolist()
    assert row(saved(np.stack([STEPS * 0, STEPS], -1), exif=exif)) == (255 - STEPS[0, ::-1]).tolist()
    bad = saved(STEPS, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert row(bad) == STEPS[0].tolist()


def test_first_page_and_first_picture_of_a_film():
    pages = [Image.fromarray(STEPS), Image.fromarray(255 - STEPS)]
    for kind in ("TIFF", "GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        file = saved(pages[0], kind, save_all=True, append_images=pages[1:], **options)
        assert row(file) == STEPS[0].tolist()


# --------------------------------------------------------------------------------------------------
# Files that are none, are damaged, or too large
# --------------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="of 0 bytes cannot be read .it is empty"):
        images.read_image(b"")


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, AttributeError, TypeError, MemoryError, KeyError]
)
def test_whatever_a_decoder_raises_is_one_sentence(error, monkeypatch):
    def raise_it(*_):
        raise error("Failed to\n decode frame 0")

    monkeypatch.setattr(images.Image, "open", lambda *_, **__: raise_it())
    with pytest.raises(
        UserError, match=r"image of \d+ bytes cannot be read \(.*Failed to.* decode frame 0"
    ):
        images.read_image(saved(STEPS))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "loop.png", tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for path, sentence in {
        tmp_path / "pipe.png": "pipe.png is a pipe or a device",
        "/dev/zero": "/dev/zero is a pipe or a device",
        "/dev/null": "/dev/null is a pipe or a device",
        tmp_path / "folder.png": "folder.png is a folder",
        tmp_path / "loop.png": "loop.png cannot be read .*[Ll]evels? of symbolic links",
        tmp_path / "file" / "a.png": "file/a.png does not exist",
        tmp_path / ("long" * 1250): r"lon\w*\.\.\.\w*longlong cannot be read \(File name too long\)",
        tmp_path / "no\0name": "cannot be read .*null",
        tmp_path / "half\ud800": "does not exist|cannot be read",
    }.items():
        for read in (images.read_image, images.read_bytes, images.upright_size):
            with pytest.raises(UserError, match=sentence) as caught:
                read(path)
            assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_no_permission_and_failing_disks_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(saved(STEPS))
    assert images.read_bytes(tmp_path / "a.png") == saved(STEPS)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.os, "open", fail)
    with pytest.raises(UserError, match=r"a.png cannot be read \(Permission denied\)"):
        images.read_image(tmp_path / "a.png")
    monkeypatch.undo()

    def disk(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(images, "_decoded", disk)
    with pytest.raises(UserError, match=r"a.png cannot be read \(Input/output error\)"):
        images.read_image(tmp_path / "a.png")


def test_files_too_large_for_a_data_set_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_FILE", 10)
    (tmp_path / "a.png").write_bytes(saved(STEPS))
    with pytest.raises(UserError, match="a.png has .* bytes, more than 10"):
        images.read_bytes(tmp_path / "a.png")


@pytest.mark.parametrize(
    "width, height", [(13000, 13000), (8193, 8192), (1 << 20, 1), (2, 70000), (2**31 - 1, 2**31 - 1)]
)
def test_large_pictures_are_refused_by_their_header(width, height):
    file = bytearray(saved(STEPS))
    file[16:24] = struct.pack(">LL", width, height)
    file[29:33] = struct.pack(">L", zlib.crc32(bytes(file[12:29])))
    with pytest.raises(UserError, match=f"has {width} x {height} pixels|exceeds limit"):
        images.read_image(bytes(file))


def test_progressive_jpeg_of_too_many_scans_is_refused():
    file = saved(RAMP, "JPEG", progressive=True)
    np.testing.assert_allclose(images.read_image(file)[..., 0], RAMP, atol=20)
    last = file.rindex(b"\xff\xda")
    with pytest.raises(UserError, match=r"has \d+ scans, more than the 64"):
        images.read_image(file[:last] + file[last:-2] * 99 + file[-2:])


def test_decoders_say_nothing_on_the_screen(capfd):
    from support.dicom_files import dicom_file

    files = {
        "frames.dcm": dicom_file(RAMP, PixelData=RAMP.tobytes() * 3 + b"\1" * 7, NumberOfFrames=0),
        "nan.dcm": dicom_file(RAMP, WindowCenter="5", WindowWidth="7").replace(
            b"DS\2\x007 ", b"DS\2\x00x "
        ),
        "cut.dcm": dicom_file(
            RAMP,
            "1.2.840.10008.1.2.4.50",
            PixelData=b"\xfe\xff\0\xe0\0\0\0\0\xfe\xff\0\xe0\4\0\0\0\xff\xd8\xff\xd9",
        ),
        "cut.tif": saved(RAMP, "TIFF", compression="tiff_lzw")[:-30],
        "odd.tif": tiff(RAMP.tobytes(), 8, samples=9),
        "wide.png": saved(Image.new("L", (12000, 8000))),
        "cut.jpg": saved(RAMP, "JPEG")[:-300],
    }
    logged = logging.StreamHandler(io.StringIO())  # what absl, for one, adds to the root logger
    logging.getLogger().addHandler(logged)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        images._silence_decoders()  # pytest has put filters of its own before those of the import
        for data in files.values():
            with contextlib.suppress(UserError):
                images.read_image(data)
    assert [str(one.message) for one in said] == []
    logging.getLogger().removeHandler(logged)
    assert logged.stream.getvalue() == ""
    assert capfd.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------
# The encoder's size
# --------------------------------------------------------------------------------------------------


def test_resize_is_antialiased_bicubic_to_a_square():
    noise = np.random.default_rng(0).integers(0, 256, (200, 100, 3), dtype=np.uint8)
    small = fitting.resize(noise, 10)
    assert small.shape == (10, 10, 3) and small.dtype == np.uint8
    assert small.std() < noise.std() / 4  # without antialiasing the spread would stay
    np.testing.assert_array_equal(fitting.resize(small, 10), small)


VISION = VisionConfig(image_size=32)


@pytest.mark.parametrize("shape", [(200, 100), (3, 700), (32, 32), (1500, 20)])
def test_ordinary_pictures_fit_as_published(shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    fill = tuple(int(255 * mean) for mean in VISION.mean)
    long = max(shape)
    padded = ImageOps.pad(Image.fromarray(noise), (long, long), color=fill, centering=(0.5, 0.5))
    right = np.asarray(padded.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(fitting.fit(noise, "pad", VISION).astype(int), right, atol=2)
    scale = 32 / min(shape)
    whole = Image.fromarray(noise).resize(
        (int(shape[1] * scale), int(shape[0] * scale)), Image.Resampling.BICUBIC
    )
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    right = np.asarray(whole.crop((left, top, left + 32, top + 32)))
    np.testing.assert_array_equal(fitting.fit(noise, "crop", VISION), right)


@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1), (3, 9000)])
def test_strips_fit_in_bounded_memory(shape, monkeypatch):
    made = []
    whole, plain = np.full, Image.Image.resize
    monkeypatch.setattr(np, "full", lambda size, *rest: made.append(np.prod(size)) or whole(size, *rest))
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *rest: made.append(np.prod(size)) or plain(self, size, *rest),
    )
    monkeypatch.setattr(fitting, "MOST_PIXELS", 1 << 18)  # a side of 512
    strip = np.full((*shape, 3), 250, np.uint8)
    made.clear()
    for how in ("pad", "crop", "stretch"):
        image = fitting.fit(strip, how, VISION)
        assert image.shape == (32, 32, 3)
        assert how == "pad" or (image == 250).all()
    assert max(made) <= 3 << 18
    padded = fitting.fit(strip, "pad", VISION)
    middle, edge = (padded[16], padded[0]) if shape[0] < shape[1] else (padded[:, 16], padded[:, 0])
    assert middle.mean() > edge.mean() + 3 and edge.std(0).max() == 0


def test_a_tiff_of_too_many_pages_is_refused_before_they_are_counted(tmp_path, monkeypatch):
    """Pillow needs longer for each page than for the one before: 32,000 of them took 19 seconds."""
    pages = [Image.fromarray(np.full((4, 5), value, np.uint8)) for value in range(6)]
    file = tmp_path / "film.tif"
    pages[0].save(file, save_all=True, append_images=pages[1:])
    assert (images.read_image(file) == 0).all()
    assert (images.read_image(file, ImageConfig(frame=5)) == 5).all()
    monkeypatch.setattr(images, "MOST_PAGES", 5)
    with pytest.raises(UserError, match="image .*film.tif has more than 5 pages"):
        images.read_image(file, ImageConfig(frame=5))
    for header in (images.check_header, images.read_header):  # whichever page is wanted
        with pytest.raises(UserError, match="image sent has more than 5 pages"):
            header(file.read_bytes(), "sent")
    monkeypatch.setattr(images, "MOST_PAGES", 6)
    assert (images.read_image(file, ImageConfig(frame="last")) == 5).all()
