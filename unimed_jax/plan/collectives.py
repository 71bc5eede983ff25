"""Reads which devices a collective of a compiled program joins, and what it sends.

Bytes are those that leave one device with a ring algorithm over the n devices of a group: an
all-gather sends the device's own part n - 1 times, a reduce-scatter and an all-to-all (n - 1) / n
of what they are given, an all-reduce twice that.
"""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from unimed_jax.plan.hlo import Array, Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
    "collective-permute",
)
# mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}: sizes, order of the devices, axes
_NAMED = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\]"
    r"(?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)


def kind_of(opcode: str) -> str | None:
    """Names the kind of collective that an instruction starts; None for all other instructions."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def sent(kind: str, operands: list[Array], size: int) -> float:
    """Counts the bytes that leave one device of a group of `size`."""
    whole = sum(a.bytes for a in operands)
    if kind in ("collective-permute", "collective-broadcast"):
        return float(whole)
    factor = {"all-gather": size - 1, "all-reduce": 2 * (size - 1) / size}
    return whole * factor.get(kind, (size - 1) / size)


def group_of(instruction: Instruction, mesh_sizes: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Gives the size of a collective's groups, and the mesh axes that they run over.

    `mesh_sizes`: sizes by axis in the mesh's order; device i of the program is place i of the mesh.
    A group that does not fit the mesh has the axes ("?",).
    """
    devices = math.prod(mesh_sizes.values())
    if "collective-permute" in instruction.opcode:
        pairs = _lists(instruction.attribute("source_target_pairs"))
        moves = [pair for pair in pairs if pair[0] != pair[1]]
        axes = {axis for pair in moves for axis in _axes(pair, mesh_sizes)}
        return (2 if moves else 1), tuple(a for a in (*mesh_sizes, "?") if a in axes)
    groups = replica_groups(instruction.attributes) or [list(range(devices))]
    largest = max(groups, key=len)
    return len(largest), _axes(largest, mesh_sizes)


def replica_groups(attributes: str) -> list[list[int]]:
    """Reads the groups of devices, in any of the three forms in which XLA writes them.

    {{0,1},{2,3}} lists them; [2,2]<=[4] or [2,2]<=[2,2]T(1,0) cuts a (transposed) row of numbers;
    mesh['a'=2,'b'=2] {'b'} names axes of a mesh, or a part of one: 'b':(2)4 is the part of size 4
    after one of size 2; device_ids=([2,2]T(1,0)) may give the order. No groups mean all devices.
    """
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _row(found[2], found[3]).reshape(_numbers(found[1])[0], -1).tolist()
    named = _NAMED.search(attributes)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        wanted = {
            axis: (int(before or 1), int(size or 0))
            for axis, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[4])
        }
        dims, inside = [], []
        for axis, size in sizes.items():
            before, part = wanted.get(axis, (1, 0))
            part = part or (size if axis in wanted else 1)
            dims += [before, part, size // before // part]
            inside += [False, axis in wanted, False]
        ids = _row(named[2], named[3]) if named[2] else np.arange(math.prod(dims))
        order = [i for i, x in enumerate(inside) if not x] + [i for i, x in enumerate(inside) if x]
        size = math.prod(d for d, x in zip(dims, inside, strict=True) if x)
        return ids.reshape(dims).transpose(order).reshape(-1, size).tolist()
    listed = re.search(r"replica_groups=(\{(?:[^{}]|\{[^{}]*\})*\})", attributes)
    return _lists(listed[1]) if listed else []


def _axes(group: list[int], mesh_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Names the axes along which the places of a group differ."""
    if not mesh_sizes or max(group) >= math.prod(mesh_sizes.values()):
        return ("?",)
    places = np.stack(np.unravel_index(group, tuple(mesh_sizes.values())))  # [axes, devices]
    varies = (places != places[:, :1]).any(axis=1)
    return tuple(itertools.compress(mesh_sizes, varies))


def _row(dims: str, order: str | None) -> np.ndarray:
    """Numbers the devices of an array of these dimensions, and reads them in the given order of axes."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _lists(text: str) -> list[list[int]]:
    return [_numbers(inner) for inner in re.findall(r"\{([\d,]+)\}", text)]
