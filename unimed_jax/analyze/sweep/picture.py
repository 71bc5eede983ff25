"""Draws how far each variant of a sweep is from its baseline, with intervals and single seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"better": "#009E73", "worse": "#D55E00", "undecided": "#555555"}  # of verdicts (Okabe-Ito)
PLAIN = "#0072B2"  # of single columns, which have no verdict
ACROSS = 3  # panels of columns side by side


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Draws the mean change of each variant, and below it the difference of each column."""
    from matplotlib.figure import Figure

    names = [name for name, entry in found["variants"].items() if "columns" in entry]
    labels = [column["label"] for column in found["columns"]]
    one = len({column["set"] for column in found["columns"]}) == 1  # which then need not be named
    rows = -(-len(labels) // ACROSS)
    tall = 0.26 * len(names) + 0.75  # inches of a panel
    figure = Figure(
        figsize=(10.5, tall * (rows + 1.25) + 0.5), dpi=130, facecolor="white", layout="constrained"
    )
    grid = figure.add_gridspec(rows + 1, ACROSS, height_ratios=[1.25, *[1] * rows])
    axes = figure.add_subplot(grid[0, :])
    _panel(axes, names, [found["variants"][name].get("change") for name in names], wide=True)
    axes.set_title(
        f"{found['name']}: mean change against {found['baseline']}, %, 95 % interval "
        "(dots: single seeds; filled: decided)", fontsize=10
    )  # fmt: skip
    for i, label in enumerate(labels):
        axes = figure.add_subplot(grid[1 + i // ACROSS, i % ACROSS])
        entries = [found["variants"][name]["columns"][label] for name in names]
        _panel(axes, names, entries, named=i % ACROSS == 0)
        axes.set_title(label.partition(" ")[2] if one else label, fontsize=9)
    figure.savefig(path, format="png")


def _panel(
    axes, names: Sequence[str], entries: Sequence[Mapping | None], named: bool = True, wide: bool = False
) -> None:
    """Draws one difference a row."""
    axes.axvline(0, color="black", linewidth=0.8)
    for at, entry in enumerate(entries):
        if entry is None:
            continue
        verdict = entry.get("verdict", "")
        colour = COLOURS.get(verdict, PLAIN)
        if entry["ci95"] is not None:
            axes.plot(entry["ci95"], [at, at], color=colour, linewidth=2, solid_capstyle="butt")
        seeds = entry.get("seeds", [])
        axes.plot(seeds, [at + 0.28] * len(seeds), ".", color="0.6", markersize=4)
        filled = verdict in ("better", "worse")
        axes.plot(entry["value"], at, "o", color=colour, markersize=5.5,
                  markerfacecolor=colour if filled else "white")  # fmt: skip
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names if named else [""] * len(names), fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=9 if wide else 5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
