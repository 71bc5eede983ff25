"""The cache of a frozen encoder's features, on coloured squares: what it holds, and what it refuses."""

import concurrent.futures
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_processes
from array_record.python.array_record_module import ArrayRecordReader
from support.fake_brain import tiny_config

from unimed_jax import features, processes
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.unimed import UniMed
from unimed_jax.settings import from_config_dict
from unimed_jax.train import loop
from unimed_jax.train.log import Log
from unimed_jax.train.loss import task_losses
from unimed_jax.train.program import build
from unimed_jax.train.start import prepare

pytestmark = pytest.mark.usefixtures("on_one_device")
CONFIG = """
import os, signal
from support.fake_brain import tiny_config
from unimed_jax import features
from unimed_jax.analyze import chain

features.FILE_IMAGES = 3
chain.evaluate_run = lambda run, config: None
written = []

class Dying(features.ArrayRecordWriter):
    def write(self, record):
        written.append(record)
        if len(written) == 6 and os.environ["JAX_PROCESS_ID"] == "1":  # in its second file
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(record)

def get_config(fate=""):
    if fate == "dies":
        features.ArrayRecordWriter = Dying
    config = tiny_config(steps=3, save_every=3, cache_features=True)
    config.train.rules = (dict(match="vision/*", train=False), dict(match="*", train=True))
    return config
"""
FROZEN = (dict(match="vision/*", train=False), dict(match="*", train=True))


def settings(cache, images=24, fit="stretch", **train):
    """Settings of a tiny run whose encoder is frozen."""
    config = tiny_config(
        **{"steps": 6, "save_every": 2, "rules": FROZEN, "cache_features": True} | train
    )
    config.data.cache = str(cache)
    config.data.fit, config.data.row_images = fit, 8
    if images != 24:
        config.data.sources = (dict(config.data.sources[0]) | dict(options=dict(images=images)),)
    return config


@pytest.fixture(scope="module")
def started(on_one_device, tmp_path_factory):
    """The same run before its first step, from features and from images; tests read its cache."""
    place = tmp_path_factory.mktemp("started")
    cached = prepare(from_config_dict(settings(place / "cache")), place / "run")
    config = from_config_dict(settings(place / "cache", cache_features=False))
    pipeline = Pipeline(cached.datasets, config, cached.tokenizer)
    return {True: cached, False: dataclasses.replace(cached, config=config, pipeline=pipeline)}


@pytest.fixture
def cache(started, tmp_path):
    """A copy of the cache, which a test may damage."""
    return shutil.copytree(started[True].config.data.cache_folder, tmp_path / "cache")


@pytest.fixture
def encoded(monkeypatch):
    """Lists how many images each call has to encode."""
    counts, compute = [], features._compute

    def counting(missing, *rest):
        counts.append(len(missing))
        compute(missing, *rest)

    monkeypatch.setattr(features, "_compute", counting)
    return counts


def files_of(cache):
    return sorted((cache / "features").glob("*/*.array_record"))


@pytest.fixture
def opened(started):
    """Opens the cache in a folder for the run that `started` has prepared, as a start does."""

    def of(cache, mesh=None):
        start = started[True]
        config = dataclasses.replace(
            start.config, data=dataclasses.replace(start.config.data, cache=str(cache))
        )
        frozen = start.frozen
        if mesh is not None:
            frozen = jax.device_put(frozen, sharding.parameter_shardings(frozen, mesh))
        with sharding.inside(mesh):
            return features.cached(config, start.pipeline, start.program.model, frozen, mesh)

    return of


def same(ours, theirs, start, **limits):
    """Compares the features of all images; without limits they must be equal."""
    for dataset, key in start.pipeline.pictures():
        x, y = (each.read(dataset.digest(key)).astype(np.float32) for each in (ours, theirs))
        np.testing.assert_allclose(x, y, **{"rtol": 0, "atol": 0} | limits)


# ---- what batches hold -------------------------------------------------------------------------
def encode(start, images):
    """Encodes images as the cache does."""
    model = start.model
    run = jax.jit(lambda pixels: model.features(pixels).astype(jnp.bfloat16))
    return np.asarray(run(images))


def test_a_batch_holds_the_encoders_features_of_the_same_images(started):
    ours, theirs = (next(started[cached].pipeline.batches(2)) for cached in (True, False))
    assert set(ours) ^ set(theirs) == {"features", "images"}
    assert {name: x.dtype for name, x in ours.items()} == {
        name: x.dtype for name, x in started[True].program.batch.items()
    }
    for name in ours.keys() & theirs.keys():
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    images = theirs["images"]
    expected = encode(started[False], images.reshape(-1, *images.shape[2:]))
    expected = expected.reshape(ours["features"].shape)
    used = ours["image_tasks"] >= 0
    assert 0 < used.sum() < used.size
    np.testing.assert_array_equal(ours["features"][used], expected[used])
    assert not ours["features"][~used].any()
    with pytest.raises(KeyError):
        started[True].pipeline._features.read(bytes(32))


def losses_and_gradients(start, batch, compiled=True):
    def loss(leaves):
        model = with_parameters(start.program.model, {**start.frozen, **leaves})
        return task_losses(model, batch, start.config.loss, None, None)[0].total

    run = jax.value_and_grad(loss)
    value, gradients = (jax.jit(run) if compiled else run)(start.state.leaves)
    return {"loss": value} | gradients


def from_features_and_from_images(started, monkeypatch, compiled):
    """Losses and gradients of one batch: from the cache, from rounded and from plain features."""
    batches = {cached: next(start.pipeline.batches()) for cached, start in started.items()}
    ours = losses_and_gradients(started[True], batches[True], compiled)
    plain = losses_and_gradients(started[False], batches[False], compiled)
    exact = UniMed.features

    @jax.jit
    def rounded(self, images):  # astype there and back would be left out by the compiler
        return jax.lax.reduce_precision(exact(self, images), exponent_bits=8, mantissa_bits=7)

    monkeypatch.setattr(UniMed, "features", rounded)
    return ours, losses_and_gradients(started[False], batches[False], compiled), plain


def furthest(ours, theirs):
    """The largest difference of any value, in parts of its array's largest number."""
    return max(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in ours)


def test_losses_and_gradients_equal_those_from_images_to_the_rounding(started, monkeypatch):
    ours, rounded, plain = from_features_and_from_images(started, monkeypatch, compiled=True)
    # Programs that differ sum in another order, a hundredth of what rounding the features does.
    assert ours["loss"] == rounded["loss"] and furthest(ours, rounded) < 3e-5
    assert 1e-3 < furthest(ours, plain) < 2**-7


@pytest.mark.slow
def test_losses_and_gradients_are_exactly_those_from_rounded_features(started, monkeypatch):
    ours, rounded, _ = from_features_and_from_images(started, monkeypatch, compiled=False)
    assert ours.keys() == rounded.keys() and len(ours) > 20
    for name, value in ours.items():
        np.testing.assert_array_equal(value, rounded[name], err_msg=name)


# ---- the loop ----------------------------------------------------------------------------------
class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_from_features_stops_and_continues_bit_for_bit(cache, tmp_path, monkeypatch, encoded):
    given = settings(cache)
    given.evaluate.entries = (dict(source="squares", task="vqa", split="val", every=3),)
    config = from_config_dict(given)
    straight = loop.train(config, tmp_path / "straight")
    write = Log.write

    def stopping(self, at, values):
        if at == 3:
            raise Killed
        write(self, at, values)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", stopping)
        with pytest.raises(Killed):
            loop.train(config, tmp_path / "run")
    ours = loop.train(config, tmp_path / "run")
    assert ours.step == straight.step == 6 and not encoded
    held_out = [
        [line["val/squares/vqa/loss"] for line in test_processes.lines(tmp_path, run) if len(line) == 2]
        for run in ("straight", "run")
    ]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 2  # measured on images
    for path, leaf in parameters(straight.model).items():
        np.testing.assert_array_equal(parameters(ours.model)[path], leaf, err_msg=path)


def test_a_mesh_computes_the_features_of_one_device(started, opened, tmp_path, encoded):
    mesh = jax.make_mesh((2, 2, 1, 2), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    ours, theirs = opened(tmp_path, mesh), started[True].pipeline._features
    assert len(ours) == len(theirs) == 24 and encoded == [24] and ours.maker == theirs.maker
    same(ours, theirs, started[True], rtol=2**-7, atol=1e-4)


# ---- what is computed again --------------------------------------------------------------------
def test_a_kill_loses_one_file_and_the_rest_is_computed_later(
    started, opened, tmp_path, monkeypatch, encoded
):
    monkeypatch.setattr(features, "FILE_IMAGES", 7)

    class Dying(features.ArrayRecordWriter):
        written = 0

        def write(self, record):
            type(self).written += 1
            if self.written == 20:  # in the third file
                raise Killed
            super().write(record)

    with monkeypatch.context() as patch:
        patch.setattr(features, "ArrayRecordWriter", Dying)
        with pytest.raises(Killed):
            opened(tmp_path)
    whole = {path: path.read_bytes() for path in files_of(tmp_path)}
    assert len(whole) == 2 and encoded == [24]
    (left := next(iter(whole)).with_name(".half.array_record.unimed-4194305")).touch()  # by a SIGKILL
    ours = opened(tmp_path)
    assert not left.exists()
    assert encoded == [24, 10] and len(files_of(tmp_path)) == 4
    assert all(path.read_bytes() == content for path, content in whole.items())
    same(ours, started[True].pipeline._features, started[True])
    opened(tmp_path)
    assert encoded == [24, 10]


def test_a_second_run_waits_and_finds_what_the_first_has_made(opened, cache, encoded, monkeypatch):
    (path,) = files_of(cache)
    hidden, said = path.with_suffix(".hidden"), threading.Event()
    path.rename(hidden)
    monkeypatch.setattr(processes, "say", lambda text: said.set())
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        (path.parent / "lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(opened, cache)
        assert said.wait(60) and not second.done()
        hidden.rename(path)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert len(second.result(60)) == 24 and not encoded


def test_files_of_other_processes_that_show_late_are_awaited(opened, cache, tmp_path, monkeypatch):
    (path,) = files_of(cache)

    def elsewhere(*arguments):
        hidden = shutil.copy(path, arguments[-1].folder / "hidden")
        threading.Timer(1.0, lambda: os.rename(hidden, hidden.with_name(path.name))).start()

    monkeypatch.setattr(features, "_compute", elsewhere)
    assert len(opened(tmp_path / "new")) == 24


def test_only_new_images_are_encoded(cache, tmp_path, encoded):
    start = prepare(from_config_dict(settings(cache, images=30)), tmp_path / "run")
    assert encoded == [6] and len(start.pipeline._features) == 30


def test_what_the_features_depend_on_names_their_folder(started, monkeypatch):
    start = started[True]
    vision = {path: leaf for path, leaf in start.frozen.items() if path.startswith("vision/")}
    config = start.config
    of_vision = dataclasses.replace(config.model.vision, normalise="picture")
    other = [
        dataclasses.replace(config, data=dataclasses.replace(config.data, fit="crop")),
        dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="bfloat16")),
        dataclasses.replace(config, model=dataclasses.replace(config.model, vision=of_vision)),
    ]
    changed = vision | {"vision/patch/kernel": vision["vision/patch/kernel"].at[3, 5].multiply(1.01)}
    makers = [features.maker_of(each, vision) for each in (config, *other)]
    makers.append(features.maker_of(config, changed))
    monkeypatch.setattr(features, "FORM", features.FORM + 1)
    makers.append(features.maker_of(config, vision))
    monkeypatch.undo()
    assert len(set(makers)) == 6 and makers[0] == start.pipeline._features.maker
    same = dataclasses.replace(config, seed=7, data=dataclasses.replace(config.data, rows=8))
    assert features.maker_of(same, vision) == makers[0]


@pytest.mark.slow
def test_killed_processes_go_on_together_and_train_to_the_losses_of_one(tmp_path):
    (tmp_path / "squares.py").write_text(CONFIG)
    test_processes.finish(tmp_path, "alone", start_processes(tmp_path, "alone", 1))
    (cache := tmp_path / "cache").rename(tmp_path / "cache of one")

    started = start_processes(tmp_path, "both", 2, "dies")
    assert [process.wait(timeout=240) for process in started][1] == -signal.SIGKILL
    assert "process 0 of 2 has lost another one" in test_processes.said(tmp_path, "both", 0)
    left = files_of(cache)
    assert 0 < len(left) < 8 and list((cache / "features").glob("*/.*"))  # and half a file
    test_processes.finish(tmp_path, "both", start_processes(tmp_path, "both", 2))
    said = test_processes.said(tmp_path, "both", 0)
    count = sum(ArrayRecordReader(str(path)).num_records() - 1 for path in left)
    assert (
        f"features of {24 - count} images are computed once" in said and f"; {count} are there" in said
    )
    assert not list((cache / "features").glob("*/.*"))
    losses = [
        [line["train/loss"] for line in test_processes.lines(tmp_path, run)] for run in ("alone", "both")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert len(losses[0]) == 3


def start_processes(place, run, count, fate=""):
    cache = f"--config.data.cache={place / 'cache'}"
    return test_processes.start(place, run, count, 1, cache, experts=fate)


# ---- what is refused ---------------------------------------------------------------------------
def refused(match, opened, cache):
    with pytest.raises(UserError, match=match) as error:
        opened(cache)
    assert "\n" not in str(error.value)


def test_an_encoder_that_trains_is_refused(tmp_path):
    config = from_config_dict(settings(tmp_path, rules=(dict(match="*", train=True),)))
    sentence = r"config\.train\.cache_features=True needs a frozen encoder, and vision/\S+ trains; put"
    with pytest.raises(UserError, match=sentence):
        build(config, None)


def test_varied_pictures_are_refused(tmp_path):
    config = settings(tmp_path)
    config.data.sources = (dict(config.data.sources[0]) | dict(augment=dict(turns=True)),)
    with pytest.raises(UserError, match=r"sources\[0\]\.augment: config\.train\.cache_features=True"):
        from_config_dict(config)
    config.train.cache_features = False
    from_config_dict(config)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(
    opened, tmp_path, monkeypatch, encoded
):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=24 * 16 * 16 * 2))
    refused(r"features of 24 images need 0\.00 GiB in .* are free; free some", opened, tmp_path)
    assert not encoded and not files_of(tmp_path)


def test_a_disk_that_becomes_full_leaves_no_half_file(opened, tmp_path, monkeypatch):
    class Full(features.ArrayRecordWriter):
        def write(self, record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(features, "ArrayRecordWriter", Full)
    refused(r"No space left on device.* nothing of it was kept; free some", opened, tmp_path)
    assert [path.name for path in tmp_path.glob("features/*/*")] == ["lock"]


def test_a_row_that_several_processes_hold_is_written_once(monkeypatch):
    """As on a slice of TPUs, where the two chips of a row may belong to two hosts."""
    rows = [(0, 3), (0, 1), (1, 2, 3)]
    monkeypatch.setattr(processes, "gathered", lambda own: [*map(list, rows)])
    written = []
    for process, own in enumerate(rows):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        flags = features._written_here(sharding.Share(own, 4))
        written += [row for row, flag in zip(own, flags, strict=True) if flag]
    assert sorted(written) == [0, 1, 2, 3]


def test_processes_that_share_no_folder_are_refused(opened, cache, tmp_path, monkeypatch):
    sentence = r"do not find the same files in .*; set config\.data\.cache to a folder that all"
    with monkeypatch.context() as patch:  # what the others have found differs
        patch.setattr(processes, "gathered", lambda value: [value, "another"])
        refused(sentence, opened, cache)
    monkeypatch.setattr(features, "_compute", lambda *arguments: None)  # the others' files are elsewhere
    monkeypatch.setattr(features, "LATE", 1.0)
    refused(sentence, opened, tmp_path / "new")


@pytest.mark.parametrize(
    "part", ["cut", "empty", "first record", "features", "a record too few", "short"]
)
def test_a_damaged_file_is_named_and_computed_again_once_it_is_removed(
    started, opened, cache, encoded, part
):
    (path,) = files_of(cache)
    content = bytearray(path.read_bytes())
    if part == "features":
        content[content.index(ArrayRecordReader(str(path)).read([9])[0]) + 40] ^= 1
    elif part in ("a record too few", "short"):
        reader = ArrayRecordReader(str(path))
        writer = features.ArrayRecordWriter(str(path.with_suffix(".short")), features.WRITING)
        count = reader.num_records()
        for i, record in enumerate(reader.read(range(count if part == "short" else count - 1))):
            writer.write(record[:-2] if part == "short" and i else record)
        writer.close()
        content = path.with_suffix(".short").read_bytes()
    elif part == "first record":
        content[content.index(b'"maker"') + 40] ^= 1
    else:
        del content[len(content) // 2 if part == "cut" else 0 :]
    path.write_bytes(content)
    sentence = rf"file of features {path} is damaged \(.*\); remove it"
    if part in ("features", "short"):  # this shows when they are read
        found = opened(cache)
        with pytest.raises(UserError, match=sentence):
            same(found, found, started[True])
    else:
        refused(sentence, opened, cache)
    path.unlink()
    assert not encoded
    same(opened(cache), started[True].pipeline._features, started[True])
    assert encoded == [24] and files_of(cache) == [path]


def test_a_file_of_another_encoder_is_refused(opened, cache):
    (path,) = files_of(cache)
    content = path.read_bytes()
    path.write_bytes(b"")
    writer = features.ArrayRecordWriter(str(path), features.WRITING)
    writer.write(json.dumps({"maker": "another", "images": "00" * 32}).encode())
    writer.write(bytes(512))
    writer.close()
    refused(rf"{path} holds the features of another encoder; remove it", opened, cache)
    path.write_bytes(content)
    opened(cache)
