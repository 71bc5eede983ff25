"""Changes good files into bad ones, by a random generator: bytes, and the trees of JSON files."""

import json
from typing import Any

import numpy as np

NUMBERS = [
    0,
    1,
    2,
    7,
    255,
    65535,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 33,
    1 << 60,
    (1 << 63) - 1,
    (1 << 64) - 1,
]
VALUES = [
    *(None, True, False, -1, 0, 1, 3, 10**6, 10**9, 10**12, 1 << 63, 10**30, -(10**12), 0.5, -0.5,
    1e-300, 1e308),
    *(float("nan"), float("inf"), "", "x", "1", "../../x", "a\nb", "\x00", "é" * 50, "a" * 5000, [], {},
    [[]], [None]),
    *([1, 2], [1] * 3000, ["a"] * 10, {"a": 1}, {"type": "x"}, [[1, "a"], {}], "(a+)+$",
    {"Regex": "(a|aa)*b"}),
]  # fmt: skip


def changed_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """Changes a few places: bits, bytes, whole numbers, cuts, repeats."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        if not out:
            break
        at = int(rng.integers(len(out)))
        kind = rng.integers(8)
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
        elif kind in (2, 3):
            size = int(rng.choice([4, 8]))
            number = NUMBERS[rng.integers(len(NUMBERS))] % (1 << 8 * size)
            out[at : at + size] = number.to_bytes(size, "little")
        elif kind == 4:
            del out[at : at + int(rng.integers(1, 40))]
        elif kind == 5:
            part = out[at : at + int(rng.integers(1, 60))]
            out[at:at] = part * int(rng.choice([1, 2, 50]))
        elif kind == 6:
            out[at:at] = rng.bytes(int(rng.integers(1, 20)))
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def changed_tree(rng: np.random.Generator, tree: Any, values: list = VALUES) -> Any:
    """Changes a few values or keys of a JSON tree, wherever they are."""
    tree = _copy(tree)
    for _ in range(rng.integers(1, 4)):
        places = list(_places(tree))
        if len(places) > 20_000:  # copies of copies
            return tree
        if not places:
            return values[rng.integers(len(values))]
        parent, key = places[rng.integers(len(places))]
        kind = rng.integers(8)
        if kind < 4:
            parent[key] = _copy(values[rng.integers(len(values))])
        elif kind == 4:
            del parent[key]
        elif kind == 5:
            other, there = places[rng.integers(len(places))]
            parent[key] = _copy(other[there])
        elif kind == 6 and isinstance(parent, dict):
            parent[f"{key}{rng.integers(9)}"] = parent.pop(key)
        elif isinstance(parent[key], (int, float)):
            parent[key] = parent[key] * int(rng.choice([-1, 10, 10**9, 10**15]))
        else:
            for _ in range(int(rng.integers(1, 130))):
                parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
    return tree


def _copy(tree: Any) -> Any:
    """Copies a JSON tree so that no two places share a value, as they may after copy.deepcopy.

    A change to one of 3000 shared values would change them all, and make hundreds of megabytes of it.
    """
    return json.loads(json.dumps(tree))


def _places(tree: Any):
    """Yields (list or dict, index or key) for every value below the top."""
    left = [tree]
    while left:
        parent = left.pop()
        entries = list(parent.items()) if isinstance(parent, dict) else list(enumerate(parent))
        for key, value in entries:
            yield parent, key
            if isinstance(value, (dict, list)):
                left.append(value)


def changed_json(rng: np.random.Generator, tree: Any, values: list = VALUES) -> bytes:
    """Writes a changed tree; sometimes its text is damaged, too, or nested extremely deep."""
    text = json.dumps(changed_tree(rng, tree, values)).encode()
    chance = rng.random()
    if chance < 0.1:
        return changed_bytes(rng, text)
    if chance < 0.12:
        return text.replace(b":", b":" + b"[" * 100_000, 1)
    return text
