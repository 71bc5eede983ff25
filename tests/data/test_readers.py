"""Every reader on a twin of its data set in each layout, and on its quirks."""

import io
import json
import os
import pickle
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from support.reading import check_against_raw, everything, left_out, opened, options_of

from unimed_jax.data.box_text import text_to_box
from unimed_jax.data.datasets import jsonl, medmnist, reader_of
from unimed_jax.data.store import pack
from unimed_jax.data.twins import TWINS, prepared, write_twin
from unimed_jax.errors import UserError

# of layouts that do not have all of their reader's
TASKS = {
    "array_record": {"cls"},
    "pairs": {"vqa"},
    "slake/parquet": {"vqa"},
    "radfm": {"caption"},
    "medmcqa": {"qa"},
    **dict.fromkeys(("pmc_vqa", "omnimedvqa", "mmmu", "choices/tsv"), {"vqa"}),
}
SPLITS = {
    "llava/pairs": {"train"},
    "medqa/parquet": {"train", "test"},
    "choices/pmc_vqa": {"train", "test"},
    "choices/medxpertqa": {"val", "test"},
    "choices/omnimedvqa": {"train"},
    "choices/mmmu": {"val"},
    "choices/medmcqa": {"train", "val"},
}
LAYOUTS = [(name, layout) for name, layouts in TWINS.items() for layout in layouts]


@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_a_twin_reads_in_every_layout(tmp_path, name, layout):
    for place in ("one", "two"):
        write_twin(name, tmp_path / place, records=9, layout=layout)
    write_twin(name, tmp_path / "other", records=9, layout=layout, seed=1)
    options = options_of(name, layout)
    one, two, other = (
        opened(tmp_path / place, name, options=options) for place in ("one", "two", "other")
    )
    assert set(one.splits) == SPLITS.get(f"{name}/{layout}", set(one.info.splits))
    assert one.checksum == two.checksum != other.checksum
    check_against_raw(one, name, tmp_path / "one", options)
    found = everything(one)
    reader, lines = reader_of(name), []
    raw = [
        (split, example)
        for split in one.info.splits
        for example, _ in reader.read(tmp_path / "one", split, options, lines)
    ]
    kept = {example.id for _, example in found}
    assert [(s, pack(e)) for s, e in raw if e.id in kept] == [(s, pack(e)) for s, e in found]
    assert len(raw) + len(lines) == len(found) + one.skipped
    assert {example.task for _, example in found} == TASKS.get(
        layout, TASKS.get(f"{name}/{layout}", set(one.info.tasks))
    )
    assert all(example.answer for _, example in found)
    assert len({example.id for _, example in found}) == len(found)
    for _, example in found:
        assert example.meta.get("template") or name in ("jsonl", "llava"), example
        for key in example.images:
            pixels = one.image(key)
            assert pixels.dtype == np.uint8 and pixels.ndim == 3
        if example.box:
            text = example.question if example.task == "identify" else example.answer
            height, width, _ = one.image(example.images[0]).shape
            x1, y1, x2, y2 = text_to_box(text)
            assert np.allclose(
                [x1, y1, x2, y2], np.array(example.box) / (width, height, width, height) * 100, atol=1
            )


def test_two_layouts_of_boxes_give_the_same_questions(tmp_path):
    """One set of scenes as Pascal VOC and as COCO in two layouts gives the same examples, to the
    byte.
    """
    data = []
    for name, layout in (("voc", "original"), ("coco", "instances"), ("coco", "roboflow")):
        write_twin(name, tmp_path / layout, records=12, layout=layout)
        rules = ["unique", "largest", "leftmost"]
        data.append(opened(tmp_path / layout, name, id=layout, options={"refer": rules, "per_image": 0}))
    ours, *others = ([(split, pack(example)) for split, example in everything(d)] for d in data)
    assert ours and all(found == ours for found in others)


def test_vqa_rad_splits_by_phrase_type_and_reads_numbers(tmp_path):
    write_twin("vqa_rad", tmp_path / "set", records=30)
    rows = json.loads((tmp_path / "set/VQA_RAD Dataset Public.json").read_text())
    data = opened(tmp_path / "set", "vqa_rad")
    tests = [row for row in rows if row["phrase_type"].startswith("test_")]
    assert [len(data.examples(split)) for split in ("train", "test")] == [
        len(rows) - len(tests),
        len(tests),
    ]
    by_id = {example.id: example for _, example in everything(data)}
    number = next(row for row in rows if row["answer"] == 3)
    split = "test" if number["phrase_type"].startswith("test_") else "train"
    assert by_id[f"{split}/{number['qid']}"].answer == "3"
    assert {example.meta["answer_type"] for example in by_id.values()} == {"OPEN", "CLOSED"}
    assert not any(
        "\t" in example.question or example.answer.endswith(" ") for example in by_id.values()
    )


def test_images_of_another_set_are_left_out_by_name(tmp_path):
    write_twin("vqa_rad", tmp_path / "set", records=30)
    names = sorted(path.name for path in (tmp_path / "set/VQA_RAD Image Folder").iterdir())
    (tmp_path / "set/shared.txt").write_text(f"{names[0]}\n")
    whole = opened(tmp_path / "set", "vqa_rad")
    data = opened(tmp_path / "set", "vqa_rad", options={"without": "shared.txt"})
    lost = [e.id for _, e in everything(whole) if e.images == (names[0],)]
    assert lost and len(everything(whole)) - len(lost) == len(everything(data))
    assert [line.split(": ")[1] for line in left_out(data)] == lost and "`without`" in left_out(data)[0]


def test_medpix2_asks_what_its_fields_say(tmp_path):
    write_twin("medpix2", tmp_path / "set", records=30)
    data = opened(tmp_path / "set", "medpix2")
    of_image = {}
    for split, example in everything(data):
        of_image.setdefault(example.images[0], {})[example.meta["template"]] = (split, example)
    lines = (tmp_path / "set/splitted_dataset/descriptions_dev.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        asked = of_image[record["image"]]
        plane = {"Axial": "axial", "Transverse": "axial"}.get(record["Description"]["Plane"])
        assert asked["modality"][0] == "val" and asked["modality"][1].answer == record["Type"]
        assert plane is None or asked["plane"][1].answer == plane
        assert ("plain" in asked) == (not record["Description"]["Caption"].startswith("Replace this"))
        assert asked["region"][1].cluster == record["U_id"]
    assert sum("placeholder" in line for line in left_out(data)) == data.skipped > 0
    facts = opened(tmp_path / "set", "medpix2", id="facts", options={"caption": "facts"})
    assert all(
        e.answer.startswith(e.meta["modality"]) for _, e in everything(facts) if e.task == "caption"
    )


def test_pubmedqa_follows_the_official_test_list(tmp_path):
    write_twin("pubmedqa", tmp_path / "set", records=8)
    test = json.loads((tmp_path / "set/test_ground_truth.json").read_text())
    plain = opened(tmp_path / "set", "pubmedqa")
    assert {e.cluster for e in plain.examples("test")} == set(test) and len(plain.examples("train")) == 8
    assert [e.answer for e in plain.examples("test")] == list(test.values())
    after = opened(
        tmp_path / "set", "pubmedqa", id="after", options={"context": "conclusion", "words": 4}
    )
    for short, long in zip(plain.examples("test"), after.examples("test"), strict=True):
        assert long.question.endswith(f" {short.question}") and len(long.question.split()) == 4 + len(
            short.question.split()
        )


def test_both_layouts_of_slake_give_the_same_examples(tmp_path):
    data = []
    for layout in ("original", "flat"):
        write_twin("slake", tmp_path / layout, records=9, layout=layout)
        data.append(opened(tmp_path / layout, "slake", id=layout))
    one, two = ([(split, pack(example)) for split, example in everything(d)] for d in data)
    assert one == two and {
        e.meta.get("language") for _, e in everything(data[0]) if e.task == "vqa"
    } == {"en"}
    both = opened(tmp_path / "flat", "slake", id="both", options={"language": "all"})
    assert sum(e.task == "vqa" for _, e in everything(both)) == 3 / 2 * sum(
        e.task == "vqa" for _, e in everything(data[0])
    )


def test_medmnist_streams_any_set_and_names_several_labels(tmp_path):
    write_twin("medmnist", tmp_path / "set", records=6)
    small = opened(tmp_path / "set", "medmnist", id="small", options={"name": "dermamnist", "size": 28})
    stored = np.load(tmp_path / "set/dermamnist.npz")
    for number, example in enumerate(small.examples("val")):
        np.testing.assert_array_equal(small.image(example.images[0]), stored["val_images"][number])
        assert example.answer == medmnist.CLASSES["dermamnist"][int(stored["val_labels"][number, 0])]
    chest = opened(tmp_path / "set", "medmnist", id="chest", options={"name": "chestmnist"})
    labels = np.load(tmp_path / "set/chestmnist_224.npz")["train_labels"]
    for row, example in zip(labels, chest.examples("train"), strict=True):
        named = [name for name, there in zip(medmnist.CLASSES["chestmnist"], row, strict=True) if there]
        assert example.answer == (", ".join(named) or "no finding")
    # labels of pictures that are not there
    some = {name: array[1:] if name == "val_images" else array for name, array in stored.items()}
    np.savez(tmp_path / "set/dermamnist.npz", **some)
    with pytest.raises(UserError, match="val has [0-9]+ labels but [0-9]+ images; get it again"):
        opened(tmp_path / "set", "medmnist", id="few", options={"name": "dermamnist", "size": 28})
    with pytest.raises(UserError, match="option name='dermanist' of medmnist is none of 'pathmnist'"):
        opened(tmp_path / "set", "medmnist", options={"name": "dermanist"})


def test_medqa_shows_its_options_if_asked_to(tmp_path):
    write_twin("medqa", tmp_path / "set", records=6)
    plain = opened(tmp_path / "set", "medqa").examples("test")
    shown = opened(tmp_path / "set", "medqa", id="shown", options={"shown": True}).examples("test")
    for short, long in zip(plain, shown, strict=True):
        assert long.question.startswith(f"{short.question} (A) ") and " (E) " in long.question
        assert short.answer == long.answer and f") {short.answer}" in long.question


def test_slices_of_a_case_belong_together(tmp_path):
    write_twin("samed", tmp_path / "set", records=9)
    clusters = {e.cluster for e in opened(tmp_path / "set", "samed").examples("train")}
    sets = ("AbdomenCT1K", "CHAOS_Task_4", "AbdomenCT1K")
    assert clusters == {f"{name}--Case_{i:05d}" for i, name in enumerate(sets)}


def test_reports_keep_their_views_and_patients(tmp_path):
    write_twin("iu_xray", tmp_path / "iu", records=10)
    views = [len(e.images) for e in opened(tmp_path / "iu", "iu_xray").examples("train")]
    assert views == [1, 2, 3, 4, 5] * 2
    write_twin("mimic_cxr", tmp_path / "mimic", records=10)
    mimic = opened(tmp_path / "mimic", "mimic_cxr")
    assert [len(e.images) for e in mimic.examples("train")] == [1] * 10
    assert len({e.cluster for e in mimic.examples("train")}) == 5  # patients


def test_a_set_of_tensorflow_datasets_reads_by_its_features(tmp_path):
    write_twin("tfds", tmp_path / "set", records=9)
    data = opened(tmp_path / "set", "tfds", id="classes", options={"cluster": "patient"})
    assert [len(data.examples(split)) for split in ("train", "val", "test")] == [9, 3, 3]
    assert {e.answer for _, e in everything(data)} <= {"clear", "with fluid"}
    assert len({e.cluster for e in data.examples("train")}) == 5
    asked = {"task": "vqa", "question": "question", "answer": "answer"}
    found = opened(tmp_path / "set", "tfds", id="asked", options=asked).examples("val")[0]
    assert found.question.endswith("?") and found.images == ("val/0",)
    text = opened(tmp_path / "set", "tfds", id="text", options=asked | {"task": "qa"}).examples("val")[0]
    assert text.images == () and text.question == found.question
    with pytest.raises(UserError, match="has no feature 'lable'; did you mean 'label'"):
        opened(tmp_path / "set", "tfds", options={"answer": "lable"})
    (tmp_path / "set/features.json").write_text("{}")
    with pytest.raises(UserError, match="is not a set that tensorflow-datasets has prepared"):
        opened(tmp_path / "set", "tfds", id="broken")


@pytest.mark.parametrize(
    "shape", [(0, 28, 28, 3), (10**12, 0, 28, 3), (10**12, 28, 28, 3), (9, 2000, 28, 3)]
)
def test_sizes_that_medmnist_cannot_have_are_refused_at_once(tmp_path, shape):
    write_twin("medmnist", tmp_path / "set", records=3)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"shape": shape, "fortran_order": False, "descr": "|u1"}
    )
    with zipfile.ZipFile(tmp_path / "set/dermamnist.npz", "a") as archive, pytest.warns(UserWarning):
        archive.writestr("train_images.npy", header.getvalue())
    with pytest.raises(UserError, match="train_images is an array"):
        opened(tmp_path / "set", "medmnist", options={"name": "dermamnist", "size": 28})


def test_a_class_without_a_name_is_counted(tmp_path, monkeypatch):
    """A test part whose labels are not given has class -1, which is not the last class."""
    monkeypatch.setattr(prepared, "pick", lambda rng, some: -1 if rng.integers(2) else some[0])
    write_twin("tfds", tmp_path / "set", records=9)
    data = opened(tmp_path / "set", "tfds")
    assert {e.answer for _, e in everything(data)} == {"clear"}
    assert data.skipped and "its class -1 has no name" in left_out(data)[0]


def test_a_damaged_set_of_tensorflow_datasets_is_one_sentence(tmp_path):
    write_twin("tfds", tmp_path / "set", records=9)
    (file,) = (tmp_path / "set").glob("*-train.array_record*")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match="set, train, record .* cannot be read"):
        opened(tmp_path / "set", "tfds")


def test_a_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    write_twin("path_vqa", tmp_path / "set", records=6)
    rows = [{"img_id": "a", "sent": Bomb(), "label": {"yes": 1}}]
    (tmp_path / "set/qas/train_vqa.pkl").write_bytes(pickle.dumps(rows))
    with pytest.raises(UserError, match=r"train_vqa.pkl holds code or objects"):
        opened(tmp_path / "set", "path_vqa")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickles_reads(tmp_path, protocol):
    write_twin("path_vqa", tmp_path / "set", records=6)
    file = tmp_path / "set/qas/train_vqa.pkl"
    rows = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(rows, protocol=protocol))
    asked = [(e.question, e.answer) for e in opened(tmp_path / "set", "path_vqa").examples("train")]
    assert asked == [(row["sent"], next(iter(row["label"]))) for row in rows]


def test_refer_names_one_thing_without_doubt(tmp_path):
    things = [
        ["disc", 0, 0, 10, 10],
        ["disc", 20, 0, 40, 20],
        ["bar", 0, 24, 8, 30],
        ["bar", 40, 24, 48, 30],
    ]
    things = [{"label": label, "box": box} for label, *box in things]
    (tmp_path / "set").mkdir()
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(tmp_path / "set/a.png")
    line = {"id": "a", "images": ["a.png"], "split": "train", "boxes": things}
    (tmp_path / "set/data.jsonl").write_text(json.dumps(line))
    rules = ["unique", "largest", "smallest", "leftmost", "topmost"]
    options = {"refer": rules, "names": {"bar": "rod"}, "frame": 12, "per_image": 3}
    examples = opened(tmp_path / "set", "jsonl", options=options).examples("train")
    asked = {e.question: e.box for e in examples if e.task == "refer"}
    # The rods are of one size and one height; no class has a single thing.
    assert asked == {
        "largest disc": (20, 0, 40, 20),
        "smallest disc": (0, 0, 10, 10),
        "leftmost disc": (0, 0, 10, 10),
        "topmost disc": (0, 0, 10, 10),
        "leftmost rod": (0, 24, 8, 30),
    }
    shown = [e for e in examples if e.task == "identify"]
    # in turn
    assert Counter(e.answer for e in shown) in (Counter(rod=2, disc=1), Counter(rod=1, disc=2))
    # the size tells nothing
    assert {(e.box[2] - e.box[0], e.box[3] - e.box[1]) for e in shown} == {(12, 12)}


def test_a_study_keeps_its_images_in_order(tmp_path):
    write_twin("jsonl", tmp_path / "set", records=6)
    data = opened(tmp_path / "set", "jsonl")
    study = next(e for e in data.examples("train") if e.id == "train/study")
    assert study.images == ("images/train_00000.jpg", "images/train_00001.jpg") and study.answer == "2"


def test_the_schema_is_what_the_reader_takes(tmp_path):
    write_twin("jsonl", tmp_path / "set", records=3)
    keys = {
        key
        for line in (tmp_path / "set/data.jsonl").read_text().splitlines()
        for key in json.loads(line)
    }
    assert keys == set(jsonl.SCHEMA["properties"])
    validator = pytest.importorskip("jsonschema", reason="pip install jsonschema").Draft202012Validator(
        jsonl.SCHEMA
    )
    for line in (tmp_path / "set/data.jsonl").read_text().splitlines():
        validator.validate(json.loads(line))
