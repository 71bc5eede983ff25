"""The brain set: anatomy and sides, splits that do not touch, questions that hold, a build that can
be trusted.
"""

import collections
import hashlib
import itertools

import numpy as np
import pytest

from unimed_jax.config import TASKS, DataConfig, SourceConfig
from unimed_jax.data import contact_sheet as contact_sheet_module
from unimed_jax.data import datasets
from unimed_jax.data.box_text import text_to_box
from unimed_jax.data.contact_sheet import contact_sheet
from unimed_jax.data.datasets import brain
from unimed_jax.data.datasets.brain import codes as brain_codes
from unimed_jax.data.datasets.brain import icbm152, volume
from unimed_jax.data.datasets.brain import questions as brain_questions
from unimed_jax.errors import UserError


def opened(cache, **options):
    source = SourceConfig("brain", options={"jitters": 1} | options)
    (found,) = datasets.open_sources(DataConfig((source,), cache=str(cache)))
    return found


@pytest.fixture(scope="module")
def data(cache):
    return opened(cache)


@pytest.fixture(scope="module")
def plain():
    """Every slice of every slab without jitter, in all three maps."""
    return [
        volume.render(icbm152.load(), slab, position, name, volume.Jitter())
        for slab in volume.SLABS
        for position in slab.positions
        for name in volume.MAPS
    ]


def every(data, task=None):
    return [e for split in brain.SPLITS for e in data.examples(split) if task in (None, e.task)]


# Splits


def test_slabs_keep_their_distance():
    for plane in volume.PLANES:
        slabs = sorted((s for s in volume.SLABS if s.plane == plane), key=lambda s: s.first)
        assert {s.split for s in slabs} == set(brain.SPLITS)
        for a, b in itertools.pairwise(slabs):
            assert b.first - a.last - 1 >= 4  # whole slices, 1 mm each, that nobody uses
        if plane == "sagittal":
            assert slabs[0].first >= 0  # x and -x are one picture: slabs are of |x|


def test_a_slab_and_a_category_belong_to_one_split(data):
    for kind in ("image", "text"):
        homes = collections.defaultdict(set)
        for split in brain.SPLITS:
            for e in data.examples(split):
                if (not e.images) == (kind == "text"):
                    homes[e.cluster].add(split)
        assert len(homes) > 20 and all(len(splits) == 1 for splits in homes.values())
    names = {s.name: s for s in volume.SLABS}
    for e in every(data):
        if e.images:
            plane, position, _, _ = e.images[0].split("_")
            assert int(position) in names[e.cluster].positions and plane == names[e.cluster].plane


def test_no_held_out_slice_is_a_train_slice_mirrored_or_not(plain):
    homes = collections.defaultdict(set)
    for piece in plain:
        if piece.image.any():
            for image in (piece.image, piece.image[:, ::-1]):
                homes[hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()].add(
                    piece.slab.split
                )
    assert len(homes) > 700 and all(len(splits) == 1 for splits in homes.values())


def test_no_stored_image_is_in_two_splits(data):
    homes = collections.defaultdict(set)
    for split in brain.SPLITS:
        for key in {key for e in data.examples(split) for key in e.images}:
            homes[data.image(key).tobytes()].add(split)
    assert all(len(splits) == 1 for splits in homes.values())


def test_the_volume_is_symmetric_so_that_x_alone_tells_the_side():
    """Why sagittal slabs are of |x| and why nothing may be flipped without its labels."""
    head = icbm152.load()
    assert all(np.array_equal(m, m[::-1]) for m in head.maps.values())
    for name in volume.PAIRED:
        left, right = (
            head.labels == volume.STRUCTURES.index(f"{side} {name}") + 1 for side in volume.SIDES
        )
        assert np.argwhere(left)[:, 0].max() < 98 < np.argwhere(right)[:, 0].min()  # voxel 98 is x = 0
        assert np.array_equal(left, right[::-1])
    assert np.array_equal(slice_at("sagittal", -16).image, slice_at("sagittal", 16).image)


# Anatomy


def slice_at(plane, position, jitter=volume.Jitter(), name="t1", head=None):  # noqa: B008 (frozen)
    slab = volume.Slab(plane, "train", position, position)
    return volume.render(head or icbm152.load(), slab, position, name, jitter)


def centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def test_radiological_sides():
    """The patient's left lies on the image's right, in axial and coronal slices, jittered or not."""
    for jitter in (volume.Jitter(), volume.Jitter(rotation=8, scale=1.1, shift=(5, -5))):
        for plane, position in (("axial", 8), ("axial", -18), ("coronal", -12), ("coronal", 4)):
            boxes = slice_at(plane, position, jitter).boxes
            sided = [n for n in volume.PAIRED if {f"left {n}", f"right {n}"} <= set(boxes)]
            assert len(sided) >= 2
            for name in sided:
                assert centre(boxes[f"left {name}"])[0] > centre(boxes[f"right {name}"])[0] + 2


def test_places_of_structures():
    axial, coronal, sagittal = (
        slice_at(*at).boxes for at in (("axial", 8), ("coronal", -36), ("sagittal", 6))
    )
    # Axial, front up: caudate before thalamus; thalamus by the middle.
    assert centre(axial["left caudate nucleus"])[1] < centre(axial["left thalamus"])[1]
    assert (
        abs(centre(axial["left thalamus"])[0] - 32) < 8
        and abs(centre(axial["left thalamus"])[1] - 32) < 8
    )
    # Coronal, top up: callosum over ventricles over cerebellum.
    assert centre(coronal["cerebellum"])[1] > 40 > centre(coronal["corpus callosum"])[1]
    # Sagittal, facing left: the cerebellum low and behind the brainstem, the callosum above both.
    assert centre(sagittal["cerebellum"])[0] > centre(sagittal["brainstem"])[0]
    assert centre(sagittal["cerebellum"])[1] > 40 > centre(sagittal["corpus callosum"])[1]
    mirrored = slice_at("sagittal", 6, volume.Jitter(mirrored=True))
    assert centre(mirrored.boxes["cerebellum"])[0] < centre(mirrored.boxes["brainstem"])[0]


def test_mirroring_moves_image_and_boxes_alike():
    one, other = slice_at("sagittal", 26), slice_at("sagittal", 26, volume.Jitter(mirrored=True))
    assert np.array_equal(one.image, other.image[:, ::-1])
    assert set(one.boxes) == set(other.boxes)
    for name, (x1, y1, x2, y2) in one.boxes.items():
        np.testing.assert_allclose(other.boxes[name], (64 - x2, y1, 64 - x1, y2), atol=1)


def test_boxes_follow_the_jittered_picture():
    """Against the structure's own mask, put in the image's place and sampled as the image is."""
    jitter = volume.Jitter(rotation=6, scale=1.08, shift=(7, -6))
    x1, y1, x2, y2 = box = slice_at("axial", 12, jitter).boxes["left lateral ventricle"]
    assert np.abs(np.subtract(slice_at("axial", 12).boxes["left lateral ventricle"], box)).max() >= 2
    labels = icbm152.load().labels
    mask = labels == volume.STRUCTURES.index("left lateral ventricle") + 1
    head = volume.Head({"t1": mask.astype(np.float32)}, labels)
    shown = slice_at("axial", 12, jitter, head=head).image
    rows, columns = np.nonzero(shown > 40)
    np.testing.assert_allclose(
        (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), (x1, y1, x2, y2), atol=1
    )


def test_no_sides_in_sagittal_slices_and_no_pairs_at_the_midline(plain):
    for piece in plain:
        sided = any(name.split()[0] in volume.SIDES for name in (*piece.boxes, *piece.absent))
        assert sided == (piece.plane != "sagittal")
        if piece.plane == "sagittal" and abs(piece.position) < 4:
            assert not set(volume.PAIRED) & {*piece.boxes, *piece.absent}


def test_nothing_tiny_is_asked_for_and_every_box_lies_inside(plain):
    pieces = plain + list(brain.draw_slices(icbm152.load(), "test"))
    for piece in pieces:
        assert not set(piece.boxes) & set(piece.absent)
        for x1, y1, x2, y2 in piece.boxes.values():
            assert min(x1, y1) >= 0 and max(x2, y2) <= 64 and min(x2 - x1, y2 - y1) >= 4
    assert sum(len(p.boxes) for p in pieces) > 1500


# Questions


def test_every_task_has_enough_in_test_and_some_in_val(data):
    for split, low, high in (("test", 300, 450), ("val", 60, 150)):
        counts = collections.Counter(e.task for e in data.examples(split))
        assert set(counts) == set(TASKS) and all(low <= n <= high for n in counts.values()), (
            split,
            counts,
        )
    clusters = {t: {e.cluster for e in data.examples("test") if e.task == t} for t in TASKS}
    assert all(len(c) >= 8 for c in clusters.values())


def test_examples_are_whole(data):
    ids = [e.id for e in every(data)]
    assert len(ids) == len(set(ids))
    for e in every(data):
        assert e.answer and e.cluster and e.meta["template"] and (e.question or e.task == "caption")
        assert e.answer == e.answer.strip() and e.question == e.question.strip()
        if e.images:
            assert e.meta["plane"] in volume.PLANES and e.meta["map"] in volume.MAPS
        assert (e.task == "vqa") == (e.meta.get("answer_type") in ("OPEN", "CLOSED"))
        if e.meta.get("answer_type") == "CLOSED":
            assert e.answer in ("yes", "no")
        assert (e.box is not None) == (e.task in ("refer", "identify"))


def test_several_questions_share_an_image(data):
    counts = collections.Counter((e.images, e.task) for e in data.examples("train") if e.images)
    assert sum(n > 1 for n in counts.values()) > 500


def test_refer_and_identify_say_the_same(data):
    boxes = {}
    for e in every(data, "refer"):
        assert e.question == e.meta["prompt"] == e.meta["structure"]
        assert text_to_box(e.answer) == tuple(int(v / 64 * 100) for v in e.box)
        boxes[e.images, e.question] = e.box
    shared = 0
    for e in every(data, "identify"):
        assert e.answer == e.meta["structure"]
        assert text_to_box(e.question) == tuple(int(v / 64 * 100) for v in e.box)
        if (e.images, e.answer) in boxes:
            assert boxes[e.images, e.answer] == e.box
            shared += 1
    assert shared > 300


def test_answers_are_true_of_their_slices(data):
    """Recomputed from freshly drawn slices, not from what was stored."""
    slices = {p.key: p for p in brain.draw_slices(icbm152.load(), "test")}
    seen: collections.Counter[str] = collections.Counter()
    for e in data.examples("test"):
        if e.task not in ("vqa", "cls"):
            continue
        piece, template = slices[e.images[0]], e.meta["template"]
        seen[template] += 1
        if template == "visible":
            assert (e.meta["structure"] in piece.boxes) == (e.answer == "yes")
            assert (e.meta["structure"] in piece.absent) == (e.answer == "no")
        elif template == "choice":
            named = e.question.removeprefix("Which is visible, the ").removesuffix("?").split(" or the ")
            assert [n in piece.boxes for n in named].count(True) == 1 and e.answer in set(named) & set(
                piece.boxes
            )
        elif template == "is_plane":
            assert (piece.plane in e.question) == (e.answer == "yes")
        elif template == "anterior":
            assert piece.plane == "sagittal" and e.answer == ("right" if piece.mirrored else "left")
        elif template == "order":
            a, b = (
                e.question.removeprefix("Is the ")
                .removesuffix(" in the image?")
                .split(" to the left of the ")
            )
            assert (centre(piece.boxes[a])[0] < centre(piece.boxes[b])[0]) == (e.answer == "yes")
        elif template == "level":
            assert e.answer == brain_questions.level(piece.plane, piece.position)
        else:
            assert e.answer == (piece.plane if template == "plane" else volume.MAPS[piece.map])
    assert set(seen) == set(brain_questions.VQA_SHARE) and min(seen.values()) >= 30


@pytest.mark.parametrize("split", ["train", "test"])
def test_words_alone_do_not_answer_vqa(data, split):
    """Within every wording all answers are equally frequent (a thinned split may miss that by a
    little).
    """
    groups: dict = collections.defaultdict(collections.Counter)
    for e in data.examples(split):
        if e.task == "vqa":
            wording = e.meta["template"]
            if wording == "choice":
                named = (
                    e.question.removeprefix("Which is visible, the ").removesuffix("?").split(" or the ")
                )
                wording = f"choice {sorted(named)}"
            groups[wording][e.answer] += 1
    for wording, answers in groups.items():
        low, high = min(answers.values()), max(answers.values())
        if split == "train":
            assert len(answers) > 1 and low == high, (wording, answers)
        elif not wording.startswith("choice"):
            assert len(answers) > 1 and high - low <= 4, (wording, answers)


def test_reports_name_what_is_there():
    piece = slice_at("sagittal", 26, volume.Jitter(mirrored=True))
    text = brain_questions.report(piece)
    assert text.startswith("Sagittal T1 image, medial level. ") and text.endswith(
        "Anterior is on the right."
    )
    assert "cerebellum is at the lower left" in text and "left cerebellum" not in text
    text = brain_questions.report(slice_at("axial", 8, name="white"))
    assert (
        text.startswith("Axial white matter map, middle level. ")
        and "Both thalami are in the middle" in text
    )
    assert text.count(".") <= 6 and "Anterior" not in text
    assert "None of the structures" in brain_questions.report(slice_at("axial", 60))


def test_reports_measure_in_millimetres():
    piece = slice_at("coronal", -60)
    x1, y1, x2, y2 = piece.boxes["cerebellum"]
    width, height = (5 * round(v * 196 / 64 / 5) for v in (x2 - x1, y2 - y1))
    assert 90 <= width <= 120 and f"{width} x {height} mm." in brain_questions.report(piece)


def test_codes_are_spelt_and_split_by_category(data):
    answers: dict[str, dict[str, set[str]]] = {
        split: collections.defaultdict(set) for split in brain.SPLITS
    }
    for split in brain.SPLITS:
        for e in data.examples(split):
            if e.task == "qa":
                assert e.id.split("/")[1] == e.cluster and len(e.cluster) == 3
                answers[split][e.meta["template"]].add(e.answer)
                if e.meta["template"] in ("chapter", "block"):
                    assert f"holds {brain_codes.spell(e.cluster)}" in e.question
    assert set(answers["test"]) == set(brain_codes.TEMPLATES)
    for template in ("chapter", "term"):
        assert answers["test"][template] <= answers["train"][template]
    questions = [e.question for e in every(data, "qa")]
    assert len(questions) == len(set(questions))
    rows = {(e.question, e.answer) for e in every(data, "qa")}
    asked = {q: a for q, a in rows if " G 3 " in q or " I 2 " in q}
    assert any(a == "Diseases of the nervous system" for a in asked.values())
    assert all(
        a.startswith(("Diseases of the nervous", "Diseases of the circ", "G", "I"))
        for a in asked.values()
    )


# The build


def test_same_seed_same_checksum_another_seed_another(data, cache, tmp_path):
    again = opened(tmp_path)
    assert again.checksum == data.checksum and again.folder != data.folder
    one, two, three = (
        list(brain.read(None, "val", {"jitters": 1, "seed": seed}, [])) for seed in (0, 0, 1)
    )
    assert (
        [e for e, _ in one] == [e for e, _ in two] == list(data.examples("val")) != [e for e, _ in three]
    )
    for example, pixels in one[:50]:
        for key, array in zip(example.images, pixels, strict=True):
            assert np.array_equal(data.image(key)[..., 0], array)


def test_images_come_as_rgb_and_unknown_keys_are_named(data):
    image = data.image(data.examples("train")[0].images[0])
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3) and image.std() > 5
    assert np.array_equal(image[..., 0], image[..., 2])
    with pytest.raises(UserError, match="no image 'axial_x'"):
        data.image("axial_x")
    with pytest.raises(UserError, match="no split 'dev'"):
        data.examples("dev")


def test_tasks_can_be_chosen(cache, data):
    source = SourceConfig("brain", options={"jitters": 1}, tasks=("refer", "qa"))
    (some,) = datasets.open_sources(DataConfig((source,), cache=str(cache)))
    assert {e.task for e in every(some)} == {"refer", "qa"} and some.checksum == data.checksum


@pytest.mark.parametrize(
    "change, sentence",
    {
        "huge": (
            lambda image: image.header.set_data_shape((30000, 30000, 30000)),
            "does not lie in the expected",
        ),
        "floats": (lambda image: image.set_data_dtype(np.float64), "does not lie in the expected"),
        "elsewhere": (lambda image: image.affine.__setitem__((0, 3), 0), "does not lie in the expected"),
        "cut": (lambda image: None, "cannot be read"),
    }.values(),
)
def test_maps_are_refused_by_their_header(tmp_path, change, sentence):
    import nibabel

    affine = np.eye(4)
    affine[:3, 3] = volume.ORIGIN
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), affine)
    image.header.set_data_shape(volume.SHAPE)
    change(image)
    image.header.set_sform(image.affine, 1)
    image.header["magic"], image.header["vox_offset"] = b"n+1", 352
    (tmp_path / "map.nii").write_bytes(image.header.binaryblock + bytes(4) + bytes(8))
    with pytest.raises(UserError, match=f"map.nii {sentence}"):
        icbm152._read_map(tmp_path / "map.nii")
    (tmp_path / "map.nii").write_bytes(b"no volume")
    with pytest.raises(UserError, match="map.nii cannot be read"):
        icbm152._read_map(tmp_path / "map.nii")


def test_a_strip_has_a_tile_too():
    for shape in ((1, 30000, 3), (30000, 1, 3)):
        assert min(contact_sheet_module._tile(np.zeros(shape, np.uint8), "strip", []).size) > 0


def test_contact_sheet(data, tmp_path):
    from PIL import Image

    path = contact_sheet([data], tmp_path / "sub" / "sheet.png", "test", rows=2)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[0] > 600 and sheet.shape[1] > 1800
    assert (sheet.std(-1) > 40).any()  # coloured boxes
