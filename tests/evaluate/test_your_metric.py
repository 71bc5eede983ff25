"""The recipe of docs/your_metric.md works as it stands there: one new file, one line in the config."""

import dataclasses
import re
from pathlib import Path

import pytest
from support.toy import Model, Toy, evaluated

from unimed_jax.config import default_config
from unimed_jax.evaluate.metrics import registry
from unimed_jax.settings import from_config_dict

PAGE = Path(__file__).parents[2] / "docs" / "your_metric.md"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """(the page's file as an importable module, its line for the config)."""
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    file, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert file.startswith("# my_lab/metrics.py\n")
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "metrics.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path)
    return line


def test_the_metric_of_the_docs_is_computed_for_model_and_baselines(recipe, tmp_path):
    config = default_config()
    exec(recipe, {"config": config})
    config.evaluate.bootstrap, config.evaluate.batch = 50, 16
    settings = from_config_dict(config)
    toy = Toy(id="brain")
    (part,) = evaluated(Model(toy), toy, settings, tmp_path)
    assert part.scores["primary"] == "exact_match" and list(part.scores["corrected"]) == [
        "exact_match",
        "first_word",
    ]
    assert part.scores["corrected"]["first_word"]["value"] == 1.0
    assert all("first_word" in values for values in part.scores["blind"].values())

    alone = dataclasses.replace(settings.evaluate.entries[0], metrics=("my_lab.metrics:first_word",))
    settings = dataclasses.replace(
        settings, evaluate=dataclasses.replace(settings.evaluate, entries=(alone,))
    )
    (part,) = evaluated(Model(toy), toy, settings, tmp_path)
    assert part.scores["primary"] == "first_word" and part.scores["protocol"].endswith("/first_word")
