"""The cache of a frozen encoder's features on data sets of every kind, and in places of every kind."""

import dataclasses
import json
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.fake_brain import tiny_config

from unimed_jax import features
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.errors import UserError
from unimed_jax.plan.ideal import ideal
from unimed_jax.settings import from_config_dict
from unimed_jax.train.flops import useful_flops
from unimed_jax.train.start import prepare

pytestmark = pytest.mark.usefixtures("on_one_device")
FROZEN = (dict(match="vision/*", train=False), dict(match="*", train=True))
VIEWS = {"qa": 0, "cls": 1, "vqa": 2, "caption": 3}  # images of a study, by the task that asks


def studies(folder, views=VIEWS, each=2):
    """Writes studies whose images are half transparent; the last one's are those of the first again."""
    rng, lines = np.random.default_rng(0), []
    (folder / "views").mkdir(parents=True)
    number = 0
    for i in range(each * len(views)):
        task, count = list(views.items())[i % len(views)]
        keys = [f"views/{i}_{view}.png" for view in range(count)]
        for key in keys:
            pixels = rng.integers(0, 256, (16, 20, 4)).astype(np.uint8)
            Image.fromarray(pixels, "RGBA").save(folder / key)
            number += 1
        record = {"id": f"{i}", "images": keys, "task": task, "split": "train"}
        record |= {"cluster": f"patient{i}", "answer": f"study {i} of {count}"}
        lines.append(json.dumps(record | {"question": f"What does study {i} show?"}))
    (folder / "studies.jsonl").write_text("\n".join(lines))
    return number


def settings(folder, *images, **train):
    """Settings that train on one source for each of `images`, its settings of images."""
    train = {"steps": 2, "save_every": 2, "rules": FROZEN, "cache_features": True} | train
    config = tiny_config(**train)
    source = dict(name="jsonl", path=str(folder))
    config.data.sources = tuple(
        source | dict(id=f"studies{i}", image=image) for i, image in enumerate(images or ({},))
    )
    config.data.cache = str(folder / "cache")
    config.evaluate.splits = ("train",)
    config.data.rows, config.data.row_images, config.data.row_tokens = 4, 6, 224
    return config


def assert_batches_hold_what_the_encoder_makes(start, steps=2):
    """Returns how many images it compared."""
    config = dataclasses.replace(
        start.config, train=dataclasses.replace(start.config.train, cache_features=False)
    )
    plain = Pipeline(start.datasets, config, start.tokenizer)
    model, compared = start.model, 0
    run = jax.jit(lambda pixels: model.features(pixels).astype(jnp.bfloat16))
    ours, theirs = start.pipeline.batches(), plain.batches()
    for _ in range(steps):
        batch, other = next(ours), next(theirs)
        used = batch["image_tasks"] >= 0
        images = other["images"]
        expected = np.asarray(run(images.reshape(-1, *images.shape[2:])), np.float32)
        expected = expected.reshape(batch["features"].shape)
        actual = batch["features"].astype(np.float32)
        np.testing.assert_allclose(actual[used], expected[used], rtol=2**-7, atol=1e-4)
        assert not actual[~used].any()
        compared += used.sum()
    return compared


def test_studies_of_several_images_read_in_two_ways(tmp_path):
    count = studies(tmp_path)
    ways = ({"background": "black"}, {"background": "white"})
    start = prepare(from_config_dict(settings(tmp_path, *ways, accumulation=2)), tmp_path / "run")
    assert len(start.pipeline._features) == 2 * count
    assert assert_batches_hold_what_the_encoder_makes(start, 4) > 10


def test_a_set_of_two_sources_is_encoded_once(tmp_path):
    count = studies(tmp_path)
    start = prepare(from_config_dict(settings(tmp_path, {}, {})), tmp_path / "run")
    assert len(start.pipeline._features) == count


@pytest.mark.slow
@pytest.mark.parametrize("images", [6, 0])
def test_text_alone(tmp_path, images):
    assert studies(tmp_path, {"qa": 0}) == 0
    config = settings(tmp_path)
    config.data.row_images = images
    start = prepare(from_config_dict(config), tmp_path / "run")
    batch = next(start.pipeline.batches())
    assert len(start.pipeline._features) == 0
    assert batch["features"].shape == start.program.batch["features"].shape
    assert not batch["features"].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_encoder(tmp_path, kind):
    studies(tmp_path)
    made = []
    for kernels in (kind, "plain"):
        config = settings(tmp_path)
        config.model.vision.width, config.model.vision.mlp_width = 64, 64
        config.model.frozen_kernels = kernels
        start = prepare(from_config_dict(config), tmp_path / f"run {kernels}")
        made.append(start.pipeline._features.folder)
        assert_batches_hold_what_the_encoder_makes(start)
    assert made[0] != made[1]


# ---- places ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def start(on_one_device, tmp_path_factory):
    place = tmp_path_factory.mktemp("started")
    studies(place / "set")
    return prepare(from_config_dict(settings(place / "set")), place / "run")


def opened(start, cache):
    """Opens the features of a prepared run in another folder, as its start does."""
    config = start.config
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=str(cache)))
    return features.cached(config, start.pipeline, start.program.model, start.frozen, None)


def values(start, found):
    return [found.read(dataset.digest(key)) for dataset, key in start.pipeline.pictures()]


def test_a_disk_that_fills_at_any_moment_leaves_whole_files(start, small_disk, monkeypatch):
    usage, page = shutil.disk_usage, os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1 << 40))
    monkeypatch.setattr(features, "FILE_IMAGES", 5)  # of 12
    cache, ballast, ends = small_disk / "cache", small_disk / "ballast", []
    for pages in (0, 1, 17, 33, 50, 90, 140):
        shutil.rmtree(cache, ignore_errors=True)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        ballast.write_bytes(bytes(free - pages * page))
        try:
            ends.append(len(opened(start, cache)))
        except UserError as error:
            ends.append(str(error))
            assert "No space left" in ends[-1] and "\n" not in ends[-1]
        ballast.unlink()
        kept = list(cache.glob("features/*/*.array_record"))
        assert not list(cache.glob("features/*/.*"))
        found = opened(start, cache)
        assert {*kept} <= {*cache.glob("features/*/*.array_record")}
        assert all(map(np.array_equal, values(start, found), values(start, start.pipeline._features)))
    assert all(isinstance(end, str) for end in ends[:3]) and ends[-1] == 12


def remount(disk, way):
    subprocess.run(["mount", "-o", f"remount,{way}", str(disk)], check=True)


def test_a_cache_that_cannot_be_written_serves_what_it_holds(start, small_disk):
    link = small_disk.parent / "link"
    link.symlink_to(small_disk)
    assert len(opened(start, link)) == 12
    (file,) = small_disk.glob("features/*/*.array_record")
    (file.parent / "lock").unlink()
    remount(small_disk, "ro")
    assert len(opened(start, link)) == 12
    remount(small_disk, "rw")
    file.unlink()
    remount(small_disk, "ro")
    sentence = r"features cannot be kept in .* \(Read-only file system\); set config\.data\.cache"
    with pytest.raises(UserError, match=sentence):
        opened(start, link)


def test_a_cache_that_goes_during_training_is_one_sentence(start, tmp_path):
    found = opened(start, tmp_path)
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(UserError, match=r"\S+ was removed while a run used it; start the run again"):
        values(start, found)


def test_a_place_that_cannot_be_written_is_refused(start, tmp_path):
    (tmp_path / "features").write_text("")
    with pytest.raises(UserError, match=r"features cannot be kept in .*; set config\.data\.cache"):
        opened(start, tmp_path)


# ---- what it saves -----------------------------------------------------------------------------
def test_an_encoder_that_does_not_run_counts_nothing(start):
    cached = start.config
    plain = dataclasses.replace(cached, train=dataclasses.replace(cached.train, cache_features=False))
    ours, theirs = useful_flops(cached), useful_flops(plain)
    assert ours == theirs | {"vision": 0.0} and theirs["vision"] > 0
    for program in ("train", "prefill"):
        less, all_ = (ideal(config, {}, program) for config in (cached, plain))
        assert (less.flops < all_.flops and less.bytes < all_.bytes) == (program == "train")
        assert program == "train" or less == all_
