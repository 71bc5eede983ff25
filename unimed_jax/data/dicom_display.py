"""Turns the stored values of a DICOM frame into 8 bits, as the standard asks of a display.

Its greyscale pipeline (PS3.3) is:

Stored values -> modality rescale or table (C.11.1) -> VOI table or window (C.11.2) -> inversion of
MONOCHROME1. Rescale and window lie at the file's root, or in the functional groups of enhanced
files: those of the frame come before those that all frames share (C.7.6.16).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from unimed_jax.data.pixels import between, bounds, by_depth, eight_bits, in_blocks

Values = Callable[[np.ndarray], np.ndarray]  # rows [h, W] -> float64 of the same shape
_COLOURS = ("Red", "Green", "Blue")
# centre and width in Hounsfield units, as radiologists set them for CT
WINDOWS = {
    "abdomen": (50.0, 400.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "liver": (30.0, 150.0),
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
    "spine": (50.0, 250.0),
    "stroke": (40.0, 40.0),
    "subdural": (75.0, 215.0),
}


def brightness(
    stored: np.ndarray, data, inverted: bool, window: tuple[float, float] | None = None
) -> np.ndarray:
    """Maps stored grey values [H, W] to uint8 by the file's rescale and first VOI table or window.

    window: (centre, width) of a linear one in place of the file's. A window or rescale without a
    meaning (a width of 0, a slope of 0 or beyond all numbers) counts as absent. Without a window,
    unscaled values of at most eight bits stay as they are, and others span their range. Padding
    (C.7.5.1.1.2) is then black and widens no range. inverted: low values are white (MONOCHROME1).
    """
    real, signed = stored.dtype.kind == "f", stored.dtype.kind == "i"
    bits = 8 * stored.dtype.itemsize if real else int(data.BitsStored)
    lowest = -(2.0 ** (bits - 1)) if signed else 0.0
    modality, scaled, lowest = _modality(stored, data, lowest)
    values = modality or _as_float
    view = _view(data, lowest) if modality else None
    if window:
        view = functools.partial(_window, centre=window[0], width=window[1], function="LINEAR")
    if view:
        return in_blocks(_turned(_after(values, view), inverted), stored)
    if bits <= 8 and not (signed or scaled or real):
        return in_blocks(_turned(lambda rows: rows / (2**bits - 1), inverted), stored)
    padding = _padding(data, stored.dtype, bits)

    def counted(rows: np.ndarray) -> np.ndarray:
        return np.where(padding(rows), np.nan, values(rows))

    found = bounds(stored, counted)
    if found is None:
        return np.zeros(stored.shape, np.uint8)
    low, high = found
    spread = _turned(
        lambda rows: between(values(rows), low, high) if high > low else np.zeros(rows.shape), inverted
    )
    return in_blocks(lambda rows: np.where(padding(rows), np.uint8(0), spread(rows)), stored)


def coloured(stored: np.ndarray, data, little: bool) -> np.ndarray:
    """Maps indices [H, W] by the file's palette (C.7.6.3.1.5, C.7.9) to uint8 [H, W, 3].

    The depth of the palette says which value is white.
    """
    tables = [_palette(data, colour, little) for colour in _COLOURS]
    return in_blocks(
        lambda rows: np.stack([eight_bits(table(_as_float(rows))) for table in tables], axis=-1), stored
    )


def rgb(stored: np.ndarray, bits: int, ybr: bool) -> np.ndarray:
    """Scales RGB or YBR_FULL (C.7.6.3.1.2) of `bits` bits, [H, W, 3], to RGB uint8 by its depth."""
    if not ybr:
        return by_depth(stored, bits)
    middle, top = 2 ** (bits - 1), 2**bits - 1
    matrix = np.array(
        [[1, 1, 1], [0, -0.114 * 1.772 / 0.587, 1.772], [1.402, -0.299 * 1.402 / 0.587, 0]], np.float32
    )

    def changed(rows: np.ndarray) -> np.ndarray:
        centred = rows.astype(np.float32) - np.array([0, middle, middle], np.float32)
        return eight_bits(np.clip(np.floor(centred @ matrix + 0.5), 0, top) / top)

    return in_blocks(changed, stored)


def _as_float(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.float64)


def _after(first: Values, second: Values) -> Values:
    return lambda rows: second(first(rows))


def _turned(white: Values, inverted: bool) -> Values:
    """Makes a function that gives uint8 of one that gives brightness 0..1.

    inverted: brightness 1 becomes black.
    """
    return lambda rows: eight_bits(1 - white(rows) if inverted else white(rows))


# --------------------------------------------------------------------------------------------------
# Where a file keeps what it says of a frame
# --------------------------------------------------------------------------------------------------


def _places(data, group: str) -> list[Any]:
    """Lists where an attribute of the first frame may lie.

    These are the frame's functional group, the group that all frames share, and the file itself.
    """
    places: list[Any] = []
    for sequence in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for item in (data.get(sequence) or [])[:1]:
            places += (item.get(group) or [])[:1]
    return [*places, data]


def _numbers(place, keyword: str) -> list[float | None]:
    """Reads the values of an attribute, with None for each that is empty or not a finite number."""
    value = place.get(keyword)
    several = value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
    numbers = [None if one is None or one == "" else float(one) for one in several]
    return [one if one is not None and np.isfinite(one) else None for one in numbers]


def _number(place, keyword: str) -> float | None:
    return (_numbers(place, keyword) or [None])[0]


# --------------------------------------------------------------------------------------------------
# Modality and VOI
# --------------------------------------------------------------------------------------------------


def hounsfield(data) -> bool:
    """Says whether a file's values are Hounsfield units once they are rescaled (C.11.1.1.2).

    They are in CT, if the file gives a rescale whose type is HU or, as in most files, not named.
    """
    table = _first_table(data, "ModalityLUTSequence")
    if str(data.get("Modality")).strip().upper() != "CT" or table is not None:
        return False
    for place in _places(data, "PixelValueTransformationSequence"):
        slope, intercept = _number(place, "RescaleSlope"), _number(place, "RescaleIntercept")
        if (slope, intercept) != (None, None):
            kind = str(place.get("RescaleType") or "HU").strip().upper()
            return kind in ("HU", "HU_MOD") and slope != 0
    return False


def _modality(stored: np.ndarray, data, lowest: float) -> tuple[Values | None, bool, float]:
    """Finds what turns stored values into those of the modality (C.11.1).

    lowest: what a stored value can be. Returns the function, whether it changes anything, and the
    lowest value that it can give. The function is None for a rescale that has no meaning: its
    windows have none either.
    """
    little = bool(data.original_encoding[1])
    item = _first_table(data, "ModalityLUTSequence")
    if item is not None:
        table = _table(item, little, lowest)
        return lambda rows: table.entry(_as_float(rows)), True, 0.0
    slope, intercept = 1.0, 0.0
    for place in _places(data, "PixelValueTransformationSequence"):
        found = [place.get(keyword) for keyword in ("RescaleSlope", "RescaleIntercept")]
        if any(value is not None and value != "" for value in found):
            given = _number(place, "RescaleSlope"), _number(place, "RescaleIntercept")
            if any(
                one is None and value not in (None, "") for one, value in zip(given, found, strict=True)
            ):
                return None, False, lowest  # NaN or infinite
            slope, intercept = (1.0 if given[0] is None else given[0]), given[1] or 0.0
            break
    ends = bounds(stored, _as_float)
    if ends is None:
        return _as_float, False, lowest
    with np.errstate(over="ignore", under="ignore"):
        low, high = (np.float64(end) * slope + intercept for end in ends)
    if not np.isfinite([low, high]).all() or (low == high and ends[0] != ends[1]):
        return None, False, lowest
    unchanged = slope == 1 and intercept == 0
    reached = min(lowest * slope + intercept, float(low), float(high))
    return lambda rows: _as_float(rows) * slope + intercept, not unchanged, reached


def _view(data, lowest: float) -> Values | None:
    """Finds the first VOI table or window (C.11.2), as a function to brightness 0..1.

    Returns None if there is none. lowest: what a value of the modality can be.
    """
    for place in _places(data, "FrameVOILUTSequence"):
        item = _first_table(place, "VOILUTSequence")
        if item is not None:
            return _table(item, bool(data.original_encoding[1]), lowest)
        function = str(place.get("VOILUTFunction")).strip().upper()
        for centre, width in zip(
            _numbers(place, "WindowCenter"), _numbers(place, "WindowWidth"), strict=False
        ):
            if centre is not None and width is not None and width > 0:
                return functools.partial(_window, centre=centre, width=width, function=function)
    return None


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Maps values to 0..1 by a window (C.11.2.1.2, C.11.2.1.3).

    A function that the standard does not know is linear, and a linear one below width 1 is exact.
    """
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT" or width < 1:
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _padding(data, dtype: np.dtype, bits: int) -> Values:
    """Says which stored values are padding.

    They are those from PixelPaddingValue to PixelPaddingRangeLimit, both included. Where the file
    writes them unsigned beside signed pixels, or the reverse, their bits count.
    """
    kind = {4: "Float", 8: "DoubleFloat"}.get(dtype.itemsize, "") if dtype.kind == "f" else ""
    value = _number(data, f"{kind}PixelPaddingValue")
    limit = _number(data, f"{kind}PixelPaddingRangeLimit")
    if value is None:
        return lambda rows: np.zeros(rows.shape, bool)
    ends = [value, value if limit is None else limit]
    if dtype.kind == "f":
        ends = [float(dtype.type(end)) for end in ends]
    else:
        wrapped = [int(end) % 2**bits for end in ends]
        ends = [
            end - 2**bits if dtype.kind == "i" and end >= 2 ** (bits - 1) else end for end in wrapped
        ]
    low, high = min(ends), max(ends)
    return lambda rows: (rows >= low) & (rows <= high)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Table:
    """Maps values to the entries of a lookup table.

    Values before its first input take the first entry, and those after its last input the last one.
    """

    entries: np.ndarray  # float64 [n]
    first: float  # the input of the first entry
    depth: int  # bits of an entry

    def entry(self, values: np.ndarray) -> np.ndarray:
        place = np.clip(
            np.round(np.nan_to_num(values, nan=self.first)) - self.first, 0, len(self.entries) - 1
        )
        return self.entries[place.astype(np.int64)]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Returns the table's entries for the values as brightness 0..1.

        White is the greatest value that the table's depth allows.
        """
        return np.clip(self.entry(values) / (2**self.depth - 1), 0, 1)


def _first_table(place, sequence: str):
    """Returns the first item of a sequence of tables, or None if it says nothing of a table."""
    for item in (place.get(sequence) or [])[:1]:
        if item.get("LUTDescriptor") is not None or item.get("LUTData") is not None:
            return item
    return None


def _table(item, little: bool, lowest: float) -> _Table:
    """Reads a modality or VOI table, whose inputs are negative only if `lowest` is."""
    count, first, depth = _descriptor(item.get("LUTDescriptor"), lowest < 0)
    return _Table(_entries(item.get("LUTData"), count, little), first, depth)


def _palette(data, colour: str, little: bool) -> _Table:
    table = f"{colour}PaletteColorLookupTable"
    count, first, depth = _descriptor(data.get(f"{table}Descriptor"), data.PixelRepresentation == 1)
    plain, segments = data.get(f"{table}Data"), data.get(f"Segmented{table}Data")
    if plain is not None or segments is None:
        return _Table(_entries(plain, count, little), first, depth)
    words = (
        _words(segments, len(segments) if depth <= 8 else len(segments) // 2, little)
        .astype(int)
        .tolist()
    )
    entries: list[int] = []
    _expand(words, 0, len(words), entries, count, depth <= 8)
    if not entries:
        raise ValueError(f"the {colour.lower()} palette has no entries")
    return _Table(np.array(entries[:count], np.float64), first, depth)


def _descriptor(values, signed: bool) -> tuple[int, int, int]:
    """Reads count, first input and depth of a table.

    The count 0 means 65536, because the count has 16 bits. The first input is signed if the inputs
    are (C.11.1.1.1, C.11.2.1.1), whatever the type that it is written in.
    """
    if values is None or not hasattr(values, "__len__") or len(values) != 3:
        raise ValueError("a lookup table without a descriptor of three numbers")
    count, first, depth = (int(value) for value in values)
    first &= 0xFFFF
    if signed and first >= 1 << 15:
        first -= 1 << 16
    if not 1 <= depth <= 16:
        raise ValueError(f"a lookup table with entries of {depth} bits")
    return count & 0xFFFF or 1 << 16, first, depth


def _entries(data, count: int, little: bool) -> np.ndarray:
    """Returns the entries of a table as float64 [n].

    They are words, or bytes where the table has one byte for each entry.
    """
    if isinstance(data, bytes):
        return _words(data, count, little)
    entries = np.atleast_1d(np.asarray([] if data is None else data, np.int64))[:count] & 0xFFFF
    if not len(entries):
        raise ValueError("a lookup table without entries")
    return entries.astype(np.float64)


def _words(data: bytes, count: int, little: bool) -> np.ndarray:
    """Reads `count` words, or bytes if there are too few for words: two in a word, the low one first."""
    order = "<u2" if little else ">u2"
    if len(data) >= 2 * count:
        entries = np.frombuffer(data, order, count)
    else:
        if not little and len(data) % 2 == 0:
            data = np.frombuffer(data, order).astype("<u2").tobytes()
        entries = np.frombuffer(data, "u1")[:count]
    if not len(entries):
        raise ValueError("a lookup table without entries")
    return entries.astype(np.float64)


def _expand(words: list[int], at: int, segments: int, out: list[int], most: int, eight: bool) -> None:
    """Appends to `out` the entries that the segments of a palette give (C.7.9.2).

    Reading begins at word `at`; at most `most` entries are given.
    """
    for _ in range(segments):
        if at + 1 >= len(words) or len(out) >= most:
            return
        kind, length = words[at], words[at + 1]
        at += 2
        if kind == 0:
            out += words[at : at + length]
            at += length
        elif kind == 1 and out:
            out += np.round(np.linspace(out[-1], words[at], length + 1)[1:]).astype(int).tolist()
            at += 1
        elif kind == 2:
            parts = words[at : at + (4 if eight else 2)]
            place = sum(part << (8 if eight else 16) * i for i, part in enumerate(parts))
            _expand(words, place if eight else place // 2, length, out, most, eight)
            at += len(parts)
        else:
            raise ValueError(f"a palette whose segment is of kind {kind}")
