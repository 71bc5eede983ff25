"""Scores as published keep their flaws, corrected scores mend them, and intervals cover."""

import os
import re
import stat
import subprocess

import numpy as np
import pytest

from unimed_jax.config import TASKS
from unimed_jax.errors import UserError
from unimed_jax.evaluate import metrics
from unimed_jax.evaluate.metrics import boxes, captions, published, registry, text
from unimed_jax.evaluate.report.markdown import about_margin
from unimed_jax.evaluate.statistics import Measure, interval, resample, with_interval


def record(prediction, reference="", closed=False, box=None, size=None):
    kind = "CLOSED" if closed else "OPEN"
    return {
        "prediction": prediction,
        "reference": reference,
        "box": box,
        "image_size": size,
        "meta": {"answer_type": kind},
    }


def corrected_measures(task, predictions, references, boxes=None, sizes=None, closed=None):
    """All registered metrics of a task, for parallel lists, but for CIDEr, which starts Java."""
    n = len(predictions)
    columns = zip(
        predictions,
        references,
        closed or [False] * n,
        boxes or [None] * n,
        sizes or [None] * n,
        strict=True,
    )
    rows = [record(said, wanted, *rest) for said, wanted, *rest in columns]
    found = {metric.name: metric(rows) for metric in metrics.of_task(task) if metric.name != "cider"}
    return {name: measure for name, measure in found.items() if np.isfinite(measure.value)}


# ------------------------------------------------------------------------------ as published


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Left-Lung, is (normal).", "left lung is normal"),
        ("x-ray; CT/MRI", "x ray ct mri"),
        ("x -ray", "x ray"),  # a mark next to a blank goes ...
        ("a-b x -ray", "ab x ray"),  # ... everywhere it stands
        ("3,000 mg of x-ray", "3000 mg of xray"),  # digit,digit deletes every mark
        ("3.5 cm. None", "3.5 cm 0"),
        ("v1.a", "v1a"),
        ("two lungs ten an apple", "2 lungs 10 apple"),
        ("dont youre yall'll 'ow'sat couldnt've", "don't you're y'all'll 'ow's'at couldn't've"),
        ("somebody'd lets shes couldntve", "somebodyd lets shes couldntve"),
    ],
)
def test_published_normaliser(text, expected):
    assert published.normalise_answer(text) == expected


def test_published_normaliser_strips_only_32_full_stops():
    assert published.normalise_answer("x." * 40) == "x" * 32 + "x." * 8


def test_published_f1_rewards_repetition_and_corrected_does_not():
    assert published.published_f1("heart heart heart", "heart") == 1.0
    assert text.token_f1("heart heart heart", "heart") == pytest.approx(0.5)
    assert (
        published.published_f1("left lung", "right lung")
        == text.token_f1("left lung", "right lung")
        == 0.5
    )
    assert published.published_f1("", "heart") == text.token_f1("", "heart") == 0.0


def test_recall_counts_repetition_and_whole_words():
    assert published.published_overlap("left lung lung", "the left lung")[2] == 1.0
    assert text.token_recall("a left lung", "left lung") == 1.0
    assert text.token_recall("lung", "lung lung") == 0.5 == text.token_recall("left", "left lung")
    assert text.token_recall("lungs", "lung") == text.token_recall("", "lung") == 0.0


def test_closed_accuracy_reads_whole_words():
    assert published.published_contains("normal", "no") and not text.closed_accuracy("normal", "no")
    assert text.closed_accuracy("No, it is not.", "no")
    assert not text.closed_accuracy("yes or no", "yes")
    assert text.closed_accuracy("on the left side", "left side")
    assert not text.closed_accuracy("side on the left", "left side")
    assert not text.closed_accuracy("", "yes")


def test_exact_match_forgives_case_blanks_and_the_closing_stop_only():
    assert text.exact_match(" Left\n lung. ", "left lung")
    assert not text.exact_match("the left lung", "left lung")
    assert not text.exact_match("3.5 cm", "35 cm")
    assert not text.exact_match("-5", "5")
    assert not text.exact_match("", "") and not text.exact_match(".", "")


def test_iou_with_and_without_the_extra_pixel():
    assert published.published_iou((0, 0, 9, 9), (5, 5, 14, 14)) == pytest.approx(25 / 175)
    assert boxes.iou((0, 0, 10, 10), (5, 5, 15, 15)) == pytest.approx(25 / 175)
    assert published.published_iou((0, 0, 10, 10), (10, 0, 20, 10)) > 0  # neighbours that only touch
    assert boxes.iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    for inverted in ((10, 0, 0, 10), (5, 5, 5, 9)):
        assert boxes.iou(inverted, (0, 0, 10, 10)) == 0


def test_predicted_box_is_scaled_to_the_image():
    assert boxes.predicted_box("{<10> <20><50><100>} there<unk>", (200, 50)) == (20.0, 10.0, 100.0, 50.0)
    assert boxes.predicted_box("box {<10><20><50><100>}", (200, 50)) is None


INVALID = {
    "inverted": "{<90><90><10><10>}",
    "inverted in x": "{<90><10><10><90>}",
    "inverted in y": "{<10><90><90><10>}",
    "beyond the image": "{<0><0><200><200>}",
    "beyond it in y": "{<0><0><50><101>}",
    "outside": "{<300><300><400><400>}",
    "a point": "{<50><50><50><50>}",
    "a line": "{<10><50><90><50>}",
}


@pytest.mark.parametrize("answer", INVALID.values(), ids=INVALID)
def test_an_answer_with_an_invalid_box_has_none(answer):
    assert boxes.predicted_box(answer, (100, 100)) is None
    truth = (0.0, 0.0, 100.0, 100.0)
    found = corrected_measures("refer", [answer], [""], boxes=[truth], sizes=[(100, 100)])
    assert {name: measure.value for name, measure in found.items()} == {
        "miou": 0.0,
        "accuracy_iou50": 0.0,
        "parsed": 0.0,
    }


def test_an_invalid_box_is_scored_as_published_where_that_is_asked():
    whole = [(0.0, 0.0, 100.0, 100.0)]
    beyond = published.refer_report(["{<0><0><200><200>}"], whole, [(100, 100)])
    assert beyond["miou"] == pytest.approx(101**2 / 201**2, rel=1e-12)
    assert published.refer_report(["{<50><50><50><50>}"], whole, [(100, 100)])["miou"] == pytest.approx(
        1 / 101**2
    )


def test_refer_report_counts_unparsed_as_zero_and_half_as_miss():
    report = published.refer_report(
        ["{<0><0><100><100>}", "left"], [(0, 0, 100, 100), (0, 0, 9, 9)], [(100, 100), (100, 100)]
    )
    assert report == {"miou": 0.5, "accuracy": 0.5}
    half = corrected_measures(
        "refer", ["{<0><0><50><100>}"], [""], boxes=[(0, 0, 100, 100)], sizes=[(100, 100)]
    )
    assert half["miou"].value == 0.5 and half["accuracy_iou50"].value == 0.0


def test_vqa_report_parts():
    report = published.vqa_report([("normal", "no"), ("lung", "lung")], [True, False])
    assert report["closed"]["accuracy"] == 1.0 and report["closed"]["f1"] == 0.0
    assert report["open"]["bleu1"] == 1.0 and "accuracy" not in report["open"]
    assert report["all"]["f1"] == 0.5
    assert "open" not in published.vqa_report([("no", "no")], [True])
    assert text.is_closed({"answer_type": "yes/no"}) and text.is_closed({"answer_type": "CLOSED "})
    assert not text.is_closed({"answer_type": "OPEN"}) and not text.is_closed({})


# ------------------------------------------------------------------------------ corrected, over items


def test_empty_predictions_lower_every_corrected_score():
    reports = ["one two three four five", "six seven eight nine ten"]
    for task, context in (("caption", {}), ("vqa", {"closed": [True, True]}), ("cls", {})):
        full = corrected_measures(task, reports, reports, **context)
        half = corrected_measures(task, [reports[0], ""], reports, **context)
        for name in full:
            assert full[name].value == pytest.approx(1.0), (task, name)
            assert half[name].value < 0.51, (task, name)


def test_corpus_bleu_by_hand():
    measure = corrected_measures("caption", ["a b c d x", "a b c d"], ["a b c d e", "a b c d e f"])
    precisions = [8 / 9, 6 / 7, 4 / 5, 2 / 3]
    expected = np.prod(precisions) ** 0.25 * np.exp(1 - 11 / 9)
    assert measure["bleu4_regex_tokens"].value == pytest.approx(expected, rel=1e-12)
    assert corrected_measures("caption", ["b a d c"], ["a b c d"])["bleu4_regex_tokens"].value == 0.0


def test_without_any_item_no_measure_has_a_score():
    """Such as a draw that misses the few clusters of a question template; a score of 0 would count."""
    for task, answer in (("vqa", "yes"), ("caption", "a b c d e")):
        for name, measure in corrected_measures(task, [answer] * 3, [answer] * 3).items():
            nothing = measure.where([False] * 3)
            assert np.isnan(nothing.value) and not nothing.counts.any(), (task, name)


def test_the_primary_metric_exists_and_needs_no_java(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    primary = {"refer": "miou", "caption": "bleu4_regex_tokens"}
    for task in TASKS:
        first, *others = metrics.of_task(task)
        assert first.name == primary.get(task, "exact_match") and first.primary_for and others
        assert not any(task in metric.primary_for for metric in others)
        assert np.isfinite(first([record("a", "a", box=(0, 0, 5, 5), size=(9, 9))]).value)


# ------------------------------------------------------------------------------ registry


@pytest.fixture
def registered(monkeypatch):
    """A registry of its own, so that a test's metrics are gone afterwards."""
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))


def short(records):
    return Measure.mean([len(record["prediction"].split()) <= 3 for record in records])


def test_a_registered_metric_is_found_and_scores(registered):
    metrics.metric("short", tasks=("vqa",))(short)
    assert metrics.find("short")([record("one two"), record("1 2 3 4")]).value == 0.5
    assert metrics.of_task("vqa")[-1].name == "short" and "short" not in {
        m.name for m in metrics.of_task("qa")
    }
    assert [m.name for m in metrics.of_task("qa", ("short", "token_f1", "short"))] == [
        "short",
        "token_f1",
    ]


def test_an_unknown_metric_is_one_sentence_with_the_nearest():
    with pytest.raises(UserError, match=r"'exact_mach' is not a metric; did you mean 'exact_match'\?"):
        metrics.find("exact_mach")
    with pytest.raises(UserError, match="module 'no_such_lab.metrics' does not import"):
        metrics.find("no_such_lab.metrics:mine")


def test_a_metric_of_a_dotted_module_is_registered_on_import(registered, tmp_path, monkeypatch):
    lines = (
        "from unimed_jax.evaluate.metrics import Measure, metric",
        "@metric('polite')",
        "def polite(records):",
        "    return Measure.mean(['please' in record['prediction'] for record in records])",
    )
    (tmp_path / "toy_lab_metrics.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = metrics.of_task("vqa", ("toy_lab_metrics:polite",))
    assert found.name == "polite" and found([record("yes please"), record("no")]).value == 0.5
    with pytest.raises(UserError, match="'toy_lab_metrics:rude' is not a metric"):
        metrics.find("toy_lab_metrics:rude")


def test_a_metric_that_does_not_fit_is_refused(registered):
    with pytest.raises(UserError, match="'vqqa' is not a task; did you mean 'vqa'"):
        metrics.metric("x", tasks=("vqqa",))
    with pytest.raises(
        UserError, match="'exact_match' is registered already by unimed_jax.evaluate.metrics.text"
    ):
        metrics.metric("exact_match")(short)
    with pytest.raises(UserError, match="task 'refer' has the primary metric 'miou' already"):
        metrics.metric("mine", primary_for=("refer",))(short)
    metrics.metric("half")(lambda records: Measure.mean([1.0]))
    with pytest.raises(
        UserError, match=r"metric 'half' must return a Measure with one row per record \(2\)"
    ):
        metrics.find("half")([record("a"), record("b")])
    metrics.metric("odd")(lambda records: Measure.mean([1.0, np.nan]))
    rows = [record(name) | {"id": name, "set": "toy"} for name in "ab"]
    with pytest.raises(UserError, match="metric 'odd' gives b no finite number; weigh records"):
        metrics.find("odd")(rows)
    metrics.metric("open")(lambda records: Measure.mean([1.0, np.nan]).where([True, False]))
    assert metrics.find("open")(rows).value == 1.0


# ------------------------------------------------------------------------------ bootstrap


def test_bootstrap_resamples_whole_clusters():
    values = np.repeat([0.0, 1.0], 50)  # two clusters that agree within
    draws = resample([Measure.mean(values)], ["a"] * 50 + ["b"] * 50, 2000, 0)[0]
    assert set(np.unique(draws)) == {0.0, 0.5, 1.0}
    assert abs(np.mean(draws == 0.5) - 0.5) < 0.05
    single = resample([Measure.mean(values)], [str(i) for i in range(100)], 2000, 0)[0]
    assert single.std() == pytest.approx(0.05, rel=0.1)


def test_bootstrap_is_deterministic_and_paired():
    rng = np.random.default_rng(0)
    values, clusters = rng.random(90), [str(i % 9) for i in range(90)]
    a, b = Measure.mean(values), Measure.mean(values - 0.25)
    first, again, other = (resample([a, b], clusters, 300, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    np.testing.assert_allclose(first[0] - first[1], 0.25, rtol=0, atol=1e-12)


def test_bootstrap_interval_covers():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        levels = rng.normal(0.5, 0.2, 40)  # the clusters differ; 6 items each
        values = np.repeat(levels, 6) + rng.normal(0, 0.2, 240)
        low, high = interval(
            resample([Measure.mean(values)], np.repeat(np.arange(40), 6), 400, trial)[0]
        )
        covered += low < 0.5 < high
    assert 0.89 <= covered / 200 <= 0.98  # taking items for independent would give about 0.7


@pytest.mark.parametrize("count, said", [(2, 0.50), (3, 0.73), (10, 0.90)])
def test_few_clusters_give_narrow_intervals_as_the_report_says(count, said):
    rng, covered = np.random.default_rng(count), 0
    for trial in range(400):
        values = Measure.mean(rng.standard_normal(count))
        low, high = interval(resample([values], list(map(str, range(count))), 400, trial)[0])
        covered += low < 0 < high
    assert covered / 400 == pytest.approx(said, abs=0.05)
    assert re.search(rf"{100 * said:.0f} % (of cases )?with {count}\b", about_margin(9))


def test_bootstrap_of_corpus_bleu_recomputes_from_summed_counts():
    predictions = ["a b c d e f", "a b x d e f", "q r s t u v"]
    references = ["a b c d e f", "a b c d e f", "q r s t z v"]
    measure = corrected_measures("caption", predictions, references)["bleu4_regex_tokens"]
    draws = resample([measure], ["0", "1", "2"], 500, 0)[0]
    possible = set()
    for i in range(3):
        for j in range(3):
            for k in range(3):
                chosen = [i, j, k]
                again = corrected_measures(
                    "caption", [predictions[c] for c in chosen], [references[c] for c in chosen]
                )
                possible.add(round(again["bleu4_regex_tokens"].value, 12))
    assert set(np.round(draws, 12)) <= possible and len(set(np.round(draws, 9))) > 5


def test_one_interval_function_serves_all():
    values = np.random.default_rng(0).random(40)
    entry = with_interval(Measure.mean(values), [str(i % 8) for i in range(40)], 300, 1)
    draws = resample([Measure.mean(values)], [str(i % 8) for i in range(40)], 300, 1)[0]
    assert entry == {"value": pytest.approx(values.mean()), "ci95": interval(draws)}
    assert with_interval(Measure.mean(values), ["one"] * 40, 300, 1)["ci95"] is None


def test_interval_leaves_out_draws_without_items():
    few = Measure.mean([1.0, 0.0]).where([True, False])
    draws = resample([few], ["a", "b"], 200, 0)[0]
    assert np.isnan(draws).any() and interval(draws) == [1.0, 1.0]
    assert interval(np.full(3, np.nan)) is None and interval(np.zeros(0)) is None


# ------------------------------------------------------------------------------ reports


def test_without_java_the_scores_say_so(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)
    scores = captions.report_scores(
        [("the heart is normal", "the heart is normal"), ("", "lost"), ("x", " ")]
    )
    for name in ("bleu1", "bleu2", "bleu3", "bleu4", "meteor"):
        assert scores[name] == "not computed: needs Java"
    assert scores["pairs_scored"] == 1 and scores["f1"] == 1.0
    assert scores["rouge_1"] == pytest.approx(1.0) and scores["rouge_l"] == pytest.approx(1.0)
    assert set(captions.report_scores([("", "lost")])) == set(scores)


def test_rouge_takes_long_and_wordless_texts():
    long = " ".join(f"w{i}" for i in range(1500))
    values = captions.rouge([(long, long), (" . ", "x")])
    assert values == pytest.approx([0.5, 0.5, 0.5], abs=1e-6)


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """A `java` written in shell, given its answers."""

    def make(script: str):
        for folder in ("tokenizer", "meteor"):
            (tmp_path / folder).mkdir()
        java = tmp_path / "java"
        java.write_text("#!/bin/sh\n" + script)
        os.chmod(java, java.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(captions, "find_java", lambda: str(java))
        monkeypatch.setattr(captions, "_package_folder", lambda: tmp_path)
        started, popen = [], subprocess.Popen

        class Recorded(popen):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                started.append(self)

        monkeypatch.setattr(subprocess, "Popen", Recorded)
        return started

    return make


def test_meteor_speaks_and_leaves_no_process(fake_java):
    started = fake_java(
        'case "$*" in *PTBTokenizer*) exec cat;; esac\n'
        'while read line; do case "$line" in\nSCORE*) echo 1 2;;\n'
        "EVAL*) echo .1; echo .9; echo .5;; esac; done"
    )
    assert captions.meteor([("a ||| b", "a"), ("", "b")]) == 0.5
    assert [process.poll() is None for process in started] == [False, False]


def test_java_that_fails_is_reported_and_closed(fake_java):
    started = fake_java("exit 3")
    scores = captions.report_scores([("a b", "a b")])
    assert scores["meteor"].startswith("not computed: ") and scores["bleu4"].startswith("not computed: ")
    assert scores["f1"] == 1.0
    with pytest.raises(RuntimeError, match="the PTB tokeniser returned"):
        captions.meteor([("a", "a")])
    # BLEU's tokeniser, METEOR's, which is tried all the same, and the one of the last line.
    assert len(started) == 3 and all(process.poll() is not None for process in started)


def test_meteor_that_ends_early_is_reported_and_closed(fake_java):
    started = fake_java('case "$*" in *PTBTokenizer*) exec cat;; esac\nexit 3')
    with pytest.raises(RuntimeError, match="ended early"):
        captions.meteor([("a", "a")])
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_ptb_tokens():
    text = "The mass\u2028(left); 3.5 cm. \n No effusion."
    if missing := captions.why_no_java_metrics():
        assert missing.startswith("not computed: needs")
        return
    expected = ["the mass -lrb- left -rrb- 3.5 cm no effusion", "", "clear"]
    assert captions.ptb_tokenise([text, "", "Clear."]) == expected


@pytest.mark.slow
def test_meteor_of_contractions_is_that_of_the_original():
    """The value is that of pycocoevalcap 1.2's own PTBTokenizer and Meteor on normalised texts.

    Without the tokeniser it is .3209: the words stay "isn't" and "there's".
    """
    pairs = [
        (
            "There isn't any pleural effusion, and the heart's size doesn't look enlarged.",
            "The heart isn't enlarged; there's no pleural effusion.",
        ),
        (
            "It wasn't possible to exclude a fracture (left rib).",
            "A fracture of the left rib couldn't be excluded.",
        ),
        ("The patient's lungs are clear.", "Lungs are clear, they're well expanded."),
        ("We can't see the lesion that's 3.5 cm wide.", "The lesion wasn't seen; it's 3.5 cm."),
        ("No acute findings.", "There are no acute findings."),
        ("The mass hasn't grown, o'clock position 3.", "The mass didn't grow."),
    ]
    found = captions.report_scores(pairs)["meteor"]
    missing = captions.why_no_java_metrics()
    assert found == (missing or pytest.approx(0.36137551712135835, abs=1e-9))
