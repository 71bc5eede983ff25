"""Writes what analyze/compare.py found: numbers, a page and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax import files, processes
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.verdicts import number, with_interval

NAMES = ("compare.md", "compare.png", "compare.json")
MOST_ROWS = 80  # of the picture; beyond them templates are left to the page
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # a run each, in turn
SETTINGS = ("step", "seed", "config_hash")
HEAD = ("task", "metric", "n", "clusters", "first", "run", "its score",
        "difference [95 %]", "p (Holm)", "verdict", "detectable")  # fmt: skip


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Writes compare.md, compare.png and compare.json into a folder, and prints the first table."""
    if not processes.leads():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with files.written_together(folder, NAMES) as place:
        files.write_text(place / NAMES[0], page(found))
        draw(place / NAMES[1], found)
        files.write_json(place / NAMES[2], found)
    processes.say(table(found["tasks"]))
    for note in found["notes"]:
        processes.say(f"note: {note}")
    processes.say(f"wrote {', '.join(str(folder / name) for name in NAMES)}")


def page(found: Mapping[str, Any]) -> str:
    """Writes the page: what is compared, a row for each task and run, then for each template."""
    notes = [f"{run['name']}: {note}" for run in found["runs"] for note in run.get("notes") or ()]
    notes += found["notes"]
    parts = [
        f"# Compared with {found['first']}",
        _runs(found["runs"]),
        f"## Tasks on {found['split']}\n\n{table(found['tasks'])}",
        "A difference is the run minus the first one, on the items that both answered: paired, and "
        f"clustered ({found['resamples']} resamples of the clusters, interval and p-value of Student's "
        "t). An exact score must pass McNemar's exact test too: the larger p-value counts. Verdicts "
        f"are corrected for the number of comparisons in the table (Holm, {100 * found['level']:g} %); "
        "*undecided* says that these items cannot tell, not that the runs are equal. *Detectable* is "
        "the true difference that this comparison would have found four times out of five. A verdict is "
        "about these trained models: another seed of the same settings is another model, and `sweep` "
        "compares settings over seeds.",
    ]
    if found["templates"]:
        parts.append(f"## Question templates on {found['split']}\n\n{table(found['templates'])}")
    if notes:
        parts.append("Notes:\n\n" + "\n".join(f"- {note}." for note in notes))
    return "\n\n".join(parts) + "\n"


def _runs(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            run["name"],
            f"`{run['place']}`",
            *(number(run.get(key)) for key in SETTINGS),
        ]
        for run in runs
    ]
    return markdown_table(("run", "from", "step", "seed", "settings"), rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Makes a table with a row for each comparison; a template without a name is called (none)."""
    if not any(row["template"] for row in rows):
        return markdown_table(("set", *HEAD), [[row["set"], *_cells(row)] for row in rows])
    named = [[row["set"], row["template"] or "(none)", *_cells(row)] for row in rows]
    return markdown_table(("set", "template", *HEAD), named)


def _cells(row: Mapping[str, Any]) -> list[Any]:
    difference = {"value": row["difference"], "ci95": row["ci95"]}
    return [
        *(row[key] for key in ("task", "metric", "n", "clusters")),
        number(row["first"]),
        row["run"],
        number(row["value"]),
        with_interval(difference, "+"),
        chance(row["p_holm"]),
        row["verdict"],
        number(row["detectable"]),
    ]


def chance(p: float | None) -> str:
    """Writes a p-value with two digits, and a tiny one as "<.0001"."""
    return "-" if p is None else "<.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.995 else "1"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Draws each difference with its interval: tasks in bold, their templates below them."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = _lines(found)
    runs = [run["name"] for run in found["runs"][1:]]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(runs)}
    height = 0.17 * sum(len(rows) + 0.3 + 0.6 * bold for _, bold, rows in lines) + 1.2
    figure = Figure(figsize=(8.6, max(3.0, height)), dpi=130, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    at, ticks = 0.0, []
    for label, bold, rows in lines:
        at += 0.9 if bold else 0.3
        ticks.append((at + (len(rows) - 1) / 2, label, bold))
        for row in rows:
            _mark(axes, row, at, colours[row["run"]], bold)
            at += 1
    axes.set_yticks([place for place, *_ in ticks], [label for _, label, _ in ticks])
    for text, (_, _, bold) in zip(axes.get_yticklabels(), ticks, strict=True):
        text.set(fontsize=9 if bold else 8, weight="bold" if bold else "normal",
                 color="black" if bold else "#555555")  # fmt: skip
    axes.set_ylim(at - 0.3, -0.3)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(f"worse  ←  difference from {found['first']}, 95 % interval  →  better", fontsize=9)
    keys = [Line2D([], [], color=colours[name], marker="o", label=name) for name in runs]
    keys += [
        Line2D([], [], color="grey", marker="o", linestyle="none", label="better or worse (Holm)"),
        Line2D([], [], color="grey", marker="o", linestyle="none", markerfacecolor="white",
               label="undecided"),
    ]  # fmt: skip
    figure.legend(handles=keys, loc="outside upper left", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format="png")


def _lines(found: Mapping[str, Any]) -> list[tuple[str, bool, list[Mapping[str, Any]]]]:
    """Lists what the picture shows: (label, whether it is a task, a row of each run)."""
    several = len({row["set"] for row in found["tasks"]}) > 1
    templates = found["templates"] if len(found["tasks"] + found["templates"]) <= MOST_ROWS else []
    lines = []
    for name, task, metric in dict.fromkeys((r["set"], r["task"], r["metric"]) for r in found["tasks"]):
        place = f"{name} " if several else ""
        rows = [r for r in found["tasks"] if (r["set"], r["task"]) == (name, task)]
        lines.append((f"{place}{task} ({metric})", True, rows))
        below = [r for r in templates if (r["set"], r["task"]) == (name, task)]
        for kind in dict.fromkeys(r["template"] for r in below):
            lines.append((kind or "(none)", False, [r for r in below if r["template"] == kind]))
    return lines


def _mark(axes, row: Mapping[str, Any], at: float, colour: str, bold: bool) -> None:
    """Draws one difference: filled if it is decided, hollow if not."""
    if row["difference"] is None:
        return
    if row["ci95"] is not None:
        axes.plot(row["ci95"], [at, at], color=colour, linewidth=2.2 if bold else 1.2,
                  alpha=1.0 if bold else 0.7, solid_capstyle="butt")  # fmt: skip
    filled = row["verdict"] != "undecided"
    axes.plot(row["difference"], at, "o", color=colour, markersize=6 if bold else 4,
              markerfacecolor=colour if filled else "white")  # fmt: skip
