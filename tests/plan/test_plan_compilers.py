"""What plans compile for: chips that are not here, answering, and how experts run."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest
from support import tiny

from unimed_jax.config import RuleConfig
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.grouped import SHOWN
from unimed_jax.plan import compile as compiling
from unimed_jax.plan import table, topology
from unimed_jax.plan.chips import CHIPS, chip_of
from unimed_jax.plan.compile import Job, Limits, compile_one
from unimed_jax.predict.sizes import sizes_for_any
from unimed_jax.train.program import make_mesh
from unimed_jax.verbs.options import read_config

LIMITS = Limits(300, 8e9)


def test_chips_are_found_by_the_name_that_jax_gives_them():
    names = {
        "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A10": "a10", "NVIDIA L4": "l4", "NVIDIA GeForce RTX 4090": "rtx4090",
    }  # fmt: skip
    assert {name: chip_of(name).name for name in names} == names
    for other in (
        *("TFRT_CPU_0", "TPU v5x", "NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA A10G"),
        *("NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090 Laptop GPU"),
    ):
        assert chip_of(other) is None, other
    for chip in CHIPS.values():
        assert chip.source and 0.85 * chip.memory < chip.usable < 1.02 * chip.memory
        assert (chip.gpu is not None) == (chip.platform == "gpu")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["v5e:2x2", "h100:2"])
def test_a_toy_compiles_for_accelerators(cache, tmp_path, text):
    try:
        topology.check_compiler([topology.parse(text)])
    except UserError as error:
        pytest.skip(str(error))
    job = Job(read_config(str(cache / "toy.py")), topology.parse(text), "train")
    outcome = compile_one(job, tmp_path, LIMITS)
    assert not outcome.failed, outcome.failed
    row = table.row_of(outcome)
    assert row["fits"] and re.search("v5 lite|H100", row["device"]) and outcome.text
    assert row["gib_by_kind"]["temporaries"] > 0 and 1 < row["cost"]["flops"]["ratio"] < 3
    assert row["roofline"]["bound"] in ("compute", "memory", "network")


@pytest.mark.slow
def test_a_gpu_is_planned_with_cudnns_attention(cache, tmp_path):
    try:
        topology.check_compiler([topology.parse("h100:1")])
    except UserError as error:
        pytest.skip(str(error))
    words = ["--config.model.compute_dtype=bfloat16", "--config.data.row_tokens=256"]
    job = Job(read_config(str(cache / "toy.py"), words), topology.parse("h100:1"), "train")
    outcome = compile_one(job, tmp_path, LIMITS)
    assert not outcome.failed, outcome.failed
    assert "fmha" in outcome.text


@pytest.mark.slow
def test_a_gpu_reads_each_weight_once_a_token(cache, tmp_path):
    """Layers are separate and no product is joined with another, which would copy their kernels."""
    try:
        topology.check_compiler([topology.parse("h100:1")])
    except UserError as error:
        pytest.skip(str(error))
    decoder = {"width": 1024, "mlp_width": 2048, "depth": 5, "heads": 8, "kv_heads": 8, "head_dim": 128}
    words = [f"--config.model.decoder.{name}={value}" for name, value in decoder.items()]
    words += ["--config.evaluate.batch=2", "--config.model.compute_dtype=bfloat16"]
    words += ["--config.text.max_prompt=64"]
    config = read_config(str(cache / "toy.py"), [*words, "--config.model.frozen_dtype=bfloat16"])
    rules = (RuleConfig("connector/*", True), RuleConfig("*", False))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, rules=rules))
    job = Job(config, topology.parse("h100:1"), "decode")
    outcome = compile_one(job, tmp_path, LIMITS)
    assert not outcome.failed, outcome.failed
    row = table.row_of(outcome)
    assert row["cost"]["bytes"]["ratio"] < 1.2 and row["cost"]["unknown"] == []


@pytest.mark.slow
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_answering_is_planned_with_its_cache(cache, tmp_path, program):
    config = read_config(str(cache / "toy.py"))
    outcome = compile_one(Job(config, topology.parse("cpu:4"), program), tmp_path, LIMITS)
    assert not outcome.failed, outcome.failed
    row = table.row_of(outcome)
    decoder, sizes = config.model.decoder, outcome.result["sizes"]
    with sharding.inside(make_mesh(config, jax.devices()[:4])):
        assert sizes == sizes_for_any(config, config.evaluate.batch)._asdict()
    places = sizes["prompt"] + sizes["answer"]
    slots = sizes["slots"] / 4  # of a device
    numbers = 2 * decoder.depth * decoder.kv_heads * decoder.head_dim * slots * places
    assert row["fits"] and row["gib_needed"] * 2**30 > 4 * numbers  # float32
    # the tokens picked so far, and six numbers of each slot, which every device holds
    others = 4 * slots * 4 * (sizes["answer"] + 5) + 4 * slots + 4
    assert row["gib_by_kind"]["cache"] * 2**30 == 4 * numbers + others
    flops, pairs = row["cost"]["flops"], 0
    if program == "prefill":  # plain attention multiplies all tokens of a row with all
        shape = decoder.heads, decoder.head_dim, sizes["rows"] / 4, sizes["tokens"] ** 2, decoder.depth
        pairs = 4 * math.prod(shape)
    assert flops["compiled"] == pytest.approx(flops["useful"] + pairs, rel=0.1)
    assert row["cost"]["unknown"] == []
    assert sum(row["gib_by_kind"].values()) == pytest.approx(row["gib_needed"])
    assert f"jit({'enter' if program == 'prefill' else 'advance'})" in outcome.text
    assert set(row["gib_by_kind"]).isdisjoint({"optimizer"}) and row["gib_by_kind"]["activations"] == 0


MEASURED = """
import json, re, sys
from pathlib import Path
import jax, numpy as np
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters
from unimed_jax.train.program import build, make_mesh
from unimed_jax.train.step import first_state
from unimed_jax.verbs.options import read_config

def resident(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

config = read_config(sys.argv[1], sys.argv[2:])
mesh = make_mesh(config, jax.devices())
program = build(config, mesh)
step = program.lower().compile()
with sharding.inside(mesh):
    leaves = {p: jax.numpy.zeros(x.shape, x.dtype) for p, x in parameters(program.model).items()}
    state = first_state({p: leaves[p] for p in program.state.leaves}, program.optimizer, mesh)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in program.batch.items()}
    batch, rate = sharding.on_devices(batch, mesh), np.float32(1e-3)
    rate = jax.device_put(rate, sharding.everywhere(mesh))
    # the first step starts threads and loads what the compiler has made
    state, _ = jax.block_until_ready(step(state, {}, batch, rate))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    before = resident("VmRSS")
    jax.block_until_ready(step(state, {}, batch, rate))
    print(json.dumps(resident("VmHWM") - before))
"""


@pytest.mark.slow
def test_predicted_temporaries_are_what_a_step_takes(cache, tmp_path):
    """Measured by the peak of the process's resident memory over a step on two simulated devices.

    Roughly: threads keep buffers of their own, and not every page is touched.
    """
    words = ["--config.data.rows=128", "--config.data.row_tokens=512", "--config.data.row_answers=256"]
    job = Job(read_config(str(cache / "toy.py"), words), topology.parse("cpu:2"), "train")
    outcome = compile_one(job, tmp_path, LIMITS)
    predicted = 2 * outcome.result["memory"]["temp"]
    environ = {**os.environ, **topology.environment(job.topology)}
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the config imports what tests share
    command = [sys.executable, "-c", MEASURED, str(cache / "toy.py"), *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert predicted > 500e6  # far more than the rest of the process changes by
    assert 0.6 < json.loads(done.stdout) / predicted < 1.5, (done.stdout, predicted)


@pytest.mark.parametrize("way", SHOWN)
def test_how_experts_run_is_said(tmp_path, way):
    job = Job(tiny.training(), topology.parse("v5e:2x2"), "train")
    outcome = compiling.Outcome(job, {"experts": way}, tmp_path, 1.0, kept=False)
    assert f"v5e:2x2: {SHOWN[way]}." in table._notes(outcome)
    assert not table._notes(dataclasses.replace(outcome, result={"experts": ""}))
