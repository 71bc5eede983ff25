"""Answers are written as they come: a cut evaluation continues and ends in the same bytes."""

import json
import random

import numpy as np
import pytest
from support.toy import Model, Says, Toy, evaluated, sets_of

from unimed_jax.config import default_config
from unimed_jax.evaluate import scores
from unimed_jax.evaluate.answers import JOURNAL, Answered, Journal, answer_units, batches, calls_of
from unimed_jax.evaluate.metrics import captions
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.run import _about, _reader
from unimed_jax.evaluate.tasks import units_of
from unimed_jax.settings import from_config_dict

# Passes of an unbroken evaluation of 6 tasks with 24 examples, 5 of them with permuted images too. In
# batches of 4: 6 a task. As a rule 16 together: 9 calls, of which the last is of text alone.
PASSES = {"batches": 6 * 6 + 5 * 6, "together": 9 + 8}


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)


@pytest.fixture(params=PASSES)
def kind(request):
    return request.param


@pytest.fixture
def config(kind):
    settings = default_config()
    settings.evaluate.bootstrap, settings.evaluate.batch, settings.evaluate.splits = 50, 4, ("test",)
    if kind == "batches":  # answers depend on their batch
        settings.model.moe.experts, settings.model.moe.eval_capacity_factor = 2, 1.0
    return from_config_dict(settings)


def finish(config, toy, model, folder):
    """Evaluates and writes; returns the bytes of metrics.json and predictions.jsonl."""
    scored = evaluated(model, toy, config, folder)
    metrics = scores.summarise(config, scored, _about(sets_of(toy), []) or {"toy": {"checksum": "c"}})
    write_report(folder, config, metrics, scored, _reader(sets_of(toy)), None, "--run=x")
    return [(folder / name).read_bytes() for name in ("metrics.json", "predictions.jsonl")]


@pytest.mark.parametrize("seed", range(2))  # each with both kinds of calls
def test_an_evaluation_cut_three_times_ends_in_the_same_bytes(config, kind, tmp_path, seed):
    toy, rng = Toy(), np.random.default_rng(seed)
    whole = Model(toy)
    expected = finish(config, toy, whole, tmp_path / "whole")
    assert len(whole.calls) == PASSES[kind]
    asked = 0
    for _ in range(3):
        dying = Model(toy, dies_after=int(rng.integers(1, 6)))
        with pytest.raises(KeyboardInterrupt):
            evaluated(dying, toy, config, tmp_path / "cut")
        asked += len(dying.calls)
        file = tmp_path / "cut" / JOURNAL
        if file.exists() and rng.random() < 0.7:  # the kill fell into a write
            torn = file.read_bytes()
            file.write_bytes(torn[: len(torn) - int(rng.integers(1, 60))])
    last = Model(toy)
    assert finish(config, toy, last, tmp_path / "cut") == expected
    assert len(last.calls) < PASSES[kind] <= asked + len(last.calls)


def test_a_finished_call_is_not_asked_again(config, tmp_path):
    toy = Toy()
    evaluated(Model(toy), toy, config, tmp_path)
    again = Model(toy)
    evaluated(again, toy, config, tmp_path)
    assert again.calls == []


def test_answers_of_other_weights_settings_or_data_are_dropped(config, kind, tmp_path):
    toy = Toy()
    evaluated(Model(toy), toy, config, tmp_path, fingerprint="old")
    again = Model(toy)
    evaluated(again, toy, config, tmp_path, fingerprint="new")
    assert len(again.calls) == PASSES[kind]
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert {line["fingerprint"] for line in lines} == {"new"} and len(lines) == 6 * 24


def test_a_torn_last_line_is_dropped_and_the_next_begins_on_its_own(tmp_path):
    journal = Journal(tmp_path, "f")
    journal.add({"a": Answered("left\u2028 lung\n", [3, 4], "x", ["k"]), "b": Answered("\ud800 odd")})
    file = tmp_path / JOURNAL
    whole = file.read_bytes()
    for cut in range(len(whole.split(b"\n")[0]) + 1, len(whole)):
        file.write_bytes(whole[:cut])
        again = Journal(tmp_path, "f")
        assert again.found == {"a": Answered("left\u2028 lung\n", [3, 4], "x", ["k"])}
        again.add({"c": Answered("right")})
        assert set(Journal(tmp_path, "f").found) == {"a", "c"}
    file.write_bytes(whole)
    assert Journal(tmp_path, "f").found["b"].prediction == "\ud800 odd"


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_costs_its_line_alone(tmp_path, seed):
    journal = Journal(tmp_path, "f")
    given = {str(i): Answered(f"answer {i}", [i, i], "other", ["k"]) for i in range(5)}
    for name, answer in given.items():
        journal.add({name: answer})
    file, rng = tmp_path / JOURNAL, random.Random(seed)
    damaged = bytearray(file.read_bytes())
    damaged[rng.randrange(len(damaged) - 1)] ^= 1 << rng.randrange(8)
    file.write_bytes(damaged + b"5\n" + b"[" * 10_000 + b'\n{"id": "x", "prediction": "y"}\n\xff\n')
    found = Journal(tmp_path, "f").found
    assert 3 <= len(found) <= 4 and found.items() <= given.items()
    assert Journal(tmp_path, "f").found == found


def test_batches_are_fixed_and_of_like_lengths(config):
    (unit, *_), _ = units_of(config, sets_of(Toy()))
    parts = list(batches(unit))
    assert parts == list(batches(unit)) and [len(part) for part in parts] == [4] * 6
    lengths = [[len(unit.examples[i].question) for i in part] for part in parts]
    assert all(max(a) <= min(b) for a, b in zip(lengths, lengths[1:], strict=False))


def test_calls_hold_every_example_once_with_the_images_of_both_passes(config):
    """One picture stands for an image wherever it is asked about, and is read when it is needed."""
    units, _ = units_of(config, sets_of(Toy()))
    every = [example for unit in units for example in unit.examples]
    for count, sizes in ((0, [4] * 36), (50, [50, 50, 44])):
        calls = calls_of(units, 0, True, count)
        assert [len(call.own) for call in calls] == sizes
        own = [question for call in calls for question in call.own]
        assert sorted(q.example.id for q in own) == sorted(e.id for e in every)
        assert all(tuple(p.name for p in q.images) == q.example.images for q in own)
        pictures = {p.key: p for q in own for p in q.images}
        for call in calls:
            for question, other in zip(call.own, call.others, strict=True):
                assert (other is None) == (question.example.task == "qa")
                if other is not None:
                    assert other.example is question.example and other.seed == question.seed
                    assert all(pictures[p.key] is p for p in other.images)
                    assert not {p.key for p in other.images} & {p.key for p in question.images}
    plain = calls_of(units, 0, False, 50)
    assert all(other is None for call in plain for other in call.others)
    assert [len(call.passes) for call in calls_of(units, 0, True, 50)] == [2, 2, 2]
    assert all(len(call.passes) == 1 for call in plain)


def test_sampled_answers_have_a_seed_of_their_batch(config):
    """A question's seed is that of its batch and its place in it, in whatever calls it comes."""
    units, _ = units_of(config, sets_of(Toy()))
    found = []
    for count in (0, 50):
        calls = calls_of(units, 5, True, count)
        found.append({(q.unit.name, q.example.id): q.seed for call in calls for q in call.own})
    assert found[0] == found[1]
    for unit in units:
        seeds = [found[0][unit.name, unit.examples[i].id] for part in batches(unit) for i in part]
        assert seeds == [5 + batch + i for batch in range(6) for i in range(4)]


def test_without_a_journal_nothing_is_permuted_or_written(config, tmp_path, capsys):
    units, _ = units_of(config, sets_of(Toy()))
    found = answer_units(units, Says(lambda e: e.answer), 0)
    assert len(found) == 6 * 24 and all(answer.permuted is None for answer in found.values())
    assert capsys.readouterr().err == ""
