"""Interprets pickles of plain data, and of tensors as `torch.save` writes them, and nothing else.

A pickle is a program for a small machine. Python's own machine believes what a program claims (a
memo of 2^31 places, a text of 2^60 bytes, a key whose hash takes years) and can call any function.
This one knows only the opcodes of plain data; each takes no more memory than a small multiple of
its own bytes.
"""

import collections
import dataclasses
import functools
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

TORCH_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
BYTES = 1 << 24  # of a pickle, at most: the names and shapes of some 80,000 tensors
OPCODES = 4_000_000  # in a pickle, at most; a tensor takes some 30
LONGEST_NUMBER = 64  # bytes of an integer
DEEPEST = 100  # containers inside each other
DIMENSIONS = 64  # of a tensor, as many as numpy holds
REPEATED = 1 << 20  # elements that a tensor may always have, however few numbers it repeats
PLAIN = (str, int, float, bool, type(None))


class Storage(NamedTuple):
    """Describes a run of numbers in the file, of which tensors are views."""

    record: str  # within the archive
    dtype: np.dtype
    size: int  # elements


class TorchTensor(NamedTuple):
    """Describes a strided view of a storage, whose numbers are still in the file."""

    storage: Storage
    offset: int  # elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Refused(Exception):
    """Names something in a pickle that is neither plain data nor a tensor."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Known:
    """Stands for a name of torch's that a pickle may use.

    No class or function of any library is used.
    """

    name: str


# Everything that a pickle may name.
NAMES = {
    ("collections", "OrderedDict"): _Known("OrderedDict"),
    ("torch", "Size"): _Known("Size"),
    ("torch._utils", "_rebuild_tensor_v2"): _Known("_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"): _Known("_rebuild_parameter"),
    **{("torch", name): _Known(name) for name in TORCH_DTYPES},
}


def read_pickle(data: bytes, root: str, file_bytes: int) -> Any:
    """Makes the tree that a pickle describes.

    root: what stands before the names of the records in the archive. file_bytes: size of the whole
    file, which bounds every number of elements. Raises Refused for code and objects, and other
    exceptions for what is malformed.
    """
    tree = _Machine(data, root, file_bytes).run()
    _check_tree(tree, 10 * len(data) + 1000)
    return tree


def _check_tree(tree: Any, limit: int) -> None:
    """Raises UnpicklingError unless walking through the tree ends soon and meets plain data and
    tensors only.

    A container that holds itself, or whose parts are shared over and over, has few bytes and
    endless branches.
    """
    left = [(tree, 0)]
    seen = 0
    while left:
        part, depth = left.pop()
        seen += 1
        if seen > limit or depth > DEEPEST:
            raise pickle.UnpicklingError("its containers are nested too deep or hold each other")
        kind = type(part)
        if kind is dict or kind is collections.OrderedDict:
            left += [(value, depth + 1) for value in part.values()]
        elif kind is list or kind is tuple:
            left += [(value, depth + 1) for value in part]
        elif kind not in PLAIN and kind is not TorchTensor:
            raise pickle.UnpicklingError("it holds a part of a tensor outside any tensor")


# --------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------


def _storage(pid: Any, root: str, file_bytes: int) -> Storage:
    """Reads ("storage", kind, key, device, size)."""
    if type(pid) is not tuple or len(pid) != 5:
        raise pickle.UnpicklingError("an unknown kind of storage")
    word, kind, key, _, size = pid
    dtype = TORCH_DTYPES.get(kind.name) if isinstance(kind, _Known) else None
    if word != "storage" or dtype is None or type(key) is not str or type(size) is not int:
        raise pickle.UnpicklingError("an unknown kind of storage")
    if not 0 <= size * np.dtype(dtype).itemsize <= file_bytes:
        raise pickle.UnpicklingError(f"it lacks numbers of its storage {key[:40]}")
    return Storage(f"{root}data/{key}", np.dtype(dtype), size)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or any(
        type(n) is not int or not 0 <= n < 1 << 63 for n in numbers
    ):
        raise pickle.UnpicklingError("a tensor is described by something other than numbers")
    if len(shape) != len(strides) or len(shape) > DIMENSIONS:
        raise pickle.UnpicklingError("a tensor has a stride too few or too many")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise pickle.UnpicklingError("a tensor reaches past its storage")
    # The dimensions without those of length 0, which would hide the others.
    if math.prod(n for n in shape if n) > max(storage.size, REPEATED):
        raise pickle.UnpicklingError("a tensor has more elements than its storage")
    return TorchTensor(storage, offset, tuple(shape), tuple(strides))


def _called(function: Any, arguments: Any) -> Any:
    """Gives what one of `NAMES` makes of its arguments."""
    name = function.name if isinstance(function, _Known) else ""
    if type(arguments) is not tuple:
        raise pickle.UnpicklingError("a call without arguments")
    if name == "OrderedDict" and len(arguments) < 2:
        made: collections.OrderedDict = collections.OrderedDict()
        for key, value in arguments[0] if arguments else ():
            made[_key(key)] = value
        return made
    if name == "Size" and len(arguments) == 1 and type(arguments[0]) in (tuple, list):
        return tuple(arguments[0])
    if name == "_rebuild_tensor_v2" and len(arguments) >= 4:
        return _tensor(*arguments)
    if name == "_rebuild_parameter" and arguments and isinstance(arguments[0], TorchTensor):
        return arguments[0]
    raise pickle.UnpicklingError("a call of something other than a function")


def _key(key: Any) -> Any:
    """Returns a key of a dict if it is plain, so that hashing and comparing it takes no time."""
    if type(key) in PLAIN or (type(key) is tuple and all(type(part) in PLAIN for part in key)):
        return key
    raise pickle.UnpicklingError("a key is neither a text nor a number")


# --------------------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------------------


class _Machine:
    """Runs a pickle over a stack of values; marks cut the stack into parts."""

    def __init__(self, data: bytes, root: str, file_bytes: int):
        self.data, self.at = data, 0
        self.storage = functools.partial(_storage, root=root, file_bytes=file_bytes)
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Runs the opcodes until the last one and returns the value on top."""
        data, steps = self.data, STEPS
        for _ in range(OPCODES):
            code = data[self.at]
            self.at += 1
            if code == STOP:
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                if chr(code) in OPCODE_NAMES:
                    raise Refused(f"opcode {OPCODE_NAMES[chr(code)]}")
                raise pickle.UnpicklingError(f"an unknown opcode {code}")
            step(self)
        raise pickle.UnpicklingError(f"it has more than {OPCODES} opcodes")

    def take(self, count: int) -> bytes:
        """Takes the next bytes of the pickle."""
        end = self.at + count
        if end > len(self.data):
            raise pickle.UnpicklingError("a length in it reaches past its end")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, count: int) -> int:
        """Takes a whole number of so many bytes, without sign."""
        return int.from_bytes(self.take(count), "little")

    def line(self) -> bytes:
        """Takes what is left of a line of text."""
        end = self.data.index(b"\n", self.at)
        taken = self.take(end - self.at)
        self.at += 1
        return taken

    def marked(self) -> list[Any]:
        """Takes all values above the last mark."""
        values = self.stack
        self.stack = self.below.pop()
        return values

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self.stack.append(value)

    def tuple_of(self, count: int) -> None:
        """Makes a tuple of the last values."""
        if len(self.stack) < count:
            raise pickle.UnpicklingError("too few values")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def long(self, length: int) -> None:
        """Puts a number of so many bytes on the stack."""
        if length > LONGEST_NUMBER:
            raise pickle.UnpicklingError("a number of too many digits")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def integer(self) -> None:
        """Puts a number that is written as text on the stack."""
        word = self.line().removesuffix(b"L")
        if len(word) > 2 * LONGEST_NUMBER:
            raise pickle.UnpicklingError("a number of too many digits")
        self.push({b"00": False, b"01": True}[word] if word in (b"00", b"01") else int(word))

    def extend(self, values: list[Any]) -> None:
        """Adds values to the list on top."""
        target = self.stack[-1]
        if type(target) is not list:
            raise pickle.UnpicklingError("entries are added to something other than a list")
        target.extend(values)

    def entries(self, parts: list[Any]) -> None:
        """Adds keys and values, in turn, to the dict on top."""
        target = self.stack[-1]
        if type(target) not in (dict, collections.OrderedDict) or len(parts) % 2:
            raise pickle.UnpicklingError("entries are added to something other than a dict")
        for key, value in zip(parts[::2], parts[1::2], strict=True):
            target[_key(key)] = value

    def pair(self) -> None:
        """Adds the last two values, a key and its value, to the dict under them."""
        value, key = self.stack.pop(), self.stack.pop()
        self.entries([key, value])

    def pop(self) -> None:
        """Drops the last value, or a mark."""
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def open_mark(self) -> None:
        """Sets a mark: what comes is a part of its own."""
        self.below.append(self.stack)
        self.stack = []

    def new_dict(self) -> None:
        """Makes a dict of the values above the last mark."""
        parts = self.marked()
        self.push({})
        self.entries(parts)

    def name(self, module: str, name: str) -> None:
        """Puts what a name stands for on the stack."""
        if (module, name) not in NAMES:
            raise Refused(f"{module}.{name}"[:100])
        self.push(NAMES[module, name])

    def stack_name(self) -> None:
        """Takes a module and a name from the stack, and puts what they stand for there."""
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise pickle.UnpicklingError("a name other than a text")
        self.name(module, name)

    def call(self) -> None:
        """Calls one of `NAMES` with the arguments on top."""
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(_called(function, arguments))

    def build(self) -> None:
        """Drops what a pickle sets on an ordered dict besides its entries (torch's `_metadata`)."""
        self.stack.pop()
        if type(self.stack[-1]) is not collections.OrderedDict:
            raise pickle.UnpicklingError("attributes are set on something that has none")


def _plain_text(data: bytes) -> str:
    """Decodes a text; half of a surrogate pair, which nothing can print, is refused."""
    text = data.decode("raw-unicode-escape")
    text.encode()
    return text


STOP = pickle.STOP[0]
OPCODE_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
STEPS: dict[int, Callable[[_Machine], Any]] = {
    code[0]: step
    for code, step in {
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),
        pickle.MARK: _Machine.open_mark,
        pickle.POP: _Machine.pop,
        pickle.POP_MARK: _Machine.marked,
        pickle.DUP: lambda m: m.push(m.stack[-1]),
        # Numbers and texts
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.INT: _Machine.integer,
        pickle.LONG: _Machine.integer,
        pickle.BININT: lambda m: m.push(struct.unpack("<i", m.take(4))[0]),
        pickle.BININT1: lambda m: m.push(m.number(1)),
        pickle.BININT2: lambda m: m.push(m.number(2)),
        pickle.LONG1: lambda m: m.long(m.number(1)),
        pickle.LONG4: lambda m: m.long(m.number(4)),
        pickle.FLOAT: lambda m: m.push(float(m.line())),
        pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        pickle.UNICODE: lambda m: m.push(_plain_text(m.line())),
        pickle.BINUNICODE: lambda m: m.push(m.take(m.number(4)).decode()),
        pickle.SHORT_BINUNICODE: lambda m: m.push(m.take(m.number(1)).decode()),
        pickle.BINUNICODE8: lambda m: m.push(m.take(m.number(8)).decode()),
        pickle.BINSTRING: lambda m: m.push(m.take(m.number(4)).decode("ascii")),
        pickle.SHORT_BINSTRING: lambda m: m.push(m.take(m.number(1)).decode("ascii")),
        # Containers
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.TUPLE1: lambda m: m.tuple_of(1),
        pickle.TUPLE2: lambda m: m.tuple_of(2),
        pickle.TUPLE3: lambda m: m.tuple_of(3),
        pickle.TUPLE: lambda m: m.push(tuple(m.marked())),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.LIST: lambda m: m.push(m.marked()),
        pickle.APPEND: lambda m: m.extend([m.stack.pop()]),
        pickle.APPENDS: lambda m: m.extend(m.marked()),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.DICT: _Machine.new_dict,
        pickle.SETITEM: _Machine.pair,
        pickle.SETITEMS: lambda m: m.entries(m.marked()),
        # The memo
        pickle.GET: lambda m: m.push(m.memo[int(m.line())]),
        pickle.BINGET: lambda m: m.push(m.memo[m.number(1)]),
        pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number(4)]),
        pickle.PUT: lambda m: m.memo.__setitem__(int(m.line()), m.stack[-1]),
        pickle.BINPUT: lambda m: m.memo.__setitem__(m.number(1), m.stack[-1]),
        pickle.LONG_BINPUT: lambda m: m.memo.__setitem__(m.number(4), m.stack[-1]),
        pickle.MEMOIZE: lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
        # Tensors
        pickle.GLOBAL: lambda m: m.name(m.line().decode(), m.line().decode()),
        pickle.STACK_GLOBAL: _Machine.stack_name,
        pickle.REDUCE: _Machine.call,
        pickle.NEWOBJ: _Machine.call,
        pickle.BUILD: _Machine.build,
        pickle.BINPERSID: lambda m: m.push(m.storage(m.stack.pop())),
    }.items()
}
