"""Scores of single answers and their summaries: as published, and corrected.

*Published* functions reproduce the evaluation of Uni-Med and of Med-MoE with its flaws (facts: a repeated word earns
full F1, "no" is found in "normal", boxes are one pixel too wide), so that numbers compare with the papers.
*Corrected* scores mend them. A corrected score is a `Measure`: a function of sums over items, so that a
bootstrap over clusters of items is one matrix product. Report metrics that need Java or `rouge` stand in
`report_metrics.py`.
"""

import dataclasses
import functools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unimed_jax.data.prompts import text_to_box

Box = tuple[float, float, float, float]

# ---------------------------------------------------------------------------------------------
# As published
# ---------------------------------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(_NUMBERS)}
# The VQA challenge's contractions. Its table lists each form with exactly one apostrophe missing.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # turned round in that table, so here too


def normalise_answer(text: str) -> str:
    """The published answer normaliser (that of the VQA challenge): "The Left-Lung, (2)." -> "left lung 2"."""
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
    """What the published evaluation does to every prediction but a box."""
    return text.lower().replace("<unk>", "").strip()


def published_f1(prediction: str, reference: str) -> float:
    """Word F1 that counts a shared word as often as the prediction repeats it: "heart heart" / "heart" = 1."""
    return published_overlap(prediction, reference)[0]


def published_overlap(prediction: str, reference: str) -> tuple[float, float, float]:
    """(F1, precision, recall) of normalised words; recall is Med-MoE's score of open questions."""
    candidate, target = (Counter(normalise_answer(text).split()) for text in (prediction, reference))
    hit = sum(n for word, n in candidate.items() if word in target)
    false = sum(n for word, n in candidate.items() if word not in target)
    missed = sum(n for word, n in target.items() if word not in candidate)
    if not hit:
        return 0.0, 0.0, 0.0
    precision, recall = hit / (hit + false), hit / (hit + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


def published_bleu(prediction: str, reference: str) -> list[float]:
    """Sentence BLEU-1..4 of normalised words, equal weights, unsmoothed as nltk does it.

    nltk replaces a precision of zero by the smallest double, hence values such as 1e-154.
    """
    sums = bleu_sums(normalise_answer(prediction).split(), normalise_answer(reference).split())
    return [float(bleu(sums, order, floor=sys.float_info.min)) for order in (1, 2, 3, 4)]


def published_contains(prediction: str, reference: str) -> bool:
    """Closed accuracy: the reference is a substring of the prediction, both normalised."""
    return normalise_answer(reference) in normalise_answer(prediction)


def published_equal(prediction: str, reference: str) -> bool:
    """Accuracy of REG and classification: equality after normalisation."""
    return normalise_answer(reference) == normalise_answer(prediction)


def published_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2 in pixels whose ends count as inside (+1)."""
    return _iou(a, b, 1.0)


def answer_report(
    pairs: Sequence[tuple[str, str]], accuracy: Callable[[str, str], bool] | None = None
) -> dict[str, float]:
    """Means over (prediction, reference) pairs: bleu1..bleu4, f1 and, where a rule is given, accuracy."""
    bleus = np.mean([published_bleu(*pair) for pair in pairs], axis=0)
    report = {f"bleu{i + 1}": float(value) for i, value in enumerate(bleus)}
    report["f1"] = float(np.mean([published_f1(*pair) for pair in pairs]))
    if accuracy:
        report["accuracy"] = float(np.mean([accuracy(*pair) for pair in pairs]))
    return report


def vqa_report(pairs: Sequence[tuple[str, str]], closed: Sequence[bool]) -> dict[str, dict[str, float]]:
    """The published VQA scores: {"open", "closed", "all"}, a part without a question left out."""
    parts = {
        "open": [pair for pair, is_closed in zip(pairs, closed, strict=True) if not is_closed],
        "closed": [pair for pair, is_closed in zip(pairs, closed, strict=True) if is_closed],
        "all": list(pairs),
    }
    rules = {"closed": published_contains}
    return {name: answer_report(part, rules.get(name)) for name, part in parts.items() if part}


def identify_report(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The published REG scores."""
    return answer_report(pairs, published_equal)


def refer_report(
    predictions: Sequence[str], boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """The published REC scores; `boxes` in pixels, `sizes` (width, height) in pixels."""
    ious = [
        published_iou(box, truth) if (box := predicted_box(text, size)) else 0.0
        for text, truth, size in zip(predictions, boxes, sizes, strict=True)
    ]
    return {"miou": float(np.mean(ious)), "accuracy": float(np.mean(np.array(ious) > 0.5))}


def medmoe_scores(prediction: str, reference: str) -> dict[str, float]:
    """Med-MoE's published scores of one answer; its means over open questions are `open_*`, over closed `closed_*`.

    exact_match: distinct words of the reference that were said, over all words said. recall is what its table calls
    open accuracy. bleu1..3: precision of n-grams of that length alone, of raw words, 0.1 in place of no match, times
    the brevity penalty. contains: closed accuracy, the reference anywhere in the prediction, also within a word.
    """
    prediction, reference = prediction.lower(), reference.lower()
    said, wanted = normalise_answer(prediction).split(), set(normalise_answer(reference).split())
    f1, precision, recall = published_overlap(prediction, reference)
    sums = bleu_sums(prediction.split(), reference.split())
    matched, counted, (length, target) = sums[:4], np.maximum(sums[4:8], 1), sums[8:]
    brevity = np.exp(min(0.0, 1 - target / length)) if matched[0] else 0.0
    return {
        "exact_match": len(wanted & set(said)) / len(said) if said else 0.0,
        **{"f1": f1, "precision": precision, "recall": recall},
        **{f"bleu{n + 1}": float(brevity * (matched[n] or 0.1) / counted[n]) for n in range(3)},
        "contains": float(reference in prediction),
    }


def medmoe_kind(answer_type: str) -> str | None:
    """Which of its averages Med-MoE counts an answer in; others are left out."""
    return {"open": "open", "OPEN": "open", "close": "closed", "CLOSED": "closed"}.get(answer_type)


def medmoe_report(pairs: Sequence[tuple[str, str]], answer_types: Sequence[str]) -> dict[str, float]:
    """Med-MoE's published table, in per cent, of (prediction, reference) pairs (see `medmoe_kind`)."""
    names = {
        "open": ("exact_match", "f1", "precision", "recall", "bleu1", "bleu2", "bleu3"),
        "closed": ("contains", "f1", "precision", "recall"),
    }
    report = {}
    for kind in names:
        rows = [medmoe_scores(*p) for p, word in zip(pairs, answer_types, strict=True) if medmoe_kind(word) == kind]
        for name in names[kind] if rows else ():
            label = "accuracy" if name == "contains" else name
            report[f"{kind}_{label}"] = 100 * float(np.mean([row[name] for row in rows]))
    return report


def is_closed(meta: Mapping[str, str]) -> bool:
    """A closed question: answer_type is CLOSED (SLAKE, VQA-RAD), close (Med-MoE's files) or yes/no (Path-VQA)."""
    return meta.get("answer_type", "").strip().lower() in ("closed", "close", "yes/no")


def predicted_box(text: str, size: tuple[int, int]) -> Box | None:
    """The box at the beginning of an answer, in pixels of an image of `size` (width, height), or None."""
    percent = text_to_box(text)
    if percent is None:
        return None
    width, height = size
    x1, y1, x2, y2 = percent
    return x1 / 100 * width, y1 / 100 * height, x2 / 100 * width, y2 / 100 * height


# ---------------------------------------------------------------------------------------------
# Corrected
# ---------------------------------------------------------------------------------------------


def canonical(text: str) -> str:
    """Lower case, single blanks, no closing punctuation: all that exact match forgives."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split()).rstrip(" .,;:!?")


def tokens(text: str) -> list[str]:
    """Words and numbers: "3.5 cm, T1-weighted." -> ["3.5", "cm", "t1", "weighted"]."""
    return re.findall(r"\d+(?:\.\d+)+|\w+(?:'\w+)?", unicodedata.normalize("NFKC", text).lower())


def exact_match(prediction: str, reference: str) -> bool:
    """Equality of `canonical` forms; an empty prediction is wrong."""
    prediction = canonical(prediction)
    return bool(prediction) and prediction == canonical(reference)


def token_f1(prediction: str, reference: str) -> float:
    """F1 of token multisets: a word counts as often as both sides hold it, so repetition costs precision."""
    candidate, target = Counter(tokens(prediction)), Counter(tokens(reference))
    shared = (candidate & target).total()
    return 2 * shared / (candidate.total() + target.total()) if shared else 0.0


def token_recall(prediction: str, reference: str) -> float:
    """The share of the reference's tokens that were said, each as often as it stands there."""
    candidate, target = Counter(tokens(prediction)), Counter(tokens(reference))
    return (candidate & target).total() / target.total() if target else 0.0


def closed_accuracy(prediction: str, reference: str) -> bool:
    """The reference's words stand together in the prediction as whole words; "yes or no" answers neither."""
    said, wanted = tokens(prediction), tokens(reference)
    if wanted in (["yes"], ["no"]) and {"yes", "no"} <= set(said):
        return False
    starts = range(len(said) - len(wanted) + 1)
    return bool(wanted) and any(said[i : i + len(wanted)] == wanted for i in starts)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes x1, y1, x2, y2 whose ends are outside; 0 for an empty or inverted box."""
    return _iou(a, b, 0.0) if a[2] > a[0] and a[3] > a[1] else 0.0


def _iou(a: Sequence[float], b: Sequence[float], extra: float) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + extra)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + extra)
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if width * height else 0.0


def ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """How often each run of `order` words occurs."""
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def bleu_sums(prediction: Sequence[str], reference: Sequence[str]) -> np.ndarray:
    """What BLEU adds up: float64 [10] = matched n-grams 1..4, predicted n-grams 1..4, both lengths."""
    matched, predicted = [], []
    for order in (1, 2, 3, 4):
        candidate, target = ngrams(prediction, order), ngrams(reference, order)
        matched.append((candidate & target).total())
        predicted.append(candidate.total())
    return np.array([*matched, *predicted, len(prediction), len(reference)], np.float64)


def bleu(sums: np.ndarray, order: int = 4, floor: float = 0.0) -> np.ndarray:
    """BLEU with one reference from `bleu_sums` [..., 10] added over items -> [...].

    A precision of zero becomes `floor`; without any matched word the score is 0.
    """
    precision = sums[..., :order] / np.maximum(sums[..., 4 : 4 + order], 1)  # [..., order]
    with np.errstate(divide="ignore"):
        logs = np.log(np.where(precision > 0, precision, floor))
    length, target = sums[..., 8], sums[..., 9]
    brevity = np.exp(np.minimum(0.0, 1 - target / np.maximum(length, 1e-9)))
    return np.where(sums[..., 0] > 0, brevity * np.exp(logs.mean(-1)), 0.0)


# ---------------------------------------------------------------------------------------------
# Measures and their intervals
# ---------------------------------------------------------------------------------------------


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A score of many items that depends on sums over them alone."""

    items: np.ndarray  # float64 [n, K]
    score: Callable[[np.ndarray], np.ndarray] = _ratio  # sums [..., K] -> [...]; NaN where no item counts

    @classmethod
    def mean(cls, values: Sequence[float]) -> "Measure":
        """Mean of one value an item."""
        return cls(np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1))

    def where(self, chosen: Sequence[bool] | np.ndarray) -> "Measure":
        """The same score of the chosen items."""
        return Measure(self.items * np.asarray(chosen, np.float64)[:, None], self.score)

    @property
    def value(self) -> float:
        return float(self.score(self.items.sum(0)))


def corrected_measures(
    task: str, predictions: Sequence[str], references: Sequence[str], **context
) -> dict[str, Measure]:
    """The corrected scores of a task, its primary metric first.

    refer needs boxes=[(x1, y1, x2, y2)] and sizes=[(width, height)] in pixels; vqa needs closed=[bool].
    Raises KeyError for an unknown task.
    """
    if task == "refer":
        found = [predicted_box(text, size) for text, size in zip(predictions, context["sizes"], strict=True)]
        ious = [iou(box, truth) if box else 0.0 for box, truth in zip(found, context["boxes"], strict=True)]
        return {
            "miou": Measure.mean(ious),
            "accuracy_iou50": Measure.mean([value > 0.5 for value in ious]),
            "parsed": Measure.mean([box is not None for box in found]),
        }
    pairs = list(zip(predictions, references, strict=True))
    f1 = Measure.mean([token_f1(*pair) for pair in pairs])
    if task == "caption":
        sums = np.stack([bleu_sums(tokens(prediction), tokens(reference)) for prediction, reference in pairs])
        bleus = {name: Measure(sums, functools.partial(bleu, order=order)) for name, order in _CAPTION_BLEUS.items()}
        return bleus | {"token_f1": f1}
    exact = Measure.mean([exact_match(*pair) for pair in pairs])
    measures = {"exact_match": exact, "token_f1": f1}
    if task == "vqa":
        closed = np.array(context["closed"], bool)
        parts = {
            "open_exact_match": exact.where(~closed),
            "open_token_f1": f1.where(~closed),
            "open_recall": Measure.mean([token_recall(*pair) for pair in pairs]).where(~closed),
            "closed_exact_match": exact.where(closed),
            "closed_accuracy": Measure.mean([closed_accuracy(*pair) for pair in pairs]).where(closed),
        }
        measures |= {name: part for name, part in parts.items() if np.isfinite(part.value)}
    return measures


_CAPTION_BLEUS = {"bleu4_regex_tokens": 4, "bleu1_regex_tokens": 1}  # corpus BLEU of `tokens`

# The metric on which a model and its blind baselines are compared.
PRIMARY = {
    "vqa": "exact_match",
    "refer": "miou",
    "identify": "exact_match",
    "caption": "bleu4_regex_tokens",
    "cls": "exact_match",
    "qa": "exact_match",
}


def resample(measures: Sequence[Measure], clusters: Sequence[str], resamples: int, seed: int) -> list[np.ndarray]:
    """Bootstrap over clusters: float64 [resamples] per measure, the r-th draw the same for all of them.

    Every draw takes as many clusters as there are, with replacement, each with all its items.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    columns = np.concatenate([measure.items for measure in measures], axis=1)  # [n, sum K]
    sums = np.zeros((len(names), columns.shape[1]))  # [G, sum K]
    np.add.at(sums, index, columns)
    rng = np.random.default_rng(seed)
    share = np.full(len(names), 1 / len(names))
    block = max(1, 2**22 // len(names))  # bounds the memory of many clusters
    blocks = [
        rng.multinomial(len(names), share, size=min(block, resamples - start)) @ sums
        for start in range(0, resamples, block)
    ]
    drawn = np.concatenate([np.zeros((0, sums.shape[1])), *blocks])  # [resamples, sum K]
    ends = np.cumsum([measure.items.shape[1] for measure in measures])
    return [measure.score(part) for measure, part in zip(measures, np.split(drawn, ends[:-1], axis=1), strict=True)]


def interval(draws: np.ndarray) -> list[float] | None:
    """95 % percentile interval [lo, hi]; draws in which no item counts (NaN) are left out; None if all are."""
    draws = draws[np.isfinite(draws)]
    return [float(q) for q in np.percentile(draws, [2.5, 97.5])] if len(draws) else None
