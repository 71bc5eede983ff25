"""Draws how far the beliefs of a model can be relied on: confidence against accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.verdicts import number

_BAR, _LINE, _COUNT = "#56B4E9", "#D55E00", "#999999"  # Okabe-Ito colours, apart on grey too
_COLUMNS = 3
_SIDE, _BELOW, _GAP, _HEAD, _MARGIN = 2.6, 0.75, 0.75, 1.15, 0.75  # inches


def draw_reliability(path: Path, panels: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Draws a panel for each (title, scores of classes.class_scores).

    Above: the accuracy of the chosen label in each bin of the model's confidence in it, and the mean
    confidence; below: how many questions are in the bin.
    """
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    high = _SIDE + _BELOW + 0.1
    width = max(columns * (_SIDE + _GAP) + _MARGIN, 6.6)
    height = rows * (high + _GAP) + _HEAD
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    figure.text(
        _MARGIN / width,
        1 - 0.25 / height,
        "Confidence and accuracy by likelihood",
        fontsize=12,
        weight="bold",
        va="center",
    )
    figure.text(
        _MARGIN / width,
        1 - 0.52 / height,
        "bars: accuracy; dots: mean confidence (above its bar: too sure); line: perfect calibration",
        fontsize=8.5,
        va="center",
    )
    for i, (title, scores) in enumerate(panels):
        left = _MARGIN + (i % columns) * (_SIDE + _GAP)
        top = height - _HEAD - (i // columns) * (high + _GAP)
        place = left / width, (top - _SIDE) / height, _SIDE / width, _SIDE / height
        upper = figure.add_axes(place)
        lower = figure.add_axes(
            (left / width, (top - high) / height, _SIDE / width, (_BELOW - 0.1) / height)
        )
        _draw_panel(upper, lower, title, scores)
        if i % columns == 0:
            upper.set_ylabel("accuracy", fontsize=9)
            lower.set_ylabel("n", fontsize=9)
    figure.savefig(path)


def _draw_panel(upper: Any, lower: Any, title: str, scores: Mapping[str, Any]) -> None:
    bins = scores["bins"]["sum"]
    edges = np.arange(len(bins)) / len(bins)  # of each bin the lower one
    filled = [one for one in bins if one["n"]]
    at = [edge for edge, one in zip(edges, bins, strict=True) if one["n"]]
    style = {"width": 1 / len(bins), "align": "edge", "edgecolor": "white", "linewidth": 0.6}
    upper.bar(at, [one["accuracy"] for one in filled], color=_BAR, **style)
    upper.plot([0, 1], [0, 1], color="black", linewidth=0.9, linestyle="--")
    middle = [edge + 0.5 / len(bins) for edge in at]
    upper.plot(middle, [one["confidence"] for one in filled], "o", color=_LINE, markersize=3.5)
    error = scores["sum"].get("ece")
    upper.set_title(
        f"{title}\nECE {number(error['value'] if error else None)}, n {scores['n']}",
        fontsize=9,
        parse_math=False,
    )
    upper.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=[])
    lower.bar(edges, [one["n"] for one in bins], color=_COUNT, **style)
    lower.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1])
    lower.set_xlabel("confidence in the chosen label", fontsize=9)
    for axes in (upper, lower):
        axes.tick_params(labelsize=8)
