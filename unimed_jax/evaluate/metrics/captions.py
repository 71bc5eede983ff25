"""Scores reports: by BLEU and ROUGE-L of our tokens, by CIDEr, and by the published BLEU, METEOR, ROUGE.

PTB tokenisation and METEOR are Java programs inside the package pycocoevalcap. They are started here
rather than through its wrappers, which write into the installed package, depend on the machine's
language and can hang at exit. Nothing is fetched from the network.
"""

import contextlib
import functools
import importlib.util
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unimed_jax.evaluate.metrics.published import normalise_answer, published_f1
from unimed_jax.evaluate.metrics.registry import NotComputed, Record, metric, pairs
from unimed_jax.evaluate.metrics.text import bleu, bleu_sums
from unimed_jax.evaluate.statistics import Measure
from unimed_jax.evaluate.words import WORDS, tokens

NEEDS_JAVA = "not computed: needs Java"
_JAVA_SECONDS = 900  # no corpus of reports takes longer
PTB = "ptb-lower"  # the normaliser of CIDEr in protocol ids
_JAVA_FLAGS = (
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
    "-Duser.language=en",
    "-Duser.country=US",
)
# What pycocoevalcap drops after tokenising; brackets become lower case before, and so stay.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def _corpus_bleu(records: Sequence[Record], order: int) -> Measure:
    texts = [(tokens(said), tokens(wanted)) for said, wanted in pairs(records)]
    # [n, 15]; the last column counts items: without any there is no score, in place of a score of 0
    sums = np.stack([[*bleu_sums(said, wanted), 1.0] for said, wanted in texts])
    return Measure(sums, lambda s: np.where(s[..., -1] > 0, bleu(s[..., :-1], order=order), np.nan))


@metric("bleu4_regex_tokens", primary_for=("caption",), normaliser=WORDS)
def bleu4_regex_tokens(records: Sequence[Record]) -> Measure:
    """Computes corpus BLEU-4 of `tokens`, with one reference each; empty answers count."""
    return _corpus_bleu(records, 4)


@metric("bleu1_regex_tokens", tasks=("caption",), normaliser=WORDS)
def bleu1_regex_tokens(records: Sequence[Record]) -> Measure:
    """Computes corpus BLEU-1 of `tokens`."""
    return _corpus_bleu(records, 1)


@metric("rouge_l_regex_tokens", tasks=("caption",), normaliser=WORDS, baselines=False)
def rouge_l_regex_tokens(records: Sequence[Record]) -> Measure:
    """Computes the mean F1 of ROUGE-L by the package rouge-score, over `tokens` and without stemming.

    That package's own tokens are letters a-z and digits alone: equal Chinese texts score 0 by them,
    and "3.5" is "3 5". An empty answer scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return Measure.mean(
        [scorer.score(wanted, said)["rougeL"].fmeasure for said, wanted in pairs(records)]
    )


class _Words:
    """Gives rouge-score our tokens."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


@metric("cider", tasks=("caption",), normaliser=PTB, baselines=False)
def cider(records: Sequence[Record]) -> Measure:
    """Computes CIDEr by pycocoevalcap, from 0 to 10, over PTB tokens with one reference each.

    Words weigh by how few references of these records hold them, so the score belongs to the set; its
    interval keeps the weights. An empty answer scores 0. Raises NotComputed without Java or the package.
    """
    if missing := why_no_java_metrics():
        raise NotComputed(missing)
    from pycocoevalcap.cider.cider import Cider

    if len(records) < 2:  # every word weighs log(1) = 0
        raise NotComputed("not computed: needs at least two reports")
    try:
        tokenised = _ptb_tokens([text for pair in pairs(records) for text in pair])
    except (RuntimeError, subprocess.SubprocessError) as error:
        raise NotComputed(f"not computed: {error}") from error
    predictions = {i: [text] for i, text in enumerate(tokenised[::2])}
    references = {i: [text] for i, text in enumerate(tokenised[1::2])}
    return Measure.mean(Cider().compute_score(references, predictions)[1].tolist())


@functools.cache
def find_java() -> str | None:
    """Returns the path of a Java that runs, or None if there is none.

    It is tried, because macOS has a `java` that only asks to install one.
    """
    path = shutil.which("java")
    if (
        path
        and subprocess.run([path, "-version"], capture_output=True, stdin=subprocess.DEVNULL).returncode
        == 0
    ):
        return path
    return None


@functools.cache
def _package_folder() -> Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")
    return (
        Path(next(iter(spec.submodule_search_locations)))
        if spec and spec.submodule_search_locations
        else None
    )


def why_no_java_metrics() -> str | None:
    """Returns the sentence that replaces a score if Java or pycocoevalcap is missing, else None."""
    if not find_java():
        return NEEDS_JAVA
    return None if _package_folder() else "not computed: needs the package pycocoevalcap"


def ptb_tokenise(texts: Sequence[str]) -> list[str]:
    """Makes lower-case PTB tokens without punctuation, joined by blanks, as pycocoevalcap 1.2 does.

    Raises RuntimeError if Java fails; ask `why_no_java_metrics` first.
    """
    folder, java = _package_folder(), find_java()
    assert folder and java
    # a line break inside would shift the pairs
    lines = "\n".join(" ".join(text.split()) for text in texts)
    command = [
        java,
        *_JAVA_FLAGS,
        "-cp",
        "stanford-corenlp-3.4.1.jar",
        "edu.stanford.nlp.process.PTBTokenizer",
    ]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"],
        cwd=folder / "tokenizer",
        input=lines + "\n",
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # what is no Unicode (half of a surrogate pair) becomes a question mark
        timeout=_JAVA_SECONDS,
    )
    tokenised = done.stdout.split("\n")[: len(texts)]
    if done.returncode or len(tokenised) != len(texts):
        raise RuntimeError(
            f"the PTB tokeniser returned {len(tokenised)} lines for {len(texts)}: {done.stderr[-300:]}"
        )
    return [
        " ".join(word for word in line.split(" ") if word and word not in _DROPPED) for line in tokenised
    ]


_tokenised: dict[str, str] = {}  # text -> PTB tokens of the latest corpus


def _ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Does `ptb_tokenise` to texts of which some may have passed it before, with one start of Java."""
    new = [text for text in dict.fromkeys(texts) if text.strip() and text not in _tokenised]
    found = dict(zip(new, ptb_tokenise(new), strict=True)) if new else {}
    kept = {text: _tokenised[text] for text in texts if text in _tokenised}
    _tokenised.clear()
    _tokenised.update(kept | found)
    return [_tokenised.get(text, "") for text in texts]


def corpus_bleu(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Computes corpus BLEU-1..4 of raw (prediction, reference) texts: PTB tokens, pycocoevalcap."""
    from pycocoevalcap.bleu.bleu import Bleu

    tokenised = _ptb_tokens([text for pair in pairs for text in pair])
    predictions = {i: [text] for i, text in enumerate(tokenised[::2])}
    references = {i: [text] for i, text in enumerate(tokenised[1::2])}
    return [float(value) for value in Bleu(4).compute_score(references, predictions, verbose=0)[0]]


def meteor(pairs: Sequence[tuple[str, str]]) -> float:
    """Computes corpus METEOR 1.5 of (prediction, reference) texts with pycocoevalcap's METEOR.

    The texts are cut into PTB tokens first. Published scores give it normalised texts, which pass
    the tokeniser all the same: it splits "isn't" in two. Raises RuntimeError if Java fails; ask
    `why_no_java_metrics` first.
    """
    tokenised = ptb_tokenise([text for pair in pairs for text in pair])
    folder, java = _package_folder(), find_java()
    assert folder and java
    command = [
        java,
        *_JAVA_FLAGS,
        "-Xmx2G",
        "-jar",
        "meteor-1.5.jar",
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    process = subprocess.Popen(
        command,
        cwd=folder / "meteor",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin and stdout
    alarm = threading.Timer(_JAVA_SECONDS, process.kill)
    alarm.start()

    def say(line: str) -> None:
        stdin.write(line + "\n")
        stdin.flush()

    def hear() -> str:
        line = stdout.readline()
        if not line:
            raise RuntimeError("METEOR's Java program ended early")
        return line.strip()

    try:
        statistics = []
        for prediction, reference in zip(tokenised[::2], tokenised[1::2], strict=True):
            prediction, reference = (
                " ".join(text.replace("|||", " ").split()) for text in (prediction, reference)
            )
            say(f"SCORE ||| {reference} ||| {prediction}")
            statistics.append(hear())
        say(" ||| ".join(["EVAL", *statistics]))
        for _ in pairs:
            hear()  # one score a pair; the corpus score follows
        return float(hear())
    except BrokenPipeError:
        raise RuntimeError("METEOR's Java program ended early") from None
    finally:
        alarm.cancel()
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        stdout.close()
        process.wait()


def rouge(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Computes the mean F of ROUGE-1, -2 and -L over text pairs, by the package `rouge` 1.0.1.

    A pair with a side without words, which that package refuses, scores 0.
    """
    from rouge import Rouge

    scorer, names = Rouge(), ("rouge-1", "rouge-2", "rouge-l")
    scores = np.zeros((len(pairs), len(names)))
    limit = sys.getrecursionlimit()
    for i, pair in enumerate(pairs):
        if not all(side.replace(".", "").strip() for side in pair):
            continue
        # The package recurses once a word.
        sys.setrecursionlimit(max(limit, 1000 + sum(len(side.split()) for side in pair)))
        try:
            score = scorer.get_scores(*pair)[0]
        finally:
            sys.setrecursionlimit(limit)
        scores[i] = [score[name]["f"] for name in names]
    return [float(value) for value in scores.mean(0)]


def report_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float | str | int]:
    """Computes the published scores of (prediction, reference) reports.

    A score that is missing is replaced by a sentence that says why.

    bleu1..4 on raw text, then meteor, rouge_1, rouge_2, rouge_l and f1 on normalised text; pairs
    with an empty side are dropped first, as published, and `pairs_scored` counts the others.
    """
    names = ("bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_1", "rouge_2", "rouge_l", "f1")
    kept = [
        (prediction, reference)
        for prediction, reference in pairs
        if prediction.strip() and reference.strip()
    ]
    scores: dict[str, float | str | int] = {"pairs_scored": len(kept)}
    if not kept:
        return scores | {name: "not computed: no pair has two sides" for name in names}
    normalised = [
        (normalise_answer(prediction), normalise_answer(reference)) for prediction, reference in kept
    ]
    missing = why_no_java_metrics()
    values: list[float | str] = [missing] * 5 if missing else []
    if not missing:
        try:
            values = [*corpus_bleu(kept)]
        except (RuntimeError, subprocess.SubprocessError) as error:
            values = [f"not computed: {error}"] * 4
        try:
            values.append(meteor(normalised))
        except (RuntimeError, subprocess.SubprocessError) as error:
            values.append(f"not computed: {error}")
    try:
        values += rouge(normalised)
    except ImportError:
        values += ["not computed: needs the package rouge"] * 3
    values.append(float(np.mean([published_f1(*pair) for pair in kept])))
    return scores | dict(zip(names, values, strict=True))
