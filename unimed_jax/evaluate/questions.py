"""Writes the questions and images of an evaluation, for tools that answer them elsewhere."""

import json
from pathlib import Path
from typing import Any

from unimed_jax.config import Config
from unimed_jax.data.example import Example
from unimed_jax.data.forms import asked
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import Unit, open_sets, units_of
from unimed_jax.files import new_folder


def export_questions(config: Config, folder: str | Path, split: str | None = None) -> tuple[int, int]:
    """Writes questions.jsonl and images/*.png, and returns how many there are of each.

    A line: {id, task, question, instruction, history, images, max_new_tokens}; `instruction` is the
    question in the words of our evaluation, `images` are paths within the folder. The true
    answers are not written. Raises UserError if the folder already holds something, and for a split
    that is not evaluated.
    """
    from PIL import Image

    units, _ = units_of(config, open_sets(config.held_out))
    units = [unit for unit in units if split in (None, unit.split)]
    if not units and not split:
        raise UserError(
            "config.evaluate.splits and config.evaluate.entries are empty, so that nothing is asked; "
            "name a split."
        )
    if not units:
        raise UserError(f"--split={split} is not in config.evaluate.entries; name one of their splits.")
    written: dict[tuple[str, str], str] = {}  # (set, key) -> path
    count = 0
    with new_folder(folder) as out:
        (out / "images").mkdir()
        with (out / "questions.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for unit in units:
                for example in unit.examples:
                    for key in example.images:
                        if (unit.source.id, key) not in written:
                            path = f"images/{len(written):06d}.png"
                            Image.fromarray(unit.source.data.image(key)).save(out / path)
                            written[unit.source.id, key] = path
                    paths = [written[unit.source.id, key] for key in example.images]
                    file.write(
                        json.dumps(_line(unit, example, paths, config), ensure_ascii=False) + "\n"
                    )
                    count += 1
    return count, len(written)


def _line(unit: Unit, example: Example, paths: list[str], config: Config) -> dict[str, Any]:
    return {
        "id": unit.id_of(example),
        "task": example.task,
        "question": example.question,
        "instruction": asked(example, 0, config.text),
        "history": [list(turn) for turn in example.history],
        "images": paths,
        "max_new_tokens": unit.max_new_tokens,
    }
