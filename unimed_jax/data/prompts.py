"""Prompts: task tag, instruction and image slot around a question, and boxes in text form.

An image example reads `[INST] <Img>` + visual tokens + `</Img> [tag] instruction [/INST]`; text alone reads
`[INST] [qa] question [/INST]` (Uni-Med's forms; the instructions are our own words).
"""

import dataclasses
import re
from collections.abc import Sequence

from unimed_jax.config import VISUAL_TASKS, TextConfig
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError

TAGS = {task: f"[{task}]" for task in (*VISUAL_TASKS, "qa")}

# task -> templates. Index 0 is the fixed one of evaluation; training draws among all. Where an example brings
# no question of its own (caption, most of cls), what is left of the template says it all.
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "vqa": (
        "{question}",
        "Look at the image and answer: {question}",
        "{question} Answer in a few words.",
        "Judging by this image alone, {question}",
    ),
    "refer": (
        "Where is the {question}?",
        "Give the box of the {question}.",
        "Find the {question} and box it in.",
        "Point out the {question}.",
    ),
    "identify": (
        "What lies in {question}?",
        "Name what is shown inside {question}.",
        "Which structure does the box {question} hold?",
        "{question} marks what?",
    ),
    "caption": (
        "Report what this image shows. {question}",
        "Write the findings. {question}",
        "Tell what can be seen here. {question}",
        "Give a report of this image. {question}",
    ),
    "cls": (
        "Classify this image. {question}",
        "Put this image in its class. {question}",
        "Choose the class that fits. {question}",
        "To which class does the image belong? {question}",
    ),
    "qa": (
        "{question}",
        "Answer this: {question}",
        "{question} Answer in a few words.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text before and after the image slot; `right` is None where there is no image."""

    left: str
    right: str | None = None

    def __str__(self) -> str:
        return self.left if self.right is None else f"{self.left}<ImageHere>{self.right}"


def collapse(text: str) -> str:
    """Runs of two or more whitespace characters become one blank; none at the end, no blank in front.

    A single tab or line break inside stays, as published.
    """
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


def cut_words(text: str, n: int = 50) -> str:
    """The published text processor: `collapse`, then the first `n` blank-separated words."""
    return " ".join(collapse(text).split(" ")[:n])


def shorten(words: str, text: TextConfig) -> str:
    """`collapse`, and the cut of `text.max_words` where there is one."""
    return collapse(words) if text.max_words is None else cut_words(words, text.max_words)


def asked(example: Example, variant: int, text: TextConfig) -> str:
    """The instruction numbered `variant` (modulo the pool), filled with the example's question.

    `text.max_words` cuts the question of an image example. Raises UserError for an image example without its
    image and for text-only `qa` with one.
    """
    task = example.task
    if task not in TAGS:
        raise UserError(f"record {example.id}: {task!r} is no task; choose from {', '.join(TAGS)}.")
    visual = task in VISUAL_TASKS
    if visual != bool(example.images):
        raise UserError(
            f"record {example.id}: task {task!r} "
            + ("needs an image; give one or use task 'qa'." if visual else "is text only; use 'vqa' for its image.")
        )
    question = shorten(example.question, text) if visual else example.question
    pool = INSTRUCTIONS[task]
    return collapse(pool[variant % len(pool)].replace("{question}", question))


def build(example: Example, variant: int, text: TextConfig, *, evaluation: bool) -> Prompt:
    """Tag and instruction (see `asked`; evaluation always takes number 0) around the image slot.

    `text.max_words` cuts text alone as a whole, tag and instruction too (as published).
    """
    body = collapse(f"{TAGS.get(example.task)} {asked(example, 0 if evaluation else variant, text)}")
    if example.images:
        left = "<Img>"
        right = f"</Img> {body}" + (" " if text.training_blank and not evaluation else "")
        return Prompt(f"[INST] {left}", f"{right} [/INST]") if text.chat_template else Prompt(left, right)
    body = shorten(body, text)
    return Prompt(f"[INST] {body} [/INST]" if text.chat_template else body)


def box_to_text(box: Sequence[float], width: int, height: int) -> str:
    """x1, y1, x2, y2 in pixels of a `width` x `height` image -> `{<x1><y1><x2><y2>}`, integers 0..100 (floor).

    Raises UserError where the box is empty or leaves the image.
    """
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise UserError(
            f"box {tuple(box)} is empty or leaves its image of {width} x {height} pixels; "
            "give x1 < x2 <= width and y1 < y2 <= height."
        )
    # In this order of operations, as published: 29 of 100 pixels is 28.
    values = [int(v / size * 100) for v, size in zip(box, (width, height, width, height), strict=True)]
    return "{" + "".join(f"<{v}>" for v in values) + "}"


def text_to_box(text: str) -> tuple[int, int, int, int] | None:
    """The box in hundredths that `text` begins with (blanks and `<unk>` dropped), else None (as published)."""
    number = r"<(\d{1,3})>"
    match = re.match(r"\{" + number * 4 + r"\}", text.replace("<unk>", "").replace(" ", ""))
    if not match:
        return None
    x1, y1, x2, y2 = (int(g) for g in match.groups())
    return x1, y1, x2, y2
