"""Computes scores as the published evaluations of Uni-Med and Med-MoE do, flaws included."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from unimed_jax.data.box_text import text_to_box
from unimed_jax.evaluate.metrics.boxes import Box, in_pixels, overlap
from unimed_jax.evaluate.metrics.text import bleu, bleu_sums

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(_NUMBERS)}


# The VQA challenge's contractions. Its table lists each form with exactly one apostrophe missing.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # turned round in that table, so here too


def normalise_answer(text: str) -> str:
    """Normalises as published (VQA challenge): "The Left-Lung, (2)." -> "left lung 2"."""
    out = text
    digits_with_comma = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or digits_with_comma else " ")
    # The original passes a flag, 32, where the count belongs.
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    words = [_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(words).replace(",", "")


def clean_prediction(text: str) -> str:
    """Cleans a prediction as the published evaluation does, except for boxes."""
    return text.lower().replace("<unk>", "").strip()


def published_f1(prediction: str, reference: str) -> float:
    """Computes word F1 that counts repetitions as right: "heart heart" for "heart" is 1."""
    return published_overlap(prediction, reference)[0]


def published_overlap(prediction: str, reference: str) -> tuple[float, float, float]:
    """Computes (F1, precision, recall) of normalised words.

    Med-MoE scores open questions by recall.
    """
    candidate, target = (Counter(normalise_answer(text).split()) for text in (prediction, reference))
    hit = sum(n for word, n in candidate.items() if word in target)
    false = sum(n for word, n in candidate.items() if word not in target)
    missed = sum(n for word, n in target.items() if word not in candidate)
    if not hit:
        return 0.0, 0.0, 0.0
    precision, recall = hit / (hit + false), hit / (hit + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


def published_bleu(prediction: str, reference: str) -> list[float]:
    """Computes sentence BLEU-1..4 of normalised words, equal weights, unsmoothed as nltk does it.

    nltk replaces a precision of zero by the smallest double, hence values such as 1e-154.
    """
    sums = bleu_sums(normalise_answer(prediction).split(), normalise_answer(reference).split())
    return [
        float(bleu(sums, order, floor=sys.float_info.min, every_order=True)) for order in (1, 2, 3, 4)
    ]


def published_contains(prediction: str, reference: str) -> bool:
    """Says whether the prediction contains the reference, both normalised.

    This is the rule of closed accuracy.
    """
    return normalise_answer(reference) in normalise_answer(prediction)


def published_equal(prediction: str, reference: str) -> bool:
    """Says whether both are equal after normalisation (accuracy of REG and classification)."""
    return normalise_answer(reference) == normalise_answer(prediction)


def published_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Computes intersection over union of boxes x1, y1, x2, y2 in pixels, ends included (+1)."""
    return overlap(a, b, 1.0)


def answer_report(
    pairs: Sequence[tuple[str, str]], accuracy: Callable[[str, str], bool] | None = None
) -> dict[str, float]:
    """Averages bleu1..bleu4, f1 and, given its rule, accuracy over pairs.

    A pair is (prediction, reference).
    """
    bleus = np.mean([published_bleu(*pair) for pair in pairs], axis=0)
    report = {f"bleu{i + 1}": float(value) for i, value in enumerate(bleus)}
    report["f1"] = float(np.mean([published_f1(*pair) for pair in pairs]))
    if accuracy:
        report["accuracy"] = float(np.mean([accuracy(*pair) for pair in pairs]))
    return report


def vqa_report(pairs: Sequence[tuple[str, str]], closed: Sequence[bool]) -> dict[str, dict[str, float]]:
    """Computes the published VQA scores {"open", "closed", "all"}.

    Parts without a question are absent.
    """
    parts = {
        "open": [pair for pair, is_closed in zip(pairs, closed, strict=True) if not is_closed],
        "closed": [pair for pair, is_closed in zip(pairs, closed, strict=True) if is_closed],
        "all": list(pairs),
    }
    rules = {"closed": published_contains}
    return {name: answer_report(part, rules.get(name)) for name, part in parts.items() if part}


def identify_report(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Computes the published REG scores."""
    return answer_report(pairs, published_equal)


def refer_report(
    predictions: Sequence[str], boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Computes the published REC scores; `boxes` in pixels, `sizes` (width, height) in pixels.

    An inverted box, or one that leaves the image, is scored like any other, as published.
    """
    ious = [
        published_iou(in_pixels(box, size), truth) if (box := text_to_box(text)) else 0.0
        for text, truth, size in zip(predictions, boxes, sizes, strict=True)
    ]
    return {"miou": float(np.mean(ious)), "accuracy": float(np.mean(np.array(ious) > 0.5))}


def medmoe_scores(prediction: str, reference: str) -> dict[str, float]:
    """Computes Med-MoE's published scores of one answer.

    Their means over open questions are reported as `open_*`, over closed ones as `closed_*`.

    exact_match: distinct words of the reference that were said, over all words said. recall: what
    the published table calls open accuracy. bleu1..3: precision of n-grams of only that length, of
    raw words, 0.1 in place of no match, times the brevity penalty. contains: closed accuracy, the
    reference anywhere in the prediction, also within a word.
    """
    prediction, reference = prediction.lower(), reference.lower()
    said, wanted = normalise_answer(prediction).split(), set(normalise_answer(reference).split())
    f1, precision, recall = published_overlap(prediction, reference)
    sums = bleu_sums(prediction.split(), reference.split())
    matched, counted, (length, target) = sums[:4], np.maximum(sums[4:8], 1), sums[8:10]
    brevity = np.exp(min(0.0, 1 - target / length)) if matched[0] else 0.0
    return {
        "exact_match": len(wanted & set(said)) / len(said) if said else 0.0,
        **{"f1": f1, "precision": precision, "recall": recall},
        **{f"bleu{n + 1}": float(brevity * (matched[n] or 0.1) / counted[n]) for n in range(3)},
        "contains": float(reference in prediction),
    }


def medmoe_kind(answer_type: str) -> str:
    """Names the averages in which Med-MoE counts an answer: "open", "closed" or "ignored"."""
    return {"open": "open", "OPEN": "open", "close": "closed", "CLOSED": "closed"}.get(
        answer_type, "ignored"
    )


def medmoe_report(pairs: Sequence[tuple[str, str]], answer_types: Sequence[str]) -> dict[str, float]:
    """Computes Med-MoE's published table, in per cent, from (prediction, reference) pairs."""
    names = {
        "open": ("exact_match", "f1", "precision", "recall", "bleu1", "bleu2", "bleu3"),
        "closed": ("contains", "f1", "precision", "recall"),
    }
    report = {}
    for kind in names:
        rows = [
            medmoe_scores(*p)
            for p, word in zip(pairs, answer_types, strict=True)
            if medmoe_kind(word) == kind
        ]
        for name in names[kind] if rows else ():
            label = "accuracy" if name == "contains" else name
            report[f"{kind}_{label}"] = 100 * float(np.mean([row[name] for row in rows]))
    return report
