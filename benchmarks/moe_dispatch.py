"""Times a training step of each dispatch path against the number of experts.

    python benchmarks/moe_dispatch.py --threads=2 --out=moe_dispatch.json
    python benchmarks/moe_dispatch.py --compile-for=v5e:4x4 --size=stablelm      # needs libtpu, no TPU

The step is that of Med-MoE's third stage (configs/med_moe/moe.py): forward, backward, AdamW;
experts in every second layer, one of them and the meta expert for every token; routers are random,
so experts get about as many tokens each.

- `dense`: every expert on every token, the reference.
- `grouped`: tokens sorted by expert, one grouped product a linear; nothing is dropped.
- `capacity, all`: buffers that hold every token, so that nothing is dropped either.
- `capacity, 1.25`: buffers of 1.25 times an expert's even share; tokens beyond are dropped.
- `no experts`: the same model with its plain MLPs.

Every side is a process of its own, and all are asked in turn, so that other load on the machine
slows all alike. Losses and gradient norms of the sides that drop nothing must agree before a
figure is given. A figure is the median over rounds (min .. max). Temporaries are what the compiler
sets aside beyond state and batch; the peak is that of the process.

With --compile-for no step is run: each side's program, at a published size, is compiled for a TPU
slice (the batch of the config, rows over all chips, experts over up to four), and what it holds of
a chip's memory is shown.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np

from unimed_jax.config import Config
from unimed_jax.config_file import load_config_file
from unimed_jax.settings import from_config_dict

EXPERTS = (2, 4, 8, 16)
# Settings of config.model.moe; "capacity, all" holds all tokens in every buffer: a factor of the
# experts.
PATHS: dict[str, dict[str, Any]] = {
    "dense": {"path": "dense"},
    "grouped": {"path": "grouped"},
    "capacity, all": {"path": "capacity"},
    "capacity, 1.25": {"path": "capacity", "capacity_factor": 1.25},
}
DROPLESS = ("dense", "grouped", "capacity, all")
NONE = "no experts"
TOLERANCE = 1e-4  # relative, of losses and gradient norms
RATE = 1e-5
STAGE = Path(__file__).parents[1] / "configs" / "med_moe" / "moe.py"
SIZES = ("tiny", "small", "stablelm", "phi2")


def settings(size: str, path: str, experts: int) -> Config:
    """Sets up stage 3: `small` is `tiny` with StableLM-2's proportions, a quarter as wide."""
    config = from_config_dict(load_config_file(f"{STAGE}:{'tiny' if size == 'small' else size}"))
    moe = dataclasses.replace(config.model.moe, experts=experts)
    if path != NONE:
        moe = dataclasses.replace(moe, **{"capacity_factor": float(experts), **PATHS[path]})
    model, rules = dataclasses.replace(config.model, moe=moe), config.train.rules
    if size == "small":
        wide = {"width": 512, "heads": 8, "kv_heads": 8, "head_dim": 64, "mlp_width": 1408}
        model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, **wide))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=8))
    if path == NONE:
        rules = tuple(rule for rule in rules if "/moe/" not in rule.match)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, rules=rules))


# ---- a side: one path, one number of experts -----------------------------------------------------


class Step:
    """Runs the step on this machine."""

    def __init__(self, config: Config):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from unimed_jax.model.parameters import parameters
        from unimed_jax.model.unimed import UniMed
        from unimed_jax.train.program import build
        from unimed_jax.train.step import first_state

        program = build(config, None)
        leaves = jax.jit(lambda: parameters(UniMed(config.model, nnx.Rngs(0))))()
        self.state = first_state({p: leaves[p] for p in program.state.leaves}, program.optimizer)
        self.frozen = {p: leaves[p].astype(leaf.dtype) for p, leaf in program.frozen.items()}
        self.batch, self.rate = jax.device_put((harness.full_rows(config), jnp.float32(RATE)))
        self.step = program.lower().compile()

    def run(self) -> dict[str, Any]:
        self.state, metrics = self.step(self.state, self.frozen, self.batch, self.rate)
        shares = metrics["shares"].max(initial=0) if "shares" in metrics else 1
        found = {"loss": metrics["loss"], "norm": metrics["grad_norm"], "largest share": shares}
        return {name: float(value) for name, value in found.items()}

    def temporaries(self) -> float:
        return self.step.memory_analysis().temp_size_in_bytes / 2**30


def compiled_for(topology: str, config: Config) -> dict[str, Any]:
    """Compiles the step for a chip of that slice; returns the GiB it needs and the seconds it took."""
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from unimed_jax.model import sharding
    from unimed_jax.train.program import build

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    shares = math.gcd(config.model.moe.experts, 4, devices.size)
    mesh = Mesh(devices.reshape(1, -1, 1, shares), sharding.MESH_AXES)
    rows = config.data.rows
    # As many rows at a time as chips, or as the config asks for.
    micro = min(config.train.accumulation, max(1, rows // devices.size))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=micro))
    start = time.perf_counter()
    compiled = build(config, mesh).lower().compile()
    memory = compiled.memory_analysis()
    return {
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "state and batch": memory.argument_size_in_bytes / 2**30,
        "temporaries": memory.temp_size_in_bytes / 2**30,
        "seconds": time.perf_counter() - start,
    }


def serve(arguments: argparse.Namespace) -> None:
    path, _, experts = arguments.side.partition("/")
    config = settings(arguments.size, path, int(experts or 0))
    if arguments.compile_for:
        return harness.serve({"compile": lambda: compiled_for(arguments.compile_for, config)})
    step = Step(config)

    def timed(repeats: int) -> float:
        return statistics.median(harness.seconds(step.run) for _ in range(repeats))

    harness.serve(
        {"run": step.run, "time": timed, "temporaries": step.temporaries, "memory": harness.peak_memory}
    )


# ---- the comparison ------------------------------------------------------------------------------


def names(experts: Sequence[int], paths: Sequence[str] = (NONE, *PATHS)) -> list[str]:
    """Names the sides: `path/experts`."""
    found = [f"{path}/{count}" for count in experts for path in PATHS if path in paths]
    return [NONE, *found] if NONE in paths else found


def check(first: dict[str, dict[str, float]]) -> None:
    """Raises harness.Failed if the paths that drop nothing differ in their first step."""
    for name, values in first.items():
        path, _, experts = name.partition("/")
        if path in DROPLESS:
            reference = first[f"dense/{experts}"]
            wrong = [
                what for what, x in reference.items() if not abs(values[what] - x) <= TOLERANCE * abs(x)
            ]
            if wrong:
                raise harness.Failed(
                    f"{name} differs from the dense path in {', '.join(wrong)}: no figure to give."
                )


def measure(arguments: argparse.Namespace, own: list[str]) -> dict[str, Any]:
    sides: dict[str, harness.Side] = {}
    times: dict[str, list[float]] = {}
    try:
        # one after another: compiling takes all cores
        for name in names(arguments.experts, arguments.paths):
            sides[name] = harness.Side(name, __file__, own)
            sides[name].ask("temporaries")
            print(f"{name} is ready", flush=True)
        first = {name: side.ask("run") for name, side in sides.items()}
        check(first)
        harness.warm({n: functools.partial(s.ask, "time", repeats=1) for n, s in sides.items()})
        for i in range(arguments.rounds):
            for name, side in sides.items():
                times.setdefault(name, []).append(side.ask("time", repeats=arguments.repeats))
            print(f"round {i + 1} of {arguments.rounds}", flush=True)
        return {
            name: {
                "seconds": harness.spread(times[name]),
                "x no experts": harness.ratio(times[name], times[NONE]),
                "temporaries_gib": side.ask("temporaries"),
                "peak_gib": side.ask("memory"),
                **first[name],
            }
            for name, side in sides.items()
        }
    finally:
        for side in sides.values():
            side.close()


def compile_all(arguments: argparse.Namespace, own: list[str]) -> dict[str, Any]:
    """Compiles one at a time, each in a new process; what does not fit the chip is reported."""
    # libtpu reads XLA_FLAGS too, and an unknown one ends it.
    os.environ |= {"XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    found: dict[str, Any] = {}
    for name in names(arguments.experts, arguments.paths):
        side = harness.Side(name, __file__, own)
        try:
            found[name] = side.ask("compile")
        except harness.Failed as error:
            found[name] = {"failed": str(error)}
        finally:
            side.close()
        print(f"{name}: {found[name]}", flush=True)
    return found


def rows(sides: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Returns header and rows of the table."""
    ours = [(*name.partition("/")[::2], found) for name, found in sides.items()]
    if any("x no experts" in found for *_, found in ours):
        header = (
            "path",
            "experts",
            "s/step",
            "x no experts",
            "temporaries GiB",
            "peak GiB",
            "largest share",
        )
        return header, [
            [
                path,
                experts,
                harness.figure(f["seconds"]),
                harness.figure(f["x no experts"]),
                f"{f['temporaries_gib']:.2f}",
                f"{f['peak_gib']:.2f}",
                f"{f['largest share']:.0%}" if experts else "",
            ]
            for path, experts, f in ours
        ]
    header = (
        "path",
        "experts",
        "mesh",
        "state and batch GiB a chip",
        "temporaries GiB a chip",
        "compiled in s",
    )
    table = []
    for path, experts, f in ours:
        if "failed" in f:
            table.append([path, experts, "", "does not compile", f["failed"][:120], ""])
            continue
        mesh = ", ".join(f"{axis} {size}" for axis, size in f["mesh"].items())
        gib = (f"{f['state and batch']:.2f}", f"{f['temporaries']:.2f}", f"{f['seconds']:.0f}")
        table.append([path, experts, mesh, *gib])
    return header, table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--experts", type=lambda text: tuple(map(int, text.split(","))), default=EXPERTS)
    parser.add_argument(
        "--paths", nargs="+", choices=(NONE, *PATHS), default=(NONE, *PATHS), help="what is compiled"
    )
    parser.add_argument("--threads", type=int, default=2, help="of a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed steps of a side in a round; their median counts"
    )
    parser.add_argument(
        "--compile-for", metavar="TOPOLOGY", help="a TPU slice, as v5e:4x4; nothing is timed"
    )
    parser.add_argument("--out", type=harness.output(), help="where the figures go as JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if len(arguments.paths) <= len(PATHS) and not arguments.compile_for:
        parser.error("--paths goes with --compile-for: what is timed is compared with all the others.")
    if arguments.side:
        harness.pin(arguments.threads)
        return serve(arguments)
    own = [f"--size={arguments.size}", f"--threads={arguments.threads}"]
    own += [f"--compile-for={arguments.compile_for}"] if arguments.compile_for else []
    if arguments.compile_for:
        harness.need("libtpu", install="libtpu")
    machine = harness.machine(arguments.threads)
    sides = compile_all(arguments, own) if arguments.compile_for else measure(arguments, own)
    print(json.dumps(machine))
    print(harness.table(*rows(sides)))
    if arguments.out:
        result = {
            "size": arguments.size,
            "compiled for": arguments.compile_for,
            "machine": machine,
            "sides": sides,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    harness.run(main)
