"""Reads PubMedQA: yes/no/maybe questions about abstracts (task qa), without images.

ori_pqal.json            {pmid: {QUESTION, CONTEXTS, LONG_ANSWER, final_decision, ...}}, 1,000 of them
test_ground_truth.json   {pmid: answer} of the official 500 test questions; the others are for training
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import at_least, chosen_options, one_of, word
from unimed_jax.errors import UserError
from unimed_jax.parsing import read_json

INFO = Info(
    name="pubmedqa",
    tasks=("qa",),
    splits=("train", "test"),
    licence="MIT",
    citation="Jin et al., PubMedQA, EMNLP 2019",
    cluster_word="article",
    files=("ori_pqal.json", "test_ground_truth.json"),
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
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[()]]]:
    """Yields the questions in the order of the file."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "pubmedqa")
    at_least(chosen, "words", 0, "pubmedqa")
    one_of(chosen, "context", ("none", "contexts", "conclusion"), "pubmedqa")
    file, test_file = (folder / name for name in INFO.files)
    articles, test = (
        read_json(file, "get it again"),
        read_json(test_file, "get it too, because it names the official test questions"),
    )
    if not isinstance(articles, dict) or not isinstance(test, dict):
        raise UserError(
            f"{folder}: {INFO.files[0]} or {INFO.files[1]} is no object of articles; get them again."
        )
    lost = [pmid for pmid in test if pmid not in articles]
    if lost:
        raise UserError(
            f"{test_file} names {lost[0]} and {len(lost) - 1} more, which {file} lacks; get both again."
        )
    for pmid, article in articles.items():
        if (pmid in test) == (split == "test"):
            where = f"{file}, article {pmid}"
            if not isinstance(article, dict):
                raise UserError(f"{where} is no object; get the file again.")
            answer = word(article, "final_decision", where, required=True)
            facts = {"template": "yes/no/maybe", "answer_type": "CLOSED"}
            question = word(article, "QUESTION", where, required=True)
            context = _context(article, chosen, where)
            text = f"{context} {question}" if context else question
            yield Example(f"{split}/{pmid}", "qa", text, answer, (), None, pmid, facts), ()


def _context(article: Mapping[str, Any], options: Mapping[str, Any], where: str) -> str:
    if options["context"] == "none":
        return ""
    if options["context"] == "conclusion":
        text = word(article, "LONG_ANSWER", where, required=True)
    else:
        parts = article.get("CONTEXTS")
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: 'CONTEXTS' is not a list of texts; get the file again.")
        text = " ".join(parts)
    words = text.split()
    return " ".join(words[: options["words"] or None])
