"""Writes what an audit found: check.json for programs, check.md and pairs.png for the eye."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from unimed_jax.audit.check import Pair
from unimed_jax.data.example import Dataset
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.files import write_text, written_together

TILE, LINE, COLUMNS = 160, 13, 3
PAIRS = 24  # in the picture at most, the kinds in turn

MEANING = {
    "image": "images with the very same pixels",
    "near": "images that are nearly the same",
    "mirror": "images that are nearly the mirror image",
    "question": "the same question about the same image (or the same text-only question)",
    "question_answer": "and the same answer",
    "similar_question": "a nearly equal question about the same image with the same answer",
    "report": "reports that are the same word for word",
    "cluster": "examples of the same patient, case or study",
    "repeating": "examples of the EARLIER split that ask a question of the later one",
}


def write_audit(
    folder: Path, content: Mapping[str, Any], pairs: Sequence[Pair], sets: Mapping[str, Dataset]
) -> None:
    """Writes check.json, check.md and, if there are pairs, pairs.png into the folder."""
    chosen = _chosen(pairs)
    with written_together(folder, ("pairs.png", "check.md", "check.json")) as place:
        if chosen:
            _picture(chosen, sets).save(place / "pairs.png")
        write_text(place / "check.md", _markdown(content, bool(chosen)))
        write_text(
            place / "check.json",
            json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        )


def _markdown(content: Mapping[str, Any], picture: bool) -> str:
    look = [f"- {line}" for line in content["look"]] or ["Nothing was found that must be looked at."]
    lines = [f"# Audit of the data of {content['name']}", "", *look, ""]
    for name, found in content["sets"].items():
        lines += [f"## {name}", "", f"Licence: {found['licence']}.", ""]
        rows = []
        for split, facts in found["splits"].items():
            tasks = ", ".join(f"{task} {count}" for task, count in facts["task"].items())
            words = facts["answer_words"]
            rows.append(
                [
                    split,
                    facts["examples"],
                    tasks,
                    facts["images"],
                    facts["clusters"],
                    words["median"],
                    words["most"],
                ]
            )
            rows[-1].append(facts["over_50_words"])
        head = (
            "split",
            "examples",
            "tasks",
            "images",
            f"{found['cluster']}s",
            "answer words (median)",
            "(most)",
            "over 50",
        )
        lines += [markdown_table(head, rows), ""]
        betweens = sorted({between for counts in found["leaks"].values() for between in counts})
        if betweens:
            table = [
                [
                    MEANING[kind]
                    + (f" (by design: {found['by_design'][kind]})" if kind in found["by_design"] else "")
                ]
                + [counts.get(between, 0) for between in betweens]
                for kind, counts in found["leaks"].items()
            ]
            lines += [
                markdown_table(
                    ("of the later split", *(b.replace("_", " → ") for b in betweens)), table
                ),
                "",
            ]
        for between, copier in found["copier"].items():
            parts = ", ".join(
                f"{name or 'all'} {part['value']:.3f}" for name, part in copier["templates"].items()
            )
            lines += [
                "Copying the answer of the most similar question about the same image "
                f"({between.replace('_', ' → ')}) is right in {copier['value']:.3f} of "
                f"{copier['n']} questions ({parts}).",
                "",
            ]
    if content["between"]:
        rows = [
            [
                between,
                *(
                    counts.get(k, 0)
                    for k in ("image", "near", "mirror", "name", "question", "repeating")
                ),
            ]
            for between, counts in content["between"].items()
        ]
        lines += [
            "## Between sets",
            "",
            markdown_table(
                ("", "same pixels", "near", "mirrored", "same name", "same question", "(of the first)"),
                rows,
            ),
            "",
        ]
    limits = content["thresholds"]
    lines += [
        f"Images count as nearly the same if at most {limits['distance']} of {limits['of_bits']} "
        f"bits of their gradients differ and their thumbnails correlate by {limits['likeness']} or "
        f"more; questions, if their letters match by more than {limits['similar_question']}.",
        "",
    ]
    if picture:
        lines += ["![pairs of images](pairs.png)", ""]
    return "\n".join(lines)


def _chosen(pairs: Sequence[Pair]) -> list[Pair]:
    """Takes the first pairs of each kind in turn."""
    kinds: dict[str, list[Pair]] = {}
    for pair in pairs:
        kinds.setdefault(pair[0], []).append(pair)
    turns = [some[n] for n in range(PAIRS) for some in kinds.values() if n < len(some)]
    return turns[:PAIRS]


def _picture(pairs: Sequence[Pair], sets: Mapping[str, Dataset]) -> Image.Image:
    """Draws each pair side by side with its kind and the names of its images."""
    width, height = 2 * TILE + 8, TILE + 3 * LINE + 6
    sheet = Image.new("RGB", (COLUMNS * width, height * -(-len(pairs) // COLUMNS)))
    draw = ImageDraw.Draw(sheet)
    for number, (kind, *names) in enumerate(pairs):
        x, y = number % COLUMNS * width, number // COLUMNS * height
        draw.text((x + 2, y), kind, fill=(255, 220, 60))
        for side, name in enumerate(names):
            set_name, _, key = name.partition("/")
            part = Image.fromarray(sets[set_name].image(key))
            part.thumbnail((TILE, TILE))
            sheet.paste(part, (x + side * (TILE + 2), y + LINE))
            draw.text(
                (x + 2, y + TILE + LINE * (1 + side)),
                name[-52:].encode("latin-1", "replace").decode("latin-1"),
            )
    return sheet
