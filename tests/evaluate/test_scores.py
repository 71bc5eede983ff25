"""Scores of records on a toy data set: primary metrics, margins, templates, pooling, protocols."""

import dataclasses

import pytest
from support.toy import SIZE, Model, Says, Toy, evaluated, sets_of, toy_config

from unimed_jax.config import TASKS
from unimed_jax.evaluate import scores
from unimed_jax.evaluate.metrics import captions, of_task
from unimed_jax.evaluate.run import _about
from unimed_jax.verdicts import verdict


@pytest.fixture
def config():
    return toy_config()


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)  # METEOR takes 9 s to start


def records_of(scored):
    return [record for part in scored for record in part.records]


def by_task(scored):
    return {part.task: part.scores for part in scored}


def test_a_model_that_sees_beats_every_baseline(config, tmp_path):
    toy = Toy()
    model = Model(toy)
    scored = evaluated(model, toy, config, tmp_path)
    found = by_task(scored)
    assert list(found) == list(TASKS) and len(records_of(scored)) == 6 * 24
    assert sum(model.calls) == 11 * 24  # five tasks with permuted images, six with their own
    for task, part in found.items():
        primary = part["primary"]
        assert part["n"] == 24 and part["clusters"] == (24 if task == "qa" else 6)
        assert part["corrected"][primary]["value"] > (0.85 if task == "refer" else 0.999)
        assert part["blind"] and all(primary in values for values in part["blind"].values())
        if task != "qa":
            assert (
                part["blind"][scores.PERMUTED][primary] == 0.0
                and part["peers"] == {}
                and not part["peer_margin"]
            )
        best = max(part["blind"], key=lambda name: part["blind"][name][primary])
        assert part["margin"]["baseline"] == best
        difference = part["corrected"][primary]["value"] - part["blind"][best][primary]
        assert part["margin"]["value"] == pytest.approx(difference)
        low, high = part["margin"]["ci95"]
        assert low <= part["margin"]["value"] + 1e-12 and part["margin"]["value"] <= high + 1e-12
    assert (
        found["qa"]["published"] == {} and found["qa"]["peer_margin"]["baseline"] in found["qa"]["peers"]
    )
    assert {"tfidf_logistic", "nearest_question"} <= set(found["vqa"]["blind"])
    assert found["refer"]["published"]["miou"] > 0.85
    assert found["caption"]["published"]["meteor"] == "not computed: needs Java"
    vqa = found["vqa"]
    assert (vqa["n_open"], vqa["n_closed"]) == (6, 18) and vqa["published"]["closed_accuracy"] == 1.0
    assert {name: part["n"] for name, part in vqa["templates"].items()} == {"seen": 18, "what": 6}
    what = vqa["templates"]["what"]
    assert what["blind"][scores.PERMUTED] == 0.0 and what["value"] == 1.0
    assert what["margin"]["value"] == pytest.approx(1 - max(what["blind"].values()))
    assert verdict(found["cls"]["margin"]) == "above blind"


def test_a_template_that_was_not_learned_shows_below_a_good_pool(config, tmp_path):
    """Pooling must not hide a task that was not learned: each template has a margin of its own."""
    toy = Toy()
    model = Model(toy)
    answer = model.answer

    def half(examples, images, seed):
        found = zip(examples, answer(examples, images, seed), strict=True)
        return ["nothing" if e.meta.get("template") == "what" else text for e, text in found]

    model.answer = half
    (vqa,) = (part.scores for part in evaluated(model, toy, config, tmp_path) if part.task == "vqa")
    assert vqa["margin"]["value"] > 0 and vqa["templates"]["what"]["value"] == 0.0
    assert vqa["templates"]["what"]["margin"]["value"] < 0 < vqa["templates"]["seen"]["margin"]["value"]


def test_a_blind_or_silent_model_does_not_win(config, tmp_path):
    found = by_task(evaluated(Says(lambda e: ""), Toy(), config, tmp_path))
    for part in found.values():
        assert part["corrected"][part["primary"]]["value"] == 0.0 and part["n"] == 24
        assert part["margin"]["value"] < 0 and part["margin"]["ci95"][0] < 0
        assert verdict(part["margin"]) in ("below blind", "undecided")
    assert verdict(found["refer"]["margin"]) == verdict(found["caption"]["margin"]) == "below blind"
    assert found["caption"]["published"]["pairs_scored"] == 0


def test_a_task_without_training_examples_has_no_fitted_baseline(config, tmp_path):
    toy = Toy()
    toy.rows["train"] = [e for e in toy.rows["train"] if e.task not in ("qa", "refer")]
    found = by_task(evaluated(Model(toy), toy, config, tmp_path))
    assert found["qa"]["margin"] is None and found["qa"]["blind"] == found["qa"]["peers"] == {}
    assert any("no training example" in note for note in found["qa"]["notes"])
    assert (
        list(found["refer"]["blind"]) == [scores.PERMUTED]
        and found["refer"]["margin"]["baseline"] == scores.PERMUTED
    )
    assert found["qa"]["templates"]["chapter"]["margin"] is None


def test_predictions_keep_their_example(config, tmp_path):
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, splits=("val",)))
    records = records_of(evaluated(Says(lambda e: e.id), Toy(), config, tmp_path))
    assert all(
        r["id"] == f"toy/val/{r['prediction']}" and (r["set"], r["split"]) == ("toy", "val")
        for r in records
    )
    assert {tuple(r["image_size"]) for r in records if r["images"]} == {SIZE}
    assert [r["box"] for r in records if r["id"] == "toy/val/val-refer-1"] == [[5, 3, 15, 15]]


def test_sets_are_scored_apart_and_pooled_without_collisions(config, tmp_path):
    """Equal template and cluster names of two sets stay apart; pooling takes all records together."""
    one, two = Toy(id="one"), Toy(id="two", per_task=12)
    says = Says(lambda e: e.answer)
    scored = evaluated(says, [one, two], config, tmp_path)
    metrics = scores.summarise(
        config, scored, _about(sets_of(one, two), []) or {"one": {"checksum": "c"}}
    )
    assert set(metrics["sets"]) == {"one", "two"}
    pooled = metrics["pooled"]["test"]["vqa"]
    assert pooled["n"] == 36 and pooled["clusters"] == 12
    assert set(pooled["templates"]) == {"one/seen", "one/what", "two/seen", "two/what"}
    parts = [metrics["sets"][name]["test"]["vqa"] for name in ("one", "two")]
    assert pooled["templates"]["two/seen"]["n"] == parts[1]["templates"]["seen"]["n"]
    name = "majority_per_question"
    mean = sum(part["n"] * part["blind"][name]["exact_match"] for part in parts) / 36
    assert pooled["blind"][name]["exact_match"] == pytest.approx(mean)
    assert pooled["protocol"] == "+".join(part["protocol"] for part in parts)


def test_the_protocol_names_all_that_a_score_depends_on(config, tmp_path):
    found = {
        part.task: part.scores["protocol"] for part in evaluated(Model(Toy()), Toy(), config, tmp_path)
    }
    fit = config.data.fit
    assert found["vqa"] == (
        f"toy@cccccccc/test/closed=answer_type/norm=nfkc-lower-signs/form=unimed/fit={fit}/exact_match"
    )
    assert found["refer"] == f"toy@cccccccc/test/form=unimed/fit={fit}/miou"
    assert found["qa"] == "toy@cccccccc/test/norm=nfkc-lower-signs/form=unimed/exact_match"


def test_chat_forms_are_scored_as_med_moe_publishes(config):
    """Open answers score by recall, closed ones by a substring; the corrected rule reads whole words."""
    rows = [
        ("OPEN", "left lung", "the lung"),
        ("CLOSED", "no", "it is normal"),
        ("CLOSED", "yes", "yes"),
    ]
    records = [
        {
            "task": "vqa",
            "cluster": str(i),
            "template": "",
            "reference": reference,
            "prediction": prediction,
        }
        | {"box": None, "image_size": [9, 9], "meta": {"answer_type": kind}, "blind": {}, "peers": {}}
        for i, (kind, reference, prediction) in enumerate(rows)
    ]
    chat = dataclasses.replace(config, text=dataclasses.replace(config.text, form="phi"))
    published, ours = (scores.score("vqa", records, chat)[key] for key in ("published", "corrected"))
    assert (
        published["open_recall"] == 50.0
        and published["closed_accuracy"] == 100.0
        and "bleu4" not in published
    )
    assert ours["open_recall"]["value"] == 0.5 and ours["closed_accuracy"]["value"] == 0.5
    assert "open_recall" not in scores.score("vqa", records, config)["published"]  # Uni-Med's rules


def test_a_metric_of_one_cluster_has_no_interval(config):
    """All closed questions are of one patient, whose answers tell nothing of other patients."""
    rows = [
        {
            **{"id": f"toy/test/{i}", "set": "toy", "task": "vqa", "template": "", "cluster": cluster},
            **{"question": "?", "reference": "yes", "prediction": said, "box": None},
            **{"image_size": None, "meta": {"answer_type": kind}, "peers": {}},
            "blind": {"always": "no"},
        }
        for i, (cluster, kind, said) in enumerate(
            [("a", "CLOSED", "yes"), ("a", "CLOSED", "no"), ("b", "OPEN", "yes"), ("c", "OPEN", "")]
        )
    ]
    found = scores.score("vqa", rows, config)["corrected"]
    assert found["closed_accuracy"] == {"value": 0.5, "ci95": None}
    assert found["open_exact_match"]["ci95"] is not None and found["exact_match"]["ci95"] is not None
    (first, *_) = of_task("vqa", ("closed_accuracy",))
    assert scores.score("vqa", rows, config, [first])["margin"]["ci95"] is None


def test_published_references_are_cut_under_max_words(config):
    record = {
        "task": "identify",
        "cluster": "a",
        "template": "",
        "reference": "one two three",
        "prediction": "one two",
        "box": None,
        "image_size": [9, 9],
        "meta": {},
        "blind": {},
        "peers": {},
    }
    cut = dataclasses.replace(config, text=dataclasses.replace(config.text, max_words=2))
    assert scores.score("identify", [record], config)["published"]["accuracy"] == 0.0
    found = scores.score("identify", [record], cut)
    assert found["published"]["accuracy"] == 1.0 and found["corrected"]["exact_match"]["value"] == 0.0
    assert (
        found["corrected"]["exact_match"]["ci95"] is None
        and found["margin"] is None
        and len(found["notes"]) == 3
    )


def test_baselines_see_training_examples_only(config, tmp_path):
    toy, changed = Toy(), Toy()
    changed.rows["test"] = [
        dataclasses.replace(e, answer="zebra")
        if e.task in ("vqa", "cls", "qa", "identify", "caption")
        else e
        for e in changed.rows["test"]
    ]
    before, after = (
        evaluated(Model(t), t, config, tmp_path / n) for t, n in ((toy, "a"), (changed, "b"))
    )
    for one, other in zip(records_of(before), records_of(after), strict=True):
        names = [name for name in one["blind"] if name != scores.PERMUTED]
        assert names and all(one["blind"][name] == other["blind"][name] for name in names)
        assert one["peers"] == other["peers"]
