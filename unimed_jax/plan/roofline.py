"""Compares a compiled program with what the mathematics needs and with what a chip can do.

The roofline time of a step is the longest of three: its products at the chip's peak, its memory
traffic at the memory's bandwidth, what it sends at the bandwidth of its links. It is a lower bound;
a program that overlaps the three well comes near it.
"""

import dataclasses
from typing import Any

from unimed_jax.errors import UserError
from unimed_jax.parsing import read_json
from unimed_jax.plan.chips import CHIPS
from unimed_jax.plan.ideal import ideal
from unimed_jax.plan.program_cost import program_cost
from unimed_jax.plan.topology import Topology

BOUNDS = ("compute", "memory", "network")
DEAREST = 1e6  # price of a chip for an hour


# Loops of as many turns as there are tokens to pick: one turn is planned.
_ONE_TURN = ("jit(advance)/while",)


def costs(
    config: Any, mesh: dict[str, int], program: str, text: str, sizes: dict[str, int] | None = None
) -> dict[str, Any]:
    """Counts a compiled program and its ideal, for one device, as plan.json holds them.

    sizes: of the engine's programs (predict/sizes.py).
    """
    compiled, least = program_cost(text, mesh), ideal(config, mesh, program, sizes=sizes)
    pairs = {
        "flops": (compiled.flops, least.flops),
        "bytes": (compiled.bytes, least.bytes),
        "collective_bytes": (compiled.collective_bytes, least.collective_bytes),
    }
    return {
        **{
            name: {"compiled": ours, "useful": ideals, "ratio": ours / ideals if ideals else None}
            for name, (ours, ideals) in pairs.items()
        },
        "rematerialised_flops": least.again.flops,
        "collectives": [
            {"kind": c.kind, "axes": list(c.axes), "bytes": c.bytes, "count": c.count}
            for c in compiled.collectives
        ],
        "largest": [dataclasses.asdict(operation) for operation in compiled.largest],
        "unknown": [
            *(name for name in compiled.unknown_loops if name not in _ONE_TURN),
            *compiled.unknown_calls,
        ],
    }


def times(topology: Topology, flops: float, bytes: float, sent: float) -> dict[str, Any]:
    """Gives the seconds that each of a chip's parts needs, the longest, and which it is.

    Empty for simulated devices, of which no speed is known.
    """
    chip = topology.chip
    if chip is None:
        return {}
    link = chip.link
    if topology.machines > 1 and chip.beyond:
        # a ring leaves a machine once, and all of the machine's adapters carry what it sends there
        link = min(link, chip.beyond * topology.count / topology.machines)
    found = dict(zip(BOUNDS, (flops / chip.flops, bytes / chip.bandwidth, sent / link), strict=True))
    bound = max(found, key=lambda name: found[name])
    return {"seconds": found, "step_s": found[bound], "bound": bound}


def outlook(
    config: Any,
    topology: Topology,
    program: str,
    step: float,
    price: float | None,
    sizes: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Says what a step of that many seconds comes to: throughput and, of training, hours and cost."""
    rows = config.data.rows if program == "train" else config.evaluate.batch
    if sizes:
        rows = sizes["slots"] if program == "decode" else sizes["rows"] * sizes["images"]
    unit = {"train": "examples", "prefill": "prompts", "decode": "tokens"}[program]
    found: dict[str, Any] = {f"{unit}_per_s": rows / step}
    if program == "train":
        found["hours"] = config.train.steps * step / 3600
        if price is not None:
            found["cost"] = found["hours"] * topology.count * price
    return found


def read_prices(file: str | None) -> dict[str, float]:
    """Reads a JSON file of prices, chip -> price of one for an hour; raises UserError for another."""
    if file is None:
        return {}
    found = read_json(file, 'give --prices=FILE that holds {"v5e": 1.2}: chip, price an hour')
    if not isinstance(found, dict) or not found:
        raise UserError(f'--prices={file} holds no prices; write {{"v5e": 1.2}}: chip, price an hour.')
    for name, price in found.items():
        number = isinstance(price, (int, float)) and not isinstance(price, bool)
        if name not in CHIPS or not (number and 0 <= price <= DEAREST):
            raise UserError(
                f"--prices={file}: {name!r}: {price!r} is not a chip and its price for an hour; choose "
                f"chips from {', '.join(CHIPS)}, and write numbers up to {DEAREST:,.0f}."
            )
    return {name: float(price) for name, price in found.items()}
