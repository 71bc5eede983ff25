"""Checks Uni-Med's golden cases that need no model.

They are about preprocessing, text, scores, schedules and the mixture of data sets.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from support import golden_uni_med as golden_files

from unimed_jax.config import OptimizerConfig
from unimed_jax.data import fitting, forms
from unimed_jax.data.order import source_order
from unimed_jax.evaluate.metrics import published
from unimed_jax.evaluate.metrics import text as text_scores
from unimed_jax.model.vision import normalise, resize_positions
from unimed_jax.train.optimizer import learning_rate


def close(actual, expected, tolerance, what):
    worst = (
        float(np.max(np.abs(np.asarray(actual) - np.asarray(expected)))) if np.size(expected) else 0.0
    )
    assert np.shape(actual) == np.shape(expected) and worst <= tolerance, (
        f"{what}: {worst:.2e} > {tolerance:.0e}"
    )


def published_schedule(args) -> tuple[OptimizerConfig, int]:
    """Translates the published schedule's arguments, and counts all steps."""
    start = args["warmup_start_lr"] if args["warmup_start_lr"] >= 0 else args["init_lr"]
    optimizer = OptimizerConfig(
        lr=args["init_lr"], min_lr=args["min_lr"], warmup_lr=start, warmup_steps=args["warmup_steps"]
    )
    return optimizer, args["max_epoch"] * args["iters_per_epoch"]


def aux_preprocess(rows, tensors, entries):
    vision = golden_files.VisionConfig()
    for row in rows:
        image = tensors[f"{row['key']}.uint8_hwc"]
        assert list(image.shape[:2]) == row["in_hw"]
        out = normalise(jnp.asarray(fitting.resize(image, row["image_size"])), vision, "float32")
        close(np.asarray(out).transpose(2, 0, 1), tensors[f"{row['key']}.out_chw"], 1e-5, row["key"])
    for key in tensors:
        if key.endswith("posembed.in") or key == "posembed.in":
            out = tensors[key.replace(".in", ".out")]
            grid = round((out.shape[1] - 1) ** 0.5)
            close(resize_positions(tensors[key][0], grid, 1), out[0], 1e-5, "position resize")


def aux_text(rows, tensors, entries):
    for text, expected in rows:
        assert forms.cut_words(text, 50) == expected


def aux_normalize_word(rows, tensors, entries):
    for text, expected in rows:
        assert published.normalise_answer(text) == expected


def aux_iou(rows, tensors, entries):
    for a, b, expected in rows:
        assert published.published_iou(a, b) == pytest.approx(expected, abs=1e-12)


def aux_sentence(rows, tensors, entries):
    for row in rows:
        pair = row["answer_pred"], row["answer_gt"]
        assert published.published_f1(*pair) == approx(row["f1"]), pair
        assert published.published_bleu(*pair) == [
            approx(row["bleu"][f"bleu{i}"]) for i in (1, 2, 3, 4)
        ], pair
        assert published.published_contains(*pair) == row["acc_contains"], pair
        assert published.published_equal(*pair) == row["acc_exact"], pair


def aux_vqa_report(value, tensors, entries):
    rows = entries["sentence"]
    pairs = [(row["answer_pred"], row["answer_gt"]) for row in rows]
    report = published.vqa_report(
        pairs, [text_scores.is_closed({"answer_type": row["answer_type"]}) for row in rows]
    )
    assert report == {part: published_scores(scores) for part, scores in value.items()}


def aux_identify_report(value, tensors, entries):
    pairs = [(row["answer_pred"], row["answer_gt"]) for row in entries["sentence"]]
    assert published.identify_report(pairs) == published_scores(value)


def published_scores(value) -> dict:
    """Translates the original's names of a report's scores."""
    names = {"f1": value["f1_score"]} | (
        {"accuracy": value["acc_score"]} if "acc_score" in value else {}
    )
    return {name: approx(score) for name, score in {**value["bleu_scores"], **names}.items()}


def approx(value):
    """Compares only relatively, as unsmoothed BLEU is as small as 1e-154."""
    return pytest.approx(value, rel=1e-9, abs=0)


def aux_lr(rows, tensors, entries):
    for table in rows:
        optimizer, total = published_schedule(table["args"])
        for epoch, step, expected in table["rows"]:
            lr = learning_rate(epoch * table["args"]["iters_per_epoch"] + step, total, optimizer)
            assert lr == pytest.approx(expected, rel=1e-9), (epoch, step)


def aux_multi_iter(value, tensors, entries):
    order = source_order(value["ratios"], value["python_random_seed"])
    assert [next(order) for _ in value["first_100"]] == value["first_100"]


AUX = {
    name.removeprefix("aux_"): function
    for name, function in list(globals().items())
    if name.startswith("aux_")
}
