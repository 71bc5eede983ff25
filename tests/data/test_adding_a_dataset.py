"""docs/adding_a_dataset.md works as it is written."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources

DOCS = Path(__file__).parents[2] / "docs" / "adding_a_dataset.md"


def test_the_data_set_of_the_docs(tmp_path, monkeypatch):
    (text,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "my_data.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    raw = tmp_path / "raw"
    raw.mkdir()
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(raw / "a.png")
    (raw / "train.tsv").write_text("a.png\tp1\tIs it clear?\tyes\nbroken\n")
    source = SourceConfig("my_lab.my_data", path=str(raw))
    (data,) = open_sources(DataConfig((source,), cache=str(tmp_path / "cache")))
    (example,) = data.examples("train")
    assert (data.id, data.splits, data.skipped, example.cluster) == ("my_data", ("train",), 1, "p1")
    assert (data.image("a.png") == 9).all()
    assert (data.folder / "skipped.txt").read_text() == "train: line 2: 1 fields\n"
