"""Draws the parts that the pictures of several analyses share, and writes an analysis's files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import files, processes
from unimed_jax.evaluate.report import link_pages
from unimed_jax.provenance import code_version, plain
from unimed_jax.runs.open import Run

# Okabe-Ito colours: apart for every kind of colour vision.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#000000", "#B2A300")


def about(run: Run, split: str) -> dict[str, Any]:
    """Says which run was looked at, on which split and by which code."""
    connector = run.config.model.connector
    return {
        "run": str(run.folder),
        "step": run.step,
        "connector": connector.kind,
        "router": connector.router if connector.is_moe else None,
        "split": split,
        "seed": run.config.seed,
        "resamples": run.config.evaluate.bootstrap,
        "code_version": code_version(),
        "notes": list(run.notes),
    }


def said_about(content: Mapping[str, Any]) -> str:
    """Writes the first line of an analysis's page: the run, its step and the split."""
    connector = " with a ".join(filter(None, (content["connector"], content["router"])))
    router = " router" if content["router"] else ""
    return (
        f"Run `{content['run']}`, step {content['step']}, connector {connector}{router}; split "
        f"{content['split']!r}. Brackets are 95 % intervals from resampled clusters."
    )


def write(
    folder: Path, name: str, content: Mapping[str, Any], page: str, draw: Callable[[Path], None]
) -> None:
    """Writes NAME.md, NAME.png and NAME.json into a folder together, and prints the page."""
    if not processes.leads():
        return
    names = (f"{name}.md", f"{name}.png", f"{name}.json")
    folder.mkdir(parents=True, exist_ok=True)
    with files.written_together(folder, names) as place:
        notes = "".join(f"\nNote: {note}\n" for note in content["notes"])
        files.write_text(place / names[0], page + notes)
        draw(place / names[1])
        files.write_json(place / names[2], plain(content))
    link_pages(folder)
    print(page + notes)
    print(f"wrote {', '.join(str(folder / each) for each in names)}", flush=True)


def heat(
    axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: str,
    ends: tuple[float, float],
    texts: Sequence[Sequence[str]] | None = None,
) -> None:
    """Draws a matrix [rows, columns] as coloured cells with their numbers, or with `texts`."""
    low, high = ends
    shown = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    for i in range(len(rows)):
        for j in range(len(columns)):
            red, green, blue, _ = shown.cmap(shown.norm(values[i, j]))
            bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 or not np.isfinite(values[i, j])
            axes.text(
                j,
                i,
                texts[i][j] if texts is not None else _number(values[i, j]),
                ha="center",
                va="center",
                fontsize=7.5,
                linespacing=1.3,
                color="black" if bright else "white",
            )


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "-"


def dots(
    axes,
    groups: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]] | None]],
    columns: Sequence[str],
    level: float | None = None,
) -> None:
    """Draws values with intervals side by side: name of a group -> (values, [low, high] of each).

    columns: the names of the values; level: a dotted line to compare with.
    """
    width = 0.75 / max(len(groups), 1)
    for number, (name, (values, ci95)) in enumerate(groups.items()):
        places = np.arange(len(columns)) + (number - (len(groups) - 1) / 2) * width
        middle = np.array(values, np.float64)
        ends = np.stack([middle, middle], axis=1) if ci95 is None else np.array(ci95, np.float64)
        axes.errorbar(
            places,
            middle,
            yerr=np.abs(ends.T - middle),
            fmt="os^Dvph*"[number % 8],
            markersize=4.5,
            linewidth=1.4,
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
    if level is not None:
        axes.axhline(level, color="grey", linewidth=0.9, linestyle=":")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.tick_params(labelsize=8)
    for edge in np.arange(len(columns) - 1) + 0.5:
        axes.axvline(edge, color="#DDDDDD", linewidth=0.8)
    axes.set_xlim(-0.5, len(columns) - 0.5)
