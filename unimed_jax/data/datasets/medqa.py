"""Reads MedQA: questions of medical licensing examinations (task qa), without images.

The layout is chosen by what lies in the folder:

    questions/US/{train,dev,test}.jsonl                                five options
    questions/US/4_options/phrases_no_exclude_{train,dev,test}.jsonl   four
    {train,dev,test}.jsonl, phrases_no_exclude_{train,test}.jsonl      either, without the folders
    data/{train,test}-00000-of-00001.parquet                           four, of the Hugging Face hub

A record is {"question", "answer", "options": {"A": ...}, "answer_idx"}. `region` chooses Mainland
China (five options, or four in 4_options/) or Taiwan (four) in place of the US.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.multiple_choice import options_of, unfolded, with_options
from unimed_jax.data.records import Record, chosen_options, one_of, records, short, word
from unimed_jax.data.tables import PARQUET, parquet_files, rows
from unimed_jax.errors import UserError

SPELT = {"train": "train", "val": "dev", "test": "test"}
# region -> number of options -> where the files may be
FORMS: dict[str, dict[int, tuple[str, ...]]] = {
    "US": {
        5: ("questions/US/{}.jsonl", "{}.jsonl"),
        4: (
            "questions/US/4_options/phrases_no_exclude_{}.jsonl",
            "phrases_no_exclude_{}.jsonl",
            "{}.jsonl",
        ),
    },
    "Mainland": {5: ("questions/Mainland/{}.jsonl",), 4: ("questions/Mainland/4_options/{}.jsonl",)},
    "Taiwan": {4: ("questions/Taiwan/{}.jsonl",)},
}

INFO = Info(
    name="medqa",
    tasks=("qa",),
    licence="MIT",
    citation="Jin et al., What disease does this patient have?, Applied Sciences 2021",
    cluster_word="question",
    files=tuple(
        dict.fromkeys(
            form.format(name)
            for forms in FORMS.values()
            for places in forms.values()
            for form in places
            for name in SPELT.values()
        )
    )
    + PARQUET,
    counts={"train": 10178, "val": 1272, "test": 1273},
    other_counts={"Hugging Face, four options": {"train": 10178, "val": 0, "test": 1273}},
)
OPTIONS = {
    "options": 0,  # of each question: 4 or 5; 0: five where the folder has both, with the same questions
    "shown": False,  # whether the options stand in the question; Uni-Med drops them
    "region": "US",  # US, Mainland or Taiwan
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[()]]]:
    """Yields the questions in the order of the file; the answer is the text of the right option."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "medqa")
    one_of(chosen, "options", (0, 4, 5), "medqa")
    one_of(chosen, "region", tuple(FORMS), "medqa")
    facts = {"template": "examination"} | ({} if chosen["region"] == "US" else {"language": "zh"})
    for number, (where, record) in enumerate(_records(folder, split, chosen)):
        listed = options_of(record.get("options"), where)
        if chosen["options"] and len(listed) != chosen["options"]:
            raise UserError(
                f"{where}: it has {len(listed)} options, and options={chosen['options']} is set; set 0, "
                "or get the other files."
            )
        letter = word(record, "answer_idx", where, required=True)
        answer = word(record, "answer", where, required=True)
        if listed.get(letter) != answer:
            raise UserError(
                f"{where}: answer {short(answer)} is not option {short(letter)}; get the file again."
            )
        question = word(record, "question", where, required=True)
        if chosen["shown"]:
            question = with_options(question, listed)
        yield Example(f"{split}/{number}", "qa", question, answer, meta=facts), ()


def _records(folder: Path, split: str, chosen: Mapping[str, Any]) -> Iterator[tuple[str, Record]]:
    """Yields the records of a split in the first layout that lies in the folder."""
    forms = FORMS[chosen["region"]]
    counts = (chosen["options"],) if chosen["options"] else (5, 4)
    places = [place for count in counts for place in forms.get(count, ())]
    for place in places:
        if any((folder / place.format(name)).exists() for name in SPELT.values()):
            file = folder / place.format(SPELT[split])
            if file.exists() or split != "val":  # some mirrors have no dev
                yield from records(file)
            return
    if chosen["region"] == "US" and any(parquet_files(folder, name) for name in SPELT):
        for where, record in rows(parquet_files(folder, split)):
            yield where, unfolded(record)
        return
    if not places:
        raise UserError(f"medqa: {chosen['region']} has no questions with five options; set options=4.")
    raise UserError(f"{folder} holds no {places[0].format(SPELT[split])}; give MedQA's folder as path.")
