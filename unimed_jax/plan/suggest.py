"""Ranks meshes, remat policies and micro-batches by a model, so that only the best are compiled.

The model knows where the sharding table puts every parameter, what the backward pass keeps, what
`ideal.py` counts, and what a chip can do. It is rough: what it ranks first is compiled, and the
compiled numbers decide.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from unimed_jax.config import Config, MeshConfig
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import tree_bytes
from unimed_jax.plan.ideal import ideal
from unimed_jax.plan.programs import row_bytes
from unimed_jax.plan.roofline import BOUNDS, times
from unimed_jax.plan.table import Row, mesh_name
from unimed_jax.plan.topology import Topology, as_on_the_card
from unimed_jax.train.program import Program, build

MARGIN = 0.95  # of the usable memory: the estimate may be too low
Remat = Literal["none", "dots", "full"]
POLICIES: tuple[Remat, ...] = get_args(Remat)
COMPILED = 3  # suggestions that are compiled
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Holds settings, and what the model expects of them on one device."""

    config: Config
    memory: float  # bytes
    step: float  # seconds
    bound: str
    total: float  # seconds of products, memory and network one after another


def settings(config: Config) -> list[str]:
    """Writes what is suggested of a config as arguments to copy."""
    sizes = [f"--config.mesh.{axis}={getattr(config.mesh, axis)}" for axis in sharding.MESH_AXES]
    return [
        "--config.mesh.auto=False",
        *sizes,
        f"--config.model.remat={config.model.remat}",
        f"--config.train.accumulation={config.train.accumulation}",
    ]


def ranked(config: Config, topology: Topology) -> list[Suggestion]:
    """Lists the settings that the model expects to fit, the fastest first.

    Raises UserError if it expects none to fit, or knows no speed of the devices.
    """
    return best(estimates(config, topology), topology)


def estimates(config: Config, topology: Topology) -> list[Suggestion]:
    """Estimates every variant of a config; raises UserError if there is none, or no known speed."""
    if topology.chip is None:
        raise UserError(
            f"--suggest cannot rank for --topology={topology.text}, whose speed is not known; give a "
            "chip, as in v5e:4x4 or h100:8."
        )
    estimate = _Estimate(config, topology)
    found = [estimate.of(variant) for variant in variants(config, topology.count)]
    if not found:
        raise UserError(
            f"--topology={topology.text}: config.data.rows={config.data.rows} can be shared by no mesh "
            f"of {topology.count} devices; choose a multiple of {topology.count}."
        )
    return found


def best(found: Sequence[Suggestion], topology: Topology) -> list[Suggestion]:
    """Sorts what is expected to fit, the fastest first; raises UserError if nothing is."""
    fitting = [s for s in found if s.memory <= MARGIN * topology.usable]
    if not fitting:
        least = min(found, key=lambda s: s.memory)
        raise UserError(
            f"--topology={topology.text}: no mesh, remat policy or micro-batch is expected to fit; the "
            f"smallest takes about {least.memory / 2**30:.1f} of {topology.usable / 2**30:.1f} GiB: "
            f"{' '.join(settings(least.config))}; give more chips, or lower "
            "config.data.rows or row_tokens."
        )
    return sorted(fitting, key=lambda s: (s.step, s.total, s.memory))


def variants(config: Config, count: int) -> Iterator[Config]:
    """Gives the config on every mesh of `count` devices, with every remat policy and micro-batch."""
    for sizes in _meshes(config, count):
        shares = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        micros = [2**n for n in range(11) if config.data.rows % (shares * 2**n) == 0]
        for remat, micro in itertools.product(POLICIES, micros):
            yield dataclasses.replace(
                config,
                mesh=MeshConfig(auto=False, **sizes),
                model=dataclasses.replace(config.model, remat=remat),
                train=dataclasses.replace(config.train, accumulation=micro),
            )


def _meshes(config: Config, count: int) -> Iterator[dict[str, int]]:
    """Gives the sizes of the axes of every mesh that divides the rows, the heads and the experts."""
    model = config.model
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for data, fsdp, tensor in itertools.product(divisors, repeat=3):
        expert, rest = divmod(count, data * fsdp * tensor)
        if rest or expert > 1 and (not model.moe.experts or model.moe.experts % expert):
            continue
        if model.decoder.kv_heads % tensor or model.decoder.mlp_width % tensor:
            continue
        yield {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert}


class _Estimate:
    """Estimates memory and time of variants of one config."""

    def __init__(self, config: Config, topology: Topology):
        self.config, self.topology = config, topology
        self.built: Program = build(config, None)
        assert topology.chip is not None
        kind = topology.chip.gpu.name if topology.chip.gpu else topology.chip.kind
        device = AbstractDevice(kind, 1, topology.chip.platform)
        self.alone = AbstractMesh(
            (1,) * 4, sharding.MESH_AXES, (AxisType.Auto,) * 4, abstract_device=device
        )
        self.activations = functools.cache(self._activations)

    def of(self, config: Config) -> Suggestion:
        """Estimates a variant."""
        sizes = {axis: getattr(config.mesh, axis) for axis in sharding.MESH_AXES}
        least = ideal(config, sizes, "train")
        micro = config.train.accumulation
        # Every micro-batch reads, and gathers, the weights again.
        moved = least.bytes + least.again.bytes + (micro - 1) * least.byte_terms["weights"]
        sent = least.collective_bytes + (micro - 1) * least.collective_terms.get("gather", 0.0)
        line = times(self.topology, least.flops + least.again.flops, moved, sent)
        total = sum(line["seconds"][part] for part in BOUNDS)
        return Suggestion(config, self._memory(config, sizes), line["step_s"], line["bound"], total)

    def _memory(self, config: Config, sizes: dict[str, int]) -> float:
        """Estimates the bytes that a device needs."""
        shares = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        rows = config.data.rows / config.train.accumulation / shares
        held, largest = 0.0, 0.0
        moment = jnp.dtype(config.optimizer.moments_dtype).itemsize / 4  # of a parameter's float32
        for path, leaf in self.built.leaves.items():
            names = sharding.parameter_names(path)
            divided = sharding.divided_shape(leaf)
            shape = divided[len(divided) - len(names) :]
            axes = [axis for some in sharding.axes_by_dimension(shape, names, sizes) for axis in some]
            size = tree_bytes(leaf) / math.prod(sizes[axis] for axis in axes)
            # a leaf that trains, its two moments and its gradient
            held += (2 + 2 * moment) * size if path in self.built.state.leaves else size
            if not any(name in ("expert_hidden", "router_hidden") for name in names):
                depth = leaf.shape[0] if len(leaf.shape) > len(names) else 1
                largest += leaf.size / depth / sizes["tensor"] * 2 if "/layers/" in path else 0.0
        per_row = self.activations(config.model.remat)
        decoder, data = config.model.decoder, config.data
        logits = rows * data.row_answers * decoder.vocab / sizes["tensor"] * 10  # 4 + 4 + 2 bytes
        wide = rows * data.row_tokens * (8 * decoder.width + 3 * decoder.mlp_width) * 2
        gathered = largest if sizes["fsdp"] > 1 else 0.0
        return held + rows * per_row + logits + wide + gathered

    def _activations(self, remat: Remat) -> float:
        """Returns the bytes that the backward pass reads of each row under a remat policy."""
        model = dataclasses.replace(self.config.model, remat=remat)
        config = dataclasses.replace(self.config, model=model)
        with jax.sharding.use_abstract_mesh(self.alone), as_on_the_card(self.topology):
            return row_bytes(config, build(config, None))


def table(found: Sequence[Suggestion]) -> tuple[list[str], list[list[str]]]:
    """Makes a table of the best suggestions: head and lines."""
    head = ["mesh", "remat", "micro-batches", "about GiB", "about s a step", "bound"]
    lines = []
    for s in found[:SHOWN]:
        sizes = {axis: getattr(s.config.mesh, axis) for axis in sharding.MESH_AXES}
        numbers = [str(s.config.train.accumulation), f"{s.memory / 2**30:.2f}", f"{s.step:.3g}"]
        lines.append([mesh_name(sizes), s.config.model.remat, *numbers, s.bound])
    return head, lines


def fastest(rows: Sequence[Row], topology: Topology) -> str:
    """Says which of the compiled suggestions is the fastest that fits, with its settings to copy."""
    fitting = [row for row in rows if row["topology"] == topology.text and row["fits"]]
    if not fitting:
        return f"{topology.text}: none of the compiled suggestions fits; give more chips, or fewer rows."
    # a compiler that keeps no text leaves the order of the model
    best = min(fitting, key=lambda row: row.get("roofline", {}).get("step_s", math.inf))
    return f"{topology.text}, the fastest that fits: {' '.join(best['settings'])}"
