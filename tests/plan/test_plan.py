"""The verb plan: what is compiled, kept, refused and ended, on simulated devices."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from plan.conftest import run
from support import tiny

from unimed_jax import main as cli
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters
from unimed_jax.plan import compile as compiling
from unimed_jax.plan import table, topology
from unimed_jax.plan.child import exceeds
from unimed_jax.plan.compile import Job, Limits, compile_one
from unimed_jax.plan.programs import saved_bytes
from unimed_jax.train.program import build, make_mesh
from unimed_jax.train.step import first_state
from unimed_jax.verbs.options import read_config

LIMITS = Limits(300, 8e9)


def planned(cache: Path) -> dict:
    return json.loads((cache / "out" / "plan.json").read_text())


# ---------------------------------------------------------------------------------------------
# What is found
# ---------------------------------------------------------------------------------------------


def test_what_a_plan_says(cache):
    content = planned(cache)
    (row,) = content["rows"]
    assert content["schema"] == table.SCHEMA and content["versions"]["jax"] == jax.__version__
    assert (row["topology"], row["devices"], row["program"]) == ("cpu:8", 8, "train")
    assert row["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1, "expert": 1}
    assert row["fits"] is True and row["reason"] == "" and row["seconds"]["cpu"] > 0
    parts = row["gib_by_kind"]
    assert {"trained", "optimizer", "batch", "activations", "temporaries"} == set(parts)
    assert parts["optimizer"] == pytest.approx(2 * parts["trained"], rel=0.01)  # two moments of AdamW
    assert parts["activations"] > 0 and sum(parts.values()) == pytest.approx(row["gib_needed"])
    cost = row["cost"]  # on this machine no speed is known, so there is no roofline
    assert cost["flops"]["useful"] > 0 and 1 <= cost["flops"]["ratio"] < 2 and row["roofline"] == {}
    assert cost["bytes"]["ratio"] > 1 and cost["unknown"] == []
    assert any("dot_general" in o["name"] and o["flops"] > 0 for o in cost["largest"])
    (gradients,) = [
        c for c in cost["collectives"] if c["kind"] == "all-reduce" and c["axes"] == ["data"]
    ]
    # every trained leaf is summed over eight devices
    assert gradients["bytes"] > 2 * 7 / 8 * row["gib_by_kind"]["trained"] * 2**30
    page = (cache / "out" / "plan.md").read_text()
    assert "| cpu:8 | train | data 8 | yes |" in page and "http" not in page


def test_the_same_plan_compiles_nothing(cache, monkeypatch, capsys):
    before = planned(cache)
    monkeypatch.setattr(compiling, "compile_one", lambda *_: pytest.fail("it was compiled"))
    assert run(cache, "--topology=cpu:8") == 0
    said = capsys.readouterr().out
    assert "cpu:8 train: kept from before" in said and "data 8" in said
    assert planned(cache)["rows"] == before["rows"]
    # other settings, topologies or programs are others
    config = read_config(str(cache / "toy.py"))
    other = read_config(str(cache / "toy.py"), ["--config.data.row_tokens=176"])
    jobs = [
        Job(config, topology.parse("cpu:8"), "train"),
        Job(config, topology.parse("cpu:4"), "train"),
        Job(config, topology.parse("cpu:8"), "decode"),
        Job(other, topology.parse("cpu:8"), "train"),
    ]
    assert len({job.key for job in jobs}) == 4 and (cache / "cache" / jobs[0].key).is_dir()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


DAMAGE = {
    "a program cut short": ("program.txt.gz", _cut),
    "a program gone": ("program.txt.gz", Path.unlink),
    "a result cut short": ("result.json", _cut),
    "another number": (
        "result.json",
        lambda file: file.write_text(re.sub(r'"temp": \d+', '"temp": 3', file.read_text())),
    ),
    "another content": ("result.json", lambda file: file.write_text("[3]")),
    "no result": ("result.json", Path.unlink),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_was_kept_and_is_damaged_is_compiled_again(cache, tmp_path, monkeypatch, case):
    name, damage = DAMAGE[case]
    job = Job(read_config(str(cache / "toy.py")), topology.parse("cpu:8"), "train")
    shutil.copytree(cache / "cache" / job.key, tmp_path / job.key)
    (whole,) = compiling.compile_all([job], tmp_path, LIMITS, say=lambda _: None)
    assert whole.kept and whole.text
    damage(tmp_path / job.key / name)
    monkeypatch.setattr(compiling, "compile_one", lambda *_: dataclasses.replace(whole, kept=False))
    said: list[str] = []
    (again,) = compiling.compile_all([job], tmp_path, LIMITS, said.append)
    assert not again.kept and any("is damaged, and is replaced" in line for line in said)


def test_what_a_killed_plan_left_is_removed_after_a_week(tmp_path):
    for name, days in (("old", 8), ("new", 6)):
        folder = tmp_path / f".compile-{name}"
        folder.mkdir()
        then = time.time() - days * 24 * 3600
        os.utime(folder, (then, then))
    list(compiling.compile_all([], tmp_path, LIMITS))
    assert [each.name for each in tmp_path.iterdir()] == [".compile-new"]


def test_predicted_memory_is_what_devices_hold(cache):
    """Measured by the arrays that lie on one of eight devices as training puts them there."""
    config = read_config(str(cache / "toy.py"))
    mesh = make_mesh(config)
    program = build(config, mesh)
    leaves = {
        path: jax.numpy.zeros(leaf.shape, leaf.dtype) for path, leaf in parameters(program.model).items()
    }
    with sharding.inside(mesh):
        state = first_state({p: leaves[p] for p in program.state.leaves}, program.optimizer, mesh)
        batch = {name: np.zeros(x.shape, x.dtype) for name, x in program.batch.items()}
        batch = sharding.on_devices(batch, mesh)

    def held(tree) -> float:
        device = jax.devices()[3]
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )

    (row,) = planned(cache)["rows"]
    parts = row["gib_by_kind"]
    for kind, tree in {"trained": state.leaves, "optimizer": state.moments, "batch": batch}.items():
        assert held(tree) == round(parts[kind] * 2**30), kind


def test_activations_are_those_that_the_backward_pass_reads():
    """Full rematerialisation keeps the inputs of layers; devices and micro-batches share the rows."""

    def kept(devices=1, remat="full", **train) -> float:
        model = tiny.config(vision={"depth": 3}, decoder={"depth": 3})
        settings = tiny.training(dataclasses.replace(model, remat=remat), **train)
        mesh = make_mesh(settings, jax.devices()[:devices])
        return saved_bytes(settings, build(settings, mesh), mesh)

    whole = kept()
    assert 0 < whole < kept(remat="none") / 2
    assert kept(devices=4) == whole / 4
    assert kept(accumulation=2) == whole / 2


def test_what_does_not_fit_says_what_is_largest(cache, tmp_path):
    result = {
        "device": "TPU v5 lite", "mesh": {"data": 4}, "seconds": {},
        "arguments": {"frozen": 20 * 2**30, "batch": 0}, "activations": 2**30,
        "exceeds": exceeds("RESOURCE_EXHAUSTED: Used 24.50G of 15.75G hbm. Exceeded by 8.75G."),
    }  # fmt: skip
    job = Job(read_config(str(cache / "toy.py")), topology.parse("v5e:2x2"), "train")
    row = table.row_of(compiling.Outcome(job, result, tmp_path, 1.0, False))
    assert (row["fits"], row["gib_needed"], row["gib_usable"]) == (False, 24.5, 15.75)
    assert row["reason"] == (
        "train needs 24.5 GiB of the 15.8 GiB of each device of v5e:2x2, most of it for frozen (20.0 "
        "GiB); split the model over more chips (config.mesh.fsdp or tensor)."
    )
    kept = {**result, "arguments": {}, "activations": 2**34}
    for program, words in {
        "train": "set config.model.remat='full', raise",
        "decode": "lower config.ev",
    }.items():
        job = dataclasses.replace(job, program=program)
        reason = table.row_of(compiling.Outcome(job, kept, tmp_path, 1.0, False))["reason"]
        assert f"activations (16.0 GiB); {words}" in reason
    memory = dict.fromkeys(("argument", "output", "temp", "generated_code"), 20 * 2**30)
    result = {**result, "memory": memory | {"alias": 2**30}, "text": False}
    job = Job(job.config, topology.parse("h100:1"), "train")
    row = table.row_of(compiling.Outcome(job, result, tmp_path, 1.0, False))
    assert row["fits"] is False and row["gib_needed"] == 79  # compared here: its compiler does not
    assert row["gib_usable"] == pytest.approx(0.9 * 79.1)
    said = table.text([row])
    assert " yes " not in said and "keeps no text" in said


def test_what_a_program_does_not_read_takes_memory_too(cache, tmp_path):
    """While answers are decoded the encoder lies in memory, though it is no argument of the program."""
    memory = {"argument": 5, "output": 3, "alias": 2, "temp": 2, "generated_code": 0.5}
    result = {
        "device": "NVIDIA H100", "mesh": {"data": 1}, "seconds": {}, "activations": 0.0, "text": False,
        "arguments": {"frozen": 66 * 2**30, "cache": 2 * 2**30},
        "memory": {name: size * 2**30 for name, size in memory.items()},
    }  # fmt: skip
    job = Job(read_config(str(cache / "toy.py")), topology.parse("h100:1"), "decode")
    row = table.row_of(compiling.Outcome(job, result, tmp_path, 1.0, False))
    assert row["gib_needed"] == 66 + 2 + 3 - 2 + 2 + 0.5 == sum(row["gib_by_kind"].values())
    assert row["fits"] is False and "decode needs 71.5 GiB of the 71.2 GiB" in row["reason"]


# ---------------------------------------------------------------------------------------------
# Compilations that do not end
# ---------------------------------------------------------------------------------------------


def test_a_compilation_that_takes_too_much_is_ended(cache, tmp_path, monkeypatch, capsys):
    config = read_config(str(cache / "toy.py"))
    job = Job(config, topology.parse("cpu:2"), "train")
    outcome = compile_one(job, tmp_path / "cache", Limits(300, 2**20))
    assert outcome.failed == (
        "compiling train for cpu:2 took more than 0.0 GiB of this machine's memory and was ended; "
        "raise --memory, or plan on a larger machine."
    )
    outcome = compile_one(job, tmp_path / "cache", Limits(0.3, 8e9))
    assert outcome.failed == "compiling train for cpu:2 was ended after 0 s; raise --minutes=0.005."
    assert list((tmp_path / "cache").iterdir()) == []  # nothing is left
    assert run(cache, "--topology=cpu:2", "--minutes=0.005") == 1
    said = capsys.readouterr().out
    assert "cpu:2 train: ended" in said and "not known" in said and "raise --minutes" in said
    (row,) = planned(cache)["rows"]
    assert row["fits"] is None and row["reason"].startswith("compiling train for cpu:2 was ended")
    run(cache, "--topology=cpu:8")  # as the other tests find it


ENDS = {
    "killed by the system": (-signal.SIGKILL, "", "was killed, as the system does when memory runs out"),
    "no memory": (-signal.SIGABRT, "std::bad_alloc", "ran out of this machine's memory"),
    "a full disk": (
        1,
        "OSError: [Errno 28] No space left on device\n",
        "found no space left in cache; free some, or give another --cache=DIR",
    ),
    "libtpu held": (1, "ABORTED: The TPU is already in use by pid 7", "found libtpu held by another"),
    "a crash": (
        -signal.SIGSEGV,
        "first\nlast words.\n",
        "ended with status -11 (last words); report it",
    ),
}


def test_a_compiling_process_that_fails_says_its_own_error_last(tmp_path):
    """And ends by itself, while the process that started it still holds the other end of its input."""
    (tmp_path / "job.json").write_text("{")
    command = [sys.executable, "-m", "unimed_jax.plan.child", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        said = child.stderr.read()
        assert child.wait() == 1 and "JSONDecodeError" in said.splitlines()[-1]


@pytest.mark.parametrize("case", ENDS)
def test_how_a_compiling_process_died_is_one_sentence(cache, case):
    status, said, expected = ENDS[case]
    job = Job(read_config(str(cache / "toy.py")), topology.parse("cpu:2"), "train")
    sentence = compiling._death(job, Path("cache/.compile-1"), status, said)
    assert expected in sentence and sentence.count(". ") == 0 and sentence.endswith(".")


def test_a_compiling_process_ends_with_its_starter(cache, tmp_path):
    """It reads an input whose other end only its starter holds."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "job.json").write_text("{")
    os.mkfifo(work / "result.json.part")  # what it would write to; nobody reads it
    (work / "job.json").unlink()
    os.mkfifo(work / "job.json")  # where it waits
    command = [sys.executable, "-m", "unimed_jax.plan.child", str(work)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(1)
    child.stdin.close()
    assert child.wait(30) == 1


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown chip": (["--topology=v9:4x4"], "--topology=v9:4x4: the chip 'v9' is unknown"),
    "a misspelt chip": (["--topology=h10:8"], "did you mean 'h100'?"),
    "no shape": (["--topology=v5e"], "'' is not the sides of a slice joined by x"),
    "a flat pod": (["--topology=v5p:4x4"], "a slice of v5p has 3 sides"),
    "a deep slice": (["--topology=v5e:4x4x4"], "a slice of v5e has 2 sides"),
    "a shape of GPUs": (["--topology=h100:2x4"], "'2x4' is not a number of devices"),
    "no devices": (["--topology=cpu:0"], "'0' is not a number of devices"),
    "too many": (["--topology=v5p:999x999x999"], "at most 8,960 in all"),
    "no such slice": (["--topology=v5e:16x32"], "at most 256 in all"),
    "an odd number of GPUs": (["--topology=h100:9"], "2 machines cannot share 9 evenly"),
    "other digits": (["--topology=h100:1\u0668"], "is not a number of devices"),
    "a file for results": (["--topology=cpu:8", f"--out={__file__}"], "is a file, where a folder bel"),
    "a file for what is kept": (["--topology=cpu:8", f"--cache={__file__}"], "is a file, where a fol"),
    "an empty place": (["--topology=cpu:8", "--out="], "--out is empty; give a path"),
    "a program": (["--topology=cpu:8", "--programs=train,fly"], "'fly' is unknown or doubled"),
    "a doubled program": (["--topology=cpu:8", "--programs=train,train"], "'train' is unknown or"),
    "no time": (["--topology=cpu:8", "--minutes=0"], "--minutes and --memory are above 0"),
    "a setting": (["--topology=cpu:8", "--config.data.row=3"], "--config.data.row is not a setting"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_sentence(cache, capsys, case):
    arguments, expected = REFUSED[case]
    assert run(cache, *arguments) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_chains_and_other_jobs_are_refused(cache, capsys):
    chain = Path(__file__).parents[2] / "configs" / "med_moe" / "all.py"
    assert cli.main(["plan", f"--config={chain}:stablelm", "--topology=cpu:8"]) == 2
    assert "is a chain; name one of its stages" in capsys.readouterr().err
    router = chain.with_name("router.py")
    assert cli.main(["plan", f"--config={router}:stablelm", "--topology=cpu:8"]) == 2
    assert "config.job='router' has no training step to plan" in capsys.readouterr().err


def test_a_compiler_that_is_absent_or_refuses_says_so(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    for text, words in {"v5e:4x4": "needs libtpu", "h100:8": "needs jax's CUDA plugin"}.items():
        with pytest.raises(UserError, match=f"^--topology={text}: .* {words}.*; pip install [^.]*.$"):
            topology.check_compiler([topology.parse("cpu:8"), topology.parse(text)])
    topology.check_compiler([topology.parse("cpu:8")])
    slice_ = topology.parse("v5e:3x5")
    assert "does not take this topology (no such shape)" in topology.refusal(slice_, "no such shape.\n")
    assert "libtpu is held by another process" in topology.refusal(slice_, "lockfile exists")


def test_what_times_leave_out_is_said():
    (unknown,) = table._uncounted(topology.parse("v5e:4x4"), [f"kernel {i}" for i in range(5)])
    assert "(kernel 0, kernel 1, kernel 2 ...), so its times are too low" in unknown
    (slow,) = table._uncounted(topology.parse("l4:16"), [])
    assert slow.startswith("l4:16: how fast its machines are joined is not known")
    assert not any(table._uncounted(topology.parse(text), []) for text in ("l4:8", "h100:16", "cpu:8"))


def test_flags_of_this_machines_compiler_do_not_reach_a_plan(cache, tmp_path, monkeypatch):
    """The name of what is kept does not hold them."""
    given = {}

    def starts(command, env, **words):
        given.update(env)
        raise OSError("no process")

    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=true")
    monkeypatch.setattr(compiling.subprocess, "Popen", starts)
    job = Job(read_config(str(cache / "toy.py")), topology.parse("v5e:2x2"), "train")
    with pytest.raises(OSError, match="no process"):
        compiling._run(job, tmp_path, Limits(1, 1e9))
    assert "PATH" in given and "LIBTPU_INIT_ARGS" not in given


HOSTS = """
import numpy as np
from types import SimpleNamespace
from unimed_jax.config import MeshConfig
from unimed_jax.model import sharding
from unimed_jax.plan import topology
place = sharding.row_sharding
for text, rows, sizes in {cases}:
    chips = topology.devices(topology.parse(text))
    mesh = sharding.make_mesh(MeshConfig(**sizes), rows, 0, chips, 1e12)
    where = place((rows,), mesh).devices_indices_map((rows,))
    for host in {{chip.process_index for chip in chips}}:
        own = {{chip: piece for chip, piece in where.items() if chip.process_index == host}}
        here = SimpleNamespace(addressable_devices_indices_map=lambda shape: own)
        sharding.row_sharding = lambda shape, mesh: here
        share = sharding.share_of_process(mesh, rows)
        held = {{row for piece in own.values() for row in range(*piece[0].indices(rows))}}
        assert set(share.rows) == held and len(held) < rows, (text, host, share)
        print(text, host, *share.rows)
"""


@pytest.mark.slow
def test_each_host_of_a_slice_reads_the_rows_of_its_chips():
    """Meshes of slices on which jax.make_mesh orders chips along rings, or refuses a part of a row."""
    slice_ = topology.parse("v5e:4x4")
    try:
        topology.check_compiler([slice_])
    except UserError as error:
        pytest.skip(str(error))
    cases = [
        ("v5e:4x4", 16, {}),
        ("v5e:4x4", 16, {"auto": False, "data": 8, "tensor": 2}),
        ("v6e:8x8", 16, {}),
        ("v5p:4x4x4", 64, {"auto": False, "data": 8, "fsdp": 8}),
    ]
    environ = os.environ | topology.environment(slice_)
    command = [sys.executable, "-c", HOSTS.format(cases=cases)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("v5e:4x4 0 ")][0]
    assert len(first) == 4 and first != ["0", "1", "2", "3"]  # no neighbours


def test_a_mesh_that_no_topology_takes_is_a_row_and_a_sentence(cache, capsys):
    axes = ["--config.mesh.auto=False", "--config.mesh.data=4"]
    assert run(cache, "--topology=cpu:2", *axes) == 1
    assert "config.mesh: data=4" in capsys.readouterr().out
    run(cache, "--topology=cpu:8")
