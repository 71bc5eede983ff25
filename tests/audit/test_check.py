"""The audit finds planted leaks and faults, each once and nothing else; on real files the known ones."""

import json

import numpy as np
import pytest
from PIL import Image

from unimed_jax import main as cli
from unimed_jax.audit import fingerprints as prints
from unimed_jax.audit.check import audit
from unimed_jax.audit.questions import Asked, text_leaks
from unimed_jax.config import Config, DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources

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
        line("t20", "train", "train3.png", "Is there a fracture of the left rib?", "no"),
        line("t21", "train", "train4.png", "", report, "caption", cluster="p1"),
        line("e0", "test", "same.png"),
        line("e1", "test", "near.png"),
        line("e2", "test", "mirror.png"),
        line("e3", "test", "train3.png", "is there a fracture of the left rib", "no"),
        line("e4", "test", "new.png", "", report, "caption", cluster="p1"),
        line("e5", "test", "other.png", "Who is it?", "call 555-123-4567"),
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
        "cluster": 2,  # p1, and train3.png: without a name of its own an image is its cluster
        "repeating": 1,
    }
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
    (tmp_path / "a" / "y.png").write_bytes((tmp_path / "a" / "y.png").read_bytes()[:200])
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
    audit(Config(data=data), processes=1)
    assert [file.stat().st_mtime_ns == old for file, old in zip(files, before, strict=True)] == [
        1,
        0,
        1,
        1,
        0,
    ]
    np.testing.assert_array_equal(np.concatenate([np.load(file) for file in files]), whole)


def test_fingerprints_belong_to_the_very_images(tmp_path):
    """Of two choices of as many images that begin alike, one is not taken for the other."""
    pictures = {f"{i}.png": scene(i) for i in range(5)}
    write(tmp_path / "a", [line(name, "train", name) for name in pictures], pictures)
    source = SourceConfig("jsonl", path="a")
    (data,) = open_sources(DataConfig((source,), root=str(tmp_path), cache=str(tmp_path / "cache")))
    names = list(pictures)
    found = [
        prints.fingerprints(data.folder, keys, tmp_path / "cache", processes=1)
        .records[3]["pixels"]
        .tobytes()
        for keys in (names[:4], [*names[:3], names[4]])
    ]
    assert found == [prints.fingerprint(scene(i))["pixels"].tobytes() for i in (3, 4)]


def test_near_pairs_are_those_of_comparing_all(monkeypatch):
    """Against every pair compared, with blocks of candidates much smaller than their number."""
    rng = np.random.default_rng(0)
    scenes = [scene(i) for i in range(40)]
    a = np.array([prints.fingerprint(image) for image in scenes])
    b = np.array([prints.fingerprint(nearly(scenes[i])) for i in rng.permutation(40)[:15]])
    monkeypatch.setattr(prints, "BLOCK", 7)
    found = {tuple(pair) for pair in prints.near_pairs(a, b).tolist()}
    bits = np.bitwise_count(a["bits"][:, None] ^ b["bits"][None]).sum(axis=2)  # [40, 15]
    flat = [x["thumbnail"].reshape(len(x), -1).astype(float) for x in (a, b)]
    likeness = np.corrcoef(*flat)[:40, 40:]
    expected = {
        tuple(pair)
        for pair in np.argwhere((bits <= prints.DISTANCE) & (likeness >= prints.LIKENESS)).tolist()
    }
    assert found == expected and len(found) == 15


def test_a_leak_counts_once_however_often_it_was_trained_on():
    train = [Asked(f"t{i}", "vqa", ("x",), "is it clear?", "yes", "", "closed") for i in range(3)]
    leaks = text_leaks(train, [Asked("e", "vqa", ("x",), "is it clear", "yes", "", "closed")])
    assert leaks.counts == {"question": 1, "question_answer": 1, "similar_question": 1, "repeating": 3}
    assert leaks.copier == {"n": 1, "value": 1.0, "templates": {"closed": {"n": 1, "value": 1.0}}}


def test_a_similar_question_with_another_answer_gives_nothing_away():
    train = [Asked("t", "vqa", ("x",), "is the left lung clear?", "yes", "", "closed")]
    test = [Asked("e", "vqa", ("x",), "is the right lung clear?", "no", "", "closed")]
    leaks = text_leaks(train, test)
    assert leaks.counts == {"repeating": 0} and leaks.copier["value"] == 0


def test_the_known_leaks_of_real_sets(real_data, cache):
    pictures = {"images": "../vqa_rad/VQA_RAD Image Folder"}
    sources = (
        SourceConfig("vqa_rad"),
        SourceConfig("vqa_rad", id="mmq", path="vqa_rad_mmq", options=pictures),
        SourceConfig("vqa_rad", id="resplit", path="vqa_rad_resplit", options=pictures),
        SourceConfig("medpix2"),
    )
    content, _, _ = audit(Config(data=DataConfig(sources, root=str(real_data), cache=cache)))
    official, mmq = (content["sets"][name] for name in ("vqa_rad", "mmq"))
    assert official["leaks"]["similar_question"]["train_test"] == 3
    assert (
        mmq["leaks"]["similar_question"]["train_test"] == 93
        and mmq["leaks"]["repeating"]["train_test"] == 24
    )
    scores = [found["copier"]["train_test"]["templates"] for found in (official, mmq)]
    rounded = [{name: round(part["value"], 3) for name, part in score.items()} for score in scores]
    assert rounded == [{"closed": 0.404, "open": 0.011}, {"closed": 0.695, "open": 0.458}]
    assert content["between"]["vqa_rad/test~resplit/train"]["question"] == 377
    names = {
        split: content["between"][f"mmq/train~medpix2/{split}"]["name"]
        for split in ("train", "val", "test")
    }
    assert names == {"train": 17, "val": 1, "test": 1}
    assert content["between"]["vqa_rad/test~medpix2/train"]["name"] == 9
