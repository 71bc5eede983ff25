"""The published mixture of twelve data sets, on twins: proportions, order, and a run from end to end."""

import dataclasses
import itertools
import json
import os
from collections import Counter

import numpy as np
import pytest

from unimed_jax import main as cli
from unimed_jax.config_file import load_config_file
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.order import source_order
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.data.twins import write_twin
from unimed_jax.model import sharding
from unimed_jax.runs.folder import load_text
from unimed_jax.settings import from_config_dict

SETS = ("medqa", "pubmedqa", "slake", "path_vqa", "samed", "medpix", "mimic_cxr", "medmnist")
# configs/cmoe.py at a size that trains in seconds; the data, its form and its order are as published.
CONFIG = """
from unimed_jax.config_file import load_config_file
def get_config():
    config = load_config_file("configs/cmoe.py")
    vision, decoder = config.model.vision, config.model.decoder
    vision.image_size, vision.patch_size, vision.width = 16, 4, 12
    vision.depth, vision.heads, vision.mlp_width = 2, 2, 20
    decoder.vocab = config.text.vocab = 640
    decoder.width, decoder.depth, decoder.mlp_width = 16, 2, 24
    decoder.heads, decoder.kv_heads, decoder.head_dim = 4, 4, 4
    config.model.connector.router_hidden = None
    config.model.lora.dropout = 0.0
    config.model.compute_dtype = config.model.frozen_dtype = "float32"
    config.init = (("seed", ""),)
    config.data.root, config.data.cache = "{root}", "{root}/cache"
    config.data.row_tokens, config.data.row_answers = 512, 256
    config.train.steps, config.train.save_every, config.train.log_every = 24, 24, 8
    config.evaluate.batch, config.evaluate.max_new_tokens, config.evaluate.bootstrap = 8, 4, 20
    config.evaluate.splits, config.evaluate.limit = ("test",), 2
    return config
"""


def test_the_mixture_is_drawn_in_the_published_proportions():
    """Chi-square over 20,000 batches; 32.9 is its 99.9 % quantile for 12 sources."""
    config = from_config_dict(load_config_file("configs/cmoe.py"))
    weights = [source.weight for source in config.data.sources]
    assert len(weights) == 12 and config.data.mixing == "per_batch"
    order = source_order(weights, seed=0)
    drawn = Counter(next(order) for _ in range(20_000))
    expected = [20_000 * weight / sum(weights) for weight in weights]
    assert sum((drawn[i] - n) ** 2 / n for i, n in enumerate(expected)) < 32.9
    by_set = Counter()
    for source, weight in zip(config.data.sources, weights, strict=True):
        by_set[source.name, *source.tasks] += weight
    assert by_set == {
        ("medqa", "qa"): 2, ("pubmedqa", "qa"): 2, ("slake", "vqa"): 5, ("path_vqa", "vqa"): 5,
        ("slake", "refer"): 4,
        ("slake", "identify"): 4, ("samed", "refer"): 4, ("samed", "identify"): 4, ("medpix",
        "caption"): 8,
        ("mimic_cxr", "caption"): 8, ("medmnist", "cls"): 4,
    }  # fmt: skip


# ---- on twins --------------------------------------------------------------------------------------
MIXING = {
    "per_batch": {},  # as published
    "per_example": {"mixing": "per_example", "packing": True, "row_images": 3, "window": 24},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with twins of all sets, their stores, and the config."""
    folder = tmp_path_factory.mktemp("twins")
    for name in SETS:
        write_twin(name, folder / name, records=12)
    (folder / "cmoe.py").write_text(CONFIG.replace("{root}", os.fspath(folder)))
    return folder


@pytest.fixture(scope="module")
def made(place):
    """Makes a pipeline over the twins."""
    config = from_config_dict(load_config_file(str(place / "cmoe.py")))
    datasets = open_sources(config.data)
    tokenizer = load_text(place, config, datasets)

    def make(mode, **data):
        changed = dataclasses.replace(config.data, **MIXING[mode], **data)
        return Pipeline(datasets, dataclasses.replace(config, data=changed), tokenizer)

    return make


@pytest.mark.slow
def test_the_pipeline_draws_in_the_published_proportions(made):
    """Per example: 20,000 draws. Per batch: the order of batches whose proportions are tested above."""
    pipe = made("per_example", threads=0)
    weights = [source.weight for source in pipe._config.data.sources]
    drawn = Counter(pipe._order[number][0] for number in range(20_000))
    expected = [20_000 * weight / sum(weights) for weight in weights]
    assert sum((drawn[i] - n) ** 2 / n for i, n in enumerate(expected)) < 32.9
    pipe = made("per_batch", threads=0)
    rows, order = pipe._config.data.rows, source_order(weights, pipe._config.seed)
    for step, source in enumerate(itertools.islice(order, 200)):
        assert {pipe.draw(step * rows + row).source for row in range(rows)} == {source}


def take(pipe, count, **where):
    return list(itertools.islice(pipe.batches(**where), count))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MIXING)
def test_order_and_resume_do_not_depend_on_threads_and_hosts(made, mode):
    whole = take(made(mode, threads=0), 6)
    assert len({batch["tokens"].tobytes() for batch in whole}) == 6
    assert made(mode, threads=0).record_ids(3) == made(mode, threads=8).record_ids(3)
    for threads, shares in ((0, 2), (1, 1), (1, 4), (2, 2), (8, 1), (8, 4)):
        pipe, start = (
            made(mode, threads=threads),
            3 * (shares > 1),
        )  # one that resumes, one that does not
        cut = np.split(np.arange(pipe._config.data.rows), shares)
        parts = [take(pipe, 3, start_step=start, own=own.tolist()) for own in cut]
        for step, expected in enumerate(whole[start : start + 3]):
            for key, array in expected.items():
                found = np.concatenate([part[step][key] for part in parts])
                np.testing.assert_array_equal(found, array, err_msg=f"{threads} {shares} {key}")


@pytest.mark.slow
def test_the_published_config_runs_on_twins(place, tmp_path, monkeypatch, quick_compiles):
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: None)
    assert cli.main([f"--config={place / 'cmoe.py'}", f"--workdir={tmp_path / 'run'}"]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["fidelity"] == "paper"
    scored = {(name, task) for name, splits in metrics["sets"].items() for task in splits["test"]}
    assert scored == {
        ("medqa", "qa"), ("pubmedqa", "qa"), ("slake", "vqa"), ("slake", "refer"), ("slake", "identify"),
        ("path_vqa", "vqa"), ("samed", "refer"), ("samed", "identify"), ("medpix", "caption"),
        ("mimic_cxr", "caption"),
        ("dermamnist", "cls"), ("organsmnist", "cls"),
    }  # fmt: skip
    assert (tmp_path / "run/contact_sheet.png").stat().st_size > 5_000
