"""Reads PubMedQA: yes/no/maybe questions about abstracts (task qa), without images.

The layout is chosen by what lies in the folder:

    ori_pqal.json       {pmid: {QUESTION, CONTEXTS, LONG_ANSWER, final_decision, ...}}, 1,000 of them
or, of the Hugging Face hub,
    pqa_labeled/train-00000-of-00001.parquet          pubid, question, context, final_decision, ...
    data/{train,validation,test}-*.parquet            openlifescienceai's, with the question in `data`

The first two need test_ground_truth.json {pmid: answer} beside them, which alone names the official
500 test questions (github.com/pubmedqa/pubmedqa, folder data); the others are for training. The
last one has that test as a split of its own; its validation part counts as training here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.multiple_choice import options_of, unfolded
from unimed_jax.data.records import Record, at_least, chosen_options, one_of, short, word
from unimed_jax.data.tables import PARQUET, parquet_files, rows
from unimed_jax.errors import UserError
from unimed_jax.parsing import read_json

ORIGINAL = "ori_pqal.json"

INFO = Info(
    name="pubmedqa",
    tasks=("qa",),
    splits=("train", "test"),
    licence="MIT",
    citation="Jin et al., PubMedQA, EMNLP 2019",
    cluster_word="article",
    files=(ORIGINAL, "test_ground_truth.json", *PARQUET),
    counts={
        "train": 500,
        "test": 500,
        "test answer=yes": 276,
        "test answer=no": 169,
        "test answer=maybe": 55,
    },
)
OPTIONS = {
    # what stands before the question. none: nothing (Uni-Med); contexts: the abstract without
    "context": "none",
    # its conclusion (the set's own setting); conclusion: the conclusion, which nearly says the answer
    "words": 0,  # of the context at most; 0: all
    "test_ids": "test_ground_truth.json",  # file of the official test questions, from the folder on
}


class _Article(NamedTuple):
    """Holds a question and the abstract that it is about, from any layout."""

    where: str
    pmid: str
    question: str
    answer: str
    contexts: Any
    conclusion: Any


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[()]]]:
    """Yields the questions in the order of the file."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "pubmedqa")
    at_least(chosen, "words", 0, "pubmedqa")
    one_of(chosen, "context", ("none", "contexts", "conclusion"), "pubmedqa")
    for article in _articles(folder, split, folder / chosen["test_ids"]):
        facts = {"template": "yes/no/maybe", "answer_type": "CLOSED"}
        context = _context(article, chosen)
        text = f"{context} {article.question}" if context else article.question
        name = f"{split}/{article.pmid}"
        yield Example(name, "qa", text, article.answer, (), None, article.pmid, facts), ()


def _articles(folder: Path, split: str, test_file: Path) -> Iterator[_Article]:
    """Yields the articles of a split in the layout that lies in the folder."""
    labelled = folder / "pqa_labeled"
    tables = labelled if labelled.is_dir() else folder
    if (folder / ORIGINAL).exists() or not parquet_files(tables, "train"):
        found = list(_original(folder / ORIGINAL))
    else:
        found = [_of_hub(where, record) for where, record in rows(parquet_files(tables, "train"))]
        if parquet_files(tables, "test"):  # its splits are official
            more = parquet_files(tables, "val") if split == "train" else parquet_files(tables, "test")
            rest = [_of_hub(where, record) for where, record in rows(more)]
            yield from found + rest if split == "train" else rest
            return
    test = read_json(
        test_file,
        "get it too, because it names the official test questions (github.com/pubmedqa/pubmedqa)",
    )
    if not isinstance(test, dict):
        raise UserError(f"{test_file} is no object of articles; get it again.")
    pmids = {article.pmid for article in found}
    lost = [pmid for pmid in test if pmid not in pmids]
    if lost:
        raise UserError(
            f"{test_file} names {lost[0]} and {len(lost) - 1} more, which {folder} lacks; get both "
            "again."
        )
    yield from (article for article in found if (article.pmid in test) == (split == "test"))


def _original(file: Path) -> Iterator[_Article]:
    articles = read_json(file, "get it again")
    if not isinstance(articles, dict):
        raise UserError(f"{file} is no object of articles; get it again.")
    for pmid, article in articles.items():
        where = f"{file}, article {pmid}"
        if not isinstance(article, dict):
            raise UserError(f"{where} is no object; get the file again.")
        yield _Article(
            where,
            pmid,
            word(article, "QUESTION", where, required=True),
            word(article, "final_decision", where, required=True),
            article.get("CONTEXTS"),
            article.get("LONG_ANSWER"),
        )


def _of_hub(where: str, record: Record) -> _Article:
    """Reads a row of either of the hub's tables."""
    if "data" not in record:
        context = record.get("context")
        if not isinstance(context, dict):
            raise UserError(f"{where}: 'context' is {short(context)}; get the file again.")
        return _Article(
            where,
            word(record, "pubid", where, required=True, numbers=True),
            word(record, "question", where, required=True),
            word(record, "final_decision", where, required=True),
            context.get("contexts"),
            record.get("long_answer"),
        )
    asked = unfolded(record)
    options = options_of(asked.get("options"), where, "Options")
    letter = word(asked, "answer_idx", where, required=True)
    if letter not in options:
        raise UserError(f"{where}: 'Correct Option' is {short(letter)}; get the file again.")
    return _Article(
        where,
        word(record, "id", where, required=True, numbers=True),
        word(asked, "question", where, required=True),
        options[letter],
        asked.get("Context"),
        asked.get("Long Answer"),
    )


def _context(article: _Article, options: Mapping[str, Any]) -> str:
    if options["context"] == "none":
        return ""
    if options["context"] == "conclusion":
        text = article.conclusion
        if not isinstance(text, str):
            raise UserError(f"{article.where}: its conclusion is {short(text)}; get the file again.")
    else:
        parts = article.contexts
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{article.where}: its contexts are no list of texts; get the file again.")
        text = " ".join(parts)
    return " ".join(text.split()[: options["words"] or None])
