"""Runs on a mesh: every verb that opens one gives on eight devices what it gives on one, and no
device holds more than its share of what is sharded while it is read.
"""

import contextlib
import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support.fake_brain import Squares

from unimed_jax import main as cli
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.runs.open import found_mesh, initial_leaves, open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train import loop
from unimed_jax.verbs.options import read_config

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = """
from support.fake_brain import tiny_config
def get_config(base=""):
    config = tiny_config(steps=3, save_every=3)
    config.name = "sharded"
    config.model.compute_dtype = "float32"
    config.model.decoder.width, config.model.decoder.mlp_width, config.model.decoder.heads = 64, 128, 4
    config.model.decoder.vocab = 704  # the table of the tokens can be shared by all axes
    config.evaluate.splits, config.evaluate.limit, config.evaluate.max_new_tokens = ("test",), 2, 6
    config.mesh.auto, config.mesh.fsdp, config.mesh.tensor = False, 4, 2
    config.train.rules = (
        dict(match="connector/*", train=True),
        dict(match="decoder/layers/mlp/up/*", train=True),
        dict(match="*", train=False),
    )
    if base:
        config.init = (("seed", ""), ("run", base))
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "config.py").write_text(CONFIG)
    Image.fromarray(Squares().image("test0")).save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def base(place, quick_compiles):
    """A run trained on eight devices."""
    loop.train(read_config(str(place / "config.py")), place / "base")
    return place / "base"


@pytest.fixture(scope="module")
def run(place, base):
    """A run whose frozen leaves are those of `base`, which its own checkpoint does not hold."""
    assert cli.main([f"--config={place / 'config.py'}:{base}", f"--workdir={place / 'run'}"]) == 0
    return place / "run"


@contextlib.contextmanager
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *settings: None)
        yield


def held() -> np.ndarray:
    """Bytes of the arrays that live on each device; two arrays may share a buffer."""
    buffers = {}
    for array in jax.live_arrays():
        with contextlib.suppress(RuntimeError):  # deleted since it was listed
            for shard in array.addressable_shards:
                buffers[shard.device.id, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    total = np.zeros(jax.device_count(), np.int64)
    for (device, _), size in buffers.items():
        total[device] += size
    return total


@contextlib.contextmanager
def sampled():
    """Samples what the devices hold besides what they held before: after every restored leaf, and
    all the time.
    """
    already = jax.live_arrays()  # kept, so that none of other tests is freed in between
    before, samples, stop = held(), [], threading.Event()
    make = jax.make_array_from_single_device_arrays

    def made(*arguments, **more):
        array = make(*arguments, **more)
        samples.append(held() - before)
        return array

    def watch():
        while not stop.wait(0.002):
            samples.append(held() - before)

    watcher = threading.Thread(target=watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_single_device_arrays", made)
        watcher.start()
        try:
            yield samples
        finally:
            stop.set()
            watcher.join()
    samples.append(held() - before)
    del already


def share_of(leaves) -> int:
    """Bytes of these leaves on each device, sharded ones by their share."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves.values())


def test_a_run_lies_where_training_laid_it(run):
    opened = open_run(run)
    assert dict(opened.mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "expert": 1}
    places = sharding.parameter_shardings(parameters(abstract(opened.config.model)), opened.mesh)
    leaves = parameters(opened.model)
    for path, leaf in leaves.items():
        assert leaf.sharding.is_equivalent_to(places[path], leaf.ndim), path
    whole = sum(leaf.nbytes for leaf in leaves.values())
    assert share_of(leaves) < whole / 2  # so that a whole copy on one device would be seen below
    with opened.inside():
        assert not jax.sharding.get_abstract_mesh().empty


def test_a_mesh_that_does_not_fit_the_devices_is_laid_out_again(run):
    config = open_run(run).config
    settings = json.loads((run / "config.json").read_text())
    settings["mesh"] |= {"fsdp": 16}
    other = from_config_dict(settings)
    assert dict(found_mesh(config).shape)["fsdp"] == 4
    assert found_mesh(other).size == 8 and dict(found_mesh(other).shape)["fsdp"] == 1
    with one_device():
        assert found_mesh(config) is None and open_run(run).mesh is None


def test_opening_never_holds_more_than_a_share(run):
    """Neither of the leaves of the checkpoint nor of those that come from the other run."""
    open_run(run)  # compiles
    jax.clear_caches()
    with sampled() as samples:
        opened = open_run(run)
        leaves = parameters(opened.model)
        limit = 1.2 * share_of(leaves)
    # Both runs are open while leaves are taken from the other, of which those that train are not needed.
    trained = share_of(
        {path: leaf for path, leaf in leaves.items() if not path.startswith(("vision/", "decoder/e"))}
    )
    assert len(samples) > len(leaves)
    most = np.max(samples, axis=0)
    assert (most <= limit + trained).all(), (most, limit, trained)
    assert (samples[-1] <= limit).all(), (samples[-1], limit)


def test_a_checkpoint_is_read_straight_into_its_shards(base):
    open_run(base)
    with sampled() as samples:
        leaves = parameters(open_run(base).model)
        limit = 1.2 * share_of(leaves)
    assert len(samples) > len(leaves) and (np.max(samples, axis=0) <= limit).all(), (
        np.max(samples, axis=0),
        limit,
    )


def test_a_chained_run_starts_from_the_same_numbers_on_any_mesh(base, run):
    opened = open_run(run)
    config, tokenizer = opened.config, opened.tokenizer
    spread, sources = initial_leaves(config, tokenizer, found_mesh(config))
    alone, _ = initial_leaves(config, tokenizer)
    assert set(sources.values()) == {f"run {base}"}
    for path, leaf in spread.items():
        assert len(leaf.sharding.device_set) == 8 and len(alone[path].sharding.device_set) == 1
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(alone[path]), err_msg=path)


def test_random_parameters_may_stand_in_place_of_a_runs(base, run):
    """A new connector on an old encoder and decoder, of the numbers that the seed gives anyway."""
    opened = open_run(run)
    old, other = opened.config, ("seed", "connector/*")
    config = dataclasses.replace(old, init=(*old.init, other))
    leaves, sources = initial_leaves(config, opened.tokenizer)
    fresh, _ = initial_leaves(dataclasses.replace(old, init=(("seed", ""),)), opened.tokenizer)
    kept, _ = initial_leaves(old, opened.tokenizer)
    for path, leaf in leaves.items():
        new = path.startswith("connector/")
        assert sources[path] == ("seed" if new else f"run {base}")
        np.testing.assert_array_equal(leaf, (fresh if new else kept)[path], err_msg=path)
    assert not np.array_equal(kept["connector/experts/up"], fresh["connector/experts/up"])
    with pytest.raises(UserError, match=r"\('seed', 'conector/\*'\) matches no parameter; did you mean"):
        wrong = dataclasses.replace(old, init=(*old.init, ("seed", "conector/*")))
        initial_leaves(wrong, opened.tokenizer)


def predictions(run):
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    return {line["id"]: line["prediction"] for line in lines}


def test_evaluate_on_eight_devices_and_on_one(run):
    after_training = predictions(run)
    assert len(set(after_training.values())) > 3
    assert cli.main(["evaluate", f"--run={run}"]) == 0
    eight = predictions(run)
    with one_device():
        assert cli.main(["evaluate", f"--run={run}"]) == 0
    assert after_training == eight == predictions(run)


def test_predict_on_eight_devices_and_on_one(run, place, capsys):
    def said() -> str:
        words = [
            "predict",
            f"--run={run}",
            "--task=vqa",
            "--text=What colour?",
            f"--image={place / 'image.png'}",
        ]
        assert cli.main(words) == 0
        return capsys.readouterr().out

    eight = said()
    with one_device():
        assert said() == eight and eight.strip()


@pytest.mark.parametrize("kind", ["model", "decoder"])
def test_export_on_eight_devices_and_on_one(run, tmp_path, kind):
    def exported(name):
        assert cli.main(["export", f"--run={run}", f"--out={tmp_path / name}", f"--format={kind}"]) == 0
        return tmp_path / name

    eight = exported("eight")
    with one_device():
        one = exported("one")
    a, b = load_file(eight / "model.safetensors"), load_file(one / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("kind", ["model", "decoder"])
def test_export_never_holds_more_than_a_share(base, tmp_path, kind):
    leaves = parameters(open_run(base).model)
    limit = 1.2 * share_of(leaves)
    del leaves
    with sampled() as samples:
        assert (
            cli.main(["export", f"--run={base}", f"--out={tmp_path / 'out'}", f"--format={kind}"]) == 0
        )
    most = np.max(samples, axis=0)
    assert len(samples) > 10 and (most > 0).all() and (most <= limit).all(), (most, limit)
