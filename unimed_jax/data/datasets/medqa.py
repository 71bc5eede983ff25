"""Reads MedQA: questions of medical licensing examinations (task qa), without images.

    questions/US/{train,dev,test}.jsonl                                five options
    questions/US/4_options/phrases_no_exclude_{train,dev,test}.jsonl   four, when `options` is 4
    {train,dev,test}.jsonl                                             either, without the folders

A line is {"question", "answer", "options": {"A": ...}, "answer_idx"}.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import Record, chosen_options, one_of, records, short, word
from unimed_jax.errors import UserError

SPELT = {"train": "train", "val": "dev", "test": "test"}
FIVE, FOUR = (
    ("questions/US/{}.jsonl", "{}.jsonl"),
    ("questions/US/4_options/phrases_no_exclude_{}.jsonl",),
)

INFO = Info(
    name="medqa",
    tasks=("qa",),
    licence="MIT",
    citation="Jin et al., What disease does this patient have?, Applied Sciences 2021",
    cluster_word="question",
    files=tuple(form.format(name) for name in SPELT.values() for form in (*FIVE, *FOUR)),
    counts={"train": 10178, "val": 1272, "test": 1273},
    other_counts={"Hugging Face, four options": {"train": 10178, "val": 0, "test": 1273}},
)
OPTIONS = {
    "options": 5,  # of each question in the file: 4 or 5; both files have the same questions
    "shown": False,  # whether the options stand in the question; Uni-Med drops them
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[()]]]:
    """Yields the questions in the order of the file; the answer is the text of the right option."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "medqa")
    forms = FIVE if one_of(chosen, "options", (4, 5), "medqa") == 5 else FOUR
    paths = [folder / form.format(SPELT[split]) for form in forms]
    file = next((path for path in paths if path.exists()), paths[0])
    if not file.exists():
        raise UserError(f"{file} does not exist; give MedQA's folder as path.")
    for number, (where, record) in enumerate(records(file)):
        listed = _options(record, where)
        letter = word(record, "answer_idx", where, required=True)
        answer = word(record, "answer", where, required=True)
        if listed.get(letter) != answer:
            raise UserError(
                f"{where}: answer {short(answer)} is not option {short(letter)}; get the file again."
            )
        question = word(record, "question", where, required=True)
        if chosen["shown"]:
            question += "".join(f" ({key}) {text}" for key, text in listed.items())
        yield Example(f"{split}/{number}", "qa", question, answer, meta={"template": "examination"}), ()


def _options(record: Record, where: str) -> dict[str, str]:
    found = record.get("options")
    if isinstance(found, list):  # as some mirrors have it: [{"key": "A", "value": ...}]
        found = {entry.get("key"): entry.get("value") for entry in found if isinstance(entry, dict)}
    if not isinstance(found, dict) or not all(
        isinstance(text, str) for pair in found.items() for text in pair
    ):
        raise UserError(f"{where}: 'options' is {short(record.get('options'))}; get the file again.")
    return {key: text.strip() for key, text in found.items()}
