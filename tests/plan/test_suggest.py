"""What is suggested for chips, how its cost is foretold, and prices."""

import dataclasses
import json
import math

import jax
import pytest
from support import tiny

from unimed_jax import main as cli
from unimed_jax.config import MeshConfig
from unimed_jax.errors import UserError
from unimed_jax.plan import compile as compiling
from unimed_jax.plan import roofline, suggest, table, topology
from unimed_jax.plan.chips import CHIPS
from unimed_jax.plan.programs import device_bytes
from unimed_jax.plan.topology import parse
from unimed_jax.settings import from_config_dict
from unimed_jax.train.program import build, make_mesh
from unimed_jax.verbs import options

V5E = parse("v5e:2x2")
# what codes need: 64 inputs are one block, 128 are two
BLOCKS = {
    "vision": {"width": 64, "mlp_width": 64, "depth": 1},
    "decoder": {"width": 64, "head_dim": 16, "mlp_width": 128},
}
COSTS = ("flops", "bytes", "collective_bytes")


@pytest.fixture(scope="module")
def config():
    return tiny.training(rows=16)


@pytest.fixture(scope="module")
def found(config) -> list:
    return suggest.estimates(config, V5E)


def test_variants_divide_rows_heads_and_experts(config):
    model = tiny.config(moe={"experts": 4}, lora={"targets": ("q", "v")})
    found = list(suggest.variants(dataclasses.replace(config, model=model), 8))
    sizes = {
        tuple(getattr(c.mesh, axis) for axis in ("data", "fsdp", "tensor", "expert")) for c in found
    }
    assert {math.prod(size) for size in sizes} == {8}
    assert (8, 1, 1, 1) in sizes and (1, 4, 2, 1) in sizes and (2, 1, 1, 4) in sizes
    assert not any(tensor > 2 or expert == 8 for *_, tensor, expert in sizes)  # 2 kv heads, 4 experts
    micros = {c.train.accumulation for c in found if c.mesh.data * c.mesh.fsdp * c.mesh.expert == 8}
    assert micros == {1, 2}  # 16 rows
    assert {c.model.remat for c in found} == {"none", "dots", "full"}
    assert len({json.dumps(dataclasses.asdict(c)) for c in found}) == len(found)


def test_the_fastest_that_is_expected_to_fit_comes_first(config, found):
    first, *others = suggest.best(found, V5E)
    assert [first.step, *(s.step for s in others)] == sorted(s.step for s in found)
    assert first.config.model.remat == "none"  # which computes nothing twice
    most = {}
    for s in found:  # what is kept: full < dots < none; smaller micro-batches keep less
        if s.config.mesh == first.config.mesh:
            most[s.config.model.remat, s.config.train.accumulation] = s.memory
    assert most["full", 1] < most["dots", 1] < most["none", 1] and most["none", 2] < most["none", 1]
    # on a chip with less memory only the smaller ones are left, and at last none
    small = dataclasses.replace(CHIPS["v5e"], usable=most["full", 1] / suggest.MARGIN)
    left = suggest.best(found, dataclasses.replace(V5E, chip=small))
    assert len(left) < len(found) and max(s.memory for s in left) <= most["full", 1]
    none = dataclasses.replace(CHIPS["v5e"], usable=1.0)
    with pytest.raises(UserError, match="is expected to fit; the smallest takes about .* GiB: --config"):
        suggest.best(found, dataclasses.replace(V5E, chip=none))
    with pytest.raises(UserError, match="--suggest cannot rank for --topology=cpu:8"):
        suggest.ranked(config, parse("cpu:8"))
    odd = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=15))
    with pytest.raises(UserError, match="config.data.rows=15 can be shared by no mesh of 16 devices"):
        suggest.ranked(odd, parse("v5e:4x4"))


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_what_is_held_is_counted_as_it_is_stored(config, moments):
    """Blocks of codes, of which a mesh divides fewer than numbers, and moments of two bytes."""
    model = dataclasses.replace(tiny.config(**BLOCKS), frozen_kernels="nf4", frozen_dtype="bfloat16")
    sizes = {"data": 1, "fsdp": 1, "tensor": 4, "expert": 1}
    wanted = dataclasses.replace(
        config,
        model=model,
        mesh=MeshConfig(auto=False, **sizes),
        optimizer=dataclasses.replace(config.optimizer, moments_dtype=moments),
        data=dataclasses.replace(config.data, row_tokens=0, row_answers=0),
    )
    estimate = suggest._Estimate(wanted, V5E)
    estimate.activations = lambda remat: 0.0
    built = build(wanted, make_mesh(wanted, jax.devices()[:4]))
    trained, frozen = device_bytes(built.state.leaves), device_bytes(built.frozen)
    each = {"float32": 4, "bfloat16": 3}[moments]  # itself, its gradient and two moments
    assert estimate._memory(wanted, sizes) == frozen + each * trained


def test_settings_to_copy_are_those_that_were_compiled(config, found):
    best = found[-1].config
    words = suggest.settings(best)
    plain = compiling.to_dict(config)
    plain["data"]["sources"] = ({"name": "brain"},)
    copied = options.with_overrides(options.ml_collections.ConfigDict(plain), words)
    assert (copied.mesh, copied.model.remat) == (best.mesh, best.model.remat)
    assert copied.train.accumulation == best.train.accumulation


def test_suggest_compiles_three_and_names_the_fastest_that_fits(found, tmp_path, monkeypatch, capsys):
    file = tmp_path / "toy.py"
    file.write_text(
        "from support.fake_brain import tiny_config\n"
        "def get_config():\n    config = tiny_config()\n    config.data.rows = 8\n    return config\n"
    )
    compiled = []

    def row_of(outcome, prices):
        n = len(compiled)
        return {
            "topology": "v5e:2x2", "program": "train", "fits": n > 1, "reason": "" if n > 1 else "no.",
            "notes": [],
            "mesh": {}, "seconds": {}, "gib_by_kind": {}, "gib_needed": 1.0, "gib_usable": 2.0,
            "roofline": {"step_s": 9.0 - n},
        }  # fmt: skip

    def outcomes(jobs, *_):
        for job in jobs:
            compiled.append(job)
            yield compiling.Outcome(job, {}, tmp_path, 1.0, False)

    monkeypatch.setattr(topology, "check_compiler", lambda topologies: None)
    ranked = suggest.ranked

    def known(config, topology):
        return suggest.best(found, topology) if topology.chip else ranked(config, topology)

    monkeypatch.setattr(suggest, "ranked", known)
    monkeypatch.setattr(compiling, "compile_all", outcomes)
    monkeypatch.setattr(table, "row_of", row_of)
    words = [
        f"--config={file}",
        "--topology=v5e:2x2",
        f"--out={tmp_path / 'out'}",
        f"--cache={tmp_path}",
    ]
    assert cli.main(["plan", *words, "--suggest"]) == 0
    said = capsys.readouterr().out
    assert len(compiled) == 3 and len({job.key for job in compiled}) == 3
    expected = " ".join(suggest.settings(compiled[2].config))
    assert f"v5e:2x2, the fastest that fits: {expected}\n" in said and "about GiB" in said
    assert cli.main(["plan", *words, "--suggest", "--programs=decode"]) == 2
    # what cannot be suggested for one topology stops no other
    assert cli.main(["plan", *words, "--suggest", "--topology=cpu:8"]) == 1
    said = capsys.readouterr().out
    assert len(compiled) == 6 and "the fastest that fits" in said
    assert "--suggest cannot rank for --topology=cpu:8" in said and "cpu:8: none of" not in said
    alone = [word for word in words if "topology" not in word]
    assert cli.main(["plan", *alone, "--suggest", "--topology=cpu:8", "--topology=cpu:4"]) == 2
    assert suggest.fastest([], V5E).startswith("v5e:2x2: none of the compiled suggestions fits")


def test_the_longest_of_three_times_bounds_a_step(config):
    v5e = CHIPS["v5e"]
    for flops, moved, sent, bound in ((2, 1, 1, "compute"), (1, 2, 1, "memory"), (1, 1, 2, "network")):
        found = roofline.times(V5E, flops * v5e.flops, moved * v5e.bandwidth, sent * v5e.link)
        assert (found["bound"], found["step_s"]) == (bound, 2.0)
    # beyond the GPUs that NVLink joins, the adapters of a machine, eight or six, carry what leaves it
    h100 = CHIPS["h100"]
    near, far, few = (roofline.times(parse(f"h100:{n}"), 1.0, 1.0, h100.link) for n in (8, 16, 12))
    assert near["step_s"] == 1.0
    assert far["step_s"] == pytest.approx(450 / 400) and few["step_s"] == pytest.approx(450 / 300)
    assert roofline.times(parse("cpu:8"), 1.0, 1.0, 1.0) == {}
    found = roofline.outlook(config, V5E, "train", 0.5, price=2.0)
    hours = config.train.steps * 0.5 / 3600
    assert found == {"examples_per_s": 32.0, "hours": hours, "cost": hours * 4 * 2}
    rows = config.evaluate.batch
    assert roofline.outlook(config, V5E, "decode", 0.5, price=2.0) == {"tokens_per_s": 2 * rows}


def test_a_chip_without_a_price_is_said(config, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "costs", lambda *_: {"unknown": []} | {n: {"compiled": 1} for n in COSTS})
    monkeypatch.setattr(compiling.Outcome, "text", "a program")
    memory = dict.fromkeys(("argument", "output", "alias", "temp", "generated_code"), 1)
    result = {
        "device": "", "mesh": {}, "seconds": {}, "activations": 0, "arguments": {}, "memory": memory,
        "text": True, "sizes": None,
    }  # fmt: skip

    def row(prices):
        job = compiling.Job(config, V5E, "train")
        return table.row_of(compiling.Outcome(job, result, tmp_path, 1.0, False), prices)

    without = row({"h100": 1.0})
    assert without["notes"] == ["v5e:2x2: there is no price of v5e, so none of training."]
    assert "cost" not in without["outlook"] and row({"v5e": 2.0})["outlook"]["cost"] > 0
    assert row({"v5e": 2.0})["notes"] == row({})["notes"] == []


def test_prices(tmp_path):
    file = tmp_path / "prices.json"
    file.write_text('{"v5e": 1.2, "h100": 3}')
    assert roofline.read_prices(str(file)) == {"v5e": 1.2, "h100": 3.0}
    assert roofline.read_prices(None) == {}
    for text, words in {
        "[]": "holds no prices",
        '{"v9": 1}': "'v9': 1 is not a chip and its price",
        '{"v5e": "1"}': "'v5e': '1' is not a chip and its price",
        '{"v5e": -1}': "is not a chip and its price",
        '{"v5e": true}': "is not a chip and its price",
        '{"v5e": 1e300}': "write numbers up to 1,000,000",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            roofline.read_prices(str(file))
    with pytest.raises(UserError, match="none.json does not exist; give --prices=FILE that holds"):
        roofline.read_prices(str(tmp_path / "none.json"))


def test_a_config_survives_its_way_to_the_compiling_process(config):
    settings = compiling.to_dict(config)
    settings["data"]["sources"] = ({"name": "brain"},)
    before = from_config_dict(settings)
    assert from_config_dict(json.loads(json.dumps(compiling.to_dict(before)))) == before
