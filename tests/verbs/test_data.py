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
        (["twin", "voc", "--out={tmp}/x", "--n=0"], "--n=0 is not a number of records from 1 to"),
        (["twin", "voc", "--out={tmp}/x", f"--n={10**20}"], "is not a number of records from 1 to"),
        (["twin", "voc", "--out={tmp}/x", "--seed=-1"], "--seed=-1 is below 0"),
        (["show", "voc", "--path={tmp}/d", "--out={tmp}/x.png", f"--n={10**20}"], "from 1 to 400"),
        (["show", "voc", "--path={tmp}/d", "--out={tmp}/x.txt"], "let it end in .png"),
        (["show", "..", "--path={tmp}/d", "--out={tmp}/x.png"], "module '..' does not import"),
        (["show", "a..b", "--path={tmp}/d", "--out={tmp}/x.png"], "module 'a..b' does not import"),
        (["check", "--config=x.py", "--out={tmp}/x", "--processes=1000000"], "from 1 to 256"),
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


def test_a_link_to_nothing_among_the_files_of_a_set_is_named(tmp_path, capsys):
    assert cli.main(["data", "twin", "jsonl", f"--out={tmp_path / 'set'}", "--n=3"]) == 0
    for target in ("nowhere", "more.jsonl"):  # nothing, and itself
        link = tmp_path / "set" / "more.jsonl"
        link.symlink_to(target)
        words = ["show", "jsonl", f"--path={tmp_path / 'set'}", f"--out={tmp_path}/x.png"]
        assert cli.main(["data", *words]) == 2
        error = capsys.readouterr().err
        assert "more.jsonl cannot be read" in error and error.count("\n") == 1
        link.unlink()
