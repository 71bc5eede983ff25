"""Says which answers a question can have, where that is known, and which of them an answer names.

Three rules, the first that fits: the options that stand in the question ("options"); of task cls, the
answers of the training examples of the same template ("training"); of other closed questions that yes,
no or maybe answers, those of the three that answer training examples of the template ("yes/no").
The likelihood of each is then compared (evaluate/classes.py). Other questions have no such answers.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from unimed_jax.data.example import Example
from unimed_jax.data.multiple_choice import LETTERS, shown_options
from unimed_jax.evaluate.closed import closed_accuracy
from unimed_jax.evaluate.metrics.text import is_closed
from unimed_jax.evaluate.words import canonical, tokens

MOST = 64  # labels of a template; with more, likelihoods are not computed
RARE = 0.01  # share of closed answers below which yes, no or maybe is a slip and no label
POLAR = ("yes", "no", "maybe")
OPTIONS, TRAINING, YES_NO = "options", "training", "yes/no"  # the rules


class Labels(NamedTuple):
    """Lists the answers that a question can have."""

    rule: str  # OPTIONS, TRAINING or YES_NO
    group: str  # of questions that have the same labels; "options" for those with options of their own
    labels: tuple[str, ...]


def labels_of(task: str, examples: Sequence[Example], train: Iterable[Example]) -> list[Labels | None]:
    """Finds the labels of each example, or None where they are not known.

    train: training examples of the task.
    """
    if task not in ("vqa", "cls", "qa"):
        return [None] * len(examples)
    spelled: dict[str, Counter[str]] = defaultdict(Counter)  # template -> answers as they are written
    for example in train:
        if task == "cls" or is_closed(example.meta):
            spelled[_template(example)][example.answer] += 1
    least = 0.0 if task == "cls" else RARE  # a rare class is a class
    known = {template: _commonest(answers, least) for template, answers in spelled.items()}
    return [_of_example(task, example, known.get(_template(example), {})) for example in examples]


def _of_example(task: str, example: Example, known: Mapping[str, str]) -> Labels | None:
    """Applies the rules; known: canonical form of the template's training answers -> its spelling."""
    options = tuple(shown_options(example.question).values())
    if options:
        return Labels(OPTIONS, OPTIONS, options) if place_of(example.answer, options) >= 0 else None
    if task == "cls":
        labels = tuple(sorted(known.values()))
        return Labels(TRAINING, _template(example) or task, labels) if 1 < len(labels) <= MOST else None
    if not is_closed(example.meta) or canonical(example.answer) not in POLAR:
        return None
    words = [word for word in POLAR if word in known]
    chosen = words if len(words) > 1 else POLAR[:2]
    return Labels(YES_NO, "/".join(chosen), tuple(known.get(word, word) for word in chosen))


def _template(example: Example) -> str:
    return example.meta.get("template", "")


def _commonest(answers: Counter[str], least: float) -> dict[str, str]:
    """Returns the commonest spelling of each answer by its canonical form.

    least: share of all answers that a form must have.
    """
    shares: Counter[str] = Counter()
    found: dict[str, str] = {}
    for answer, count in sorted(answers.items(), key=lambda item: (-item[1], item[0])):
        form = canonical(answer)
        shares[form] += count
        found.setdefault(form, answer)
    most = least * answers.total()
    return {form: answer for form, answer in found.items() if form and shares[form] >= most}


def place_of(answer: str, labels: Sequence[str]) -> int:
    """Returns the place of the label that an answer equals except for spelling, or -1."""
    wanted = canonical(answer)
    return next((i for i, label in enumerate(labels) if canonical(label) == wanted), -1)


def named(answer: str, labels: Sequence[str], rule: str) -> int:
    """Returns the place of the one label that a generated answer names, or -1.

    It equals the label, or is its letter ("B", "(B)", "B. lung") where options have letters, or chooses
    it by the rule of closed questions (closed.py). A refusal, and an answer that names several, name
    none; of labels that contain each other ("lung", "left lung") the longest that is said counts.
    """
    place = place_of(answer, labels)
    if place >= 0:
        return place
    if rule == OPTIONS:
        letter = re.match(r"\s*(?:\(([A-Z])\)|([A-Z])(?:[).:]|\s*$))\s*(.*)", answer, re.DOTALL)
        if letter:
            place, rest = LETTERS.index(letter[1] or letter[2]), letter[3]
            fits = place < len(labels) and canonical(rest) in ("", canonical(labels[place]))
            return place if fits else -1
    words, said = [tokens(label) for label in labels], tokens(answer)
    found = [i for i, own in enumerate(words) if _within(own, said)]
    longest = [i for i in found if not any(_within(words[i], words[j]) for j in found if j != i)]
    chosen = [i for i in longest if closed_accuracy(answer, labels[i])]
    return chosen[0] if len(chosen) == 1 else -1


def _within(inner: Sequence[str], outer: Sequence[str]) -> bool:
    """Says whether words stand together within others."""
    starts = range(len(outer) - len(inner) + 1)
    return any(list(outer[i : i + len(inner)]) == list(inner) for i in starts)
