"""Writes what analyze/tug_of_war.py measured: numbers, a page and a picture."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import files, processes
from unimed_jax.evaluate.report.markdown import markdown_table

NAMES = ("tug_of_war.md", "tug_of_war.png", "tug_of_war.json")
BARS = 24  # groups of parameters whose conflicts the picture shows


def write(folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Writes tug_of_war.md, .png and .json for one or more runs into a folder."""
    if not processes.leads():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with files.written_together(folder, NAMES) as unfinished:
        files.write_text(unfinished / NAMES[0], page(runs))
        draw(unfinished / NAMES[1], runs)
        files.write_json(unfinished / NAMES[2], {"runs": list(runs)})
    print(page(runs))
    print(f"wrote {', '.join(str(folder / name) for name in NAMES)}")


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Writes the tables: a row for each run and group of parameters, then the pairs of tasks."""
    rows, pairs = [], []
    for run in runs:
        units = run["units"]
        for group, values in units["groups"].items():
            entropy, ratio = values["spectral_entropy"], values["dominant_eigenvalue_ratio"]
            off = _off_diagonal(values["cos"])
            rows.append(
                [
                    _label(run), group, f"{np.mean(off):+.3f}", f"{np.min(off):+.3f}",
                    _share(values["conflicts"]), f"{values['conflicts_of_single_batches']:.0%}",
                    f"{np.mean(_off_diagonal(values['magnitude'])):.3f}",
                    _with_interval(entropy), _with_interval(ratio),
                ]
            )  # fmt: skip
        group, values = next(iter(units["groups"].items()))
        for i, j in combinations(range(len(units["names"])), 2):
            ci = values["ci"]["cos"]
            pairs.append(
                [
                    _label(run), group, f"{units['names'][i]} - {units['names'][j]}",
                    f"{values['cos'][i][j]:+.3f}" + (f" {_bracket(ci[i][j])}" if ci else ""),
                    f"{values['magnitude'][i][j]:.3f}",
                ]
            )  # fmt: skip
    header = [
        "run", "parameters", "mean cosine", "smallest", "pairs in conflict", "of single batches",
        "mean magnitude similarity", "spectral entropy", "dominant eigenvalue ratio",
    ]  # fmt: skip
    return (
        "# Tug-of-war between tasks\n\n"
        "Direction similarity is the cosine of two tasks' gradients, magnitude similarity is "
        "2 |a| |b| / (|a|^2 + |b|^2) (arXiv 2001.06782); a pair is in conflict if its cosine is "
        f"negative. Held-out split {runs[0]['split']!r}; 95 % intervals over batches.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"{markdown_table(['run', 'parameters', 'pair', 'cosine', 'magnitude similarity'], pairs)}\n"
    )


def draw(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Draws both similarities of each run, and where its conflicts lie."""
    from matplotlib.figure import Figure

    count = max(len(run["units"]["names"]) for run in runs)
    side = max(3.2, 0.55 * count + 1.4)
    figure = Figure(figsize=(2 * side + 5.2, side * len(runs) + 0.6), dpi=120, layout="constrained")
    figure.suptitle("Tug-of-war: gradients of tasks at the same parameters (held-out data)")
    axes = figure.subplots(len(runs), 3, squeeze=False, width_ratios=(1, 1, 0.9))
    for (first, second, third), run in zip(axes, runs, strict=True):
        units = run["units"]
        group, values = next(iter(units["groups"].items()))
        heat(first, np.array(values["cos"]), units["names"], "RdBu", -1)
        first.set_title(f"{_label(run)}\n{group}: direction (cosine)", fontsize=9)
        heat(second, np.array(values["magnitude"]), units["names"], "Blues", 0)
        second.set_title(f"{group}: magnitude similarity", fontsize=9)
        bars(third, units["groups"])
    figure.savefig(path, format="png")


def heat(axes, values: np.ndarray, names: Sequence[str], colours: str, low: float) -> None:
    """Draws a matrix with its numbers."""
    axes.imshow(values, cmap=colours, vmin=low, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(ticks, names, fontsize=7)
    for i in ticks:
        for j in ticks:
            dark = abs(values[i, j]) > 0.6
            axes.text(
                j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6.5,
                color="white" if dark else "black",
            )  # fmt: skip


def bars(axes, groups: Mapping[str, Any]) -> None:
    """Draws the share of pairs in conflict for each group of parameters, with its interval."""
    shown = list(groups.items())[:BARS]
    places = np.arange(len(shown))[::-1]
    for place, (_, values) in zip(places, shown, strict=True):
        share = values["conflicts"]
        axes.barh(place, share["value"], color="#E69F00", height=0.7)
        if share["ci95"] is not None:
            axes.plot(share["ci95"], [place, place], color="black", linewidth=1)
        axes.plot(values["conflicts_of_single_batches"], place, "D", color="#56B4E9", markersize=3.5)
    axes.set_yticks(places, [name for name, _ in shown], fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of pairs in conflict (diamond: of single batches)", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)


def _off_diagonal(matrix: Sequence[Sequence[float]]) -> np.ndarray:
    values = np.array(matrix)
    return values[np.triu_indices(len(values), 1)]


def _label(run: Mapping[str, Any]) -> str:
    return f"{Path(run['run']).name} ({run['connector']}, step {run['step']})"


def _bracket(ci: Sequence[float] | None) -> str:
    return f"[{ci[0]:+.3f}, {ci[1]:+.3f}]" if ci else ""


def _with_interval(score: Mapping[str, Any]) -> str:
    ci = score["ci95"]
    return f"{score['value']:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")


def _share(score: Mapping[str, Any]) -> str:
    ci = score["ci95"]
    return f"{score['value']:.0%}" + (f" [{ci[0]:.0%}, {ci[1]:.0%}]" if ci else "")
