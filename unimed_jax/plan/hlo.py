"""Reads the text of a compiled program (optimised HLO) into computations of instructions.

Only what a count of its cost needs is read: names, opcodes, types, operands and the attributes as
text. The text is what `compiled.as_text()` gives on CPU, GPU and TPU.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Bits of an element; what is missing here (tokens, opaque values) takes no memory.
BITS = {
    **{"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16},
    **{"s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64},
    **{"c64": 64, "c128": 128, "f4e2m1fn": 4, "f8e3m4": 8, "f8e4m3": 8, "f8e4m3fn": 8, "f8e5m2": 8},
    **{"f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f8e8m0fnu": 8},
}

# bf16[8,128]{1,0:T(8,128)(2,1)S(1)}: type, dimensions, and where it lies in memory
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_END = re.compile(r"\}(, execution_thread.*)?$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_COMMA = re.compile(r", (?:/\*index=\d+\*/)?")  # between the types of a tuple


@dataclasses.dataclass(frozen=True)
class Array:
    """Describes one array of a type; `on_chip` means that it lies in a TPU core's own memory."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def elements(self) -> int:
        """Counts the elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Counts the bytes, without the padding of tiles."""
        return (self.elements * BITS.get(self.dtype, 0) + 7) // 8

    @property
    def traffic(self) -> int:
        """Counts the bytes that reading or writing it whole moves through the device's memory."""
        return 0 if self.on_chip else self.bytes


@functools.lru_cache(maxsize=200_000)
def arrays(type_text: str) -> tuple[Array, ...]:
    """Lists the arrays of a type, a tuple's in their order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(type_text):
        # TPU layouts name tiles ("T(8,128)") and memories: S(1) and above are the core's own. On a
        # GPU S(1) is a part of the same memory, for collectives.
        on_chip = "S(" in layout and ("T(" in layout or layout.startswith(":S("))
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, on_chip))
    return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """Holds one line of a computation."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str  # what follows the operands
    literal: str  # between the parentheses
    is_root: bool

    @property
    def results(self) -> tuple[Array, ...]:
        """Lists the arrays that it makes."""
        return arrays(self.type)

    @property
    def array(self) -> Array:
        """Gives the first array that it makes; an empty one if it makes none."""
        return self.results[0] if self.results else Array("token", (0,), False)

    @property
    def op_name(self) -> str:
        """Gives the name that JAX gave to the operation; "" if the compiler made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Names the kernel of a custom call."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """Gives the text of an attribute up to the next comma, or inside its braces."""
        found = re.search(
            rf"\b{name}=(?:\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}|([^,\s]+))", self.attributes
        )
        return "" if found is None else found[1] if found[1] is not None else found[2]

    def numbers(self, name: str) -> tuple[int, ...]:
        """Gives the numbers of an attribute such as dimensions={0,2}."""
        return tuple(int(n) for n in re.findall(r"\d+", self.attribute(name)))

    def called(self, *attributes: str) -> list[str]:
        """Names the computations that these attributes refer to."""
        return [name for a in attributes for name in _OPERAND.findall(self.attribute(a))]


class Computation:
    """Holds instructions in their order, by name, and who uses what."""

    def __init__(self, name: str):
        self.name = name
        self.instructions: dict[str, Instruction] = {}
        self.root: Instruction | None = None

    def add(self, instruction: Instruction) -> None:
        """Appends an instruction."""
        self.instructions[instruction.name] = instruction
        if instruction.is_root:
            self.root = instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def roots(self) -> list[Instruction]:
        """Lists the results one by one."""
        assert self.root is not None
        if self.root.opcode != "tuple":
            return [self.root]
        return [self.operand(self.root, number) for number in range(len(self.root.operands))]

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        """Finds the instruction that makes an operand."""
        return self.instructions[instruction.operands[number]]

    def operand_arrays(self, instruction: Instruction) -> list[Array]:
        """Lists the arrays of all operands."""
        return [a for name in instruction.operands for a in self.instructions[name].results]

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Lists who uses each instruction, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self:
            for number, name in enumerate(instruction.operands):
                if name in users:
                    users[name].append((instruction, number))
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Gives the parameters by number."""
        return {int(i.literal): i for i in self if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """Holds the computations of a program, and which one starts."""

    computations: Mapping[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Reads a program; raises ValueError if the text has no entry computation."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in _whole_lines(text):
        if line.startswith(" "):
            instruction = _instruction(line)
            if instruction is not None and current is not None:
                current.add(instruction)
        elif line.startswith(("%", "ENTRY")) and (head := _HEAD.match(line)):
            current = computations[head[2]] = Computation(head[2])
            entry = current if head[1] else entry
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Joins the lines of an instruction whose attributes hold line breaks, as those of Pallas do."""
    waiting = ""
    for line in text.splitlines():
        starts = line.startswith((" ", "%", "ENTRY", "HloModule")) or not line or _END.match(line)
        if waiting.startswith(" ") and not starts:
            waiting += line
        else:
            yield waiting
            waiting = line
    yield waiting


def _instruction(line: str) -> Instruction | None:
    """Reads `[ROOT ]%name = type opcode(operands), attributes`; None if the line is something else."""
    head = _NAME.match(line)
    if head is None:
        return None
    start = head.end()
    end = _closing(line, start) if line.startswith("(", start) else line.find(" ", start)
    opening = line.find("(", end)
    if end < 0 or opening < 0:
        return None
    closing = _closing(line, opening)
    literal = line[opening + 1 : closing - 1]
    opcode, type_text = _as_what_it_starts(line[end:opening].strip(), line[start:end])
    return Instruction(
        name=head[2],
        opcode=opcode,
        type=type_text,
        operands=tuple(_OPERAND.findall(literal)),
        attributes=line[closing:],
        literal=literal,
        is_root=head[1] is not None,
    )


def _as_what_it_starts(opcode: str, type_text: str) -> tuple[str, str]:
    """Reads `X-start` of ((operands), result, context) as X; its `X-done` then only hands it on.

    So a compiler writes what runs beside other work, a fusion as well as a message. Pairs of another
    form, such as those that copy, keep both names, and so do computations that are started whole.
    """
    if opcode.endswith("-start") and opcode != "async-start" and type_text.startswith("(("):
        start = _COMMA.match(type_text, _closing(type_text, 1))
        if start is not None:
            array = _ARRAY.match(type_text, start.end())
            end = array.end() if array is not None else _closing(type_text, start.end())
            return opcode.removesuffix("-start"), type_text[start.end() : end]
    return opcode, type_text


_PARENTHESIS = re.compile(r"[()]")


def _closing(line: str, start: int) -> int:
    """Finds the place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(line)
