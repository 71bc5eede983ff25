"""How a source's pictures are read: frame, window and background, and what they do to a data set."""

import argparse
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from support.dicom_files import dicom_file, item
from support.reading import everything, left_out, opened

from unimed_jax.config import Config, DataConfig, ImageConfig, ReencodeConfig, SourceConfig, Window
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.dicom_display import WINDOWS
from unimed_jax.data.image_shards import encoded, may_be_cut
from unimed_jax.data.images import check_header, read_image, upright_size
from unimed_jax.data.store import Store
from unimed_jax.errors import UserError
from unimed_jax.predict import request
from unimed_jax.settings import from_config_dict
from unimed_jax.verbs.predict import _view

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom
LEVELS = (0, 60, 120, 180, 240)  # of the frames of a film
JPEG, RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.5"


def saved(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def film(kind: str) -> bytes:
    frames = [Image.new("L", (8, 6), level) for level in LEVELS]
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def rle(level: int) -> bytes:
    """A frame of 6 x 8 equal bytes: one segment, one run (PS3.5 G)."""
    return b"".join(n.to_bytes(4, "little") for n in (1, 64, *[0] * 14)) + bytes([257 - 48, level])


def dicom_film(kind: str) -> bytes:
    frames = [np.full((6, 8), level, np.uint8) for level in LEVELS]
    if kind == "native":
        return dicom_file(frames[0], PixelData=b"".join(f.tobytes() for f in frames), NumberOfFrames=5)
    if kind == "rle":
        parts, syntax, more = [rle(level) for level in LEVELS], RLE, {"has_bot": False}
    else:
        parts = [saved(Image.fromarray(frame), "JPEG", quality=100) for frame in frames]
        syntax, more = JPEG, {"has_bot": kind == "table", "fragments_per_frame": 1 + (kind == "pieces")}
    return dicom_file(frames[0], syntax, PixelData=encapsulate(parts, **more), NumberOfFrames=5)


FILMS = {
    **{kind: film(kind) for kind in ("TIFF", "GIF", "PNG", "WEBP")},
    **{f"dicom {kind}": dicom_film(kind) for kind in ("native", "rle", "table", "plain", "pieces")},
}


@pytest.mark.parametrize("kind", FILMS)
def test_the_frame_that_is_asked_for_is_read(kind):
    wanted = {None: 0, "first": 0, "middle": 120, "last": 240} | dict(enumerate(LEVELS))
    for frame, level in wanted.items():
        view = ImageConfig(frame=frame)
        found = read_image(FILMS[kind], view)
        assert found.shape == (6, 8, 3) and np.abs(found.astype(int) - level).max() <= 1, frame
        assert check_header(FILMS[kind], "film", view) == 5
    for read in (read_image, lambda data, view: check_header(data, "film", view)):
        with pytest.raises(UserError, match=r"has 5 frames, counted from 0, so it has no frame 5"):
            read(FILMS[kind], ImageConfig(frame=5))


def test_pages_of_other_sizes_and_depths_are_read_as_they_are():
    deep = Image.fromarray(np.array([[0, 65535, 32768]], np.uint16))
    file = saved(Image.new("L", (8, 6)), "TIFF", save_all=True, append_images=[deep])
    assert read_image(file, ImageConfig(frame=1))[0, :, 0].tolist() == [0, 255, 128]
    alone = saved(Image.new("L", (8, 6), 9), "PNG")
    for frame in ("first", "middle", "last", 0):
        np.testing.assert_array_equal(read_image(alone, ImageConfig(frame=frame)), read_image(alone))
    with pytest.raises(UserError, match="has 1 frame, counted"):
        read_image(alone, ImageConfig(frame=1))


def test_a_frame_behind_too_many_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("unimed_jax.data.images._COMPOSED", 3 * 48)
    assert read_image(FILMS["GIF"], ImageConfig(frame=2)).max() == 120
    with pytest.raises(UserError, match="frame 4 takes too long to reach"):
        read_image(FILMS["GIF"], ImageConfig(frame="last"))
    assert read_image(FILMS["TIFF"], ImageConfig(frame="last")).max() == 240  # its pages stand alone


def test_frames_of_single_bits_follow_each_other_without_a_gap():
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (5, 3, 7), dtype=np.uint8)  # 21 bits each
    data = np.packbits(masks.reshape(-1), bitorder="little").tobytes()
    fields = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "NumberOfFrames": 5}
    file = dicom_file(masks[0], PixelData=data + b"\0" * (len(data) % 2), **fields)
    for number, mask in enumerate(masks):
        found = read_image(file, ImageConfig(frame=number))[..., 0]
        np.testing.assert_array_equal(found, 255 * mask)


def test_a_frame_has_the_window_of_its_own_group():
    stored = np.array([[0, 50, 100, 150]], np.uint8)
    groups = [item(FrameVOILUTSequence=[item(WindowCenter=c, WindowWidth=2)]) for c in (25, 75, 125)]
    fields = {"PerFrameFunctionalGroupsSequence": groups, "NumberOfFrames": 3}
    file = dicom_file(stored, PixelData=stored.tobytes() * 3, **fields)
    for number in range(3):
        right = [0] * (number + 1) + [255] * (3 - number)
        assert read_image(file, ImageConfig(frame=number))[0, :, 0].tolist() == right


# ---- windows ---------------------------------------------------------------------------------------
UNITS = np.array([[-1024, -600, 0, 40, 60, 300, 3000]], np.int16)
CT = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
ENHANCED = item(
    PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")]
)


def ct(**fields) -> bytes:
    return dicom_file((UNITS + 1024).astype(np.uint16), **fields)


def test_every_named_window_is_there():
    assert set(WINDOWS) == set(Window.__args__)


@pytest.mark.parametrize("name", [*WINDOWS, (0, 100)])
def test_a_window_maps_hounsfield_units_as_the_standard_says(name):
    centre, width = WINDOWS.get(name, name)
    right = np.round(255 * np.clip((UNITS - (centre - 0.5)) / (width - 1) + 0.5, 0, 1))[0]
    own = {"WindowCenter": 2000, "WindowWidth": 10}  # which the setting replaces
    for file in (
        ct(**CT, **own),
        ct(**CT, RescaleType="HU", **own),
        ct(Modality="CT", SharedFunctionalGroupsSequence=[ENHANCED]),
        dicom_file(UNITS, Modality="CT", RescaleSlope=1, RescaleIntercept=0),
    ):
        assert read_image(file, ImageConfig(window=name))[0, :, 0].tolist() == right.tolist()
    turned = ct(**CT, PhotometricInterpretation="MONOCHROME1")
    found = read_image(turned, ImageConfig(window=name))[0, :, 0].astype(int)
    assert np.abs(found + right - 255).max() <= 1


def test_a_dicom_file_has_a_size_by_its_header(tmp_path):
    """So that boxes in pixels fit it, too."""
    (tmp_path / "scan").write_bytes(dicom_film("table"))
    assert upright_size(tmp_path / "scan") == (8, 6)


def test_the_brain_window_by_hand():
    """From 0 (black) to 80 (white) Hounsfield units, all but half a unit."""
    assert read_image(ct(**CT), ImageConfig(window="brain"))[0, :, 0].tolist() == [
        *(0, 0, 0, 129, 194, 255, 255)
    ]


NO_UNITS = {
    "MR": ct(**CT | {"Modality": "MR"}),
    "no modality": ct(**CT | {"Modality": None}),
    "no rescale": ct(Modality="CT"),
    "other units": ct(**CT, RescaleType="US"),
    "empty rescale": ct(Modality="CT", RescaleSlope=None, RescaleIntercept=""),
}


@pytest.mark.parametrize("case", NO_UNITS)
def test_a_named_window_needs_hounsfield_units(case):
    for read in (read_image, lambda data, view: check_header(data, "x", view)):
        with pytest.raises(UserError, match="is not CT with a rescale to Hounsfield units.*'brain'"):
            read(NO_UNITS[case], ImageConfig(window="brain"))
        read(NO_UNITS[case], ImageConfig(window=(40, 80)))  # in whatever units they are


def test_a_window_fits_grey_dicom_alone():
    colour = dicom_file(np.zeros((4, 4, 3), np.uint8), **CT)
    for file, words in ((colour, "has the colours RGB"), (saved(Image.new("L", (4, 4))), "is PNG")):
        for read in (read_image, lambda data, view: check_header(data, "x", view)):
            with pytest.raises(UserError, match=words):
                read(file, ImageConfig(window=(40, 80)))


# ---- what shows through ----------------------------------------------------------------------------
def test_the_background_lies_behind_what_is_transparent():
    half = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    half.putpixel((2, 0), (200, 0, 0, 128))
    deep = Image.fromarray(np.array([[0, 7, 65535]], np.uint16))
    files = [saved(half), saved(half, "TIFF"), saved(half.convert("LA")), saved(deep, transparency=7)]
    for given, colour in (("white", [255] * 3), ("black", [0] * 3), ((9, 80, 200), [9, 80, 200])):
        for file in files:
            found = read_image(file, ImageConfig(background=given))[0]
            assert found[0].tolist() == [0] * 3 and found[1].tolist() == colour
        mixed = read_image(files[0], ImageConfig(background=given))[0, 2]
        right = np.array([200, 0, 0]) * (128 / 255) + np.array(colour) * (127 / 255)
        assert np.abs(mixed - right).max() <= 1
    np.testing.assert_array_equal(read_image(files[0]), read_image(files[0], ImageConfig()))


# ---- sets ------------------------------------------------------------------------------------------
@pytest.fixture
def lab(tmp_path):
    """A set of three pictures: a TIFF of five pages, a CT slice of DICOM, and a clear PNG."""
    folder = tmp_path / "lab"
    (folder / "images").mkdir(parents=True)
    names = {
        "pages.tif": FILMS["TIFF"],
        "slice.dcm": ct(**CT),
        "clear.png": saved(Image.new("RGBA", (8, 6))),
    }
    records = []
    for split in ("train", "test"):
        for name, data in names.items():
            (folder / "images" / name).write_bytes(data)
            about = {"id": f"{split}/{name}", "images": [f"images/{name}"], "split": split}
            records.append(about | {"task": "vqa", "question": "What?", "answer": name})
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_settings_are_part_of_the_set(lab, tmp_path, capsys):
    plain = opened(lab, "jsonl")
    assert "jsonl: 1 images have several frames or pages, of which the first is read" in (
        capsys.readouterr().out
    )
    again = opened(lab, "jsonl", image=ImageConfig())
    assert again.folder == plain.folder and again.checksum == plain.checksum
    views = [ImageConfig(frame="last"), ImageConfig(frame="first"), ImageConfig(background="black")]
    others = [opened(lab, "jsonl", image=view) for view in views]
    assert "several frames" in capsys.readouterr().out  # of the one that leaves the frame open
    assert len({data.checksum for data in (plain, *others)}) == 4
    assert len({data.folder for data in (plain, *others)}) == 4
    assert [data.image("images/pages.tif").max() for data in (plain, *others)] == [0, 240, 0, 0]
    assert [data.image("images/clear.png").max() for data in (plain, *others)] == [255, 255, 255, 0]
    for data, view in zip(others, views, strict=True):
        assert data.skipped == 0 and everything(data) == everything(plain)
        alone = Store(data.folder)  # as the audit opens it, in processes of its own
        assert alone.image_settings == view and alone.image("images/pages.tif").shape == (6, 8, 3)


def test_what_the_settings_do_not_fit_is_left_out_by_name(lab):
    for view, lost in (
        (ImageConfig(frame=1), {"slice.dcm": "has 1 frame,", "clear.png": "has 1 frame,"}),
        (ImageConfig(window="brain"), {"pages.tif": "is TIFF", "clear.png": "is PNG"}),
    ):
        data = opened(lab, "jsonl", image=view)
        lines = left_out(data)
        assert data.skipped == len(lines) == 4 and len(everything(data)) == 2
        for line, (name, words) in zip(lines, [*lost.items()] * 2, strict=True):
            assert f"images/{name} {words}" in line
    with pytest.raises(UserError, match=r"has no example .*6 records left out: .*has no frame 7"):
        opened(lab, "jsonl", image=ImageConfig(frame=7))


def test_two_sources_with_other_settings_are_two_sets(lab, tmp_path):
    def pixels(*sources):
        data = DataConfig(sources, cache=str(tmp_path / "cache"))
        return [found.image("images/pages.tif").max() for found in open_sources(data)]

    one = SourceConfig("jsonl", "one", str(lab), image=ImageConfig(frame=1))
    assert pixels(one, SourceConfig("jsonl", "two", str(lab), image=ImageConfig(frame=2))) == [60, 120]
    with pytest.raises(UserError, match="two data sets have the id 'one'.*image settings"):
        pixels(one, SourceConfig("jsonl", "one", str(lab)))


def test_settings_are_read_from_a_config_and_its_json(lab):
    given = {"frame": "middle", "window": [40, 80], "background": [0, 1, 2]}
    config = from_config_dict({"data": {"sources": [{"name": "jsonl", "image": given}]}})
    right = ImageConfig("middle", (40.0, 80.0), (0, 1, 2))
    assert config.data.sources[0].image == right
    again = from_config_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    for wrong, words in (
        ({"frame": -1}, "image.frame=-1: set at least 0"),
        ({"frame": "secnd"}, "image.frame: 'secnd' is unknown; choose from first, middle, last"),
        ({"frame": True}, "image.frame: True is unknown"),
        ({"window": "brian"}, "image.window: 'brian' is unknown; choose from abdomen"),
        ({"window": (40,)}, "image.window must have 2 entries, not 1"),
        ({"window": (40, 0)}, r"image.window\[1\]=0.0: set at least"),
        ({"background": (0, 0, 256)}, r"image.background\[2\]=256: set 0 to 255"),
        ({"widow": "brain"}, "image.widow is not a setting; did you mean 'window'"),
    ):
        with pytest.raises(UserError, match=words):
            from_config_dict({"data": {"sources": [{"name": "jsonl", "image": wrong}]}})


def test_predict_reads_images_as_the_sources_do(capsys):
    brain, lung = (SourceConfig(image=ImageConfig(window=name)) for name in ("brain", "lung"))

    def view(*sources, frame=None, window=None):
        known = argparse.Namespace(image=["x"], frame=frame, window=window)
        return _view(known, DataConfig(sources))

    assert view() == ImageConfig() and view(brain, brain) == brain.image
    assert view(brain, frame="3") == ImageConfig(3, "brain")
    assert view(brain, frame="last", window="40,80") == ImageConfig("last", (40.0, 80.0))
    assert view(brain, lung, window="lung") == lung.image and not capsys.readouterr().err
    assert view(brain, lung) == ImageConfig() and "by different settings" in capsys.readouterr().err
    for wrong, words in (
        ({"frame": "-1"}, "--frame: '-1' is unknown"),
        ({"window": "1,2,3"}, "--window"),
    ):
        with pytest.raises(UserError, match=words):
            view(**wrong)


def test_a_request_is_read_as_the_sources_are():
    """Whoever answers and is given a file, not pixels, reads it by the run's settings."""
    config = Config(data=DataConfig((SourceConfig(image=ImageConfig(frame="last")),)))
    tokenizer = SimpleNamespace(bos=1, eos=2, encode=lambda text: [3])
    prompts = request.Prompts(config, tokenizer)
    images = (FILMS["TIFF"], read_image(FILMS["TIFF"]))
    prompt = prompts(request.Request("vqa", "What?", images))
    assert [pixels.max() for pixels in prompts.pixels(prompt)] == [240, 0]


# ---- files that broke off --------------------------------------------------------------------------
def whole_pictures() -> dict[str, bytes]:
    """Writes a picture of noise in every format, so that its end holds pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    picture = Image.fromarray(noise)
    kinds = {
        **{kind: saved(picture, kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")},
        "JPEG2000": saved(picture, "JPEG2000"),
        "TIFF in strips": saved(picture, "TIFF", compression="tiff_lzw", strip_size=500),
        "JPEG, padded": saved(picture, "JPEG") + bytes(8),
        "progressive JPEG": saved(picture, "JPEG", progressive=True),
    }
    grey = noise[..., 0]
    packed = encapsulate([saved(Image.fromarray(grey), "JPEG", quality=100)])
    return kinds | {
        "DICOM": dicom_file(grey),
        "DICOM, implicit": dicom_file(grey, "1.2.840.10008.1.2"),
        "DICOM, JPEG": dicom_file(grey, JPEG, PixelData=packed),
    }


WHOLE = whole_pictures()


@pytest.mark.parametrize("kind", WHOLE)
def test_a_picture_that_broke_off_is_left_out_when_the_set_is_prepared(kind, tmp_path):
    file, broken = tmp_path / "picture", 0
    for part in (0.3, 0.5, 0.8, 0.95, 1):
        file.write_bytes(WHOLE[kind][: int(part * len(WHOLE[kind]))])
        try:
            read_image(file)
            right = ""
        except UserError as error:
            right = str(error).rstrip(".")
        for source in (file, file.read_bytes()):
            reason = encoded("key", source, ImageConfig(), ReencodeConfig())[0].reason
            assert bool(reason) == bool(right), part
        broken += bool(right)
    assert not right and broken >= 3
    assert may_be_cut(WHOLE[kind]) == (kind == "PPM")  # no other whole picture is decoded


def test_a_compressed_frame_without_an_end_is_cut_whatever_the_decoder():
    """Some decoders fill up what is missing, others fail; neither is asked."""
    data = WHOLE["DICOM, JPEG"]
    assert read_image(data).shape == (40, 48, 3)
    for end in (data.rindex(b"\xff\xd9"), len(data) // 2):
        with pytest.raises(UserError, match="is cut: its compressed pixels have no end"):
            read_image(data[:end])


def test_a_set_goes_on_without_the_picture_that_broke_off(tmp_path):
    picture = WHOLE["JPEG"]
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder := tmp_path / "set" / split / label).mkdir(parents=True)
            (folder / "1.jpg").write_bytes(picture)
    (tmp_path / "set/train/a/2.jpg").write_bytes(picture[: len(picture) // 2])
    data = opened(tmp_path / "set", "classes")
    assert len(list(everything(data))) == 4
    assert len(left_out(data)) == 1 and "2.jpg" in left_out(data)[0] and "truncated" in left_out(data)[0]
