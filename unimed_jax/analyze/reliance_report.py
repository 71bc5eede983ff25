"""Writes what analyze/reliance.py measured: numbers, every answer, a page and a picture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax import files, processes
from unimed_jax.evaluate.report import link_pages
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.verdicts import number, reliance_verdict, with_interval

NAMES = ("reliance.jsonl", "reliance.md", "reliance.png", "reliance.json")
PASSES = {  # pass -> its name in tables, colour and sign in the picture
    "own_image": ("own image", "#000000", "o"),
    "other_image": ("another case's image", "#D55E00", "s"),
    "blank_image": ("blank image", "#56B4E9", "v"),
    "text_only": ("text only", "#0072B2", "^"),
}
SHARES = {
    "image_sensitivity": ("Image Sensitivity", "#009E73"),
    "hallucinated_visual_reasoning_rate": ("Hallucinated Visual Reasoning Rate", "#CC79A7"),
    "flip_rate": ("paraphrase flip rate", "#E69F00"),
    "dangerous": ("dangerous (neither image nor wording matters)", "#999999"),
}


def write(folder: Path, metrics: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes the four files into a folder at once, and prints the first table."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.written_together(folder, NAMES) as place:
        with (place / NAMES[0]).open("w", encoding="utf-8", newline="\n") as out:
            for line in lines:
                out.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        files.write_text(place / NAMES[1], page(metrics))
        draw(place / NAMES[2], metrics)
        files.write_json(place / NAMES[3], metrics)
    link_pages(folder)
    processes.say(scores_table(metrics))
    for note in metrics["notes"]:
        processes.say(f"note: {note}")
    processes.say(f"wrote {', '.join(str(folder / name) for name in NAMES)}")


def rows_of(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yields set, task and scores."""
    for name, tasks in metrics["sets"].items():
        for task, entry in tasks.items():
            yield name, task, entry


def page(metrics: Mapping[str, Any]) -> str:
    """Writes the page: scores by pass beside the blind baselines, wordings, templates, definitions."""
    parts = [
        f"# {metrics['name'] or 'Run'}: what the answers depend on",
        f"Split {metrics['split']!r}, step {metrics['step']}; 95 % intervals over clusters, paired.",
        f"## Image\n\n{scores_table(metrics)}",
        "*Relies on the image*: the Visual Reliance Score's interval is above 0. A model can score "
        "above a blind baseline and still not rely on the image: its words may be worth more than "
        "the baseline's.",
        f"## Wording\n\n{_wordings(metrics)}",
        "Ideal: no wording changes the answer, but taking the image away does. Fragile: both do. "
        "Dangerous: neither does. Worst: wording alone does (arXiv 2603.20985).",
    ]
    if any(entry["templates"] for *_, entry in rows_of(metrics)):
        parts.append(f"## Question templates\n\n{_templates(metrics)}")
    parts.append(
        "## What the scores are\n\n" + "\n".join(f"- {text}" for text in metrics["definitions"].values())
    )
    if metrics["notes"]:
        parts.append("Notes:\n\n" + "\n".join(f"- {note}." for note in metrics["notes"]))
    parts.append("Each answer is in `reliance.jsonl`, the numbers in `reliance.json`.")
    return "\n\n".join(parts) + "\n"


def of_the_same(reliance: Mapping[str, Any], metrics: Mapping[str, Any]) -> bool:
    """Says whether reliance was measured after the step and on the data of an evaluation's scores."""
    keys = ("step", "data_checksum")
    return all(key in reliance and reliance[key] == metrics.get(key) for key in keys)


def scores_table(metrics: Mapping[str, Any]) -> str:
    """Makes the table of the image: a row for each task, its passes, best blind baseline and scores."""
    head = ("set", "task", "n", "metric", *(name for name, *_ in PASSES.values()), "best blind baseline",
            "Visual Reliance Score", "Image Sensitivity", "HVRR", "verdict")  # fmt: skip
    rows = []
    for name, task, entry in rows_of(metrics):
        best = entry["best_blind"]
        scores = entry["scores"]
        rows.append(
            [
                name, task, entry["n"], entry["metric"],
                *(with_interval(entry["passes"].get(key)) for key in PASSES),
                f"{with_interval(entry['blind'][best])} {best}" if best else "-",
                with_interval(scores.get("visual_reliance_score"), "+"),
                with_interval(scores.get("image_sensitivity")),
                with_interval(scores.get("hallucinated_visual_reasoning_rate")),
                reliance_verdict(scores.get("visual_reliance_score")),
            ]
        )  # fmt: skip
    return markdown_table(head, rows)


def _wordings(metrics: Mapping[str, Any]) -> str:
    kinds = ("ideal", "fragile", "dangerous", "worst")
    rows = []
    for name, task, entry in rows_of(metrics):
        worded = "; ".join(
            f"{key.partition('_')[2]}: {number(part['value'])}"
            for key, part in entry["passes"].items()
            if key.startswith("wording_")
        )
        flips = "; ".join(
            f"{key.partition('_')[2]}: {number(part['value'])}"
            for key, part in entry["wordings"].items()
        )
        shares = (with_interval(entry["quadrants"].get(kind)) for kind in kinds)
        rate = with_interval(entry["scores"].get("flip_rate"))
        own = number(entry["passes"]["own_image"]["value"])
        rows.append([name, task, rate, flips or "-", own, worded or "-", *shares])
    head = ("set", "task", "flip rate", "flips by wording", "score", "score by wording", *kinds)
    return markdown_table(head, rows)


def _templates(metrics: Mapping[str, Any]) -> str:
    rows = [
        [name, task, kind, part["n"], with_interval(part["own_image"]),
         with_interval(part.get("visual_reliance_score"), "+"),
         with_interval(part.get("image_sensitivity")),
         reliance_verdict(part.get("visual_reliance_score"))]
        for name, task, entry in rows_of(metrics)
        for kind, part in entry["templates"].items()
    ]  # fmt: skip
    head = ("set", "task", "template", "n", "own image", "Visual Reliance Score", "Image Sensitivity",
            "verdict")  # fmt: skip
    return markdown_table(head, rows)


def draw(path: Path, metrics: Mapping[str, Any]) -> None:
    """Draws scores by pass beside the best blind baseline, and the shares of answers that change."""
    from matplotlib.figure import Figure

    rows = list(rows_of(metrics))
    several = len(metrics["sets"]) > 1
    figure = Figure(
        figsize=(10.5, 0.85 * len(rows) + 1.6), dpi=130, facecolor="white", layout="constrained"
    )
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.2, 1))
    for at, (_, _, entry) in enumerate(rows):
        _draw_passes(left, at, entry)
        _draw_shares(right, at, entry)
    left.set_yticks(
        range(len(rows)), [f"{name} {task}" if several else task for name, task, _ in rows], fontsize=10
    )
    left.set_ylim(len(rows) - 0.5, -0.5)
    titles = ("Score of the primary metric", "Share of examples")
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlim(-0.02, 1.02)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        for at in range(1, len(rows)):
            axes.axhline(at - 0.5, color="#eeeeee", linewidth=0.8)
    for axes in (left, right):
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        below = (0.5, -0.54 / max(len(rows), 2))
        axes.legend(unique.values(), unique.keys(), loc="upper center", bbox_to_anchor=below,
                    ncols=2 if axes is left else 1, fontsize=8, frameon=False)  # fmt: skip
    figure.savefig(path, format="png")


def _draw_passes(axes, at: int, entry: Mapping[str, Any]) -> None:
    shown = [(entry["passes"].get(key), *style) for key, style in PASSES.items()]
    best = entry["best_blind"]
    shown.append((entry["blind"][best] if best else None, "best blind baseline", "#E69F00", "D"))
    for i, (part, label, colour, sign) in enumerate(shown):
        if part is None or part["value"] is None:
            continue
        place = at + 0.15 * (i - (len(shown) - 1) / 2)
        if part["ci95"] is not None:
            axes.plot(part["ci95"], [place, place], color=colour, linewidth=1.4)
        axes.plot(part["value"], place, sign, color=colour, markersize=5.5, label=label)


def _draw_shares(axes, at: int, entry: Mapping[str, Any]) -> None:
    for i, (key, (label, colour)) in enumerate(SHARES.items()):
        part = entry["scores"].get(key)
        if part is None:
            continue
        place = at + 0.18 * (i - (len(SHARES) - 1) / 2)
        axes.barh(place, part["value"], height=0.16, color=colour, label=label)
        if part["ci95"] is not None:
            axes.plot(part["ci95"], [place, place], color="black", linewidth=0.9)
