"""Draws the pictures of an evaluation: predictions with boxes, and routing maps."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimed_jax.config import TASKS, VISUAL_TASKS, Config
from unimed_jax.evaluate.metrics.boxes import Box, iou, predicted_box
from unimed_jax.evaluate.metrics.text import exact_match
from unimed_jax.evaluate.report.markdown import routing_line
from unimed_jax.files import written_whole

# Okabe-Ito colours: apart for every kind of colour vision, and on grey.
TRUE_COLOUR, PREDICTED_COLOUR = "#E69F00", "#56B4E9"


_COLUMNS = 4  # examples of a task on the picture sheet
_MOST_ROWS = 24
_SIDE, _GAP, _LINE, _HEAD = 2.6, 0.35, 0.155, 0.75  # inches


def draw_predictions(
    path: Path, records: Sequence[Mapping], image: Callable[[str, str], np.ndarray]
) -> None:
    """Draws the picture sheet, which has a row for each set and task.

    The examples are evenly spaced, so success plays no part in their choice.
    """
    from matplotlib.figure import Figure

    rows = shown_rows(records)
    captions = [[_caption(record) for record in row] for row in rows]
    heights = [
        (_SIDE if any(record["images"] for record in row) else 0.0)
        + _LINE * (1.5 + max(text.count("\n") for text in texts))
        + _GAP
        for row, texts in zip(rows, captions, strict=True)
    ]
    width, height = _COLUMNS * (_SIDE + _GAP) + _GAP, sum(heights) + _HEAD
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    _draw_legend(figure, width, height)
    several = len({record["set"] for record in records}) > 1
    top = height - _HEAD
    for row, texts, row_height in zip(rows, captions, heights, strict=True):
        title = f"{row[0]['set']}: {row[0]['task']}" if several else row[0]["task"]
        figure.text(_GAP / width, (top + 0.08) / height, title, fontsize=12, weight="bold", va="bottom")
        for column, (record, text) in enumerate(zip(row, texts, strict=True)):
            x, below = _GAP + column * (_SIDE + _GAP), top
            if record["images"]:
                below -= _SIDE
                # several images side by side; a box is one of the first
                side = _SIDE / len(record["images"])
                for i, key in enumerate(record["images"]):
                    place = (x + i * side) / width, below / height, side / width, _SIDE / height
                    _draw_image(figure.add_axes(place), record, image(record["set"], key), boxed=not i)
            style: dict[str, Any] = {
                "fontsize": 8.5,
                "va": "top",
                "linespacing": 1.25,
                "parse_math": False,
            }
            figure.text(x / width, (below - 0.06) / height, text, **style)
        top -= row_height
    figure.savefig(path)


def shown_rows(records: Sequence[Mapping], columns: int = _COLUMNS) -> list[list[Mapping]]:
    """Chooses the examples that are drawn: a row of at most `columns` per task and set."""
    rows = []
    for t, task in enumerate(TASKS):
        for name in dict.fromkeys(record["set"] for record in records):
            lines = [record for record in records if (record["set"], record["task"]) == (name, task)]
            # Shifted from task to task, so that the rows show different images.
            places = (np.arange(columns) + (t + 0.5) / len(TASKS)) * len(lines) / columns
            if lines:
                rows.append([lines[place] for place in np.unique(places.astype(int))])
    return rows[:_MOST_ROWS]


def _draw_legend(figure, width: float, height: float) -> None:
    from matplotlib.lines import Line2D

    legend: list[tuple[float, str, Any, str]] = [
        (_GAP, TRUE_COLOUR, "-", "true box (identify: the box asked about)"),
        (_GAP + 4.2, PREDICTED_COLOUR, "--", "predicted box"),
    ]
    for x, colour, style, name in legend:
        ends, y = [x / width, (x + 0.45) / width], 1 - 0.25 / height
        figure.add_artist(Line2D(ends, [y, y], color=colour, linestyle=style, linewidth=3))
        figure.text((x + 0.55) / width, y, name, fontsize=10, va="center")


def _draw_image(axes, record: Mapping, pixels: np.ndarray, boxed: bool = True) -> None:
    """Draws an image and, if it is the one that they are about, the record's boxes."""
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
    axes.axis("off")
    if not boxed:
        return
    predicted = (
        predicted_box(record["prediction"], (width, height)) if record["task"] == "refer" else None
    )
    boxes = [(record["box"], TRUE_COLOUR, "-"), (predicted, PREDICTED_COLOUR, "--")]
    outline = [patheffects.withStroke(linewidth=4, foreground="black", alpha=0.6)]
    for box, colour, style in boxes:
        if box is None:
            continue
        x1, y1, x2, y2 = box
        axes.add_patch(
            Rectangle(
                (x1, y1),
                x2 - x1,
                y2 - y1,
                fill=False,
                edgecolor=colour,
                linestyle=style,
                linewidth=2,
                path_effects=outline,
                clip_on=False,
            )
        )


def draw_box(path: str | Path, pixels: np.ndarray, box: Sequence[int], words: str) -> None:
    """Draws an image with the box of an answer or a question, and words above it.

    The image is uint8 [H, W, 3], the box in hundredths of its sides.
    """
    from matplotlib.figure import Figure

    height, width = pixels.shape[:2]
    figure = Figure(
        figsize=(4.2, 4.2 * height / width + 0.4), dpi=130, facecolor="white", layout="constrained"
    )
    axes = figure.subplots()
    scaled = [
        value / 100 * size for value, size in zip(box, (width, height, width, height), strict=True)
    ]
    _draw_image(axes, {"task": "", "prediction": "", "box": scaled}, pixels)
    axes.set_title(textwrap.fill(words, 48), fontsize=10, parse_math=False)
    with written_whole(path) as file:
        figure.savefig(file, format=Path(path).suffix.lstrip(".") or "png")


class Judged(NamedTuple):
    """Says how one answer did, as far as one number tells."""

    right: bool | None  # None: the task is not answered right or wrong
    box: Box | None  # refer: the box of the answer, in pixels
    overlap: float  # refer: its intersection over union with the true one


def judged(record: Mapping) -> Judged:
    """Judges an answer for a picture: a box by its overlap, a report not at all, others by equality."""
    prediction = record["prediction"].strip()
    if record["task"] == "refer":
        box = predicted_box(prediction, record["image_size"])
        return Judged(None, box, iou(box, record["box"]) if box else 0.0)
    if record["task"] == "caption":
        return Judged(None, None, 0.0)
    return Judged(exact_match(prediction, record["reference"]), None, 0.0)


def _caption(record: Mapping) -> str:
    """Wraps question, true answer and given answer to the width of a panel.

    Right and wrong are written as words, not shown by colours alone.
    """
    task, prediction = record["task"], record["prediction"].strip()
    seen = judged(record)
    if task == "refer":
        overlap = f"IoU {seen.overlap:.2f}" if seen.box else f"no box in {prediction[:40]!r}"
        parts = [record["question"], overlap]
    elif task == "caption":
        parts = [f"true: {record['reference']}", " ", f"said: {prediction or '(nothing)'}"]
    else:
        verdict = "right" if seen.right else "WRONG"
        parts = [
            record["question"],
            f"true: {record['reference']}",
            f"said: {prediction or '(nothing)'} ({verdict})",
        ]
    wrapped = [
        textwrap.wrap(part, 43, max_lines=9, placeholder=" ...") or [""] for part in parts if part
    ]
    return "\n".join(line for lines in wrapped for line in lines)


def token_grid(config: Config) -> tuple[int, int]:
    """Returns (rows, columns) of a picture's visual tokens.

    One row where strips wrap over image rows.
    """
    grid, connector = config.model.vision.grid, config.model.connector
    shapes: dict[str, tuple[int, int]] = {
        "projection": (grid, grid // connector.rate),
        "block": (round(grid / connector.rate**0.5),) * 2,
    }
    rows, columns = shapes.get(connector.aggregation, (grid // 2, grid // 2))
    tokens = config.model.tokens_per_image
    return (rows, columns) if rows * columns == tokens else (1, tokens)


def draw_routing(path: Path, routing: Mapping, grid: tuple[int, int]) -> None:
    """Draws heat maps of the mean routing weight of each visual token.

    There is a row for each task and a column for each expert.
    """
    from matplotlib.figure import Figure

    maps = np.asarray(routing["maps"], np.float64)  # [tasks, T, E]
    tasks, _, experts = maps.shape
    width, height = 1.75 * experts + 2.2, 1.85 * tasks + 1.25
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    panels = figure.subplots(tasks, experts, squeeze=False)
    figure.subplots_adjust(
        left=0.95 / width,
        right=1 - 1.15 / width,
        bottom=0.3 / height,
        top=1 - 0.95 / height,
        wspace=0.12,
        hspace=0.28,
    )
    for t in range(tasks):
        for e in range(experts):
            axes = panels[t][e]
            shown = axes.imshow(
                maps[t, :, e].reshape(grid),
                vmin=maps.min(),
                vmax=maps.max(),
                cmap="cividis",
                extent=(0, 1, 1, 0),
            )  # [rows, columns]
            axes.set(xticks=[], yticks=[])
            axes.set_title(
                f"expert {e}: {maps[t, :, e].mean():.3f}" if t == 0 else f"{maps[t, :, e].mean():.3f}",
                fontsize=9.5,
            )
        panels[t][0].set_ylabel(VISUAL_TASKS[t], fontsize=11, weight="bold")
    bar = figure.add_axes((1 - 0.95 / width, 0.3 / height, 0.16 / width, 1 - 1.25 / height))
    figure.colorbar(shown, cax=bar).set_label("routing weight", fontsize=9.5)
    bar.tick_params(labelsize=8.5)
    figure.text(
        0.2 / width,
        1 - 0.3 / height,
        "Routing weight by task, expert and place in the image",
        fontsize=12,
        weight="bold",
        va="center",
    )
    figure.text(0.2 / width, 1 - 0.55 / height, routing_line(routing), fontsize=9.5, va="center")
    figure.savefig(path)
