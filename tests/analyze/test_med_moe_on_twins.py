"""Med-MoE's published chain, all stages, on twins of its data sets at a tiny size."""

import json

import numpy as np
import pytest

from unimed_jax import main as cli
from unimed_jax.data.twins import write_twin
from unimed_jax.model import sharding

SETS = ("vqa_rad", "slake", "path_vqa", "medmnist")
STAGE = """
import math
from unimed_jax.config_file import load_config_file
def get_config():
    config = load_config_file("{repository}/configs/med_moe/{stage}.py:stablelm")
    vision, decoder = config.model.vision, config.model.decoder
    vision.image_size, vision.patch_size, vision.width = 16, 8, 12
    vision.depth, vision.heads, vision.mlp_width = 2, 2, 20
    decoder.vocab = config.text.vocab = 640
    decoder.width, decoder.depth, decoder.mlp_width = 16, 2, 24
    decoder.heads, decoder.kv_heads, decoder.head_dim = 4, 4, 8
    config.model.compute_dtype = config.model.frozen_dtype = "float32"
    config.model.remat = "none"
    if "{stage}" == "align":
        config.init = (("seed", ""),)
    config.data.root, config.data.cache = "{root}", "{root}/cache"
    config.text.max_prompt, config.text.max_answer = 320, 96
    config.data.rows, config.data.row_tokens, config.data.row_answers = 8, 420, 100
    config.train.accumulation = 1
    config.train.steps, config.train.save_every, config.train.log_every = 4, 4, 2
    config.optimizer.warmup_steps = 1
    config.router_fit.labels, config.router_fit.epochs, config.router_fit.batch = (10, 20), 2, 8
    config.evaluate.batch, config.evaluate.max_new_tokens, config.evaluate.bootstrap = 8, 4, 20
    config.evaluate.limit = 2
    return config
"""
CHAIN = """
import ml_collections
from pathlib import Path
def get_config():
    names = ("align", "instruct", "router", "moe")
    files = tuple(str(Path(__file__).with_name(f"{name}.py")) for name in names)
    return ml_collections.ConfigDict(dict(name="med_moe_stablelm", stages=files))
"""


@pytest.mark.slow
def test_every_stage_reads_its_sets_and_is_scored(tmp_path, monkeypatch, request, quick_compiles):
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: None)
    for name in SETS:
        write_twin(name, tmp_path / name, records=24)
    write_twin("llava", tmp_path / "llava_med_align", records=24, layout="pairs")
    write_twin("llava", tmp_path / "llava_med_instruct", records=24)
    for stage in ("align", "instruct", "router", "moe"):
        text = STAGE.replace("{repository}", str(request.config.rootpath)).replace(
            "{root}", str(tmp_path)
        )
        (tmp_path / f"{stage}.py").write_text(text.replace("{stage}", stage))
    (tmp_path / "all.py").write_text(CHAIN)
    monkeypatch.chdir(tmp_path)
    assert cli.main([f"--config={tmp_path / 'all.py'}"]) == 0
    metrics = json.loads((tmp_path / "runs/med_moe_stablelm/moe/metrics.json").read_text())
    assert set(metrics["sets"]) == {"vqa_rad", "slake", "path_vqa", "pneumoniamnist", "organcmnist"}
    report = json.loads((tmp_path / "runs/med_moe_stablelm/router/router.json").read_text())
    assert report["classes"] == ["MRI", "CT", "pathology", "X-Ray"]
    assert report["images"]["without label"] > 0  # VQA-RAD names no modality for a head
    for result in report["splits"].values():
        by_set = sum(map(np.array, result["sets"].values()))
        np.testing.assert_array_equal(by_set, result["confusion"])
    load = json.loads((tmp_path / "runs/med_moe_stablelm/moe/experts.json").read_text())
    assert load["layers"] == [0] and load["classes"] == report["classes"]
    for split, of_class in load["splits"].items():
        images = [found["images"] for found in of_class.values()]
        np.testing.assert_array_equal(images, np.sum(report["splits"][split]["confusion"], axis=1))
        for found in of_class.values():
            for kind in ("visual", "text"):
                sums = np.sum(found[kind], axis=1)
                np.testing.assert_allclose(sums, float(found["images"] > 0), atol=1e-6)
