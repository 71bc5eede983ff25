"""Comparison of a sweep's variants: planted differences are found, equal ones left undecided."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from unimed_jax.analyze.compare import Side
from unimed_jax.analyze.sweep import compare, table
from unimed_jax.analyze.sweep.compare import Column, Scores, differences, score_sides
from unimed_jax.errors import UserError
from unimed_jax.evaluate.metrics import registry
from unimed_jax.evaluate.metrics.registry import NotComputed, find
from unimed_jax.evaluate.statistics import Measure, Ranked

TASKS = (("vqa", "yes"), ("cls", "CT"))


def side(name, right, clusters=12, sets=("a",), tasks=TASKS):
    """Two items of each task in each cluster; right(set, task, cluster, i): whether it is answered."""
    records, metrics = {}, {}
    for of_set in sets:
        for task, answer in tasks:
            unit = of_set, "test", task
            metrics[unit] = find("exact_match")
            for c in range(clusters):
                for i in range(2):
                    key = f"{of_set}/test/{task}-{c}-{i}"
                    records.setdefault(unit, {})[key] = {
                        **{"id": key, "set": of_set, "split": "test", "task": task, "template": ""},
                        **{"cluster": f"c{c}", "question": "", "images": [], "reference": answer},
                        "prediction": answer if right(of_set, task, c, i) else "nothing",
                        **{"box": None, "image_size": None, "meta": {"answer_type": "CLOSED"}},
                        **{"blind": {}, "peers": {}, "permuted_images": None},
                    }
    protocols = dict.fromkeys(metrics, "p/q")
    return Side(name, Path(f"runs/{name}"), records, metrics, protocols, {"split": "test"}, {})


def sides_of(**variants):
    """Sides of two seeds; each variant is one function of the items, or one a seed."""
    found = {}
    for name, rights in variants.items():
        for seed, right in enumerate(rights if isinstance(rights, tuple) else (rights, rights)):
            found[name, seed] = side(f"{name}/seed{seed}", right)
    return found


def half(of_set, task, c, i):
    return i == 0


def test_scores_changes_and_verdicts_by_hand():
    """The baseline has half of all items; `more` has each item of cls as well, `less` none of vqa."""

    def more(of_set, task, c, i):
        return i == 0 or task == "cls" and c % 6 > 0

    def less(of_set, task, c, i):
        return i == 0 and (task == "cls" or c == 0)

    scores = score_sides(sides_of(base=half, more=(more, more), less=less, same=half), "base", {})
    assert [column.label for column in scores.columns] == ["a vqa exact_match", "a cls exact_match"]
    found = differences(scores, "base")["variants"]
    assert found["base"]["scores"]["a cls exact_match"] == {"value": 0.5, "seeds": [0.5, 0.5]}
    assert "change" not in found["base"] and "columns" not in found["base"]
    # cls rises from .5 to .5 + .5 * 10/12: + 83.3 %, the mean over two columns + 41.7 %
    assert found["more"]["change"]["value"] == pytest.approx(100 * 10 / 12 / 2)
    assert found["more"]["change"]["seeds"] == pytest.approx([100 * 10 / 12 / 2] * 2)
    assert found["more"]["columns"]["a cls exact_match"]["value"] == pytest.approx(5 / 12)
    assert found["more"]["columns"]["a vqa exact_match"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert found["less"]["change"]["value"] == pytest.approx(-100 * 11 / 12 / 2)
    verdicts = {name: found[name]["change"]["verdict"] for name in ("more", "less", "same")}
    assert verdicts == {"more": "better", "less": "worse", "same": "undecided"}
    low, high = found["more"]["change"]["ci95"]
    assert 0 < low < 100 * 10 / 24 < high


def test_one_seed_gives_no_verdict():
    sides = {key: s for key, s in sides_of(base=half, all=lambda *item: True).items() if key[1] == 0}
    change = differences(score_sides(sides, "base", {}), "base")["variants"]["all"]["change"]
    assert (change["verdict"], change["p_holm"], change["detectable"]) == ("undecided", None, None)
    assert change["value"] == pytest.approx(100)


def test_items_that_not_all_answered_are_left_out_and_counted():
    sides = sides_of(base=half, other=half)
    sides["other", 1] = side("other/seed1", half, clusters=11)
    scores = score_sides(sides, "base", {})
    assert scores.items[scores.columns[0]] == 22 and len(scores.clusters) == 11
    assert "a/test/vqa: 2 items that not all runs answered" in scores.notes
    # others than those that the baseline lacks, and a task that the baseline's first run lacks
    unit = "a", "test", "vqa"
    for name, lost in (("base", slice(0, 3)), ("other", slice(5, 9))):
        sides[name, 0] = side(f"{name}/seed0", half)
        for key in list(sides[name, 0].records[unit])[lost]:
            del sides[name, 0].records[unit][key]
    del sides["base", 0].records["a", "test", "cls"]
    scores = score_sides(sides, "base", {})
    assert scores.items[scores.columns[0]] == 24 - 3 - 4 - 2 and len(scores.columns) == 1
    assert "a/test/vqa: 9 items that not all runs answered" in scores.notes
    assert "a/test/cls: 24 items that not all runs answered" in scores.notes
    sides["other", 1] = side("other/seed1", half, sets=("b",))
    with pytest.raises(
        UserError, match="runs/base/seed0 and runs/other/seed1 share no item of split 'test'"
    ):
        score_sides(sides, "base", {})


def test_named_metrics_and_columns_without_items():
    """Open questions: here are none, so the column is left out."""
    scores = score_sides(
        sides_of(base=half, other=half), "base", {"vqa": ("open_recall", "closed_accuracy")}
    )
    assert [column.metric for column in scores.columns] == ["closed_accuracy", "exact_match"]
    assert scores.notes == ("a vqa open_recall is left out, because no item counts for it",)


def test_columns_say_how_many_items_they_count():
    """Closed questions are half of vqa, and open ones the other."""
    sides = sides_of(base=half, other=half)
    for found in sides.values():
        for i, record in enumerate(found.records["a", "test", "vqa"].values()):
            record["meta"] = {"answer_type": "CLOSED" if i < 6 else "OPEN"}
    scores = score_sides(sides, "base", {"vqa": ("open_recall", "closed_accuracy")})
    assert {column.metric: n for column, n in scores.items.items()} == {
        **{"open_recall": 18, "closed_accuracy": 6, "exact_match": 24}
    }


def test_runs_that_were_scored_in_unlike_ways_are_refused(monkeypatch):
    """At other checkpoints, or decoded with other settings; the same other way for all is a choice."""
    last, best = 300, {"base": 200, "other": 300}

    class Kept(SimpleNamespace):
        def __init__(self, folder, read_only):
            self.latest, self.best = (lambda: last), (lambda: best[folder.parents[1].name])
            self.close = lambda: None

    monkeypatch.setattr(compare, "Checkpoints", Kept)
    own = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0}
    config = SimpleNamespace(evaluate=SimpleNamespace(**own))
    runs = [SimpleNamespace(folder=Path(f"runs/{n}/seed0"), config=config) for n in ("base", "other")]

    def check(*ways):
        sides = [SimpleNamespace(about={"step": step}, decoding=own | changes) for step, changes in ways]
        compare._refuse_unlike(runs, sides)

    check((300, {}), (300, {}))  # the last ones
    check((200, {}), (300, {}))  # the best ones
    check((300, {"temperature": 1.0}), (300, {"temperature": 1.0}))
    for ways, words in (
        (
            ((300, {}), (250, {})),
            "runs/other/seed0 was scored at step 250, unlike runs/base/seed0; score",
        ),
        (((300, {}), (300, {"top_p": 0.5})), "its best step with config.evaluate {'top_p': 0.5} or at "),
    ):
        with pytest.raises(UserError, match=re.escape(words.removesuffix(" or at "))):
            check(*ways)


def test_a_score_of_ranks_is_compared_like_one_of_sums(monkeypatch):
    """Its items are kept apart within clusters: here a mean, written as a score of weights."""

    def ranked(records):
        right = np.array([float(r["prediction"] == r["reference"]) for r in records])
        return Ranked(np.ones((len(right), 1)), lambda w: (w * right).sum(-1) / w.sum(-1))

    def more(of_set, task, c, i):
        return i == 0 or task == "cls" and c % 6 > 0

    sides = sides_of(base=half, more=more)
    plain = differences(score_sides(sides, "base", {}), "base")["variants"]["more"]
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    registry.metric("ranked")(ranked)
    for chosen in ({"vqa": ("ranked",), "cls": ("ranked",)}, {"cls": ("ranked",)}):
        found = differences(score_sides(sides, "base", chosen), "base")["variants"]["more"]
        for name in ("value", "p", "detectable"):
            assert found["change"][name] == pytest.approx(plain["change"][name])
        ours, theirs = (entry["columns"] for entry in (found, plain))
        assert ours["a cls ranked"]["ci95"] == pytest.approx(theirs["a cls exact_match"]["ci95"])


def test_a_score_that_cannot_be_computed_here_is_left_out(monkeypatch):
    def lacks(records):
        raise NotComputed("not computed: needs Java")

    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    registry.metric("lacks")(lacks)
    sides = sides_of(base=half, other=half)
    scores = score_sides(sides, "base", {"vqa": ("lacks",)})
    assert [column.metric for column in scores.columns] == ["exact_match"]
    assert scores.notes == ("a vqa lacks is left out, because it is not computed: needs Java",)
    with pytest.raises(UserError, match="needs Java, and there is no other score to compare"):
        score_sides(sides, "base", {"vqa": ("lacks",), "cls": ("lacks",)})


def test_a_baseline_of_zero_on_the_shared_seeds_has_no_change_in_per_cent():
    """The baseline answers nothing of cls with seed 0, which is the only one of the other variant."""
    sides = sides_of(base=(lambda *item: item[1] == "vqa", half), other=half)
    del sides["other", 1]
    found = differences(score_sides(sides, "base", {}), "base")
    assert found["counted"] == ["a vqa exact_match"]
    assert found["variants"]["other"]["change"]["value"] == pytest.approx(-50)


def test_the_intervals_of_changes_from_a_low_score_hold_the_truth():
    """A change in per cent divides by a score that is itself measured: here .03, and .3 with it."""
    rng, held, sweeps = np.random.default_rng(5), 0, 60
    column = Column(("a", "test", "cls"), "exact_match")
    for _ in range(sweeps):
        item = rng.random((20, 10))  # [clusters, items]
        measures = {
            name: {
                seed: (Measure.mean(np.where(rng.random((20, 10)) < 0.3, rng.random((20, 10)), item)
                                    .__lt__(level).mean(1)),)
                for seed in range(5)
            }
            for name, level in (("base", 0.03), ("other", 0.3))
        }  # fmt: skip
        scores = Scores((column,), tuple(map(str, range(20))), measures, {column: 200}, ())
        change = found_in(scores)["other"]
        low, high = change["ci95"]
        held += low <= 900 <= high
        assert change["value"] == pytest.approx((low + high) / 2)
    assert held / sweeps >= 0.9


def test_a_set_of_one_cluster_does_not_take_the_others_intervals():
    sides = {
        (name, seed): side(f"{name}/seed{seed}", right, sets=("a", "q"))
        for name, right in (("base", half), ("all", lambda *item: item[2] % 4 > 0 or half(*item)))
        for seed in (0, 1)
    }
    for one in sides.values():
        for unit in [unit for unit in one.records if unit[0] == "q"]:
            for record in one.records[unit].values():
                record["cluster"] = "the only one"
    found = result_of(score_sides(sides, "base", {}))
    assert found["counted"] == ["a vqa exact_match", "a cls exact_match"]
    assert found["variants"]["all"]["change"]["verdict"] == "better"
    reason = "(its items are one cluster)"
    assert f"without q vqa exact_match {reason}, q cls exact_match {reason}. It" in table.page(found)


def test_a_cluster_that_one_run_does_not_count_is_no_sample_of_its_own(monkeypatch):
    def answered(records):
        right = [float(r["prediction"] == r["reference"]) for r in records]
        return Measure.mean(right).where([r["prediction"] != "" for r in records])

    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    registry.metric("answered")(answered)
    sides = sides_of(base=half, other=lambda *item: item[2] % 4 > 0 or half(*item))
    for record in sides["base", 0].records["a", "test", "vqa"].values():
        record["prediction"] *= record["cluster"] != "c3"
    scores = score_sides(sides, "base", {"vqa": ("answered",), "cls": ("answered",)})
    del sides["base", 0].records["a", "test", "cls"]  # so that no other task counts that cluster
    for one in (scores, score_sides(sides, "base", {"vqa": ("answered",)})):
        assert differences(one, "base")["variants"]["other"]["change"]["verdict"] == "better"


# ---- planted: many sweeps --------------------------------------------------------------------------
def planted(rng, effect=0.0, variants=3, seeds=4, clusters=(12, 40), spread=0.05):
    """Scores of a sweep with two samples of clusters (two columns on the first, one on the second).

    An item's chance varies by cluster, by variant and cluster, and by run; `effect` is added for the
    first variant, as a share of the baseline's score.
    """
    names = ["base", *(f"v{i}" for i in range(variants))]
    columns = tuple(Column(("a", "test", task), "exact_match") for task in ("vqa", "cls", "qa"))
    n, sizes = sum(clusters), rng.integers(4, 12, (3, sum(clusters)))
    sizes[:2, clusters[0] :], sizes[2, : clusters[0]] = 0, 0
    level = 0.5 + 0.1 * rng.standard_normal((3, n))
    measures = {}
    for v, name in enumerate(names):
        measures[name] = {}
        own = level + 0.5 * (effect if v == 1 else 0.0)
        for seed in range(seeds):
            run = spread * rng.standard_normal(3)[:, None] + 0.05 * rng.standard_normal((3, n))
            right = rng.binomial(sizes, np.clip(own + run, 0.02, 0.98))
            measures[name][seed] = tuple(
                Measure(np.stack([right[i], sizes[i]], axis=1).astype(float)) for i in range(3)
            )
    return Scores(columns, tuple(map(str, range(n))), measures, dict.fromkeys(columns, 1), ())


def found_in(scores):
    variants = differences(scores, "base")["variants"]
    return {name: entry["change"] for name, entry in variants.items() if "change" in entry}


@pytest.fixture(autouse=True, scope="module")
def fewer_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "RESAMPLES", 400)
        yield


@pytest.mark.slow
def test_equal_variants_are_called_different_in_one_of_twenty_sweeps_at_most():
    rng, wrong, sweeps = np.random.default_rng(0), 0, 150
    for _ in range(sweeps):
        changes = found_in(planted(rng))
        wrong += any(change["verdict"] != "undecided" for change in changes.values())
    assert wrong / sweeps <= 0.05


@pytest.mark.slow
def test_a_true_difference_is_found_as_often_as_the_power_line_says():
    """At the size that the sweep itself calls detectable, four times out of five or a little more."""
    rng = np.random.default_rng(1)
    detectable = np.median([found_in(planted(rng))["v0"]["detectable"] for _ in range(20)])
    found, others, sweeps = 0, 0, 60
    for _ in range(sweeps):
        changes = found_in(planted(rng, effect=detectable / 100))
        found += changes["v0"]["verdict"] == "better"
        others += any(changes[name]["verdict"] != "undecided" for name in ("v1", "v2"))
    assert 0.7 <= found / sweeps <= 0.98 and others / sweeps <= 0.1
    sure = found_in(planted(rng, effect=4 * detectable / 100))
    assert sure["v0"]["verdict"] == "better" and sure["v0"]["ci95"][0] > detectable


def test_samples_that_share_no_cluster_are_told_apart():
    scores = planted(np.random.default_rng(2))
    groups = compare._groups([scores.measures["base"][0]], (0, 1, 2))
    assert len(set(groups[:12])) == 1 and len(set(groups[12:])) == 1 and groups[0] != groups[-1]
    assert (
        len(set(compare._groups([scores.measures["base"][0]], (0, 1)))) == 2
    )  # the second: none of theirs


# ---- tables ----------------------------------------------------------------------------------------
def result_of(scores, baseline="base", **more):
    """What sweep.json holds, without what is read from the runs' folders."""
    found = differences(scores, baseline)
    for entry in found["variants"].values():
        counts = dict.fromkeys(table.SIZES, 1000.0)
        entry |= {"size": counts | {"steps": 10}, "cost": {"seconds": 284.0, "bytes": 71e6}}
    columns = [table._described(column, scores) for column in scores.columns]
    return {
        **{"name": "s", "base": "b.py", "baseline": baseline, "level": 0.05, "columns": columns},
        "clusters": len(scores.clusters),
        "pairs": compare.published_pairs(scores.columns),
        **found,
        **{"failed": {}, "missing": [], "notes": list(scores.notes)},
        **more,
    }


def test_the_page_never_ranks_within_noise(tmp_path):
    scores = planted(np.random.default_rng(3), effect=0.6)
    found = result_of(scores, failed={"odd/seed0": "its loss is not finite."}, missing=["v1/seed9"])
    page = table.page(json.loads(json.dumps(found)))
    rows = [line for line in table.main_table(found).splitlines()[2:]]
    assert [row.split(" | ")[0] for row in rows] == ["| base", "| v0", "| v1", "| v2", "| odd"]
    assert "**+" in rows[1] and "better" in rows[1] and "baseline" in rows[0]
    assert all("**" not in row and "undecided" in row for row in rows[2:4])
    assert "failed: its loss is not finite." in rows[4] and "Not finished: v1/seed9." in page
    assert "would have been found with a probability of 80 %" in page
    assert "for v1 gains above" in page and "for v0 gains" not in page
    assert "parameters trained: base = v0 = v1 = v2" in page and "4 min 44 s | 71 MB" in page
    table.draw(tmp_path / "sweep.png", found)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_the_page_says_which_seeds_each_number_is_of():
    """A run failed, so that a variant has other seeds than the baseline."""
    sides = sides_of(base=(half,) * 3, other=(half,) * 4)
    del sides["other", 0]
    found = result_of(score_sides(sides, "base", {}))
    assert [row.split(" | ")[1] for row in table.main_table(found).splitlines()[2:]] == [
        "3",
        "3 (2 shared)",
    ]
    assert (
        "means over seeds (base 0, 1, 2; other 1, 2, 3; a change is over those that a variant shares "
        "with the baseline)" in table.page(found)
    )


def test_the_published_pairs_stand_in_one_column():
    sets = {task: [of for t, *of in compare.PAIRS if t == task][0] for task, *_ in compare.PAIRS}
    tasks = [(task, name) for task, names in sets.items() for name in names] + [("qa", "medqa")]
    rng, columns = np.random.default_rng(0), []
    measures = {"base": {0: [], 1: []}, "other": {0: [], 1: []}}
    for task, name in tasks:
        columns.append(Column((name, "test", task), "m"))
        for of_variant in measures.values():
            for seed in of_variant:
                of_variant[seed].append(Measure.mean(rng.binomial(1, 0.5, 30)))
    scores = Scores(tuple(columns), tuple(map(str, range(30))), measures, dict.fromkeys(columns, 30), ())
    found = result_of(scores)
    head = table.main_table(found).splitlines()[0]
    assert "slake / path_vqa vqa | slake / samed refer | slake / samed identify" in head
    assert "mimic_cxr / medpix caption | dermamnist / organsmnist cls | medqa qa" in head
    assert len(found["counted"]) == 10 and "medqa qa m" not in found["counted"]
    assert "without medqa qa m (not among the published ten)" in table.page(found)


def test_a_baseline_that_scores_nothing_has_no_change_in_per_cent(tmp_path):
    scores = score_sides(sides_of(base=lambda *item: False, other=half), "base", {})
    found = result_of(scores)
    assert table.main_table(found).splitlines()[-1].count("| the baseline scores 0 |") == 1
    assert "no change in per cent can be taken of a baseline that scores 0" in table.page(found)
    assert "+0.500 [" in table.page(found)
    table.draw(tmp_path / "sweep.png", found)
