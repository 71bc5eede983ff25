"""Writes the section of pictures: examples with their boxes, questions, answers and references."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unimed_jax.analyze.run_report.facts import Data, Facts
from unimed_jax.analyze.run_report.markup import Markup, joined, named, tag
from unimed_jax.analyze.run_report.scores import number_of, signed
from unimed_jax.evaluate.report.pictures import Judged, judged, shown_rows

EACH = 8  # examples of a set's task; so many rows of them as predictions.png has
SIDE = 320  # pixels of a picture's longer side at most
LOSSLESS = 128  # pixels of that side up to which a picture is kept as it is
BYTES = 6 << 20  # of all pictures together, as they stand in the page
LONGEST = 700  # characters of a question or an answer
SHORT = 120  # of those that the caption shows


class _Budget:
    """Turns images into data URLs until BYTES are used up."""

    def __init__(self) -> None:
        self.used, self.refused = 0, 0

    def url(self, pixels: np.ndarray) -> str | None:
        """Returns a PNG, or a JPEG of a large image, as a data URL; None if it does not fit any more."""
        image = Image.fromarray(pixels)
        if (pixels == pixels[:, :, :1]).all():
            image = image.convert("L")
        image.thumbnail((SIDE, SIDE))
        out, small = io.BytesIO(), max(image.size) <= LOSSLESS
        image.save(out, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 85}))
        kind = "png" if small else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
        if self.used + len(url) > BYTES:
            self.refused += 1
            return None
        self.used += len(url)
        return url


# A run, its answer, and how that did.
Seen = Sequence[tuple[Facts, Mapping[str, Any], Judged]]


def pictures(runs: Sequence[Facts], data: Data) -> Markup:
    """Shows the same examples for all runs, chosen evenly spaced, so that success plays no part."""
    every = _examples(runs)
    rows = shown_rows(every, EACH)
    several = len({row[0]["set"] for row in rows}) > 1
    budget, parts = _Budget(), []
    for row in rows:
        title = f"{row[0]['set']}: {row[0]['task']}" if several else row[0]["task"]
        shown = [_figure(record, runs, data, budget) for record in row]
        parts.append(tag("h3", title))
        parts.append(tag("div", *shown, class_="pictures"))
    if not parts:
        return tag("p", "No answers were kept.")
    switches = tag(
        "p",
        _switch("alltext", "all text below the pictures"),
        _switch("onlywrong", "only wrong answers, and boxes that overlap by less than half"),
        class_="switches",
    )
    keys = tag(
        "p",
        tag("span", "", class_="key truebox"),
        "true box (identify: the box asked about) ",
        *(
            joined(
                (
                    tag("span", "", class_=f"key guess run{number_of(run)}"),
                    f"predicted box{f' of {run.sign}' if run.sign else ''} ",
                )
            )
            for run in runs
        ),
        class_="legend",
    )
    about = [
        "Evenly spaced examples: success plays no part in their choice. Point at a picture, or reach "
        "it with the Tab key, to read the reference and all of the text; a box says what it is."
    ]
    if data.missing:
        about.append(f"Pictures are missing, since their data did not open: {data.missing}.")
    if budget.refused:
        about.append(
            f"{budget.refused} pictures were left out, since all together may take "
            f"{BYTES >> 20} MiB of this file."
        )
    left = len({(record["set"], record["task"]) for record in every}) - len(rows)
    if left:
        about.append(f"{left} more tasks of sets have no place here.")
    changed = {
        name for run in runs for name, entry in run.metrics["data"].items() if data.changed(name, entry)
    }
    if changed:
        about.append(
            f"Pictures of {', '.join(sorted(changed))} may differ from those that the model saw: the "
            "data here is in another state than the one that was scored."
        )
    if not any(record["box"] for row in rows for record in row):
        keys = Markup("")
    return joined((*(tag("p", line) for line in about), switches, keys, *parts))


def _examples(runs: Sequence[Facts]) -> list[Mapping[str, Any]]:
    """Lists the first run's examples, then those of sets and tasks that only a later run has."""
    found: list[Mapping[str, Any]] = []
    for run in runs:
        before = {(record["set"], record["task"]) for record in found}
        found += [r for r in run.records.values() if (r["set"], r["task"]) not in before]
    return found


def _asks_the_same(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Says whether two runs' lines of one id are of one example: a set may have changed between."""
    return all(record[key] == other[key] for key in ("task", "question", "images", "reference", "box"))


def _switch(name: str, words: str) -> Markup:
    return tag("label", tag("input", type="checkbox", id=name), f" {words}")


def _figure(record: Mapping[str, Any], runs: Sequence[Facts], data: Data, budget: _Budget) -> Markup:
    """Makes one example: picture with boxes, a line for each run's answer, and all text."""
    answers = [(run, run.records.get(record["id"])) for run in runs]
    seen = [
        (run, answer, judged(answer))
        for run, answer in answers
        if answer is not None and _asks_the_same(record, answer)
    ]
    wrong = any(_is_wrong(record["task"], one) for *_, one in seen)
    images = []
    if record["set"] in data.sets:
        images = [data.image(record["set"], key) for key in record["images"]]
    shown = []
    for place, pixels in enumerate(images):
        url = budget.url(pixels) if pixels is not None else None
        if pixels is None or url is None:
            shown.append(tag("div", "no picture", class_="missing"))
            continue
        height, width = pixels.shape[:2]
        boxes: list[Markup] = []
        if not place:  # a box is one of the first image
            boxes = _boxes(record, seen)
        shown.append(
            tag(
                "div",
                tag("img", src=url, alt=f"image {record['images'][place]}", width=width, height=height,
                    class_="coarse" if max(width, height) <= LOSSLESS else None),
                tag("svg", *boxes, viewBox=f"0 0 {width} {height}", preserveAspectRatio="none",
                    aria_hidden="true"),
                class_="frame",
                style=f"aspect-ratio:{width}/{height}",
            )
        )  # fmt: skip
    said = []
    for run, answer, one in seen:
        words = tag("q", _cut(answer["prediction"].strip() or "(nothing)", SHORT))
        said.append(tag("p", signed(run), " ", words, " ", _chip(record["task"], one), class_="said"))
    if _gives_reference(seen):
        said.append(tag("p", f"reference: {_cut(record['reference'], SHORT)}", class_="question"))
    return tag(
        "figure",
        tag("div", *shown, class_="images") if shown else "",
        tag(
            "figcaption",
            tag("p", _cut(record["question"], SHORT), class_="question") if record["question"] else "",
            *said,
        ),
        tag("div", _text(record, seen), class_="all"),
        tabindex="0",
        class_="wrong" if wrong else "right",
    )


def _text(record: Mapping[str, Any], seen: Seen) -> Markup:
    """Lists what the caption has no place for: all of a long text, reference, guess, name."""
    answers = [
        (f"Answer {run.sign}".strip(), _cut(answer["prediction"]))
        for run, answer, _ in seen
        if len(answer["prediction"]) > SHORT
    ]
    given = _gives_reference(seen) and len(record["reference"]) <= SHORT
    name = _best_guess(record, seen[0][0]) if seen else ""
    guess = {**record.get("blind", {}), **record.get("peers", {})}.get(name)
    return named(
        [
            ("Question", _cut(record["question"]) if len(record["question"]) > SHORT else ""),
            *answers,
            ("Reference", "" if given else _cut(record["reference"]) or "(nothing)"),
            (f"Best guess without the image ({name})", _cut(guess) if guess else ""),
            ("Example", " · ".join(filter(None, (record["id"], record.get("template"))))),
        ]
    )


def _gives_reference(seen: Seen) -> bool:
    """Says whether the caption gives the reference, because an answer is wrong."""
    return any(one.right is False for *_, one in seen)


def _best_guess(record: Mapping[str, Any], run: Facts) -> str:
    """Names the best blind baseline of the example's set and task."""
    tasks = run.metrics["sets"].get(record["set"], {}).get(run.split, {})
    margin = tasks.get(record["task"], {}).get("margin")
    return margin["baseline"] if margin else ""


def _boxes(record: Mapping[str, Any], seen: Seen) -> list[Markup]:
    boxes = []
    if record["box"] is not None:
        boxes.append(_box(record["box"], "truebox", f"true box {_ends(record['box'])}"))
    for run, _, one in seen:
        if one.box is not None:
            name = f"predicted box {run.sign}".strip()
            said = f"{name} {_ends(one.box)}, IoU {one.overlap:.2f}"
            boxes.append(_box(one.box, f"guess run{number_of(run)}", said))
    return boxes


def _box(box: Sequence[float], look: str, said: str) -> Markup:
    x1, y1, x2, y2 = (round(float(value), 2) for value in box)
    size = {"x": x1, "y": y1, "width": max(x2 - x1, 0), "height": max(y2 - y1, 0)}
    return joined(
        (tag("rect", **size, class_="halo"), tag("rect", tag("title", said), **size, class_=look))
    )


def _ends(box: Sequence[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in box)


def _is_wrong(task: str, one: Judged) -> bool:
    return one.right is False or (task == "refer" and one.overlap < 0.5)


def _chip(task: str, one: Judged) -> Markup:
    """Says right or wrong in words; of a box how far it overlaps with the true one."""
    if task == "refer":
        words = f"IoU {one.overlap:.2f}" if one.box else "no box"
        return tag("span", words, class_=f"chip {'bad' if one.overlap < 0.5 else 'good'}")
    if one.right is None:
        return Markup("")
    return tag(
        "span", "correct" if one.right else "wrong", class_=f"chip {'good' if one.right else 'bad'}"
    )


def _cut(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
