"""The accelerator's benchmark at toy size, its batches, and the count of useful FLOPs against the
compiler's.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import accelerator
import harness

from unimed_jax.config import VISUAL_TASKS, Config, DataConfig, LossConfig, RuleConfig, TrainConfig
from unimed_jax.config_file import load_config_file
from unimed_jax.data import layout
from unimed_jax.settings import from_config_dict
from unimed_jax.train.flops import useful_flops
from unimed_jax.train.program import build

BENCHMARKS = Path(accelerator.__file__).parent
SCALE = accelerator.SCALES["tiny"]


def test_every_row_is_measured_and_written(tmp_path):
    """In a process of its own, from another folder, with nothing installed but what the environment
    has.
    """
    out = tmp_path / "speed.jsonl"
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), f"--out={out}", "--tiny"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about, *rows = map(json.loads, out.read_text().splitlines())
    assert about["platform"] == "cpu"
    assert [row["row"] for row in rows] == [row.name for row in accelerator.rows_of(SCALE)]
    for row in rows:
        assert "skipped" not in row and "failed" not in row
        assert all(np.isfinite(value) for name, value in row.items() if name != "row")
        if row["row"].startswith("train"):
            # ln 256 = 5.5: the model predicts something, and learns.
            assert row["last loss"] < row["first loss"] < 7
            assert row["of matmul"] > 0
        if row["row"].startswith("decode"):
            assert row["of copy"] > 0
    table = out.with_suffix(".md").read_text().splitlines()
    assert len(table) == 4 + len(rows) and table[-1].startswith(f"| {rows[-1]['row']} | ")


def test_what_does_not_fit_the_budget_or_fails_is_noted_and_the_rest_runs(tmp_path, monkeypatch):
    def out_of_memory(scale, earlier):
        raise RuntimeError("RESOURCE_EXHAUSTED:\nmuch")

    rows = [
        accelerator.Row("one", 5, lambda scale, earlier: {"x": 1.0}),
        accelerator.Row("large", 5, out_of_memory),
        accelerator.Row("slow", 60, lambda scale, earlier: {"x": 2.0}),
        accelerator.Row("last", 5, lambda scale, earlier: {"x": earlier["one"]["x"]}),
    ]
    monkeypatch.setattr(accelerator, "rows_of", lambda scale: rows)
    monkeypatch.setattr(accelerator.jax, "clear_caches", lambda: None)  # those of other tests
    one, large, slow, last = accelerator.measure(SCALE, 50, tmp_path / "out.jsonl")
    assert one["x"] == last["x"] == 1
    assert large["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: much"
    assert slow["skipped"].startswith("it takes about 60 s, and ")
    assert "RESOURCE_EXHAUSTED: much" in (tmp_path / "out.md").read_text()


def test_its_model_is_that_of_the_published_config():
    published = from_config_dict(load_config_file(str(BENCHMARKS.parent / "configs" / "cmoe.py")))
    # Set to the paper's by `fidelity`, though there are no experts in this decoder.
    unused = {"moe": published.model.moe, "remat": published.model.remat}
    assert dataclasses.replace(accelerator.FULL, **unused) == published.model
    assert accelerator.training(accelerator.SCALES["full"], 4, 1024).train.rules == published.train.rules


@pytest.mark.parametrize("rows, tokens", [(2, 16), (3, 64)])
def test_full_rows_are_what_the_layout_makes(rows, tokens):
    config = accelerator.training(SCALE, rows, tokens)
    batch = harness.full_rows(config)
    data, per_image, images = config.data, config.model.tokens_per_image, config.data.row_images
    length, answer = tokens // images, data.row_answers // images
    groups: list[list[layout.Group]] = []
    for b in range(rows):
        groups.append([])
        for m in range(images):
            here = slice(m * length + 1 + per_image, (m + 1) * length)
            words = batch["tokens"][b, here].tolist()
            task = VISUAL_TASKS[batch["image_tasks"][b, m]]
            encoded = layout.encode_ids(
                [[], words[:-answer]], words[-answer:], per_image, harness.BOS, task=task
            )
            groups[-1].append(layout.Group((encoded,), (batch["images"][b, m],)))
    shape = layout.RowShape(tokens, images, data.row_answers, per_image, config.model.vision.image_size)
    expected = layout.training_batch(groups, shape, harness.PAD, "token")
    assert expected.keys() == batch.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value, err_msg=name)
        assert batch[name].dtype == value.dtype
    assert (batch["segments"] > 0).all()


ADAPT = (RuleConfig("decoder/*/lora_?", True), RuleConfig("connector/*", True), RuleConfig("*", False))


@pytest.mark.parametrize("rules", [ADAPT, (RuleConfig("*", True),)], ids=["adapters", "everything"])
def test_useful_flops_against_the_compilers_count(rules):
    """Of a program without recomputation and loops (one layer each): more, by attention's hidden
    half and the rest.
    """
    model = dataclasses.replace(
        SCALE.model,
        vision=dataclasses.replace(SCALE.model.vision, width=128, mlp_width=512, depth=1),
        decoder=dataclasses.replace(SCALE.model.decoder, width=128, mlp_width=512, head_dim=32, depth=1),
        **{"remat": "none", "compute_dtype": "float32", "frozen_dtype": "float32"},
    )
    data = DataConfig(rows=4, row_tokens=64, row_images=2, row_answers=16)
    config = Config(
        model=model, data=data, loss=LossConfig(reduction="token"), train=TrainConfig(rules=rules)
    )
    useful = useful_flops(config, examples=1)
    counted = build(config, None).lower().cost_analysis()["flops"]
    assert 1 < counted / sum(useful.values()) < 1.25
