"""Scores of single answers and their summaries: as published, and corrected.

*Published* functions reproduce the evaluation of Uni-Med and of Med-MoE with its flaws (facts: a repeated word earns
full F1, "no" is found in "normal", boxes are one pixel too wide), so that numbers compare with the papers.
*Corrected* scores mend them. A corrected score is a `Measure`: a function of sums over items, so that a
bootstrap over clusters of items is one matrix product. Report metrics that need Java or `rouge` stand in
`captions.py`.
"""

import functools
from collections.abc import Sequence

import numpy as np

from unimed_jax.evaluate.metrics.boxes import iou, predicted_box
from unimed_jax.evaluate.metrics.text import (
    bleu,
    bleu_sums,
    closed_accuracy,
    exact_match,
    token_f1,
    token_recall,
    tokens,
)
from unimed_jax.evaluate.statistics import Measure

# ---------------------------------------------------------------------------------------------
# As published
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Corrected
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Measures and their intervals
# ---------------------------------------------------------------------------------------------


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
