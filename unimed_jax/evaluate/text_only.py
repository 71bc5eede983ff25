"""Learns text-only baselines: TF-IDF with logistic regression, and the nearest question.

Both read the question and the name of its template, never an image. Training is bounded, so that a
set of a million examples is fitted within a minute, and deterministic: equal texts count as one
text with a weight, and samples are evenly spaced.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from unimed_jax.data.example import Example
from unimed_jax.evaluate.words import tokens

MAX_TEXTS = 10_000  # different (text, answer) pairs that are fitted
MAX_CLASSES = 200  # most frequent answers that logistic regression chooses from
MAX_FEATURES = 10_000  # words and pairs of words
_BLOCK = 512  # questions whose similarities to all training texts are held at once

Answers = Callable[[Sequence[Example]], list[str]]


def text_of(example: Example) -> str:
    """Returns what a text-only baseline reads: the question, and its template as one more word."""
    template = "".join(c if c.isalnum() else "_" for c in example.meta.get("template", ""))
    return f"{example.question} template_{template}" if template else example.question


def logistic(train: Sequence[Example]) -> Answers | None:
    """Fits logistic regression on TF-IDF of words and pairs of words; its likeliest answer counts.

    None if the training examples have only one answer or one text, so that it could not differ from
    a majority.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    counts = Counter((text_of(example), example.answer) for example in train)
    totals: Counter[str] = Counter()
    for (_, said), n in counts.items():
        totals[said] += n
    classes = sorted(totals, key=lambda said: (-totals[said], said))[:MAX_CLASSES]
    kept = _spaced([key for key in sorted(counts) if key[1] in set(classes)])
    texts, answers = [key[0] for key in kept], [key[1] for key in kept]
    vectorise = _vectoriser(texts)
    if vectorise is None or len(set(answers)) < 2 or len(set(texts)) < 2:
        return None
    model = LogisticRegression(C=10.0, max_iter=100, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the bound on iterations is meant
        # as many answers as questions
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        model.fit(vectorise.transform(texts), answers, sample_weight=[counts[key] for key in kept])

    def answer(examples: Sequence[Example]) -> list[str]:
        return _per_text(examples, lambda asked: model.predict(vectorise.transform(asked)).tolist())

    return answer


def nearest_question(train: Sequence[Example], merge: Callable[[Sequence[str]], str]) -> Answers | None:
    """Answers as the training question with the most similar TF-IDF vector (cosine).

    `merge` makes one answer of those that one training text has. Of equally similar
    questions the first in the alphabet counts. Returns None if there is only one training text.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for example in train:
        groups[text_of(example)].append(example.answer)
    texts = _spaced(sorted(groups))
    vectorise = _vectoriser(texts)
    if vectorise is None or len(texts) < 2:
        return None
    merged = [merge(groups[text]) for text in texts]
    known = vectorise.transform(texts)  # [n, F], rows of length 1

    def nearest(asked: list[str]) -> list[str]:
        found: list[str] = []
        for start in range(0, len(asked), _BLOCK):
            # [block, n]
            similar = (vectorise.transform(asked[start : start + _BLOCK]) @ known.T).toarray()
            # Rounded, so that the order in which a library adds decides nothing.
            found += [merged[i] for i in np.argmax(similar.round(9), axis=1)]
        return found

    return lambda examples: _per_text(examples, nearest)


def _vectoriser(texts: Sequence[str]):
    """Fits TF-IDF of words and pairs of words, and returns None if the texts hold no word."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(map(tokens, texts)):
        return None
    out = TfidfVectorizer(
        tokenizer=tokens,
        token_pattern=None,
        lowercase=False,
        ngram_range=(1, 2),
        max_features=MAX_FEATURES,
    )
    return out.fit(texts)


def _spaced(items: list) -> list:
    """Takes at most MAX_TEXTS of the items, evenly spaced."""
    step = max(1.0, len(items) / MAX_TEXTS)
    return [items[int(i * step)] for i in range(min(len(items), MAX_TEXTS))]


def _per_text(examples: Sequence[Example], answer: Callable[[list[str]], list[str]]) -> list[str]:
    """Answers each different text once."""
    texts = [text_of(example) for example in examples]
    unique = list(dict.fromkeys(texts))
    found = dict(zip(unique, answer(unique), strict=True))
    return [found[text] for text in texts]
