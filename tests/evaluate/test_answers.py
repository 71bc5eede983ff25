"""Answers are written as they come: a cut evaluation continues and ends in the same bytes."""

import json
import random

import numpy as np
import pytest
from support.toy import Model, Says, Toy, evaluated, sets_of

from unimed_jax.config import default_config
from unimed_jax.evaluate import scores
from unimed_jax.evaluate.answers import JOURNAL, Answered, Journal, answer_units, batches
from unimed_jax.evaluate.metrics import captions
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.run import _about, _reader
from unimed_jax.evaluate.tasks import units_of
from unimed_jax.settings import from_config_dict

# of an unbroken evaluation of two splits: 6 tasks in 2 batches, 5 of them with permuted images too
CALLS = 22


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)


@pytest.fixture
def config():
    settings = default_config()
    settings.evaluate.bootstrap, settings.evaluate.batch, settings.evaluate.splits = 50, 16, ("test",)
    return from_config_dict(settings)


def finish(config, toy, model, folder):
    """Evaluates and writes; returns the bytes of metrics.json and predictions.jsonl."""
    scored = evaluated(model, toy, config, folder)
    metrics = scores.summarise(config, scored, _about(sets_of(toy), []) or {"toy": {"checksum": "c"}})
    write_report(folder, config, metrics, scored, _reader(sets_of(toy)), None, "--run=x")
    return [(folder / name).read_bytes() for name in ("metrics.json", "predictions.jsonl")]


@pytest.mark.parametrize("seed", range(4))
def test_an_evaluation_cut_three_times_ends_in_the_same_bytes(config, tmp_path, seed):
    toy, rng = Toy(), np.random.default_rng(seed)
    whole = Model(toy)
    expected = finish(config, toy, whole, tmp_path / "whole")
    assert len(whole.calls) == CALLS
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
    assert len(last.calls) < CALLS and asked + len(last.calls) >= CALLS


def test_a_finished_batch_is_not_asked_again(config, tmp_path):
    toy = Toy()
    evaluated(Model(toy), toy, config, tmp_path)
    again = Model(toy)
    evaluated(again, toy, config, tmp_path)
    assert again.calls == []


def test_answers_of_other_weights_settings_or_data_are_dropped(config, tmp_path):
    toy = Toy()
    evaluated(Model(toy), toy, config, tmp_path, fingerprint="old")
    again = Model(toy)
    evaluated(again, toy, config, tmp_path, fingerprint="new")
    assert len(again.calls) == CALLS
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
    assert parts == list(batches(unit)) and [len(part) for part in parts] == [16, 8]
    lengths = [[len(unit.examples[i].question) for i in part] for part in parts]
    assert max(lengths[0]) <= min(lengths[1])


def test_sampled_answers_have_a_seed_of_their_batch(config, tmp_path):
    seeds = []

    def answer_of(unit):
        return lambda examples, images, seed: seeds.append((unit.name, seed)) or [""] * len(examples)

    units, _ = units_of(config, sets_of(Toy()))
    answer_units(units, answer_of, 5, Journal(tmp_path, "f"))
    assert set(seeds) == {(unit.name, seed) for unit in units for seed in (5, 6)}


def test_without_a_journal_nothing_is_permuted_or_written(config, tmp_path, capsys):
    units, _ = units_of(config, sets_of(Toy()))
    found = answer_units(units, Says(lambda e: e.answer), 0)
    assert len(found) == 6 * 24 and all(answer.permuted is None for answer in found.values())
    assert capsys.readouterr().err == ""
