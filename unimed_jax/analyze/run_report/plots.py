"""Draws figures as SVG inside the page: curves, intervals, and values on one axis.

Colours come from the page's style sheet by class, so that they follow light and dark.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unimed_jax.analyze.run_report.markup import Markup, joined, tag

POINTS = 48  # of a curve; more are averaged
_WIDTH, _HEIGHT = 300, 150  # of a curve's figure, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 20


class Series(NamedTuple):
    """Holds one curve: of which run it is, and its points."""

    number: int  # of the run, from 0
    label: str
    steps: np.ndarray
    values: np.ndarray


def curve(title: str, series: Sequence[Series]) -> Markup:
    """Draws the curves of one logged value; a point's step and value show under the pointer."""
    shown = [one._replace(steps=_binned(one.steps), values=_binned(one.values)) for one in series]
    values = np.concatenate([one.values for one in shown])
    low, high = float(values.min()), float(values.max())
    low = 0.0 if 0 <= low < high / 2 else low
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    last = max(float(one.steps[-1]) for one in shown)
    first = min(float(one.steps[0]) for one in shown)

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [
        joined(
            (
                tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(tick), y2=y(tick), class_="grid"),
                tag("text", short(tick), x=_LEFT - 5, y=y(tick) + 3.5, text_anchor="end"),
            )
        )
        for tick in ticks
    ]
    parts += [
        tag("text", f"step {int(first)}", x=_LEFT, y=_HEIGHT - 5),
        tag("text", str(int(last)), x=_WIDTH - _RIGHT, y=_HEIGHT - 5, text_anchor="end"),
    ]
    for one in shown:
        points = [(x(step), y(value)) for step, value in zip(one.steps, one.values, strict=True)]
        line = " ".join(f"{a},{b}" for a, b in points)
        parts.append(tag("polyline", points=line, class_=f"line run{one.number}"))
        parts += [
            tag(
                "circle",
                tag("title", f"{one.label}step {int(step)}: {short(value)}"),
                cx=a,
                cy=b,
                r=4,
                class_=f"point run{one.number}",
            )
            for (a, b), step, value in zip(points, one.steps, one.values, strict=True)
        ]
    said = "; ".join(
        f"{one.label}from {short(one.values[0])} to {short(one.values[-1])}" for one in shown
    )
    drawing = tag(
        "svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{title}: {said}"
    )
    return tag("figure", tag("figcaption", title), drawing, class_="curve")


def _binned(values: np.ndarray) -> np.ndarray:
    """Averages neighbours, so that at most POINTS remain."""
    if len(values) <= POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, POINTS)])


def _ticks(low: float, high: float) -> list[float]:
    """Returns about three round numbers that the axis names."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(
        factor for factor in (5, 2.5, 2, 1) if factor * step <= (high - low) / 2 * 1.0001 or factor == 1
    )
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(value: float) -> str:
    """Writes a number with three digits that matter."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


class Mark(NamedTuple):
    """Holds one value on an axis: how it is called, what it is, and how it looks."""

    label: str
    value: float | None
    ends: Sequence[float] | None  # of its 95 % interval
    look: str  # class of the style sheet: run0, blind ...


def axis(marks: Sequence[Mark], most: float = 1.0, least: float = 0.0) -> Markup:
    """Draws values with their intervals below each other on one axis from `least` to `most`."""
    wide, high = 180.0, 12.0
    marks = [mark for mark in marks if mark.value is not None]

    def x(value: float) -> float:
        return round(6 + (min(max(value, least), most) - least) / (most - least) * (wide - 12), 1)

    height = high * max(len(marks), 1) + 6
    parts = [
        tag("line", x1=x(at), x2=x(at), y1=0, y2=height, class_="grid")
        for at in (least, (least + most) / 2, most)
    ]
    for row, mark in enumerate(marks):
        assert mark.value is not None
        y = 3 + high * (row + 0.5)
        if mark.ends is not None:
            parts.append(
                tag("line", x1=x(mark.ends[0]), x2=x(mark.ends[1]), y1=y, y2=y, class_=f"ci {mark.look}")
            )
        middle = x(mark.value)
        sign = (
            tag("rect", x=middle - 3, y=y - 3, width=6, height=6, class_=f"mark {mark.look}",
                transform=f"rotate(45 {middle} {y})")
            if mark.look == "blind"
            else tag("circle", cx=middle, cy=y, r=4, class_=f"mark {mark.look}")
        )  # fmt: skip
        parts += [sign]
        parts.append(
            tag("rect", tag("title", f"{mark.label}: {short(mark.value)}"), x=0, y=y - high / 2,
                width=wide, height=high, class_="point")
        )  # fmt: skip
    said = "; ".join(f"{mark.label} {short(mark.value or 0.0)}" for mark in marks)
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {wide:g} {height:g}",
        class_="axis",
        role="img",
        aria_label=f"from {least:g} to {most:g}: {said}",
    )


def heat(
    head: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    caption: str,
    least: float = 0.0,
    most: float = 1.0,
) -> Markup:
    """Makes a table whose cells are coloured by their numbers; below 0 in another colour."""

    def shown(value: float | None) -> Markup:
        if value is None:
            return tag("td", "-")
        share = abs(value) / max(abs(most), abs(least)) if value < 0 else value / most
        side = "below" if value < 0 else "above"
        style = f"--share:{min(max(share, 0.0), 1.0):.3f}"
        return tag("td", f"{value:.3f}", class_=f"number {side}", style=style)

    body = [tag("tr", tag("th", name, scope="row"), *map(shown, line)) for name, line in rows.items()]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", tag("td", ""), *(tag("th", name, scope="col") for name in head))),
            tag("tbody", *body),
            class_="heat",
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def finite(log: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of one logged key, as far as they are finite numbers."""
    pairs = [
        (line["step"], line[key])
        for line in log
        if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
    ]
    steps, values = np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])
    return steps.astype(np.float64), values.astype(np.float64)
