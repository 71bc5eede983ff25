"""SA-Med2D-20M: boxes from masks, the full release beside boxes, seeded subsets, and damage."""

import json
import os
import re
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image
from support.reading import everything, left_out, opened

from unimed_jax import main as cli
from unimed_jax.data import masks
from unimed_jax.data.archives import packed
from unimed_jax.data.datasets.samed import OPTIONS, release, scenes
from unimed_jax.data.datasets.samed.names import parse, parse_mask
from unimed_jax.data.store import pack
from unimed_jax.data.twins import write_twin
from unimed_jax.errors import UserError

ROOT = "SAMed2Dv1"
CLASSES = f"{ROOT}/{release.CLASSES}"
FIRST = "ct_00--AbdomenCT1K--Case_00000--x_0000"
SECOND = "ct_00--AbdomenCT1K--Case_00000--x_0001"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("release") / "set"
    write_twin("samed", place, records=18, layout="release")
    return place


@pytest.fixture
def twin(made, tmp_path):
    return shutil.copytree(made, tmp_path / "set")


def packed_examples(data):
    return [(split, pack(example)) for split, example in everything(data)]


def chosen(folder, **options):
    return {scene.key: scene.things for scene in scenes(folder, OPTIONS | options, [])}


def test_parts_of_a_mask_are_boxes():
    mask = np.zeros((20, 30), bool)
    mask[2:6, 3:9] = mask[6:8, 9:12] = True  # they touch at a corner only: one thing
    mask[10:15, 0:2] = True
    mask[12, 20] = mask[19, 29] = True  # specks
    assert masks.parts(mask, 10) == ([(3, 2, 12, 8), (0, 10, 2, 15)], 2)
    assert masks.parts(mask, 11) == ([(3, 2, 12, 8)], 3)
    assert masks.parts(mask, 1)[1] == 0 and len(masks.parts(mask, 1)[0]) == 4
    assert masks.parts(np.zeros((3, 3), bool), 1) == ([], 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "I;16", "RGB", "RGBA", "LA", "values of one"])
def test_masks_of_every_mode_read_alike(tmp_path, mode):
    truth = np.zeros((9, 7), bool)
    truth[2:5, 1:4] = True
    grey = Image.fromarray(truth.astype(np.uint8) * (1 if mode in ("values of one", "P") else 255))
    image = Image.fromarray(truth.astype(np.uint16)) if mode == "I;16" else grey
    if mode == "P":
        image.putpalette([200, 0, 0, 0, 0, 0])  # the background's colour is no black
        image.mode == "P" or pytest.fail(image.mode)
    elif mode not in ("values of one", "I;16"):
        image = image.convert(mode)
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(masks.read_mask(tmp_path / "mask.png"), truth)


def test_names_say_modality_case_and_class():
    assert parse(FIRST) == ("ct", "AbdomenCT1K", "Case_00000")
    for name, modality in (
        ("x_ray--sz_cxr--a--2d_none", "x_ray"),
        ("mr_t1ce--BraTS--a--z_1", "mr"),
        ("fundus_photography--gamma--a--2d_none", "fundus"),
    ):
        assert parse(name).modality == modality
    assert parse("ct_00--A--1.3.6--b--z_0288").case == "1.3.6--b"
    assert parse("ct_00--A--z_0288") is None and parse("ct_00--A----z_1") is None
    assert parse_mask(f"{FIRST}--0011_002") == (FIRST, 11, 2)
    for other in (FIRST, f"{FIRST}--0011", f"{FIRST}--0011_x", f"{FIRST}--²_1", "--1_2"):
        assert parse_mask(other) is None, other


def test_the_full_release_gives_the_same_examples_as_its_boxes(tmp_path, twin):
    write_twin("samed", tmp_path / "boxes", records=18, layout="regions")
    whole, boxes = opened(twin, "samed"), opened(tmp_path / "boxes", "samed", id="boxes")
    inner = opened(twin / ROOT, "samed", id="inner")
    assert packed_examples(whole) == packed_examples(boxes) == packed_examples(inner)
    for key in {key for _, example in everything(whole) for key in example.images}:
        np.testing.assert_array_equal(whole.image(key), boxes.image(key))
    lost = left_out(whole)
    assert sum("part of less than 25 pixels (option `least_area`)" in line for line in lost) == 5
    assert any(re.search(rf"{SECOND}: mask \d{{4}}_099 is empty", line) for line in lost)
    assert "train: masks: 1 that unite other classes (option `unions`)" in lost
    assert len(lost) == 7 and not left_out(boxes)
    united = opened(twin, "samed", id="united", options={"unions": True, "least_area": 1})
    assert {e.meta["class"] for _, e in everything(united)} > {
        e.meta["class"] for _, e in everything(whole)
    }
    assert not any("unions" in line or "least_area" in line for line in left_out(united))


def test_a_subset_depends_on_names_options_and_seed_alone(tmp_path, twin, monkeypatch):
    for name in "bac":
        _small(twin / ROOT / f"images/{name}.png")
    lost, again = [], []
    whole = {scene.key: scene.things for scene in scenes(twin, OPTIONS, lost)}
    one = chosen(twin, per_class=2, seed=3)
    listing = release._stems
    monkeypatch.setattr(release, "_stems", lambda *a: iter(sorted(listing(*a), key=lambda n: n[::-1])))
    assert chosen(twin, per_class=2, seed=3) == one != chosen(twin, per_class=2, seed=4)
    list(scenes(twin, OPTIONS, again))
    capped = chosen(twin, per_modality=3)
    assert lost == again  # whatever the order in which the disk lists the files
    monkeypatch.undo()
    of_class = {}
    for key, things in one.items():
        for label in {thing.label for thing in things}:
            of_class.setdefault((key.split("/")[0], label), set()).add(key)
            # An image keeps all things of a class for which it was drawn: what is unique stays unique.
            assert [t for t in things if t.label == label] == [t for t in whole[key] if t.label == label]
    assert {len(keys) for keys in of_class.values()} == {2}
    few = chosen(twin, per_modality=3)
    assert few == capped
    assert {m: sum(key.startswith(m) for key in few) for m in ("ct", "mr")} == {"ct": 3, "mr": 3}
    assert all(few[key] == whole[key] for key in few)
    assert set(few) < set(chosen(twin, per_modality=5))  # a larger choice holds the smaller one
    both = chosen(twin, per_modality=3, per_class=1)
    assert set(both) <= set(few)
    cases = {key: key.split("--")[2] for key in whole}
    half = chosen(twin, fraction=0.5)
    taken = {cases[key] for key in half}
    assert 0 < len(taken) < 6 and set(half) == {key for key in whole if cases[key] in taken}
    assert {key[:2] for key in chosen(twin, modalities=["mr"])} == {"mr"}
    assert {key[:2] for key in chosen(twin, without=["CHAOS_Task_4"])} == {"ct"}
    named = chosen(twin, classes=["left kidney", "spleen"])
    assert {t.label for things in named.values() for t in things} == {"left kidney", "spleen"}


def test_a_subset_is_written_with_its_table_and_reads_the_same(tmp_path, twin, capsys):
    out = tmp_path / "part"
    arguments = [f"--path={twin}", f"--out={out}", "--seed=3", "--per_class=2", "--without=None_such"]
    assert cli.main(["data", "subset", *arguments]) == 0
    printed = capsys.readouterr().out
    options = {"seed": 3, "per_class": 2}
    direct = opened(twin, "samed", options=options)
    written = opened(out, "samed", id="part", options={"seed": 3})
    assert packed_examples(direct) == packed_examples(written)
    table = [line.split(",") for line in (out / "subset.csv").read_text().splitlines()]
    found = {(row[0], row[1]): [int(n) for n in row[2:]] for row in table[1:]}
    asked = [e for _, e in everything(direct) if e.task == "identify"]
    for (modality, label), (cases, images, boxes) in found.items():
        some = [
            e
            for e in asked
            if modality in ("(all)", e.meta["modality"]) and label in ("(all)", e.meta["class"])
        ]
        assert (len({e.cluster for e in some}), len({e.images for e in some}), len(some)) == (
            cases, images, boxes,
        )  # fmt: skip
        assert re.search(rf"{re.escape(label)} +{cases} cases +{images} images +{boxes} boxes", printed)
    assert table[0] == ["modality", "class", "cases", "images", "boxes"]
    assert {label for _, label in found} == {"(all)", *(e.meta["class"] for e in asked)}
    assert json.loads((out / "subset.json").read_text())["per_class"] == 2
    assert [f"train: {line}" for line in (out / "skipped.txt").read_text().splitlines()] == left_out(
        direct
    )
    assert cli.main(["data", "subset", *arguments]) == 2 and "exists already" in capsys.readouterr().err
    other = [f"--path={twin}", f"--out={tmp_path / 'x'}", "--modalities=mr", "--classes=spleen"]
    assert cli.main(["data", "subset", *other]) == 2
    assert "option classes of samed names 'spleen', of which no chosen image" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def _json(change):
    def damage(folder):
        content = json.loads((folder / CLASSES).read_text())
        (folder / CLASSES).write_text(json.dumps(change(content)))

    return damage


def _mask(folder):
    return sorted((folder / ROOT / "masks").glob(f"{SECOND}--*"))[0]


def _small(path):
    Image.fromarray(np.ones((9, 9), np.uint8)).save(path)


SKIPPED = {
    "a class of no number": (
        _json(
            lambda c: {**c, "AbdomenCT1K": {k: v for k, v in c["AbdomenCT1K"].items() if k != "liver"}}
        ),
        "mask 0000_00. has no class 0 of its set|SAMed2D_v1_class_mapping_id.json has no class 0",
    ),
    "a number of two classes": (
        _json(lambda c: {**c, "AbdomenCT1K": {**c["AbdomenCT1K"], "other": 0}}),
        "has no class 0 of its set, or several",
    ),
    "a set of no classes": (
        _json(lambda c: {k: v for k, v in c.items() if k != "CHAOS_Task_4"}),
        "mr_t1--CHAOS_Task_4.*: mask 000._00.: .* has no class . of its set",
    ),
    "a mask of another size": (
        lambda p: _small(_mask(p)),
        "mask .* has 9 x 9 pixels, its image 64 x 48",
    ),
    "a mask without bytes": (
        lambda p: _mask(p).write_bytes(b""),
        "mask .* cannot be used .*it is empty",
    ),
    "a mask that is cut": (
        lambda p: _mask(p).write_bytes(_mask(p).read_bytes()[:-30]),
        "mask .* cannot be used",
    ),
    "a missing image": (
        lambda p: (p / ROOT / f"images/{SECOND}.png").unlink(),
        f"{SECOND}: there is no image of mask",
    ),
    "an image without masks": (
        lambda p: [path.unlink() for path in (p / ROOT / "masks").glob(f"{SECOND}--*")],
        f"ct/{SECOND}: it has no mask",
    ),
    "an image without bytes": (
        lambda p: (p / ROOT / f"images/{SECOND}.png").write_bytes(b""),
        f"ct/{SECOND}: image .* cannot be read .it is empty",
    ),
    "an image of another name": (
        lambda p: _small(p / ROOT / "images/thumb.png"),
        "thumb: its name is not <modality>--<set>--<case>--<slice>",
    ),
    "a mask of another name": (
        lambda p: _small(p / ROOT / f"masks/{FIRST}.png"),
        f"{FIRST}: no mask's name",
    ),
    "a name of no characters": (
        lambda p: _small(p / ROOT / os.fsdecode(b"images/ct_00--A--\xff--x_1.png")),
        r"images/ct_00--A--.udcff--x_1.png: its name is no text",
    ),
    "another file": (
        lambda p: (p / ROOT / "masks/notes.txt").write_text("x"),
        "masks/notes.txt: no PNG",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_cannot_be_used_is_counted_by_name(twin, case):
    damage, match = SKIPPED[case]
    before = []
    whole = list(scenes(twin, OPTIONS, before))
    damage(twin)
    after = []
    found = list(scenes(twin, OPTIONS, after))
    new = [line for line in after if line not in before]
    assert new and all(re.search(match, line) for line in new), (new, match)
    assert found and sum(len(s.things) for s in found) <= sum(len(s.things) for s in whole)


REFUSED = {
    "no table of classes": (
        lambda p: (p / CLASSES).unlink(),
        {},
        "mapping_id.json does not exist; get it",
    ),
    "a list": (_json(lambda c: [1]), {}, "'' holds .1.; give {set: {class: number}}"),
    "a list of classes": (_json(lambda c: {**c, "A": ["x"]}), {}, "'A' holds .'x'.; give"),
    "a number in words": (
        _json(lambda c: {**c, "A": {"x": "one"}}),
        {},
        "class 'x' of 'A' is 'one'; give",
    ),
    "a fraction of nothing": (None, {"fraction": 0.0}, "fraction=0.0 of samed is not above 0"),
    "a fraction above one": (None, {"fraction": 1.5}, "fraction=1.5 of samed is not above 0"),
    "less than no image": (None, {"per_class": -1}, "per_class=-1 of samed is less than 0"),
    "an area of nothing": (None, {"least_area": 0}, "least_area=0 of samed is less than 1"),
    "a modality that is not there": (None, {"modalities": ["xray"]}, "modalities of samed names 'xray'"),
    "a class that is not there": (None, {"classes": ["livr"]}, "names 'livr', .* did you mean 'liver'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_one_sentence(twin, case):
    damage, options, match = REFUSED[case]
    if damage:
        damage(twin)
    with pytest.raises(UserError, match=match):
        list(scenes(twin, OPTIONS | options, []))


def test_a_subset_in_boxes_is_not_chosen_from(tmp_path):
    write_twin("samed", tmp_path / "set", records=3)
    with pytest.raises(UserError, match="option per_class=2 of samed chooses from the full release"):
        opened(tmp_path / "set", "samed", options={"per_class": 2})


def test_what_is_still_packed_is_said_with_its_command(tmp_path, twin):
    (twin / ROOT).rename(tmp_path / "away")
    joined = r"SA-Med2D-16M.zip is a zip over 2 disks .*`zip -s 0 SA-Med2D-16M.zip --out joined.zip`"
    with pytest.raises(UserError, match=joined):
        opened(twin, "samed")
    with pytest.raises(UserError, match=joined):
        opened(twin / "SA-Med2D-16M.zip", "samed")
    raw = tmp_path / "clone/raw"
    raw.parent.mkdir()
    twin.rename(raw)
    with pytest.raises(UserError, match=joined):
        opened(raw.parent, "samed")
    (raw / "SA-Med2D-16M.z03").write_bytes(b"")
    assert "lacks .z02; get all of its files" in packed(raw)
    (raw / "SA-Med2D-16M.z03").unlink()
    (raw / "SA-Med2D-16M.z01").unlink()
    assert "lacks .z01; get" in packed(raw)  # the zip itself says that it is the second disk
    (raw / "SA-Med2D-16M.z01").write_bytes(b"")
    (raw / "SA-Med2D-16M.zip").unlink()
    assert "lacks .zip; get" in packed(raw)
    (raw / "SA-Med2D-16M.z01").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "z01 is a pointer of Git-LFS" in packed(raw)
    (raw / "SA-Med2D-16M.z01").unlink()
    assert packed(raw) == "" == packed(raw / "nowhere")
    with pytest.raises(UserError, match="holds neither SAMed2Dv1/images and masks nor regions"):
        opened(raw, "samed")
    with zipfile.ZipFile(raw / "all.zip", "w") as archive:
        archive.writestr("a", "b")
    assert "all.zip is still packed; unpack it with `unzip all.zip`" in packed(raw)


@pytest.mark.slow
def test_long_listings_take_little_memory(twin, monkeypatch):
    """Names only, two masks an image: what an image costs, whether it is chosen or not."""

    def peak(count, **options):
        def names(folder, skipped):
            for i in range(count):
                stem = f"ct_00--AbdomenCT1K--Case_{i // 40:05d}--x_{i % 40:04d}"
                yield from (
                    (stem,) if folder.name == "images" else (f"{stem}--{k:04d}_000" for k in (0, 1))
                )

        monkeypatch.setattr(release, "_stems", names)
        tracemalloc.start()
        found = sum(1 for _ in release.chosen(twin / ROOT, OPTIONS | options, []))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, used

    for options, most in (({}, 400), ({"per_modality": 500}, 60)):
        (few, small), (many, large) = peak(10_000, **options), peak(40_000, **options)
        assert (few, many) == ((500, 500) if options else (10_000, 40_000))
        assert (large - small) / 30_000 < most, (small, large)
