"""The benchmarks compare like with like: both sides compute the same, and nothing is timed that
does not.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import conflict_over_seeds
import connector
import harness
import laws
import moe_dispatch
import train_step
import waste

BENCHMARKS = Path(train_step.__file__).parent
NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
TINY = train_step.SIZES["tiny"]


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("peft", reason=NEEDS)
    return pytest.importorskip("torch", reason=NEEDS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    train_step.write_weights(TINY.model, folder)
    return folder


@pytest.mark.usefixtures("quick_compiles")
def test_padded_losses_agree(torch, weights):
    """Forward, backward and AdamW: five steps, each on another task."""
    ours = train_step.Ours(TINY, "padded", "ours", weights)
    peer = train_step.Torch(TINY, "padded", "torch_eager", weights)
    (own, counts), (theirs, their_counts) = (side.losses(train_step.CHECK_RATE) for side in (ours, peer))
    assert counts == their_counts and len(own) == 5
    np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=0)
    # The steps move them by far more than the benchmark tolerates.
    again, _ = ours.losses(0.0)
    assert np.abs(np.array(own) / again - 1).max() > 100 * train_step.TOLERANCE["cpu", "float32"]


@pytest.mark.usefixtures("quick_compiles")
def test_mixture_losses_agree(torch, weights):
    """Packed with shared images, and padded to the longest: one mean over the same answer tokens."""
    sides = (train_step.Ours, "ours_shared"), (train_step.Torch, "torch_eager")
    runs = [runner(TINY, "mixture", side, weights).losses(0.0) for runner, side in sides]
    means = [train_step.mean_losses("mixture", *run) for run in runs]
    np.testing.assert_allclose(means[0], means[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", train_step.SIZES)
def test_all_sides_get_the_same_examples(size):
    """The same answers, of the same tasks; a packed row a step, and as many steps as torch takes."""
    chosen = train_step.SIZES[size]
    made = {side: train_step.batches(chosen, "mixture", side) for side in train_step.SIDES}
    answers = {
        side: sorted(pair for batch in found for pair in answered(batch)) for side, found in made.items()
    }
    assert all(found == answers["torch_eager"] for found in answers.values())
    # text alone is there too
    assert sum(task == 5 for task, _ in answers["ours"]) / len(answers["ours"]) > 0.02
    used = {side: sum(int((b["image_tasks"] >= 0).sum()) for b in found) for side, found in made.items()}
    assert used["ours"] == used["torch_eager"] == 92 and used["ours_shared"] == 61
    assert {len(batch["tokens"]) for batch in made["ours"] + made["ours_shared"]} == {1}
    for side in ("ours", "ours_shared"):
        assert abs(len(made[side]) - len(made["torch_eager"])) <= 3


def answered(batch) -> list[tuple[int, int]]:
    """(task, target) of every answer token."""
    on = batch["weights"] > 0
    return list(zip(batch["target_tasks"][on].tolist(), batch["targets"][on].tolist(), strict=True))


def test_padded_rows_are_of_one_length():
    batches = train_step.batches(train_step.SIZES["small"], "padded", "ours")
    assert [batch["tokens"].shape for batch in batches] == [(4, 193)] * 5
    assert sorted(batch["image_tasks"][0, 0] for batch in batches) == [0, 1, 2, 3, 4]


def test_different_losses_give_no_ratio():
    near, far = 6.0 * (1 + 0.5e-4), 6.0 * (1 + 2e-4)
    train_step.check("mixture", {"torch_eager": [6.0], "ours": [near]}, 1e-4)
    for wrong in (far, float("nan")):
        with pytest.raises(harness.Failed, match=r"mixture: the losses of ours differ .* no ratio"):
            train_step.check("mixture", {"torch_eager": [6.0], "ours": [wrong]}, 1e-4)


@pytest.mark.usefixtures("quick_compiles")
def test_connectors_agree(torch, tmp_path):
    config = connector.SIZES["tiny"]
    runners = {
        "ours": connector.Ours(config, "fast"),
        "ours_literal": connector.Ours(config, "literal"),
        "torch": connector.Torch(config, threads=1),
    }
    for side, runner in runners.items():
        np.savez(tmp_path / f"{side}.npz", **runner.values())
        connector.check(side, tmp_path, 1e-4)
    found = dict(np.load(tmp_path / "torch.npz"))
    # tokens, task tokens, experts, halves of the router, the rest of it
    assert len(found) == 1 + 5 + 5 * 4 + 2 + 3
    assert np.abs(found["task_tokens.refer None"]).max() > 0 and not found["task_tokens.vqa None"].any()
    for wrong in ("tokens", "router.fc1.weight (0, 64)"):
        np.savez(tmp_path / "torch.npz", **{**found, wrong: found[wrong] * 1.001})
        with pytest.raises(harness.Failed, match="torch and ours differ"):
            connector.check("torch", tmp_path, 1e-4)


def test_dispatch_paths_that_differ_give_no_figure():
    first = {"loss": 2.0, "norm": 0.5, "largest share": 0.25}
    sides = {name: dict(first) for name in moe_dispatch.names((2, 4))}
    moe_dispatch.check({**sides, "capacity, 1.25/4": {**first, "loss": 3.0}})  # drops tokens
    for name in ("grouped/2", "capacity, all/4"):
        with pytest.raises(harness.Failed, match=f"{name} differs from the dense path in norm"):
            moe_dispatch.check({**sides, name: {**first, "norm": 0.5001}})
    assert len(sides) == 1 + 2 * 4


def test_dispatch_sides_differ_in_their_path_alone():
    stage = moe_dispatch.settings("stablelm", "grouped", 4)
    assert stage.model.decoder.width == 2048 and stage.model.moe.experts == 4
    tokens = harness.full_rows(moe_dispatch.settings("tiny", "dense", 2))
    assert (tokens["segments"] > 0).all() and (tokens["weights"] > 0).all()
    for path, fields in moe_dispatch.PATHS.items():
        config = moe_dispatch.settings("small", path, 8)
        fields = {"capacity_factor": 8.0, **fields}
        assert all(getattr(config.model.moe, name) == value for name, value in fields.items())
        assert config.data == moe_dispatch.settings("small", moe_dispatch.NONE, 0).data


def test_conflict_is_paired_by_seed(tmp_path, capsys, monkeypatch):
    files = []
    for seed, (cmoe, linear) in enumerate(((0.3, 0.2), (0.5, 0.2), (0.4, 0.2))):
        runs = [
            {"run": f"w/{name}/seed{seed}", "batches": "b", "units": {"connector": {
                "names": ["vqa", "qa", "cls"],
                "indices": {key: {"value": value} for key in conflict_over_seeds.TITLES},
                # the third pair, which one variant does not know, is left out of both means
                "cos_without_noise": [[1, value, value], [value, 1, odd], [value, odd, 1]],
            }}}
            for name, value, odd in (("cmoe", cmoe, -0.9), ("linear", linear, None))
        ]  # fmt: skip
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(sys, "argv", ["conflict_over_seeds.py", *map(str, files)])
    conflict_over_seeds.main()
    said = capsys.readouterr().out
    assert "0.400 (0.300 .. 0.500)" in said
    # differences -0.1, -0.3, -0.2: standard error 0.1 / sqrt(3), Student's t with 2 degrees 4.303
    assert "0.200: -0.200 [-0.448, +0.048]" in said and "3 seeds" in said
    # what all seeds share, also no difference at all, says nothing of other seeds
    assert conflict_over_seeds.cell([0.1, 0.3], [0.1, 0.3]) == "0.200: +0.000 in every seed"
    assert conflict_over_seeds.cell([0.2, 0.4], [0.1, 0.3]) == "0.300: +0.100 in every seed"
    monkeypatch.setattr(sys, "argv", ["conflict_over_seeds.py", str(files[0])])
    with pytest.raises(SystemExit):
        conflict_over_seeds.main()
    assert "give those of two or more" in capsys.readouterr().err
    other = json.loads(files[0].read_text())
    another = json.loads(files[0].read_text().replace("seed0", "seed7"))
    short = json.loads(files[0].read_text())
    short["runs"][0]["units"]["connector"]["cos_without_noise"].pop()
    for content, words in (
        ({"runs": another["runs"][:1]}, "holds cmoe, and"),
        (other, "holds seed0, as another file does; give each seed once"),
        ({"runs": [*other["runs"], other["runs"][0]]}, "holds two runs of 'cmoe'"),
        ({"runs": [other["runs"][0], another["runs"][1]]}, "holds runs of seed0, seed7; analyse"),
        ({"runs": [{"run": "w/a/seed0", "units": {}}]}, "no indices of a connector (lacks 'connector')"),
        ([], "other.json holds no indices of a connector"),
        ({"runs": []}, "other.json holds runs of no seed"),
        (short, "other.json holds no indices of a connector (lacks list index out of range)"),
        (
            {"runs": [other["runs"][0], other["runs"][1] | {"batches": "c"}]},
            "other.json holds runs that were measured on other examples; analyse them alike",
        ),
    ):
        (tmp_path / "other.json").write_text(json.dumps(content))
        monkeypatch.setattr(sys, "argv", ["it", str(files[0]), str(tmp_path / "other.json")])
        with pytest.raises(SystemExit):
            conflict_over_seeds.main()
        assert words in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["it", str(files[0]), str(tmp_path / "none.json")])
    with pytest.raises(SystemExit):
        conflict_over_seeds.main()
    assert "none.json does not exist; give what" in capsys.readouterr().err
    another["runs"][1]["units"]["connector"]["cos_without_noise"] = [[None] * 3] * 3
    (tmp_path / "other.json").write_text(json.dumps(another))
    monkeypatch.setattr(sys, "argv", ["it", *map(str, files), str(tmp_path / "other.json")])
    conflict_over_seeds.main()  # an index that one seed does not define has no mean
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "linear" in line[:12]]
    assert [cell.strip() for cell in line.split("|")][3] == "-" and line.count("0.200: ") == 5


def test_sides_are_warm_before_anything_counts():
    """A side that gets faster runs again, the others with it no longer; never without end."""
    seconds = {
        "compiles": [9, 3, 1, 0.95, 0.9],
        "steady": [1, 0.9, 0.1, 0.1],
        "falls": [9, 6, 4, 2, 1, 0.5],
    }
    ran = {name: 0 for name in seconds}

    def one(name: str) -> float:
        ran[name] += 1
        return seconds[name][ran[name] - 1]

    harness.warm({name: functools.partial(one, name) for name in seconds})
    assert ran == {"compiles": 4, "steady": 2, "falls": 5}


def test_two_rounds_give_no_ratio():
    assert harness.ratio([2, 2], [1, 1]) is None and harness.figure(None) == "needs 3 rounds"
    found = harness.ratio([2, 4, 6], [1, 1, 1])
    assert found == {"median": 4, "min": 2, "max": 6} and harness.figure(found) == "4.00 (2.00 .. 6.00)"


MISTAKES = {
    "waste --topology=h9:1": (2, "the chip 'h9' is unknown"),
    "waste --topology=cpu:8 --fsdp=4": (1, "cpu:8 has 8 devices, and the mesh 4"),
    "grouped_kernels --rows=100": (2, "--rows: 100 is not at least 256 and a multiple of 256"),
    "decoding --width=100": (2, "--width: 100 is not at least 64 and a multiple of 64"),
    "decoding --rows 0": (2, "--rows: 0 is not at least 1"),
    "laws --out=/proc/laws.json": (2, "--out=/proc/laws.json cannot be written"),
    "laws --grows=nothing": (2, "invalid choice: 'nothing'"),
    "accelerator --out=/proc/x.jsonl": (2, "--out=/proc/x.jsonl cannot be written"),
    "accelerator --out={here}/x.jsonl --only nopart": (2, "--only=nopart is no part; choose from"),
    "features --nosuch": (2, "argument '--nosuch' is unknown"),
    "features --config=none.py": (2, "--config=none.py does not exist"),
    "answers --run={here}/none": (2, "config.json does not exist; --run names"),
    "serving load --run={here}/none": (2, "config.json does not exist; --run names"),
    "vllm_answers --url=http://127.0.0.1:9/v1 --run={here}/none": (2, "config.json does not exist"),
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_a_sentence(command, tmp_path, monkeypatch, capsys):
    """No traceback, no figures, and the status of a mistake."""
    script, *arguments = command.format(here=tmp_path).split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    monkeypatch.setattr(harness, "pin", lambda *_: None)  # this process keeps its cores
    monkeypatch.setattr("os.environ", dict(os.environ))
    with pytest.raises(SystemExit) as ended:
        harness.run(importlib.import_module(script).main)
    status, words = MISTAKES[command]
    said = capsys.readouterr().err + (ended.value.code if isinstance(ended.value.code, str) else "")
    assert (1 if isinstance(ended.value.code, str) else ended.value.code) == status and words in said


def test_a_side_that_fails_is_named(tmp_path):
    script = tmp_path / "side.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import harness\n"
        "add = lambda a, b: print('no answer') or a + b\n"
        "harness.serve({'add': add, 'fail': lambda: 1 / 0, 'die': lambda: sys.exit(3)})\n"
    )
    side = harness.Side("x", str(script), [])
    assert side.ask("add", a=1, b=2) == 3
    with pytest.raises(harness.Failed, match="x: ZeroDivisionError"):
        side.ask("fail")
    assert side.ask("add", a=2, b=2) == 4  # still there
    with pytest.raises(harness.Failed, match="x ended with exit code 3"):
        side.ask("die")
    side.close()


def test_a_missing_package_is_a_sentence():
    with pytest.raises(
        harness.Failed, match=r"needs the package no_such_peer.*pip install -e '\.\[parity\]'"
    ):
        harness.need("json", "no_such_peer")


def test_peak_memory_is_of_the_process_itself():
    """A child that does nothing has a small peak, whatever its parent holds."""
    held = np.ones(2**26)  # 0.5 GiB
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); "
    code += "import harness; print(harness.peak_memory())"
    small = float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert 0.005 < small < 0.2 < held.nbytes / 2**30 <= harness.peak_memory()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "sides"),
    [
        (
            "train_step",
            {"padded": ["ours", "torch_eager"], "mixture": ["ours", "ours_shared", "torch_eager"]},
        ),
        ("connector", ["ours", "ours_literal", "torch"]),
        ("moe_dispatch", ["no experts", "dense/3", "grouped/3", "capacity, all/3", "capacity, 1.25/3"]),
    ],
)
def test_script(torch, tmp_path, script, sides):
    """The whole script at its smallest size, as a user starts it."""
    out = tmp_path / "out.json"
    options = ["--size=tiny", "--threads=1", "--rounds=3", f"--out={out}"]
    if script == "train_step":
        options += ["--sides", "ours", "ours_shared"]  # compiling takes minutes
    if script == "moe_dispatch":
        options += ["--experts=3", "--repeats=1"]
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *options]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["threads"] == 1 and result["size"] == "tiny"
    if script == "moe_dispatch":
        assert list(result["sides"]) == sides
        assert all(
            f["x no experts"]["median"] > 0 and f["temporaries_gib"] > 0.01
            for f in result["sides"].values()
        )
        assert (
            result["sides"]["grouped/3"]["temporaries_gib"]
            < result["sides"]["capacity, all/3"]["temporaries_gib"]
        )
        return
    if script == "connector":
        assert list(result["sides"]) == sides
        assert all(
            f["backward_ratio"]["median"] > 0 and f["peak_gib"] > 0.1 for f in result["sides"].values()
        )
        assert result["sides"]["torch"]["backward_ratio"]["median"] == 1
        return
    for case, expected in sides.items():
        found = result["cases"][case]["sides"]
        assert list(found) == expected
        for f in found.values():
            assert len(f["round_seconds"]) == 3 and f["peak_gib"] > 0.1
            assert f["processor_seconds_per_step"]["min"] > 0 and f["processor_ratio"]["median"] > 0
            assert f["examples_per_second"]["min"] <= f["examples_per_second"]["median"]
    assert "| padded  | ours " in ran.stdout and "useful examples/s" in ran.stdout


@pytest.mark.slow
def test_dispatch_compiles_for_tpu(tmp_path):
    """Every path for a v5e, without one."""
    pytest.importorskip("libtpu", reason="compiling for TPUs: pip install libtpu")
    out = tmp_path / "out.json"
    options = ["--size=tiny", "--experts=4", "--compile-for=v5e:2x2", f"--out={out}"]
    command = [sys.executable, str(BENCHMARKS / "moe_dispatch.py"), *options]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert ran.returncode == 0, ran.stderr
    sides = json.loads(out.read_text())["sides"]
    assert list(sides) == moe_dispatch.names((4,)) and all(f["temporaries"] > 0 for f in sides.values())


SMALL_EXPERTS = ("--rows=256", "--width=128", "--hidden=256")


def _grouped_kernels(*options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "grouped_kernels.py"), *SMALL_EXPERTS, *options]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_grouped_kernels_are_compared_and_timed():
    out = _grouped_kernels("--ways", "blocks", "experts", "ragged_dot", "megablox")
    assert all(f"| {name}" in out for name in ("blocks", "experts", "ragged_dot"))
    assert "megablox" not in out and "differs" not in out and "does not run" not in out


@pytest.mark.slow
def test_megablox_compiles_for_tpu():
    pytest.importorskip("libtpu", reason="compiling for TPUs: pip install libtpu")
    out = _grouped_kernels("--ways", "megablox", "--topology=v5e:2x2")
    forward = next(line for line in out.splitlines() if "| forward " in line)
    # 256 rows fill a block, and each of four experts may have one more: five times the useful FLOPs
    assert " 5.00 " in forward and "does not compile" not in out


@pytest.mark.slow
def test_waste_of_a_tiny_step():
    script = str(BENCHMARKS / "waste.py")
    size = ("--tiny", "--topology=cpu:8", "--fsdp=8", "--rows=8", "--tokens=64")
    out = subprocess.run([sys.executable, script, *size], capture_output=True, text=True, check=True)
    table = {
        line.split(" | ")[0]: line.split(" | ")[3] for line in out.stdout.splitlines() if "| " in line
    }
    assert float(table["| TFLOP"]) > 1 and float(table["| GB sent"]) > 0.9
    assert "all-gather over fsdp" in out.stdout and "not counted" not in out.stdout
    assert "0 of 0 collectives" in out.stdout  # a CPU runs them one after the other


OVERLAP = """
HloModule jit_step, is_scheduled=true

%inner (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  ROOT %dot = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,8]) -> f32[16,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %first = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), dimensions={0}
  %product = f32[8,8]{1,0} fusion(%x, %x), kind=kOutput, calls=%inner
  %first-done = f32[16,8]{1,0} all-gather-done(%first)
  %second = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%product), dimensions={0}
  %negated = f32[8,8]{1,0} negate(%x)
  %second-done = f32[16,8]{1,0} all-gather-done(%second)
  ROOT %sum = f32[16,8]{1,0} add(%first-done, %second-done)
}
"""


def test_a_collective_overlaps_where_a_product_runs_before_its_end():
    assert waste.overlapped(OVERLAP) == (1, 2)
    negates = OVERLAP.replace("fusion(%x, %x), kind=kOutput, calls=%inner", "negate(%x)")
    assert waste.overlapped(negates) == (0, 2)


def test_laws_are_fitted():
    x = [1, 2, 4, 8]
    line = laws.fit(x, [3 + 2 * n for n in x], ("1", "x"))
    np.testing.assert_allclose(line.coefficients, (3, 2))
    assert line.worst < 1e-9 and line(np.array([16.0])) == pytest.approx(35)
    parabola = laws.fit(x, [3 + 2 * n + 0.5 * n * n for n in x], ("1", "x", "x^2"))
    np.testing.assert_allclose(parabola.coefficients, (3, 2, 0.5))
    # a law that does not hold is not hidden: its worst point is named
    assert laws.fit(x, [n * n for n in x], ("1", "x")).worst > 0.3
    chips = laws.fit([16, 256], [15 / 16 * 7, 255 / 256 * 7], ("(1 - 1/x)",))
    assert chips.coefficients == pytest.approx((7,)) and chips.worst < 1e-9


@pytest.mark.slow
def test_laws_of_a_toy(tmp_path):
    """Products of a row grow with its tokens and their pairs, and those of all chips with the chips."""
    (tmp_path / "toy.py").write_text(
        "from support.fake_brain import tiny_config\ndef get_config():\n    return tiny_config()\n"
    )
    toy = str(tmp_path / "toy.py")
    found = {}
    for growth in (
        laws.Growth(
            "tokens", toy, (128, 256, 512), {"flops": laws.PARABOLA}, ("data.row_tokens={x}",), "cpu:1"
        ),
        laws.Growth(
            "chips", toy, (2, 4), {"flops": ("1",)}, ("data.rows={x}", "mesh.data={x}"), "cpu:{x}"
        ),
    ):
        points = list(laws.measured(growth, tmp_path, 10))
        (law,) = laws.laws(growth, points)
        assert law["compiled"].worst < 0.01 and [point["x"] for point in points] == list(growth.values)
        found[growth.title] = law
    # Plain attention multiplies all pairs, of which the ideal counts half, and remat adds a third.
    assert 1 < found["chips"]["ratio"] < 8 / 3 and 1 < found["tokens"]["ratio"] < 8 / 3
    laws.draw(tmp_path / "laws.png", [found["chips"]], {"chips": points})
    assert (tmp_path / "laws.png").stat().st_size > 5000
