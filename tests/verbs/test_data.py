"""`data twin`, `data show` and `data schema`, as a person calls them."""

import json

import pytest
from PIL import Image

from unimed_jax import main as cli
from unimed_jax.config import TASKS
from unimed_jax.data.datasets import jsonl

CONFIG = """
from unimed_jax.config import default_config
def get_config():
    config = default_config()
    config.data.sources = (dict(name="jsonl", id="mine", path="{path}"),)
    config.data.cache = "{path}-cache"
    return config
"""


def test_a_twin_is_written_and_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cli.main(["data", "twin", "voc", f"--out={tmp_path / 'voc'}", "--n=6"]) == 0
    words = ["data", "show", "voc", f"--path={tmp_path / 'voc'}", f"--out={tmp_path / 'sheet.png'}"]
    assert cli.main([*words, "--task=refer", "--n=5", "--split=val"]) == 0
    said = capsys.readouterr().out
    assert "wrote a twin of voc" in said and "examples of voc" in said
    picture = Image.open(tmp_path / "sheet.png")
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert picture.width % 300 == 0 and (120, 230, 120) in colours  # the box and the answer


def test_a_set_of_a_config_is_shown_with_all_tasks(tmp_path, capsys):
    assert cli.main(["data", "twin", "jsonl", f"--out={tmp_path / 'set'}", "--n=6"]) == 0
    (tmp_path / "mine.py").write_text(CONFIG.format(path=tmp_path / "set"))
    words = [
        "data",
        "show",
        "mine",
        f"--config={tmp_path / 'mine.py'}",
        f"--out={tmp_path / 'sheet.png'}",
    ]
    assert cli.main([*words, f"--n={2 * len(TASKS)}"]) == 0
    assert f"drew {2 * len(TASKS)} examples of mine" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").width == 1200


def test_the_schema_is_printed(capsys):
    assert cli.main(["data", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == jsonl.SCHEMA


@pytest.mark.parametrize(
    "words, match",
    [
        (["twin", "vocs", "--out={tmp}/x"], "there is no twin of 'vocs'; did you mean 'voc'"),
        (["twin", "voc", "--out={tmp}/x", "--n=0"], "--n is at least 1"),
        (["show", "brian", "--out={tmp}/x.png"], "'brian' is not a data set; did you mean 'brain'"),
        (["show", "voc", "--out={tmp}/x.png", "--path={tmp}/none"], "none does not exist"),
        (["show", "yours", "--config={tmp}/mine.py", "--out={tmp}/x.png"], "has no data set 'yours'"),
        (
            ["shwo"],
            "is not one of show, prepare, check, twin, subset, schema, export; did you mean 'show'",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, words, match):
    assert cli.main(["data", "twin", "jsonl", f"--out={tmp_path / 'set'}", "--n=3"]) == 0
    (tmp_path / "mine.py").write_text(CONFIG.format(path=tmp_path / "set"))
    capsys.readouterr()
    assert cli.main(["data", *(word.format(tmp=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1
