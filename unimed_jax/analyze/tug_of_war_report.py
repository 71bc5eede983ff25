"""Writes what tug_of_war.py measured: the numbers, the text of a page and its picture."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.analyze.conflict import INDICES, WITHOUT_NOISE, Measured, difference
from unimed_jax.analyze.drawing import heat
from unimed_jax.analyze.tug_of_war import Analysis
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.provenance import code_version
from unimed_jax.verdicts import number, with_interval

BARS = 24  # groups of parameters that the picture shows
TITLES = {
    "mean_cos": "mean cosine",
    WITHOUT_NOISE: "mean cosine without noise",
    "conflicts": "share of pairs in conflict",
    "mean_magnitude": "mean magnitude similarity",
    "spectral_entropy": "spectral entropy, nats",
    "dominant_eigenvalue_ratio": "dominant eigenvalue ratio",
}
assert TITLES.keys() == INDICES.keys()
KINDS = {"units": "each task of each set", "tasks": "by task", "sets": "by data set"}
PLANTED = "Planted: a task beside copies of itself"


def content(runs: Sequence[Analysis]) -> dict[str, Any]:
    """Returns what tug_of_war.json holds: each run's matrices, and how the others differ from run 0."""
    return {
        "schema": 1,
        "code_version": code_version(),
        "notes": list(dict.fromkeys(note for run in runs for note in run.about["notes"])),
        "runs": [run.plain() for run in runs],
        "differences": [
            {"run": number, "less": 0, "group": runs[0].leading[0], **found}
            for number, found in differences(runs)
        ],
    }


def differences(runs: Sequence[Analysis]) -> list[tuple[int, dict[str, Any]]]:
    """Compares each later run with the first one where both were measured on the same batches."""
    group, first = runs[0].leading
    found = []
    for number_, run in enumerate(runs[1:], 1):
        other = run.kinds["units"].get(group)
        same = run.about["batches"] == runs[0].about["batches"]
        if other is None or not same or other.names != first.names or not first.compares:
            continue
        found.append((number_, {name: difference(first, other, name) for name in INDICES}))
    return found


# ---- the page --------------------------------------------------------------------------------------
def page(runs: Sequence[Analysis]) -> str:
    """Writes the tables: indices of each run and group of parameters, then each pair of tasks."""
    labels = labels_of(runs)
    parts = [
        "# Tug-of-war between tasks",
        "Gradients of each task's mean loss on held-out batches, at the same parameters and without "
        "dropout. Direction similarity is the cosine of two of them; a pair is in conflict if it is "
        "negative. Magnitude similarity is 2 |a| |b| / (|a|^2 + |b|^2). Intervals: 95 %, over batches.",
        *[_about(label, run) for label, run in zip(labels, runs, strict=True)],
    ]
    head = ("run", "parameters", *TITLES.values(), "of single batches")
    for kind in KINDS:
        rows = [
            (label, group, *_cells(measured))
            for label, run in zip(labels, runs, strict=True)
            for group, measured in run.kinds.get(kind, {}).items()
            if measured.compares
        ]
        if rows:
            parts.append(f"## Conflict, {KINDS[kind]}\n\n{markdown_table(head, rows)}")
    if changed := differences(runs):
        rows = [
            (labels[i], *(with_interval(found[name], "+") for name in TITLES)) for i, found in changed
        ]
        parts.append(
            f"## Next to {labels[0]}\n\nThe run's index at {runs[0].leading[0]} less that of "
            f"{labels[0]}, from the same draws of the same batches.\n\n"
            f"{markdown_table(('run', *TITLES.values()), rows)}"
        )
    head = ("run", "parameters", "pair", "cosine", "without noise", "magnitude similarity")
    for kind, title in (("units", "Pairs of tasks"), ("planted", PLANTED)):
        rows = [
            (label, run.leading[0], *line)
            for label, run in zip(labels, runs, strict=True)
            if kind in run.kinds
            for line in _pairs(run.kinds[kind][run.leading[0]])
        ]
        if rows:
            parts.append(f"## {title}\n\n{markdown_table(head, rows)}")
    return "\n\n".join([*parts, "![Tug-of-war](tug_of_war.png)"]) + "\n"


def _about(label: str, run: Analysis) -> str:
    group, measured = run.leading
    counts = ", ".join(
        f"{name} {count} of {run.about['clusters'][name]}"
        for name, count in run.about["examples"].items()
    )
    away = f" No gradient at {group}: {', '.join(measured.absent)}." if measured.absent else ""
    signal = measured.plain()["signal"]
    least = min((value for value in signal if value is not None), default=None)
    noise = (  # an estimate, which falls below 0 where noise is all
        f" Of a mean gradient's squared length at least {max(least, 0.0):.0%} is not noise of batches."
        if least is not None
        else ""
    )
    return (
        f"- {label}: {measured.batches} batches a task of split {run.about['split']!r}; examples and "
        f"the clusters (such as patients) that they come from: {counts}.{away}{noise}"
    )


def _cells(measured: Measured) -> list[str]:
    plain = measured.plain()
    single = plain["conflicts_of_single_batches"]
    cells = {name: with_interval(plain["indices"][name]) for name in TITLES}
    known, every = plain["indices"][WITHOUT_NOISE]["pairs"]
    if known < every:
        cells[WITHOUT_NOISE] += f" ({known} of {every} pairs)"
    return [*cells.values(), number(single)]


def _pairs(measured: Measured) -> list[tuple[str, ...]]:
    plain = measured.plain()
    found: list[tuple[str, ...]] = []
    for i, j in combinations(range(len(measured.names)), 2):
        values = [
            with_interval(
                {"value": plain[key][i][j], "ci95": plain["ci"][key] and plain["ci"][key][i][j]}, sign
            )
            for key, sign in (("cos", "+"), ("magnitude", ""))
        ]
        clean = number(plain["cos_without_noise"][i][j], "+")
        found.append((f"{measured.names[i]} - {measured.names[j]}", values[0], clean, values[1]))
    return found


def labels_of(runs: Sequence[Analysis]) -> list[str]:
    """Names each run by its folder, connector and step, with as much of the path as tells them apart."""
    folders = [Path(run.about["run"]).parts for run in runs]
    for length in range(1, max(map(len, folders)) + 1):
        names = ["/".join(parts[-length:]) for parts in folders]
        if len(set(names)) == len(set(folders)):
            break
    return [
        f"{name} ({run.about['connector']}"
        + (f", {run.about['router']} router" if run.about["router"] else "")
        + f", step {run.about['step']})"
        for name, run in zip(names, runs, strict=True)
    ]


# ---- the picture -----------------------------------------------------------------------------------
def draw(path: Path, runs: Sequence[Analysis]) -> None:
    """Draws both similarities of each run and where its conflicts lie; then all runs' indices."""
    from matplotlib.figure import Figure

    labels = labels_of(runs)
    rows: list[tuple[str, Analysis, str]] = []
    for label, run in zip(labels, runs, strict=True):
        rows.append((label, run, "units"))
        if "planted" in run.kinds:
            rows.append((f"{label}. {PLANTED}", run, "planted"))
    count = max(len(run.leading[1].names) for run in runs)
    bars = max(min(len(_shown(run)), BARS) for run in runs)
    side = max(3.0, 0.42 * count + 1.5)
    tall = max(side, 0.2 * bars + 1.4) + 0.25
    below = 0.32 * len(runs) + 1.3 if len(runs) > 1 else 0.0
    heights = [tall] * len(rows) + ([below] if below else [])
    figure = Figure(figsize=(2 * side + 4.6, sum(heights) + 0.5), dpi=120, layout="constrained")
    figure.suptitle("Tug-of-war: gradients of tasks at the same parameters, on held-out data")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, run, kind) in zip(parts, rows, strict=False):
        part.suptitle(title, fontsize=10, weight="bold")
        first, second, third = part.subplots(1, 3, width_ratios=(1, 1, 0.8))
        group = run.leading[0]
        measured = run.kinds[kind][group]
        _matrix(first, measured.cos, measured.names, "RdBu", -1)
        first.set_title(f"{group}: direction (cosine)", fontsize=9)
        _matrix(second, measured.magnitude, measured.names, "Blues", 0)
        second.set_title(f"{group}: magnitude similarity", fontsize=9)
        if kind == "units":
            _bars(third, run)
        else:
            third.axis("off")
    if below:
        _indices(parts[-1], labels, runs)
    figure.savefig(path, format="png")


def _matrix(axes, values: np.ndarray, names: Sequence[str], colours: str, low: float) -> None:
    """Draws a matrix with its numbers, square."""
    heat(axes, values, names, names, colours, (low, 1))
    axes.set_aspect("equal")
    for text in axes.get_xticklabels():
        text.set(rotation=45, ha="right", rotation_mode="anchor")


def _shown(run: Analysis) -> list[tuple[str, Measured]]:
    """Lists the groups of parameters in which something is compared."""
    return [(name, measured) for name, measured in run.kinds["units"].items() if measured.compares]


def _bars(axes, run: Analysis) -> None:
    """Draws the share of pairs in conflict for each group of parameters, with its interval."""
    shown, left = _shown(run)[:BARS], len(_shown(run)[BARS:])
    places = np.arange(len(shown))[::-1]
    for place, (_, measured) in zip(places, shown, strict=True):
        plain = measured.plain()
        share = plain["indices"]["conflicts"]
        axes.barh(place, share["value"], color="#E69F00", height=0.7)
        if share["ci95"] is not None:
            axes.plot(share["ci95"], [place, place], color="black", linewidth=1)
        single = plain["conflicts_of_single_batches"]
        axes.plot(single, place, "D", color="#0072B2", markersize=3.5, clip_on=False)
    axes.set_yticks(places, [name for name, _ in shown], fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_ylim(min(0, len(shown) - 6) - 0.6, len(shown) - 0.4)
    axes.set_title("share of pairs in conflict", fontsize=9)
    more = f"\n{left} more groups: tug_of_war.json" if left else ""
    axes.set_xlabel(f"bar: mean gradients, line: 95 %\ndiamond: single batches{more}", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)


def _indices(part, labels: Sequence[str], runs: Sequence[Analysis]) -> None:
    """Draws the indices of all runs below each other, with intervals.

    They are those of the first run's leading group; a run that lacks it has an empty line.
    """
    group = runs[0].leading[0]
    part.suptitle(f"All runs, at {group}", fontsize=10, weight="bold")
    all_axes = part.subplots(1, len(TITLES), sharey=True)
    places = np.arange(len(runs))[::-1]
    for axes, (name, title) in zip(all_axes, TITLES.items(), strict=True):
        for place, run in zip(places, runs, strict=True):
            measured = run.kinds["units"].get(group)
            entry: Mapping[str, Any] = measured.plain()["indices"].get(name, {}) if measured else {}
            if entry.get("value") is None:
                continue
            if entry["ci95"] is not None:
                axes.plot(entry["ci95"], [place, place], color="black", linewidth=1.2)
            axes.plot(entry["value"], place, "o", color="#0072B2", markersize=5)
        if name.startswith("mean_cos"):
            axes.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(title.replace(" without", "\nwithout").replace(", ", ",\n"), fontsize=8)
        if name == "conflicts":
            axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.5, len(runs) - 0.5)
        axes.tick_params(axis="x", labelsize=7)
    all_axes[0].set_yticks(places, labels, fontsize=7)
