"""The audit finds planted leaks and faults, each once and nothing else."""

import concurrent.futures.process
import contextlib
import difflib
import json
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unimed_jax import main as cli
from unimed_jax.audit import fingerprints as prints
from unimed_jax.audit.check import _with_headers, audit
from unimed_jax.audit.questions import LONG, SIMILAR, Asked, _most_similar, text_leaks
from unimed_jax.audit.report import write_audit
from unimed_jax.audit.survey import _asked
from unimed_jax.config import Config, DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info, nearest_counts
from unimed_jax.errors import UserError

CONFIG = """
from unimed_jax.config import default_config
def get_config():
    config = default_config()
    config.name = "planted"
    config.data.sources = (dict(name="jsonl", id="a", path="a"), dict(name="jsonl", id="b", path="b"))
    config.data.root, config.data.cache = "{root}", "{root}/cache"
    return config
"""


def scene(seed: int) -> np.ndarray:
    """A smooth random picture, like no other."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((96, 96), Image.Resampling.BICUBIC))


def nearly(image: np.ndarray) -> np.ndarray:
    """The picture at another size, a little darker and noisy, as a re-encoded copy is."""
    small = np.asarray(Image.fromarray(image).resize((80, 80), Image.Resampling.BILINEAR)).astype(int)
    return np.clip(small * 0.95 + np.random.default_rng(0).integers(-3, 4, small.shape), 0, 255).astype(
        np.uint8
    )


def write(folder, lines, pictures):
    folder.mkdir()
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / name)
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(name, split, image, question="Is it clear?", answer="yes", task="vqa", **more):
    return {
        "id": name,
        "split": split,
        "images": [image],
        "task": task,
        "question": question,
        "answer": answer,
    } | more


@pytest.fixture
def planted(tmp_path):
    """Two sets; each leak stands once between train and test of `a`, and one image of `a` is in `b`."""
    train = {f"train{i}.png": scene(i) for i in range(12)}
    test = {
        "same.png": train["train0.png"],
        "near.png": nearly(train["train1.png"]),
        "mirror.png": np.ascontiguousarray(train["train2.png"][:, ::-1]),
        "new.png": scene(100),
        "other.png": scene(101),
    }
    report = "the heart is normal and the lungs are clear"
    lines = [
        line(f"t{i}", "train", name, f"What is shown in picture {i}?", f"thing {i}")
        for i, name in enumerate(train)
    ]
    lines += [
        line(
            "t20",
            "train",
            "train3.png",
            "Is there a fracture of the left rib?",
            "no",
            meta={"patient": "x"},
        ),
        line("t21", "train", "train4.png", "", report, "caption", cluster="p1"),
        line("e0", "test", "same.png"),
        line("e1", "test", "near.png"),
        line("e2", "test", "mirror.png"),
        line("e3", "test", "train3.png", "is there a fracture of the left rib", "no"),
        line("e4", "test", "new.png", "", report, "caption", cluster="p1"),
        line("e5", "test", "other.png", "Who is it?", "call 555-123-4567", meta={"patient": "x"}),
    ]
    write(tmp_path / "a", lines, train | test)
    write(tmp_path / "b", [line("b0", "train", "x.png"), line("b1", "test", "y.png")],
          {"x.png": scene(200), "y.png": nearly(test["new.png"])})  # fmt: skip
    (tmp_path / "planted.py").write_text(CONFIG.format(root=tmp_path))
    return tmp_path


def test_every_planted_leak_is_found_once(planted, capsys):
    out = planted / "audit"
    assert (
        cli.main(
            ["data", "check", f"--config={planted / 'planted.py'}", f"--out={out}", "--processes=1"]
        )
        == 1
    )
    content = json.loads((out / "check.json").read_text())
    leaks = {kind: counts["train_test"] for kind, counts in content["sets"]["a"]["leaks"].items()}
    assert leaks == {
        "image": 2,  # same.png, and train3.png itself
        "near": 1,
        "mirror": 1,
        "question": 1,
        "question_answer": 1,
        "similar_question": 1,
        "report": 1,
        "rewording": 0,
        "cluster": 2,  # p1, and train3.png: without a name of its own an image is its cluster
        "patient": 1,
        "case": 0,
        "study": 0,
        "question_text": 1,
        "repeating": 1,
        "reworded": 0,
    }
    between = dict.fromkeys(content["leaks"], 0) | {"near": 1}
    assert {kind: counts["between"] for kind, counts in content["leaks"].items()} == between
    sums = {kind: counts["train_test"] for kind, counts in content["leaks"].items()}
    assert sums == leaks | {"name": 0, "question_text": 2}  # one of them is b's
    assert content["between"] == {"a/test~b/test": {"near": 1}}
    assert content["sets"]["a"]["personal"]["a telephone number"] == {"n": 1, "first": ["test: e5"]}
    copier = content["sets"]["a"]["copier"]["train_test"]
    assert copier["n"] == 5 and copier["value"] == pytest.approx(1 / 5)
    said = capsys.readouterr().out
    assert "a: 1 of test are given away by train (similar_question)" in said
    assert "a/test and b/test share images or questions (near 1)" in said
    report = (out / "check.md").read_text()
    assert "| images that are nearly the mirror image | 1 |" in report and "pairs.png" in report
    assert Image.open(out / "pairs.png").size[0] == 3 * 328


def test_clean_data_has_nothing_to_look_at(tmp_path, capsys):
    lines = [line(f"{split}{i}", split, f"{split}{i}.png", f"{split} {i}?", cluster=f"{split}{i}")
             for split in ("train", "test") for i in range(3)]  # fmt: skip
    for name in ("a", "b"):
        seeds = range(6) if name == "a" else range(10, 16)
        pictures = dict(zip((entry["images"][0] for entry in lines), map(scene, seeds), strict=True))
        own = [entry | {"question": f"{name} {entry['question']}"} for entry in lines]
        write(tmp_path / name, own, pictures)
    (tmp_path / "planted.py").write_text(CONFIG.format(root=tmp_path))
    words = [
        "data",
        "check",
        f"--config={tmp_path / 'planted.py'}",
        f"--out={tmp_path / 'out'}",
        "--processes=1",
    ]
    assert cli.main(words) == 0
    assert "0 findings must be looked at" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    write(
        tmp_path / "a",
        [line("x", "train", "x.png"), line("y", "test", "y.png")],
        {"x.png": scene(0), "y.png": scene(1)},
    )
    whole = (tmp_path / "a" / "y.png").read_bytes()
    (tmp_path / "a" / "y.png").write_bytes(whole[:200] + whole[-12:])  # both ends are there
    data = DataConfig(
        (SourceConfig("jsonl", path="a"),), root=str(tmp_path), cache=str(tmp_path / "cache")
    )
    content, _, _ = audit(Config(data=data), processes=1)
    found = content["sets"]["jsonl"]["unreadable"]
    assert found["n"] == 1 and "y.png" in found["first"]["y.png"]
    assert "jsonl: 1 images cannot be read" in content["look"]


def test_a_killed_audit_goes_on_where_it_stopped(tmp_path, monkeypatch):
    pictures = {f"{i}.png": scene(i) for i in range(9)}
    write(tmp_path / "a", [line(name, "train", name) for name in pictures], pictures)
    data = DataConfig(
        (SourceConfig("jsonl", path="a"),), root=str(tmp_path), cache=str(tmp_path / "cache")
    )
    monkeypatch.setattr(prints, "PART", 2)
    audit(Config(data=data), processes=1)
    files = sorted((tmp_path / "cache/audit").glob("*/*.npy"))
    assert len(files) == 5
    before = [file.stat().st_mtime_ns for file in files]
    whole = np.concatenate([np.load(file) for file in files])
    files[1].unlink()  # as if it had been killed
    files[4].unlink()
    audit(Config(data=data), processes=2)  # the two of them, each in a process of its own
    assert [file.stat().st_mtime_ns == old for file, old in zip(files, before, strict=True)] == [
        1,
        0,
        1,
        1,
        0,
    ]
    np.testing.assert_array_equal(np.concatenate([np.load(file) for file in files]), whole)


def test_a_damaged_part_is_computed_again(tmp_path):
    pictures = {f"{i}.png": scene(i) for i in range(3)}
    write(tmp_path / "a", [line(name, "train", name) for name in pictures], pictures)
    data = DataConfig((SourceConfig("jsonl", path="a"),), root=str(tmp_path), cache=str(tmp_path / "c"))
    (opened,) = open_sources(data)

    def computed():
        return prints.fingerprints(opened.folder, "a", [*pictures], tmp_path / "c", processes=1)

    right = computed()
    (file,) = (tmp_path / "c/audit").glob("*/*.npy")
    whole, notes = file.read_bytes(), file.with_suffix(".json").read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1  # in a record, where its form says nothing
    for damage in (b"", whole[:200], bytes(flipped), b"x" * len(whole), whole[::-1]):
        file.write_bytes(damage)
        np.testing.assert_array_equal(computed().records, right.records)
        assert file.read_bytes() == whole
    for damage in (b"", b"{}", b"[]", notes[:-1], b"[" * 100_000, b'{"notes": 3, "checksum": []}'):
        file.with_suffix(".json").write_bytes(damage)
        assert computed().notes == right.notes and file.with_suffix(".json").read_bytes() == notes


def test_a_process_that_is_ended_from_outside_is_one_sentence(monkeypatch):
    @contextlib.contextmanager
    def broken(workers):
        lost = concurrent.futures.Future()
        lost.set_exception(concurrent.futures.process.BrokenProcessPool("terminated abruptly"))
        yield SimpleNamespace(submit=lambda *_: lost)

    monkeypatch.setattr(prints, "pool_of", broken)
    with pytest.raises(UserError, match="looks at images was ended from outside.*fewer --processes"):
        list(prints._parts([("", []), ("", [])], 2))


def test_fingerprints_belong_to_the_very_images(tmp_path):
    """Of two choices of as many images that begin alike, one is not taken for the other."""
    pictures = {f"{i}.png": scene(i) for i in range(5)}
    write(tmp_path / "a", [line(name, "train", name) for name in pictures], pictures)
    source = SourceConfig("jsonl", path="a")
    (data,) = open_sources(DataConfig((source,), root=str(tmp_path), cache=str(tmp_path / "cache")))
    names = list(pictures)
    found = [
        prints.fingerprints(data.folder, data.id, keys, tmp_path / "cache", processes=1)
        .records[3]["pixels"]
        .tobytes()
        for keys in (names[:4], [*names[:3], names[4]])
    ]
    assert found == [prints.fingerprint(scene(i))["pixels"].tobytes() for i in (3, 4)]


def test_a_leak_counts_once_however_often_it_was_trained_on():
    train = [Asked(f"t{i}", "vqa", ("x",), "is it clear?", "yes", "", "closed") for i in range(3)]
    leaks = text_leaks(train, [Asked("e", "vqa", ("x",), "is it clear", "yes", "", "closed")])
    assert leaks.counts == {
        "question": 1,
        "question_answer": 1,
        "question_text": 1,
        "similar_question": 1,
        "repeating": 3,
        "reworded": 0,
    }
    assert leaks.copier == {"n": 1, "value": 1.0, "templates": {"closed": {"n": 1, "value": 1.0}}}


def test_a_similar_question_with_another_answer_gives_nothing_away():
    train = [Asked("t", "vqa", ("x",), "is the left lung clear?", "yes", "", "closed")]
    test = [Asked("e", "vqa", ("x",), "is the right lung clear?", "no", "", "closed")]
    leaks = text_leaks(train, test)
    assert leaks.counts == {"repeating": 0, "reworded": 0} and leaks.copier["value"] == 0


def test_the_image_and_not_its_name_makes_a_question_the_same(tmp_path):
    """Two sets: one picture under two names is the same image, two pictures under one name are not."""
    pictures = {"0.png": scene(0), "1.png": scene(1)}
    renamed = {"1.png": pictures["0.png"], "0.png": scene(2)}
    for name, split, own in (("a", "train", pictures), ("b", "test", renamed)):
        write(tmp_path / name, [line(f"{name}{key}", split, key) for key in own], own)
    content = audited(tmp_path, "a", "b")
    (between,) = content["between"].values()
    assert between == {
        "image": 1,
        "question": 1,
        "question_answer": 1,
        "similar_question": 1,
        "repeating": 1,
    }
    assert content["leaks"]["question"]["between"] == 1


def audited(root, *names, **settings):
    """Audits sets in our own form, each a folder of `root`, and returns the content of check.json."""
    sources = tuple(SourceConfig("jsonl", id=name, path=name) for name in names)
    data = DataConfig(sources, root=str(root), cache=str(root / "cache"), **settings)
    return audit(Config(data=data), processes=1)[0]


def test_patients_in_two_splits_are_a_leak_whatever_clusters_are_called(tmp_path):
    """Clusters of a table are called images, and those of our own form examples, by default."""
    (tmp_path / "table").mkdir()
    lines, pictures = [], {}
    for start, split in enumerate(("train", "test")):
        rows = ["path,label,cluster"]
        for i in range(3):
            name = f"{split}{i}.png"
            pictures[name] = scene(3 * start + i)
            Image.fromarray(pictures[name]).save(tmp_path / "table" / name)
            rows.append(f"{name},{'clear' if i else 'fluid'},patient{i}")
            more = {"cluster": "patient7"} if i == 0 else {}
            lines.append(line(name, split, name, f"Is {name} clear?", **more))
        (tmp_path / "table" / f"{split}.csv").write_text("\n".join(rows) + "\n")
    write(tmp_path / "own", lines, pictures)
    for name, reader, count in (("table", "classes", 3), ("own", "jsonl", 1)):
        data = DataConfig(
            (SourceConfig(reader, id="a", path=name),), root=str(tmp_path), cache=str(tmp_path / "cache")
        )
        content, pairs, sets = audit(Config(data=data), processes=1)
        assert content["sets"]["a"]["leaks"]["cluster"] == {"train_test": count}
        assert content["look"] == [f"a: {count} of test are given away by train (cluster)"]
        write_audit(tmp_path / name / "out", content, pairs, sets)
        report = (tmp_path / name / "out/check.md").read_text()
        assert f"| examples of the same cluster | {count} |" in report


def test_clusters_that_are_images_or_examples_are_no_leak_of_their_own(tmp_path):
    """The image, of which both splits have the name, is the leak; whatever the clusters are called."""
    lines = [
        line("t0", "train", "0.png", "Is it clear?"),
        line("t1", "train", "1.png", "Who is it?", cluster="t1"),
        line("t2", "train", "2.png", "", "none", "caption", images=["2.png", "3.png"], cluster="3.png"),
        line("e0", "test", "0.png", "Where is it?"),
        line("e1", "test", "3.png", "When is it?"),
    ]
    write(tmp_path / "a", lines, {f"{i}.png": scene(i) for i in range(4)})
    (tmp_path / "a" / "info.json").write_text('{"cluster_word": "patient"}')
    content = audited(tmp_path, "a")
    assert content["sets"]["a"]["leaks"]["cluster"] == {"train_test": 2}
    assert content["look"] == ["a: 2 of test are given away by train (image)"]


@pytest.mark.parametrize("copy", ["equal", "near"])
@pytest.mark.parametrize("second", [False, True], ids=["", "with another image"])
def test_a_question_is_found_about_any_copy_of_its_image(copy, second, tmp_path):
    """The train split has a picture under two names, each with a question of its own."""
    image = scene(0)
    dark = np.clip(image * 0.9, 0, 255).astype(np.uint8)
    pictures = {
        "q1.png": image if copy == "equal" else dark,
        "q2.png": image if copy == "equal" else nearly(image),
        "q3.png": image,
        "r1.png": scene(1),
        "r2.png": scene(1),
        "r3.png": scene(1),
    }
    asked = [("0", "1", "What organ is shown?", "liver"), ("1", "2", "Is there a mass?", "yes")]
    lines = []
    for name, number, question, answer in asked:
        for split, n in (("train", number), ("test", "3")):
            images = [f"q{n}.png", *[f"r{n}.png"] * second]
            lines.append(line(f"{split}{name}", split, "", question, answer, images=images))
    write(tmp_path / "a", lines, pictures)
    for name, split in (("b", "train"), ("c", "test")):
        own = [entry for entry in lines if entry["split"] == split]
        write(tmp_path / name, own, pictures)
    content = audited(tmp_path, "a")
    leaks = {kind: counts["train_test"] for kind, counts in content["sets"]["a"]["leaks"].items()}
    kinds = ("question", "question_answer", "similar_question", "repeating")
    assert [leaks[kind] for kind in kinds] == [2] * len(kinds)
    assert content["sets"]["a"]["copier"]["train_test"]["value"] == 1
    between = audited(tmp_path, "b", "c")["between"]["b/train~c/test"]
    assert [between[kind] for kind in kinds] == [2] * len(kinds)


def test_a_long_question_without_image_is_the_same_without_its_question_mark(tmp_path):
    """Long ones without an image are kept as hashes of their words, without the signs between them."""
    vignette = "A man of 54 years has " + "pain in the chest, and " * 12 + "what is next"
    assert len(vignette) > LONG
    lines = [
        line("t0", "train", "", f"{vignette}?", "rest", "qa", images=[]),
        line("e0", "test", "", vignette, "rest", "qa", images=[]),
    ]
    write(tmp_path / "a", lines, {})
    found = audited(tmp_path, "a")["sets"]["a"]["leaks"]
    kinds = ("question", "question_answer", "repeating")
    assert [found[kind]["train_test"] for kind in kinds] == [1, 1, 1]
    earlier = [_asked(Example("t", "qa", f"{vignette}?", "rest"))]
    later = [_asked(Example("e", "qa", "What now?", "rest"))]
    leaks = text_leaks(earlier, later, None, {"e": [vignette]})
    assert leaks.counts == {"rewording": 1, "repeating": 0, "reworded": 1}


def test_signs_tell_questions_apart_where_words_do_not():
    """Boxes whose digits run together to the same number, and questions of signs alone."""
    one, other = "{<1><11><20><30>}", "{<11><1><20><30>}"
    for earlier, later, count in ((one, one, 1), (one, other, 0), ("+", "+", 1), ("+", "-", 0)):
        asked = [_asked(Example(text, "identify", text, "cell", ("x",))) for text in (earlier, later)]
        assert text_leaks(asked[:1], asked[1:]).counts.get("question", 0) == count


def test_other_wordings_that_the_files_give_are_found():
    train = [
        Asked("t0", "vqa", ("x",), "is there a lesion?", "yes", "", ""),
        Asked("t1", "vqa", ("y",), "is there a lesion?", "yes", "", ""),
    ]
    test = [
        Asked("e0", "vqa", ("x",), "do you see any abnormal mass?", "yes", "", ""),
        Asked("e1", "vqa", ("x",), "which organ?", "liver", "", ""),
    ]
    leaks = text_leaks(train, test, None, {"e0": ["Is there  a lesion"], "e1": ["Nothing."]})
    assert leaks.counts == {"rewording": 1, "repeating": 0, "reworded": 1}
    assert leaks.pairs["rewording"] == [("t0", "e0")]


def test_the_most_similar_question_is_that_of_comparing_all():
    """Against the plain rule: the first of the highest ratio, and the first near one that agrees."""
    rng = np.random.default_rng(0)
    words = ["is", "the", "left", "right", "lung", "clear", "there", "a", "mass", "in"]
    made = [
        Asked(
            str(i), "vqa", ("x",), " ".join(rng.choice(words, 6)), str(rng.choice(["yes", "no"])), "", ""
        )
        for i in range(120)
    ]
    for asked in made[:30]:
        others = made[30:]
        ratios = [difflib.SequenceMatcher(None, asked.question, o.question).ratio() for o in others]
        near = [
            o for o, r in zip(others, ratios, strict=True) if r > SIMILAR and o.answer == asked.answer
        ]
        expected = others[ratios.index(max(ratios))], near[0] if near else None
        assert _most_similar(asked, others) == expected


def test_counts_are_compared_with_the_published_ones_that_are_nearest(tmp_path):
    info = Info(
        "x",
        ("vqa",),
        counts={"train": 10, "test": 5},
        other_counts={
            "half": {"train": 5, "test": 2, "test vqa": 2, "train images": 1, "train hue=red": 4}
        },
    )
    count = {"train": 5, "test": 3, "test vqa": 3, "train images": 1, "train hue=red": None}.get
    name, numbers = nearest_counts(info, count)
    assert name == "half"
    assert numbers == {"train": (5, 5), "test": (3, 2), "test vqa": (3, 2), "train images": (1, 1)}
    assert nearest_counts(Info("y", ("vqa",)), count) == ("", {})


def test_records_that_no_row_holds_are_said_before_training(tmp_path):
    lines = [
        line("short", "train", "0.png", answer="yes"),
        line("long", "train", "0.png", answer="no " * 90),
    ]
    write(tmp_path / "a", lines, {"0.png": scene(0)})
    content = audited(tmp_path, "a", row_answers=40, row_tokens=512)
    found = content["answer_tokens"]["a"]
    assert found["n"] == 2 and found["answer"]["most"] > 90
    (setting,) = found["over"]
    assert setting == "config.data.row_answers"
    assert found["over"][setting]["n"] == 1 and found["over"][setting]["first"][0].startswith("long (")
    assert any(
        "1 of 2 training records need more than config.data.row_answers=40" in s for s in content["look"]
    )
    assert content["sets"]["a"]["splits"]["train"]["over_50_words"] == {"n": 1, "vqa": 1}


def test_blind_scores_stand_beside_those_of_a_copier(tmp_path):
    """Train mostly says yes; test asks the very questions of train, whose answers are no."""
    train = [
        line(f"t{i}", "train", f"{i}.png", f"Is part {i} well?", "yes" if i < 3 else "no")
        for i in range(5)
    ]
    test = [line(f"e{i}", "test", f"{i}.png", f"Is part {i} well?", "no") for i in (3, 4)]
    write(tmp_path / "a", train + test, {f"{i}.png": scene(i) for i in range(5)})
    found = audited(tmp_path, "a")["sets"]["a"]
    scores = found["blind"]["test"]["vqa"]
    assert scores["n"] == 2 and scores["majority_per_template"]["exact_match"] == 0
    assert (
        scores["majority_per_question"]["exact_match"] == scores["majority_per_question"]["bleu1"] == 1
    )
    assert found["copier"]["train_test"]["value"] == 1


def test_boxes_outside_their_image_and_empty_ones_are_named(tmp_path, monkeypatch):
    """A reader of one's own may give any box; those here leave them out themselves."""
    module = types.ModuleType("lab_boxes")
    module.INFO = Info("lab_boxes", ("refer",), splits=("train",))

    def read(folder, split, options, skipped):
        skipped.append("r9: object 3: box (1, 1, 1, 1) is empty")
        whole, narrow = "{<0><0><100><100>}", "{<40><20><40><40>}"
        boxes = (
            ((0, 0, 10, 20), whole),
            ((0, 0, 11, 20), whole),
            ((4, 4, 5, 8), narrow),
            (None, "here"),
        )
        for number, (box, answer) in enumerate(boxes):
            example = Example(f"r{number}", "refer", "cell", answer, ("x",), box)
            yield example, (np.zeros((20, 10, 3), np.uint8),)

    module.read = read
    monkeypatch.setitem(sys.modules, "lab_boxes.reader", module)
    data = DataConfig((SourceConfig("lab_boxes.reader"),), cache=str(tmp_path))
    content, _, _ = audit(Config(data=data), processes=1)
    found = content["sets"]["reader"]
    assert found["wrong_boxes"]["n"] == 3
    assert (
        "r1: box (0, 0, 11, 20) leaves its image of 10 x 20 pixels" in found["wrong_boxes"]["first"][0]
    )
    assert "r2: box (40, 20, 40, 40) is empty in hundredths" in found["wrong_boxes"]["first"][1]
    assert "r3: no box in its text" in found["wrong_boxes"]["first"][2]
    assert found["left_out"]["reasons"] == {"object ...: box ... is empty": 1}


def test_images_of_one_patient_by_their_headers_belong_together():
    """A name in the records counts within its set only, an identifier in DICOM headers in all."""
    notes = {"x": {"patient": "aa", "study": "s"}, "y": {"patient": "aa", "study": "t"}}
    one, other = (
        _with_headers(Asked(id, "vqa", (image,), "what?", id, "", "", (("case", "7"),)), notes)
        for id, image in (("t", "x"), ("e", "y"))
    )
    assert text_leaks([one], [other]).pairs.keys() == {"patient", "case"}
    assert text_leaks([one], [other], {}, one_set=False).pairs == {"patient": [("t", "e")]}
