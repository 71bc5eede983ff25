"""docs/your_data.md: its records, config file and validation settings work as they are written."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.config_file import load_config_file
from unimed_jax.data.datasets import open_sources
from unimed_jax.evaluate.tasks import open_sets, units_of
from unimed_jax.settings import from_config_dict

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your_data.md").read_text()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The page's config, on its records thirty times over, each with an image of its own.

    One image is lost.
    """
    (records,) = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.S))
    asked, text = records
    images = tmp_path / "lab" / "squares" / "images"
    images.mkdir(parents=True)
    for i in range(30):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(images / f"{i}.png")
    many = [asked | {"image": f"{i}.png"} for i in range(31)] + [text]
    (images.parent / "train.json").write_text(json.dumps(many))
    (images.parent / "test.json").write_text(json.dumps(records))
    code = re.findall(r"```python\n(.*?)```", PAGE, re.S)[0]
    (tmp_path / "my_lab.py").write_text(code)
    shutil.copy(ROOT / "configs" / "common.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = load_config_file("my_lab.py")
    settings.data.cache = str(tmp_path / "cache")
    return settings


def test_the_config_of_the_docs_opens_its_records(config):
    checked = from_config_dict(config)
    (data,) = open_sources(checked.data)
    assert (data.id, data.skipped, data.info.licence) == ("squares", 1, "CC0")
    assert set(data.splits) == {"train", "val", "test"}
    assert sum(len(data.examples(split)) for split in ("train", "val")) == 31
    assert {example.task for split in data.splits for example in data.examples(split)} == {"vqa", "qa"}
    images = [{e.images for e in data.examples(split) if e.images} for split in ("train", "val")]
    assert not images[0] & images[1]
    assert {unit.name for unit in units_of(checked, open_sets(checked.held_out))[0]} >= {
        "squares/val/vqa",
        "squares/test/vqa",
        "squares/test/qa",
    }


def test_the_jsonl_records_of_the_docs_are_read(tmp_path):
    (lines,) = re.findall(r"```jsonl\n(.*?)```", PAGE, re.S)
    (tmp_path / "case7").mkdir()
    (tmp_path / "records.jsonl").write_text(lines)
    for name in ("a", "b"):
        Image.new("RGB", (100, 80)).save(tmp_path / "case7" / f"{name}.png")
    source = SourceConfig("jsonl", path=str(tmp_path))
    (data,) = open_sources(DataConfig((source,), cache=str(tmp_path / "cache")))
    found = data.examples("train")
    assert [(e.task, len(e.images), e.cluster) for e in found] == [
        ("vqa", 1, "case7"),
        ("refer", 1, "case7"),
        ("caption", 2, "case7"),
    ]


def test_the_validation_settings_of_the_docs_are_understood(config):
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "every=" in text)
    exec(code, {"config": config})
    units, notes = units_of(from_config_dict(config), open_sets(from_config_dict(config).held_out))
    assert [(unit.name, unit.every) for unit in units] == [
        ("squares/val/vqa", 10),
        ("squares/test/vqa", 0),
    ]
    assert notes == []
