"""metrics.json, predictions, report and pictures of an evaluation of a toy data set."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from support.toy import Says, Toy, evaluated, sets_of, toy_config

from unimed_jax.config import TASKS, default_config
from unimed_jax.data.datasets import brain, domains
from unimed_jax.evaluate import scores, tasks
from unimed_jax.evaluate.metrics import captions
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.report.pictures import draw_routing, token_grid
from unimed_jax.evaluate.run import _about, _reader
from unimed_jax.provenance import code_version, plain
from unimed_jax.settings import from_config_dict


@pytest.fixture
def config():
    return toy_config()


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)  # METEOR takes 9 s to start


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
    config = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, splits=("val", "test"))
    )
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
    keys = {
        "config_hash",
        "data_checksum",
        "code_version",
        "fidelity",
        "knobs",
        "seed",
        "split",
        "sets",
        "pooled",
    }
    assert keys <= set(metrics) and "tasks" not in metrics
    assert metrics["split"] == "test" and set(metrics["sets"]["toy"]) == set(metrics["pooled"]) == {
        "val",
        "test",
    }
    assert (
        metrics["knobs"]["evaluate.scoring"] == "corrected" and metrics["data_checksum"] == toy.checksum
    )
    expected = "n clusters primary corrected published blind peers margin protocol templates notes"
    for task, part in metrics["sets"]["toy"]["test"].items():
        assert set(expected.split()) <= set(part) and part["n"] == 24 and task != "cls"
        lacking = {name for name, entry in part["corrected"].items() if "why" in entry}
        assert lacking == ({"cider"} if task == "caption" else set())
        for entry in (part["corrected"][name] for name in set(part["corrected"]) - lacking):
            low, high = entry["ci95"]
            assert low - 1e-9 <= entry["value"] <= high + 1e-9
        for template, entry in part["templates"].items():
            assert {"n", "value", "ci95", "blind", "margin"} <= set(entry)
            assert metrics["pooled"]["test"][task]["templates"][f"toy/{template}"] == entry
    assert "toy/test: no example of task 'cls'" in metrics["notes"]
    assert ("routing" in metrics) == routed == (folder / "routing.png").exists()
    if routed:
        assert (
            metrics["routing"]["tv_trained"]["ci95"][0] == pytest.approx(0.2)
            and "maps" not in metrics["routing"]
        )
    lines = [strict(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 5 * 24
    keys = "id set split task template cluster question images reference prediction box meta blind peers"
    assert {*keys.split(), "image_size"} <= set(lines[0])
    assert (folder / "predictions.png").stat().st_size > 10_000
    text = (folder / "report.md").read_text()
    for piece in (
        "not a medical device",
        f"evaluate --run={folder}",
        "| toy | refer | 24 | miou |",
        "no example of task",
    ):
        assert piece in text
    for heading in (
        "## Split val",
        "## By question template on test",
        "## Next to learned baselines",
        "## Further corrected scores on test",
        "| toy | caption | cider | not computed: needs Java |",
        "## Protocols",
    ):
        assert heading in text
    assert "predictions.png" in text and ("routing.png" in text) == routed and "all sets" not in text


def test_scores_can_be_made_again_from_predictions(config, tmp_path):
    metrics = report(config, Toy(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for task in TASKS:
        kept = metrics["sets"]["toy"]["test"][task]
        again = scores.score(
            task, [line for line in lines if line["task"] == task], config, protocols=kept["protocols"]
        )
        assert plain(again) == kept


def test_report_prints_each_sets_own_note_and_leads_with_published(tmp_path):
    settings = default_config()
    settings.evaluate.scoring, settings.evaluate.bootstrap, settings.evaluate.splits = (
        "published",
        20,
        ("test",),
    )
    settings.evaluate.batch = 16
    config = from_config_dict(settings)
    toys = [
        Toy(per_task=4, id="one", note="Slices of one head."),
        Toy(per_task=4, id="two", note="Three dogs."),
    ]
    report(config, toys, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Data `one`: Slices of one head." in text and "Data `two`: Three dogs." in text
    assert text.index("as published on test") < text.index("Corrected scores on test")
    assert "| all sets | vqa | 8 |" in text
    assert "all sets" not in (
        report(config, toys[:1], tmp_path / "b") and (tmp_path / "b/report.md").read_text()
    )


@pytest.mark.parametrize("info", [brain.INFO, domains.INFO], ids=lambda info: info.name)
def test_reports_say_that_one_average_brain_says_nothing_about_patients(info, config, tmp_path):
    assert "Slices of ONE average brain" in info.note and "nothing about patients" in info.note
    report(config, Toy(per_task=4, note=info.note), tmp_path)
    assert info.note in (tmp_path / "report.md").read_text()


def test_the_leading_split_is_test_or_else_the_first(config, tmp_path):
    config = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, splits=("val", "train"))
    )
    metrics = report(config, Toy(per_task=4), tmp_path)
    assert (
        metrics["split"] == "val" and "Corrected scores on val" in (tmp_path / "report.md").read_text()
    )


def test_without_matplotlib_the_numbers_are_still_written(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report(config, Toy(per_task=4), tmp_path)
    assert (tmp_path / "metrics.json").exists() and "install matplotlib" in (
        tmp_path / "report.md"
    ).read_text()


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
    # equal weights draw too
    draw_routing(tmp_path / "r.png", {"maps": np.full((5, tokens, 2), 0.5)}, expected)


def test_numbers_that_are_not_finite_become_null():
    assert plain({"a": [float("nan"), np.float32("inf"), np.arange(2)], 3: np.int64(1)}) == {
        "a": [None, None, [0, 1]],
        "3": 1,
    }


def test_code_version_names_the_package():
    version = code_version()
    assert version and "\n" not in version
