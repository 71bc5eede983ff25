"""Equal protocol ids mean comparable scores: each ingredient that changes, changes the id."""

import dataclasses
import hashlib
import json

import pytest
from support.toy import Says, Toy, evaluated, sets_of, toy_config

from unimed_jax.config import SourceConfig
from unimed_jax.data import forms
from unimed_jax.evaluate import labels, scores, tasks
from unimed_jax.evaluate.answers import Journal
from unimed_jax.evaluate.labels import OPTIONS, TRAINING, YES_NO, Labels
from unimed_jax.evaluate.metrics import captions
from unimed_jax.evaluate.protocol import protocols
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.run import _about, _reader, answer_and_score
from unimed_jax.predict.likelihood import Likelihood


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)


def changed(config, **groups):
    parts = {name: dataclasses.replace(getattr(config, name), **new) for name, new in groups.items()}
    return dataclasses.replace(config, **parts)


def ids(config=None, toy=None, settings=(), rules=None, task="vqa", given=(), external=False):
    config = config or toy_config()
    sets = sets_of(toy or Toy())
    (name,) = sets
    sets[name] = dataclasses.replace(sets[name], settings=settings, rules=rules or {})
    unit = next(u for u in tasks.units_of(config, sets)[0] if u.task == task)
    return protocols(unit, config, given, external)


def other_data():
    toy = Toy()
    toy.checksum = "d" * 64
    return toy


CONFIG = toy_config()
CLOSED = SourceConfig("toy", only={"answer_type": ("closed",)})
CHANGES = {
    "set": dict(toy=Toy(id="other")),
    "revision": dict(toy=other_data()),
    "filter": dict(settings=(CLOSED,)),
    "split": dict(config=changed(CONFIG, evaluate=dict(splits=("val",)))),
    "split rule": dict(rules={"test": "train[90%:] by cluster"}),
    "number of examples": dict(config=changed(CONFIG, evaluate=dict(limit=12))),
    "form of the prompt": dict(config=changed(CONFIG, text=dict(form="phi"))),
    "prompt without its marks": dict(config=changed(CONFIG, text=dict(chat_template=False))),
    "prompt with two beginnings": dict(config=changed(CONFIG, text=dict(double_bos=True))),
    "words of a reference": dict(config=changed(CONFIG, text=dict(max_words=50))),
    "image fit": dict(config=changed(CONFIG, data=dict(fit="pad"))),
    "another tool": dict(external=True),
}
PLANE = Labels(TRAINING, "plane", ("axial", "coronal"))


def test_every_score_has_an_id_of_its_own():
    found = ids(given=[PLANE])
    config = toy_config()
    (unit,) = (u for u in tasks.units_of(config, sets_of(Toy()))[0] if u.task == "vqa")
    assert set(found) == {metric.name for metric in unit.metrics} | {"published", "likelihood"}
    assert len(set(found.values())) == len(found)
    assert found["published"].endswith("/published=Uni-Med")
    start, _, last = found["likelihood"].rpartition("/")
    assert last == "likelihood-bins=15" and start.rpartition("/")[2].startswith("labels=training:")
    assert "likelihood" not in ids()


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_ingredient_changes_every_id(name):
    usual, other = ids(given=[PLANE]), ids(**CHANGES[name], given=[PLANE])
    assert set(usual) == set(other)
    assert not set(usual.values()) & set(other.values())


def test_the_ids_of_all_changes_differ():
    found = [ids(**change)["exact_match"] for change in CHANGES.values()]
    assert len(set(found)) == len(CHANGES)


def test_what_does_not_change_a_score_keeps_its_id():
    """Training, devices, how answers are generated, and a filter of another task."""
    same = changed(
        CONFIG,
        train=dict(steps=7),
        evaluate=dict(batch=3, temperature=1.0, bootstrap=9, limit=24),
        text=dict(training_blank=True),
    )
    assert ids(same) == ids()
    of_refer = dataclasses.replace(CLOSED, tasks=("refer",))
    assert ids(settings=(of_refer, SourceConfig("toy"))) == ids(settings=(SourceConfig("toy"),)) == ids()


def test_labels_are_named_by_rule_and_content():
    def named(*given):
        return ids(given=given)["likelihood"]

    closed = Labels(YES_NO, "yes/no", ("yes", "no"))
    found = [
        named(PLANE),
        named(PLANE._replace(labels=("axial", "coronal", "sagittal"))),
        named(closed),
        named(closed, PLANE),
        named(Labels(OPTIONS, OPTIONS, ("a", "b"))),
    ]
    assert len(set(found)) == len(found)
    assert named(closed, PLANE) == named(PLANE, closed, PLANE)
    # the options of single questions belong to the set, which has a checksum
    assert found[-1] == named(Labels(OPTIONS, OPTIONS, ("c", "d")))


def test_new_words_of_a_prompt_need_a_new_name():
    """A prompt's id is its form's name. Whoever changes what evaluation asks gives the form another
    name (protocol.prompt_of), and then writes the new digest here.
    """
    words = [forms.TAGS, {task: pool[0] for task, pool in forms.INSTRUCTIONS.items()}]
    words += [dataclasses.astuple(template) for template in (forms._TURNS, forms._GREETED)]
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
    assert digest == "bc7ecb380f23705c"


# ------------------------------------------------------------------------------ in the scores


def likelihoods(units, known):
    """A model that is sure of the true answer, except of every fourth question."""
    found = {}
    for unit in units:
        for i, example in enumerate(unit.examples):
            name = unit.id_of(example)
            if name in known:
                place = labels.place_of(example.answer, known[name].labels)
                logs = [-3.0] * len(known[name].labels)
                logs[place if i % 4 else (place + 1) % len(logs)] = -1.0
                found[name] = Likelihood(logs, [2] * len(logs))
    return found


def scored(toys, tmp_path):
    config, sets = toy_config(), sets_of(*toys)
    units, _ = tasks.units_of(config, sets)
    journal = Journal(tmp_path, "f")
    training = tasks.Training(config, sets)
    says = Says(lambda e: e.answer)
    return config, answer_and_score(units, training, says, journal, config, likelihoods)


def test_scores_hold_likelihoods_beside_generated_answers(tmp_path):
    config, parts = scored([Toy(id="one"), Toy(id="two", per_task=12)], tmp_path)
    found = {(part.set, part.task): part.scores for part in parts}
    with_labels = {key for key, entry in found.items() if "likelihood" in entry}
    assert with_labels == {(name, task) for name in ("one", "two") for task in ("vqa", "cls")}
    vqa, cls = (found["one", task]["likelihood"] for task in ("vqa", "cls"))
    assert (vqa["n"], vqa["left_out"], cls["n"], cls["left_out"]) == (18, 6, 24, 0)
    assert cls["labels"] == {"shape": ["bar", "disc", "ring"]} and vqa["labels"] == {
        "yes/no": ["yes", "no"]
    }
    assert cls["sum"]["accuracy"]["value"] == 0.75 and cls["generated"]["accuracy"]["value"] == 1.0
    assert cls["gain"]["value"] == -0.25 and cls["gain"]["ci95"][1] < 0
    for entry in found.values():
        named = {"published", *entry["corrected"]} | ({"likelihood"} if "likelihood" in entry else set())
        assert named <= set(entry["protocols"])
        assert entry["protocol"] == entry["protocols"][entry["primary"]]
    pooled = scores.pooled([part for part in parts if part.task == "cls"], config)
    assert set(pooled["likelihood"]["groups"]) == {"one/shape", "two/shape"}
    assert pooled["likelihood"]["n"] == 36 and pooled["protocols"]["exact_match"] == pooled["protocol"]
    line = next(r for part in parts for r in part.records if r["task"] == "cls")["likelihood"]
    assert line["rule"] == TRAINING and len(line["labels"]) == len(line["log_likelihoods"]) == 3


def test_the_report_shows_likelihoods_and_every_protocol(tmp_path):
    toy = Toy(per_task=12)
    config, parts = scored([toy], tmp_path / "answers")
    sets = sets_of(toy)
    about = _about(sets, tasks.units_of(config, sets)[0])
    metrics = scores.summarise(config, parts, about)
    write_report(tmp_path, config, metrics, parts, _reader(sets), None, "--run=x")
    said = (tmp_path / "report.md").read_text()
    assert "## Classes and choices on test" in said and "![reliability](reliability.png)" in said
    cells = "| toy | cls | all | 12 | likelihood | 0.750 ["
    assert cells in said and "| toy | vqa | all | 9 | generated answer | 1.000 [" in said
    for entry in metrics["sets"]["toy"]["test"].values():
        assert all(f"| {name} | `{one}` |" in said for name, one in entry["protocols"].items())
    assert (tmp_path / "reliability.png").stat().st_size > 10_000


def test_without_the_pass_nothing_is_said_of_likelihoods(tmp_path):
    parts = evaluated(Says(lambda e: e.answer), Toy(per_task=4), toy_config(), tmp_path)
    assert not any("likelihood" in part.scores for part in parts)
    assert not any("likelihood" in record for part in parts for record in part.records)
