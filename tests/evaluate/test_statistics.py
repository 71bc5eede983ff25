"""Two models on the same items: differences, exact tests, and verdicts corrected for their number."""

import warnings

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp, ttest_rel

from unimed_jax.evaluate.statistics import (
    Difference,
    Measure,
    Ranked,
    holm,
    mcnemar,
    paired,
    resample,
    verdicts,
    with_interval,
)

RNG = np.random.default_rng(0)


def shares(chance, items=400, rng=RNG):
    return (rng.random(items) < chance).astype(float)


def test_a_model_beside_itself_is_undecided():
    measure, clusters = Measure.mean(shares(0.6)), [str(i % 40) for i in range(400)]
    found = paired([measure], [measure], clusters, 200, 0)
    assert (found.value, found.p, found.ci95) == (0.0, 1.0, [0.0, 0.0])
    assert verdicts([found]) == [{"p_holm": 1.0, "verdict": "undecided"}]
    assert mcnemar(measure.right, measure.right) == 1.0


def test_a_planted_difference_has_its_sign():
    clusters = [str(i % 40) for i in range(400)]
    good, bad = Measure.mean(shares(0.8)), Measure.mean(shares(0.5))
    for ours, theirs, verdict in ((good, bad, "better"), (bad, good, "worse")):
        found = paired([ours], [theirs], clusters, 500, 0)
        assert found.value == ours.value - theirs.value and found.p < 1e-6
        assert verdicts([found, Difference(0.1, p=0.9)])[0]["verdict"] == verdict
        low, high = found.ci95
        assert low < found.value < high and (low > 0) == (verdict == "better")


def test_with_a_cluster_for_each_item_p_is_that_of_the_paired_t_test():
    ours, theirs = RNG.random(300), RNG.random(300) + 0.03
    measures = [Measure.mean(ours)], [Measure.mean(theirs)]
    found = paired(*measures, [str(i) for i in range(300)], 4000, 1)
    assert found.p == pytest.approx(ttest_rel(ours, theirs).pvalue, rel=0.2) and found.freedom == 299


def test_clusters_without_an_item_that_counts_change_nothing():
    """A column of one set has the same interval beside a large other one."""
    ours, theirs = shares(0.7, 60), shares(0.5, 60)
    names = [str(i % 6) for i in range(60)]
    alone = paired([Measure.mean(ours)], [Measure.mean(theirs)], names, 500, 0)
    every = np.arange(360) < 60
    wide = [Measure.mean(np.pad(values, (0, 300))).where(every) for values in (ours, theirs)]
    beside = paired(wide[:1], wide[1:], names + [f"other {i}" for i in range(300)], 500, 0)
    assert beside == alone


def test_equal_items_within_clusters_count_once():
    """Each item ten times over is no more evidence, if the copies share its cluster."""
    ours, theirs = shares(0.7, 60), shares(0.6, 60)
    one = paired([Measure.mean(ours)], [Measure.mean(theirs)], list("ab" * 30), 500, 0)
    names = [str(i) for i in range(60)]
    single = paired([Measure.mean(ours)], [Measure.mean(theirs)], names, 500, 0)
    copied = [Measure.mean(np.tile(values, 10)) for values in (ours, theirs)]
    again = paired(copied[:1], copied[1:], names * 10, 500, 0)
    assert again.p == pytest.approx(single.p) and one.freedom == 1
    assert paired([Measure.mean(ours)], [Measure.mean(theirs)], ["a"] * 60, 10, 0).p is None


def test_few_clusters_seldom_find_what_is_not_there():
    """At the 5 % level, 8 clusters of unequal models' answers give about 5 % false findings."""
    rng = np.random.default_rng(3)
    clusters, false = [str(i // 10) for i in range(80)], 0
    for _ in range(300):
        shift = np.repeat(rng.normal(0, 0.1, 8), 10)
        ours, theirs = rng.normal(0, 0.1, 80) + shift, rng.normal(0, 0.1, 80)
        false += paired([Measure.mean(ours)], [Measure.mean(theirs)], clusters, 200, 0).p < 0.05
    assert 5 <= false <= 27  # of 300


def test_seeds_that_disagree_widen_the_interval():
    clusters = [str(i % 50) for i in range(200)]
    base = RNG.random(200)
    steady = [Measure.mean(base + 0.1 + 0.001 * s) for s in range(4)]
    torn = [Measure.mean(base + 0.1 + 0.2 * (s % 2 - 0.5)) for s in range(4)]
    theirs = [Measure.mean(base + RNG.normal(0, 0.01, 200)) for _ in range(4)]
    calm, wild = (paired(ours, theirs, clusters, 300, 0) for ours in (steady, torn))
    assert calm.p < 0.001 < 0.05 < wild.p and wild.freedom < 4
    assert wild.detectable() > 10 * calm.detectable() > 0


@pytest.mark.parametrize("high, low", [(0.9, 0.4), (7e4 / 3, 1e2)])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_clusters_that_are_all_alike_do_not_make_sure(count, high, low):
    """One with another difference may come next: p is that with one cluster more, which shows none.

    In large numbers, such as changes in per cent of a low score, rounding is no difference.
    """
    clusters = [str(i // 5) for i in range(5 * count)]
    ours, theirs = (Measure.mean(np.full(5 * count, share)) for share in (high, low))
    found = paired([ours, ours], [theirs, theirs], clusters, 50, 0)
    assert found.p == pytest.approx(ttest_1samp([high - low] * count + [0], 0).pvalue)
    assert (found.ci95, found.detectable()) == (None, None) and found.value == pytest.approx(high - low)
    assert verdicts([found])[0]["verdict"] == ("better" if count == 8 else "undecided")
    # two samples: the smaller one counts
    items = np.stack([np.arange(5 * count) < 10, np.arange(5 * count) >= 10], 1) * 1.0

    def both(level):
        joined = np.concatenate([level * items, items], axis=1)
        return Measure(joined, lambda s: (s[..., :2] / np.maximum(s[..., 2:], 1)).sum(-1))

    if count == 8:
        groups = items[:, 1].astype(int)
        again = paired([both(0.9)], [both(0.4)], clusters, 50, 0, groups.tolist())
        assert again.p == pytest.approx(ttest_1samp([1, 1, 0], 0).pvalue)


def test_where_one_cluster_counts_there_is_no_interval():
    few = Measure.mean([1, 0, 1, 0, np.nan]).where([True, True, False, False, False])
    assert few.value == 0.5 and few.counts.tolist() == [True, True, False, False, False]
    assert with_interval(few, list("aabcd"), 50, 0) == {"value": 0.5, "ci95": None}
    assert with_interval(few, list("abbcd"), 50, 0)["ci95"] is not None


def test_a_score_of_ranks_is_compared_as_one_of_sums():
    """Means, written as scores of all weights: alone, and as one of two samples."""
    rng = np.random.default_rng(5)
    values, clusters = rng.random((2, 60)), [str(i // 3) for i in range(60)]
    sums = [Measure.mean(row) for row in values]
    ranks = [Ranked(np.ones((60, 1)), lambda w, v=row: (w * v).sum(-1) / w.sum(-1)) for row in values]
    for groups in ((), [int(i < 24) for i in range(60)]):
        one, other = (paired([a], [b], clusters, 200, 0, groups) for a, b in (sums, ranks))
        assert other.p == pytest.approx(one.p) and other.ci95 == pytest.approx(one.ci95)
        assert other.freedom == pytest.approx(one.freedom)


def test_draws_of_ranks_take_bounded_memory():
    """Few clusters of very many items: a draw weighs each item, so a few draws are made at once."""
    items, shapes = 2**20 + 1, []

    def score(weights):
        shapes.append(weights.shape)
        return weights[..., :2].sum(-1)

    clusters = np.arange(items) % 3
    (draws,) = resample([Ranked(np.ones((items, 1)), score)], clusters, 8, 0)
    assert shapes == [(3, items), (3, items), (2, items)]
    counts = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), size=8)
    assert draws.tolist() == counts[:, :2].sum(1).tolist()


def test_without_a_draw_that_has_a_score_there_is_no_verdict():
    one, other = (
        Ranked(np.ones((4, 1)), lambda w, v=v: np.where((w == 1).all(-1), v, np.nan)) for v in (0.9, 0.1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy says that no number is left
        found = paired([one], [other], list("abcd"), 2, 0)
    assert found == Difference(found.value) and found.value == pytest.approx(0.8)
    assert verdicts([found]) == [{"p_holm": None, "verdict": "undecided"}]


def test_mcnemar_is_the_exact_binomial():
    ours = np.array([1] * 30 + [1] * 9 + [0] * 2 + [0] * 10, bool)
    theirs = np.array([1] * 30 + [0] * 9 + [1] * 2 + [0] * 10, bool)
    assert mcnemar(ours, theirs) == pytest.approx(2 * binom.cdf(2, 11, 0.5))
    assert mcnemar(theirs, ours) == mcnemar(ours, theirs)


def test_holm_steps_down_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_a_difference_without_p_counts_among_no_comparisons():
    found = verdicts([Difference(1.0), Difference(1.0, p=0.04), Difference(-1.0, p=0.02)])
    assert [each["verdict"] for each in found] == ["undecided", "better", "worse"]
    assert [each["p_holm"] for each in found] == [None, 0.04, 0.04]
    assert verdicts([Difference(1.0, p=0.01)], [0.2])[0]["verdict"] == "undecided"


def test_only_shares_of_right_items_are_exact():
    assert Measure.mean([1, 0, 1]).where([True, True, False]).right.tolist() == [True, False]
    assert Measure.mean([0.5, 1]).right is None
    assert Measure(np.ones((2, 2)), lambda sums: sums[..., 0]).right is None
