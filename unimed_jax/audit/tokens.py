"""Measures which training records fit no row, with the tokenizer that the settings name."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.config import Config
from unimed_jax.data import lengths
from unimed_jax.data.columns import columns_of
from unimed_jax.data.example import Dataset
from unimed_jax.data.layout import RowShape
from unimed_jax.data.selection import chosen
from unimed_jax.data.store import Rows
from unimed_jax.errors import UserError
from unimed_jax.runs.folder import load_text


def answer_tokens(config: Config, datasets: Sequence[Dataset], shown: int) -> dict[str, Any]:
    """Compares the training records of each source with what a row holds.

    datasets: of config.data.sources, in their order. Returns set id -> {n, answer: {median, most},
    cut: answers that config.text.max_answer cuts, over: {setting: {limit, n, most, first}}}, or
    {"not measured": why}.
    """
    trained = [data for data in datasets if "train" in data.splits]
    if not trained:
        return {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = load_text(Path(folder), config, trained)
    except UserError as error:
        return {"not measured": str(error)}
    shape = RowShape(
        tokens=config.data.row_tokens,
        images=config.data.row_images,
        answers=config.data.row_answers,
        tokens_per_image=config.model.tokens_per_image,
        image_size=config.model.vision.image_size,
    )
    out: dict[str, Any] = {}
    for source, data in zip(config.data.sources, datasets, strict=True):
        if "train" not in data.splits:
            continue
        columns = columns_of(data, "train")
        (rows,) = np.nonzero(chosen(columns, source))
        every = data.examples("train")
        examples = every.at(rows) if isinstance(every, Rows) else [every[int(row)] for row in rows]
        measured = lengths.measure(
            examples,
            tokenizer,
            config.text,
            shape.tokens_per_image,
            config.data.cache_folder,
            f"{data.checksum}/audit/{source.splits}/{source.only}/{source.tasks}",
        )
        answers = np.array([measured.answer(row) for row in range(len(rows))])
        over: dict[str, Any] = {}
        for setting, limit, needs in lengths.limits(measured, columns.images[rows], shape, config.text):
            (beyond,) = np.nonzero(needs > limit)
            if len(beyond):
                first = [f"{examples[int(i)].id} ({needs[i]})" for i in beyond[:shown]]
                over[setting] = {
                    "limit": limit,
                    "n": len(beyond),
                    "most": int(needs.max()),
                    "first": first,
                }
        found = {
            "n": len(rows),
            "answer": {"median": int(np.median(answers)), "most": int(answers.max())},
            "cut": measured.cut,
            "over": over,
        }
        name = data.id if data.id not in out else f"{data.id} ({', '.join(source.tasks)})"
        out[name] = found
    return out
