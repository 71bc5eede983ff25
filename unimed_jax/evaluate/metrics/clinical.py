"""Scores radiology reports by what they state, with models that the package radeval wraps.

Each is computed only where an entry of config.evaluate.entries names it, since radeval (extra
`clinical`) fetches the weights of its models from the network when it runs. Where it or they are missing
the score is "not computed: needs weights": no other metric stands in for it.
"""

from collections.abc import Sequence

import numpy as np

from unimed_jax.evaluate.metrics.registry import NotComputed, Record, metric, pairs
from unimed_jax.evaluate.statistics import Measure

NEEDS_WEIGHTS = "not computed: needs weights"
# our name -> radeval's name of the metric, and of its score of each report
METRICS = {
    "radgraph_f1": ("radgraph", "radgraph_partial"),
    "chexbert_5_accuracy": ("f1chexbert", "f1chexbert_sample_acc_5"),
    "ratescore": ("ratescore", "ratescore"),
    "green": ("green", "green"),
}


def _scored(name: str, records: Sequence[Record]) -> Measure:
    """Computes radeval's score of each report, averaged.

    Raises NotComputed where the package or weights are missing, where it fails, and where it gives no
    number.
    """
    theirs, key = METRICS[name]
    try:
        from radeval import RadEval
    except ImportError as error:
        raise NotComputed(f"{NEEDS_WEIGHTS} (pip install 'unimed-jax[clinical]')") from error
    said, wanted = (list(texts) for texts in zip(*pairs(records), strict=True))
    try:
        evaluator = RadEval(metrics=[theirs], per_sample=True, show_progress=False)
        values = np.asarray(evaluator(refs=wanted, hyps=said)[key], np.float64)
    except OSError as error:  # of the network, or of a file that is not there
        raise NotComputed(f"{NEEDS_WEIGHTS} (radeval: {type(error).__name__})") from error
    except Exception as error:  # of the models' many libraries
        said_by_them = " ".join(str(error).split())[:200]
        raise NotComputed(
            f"not computed: radeval failed ({type(error).__name__}: {said_by_them})"
        ) from error
    if values.shape != (len(records),) or not np.isfinite(values).all():
        raise NotComputed(f"not computed: radeval gave no value for some of {len(records)} reports")
    return Measure.mean(values.tolist())


@metric("radgraph_f1", baselines=False)
def radgraph_f1(records: Sequence[Record]) -> Measure:
    """Computes RadGraph-F1: entities, and whether they have relations (radeval's "partial")."""
    return _scored("radgraph_f1", records)


@metric("chexbert_5_accuracy", baselines=False)
def chexbert_5_accuracy(records: Sequence[Record]) -> Measure:
    """Computes the share of CheXbert's five main findings on which both reports agree."""
    return _scored("chexbert_5_accuracy", records)


@metric("ratescore", baselines=False)
def ratescore(records: Sequence[Record]) -> Measure:
    """Computes RaTEScore: similarity of medical entities."""
    return _scored("ratescore", records)


@metric("green", baselines=False)
def green(records: Sequence[Record]) -> Measure:
    """Computes GREEN: errors that a language model of 7B parameters finds."""
    return _scored("green", records)
