"""Chains of runs: in turn, skipped when finished, continued when not, and every mistake before
anything begins.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.fake_brain import tiny_config

from unimed_jax import main as cli
from unimed_jax.analyze.chain import read_stages
from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.config_file import load_config_file
from unimed_jax.data import datasets
from unimed_jax.errors import UserError

OTHERS = """
import dataclasses
from support import squares
INFO = dataclasses.replace(squares.INFO, name="others")
def read(folder, split, options, skipped):
    return squares.read(folder, split, {"images": 9}, skipped)
"""
STAGE = """
from support.fake_brain import tiny_config
EIGHT = dict(name="support.squares", id="squares", tasks=("vqa", "cls"), options=dict(images=8))
def get_config(argument=""):
    config = tiny_config(steps=2)
    config.name = "chain/{name}"
    config.text.form, config.text.max_prompt = "stablelm", 150
    config.data.row_tokens, config.data.sources = 220, (EIGHT,)
    config.init = {init}
    config.model.connector.kind, config.model.connector.task_tokens = "linear", 0
    config.evaluate.splits, config.evaluate.max_new_tokens = ("test",), 4
    {more}
    return config
"""
CHAIN = """
import ml_collections
from pathlib import Path
def get_config(argument=""):
    files = tuple(str(Path(__file__).with_name(name)) for name in {files})
    return ml_collections.ConfigDict(dict(name="chain", stages=files{more}))
"""


def write_chain(folder, more=None, files=("first.py", "second.py"), chain_more=""):
    inits = {"first": (("seed", ""),), "second": (("seed", ""), ("run", "runs/chain/first"))}
    for name, init in inits.items():
        text = STAGE.format(name=name, init=init, more=(more or {}).get(name, ""))
        (folder / f"{name}.py").write_text(text)
    (folder / "all.py").write_text(CHAIN.format(files=files, more=chain_more))
    return f"--config={folder / 'all.py'}"


@pytest.fixture(scope="module")
def chain(on_one_device, tmp_path_factory):
    """A finished chain: (its argument, its folder)."""
    folder = tmp_path_factory.mktemp("chain")
    config = write_chain(folder)
    assert cli.main([config, f"--workdir={folder}/runs"]) == 0
    return config, folder / "runs"


@pytest.fixture
def copied(chain, tmp_path):
    """A copy of the finished chain, to be spoilt; its second stage leads to the copy's first."""
    config, folder = chain
    shutil.copytree(folder, tmp_path / "runs")
    file = tmp_path / "runs" / "second" / "config.json"
    file.write_text(file.read_text().replace(str(folder), str(tmp_path / "runs")))
    return config, tmp_path / "runs"


@pytest.mark.slow
def test_each_stage_starts_from_the_one_before(chain):
    _, folder = chain
    settings = json.loads((folder / "second" / "config.json").read_text())
    assert settings["init"] == [["seed", ""], ["run", str(folder / "first")]]


@pytest.mark.slow
def test_the_table_has_a_row_a_stage(chain):
    _, folder = chain
    kept = json.loads((folder / "stages.json").read_text())["stages"]
    assert list(kept) == ["first", "second"] and kept["second"]["steps"] == 2
    metrics = json.loads((folder / "second" / "metrics.json").read_text())["pooled"]["test"]
    scores = kept["second"]["scores"]
    assert scores["open: recall"] == metrics["vqa"]["corrected"]["open_recall"]
    assert scores["open: recall, %, published"] == metrics["vqa"]["published"]["open_recall"]
    assert (
        scores["classification: accuracy"]["value"]
        == metrics["cls"]["corrected"]["exact_match"]["value"]
    )
    text = (folder / "stages.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")][2:] == [
        "| first",
        "| second",
        "| best blind, with the last",
    ]


@pytest.mark.slow
def test_finished_stages_are_skipped(chain, capsys, monkeypatch):
    config, folder = chain
    monkeypatch.setattr(
        "unimed_jax.analyze.chain.train_and_evaluate",
        lambda *stage: pytest.fail("a finished stage was run"),
    )
    assert cli.main([config, f"--workdir={folder}"]) == 0
    assert re.findall(r"stage . of 2, (\w+): finished", capsys.readouterr().out) == ["first", "second"]


@pytest.mark.slow
def test_an_interrupted_chain_goes_on_where_it_was(copied, capsys, monkeypatch):
    """Scores cut off by a kill: that stage alone is scored again, and nothing trains."""
    config, folder = copied
    file = folder / "second" / "metrics.json"
    before = json.loads(file.read_text())
    file.write_text(file.read_text()[:100])
    assert cli.main([config, f"--workdir={folder}"]) == 0
    assert re.findall(r"stage . of 2, (\w+): finished", capsys.readouterr().out) == ["first"]
    # copied: other paths
    assert {**json.loads(file.read_text()), "config_hash": before["config_hash"]} == before


MISTAKES = {
    "an override": ({}, ["--config.stages=()"], r"'--config.stages=\(\)' cannot change a chain"),
    "an override of a stage": ({}, ["--config.train.steps=9"], "cannot change a chain"),
    "another key": ({"chain_more": ", seed=3"}, [], r"no \['seed'\]"),
    "no stage": ({"files": ()}, [], "at least one stage"),
    "one name twice": ({"files": ("first.py", "first.py")}, [], "two stages are called 'first'"),
    "no such file": ({"files": ("first.py", "third.py")}, [], "third.py does not exist"),
    "a later stage lacks a run": (
        {"more": {"second": "config.init = (('run', 'runs/elsewhere'),)"}},
        [],
        "still needs the finished run runs/elsewhere",
    ),
    "a later stage cannot be built": (
        {"more": {"second": "config.train.stepss = 3"}},
        [],
        "config.train.stepss is not",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said_before_anything_begins(name, tmp_path, capsys):
    written, words, said = MISTAKES[name]
    assert cli.main([write_chain(tmp_path, **written), f"--workdir={tmp_path}/runs", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "runs").exists()


def test_where_data_lies_and_the_seed_go_to_every_stage(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("unimed_jax.analyze.chain.run_chain", lambda *given: found.append(given))
    words = ["--config.data.root=/data", "--config.seed=7", "--config.data.cache=/cache"]
    assert cli.main([write_chain(tmp_path), f"--workdir={tmp_path}/runs", *words]) == 0
    stages = read_stages(*found[0])
    assert [stage.name for stage in stages] == ["first", "second"]
    for stage in stages:
        data = stage.config.data
        assert (data.root, data.cache, stage.config.seed) == ("/data", "/cache", 7)


@pytest.mark.slow
def test_other_settings_than_a_stage_was_trained_with_are_refused(copied, tmp_path, capsys):
    _, folder = copied
    config = write_chain(tmp_path, {"second": "config.optimizer.lr = 0.5"})
    assert cli.main([config, f"--workdir={folder}"]) == 2
    assert (
        "second holds a run with other settings (config.optimizer.lr is 0.003" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_stage_that_started_from_another_run_is_refused(copied, capsys):
    config, folder = copied
    shutil.rmtree(folder / "first")
    assert cli.main([config, f"--workdir={folder}"]) == 2
    assert f"{folder / 'second'} started from another {folder / 'first'}" in capsys.readouterr().err


@pytest.mark.slow
def test_stages_scored_on_different_data_have_no_table(copied, capsys):
    config, folder = copied
    file = folder / "first" / "metrics.json"
    file.write_text(file.read_text().replace('"data_checksum": "', '"data_checksum": "1'))
    assert cli.main([config, f"--workdir={folder}"]) == 2
    assert "scored on different data" in capsys.readouterr().err


def test_chains_of_the_repository_read():
    for size in ("stablelm", "phi2", "tiny", "real"):
        settings = load_config_file(f"configs/med_moe/all.py:{size}")
        assert settings.name == f"med_moe_{size}"
        assert [Path(stage).stem for stage in settings.stages] == ["align", "instruct", "router", "moe"]


@pytest.mark.slow
def test_a_run_is_scored_on_the_data_that_it_names(copied):
    """Not on what it learned from, which may have no held-out part."""
    _, folder = copied
    others = folder / "others" / "squares.py"
    others.parent.mkdir()
    others.write_text(OTHERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        named = "--config.evaluate.sources=({'name': 'others.squares', 'id': 'others'},)"
        words = ["evaluate", f"--run={folder / 'first'}", named, "--config.evaluate.limit=2"]
        assert cli.main(words) == 0
        metrics = json.loads((folder / "first" / "metrics.json").read_text())
        cache = tiny_config().data.cache
        (opened,) = datasets.open_sources(DataConfig((SourceConfig("others.squares"),), cache=cache))
        assert metrics["data_checksum"] == opened.checksum and list(metrics["sets"]) == ["others"]
        assert metrics["sets"]["others"]["test"]["vqa"]["margin"] and not metrics["notes"]

        def moved(name, found=datasets.reader_of):
            if name == "support.squares":
                raise UserError("squares: no such folder.")
            return found(name)

        patch.setattr(datasets, "reader_of", moved)
        assert cli.main(words) == 0
    (note,) = json.loads((folder / "first" / "metrics.json").read_text())["notes"]
    assert "the training data did not open" in note and "squares: no such folder" in note
