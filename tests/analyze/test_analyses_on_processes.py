"""Every analysis on two real processes: what one process writes, to rounding."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_brain import finished

# One start of Python and JAX for all analyses.
ANALYSES = """
import sys
from unimed_jax import processes, verbs
from unimed_jax.interruption import claims_end
from unimed_jax.verbs import analyze
processes.join()
run, out = sys.argv[1:]
few = ["--run=" + run, "--limit=6"]
for words in (
    ["tug-of-war", "--run=" + run, "--batches=2"],
    ["experts", *few, "--steps=1", "--repeats=2"],
    ["tokens", *few, "--tokens=40"],
    ["routing", *few],
    ["ablation", *few, "--task=cls"],
    ["reliance", "--run=" + run, "--split=test", "--config.evaluate.limit=1"],
):
    with claims_end():
        analyze.run([*words, f"--out={out}/{words[0]}"])
"""
FILES = {
    "tug-of-war": "tug_of_war.json",
    "experts": "experts.json",
    "tokens": "tokens.json",
    "routing": "routing.json",
    "ablation": "ablation.json",
    "reliance": "reliance.json",
}


def run(folder: Path, out: Path, count: int) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for number in range(count):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # they compile far more than they compute
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            ),
        }
        if count > 1:
            environment |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
            environment |= {"JAX_COORDINATOR_ADDRESS": address}
        command = [sys.executable, "-c", ANALYSES, str(folder), str(out)]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for process in started:
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 0, said[-3000:]


def differences(found, expected, place=""):
    """Yields the places at which two JSON values differ by more than rounding."""
    if isinstance(expected, dict) and isinstance(found, dict) and list(found) == list(expected):
        for key in expected:
            yield from differences(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        for number, each in enumerate(expected):
            yield from differences(found[number], each, f"{place}/{number}")
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-4):
            yield f"{place}: {found} for {expected}"
    elif found != expected:
        yield f"{place}: {found!r} for {expected!r}"


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path, built_once):
    folder = built_once("finished", finished) / "run"
    for name, count in (("one", 1), ("two", 2)):
        run(folder, tmp_path / name, count)
    for analysis, file in FILES.items():
        one, two = (json.loads((tmp_path / n / analysis / file).read_text()) for n in ("one", "two"))
        wrong = list(differences(two, one))
        assert not wrong, (analysis, wrong[:10])
        pictures = {path.name for path in (tmp_path / "two" / analysis).iterdir()}
        assert {file.replace(".json", ".md"), file.replace(".json", ".png")} <= pictures
