"""Another head: it lies in the brain set's grid by its sform, sides and boxes are right, nothing trains
on it.
"""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.reading import opened

from unimed_jax.config import VISUAL_TASKS
from unimed_jax.config_file import load_config_file
from unimed_jax.data.datasets import colin
from unimed_jax.data.datasets.brain import icbm152, volume
from unimed_jax.data.twins import heads, write_twin
from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict

INSTALLED = Path("/usr/share/mricron/templates")


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    place = tmp_path_factory.mktemp("head") / "twin"
    write_twin("colin", place)
    return place


@pytest.fixture(scope="module")
def head(twin):
    return colin.load(twin)


def rewrite(folder, name, change):
    """Changes array and sform of a file."""
    import nibabel

    image = nibabel.load(folder / f"{name}.nii.gz")
    array, place = change(np.asarray(image.dataobj), image.affine)
    new = nibabel.Nifti1Image(array, place)
    new.header.set_sform(place, 0 if place is None else 4)
    new.header.set_qform(None, 0)
    new.to_filename(folder / f"{name}.nii.gz")


def slice_at(head, plane, position):
    slab = volume.Slab(plane, "test", position, position)
    return volume.render(head, slab, position, "t1", volume.Jitter())


def centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def test_structures_lie_where_the_atlas_has_them(head):
    """Of each structure the centre of its labels, in world mm, is that of the twin's ellipsoid."""
    assert head.structures == tuple(n for n in volume.STRUCTURES if n.rpartition(" ")[2] not in (
        "ventricle", "brainstem", "callosum"))  # fmt: skip
    for name, left in colin._LEFT.items():
        for side, sign in (("left", -1), ("right", 1)):
            labels = head.labels == volume.STRUCTURES.index(f"{side} {name}") + 1
            x, y, z = np.argwhere(labels).mean(0) + volume.ORIGIN
            (cx, cy, cz), _ = heads.PAIRED[left]
            np.testing.assert_allclose((x, y, z), (sign * cx, cy, cz), atol=3)


def test_slices_are_shown_as_those_of_the_brain_set(head):
    """Both heads have the patient's right on the image's left, front or top up, sagittal facing left."""
    for one in (head, icbm152.load()):
        axial = slice_at(one, "axial", 8).boxes
        assert centre(axial["left thalamus"])[0] > 34 > 30 > centre(axial["right thalamus"])[0]
        assert centre(axial["left caudate nucleus"])[1] < centre(axial["left thalamus"])[1]
        sagittal = slice_at(one, "sagittal", 12).boxes
        assert centre(sagittal["cerebellum"])[0] > centre(sagittal["caudate nucleus"])[0]
        assert centre(sagittal["cerebellum"])[1] > centre(sagittal["thalamus"])[1] + 8


def test_boxes_hold_what_is_drawn(twin):
    """Structures painted white in the T1 fill their boxes."""
    labels = colin.load(twin).labels
    name = "left putamen"
    painted = labels == volume.STRUCTURES.index(name) + 1
    head = volume.Head({"t1": painted.astype(np.float32)}, labels, (name,))
    for at in (("axial", 2), ("coronal", 4)):
        piece = slice_at(head, *at)
        rows, columns = np.nonzero(piece.image > 60)
        drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        np.testing.assert_allclose(piece.boxes[name], drawn, atol=1)


def test_the_sform_alone_says_where_voxels_lie(twin, head, tmp_path):
    """A file whose voxels run the other way, and says so, gives the same head."""
    shutil.copytree(twin, tmp_path / "set")

    def flipped(array, place):
        turn = np.diag([-1.0, -1.0, 1.0, 1.0])
        turn[:2, 3] = array.shape[0] - 1, array.shape[1] - 1
        return array[::-1, ::-1], place @ turn

    for name in ("ch2bet", "aal"):
        rewrite(tmp_path / "set", name, flipped)
    again = colin.load(tmp_path / "set")
    np.testing.assert_array_equal(again.labels, head.labels)
    np.testing.assert_array_equal(again.maps["t1"], head.maps["t1"])


def test_grey_and_white_are_as_bright_as_in_the_brain_set(head):
    """The twin has the real file's brightness of both, 86 and 113; ICBM152 says what is which."""
    icbm = icbm152.load()
    for value, name in ((86, "grey"), (113, "white")):
        usual = np.median(icbm.maps["t1"][icbm.maps[name] > 0.95])
        shown = (value - colin._WINDOW[0]) / (colin._WINDOW[1] - colin._WINDOW[0])
        assert abs(shown - usual) < 0.02
        assert np.isclose(head.maps["t1"], shown).mean() > 0.01


def test_the_set_asks_five_tasks_and_holds_test_alone(twin, cache):
    data = opened(twin, "colin", cache)
    assert data.splits == ("test",)
    with pytest.raises(UserError, match="colin has no split 'train'"):
        data.examples("train")
    examples = data.examples("test")
    assert {e.task for e in examples} == set(VISUAL_TASKS) == set(colin.INFO.tasks)
    assert {e.meta["template"] for e in examples if e.task == "cls"} == {"plane"}
    assert {e.meta["map"] for e in examples} == {"t1"} and not any("map" in e.question for e in examples)
    slabs = {slab.name for slab in volume.SLABS if slab.split == "test"}
    assert {e.cluster for e in examples} == slabs
    named = {e.meta["structure"] for e in examples if "structure" in e.meta}
    assert {name.removeprefix("left ").removeprefix("right ") for name in named} == {
        *colin._LEFT, "cerebellum"}  # fmt: skip
    for word in ("ventricle", "brainstem", "callosum"):
        assert not any(word in e.question + e.answer for e in examples)
    skull = opened(twin, "colin", cache, options={"skull": True})
    assert list(skull.examples("test")) == list(examples)
    key = next(e.images[0] for e in examples if e.meta["plane"] == "axial")
    assert (skull.image(key) > 200).sum() > (data.image(key) > 200).sum() + 100


BROKEN = {
    "no atlas": ("aal", Path.unlink, r"aal\.nii\.gz does not exist; copy it again from Debian's"),
    "no volume": ("ch2bet", lambda p: p.write_bytes(b"noise"), r"ch2bet\.nii\.gz cannot be read \("),
    "wrong shape": (
        "ch2bet",
        lambda p: rewrite(p.parent, "ch2bet", lambda array, place: (array[:-1], place)),
        r"ch2bet\.nii\.gz does not lie in the expected grid of 181 x 217 x 181 bytes; copy",
    ),
    "floats": (
        "aal",
        lambda p: rewrite(p.parent, "aal", lambda array, place: (array.astype(np.float32), place)),
        r"aal\.nii\.gz does not lie in the expected grid of 181 x 217 x 181 bytes; copy",
    ),
    "no sform": (
        "aal",
        lambda p: rewrite(p.parent, "aal", lambda array, place: (array, None)),
        r"aal\.nii\.gz has no sform, which says where its voxels lie; copy",
    ),
    "another atlas": (
        "aal",
        lambda p: rewrite(
            p.parent, "aal", lambda array, place: (np.where(array == 74, 0, array), place)
        ),
        r"aal\.nii\.gz has no voxel of the right putamen \(AAL's number 74\); copy",
    ),
}


@pytest.mark.parametrize("name, change, sentence", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_sentence(twin, tmp_path, name, change, sentence):
    shutil.copytree(twin, tmp_path / "set")
    change(tmp_path / "set" / f"{name}.nii.gz")
    with pytest.raises(UserError, match=sentence):
        colin.load(tmp_path / "set")


def test_brain_tiny_scores_it_where_its_files_are(twin, tmp_path, capsys):
    plain = from_config_dict(load_config_file("configs/brain_tiny.py"))
    assert from_config_dict(load_config_file(f"configs/brain_tiny.py:colin={tmp_path}")) == plain
    said = capsys.readouterr().err
    assert f"colin is not scored, because {tmp_path} holds no ch2bet.nii.gz" in said
    config = from_config_dict(load_config_file(f"configs/brain_tiny.py:colin={twin}"))
    assert config.data == plain.data and not capsys.readouterr().err
    units = Counter((entry.source, entry.split) for entry in config.evaluate.entries)
    assert units == {("brain", "val"): 6, ("brain", "test"): 6, ("colin", "test"): 5,
                     ("colin_skull", "test"): 5}  # fmt: skip
    assert all(e.task in colin.INFO.tasks for e in config.evaluate.entries if e.source != "brain")
    with pytest.raises(UserError, match="takes :colin or :colin=FOLDER, not :colins"):
        load_config_file("configs/brain_tiny.py:colins")


@pytest.fixture
def real(request):
    """The folder of the real files: that of the package, or below that of all real data."""
    folder = INSTALLED if INSTALLED.is_dir() else request.getfixturevalue("real_data") / "colin"
    if not folder.is_dir():
        pytest.skip("needs Debian's package mricron-data")
    return folder


def test_the_real_head(real, cache):
    assert len(opened(real, "colin", cache).examples("test")) == colin.INFO.counts["test"]
    head = colin.load(real)
    for name in colin._LEFT:
        for side, sign in (("left", -1), ("right", 1)):
            labels = head.labels == volume.STRUCTURES.index(f"{side} {name}") + 1
            assert np.sign(np.argwhere(labels)[:, 0].mean() + volume.ORIGIN[0]) == sign
            assert head.maps["t1"][labels].mean() > 0.4  # tissue, not fluid
