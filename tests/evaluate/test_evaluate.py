"""Blind baselines, permuted images, the schema of metrics.json and the files of a report, on a toy data set."""

import dataclasses
import json
import sys
from collections import Counter

import numpy as np
import pytest
from support.toy import SIZE, Model, Says, Toy, evaluated, sets_of

from unimed_jax.config import TASKS, default_config
from unimed_jax.data.datasets import brain, domains
from unimed_jax.data.example import Example
from unimed_jax.data.forms import text_to_box
from unimed_jax.errors import UserError
from unimed_jax.evaluate import baselines, scores, tasks, text_only
from unimed_jax.evaluate.metrics import captions
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.report.markdown import verdict
from unimed_jax.evaluate.report.pictures import draw_routing, token_grid
from unimed_jax.evaluate.run import _about, _reader
from unimed_jax.provenance import code_version, plain
from unimed_jax.settings import from_config_dict


@pytest.fixture
def config():
    settings = default_config()
    settings.name = "toy"
    settings.evaluate.bootstrap = 200
    settings.evaluate.batch = 16
    settings.evaluate.splits = ("test",)
    return from_config_dict(settings)


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)  # METEOR takes 9 s to start


# ------------------------------------------------------------------------------ baselines


def make(task, question="", answer="", name="x", **meta):
    return Example(name, task, question, answer, meta=meta)


def fit(task, train):
    """Name -> blind baseline that answers one example."""
    return {name: lambda e, b=baseline: b([e])[0] for name, baseline in baselines.fit(task, train).blind.items()}


def test_majority_per_template_and_per_question():
    train = [make("vqa", "a?", answer, template="t") for answer in ("yes", "yes", "no")]
    train += [make("vqa", "b?", answer, template="t") for answer in ("no", "no", "no")]
    train += [make("vqa", "c?", "lung", template="u"), make("cls", "", "disc", template="t")]
    fitted = fit("vqa", train)
    per_template, per_question = fitted["majority_per_template"], fitted["majority_per_question"]
    assert per_template(make("vqa", "a?", template="t")) == "no"
    assert per_question(make("vqa", "a?", template="t")) == "yes"
    assert per_question(make("vqa", "unseen?", template="u")) == "lung"
    assert per_template(make("vqa", "a?", template="unseen")) == "no"
    assert baselines.most_frequent(["b", "a", "b", "a", "c"]) == "a"  # equals: by the alphabet, not by order
    assert baselines.fit("qa", train) == baselines.Fitted() and not fit("qa", train)


def test_median_box_per_prompt_and_plane():
    boxes = {"axial": ["{<0><0><10><10>}", "{<2><2><12><12>}", "{<90><4><99><14>}"], "sagittal": ["{<50><50><60><60>}"]}
    train = [make("refer", "disc", text, plane=plane) for plane, texts in boxes.items() for text in texts]
    train.append(make("refer", "bar", "{<20><20><30><30>}", plane="axial"))
    fitted = fit("refer", train)
    asked = make("refer", "disc", plane="axial")
    assert fitted["median_box_per_prompt"](asked) == "{<26><3><36><13>}"
    assert fitted["median_box_per_prompt_and_plane"](asked) == "{<2><2><12><12>}"
    assert fitted["median_box_per_prompt_and_plane"](make("refer", "bar", plane="coronal")) == "{<20><20><30><30>}"
    assert text_to_box(fitted["median_box_per_prompt"](make("refer", "unseen"))) is not None
    assert list(fit("refer", [make("refer", "disc", "{<0><0><9><9>}")])) == ["median_box_per_prompt"]
    with pytest.raises(UserError, match="record bad: no box"):
        baselines.fit("refer", [make("refer", "disc", "on the left", name="bad")])


def test_nearest_boxes_vote_with_25_neighbours():
    near = [make("identify", f"{{<{i}><0><50><50>}}", "near") for i in range(13)]
    ring = [make("identify", f"{{<{i}><0><50><50>}}", "ring") for i in range(20, 32)]
    far = [make("identify", "{<60><60><90><90>}", "far")] * 40
    answer = fit("identify", far + ring + near)["nearest_25_boxes"]
    assert answer(make("identify", "{<0><0><50><50>}")) == "near"  # 13 against 12
    assert answer(make("identify", "box {<61><60><90><90>}")) == "far"
    assert fit("identify", near[:1])["nearest_25_boxes"](make("identify", "{<9><9><10><10>}")) == "near"


def test_medoid_report_is_the_most_typical():
    typical = "the left ventricle is wide and the brain is small"
    reports = [f"{typical} {end}" for end in ("today", "here", "now")] + [typical] + ["nothing to see here at all"] * 2
    assert baselines.medoid(reports) == typical
    assert baselines.medoid(reports * 500) == typical  # sampled, evenly
    assert baselines.medoid(["x"]) == "x"


def test_learned_baselines_read_the_question_and_its_template():
    train = [
        make("vqa", f"is the {organ} big {i}?", organ, template="t") for organ in ("heart", "lung") for i in range(5)
    ]
    train += [make("vqa", "is it seen?", answer, template=answer) for answer in ("yes", "no")]
    fitted = fit("vqa", train)
    assert set(fitted) == {"majority_per_template", "majority_per_question", "tfidf_logistic", "nearest_question"}
    for name in ("tfidf_logistic", "nearest_question"):
        assert fitted[name](make("vqa", "how big is the lung now?", template="t")) == "lung"
        assert fitted[name](make("vqa", "is it seen?", template="no")) == "no"
        assert fitted[name](make("vqa", "is it seen?", template="yes")) == "yes"


def test_nearest_question_merges_equal_questions_by_task():
    boxes = [make("refer", "disc", f"{{<{i}><0><50><50>}}") for i in (1, 2, 9)] + [
        make("refer", "bar", "{<7><7><8><8>}")
    ]
    nearest = fit("refer", boxes)["nearest_question"]
    assert (
        nearest(make("refer", "the disc")) == "{<2><0><50><50>}" and nearest(make("refer", "bar")) == "{<7><7><8><8>}"
    )
    assert "tfidf_logistic" not in fit("refer", boxes)
    reports = [make("caption", "head", text) for text in ("a b c d", "a b c d e", "x")] + [make("caption", "knee", "k")]
    assert fit("caption", reports)["nearest_question"](make("caption", "head")) == "a b c d"
    assert list(fit("caption", [make("caption", "", "a"), make("caption", "", "b")])) == ["medoid_report"]


def test_in_qa_the_learned_baselines_are_peers():
    train = [make("qa", f"{word} {i}?", word, template="t") for word in ("heart", "lung") for i in range(4)]
    fitted = baselines.fit("qa", train)
    assert list(fitted.blind) == ["majority_per_template"] and set(fitted.peers) == {
        "tfidf_logistic",
        "nearest_question",
    }
    assert fitted.peers["tfidf_logistic"]([make("qa", "lung or what?", template="t")]) == ["lung"]


def test_learned_baselines_are_bounded_and_deterministic(monkeypatch):
    monkeypatch.setattr(text_only, "MAX_TEXTS", 60)
    monkeypatch.setattr(text_only, "MAX_CLASSES", 3)
    train = [make("vqa", f"word{i} of kind{i % 7}?", f"answer{i % 7}") for i in range(400)]
    train += [make("vqa", "which kind0?", "answer0")] * 50
    seen = []
    vectoriser = text_only._vectoriser
    monkeypatch.setattr(text_only, "_vectoriser", lambda texts: seen.append(len(texts)) or vectoriser(texts))
    asked = [make("vqa", f"some kind{i}?") for i in range(7)]
    first, again = (baselines.fit("vqa", order) for order in (train, train[::-1]))
    assert max(seen) <= 60
    for name in ("tfidf_logistic", "nearest_question"):
        assert first.blind[name](asked) == again.blind[name](asked)
    assert len(set(first.blind["tfidf_logistic"](asked))) <= 3


def test_texts_without_a_word_have_no_learned_baseline():
    train = [make("vqa", "?", "yes"), make("vqa", "!", "no")]
    assert set(fit("vqa", train)) == {"majority_per_template", "majority_per_question"}


def test_baselines_see_training_examples_only(config, tmp_path):
    toy, changed = Toy(), Toy()
    changed.rows["test"] = [
        dataclasses.replace(e, answer="zebra") if e.task in ("vqa", "cls", "qa", "identify", "caption") else e
        for e in changed.rows["test"]
    ]
    before, after = (evaluated(Model(t), t, config, tmp_path / n) for t, n in ((toy, "a"), (changed, "b")))
    for one, other in zip(records_of(before), records_of(after), strict=True):
        names = [name for name in one["blind"] if name != scores.PERMUTED]
        assert names and all(one["blind"][name] == other["blind"][name] for name in names)
        assert one["peers"] == other["peers"]


def test_an_external_set_is_measured_against_the_training_sources(config):
    """Baselines of a set that is not trained on come from the training sets, and only then from nothing."""
    trained, outside = Toy(id="trained"), Toy(id="outside")
    settings = dataclasses.replace(config.evaluate, sources=({"name": "outside"},))
    training = tasks.Training(config, sets_of(trained))
    units, _ = tasks.units_of(dataclasses.replace(config, evaluate=settings), sets_of(outside))
    assert [e.id for e in training.of(units[0])] == [e.id for e in trained.rows["train"] if e.task == "vqa"]
    own = tasks.Training(config, sets_of(trained, outside))
    assert own.of(units[0])[0] is outside.rows["train"][0]


# ------------------------------------------------------------------------------ permutation and selection


@pytest.mark.parametrize("seed", range(5))
def test_permuted_images_leave_image_and_slab(seed):
    rng = np.random.default_rng(seed)
    slabs = np.repeat(np.arange(9), rng.integers(1, 12, 9))
    examples = [
        Example(str(i), "cls", "", "", (f"{slab}-{rng.integers(3)}",), cluster=f"s{slab}")
        for i, slab in enumerate(slabs)
    ]
    images = tasks.permute_images(examples, seed)
    assert Counter(images) == Counter(e.images for e in examples)
    assert all(keys[0].split("-")[0] != e.images[0].split("-")[0] for keys, e in zip(images, examples, strict=True))
    assert images == tasks.permute_images(examples, seed) != tasks.permute_images(examples, seed + 1)


def test_permutation_where_one_slab_holds_most():
    examples = [Example(str(i), "cls", "", "", (f"image{i % 5}",), cluster="s" if i < 8 else "t") for i in range(10)]
    images = tasks.permute_images(examples, 0)
    assert all(keys != e.images for keys, e in zip(images, examples, strict=True))
    assert tasks.permute_images(examples[:1], 0) is None
    assert tasks.permute_images([dataclasses.replace(e, images=("one",)) for e in examples], 0) is None
    assert tasks.permute_images([dataclasses.replace(e, images=()) for e in examples], 0) is None


def test_examples_with_several_images_get_as_many_of_another():
    counts = [1 + i % 3 for i in range(12)]
    examples = [Example(str(i), "vqa", "", "", tuple(f"{i}.{k}" for k in range(n))) for i, n in enumerate(counts)]
    images = tasks.permute_images(examples, 3)
    assert [len(keys) for keys in images] == counts
    assert all(keys != e.images for keys, e in zip(images, examples, strict=True))
    assert tasks.permute_images([*examples, Example("alone", "vqa", "", "", ("a", "b", "c", "d"))], 3) is None


def test_limit_spreads_over_clusters_whatever_the_seed():
    examples = [Example(str(i), "cls", "", "", ("x",), cluster=f"s{min(i // 40, 4)}") for i in range(200)]
    chosen = tasks.select(examples, 50)
    assert Counter(e.cluster for e in chosen) == {f"s{k}": 10 for k in range(5)}
    assert chosen == tasks.select(examples, 50) and tasks.select(examples, 0) == examples
    assert [int(e.id) for e in chosen] == sorted(int(e.id) for e in chosen)
    one_item_clusters = [dataclasses.replace(e, cluster="") for e in examples]
    assert len(tasks.select(one_item_clusters, 50)) == 50


# ------------------------------------------------------------------------------ units


def units(config, *toys, **fields):
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **fields))
    found, notes = tasks.units_of(config, sets_of(*toys))
    return [unit.name for unit in found], notes, found


def entries(*rows):
    settings = default_config()
    settings.evaluate.entries = tuple(
        dict(zip(("source", "task", "split"), row, strict=False)) | row[3] for row in rows
    )
    return from_config_dict(settings).evaluate.entries


def test_by_default_every_task_of_every_source_is_scored_on_every_split(config):
    one, two = Toy(id="one"), Toy(id="two", left_out=("cls",))
    two.rows["val"] = []
    names, notes, _ = units(config, one, two, splits=("val", "test"))
    assert names == [f"one/val/{t}" for t in TASKS] + [f"one/test/{t}" for t in TASKS] + [
        f"two/test/{t}" for t in TASKS if t != "cls"
    ]
    assert notes == ["two: it has no example in split 'val'", "two/test: no example of task 'cls'"]
    assert units(config, one, splits=())[0] == []


def test_a_task_that_its_sources_leave_out_is_not_scored(config):
    sets = sets_of(Toy())
    sets["toy"] = dataclasses.replace(sets["toy"], tasks=("vqa", "qa"))
    assert [unit.task for unit in tasks.units_of(config, sets)[0]] == ["vqa", "qa"]


def test_entries_name_metrics_limits_and_lengths(config):
    chosen = entries(
        ("toy", "vqa", "val", dict(metrics=("token_f1", "exact_match"), limit=5, batch=3, max_new_tokens=7))
    )
    names, notes, (unit,) = units(config, Toy(), entries=chosen)
    assert names == ["toy/val/vqa"] and not notes
    assert [metric.name for metric in unit.metrics] == ["token_f1", "exact_match"]
    assert (len(unit.examples), unit.batch, unit.max_new_tokens) == (5, 3, 7)
    _, _, (unit,) = units(config, Toy(), entries=entries(("toy", "vqa", "val", {})), limit=4)
    assert (len(unit.examples), unit.batch, unit.max_new_tokens) == (4, 16, 100)


MISTAKES = {
    "unknown set": (("to", "vqa", "test", {}), "'to' is not the id of a data set; did you mean 'toy'"),
    "unknown split": (("toy", "vqa", "tset", {}), "'toy' has no example in split 'tset'; did you mean 'test'"),
    "empty split": (("toy", "vqa", "val", {}), "'toy' has no example in split 'val'"),
    "lacking task": (("toy", "cls", "test", {}), "'toy' has no example of task 'cls' in split 'test'; it has vqa, "),
    "unknown metric": (("toy", "vqa", "test", dict(metrics=("exact",))), "'exact' is not a metric; did you mean"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_named_entry_that_cannot_be_scored_is_refused(config, name):
    toy = Toy(left_out=("cls",))
    toy.rows["val"] = []
    row, words = MISTAKES[name]
    with pytest.raises(UserError, match=f"config.evaluate.entries: .*{words}"):
        units(config, toy, entries=entries(row))


def test_a_split_of_no_set_is_refused(config):
    with pytest.raises(UserError, match="data set 'toy' has no example in split 'tset'; did you mean 'test'"):
        units(config, Toy(), splits=("tset",))
    with pytest.raises(UserError, match="'toy' has no example in split 'test'"):
        units(config, Toy(per_task=0))
    with pytest.raises(UserError, match="did you mean 'test'"):
        units(config, Toy(), splits=("tset", "test"))


# ------------------------------------------------------------------------------ scores


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
            assert part["blind"][scores.PERMUTED][primary] == 0.0 and part["peers"] == {} and not part["peer_margin"]
        best = max(part["blind"], key=lambda name: part["blind"][name][primary])
        assert part["margin"]["baseline"] == best
        difference = part["corrected"][primary]["value"] - part["blind"][best][primary]
        assert part["margin"]["value"] == pytest.approx(difference)
        low, high = part["margin"]["ci95"]
        assert low <= part["margin"]["value"] + 1e-12 and part["margin"]["value"] <= high + 1e-12
    assert found["qa"]["published"] == {} and found["qa"]["peer_margin"]["baseline"] in found["qa"]["peers"]
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
        list(found["refer"]["blind"]) == [scores.PERMUTED] and found["refer"]["margin"]["baseline"] == scores.PERMUTED
    )
    assert found["qa"]["templates"]["chapter"]["margin"] is None


def test_predictions_keep_their_example(config, tmp_path):
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, splits=("val",)))
    records = records_of(evaluated(Says(lambda e: e.id), Toy(), config, tmp_path))
    assert all(r["id"] == f"toy/val/{r['prediction']}" and (r["set"], r["split"]) == ("toy", "val") for r in records)
    assert {tuple(r["image_size"]) for r in records if r["images"]} == {SIZE}
    assert [r["box"] for r in records if r["id"] == "toy/val/val-refer-1"] == [[5, 3, 15, 15]]


def test_sets_are_scored_apart_and_pooled_without_collisions(config, tmp_path):
    """Equal template and cluster names of two sets stay apart; pooled values are those of all records together."""
    one, two = Toy(id="one"), Toy(id="two", per_task=12)
    says = Says(lambda e: e.answer)
    scored = evaluated(says, [one, two], config, tmp_path)
    metrics = scores.summarise(config, scored, _about(sets_of(one, two), []) or {"one": {"checksum": "c"}})
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
    found = {part.task: part.scores["protocol"] for part in evaluated(Model(Toy()), Toy(), config, tmp_path)}
    fit = config.data.fit
    assert found["vqa"] == (
        f"toy@cccccccc/test/closed=answer_type/norm=nfkc-lower-signs/form=unimed/fit={fit}/exact_match"
    )
    assert found["refer"] == f"toy@cccccccc/test/form=unimed/fit={fit}/miou"
    assert found["qa"] == "toy@cccccccc/test/norm=nfkc-lower-signs/form=unimed/exact_match"


def test_chat_forms_are_scored_as_med_moe_publishes(config):
    """Recall of open and a substring for closed answers, in per cent; the corrected ones read whole words."""
    rows = [("OPEN", "left lung", "the lung"), ("CLOSED", "no", "it is normal"), ("CLOSED", "yes", "yes")]
    records = [
        {"task": "vqa", "cluster": str(i), "template": "", "reference": reference, "prediction": prediction}
        | {"box": None, "image_size": [9, 9], "meta": {"answer_type": kind}, "blind": {}, "peers": {}}
        for i, (kind, reference, prediction) in enumerate(rows)
    ]
    chat = dataclasses.replace(config, text=dataclasses.replace(config.text, form="phi"))
    published, ours = (scores.score("vqa", records, chat)[key] for key in ("published", "corrected"))
    assert published["open_recall"] == 50.0 and published["closed_accuracy"] == 100.0 and "bleu4" not in published
    assert ours["open_recall"]["value"] == 0.5 and ours["closed_accuracy"]["value"] == 0.5
    assert "open_recall" not in scores.score("vqa", records, config)["published"]  # Uni-Med's rules


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
    assert found["corrected"]["exact_match"]["ci95"] is None and found["margin"] is None and len(found["notes"]) == 3


# ------------------------------------------------------------------------------ files


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def report(config, toys, folder, routing=None, model=None):
    """Scores the toys with a model that sees and writes everything; returns what metrics.json holds."""
    toys = toys if isinstance(toys, list) else [toys]
    sets = sets_of(*toys)
    found, notes = tasks.units_of(config, sets)
    scored = evaluated(model or Says(lambda e: e.answer), toys, config, folder)
    metrics = scores.summarise(config, scored, _about(sets, found), notes, 7, routing)
    write_report(folder, config, metrics, scored, _reader(sets), routing, f"--run={folder}")
    return metrics


@pytest.mark.parametrize("routed", [True, False])
def test_report_writes_every_file(config, tmp_path, routed):
    toy = Toy(left_out=("cls",))
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, splits=("val", "test")))
    routing = {
        "tv_trained": {"value": np.float32(0.25), "ci95": np.array([0.2, 0.3])},
        "tv_step0": {"value": 0.01, "ci95": [0.0, 0.02]},
        "tv_token_router": 0.0,
        "mean_weights": np.full((5, 3), 1 / 3),
        "maps": np.random.default_rng(0).random((5, config.model.tokens_per_image, 3)),
    }
    folder = tmp_path / "run"
    returned = report(config, toy, folder, routing if routed else None)
    metrics = strict((folder / "metrics.json").read_text())
    assert metrics == returned and metrics["schema"] == 1 and metrics["step"] == 7
    keys = {"config_hash", "data_checksum", "code_version", "fidelity", "knobs", "seed", "split", "sets", "pooled"}
    assert keys <= set(metrics) and "tasks" not in metrics
    assert metrics["split"] == "test" and set(metrics["sets"]["toy"]) == set(metrics["pooled"]) == {"val", "test"}
    assert metrics["knobs"]["evaluate.scoring"] == "corrected" and metrics["data_checksum"] == toy.checksum
    expected = "n clusters primary corrected published blind peers margin protocol templates notes"
    for task, part in metrics["sets"]["toy"]["test"].items():
        assert set(expected.split()) <= set(part) and part["n"] == 24 and task != "cls"
        for entry in part["corrected"].values():
            low, high = entry["ci95"]
            assert low - 1e-9 <= entry["value"] <= high + 1e-9
        for template, entry in part["templates"].items():
            assert {"n", "value", "ci95", "blind", "margin"} <= set(entry)
            assert metrics["pooled"]["test"][task]["templates"][f"toy/{template}"] == entry
    assert "toy/test: no example of task 'cls'" in metrics["notes"]
    assert ("routing" in metrics) == routed == (folder / "routing.png").exists()
    if routed:
        assert metrics["routing"]["tv_trained"]["ci95"][0] == pytest.approx(0.2) and "maps" not in metrics["routing"]
    lines = [strict(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 5 * 24
    keys = "id set split task template cluster question images reference prediction box image_size meta blind peers"
    assert set(keys.split()) <= set(lines[0])
    assert (folder / "predictions.png").stat().st_size > 10_000
    text = (folder / "report.md").read_text()
    for piece in (
        "not a medical device",
        f"evaluate --run={folder}",
        "| toy | refer | 24 | miou |",
        "no example of task",
    ):
        assert piece in text
    for heading in ("## Split val", "## By question template on test", "## Next to learned baselines", "## Protocols"):
        assert heading in text
    assert "predictions.png" in text and ("routing.png" in text) == routed and "all sets" not in text


def test_scores_can_be_made_again_from_predictions(config, tmp_path):
    metrics = report(config, Toy(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for task in TASKS:
        kept = metrics["sets"]["toy"]["test"][task]
        again = scores.score(task, [line for line in lines if line["task"] == task], config, protocol=kept["protocol"])
        assert plain(again) == kept


def test_report_prints_each_sets_own_note_and_leads_with_published(tmp_path):
    settings = default_config()
    settings.evaluate.scoring, settings.evaluate.bootstrap, settings.evaluate.splits = "published", 20, ("test",)
    settings.evaluate.batch = 16
    config = from_config_dict(settings)
    toys = [Toy(per_task=4, id="one", note="Slices of one head."), Toy(per_task=4, id="two", note="Three dogs.")]
    report(config, toys, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Data `one`: Slices of one head." in text and "Data `two`: Three dogs." in text
    assert text.index("as published on test") < text.index("Corrected scores on test")
    assert "| all sets | vqa | 8 |" in text
    assert "all sets" not in (report(config, toys[:1], tmp_path / "b") and (tmp_path / "b/report.md").read_text())


@pytest.mark.parametrize("info", [brain.INFO, domains.INFO], ids=lambda info: info.name)
def test_reports_say_that_one_average_brain_says_nothing_about_patients(info, config, tmp_path):
    assert "Slices of ONE average brain" in info.note and "nothing about patients" in info.note
    report(config, Toy(per_task=4, note=info.note), tmp_path)
    assert info.note in (tmp_path / "report.md").read_text()


def test_the_leading_split_is_test_or_else_the_first(config, tmp_path):
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, splits=("val", "train")))
    metrics = report(config, Toy(per_task=4), tmp_path)
    assert metrics["split"] == "val" and "Corrected scores on val" in (tmp_path / "report.md").read_text()


def test_without_matplotlib_the_numbers_are_still_written(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report(config, Toy(per_task=4), tmp_path)
    assert (tmp_path / "metrics.json").exists() and "install matplotlib" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "aggregation, rate, image, expected",
    [
        ("projection", 4, 64, (8, 2)),
        ("projection", 4, 48, (1, 9)),  # strips wrap over the rows of a 6 x 6 grid
        ("block", 4, 64, (4, 4)),
        ("avgpool", 4, 64, (4, 4)),
    ],
)
def test_token_grid(aggregation, rate, image, expected, tmp_path):
    settings = default_config()
    settings.model.connector.aggregation, settings.model.connector.rate = aggregation, rate
    settings.model.vision.image_size = image
    config = from_config_dict(settings)
    assert token_grid(config) == expected
    tokens = expected[0] * expected[1]
    draw_routing(tmp_path / "r.png", {"maps": np.full((5, tokens, 2), 0.5)}, expected)  # equal weights draw too


def test_numbers_that_are_not_finite_become_null():
    assert plain({"a": [float("nan"), np.float32("inf"), np.arange(2)], 3: np.int64(1)}) == {
        "a": [None, None, [0, 1]],
        "3": 1,
    }


def test_code_version_names_the_package():
    version = code_version()
    assert version and "\n" not in version
