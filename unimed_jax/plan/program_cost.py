"""Counts what a compiled program does from its text: operations, memory traffic and messages.

`cost_analysis()` of JAX counts the body of a loop once; a model of stacked layers is made of loops.
Here loops count as often as they run.

- flops: of products only (dots, convolutions, and the kernels that GPUs call for them), as
  `train/flops.py` counts them: 2 for every multiplication and addition. A product that the compiler
  wrote as a multiplication and a sum is found by its name.
- bytes: what each instruction reads and writes of the device's memory. A fusion reads its operands
  and writes its result, nothing between; of an array that it only slices or gathers from it reads
  that part, and of one that it updates in place it writes that part. What lies in a TPU core's own
  memory is free. Padding of tiles, and what caches save, are not counted.
- collectives: see `collectives.py`.

A kernel whose operations are not known counts none, and is named in `unknown_calls`.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

from unimed_jax.plan import collectives
from unimed_jax.plan.hlo import Array, Computation, Instruction, Module, parse
from unimed_jax.plan.loops import trip_count
from unimed_jax.plan.products import flops_of_product, unknown_kernel

# Instructions that move nothing: they name what is there already.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("async-start", "after-all", "add-dependency", "opt-barrier", "partition-id", "replica-id"),
}
# Custom calls that only mark something for the compiler.
_MARKS = (
    "AssumeGatherIndicesInBound",
    "AllocateBuffer",
    "Sharding",
    "SPMD",
    "AsyncCollective",
    "annotate",
)
# Inside a fusion these read all of their operands, however little of the result is needed.
_READ_WHOLE = {
    *("dot", "convolution", "custom-call", "reduce-window", "sort", "concatenate"),
    *("tuple", "get-tuple-element"),
}
LARGEST = 20


@dataclasses.dataclass(frozen=True)
class Collective:
    """Sums the messages of one kind over the same axes, of one device in one run of the program."""

    kind: str  # all-gather, reduce-scatter, all-reduce, all-to-all, collective-permute
    axes: tuple[str, ...]  # of the mesh, in its order; ("?",) if they do not fit it
    bytes: float  # that leave one device
    count: float


@dataclasses.dataclass(frozen=True)
class Operation:
    """Sums the cost of all instructions of one name and shape, loops multiplied out."""

    # op_name of its metadata; what the compiler added has none, but a kernel's name or an opcode
    name: str
    shape: str  # of the first result, without layout
    flops: float
    bytes: float
    network: float  # bytes that leave one device
    count: float


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Holds what one device does in one run of a compiled program."""

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]  # those that send most come first
    operations: tuple[Operation, ...]
    unknown_loops: tuple[str, ...]  # loops whose count is not known; they count once
    unknown_calls: tuple[str, ...]  # kernels whose FLOPs are not known; they count none

    @property
    def collective_bytes(self) -> float:
        """Counts the bytes that leave one device."""
        return sum(c.bytes for c in self.collectives)

    @property
    def largest(self) -> tuple[Operation, ...]:
        """Picks the operations with most FLOPs, and those with most bytes, without repeating any."""
        picked = [*self.by("flops")[:LARGEST], *self.by("bytes")[:LARGEST]]
        return tuple(dict.fromkeys(picked))

    def by(self, field: str) -> list[Operation]:
        """Sorts the operations by flops, bytes, network or count, the largest first."""
        return sorted(self.operations, key=lambda operation: -getattr(operation, field))


def program_cost(text: str, mesh_sizes: Mapping[str, int] | None = None) -> ProgramCost:
    """Counts the cost of a compiled program on one device, from `compiled.as_text()`.

    `mesh_sizes`: sizes of the mesh by axis, in its order. Raises ValueError if the text is not that
    of a compiled program.
    """
    module = parse(text)
    counter = _Counter(module, mesh_sizes or {})
    total = counter.computation(module.entry.name)
    by_group: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for (kind, axes), (sent, count) in total.messages.items():
        by_group[kind, axes] = [sent, count]
    messages = [Collective(kind, axes, *sums) for (kind, axes), sums in by_group.items()]
    operations = tuple(Operation(*key, *sums) for key, sums in total.operations.items())
    return ProgramCost(
        flops=sum(o.flops for o in operations),
        bytes=sum(o.bytes for o in operations),
        collectives=tuple(sorted(messages, key=lambda c: -c.bytes)),
        operations=operations,
        unknown_loops=tuple(sorted(counter.unknown_loops)),
        unknown_calls=tuple(sorted(counter.unknown_calls)),
    )


class _Sum:
    """Adds up costs by operation, and messages by kind and axes."""

    def __init__(self) -> None:
        self.operations: dict[tuple[str, str], list[float]] = {}  # flops, bytes, network, count
        self.messages: dict[tuple[str, tuple[str, ...]], list[float]] = {}  # bytes, count

    def add(self, key: tuple[str, str], flops=0.0, bytes=0.0, network=0.0, count=0.0) -> None:
        """Adds the cost of one instruction."""
        _accumulate(self.operations, key, (flops, bytes, network, count))

    def merge(self, other: "_Sum", times: float) -> None:
        """Adds another sum, `times` over."""
        for key, values in other.operations.items():
            _accumulate(self.operations, key, [times * v for v in values])
        for group, values in other.messages.items():
            _accumulate(self.messages, group, [times * v for v in values])

    @property
    def size(self) -> tuple[float, float]:
        """Gives the FLOPs and bytes, by which branches are compared."""
        values = list(self.operations.values())
        return sum(v[0] for v in values), sum(v[1] for v in values)


def _accumulate(sums: dict, key, values) -> None:
    if key in sums:
        sums[key] = [a + b for a, b in zip(sums[key], values, strict=True)]
    elif any(values):
        sums[key] = list(values)


class _Counter:
    """Walks through a module, each computation once."""

    def __init__(self, module: Module, mesh_sizes: Mapping[str, int]):
        self.module, self.mesh_sizes = module, mesh_sizes
        self.unknown_loops: set[str] = set()
        self.unknown_calls: set[str] = set()
        self.computation = functools.cache(self._computation)
        self.fusion = functools.cache(self._fusion)

    def _computation(self, name: str) -> _Sum:
        """Sums a computation that runs instruction by instruction."""
        here = self.module.computations[name]
        total = _Sum()
        for i in here:
            if i.opcode == "while":
                times = trip_count(self.module, here, i)
                if times is None:
                    self.unknown_loops.add(i.op_name or i.name)
                for part in i.called("body", "condition"):
                    total.merge(self.computation(part), 1 if times is None else times)
            elif i.opcode == "conditional":
                names = i.called("branch_computations", "true_computation", "false_computation")
                total.merge(max((self.computation(n) for n in names), key=lambda s: s.size), 1)
            elif i.opcode in ("call", "async-start"):
                for part in i.called("to_apply", "calls"):
                    total.merge(self.computation(part), 1)
            elif i.opcode == "fusion":
                (inner,) = i.called("calls")
                products, key = self.fusion(inner), _key(i, self.module)
                total.merge(products, 1)
                # Its product has counted itself already.
                count = 0 if key in products.operations else 1
                total.add(key, bytes=self._fusion_traffic(here, i), count=count)
            elif not _moves_nothing(i):
                self._single(total, here, i)
        return total

    def _single(self, total: _Sum, here: Computation, i: Instruction) -> None:
        flops = flops_of_product(here, i)
        if unknown_kernel(i):
            self.unknown_calls.add(i.op_name or i.target)
        network = self._message(total, here, i)
        total.add(_key(i, self.module), flops, traffic(here, i), network, 1)

    def _message(self, total: _Sum, here: Computation, i: Instruction) -> float:
        """Adds the message of a collective and returns its bytes; 0 for other instructions."""
        kind = collectives.kind_of(i.opcode)
        if kind is None or _continues(i):
            return 0.0
        size, axes = collectives.group_of(i, self.mesh_sizes)
        if size == 1:
            return 0.0
        if kind == "all-reduce" and _keeps_own_part(here, i, size):
            kind = "reduce-scatter"  # as TPUs write it
        sent = collectives.sent(kind, here.operand_arrays(i), size)
        _accumulate(total.messages, (kind, axes), (sent, 1))
        return sent

    def _fusion(self, name: str) -> _Sum:
        """Sums the products and messages inside a fusion; its traffic belongs to its call."""
        here = self.module.computations[name]
        total = _Sum()
        for i in here:
            if i.opcode == "fusion":
                (inner,) = i.called("calls")
                total.merge(self.fusion(inner), 1)
                continue
            flops = flops_of_product(here, i)
            network = self._message(total, here, i)
            if flops or network:
                total.add(_key(i, self.module), flops, 0, network, 1)
        return total

    # ----------------------------------------------------------------------------------------------
    # Traffic of fusions
    # ----------------------------------------------------------------------------------------------

    def _fusion_traffic(self, here: Computation, i: Instruction) -> float:
        (name,) = i.called("calls")
        inner = self.module.computations[name]
        assert inner.root is not None
        read = self.parts_read(name)
        if inner.root.target == "AsyncCollectiveStart":  # (operand, result, context, ...)
            return float(sum(a.traffic for a in i.results[:2]))
        total = 0.0
        for number, operand in enumerate(i.operands):
            arrays = here.instructions[operand].results
            total += read.get(number, 0.0) * sum(a.traffic for a in arrays)
        written = [self._written(inner, root) for root in inner.roots]
        if len(written) == len(i.results):
            return total + sum(0 if a.on_chip else w for a, w in zip(i.results, written, strict=True))
        return total + sum(a.traffic for a in _without_work_space(inner.root, i.results))

    def _written(self, here: Computation, root: Instruction, dtype: str = "") -> float:
        """Counts the bytes that a result of a fusion changes in memory; dtype: see `_in_place`."""
        if root.opcode == "parameter" or _continues(root) or root.target == "AsyncCollectiveDone":
            return 0.0  # handed on as it came
        if _is_work_space(here, root):
            return 0.0
        update = _in_place(here, root, dtype)
        if update is None:
            return root.array.bytes
        at = 1 if update.opcode == "dynamic-update-slice" else len(update.operands) // 3 * 2 + 1
        part = here.operand(update, min(at, len(update.operands) - 1)).array
        target = here.operand(update, 0)
        dtype = dtype or root.array.dtype
        inner = _in_place(here, target, dtype) is not None
        below = self._written(here, target, dtype) if inner else 0.0
        return part.elements * root.array.bytes / max(root.array.elements, 1) + below

    @functools.cache  # noqa: B019 (the counter lives as long as one call)
    def parts_read(self, name: str) -> dict[int, float]:
        """Says which part of each parameter a fused computation reads, 0 to 1.

        Goes from the results to the parameters: of every instruction it knows which part is needed.
        """
        here = self.module.computations[name]
        needed: dict[str, float] = dict.fromkeys(here.instructions, 0.0)
        in_place = set()
        for root in here.roots:
            if root.opcode != "parameter":  # else it is only handed on
                needed[root.name] = 1.0
            update = _in_place(here, root)
            while update is not None:
                in_place.add(update.name)
                update = _in_place(here, here.operand(update, 0), root.array.dtype)
        for i in reversed(list(here)):
            part = needed[i.name]
            if part == 0 or not i.operands:
                continue
            for number, fraction in enumerate(self._operands_read(here, i, part, i.name in in_place)):
                operand = i.operands[number]
                needed[operand] = min(1.0, needed[operand] + fraction)
        return {number: needed[p.name] for number, p in here.parameters.items()}

    def _operands_read(
        self, here: Computation, i: Instruction, part: float, in_place: bool
    ) -> list[float]:
        """Says which part of each operand an instruction needs for `part` of its result."""
        operands = [here.instructions[name].array for name in i.operands]
        rest = [1.0] * (len(operands) - 1)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            whole = max(operands[0].elements, 1)
            return [min(1.0, part * i.array.elements / whole), *rest]
        if i.opcode == "dynamic-update-slice":
            return [0.0 if in_place else part, part, *rest[1:]]
        if i.opcode == "scatter":
            arrays = len(operands) // 3
            # what is there is read to add to it
            updates = operands[-1].elements / max(operands[0].elements, 1)
            kept = min(1.0, updates) if in_place else 1.0
            return [kept] * arrays + [1.0] * (len(operands) - arrays)
        if i.opcode == "fusion":
            (inner,) = i.called("calls")
            read = self.parts_read(inner)
            return [part * read.get(number, 0.0) for number in range(len(operands))]
        if i.target == "AsyncCollectiveDone" or _continues(i):
            return [0.0] * len(operands)
        if i.opcode in _READ_WHOLE or collectives.kind_of(i.opcode):
            return [1.0] * len(operands)
        if i.opcode == "broadcast":
            return [min(1.0, part * i.array.elements / max(operands[0].elements, 1))]
        return [part] * len(operands)


def _moves_nothing(i: Instruction) -> bool:
    """Says whether an instruction only names, marks or awaits something."""
    if i.opcode == "custom-call":
        return i.target.startswith(_MARKS)
    return i.opcode in _FREE or i.opcode.endswith(("-done", "-update"))


def traffic(here: Computation, i: Instruction) -> float:
    """Counts the bytes that one instruction outside a fusion moves through the device's memory."""
    operands = [a for name in i.operands for a in here.instructions[name].results]
    results = _without_work_space(i, i.results)
    if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":
        return float(sum(a.traffic for a in results))  # the operands are named among the results
    if i.opcode in ("dynamic-slice", "slice"):
        return i.array.traffic + (0 if operands[0].on_chip else i.array.bytes)
    if i.opcode == "gather":
        return i.array.traffic + (0 if operands[0].on_chip else i.array.bytes) + operands[1].traffic
    if i.opcode == "dynamic-update-slice":
        part = operands[1]
        return part.traffic + (0 if results[0].on_chip else part.bytes)
    if i.opcode == "scatter":
        written = 0 if results[0].on_chip else 2 * operands[-1].bytes
        return written + operands[-1].traffic + operands[len(operands) // 3].traffic
    if i.opcode in ("iota", "rng-bit-generator", "broadcast"):
        return sum(a.traffic for a in (*operands, *results))
    return float(sum(a.traffic for a in (*operands, *results)))


def _without_work_space(kernel: Instruction, results: Sequence[Array]) -> Sequence[Array]:
    """Leaves out the last result of a GPU library's kernel, bytes for its own use."""
    if kernel.opcode == "custom-call" and kernel.target.startswith("__cu") and len(results) > 1:
        return [a for a in results if a.dtype not in ("s8", "u8")]
    return results


def _is_work_space(here: Computation, root: Instruction) -> bool:
    """Says whether one result of several is the work space of a GPU library's kernel."""
    if root.opcode != "get-tuple-element":
        return False
    kernel = here.operand(root, 0)
    return root.array not in _without_work_space(kernel, kernel.results)


def _in_place(here: Computation, root: Instruction, dtype: str = "") -> Instruction | None:
    """Finds the update of a part that `root` is, if the rest of the array can stay where it is.

    It cannot if the array that is updated has another type of numbers than the result: `dtype`, or
    that of `root` if none is given.
    """
    dtype = dtype or root.array.dtype
    while root.opcode in ("bitcast", "copy", "convert", "reshape"):
        root = here.operand(root, 0)
    if root.opcode not in ("dynamic-update-slice", "scatter"):
        return None
    target = here.operand(root, 0)
    while target.opcode in ("bitcast", "copy", "convert", "reshape"):
        target = here.operand(target, 0)
    if target.opcode == "parameter":
        return root if target.array.dtype == dtype else None
    return root if _in_place(here, target, dtype) is not None else None


def _continues(i: Instruction) -> bool:
    """Says whether a TPU's instruction goes on with a collective that another one has started."""
    found = re.search(r'"async_collective_fusion_config":\s*\{"flag_start":\s*"(-?\d+)"', i.attributes)
    return found is not None and int(found[1]) >= 0


def _keeps_own_part(here: Computation, i: Instruction, size: int) -> bool:
    """Says whether all that is read of an all-reduce is the device's own part."""
    users = here.users[i.name]
    return bool(users) and all(
        user.opcode == "dynamic-slice" and user.array.elements * size == i.array.elements
        for user, _ in users
    )


def _key(i: Instruction, module: Module) -> tuple[str, str]:
    """Gives the name and shape by which costs are folded."""
    name = i.op_name or i.target or i.opcode
    if name == "fusion":
        inner = module.computations[i.called("calls")[0]]
        results = inner.roots
        first = results[0].target or results[0].opcode
        name = next((result.op_name for result in results if result.op_name), first)
    array = i.array
    return name, f"{array.dtype}[{','.join(map(str, array.dims))}]"
