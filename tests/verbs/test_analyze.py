"""The analyses of a run, as a person calls them: files, pictures, mistakes, and a kill."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import fake_brain, tiny

from unimed_jax import main as cli
from unimed_jax.analyze import ablation, decoder_routing, drawing, updates
from unimed_jax.analyze.examples import held_out_units
from unimed_jax.config import VISUAL_TASKS, MoeConfig, RuleConfig
from unimed_jax.errors import UserError
from unimed_jax.evaluate import answers
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.runs.open import open_run

KEYS = {"run", "step", "connector", "router", "split", "code_version", "notes"}


@pytest.fixture(scope="module")
def finished(quick_compiles, built_once):
    with pytest.MonkeyPatch.context() as patch:
        # programs for eight devices compile slowly
        patch.setattr(sharding, "make_mesh", lambda *settings: None)
        yield built_once("finished", fake_brain.finished) / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def files(folder, name):
    """What NAME.json holds, after a look at the page and the picture beside it."""
    content = json.loads((folder / f"{name}.json").read_text())
    assert set(content) >= KEYS and content["step"] == 4
    assert (folder / f"{name}.md").read_text().startswith("# ")
    assert Image.open(folder / f"{name}.png").width > 600
    return content


def test_routing_and_tokens_of_a_run(run, tmp_path, capsys):
    assert cli.main(["analyze", "routing", f"--run={run}", "--by=prompt"]) == 0
    said = capsys.readouterr().out
    assert "| task | refer |" in said and "routing.png" in said
    found = files(run / "analysis", "routing")["connector_routing"]
    assert set(found["groups"]) == {"task", "prompt"} and set(found["groups"]["task"]) == set(
        VISUAL_TASKS
    )
    np.testing.assert_allclose(
        found["groups"]["task"]["cls"]["weights"], 0.2, atol=0.1
    )  # barely trained
    words = ["--task=refer", "--task=cls", "--split=test", "--limit=6", f"--out={tmp_path / 'out'}"]
    assert cli.main(["analyze", "tokens", f"--run={run}", *words, "--tokens=40"]) == 0
    found = files(tmp_path / "out", "tokens")
    assert set(found["views"]) == {"before", "after", "same", "shift"} and found["split"] == "test"
    assert set(found["views"]["after"]["separation"]["by_label"]) == {"refer", "cls"}


@pytest.mark.slow
def test_experts_of_a_run(run, capsys):
    words = ["--limit=12", "--task=cls", "--task=refer", "--steps=1", "--repeats=2"]
    assert cli.main(["analyze", "experts", f"--run={run}", *words]) == 0
    found = files(run / "analysis", "experts")
    assert min(found["weights"]["moved"]) > 0 and found["notes"] == []
    assert np.shape(found["outputs"]["relative_distance"]) == (5, 5)
    updates = found["updates"]
    assert updates["names"] == ["cls", "refer"] or updates["names"] == ["refer", "cls"]
    assert set(updates["groups"]) == {"connector", "router", *(f"expert {e}" for e in range(5))}
    for entry in updates["groups"].values():
        assert entry["cos"][0][1] == pytest.approx(entry["cos"][1][0], abs=1e-5)
        assert min(entry["norm"]) > 0 and -1 <= entry["cos"][0][0] <= 1
    assert "## Updates of single tasks" in capsys.readouterr().out


@pytest.mark.slow
def test_an_ablation_that_was_killed_goes_on(run, monkeypatch):
    words = ["analyze", "ablation", f"--run={run}", "--limit=4", "--task=cls", "--task=identify"]
    asked = []
    answered = answers._answered

    def counted(call, texts):
        assert call.others == [None] * 8  # no other images
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(call)
        return answered(call, texts)

    monkeypatch.setattr(answers, "_answered", counted)
    assert cli.main(words) == 130
    out = run / "analysis"
    assert (out / ablation.PARTIAL).is_dir() and not (out / "ablation.json").exists()
    more = []
    monkeypatch.setattr(answers, "_answered", lambda *given: more.append(given) or answered(*given))
    with monkeypatch.context() as patch:

        def full(*given):
            raise UserError("the disk is full.")

        patch.setattr(drawing, "write", full)
        assert cli.main(words) == 2 and (out / ablation.PARTIAL).is_dir()  # what was answered stays
    assert cli.main(words) == 0
    found = files(out, "ablation")
    assert len(more) == 6 - 4 and not (out / ablation.PARTIAL).exists()
    assert set(found["units"]) == {"squares/val/cls", "squares/val/identify"}
    for entry in found["units"].values():
        assert len(entry["off"]) == 5 and entry["n"] == 4
        assert all(
            off["score"] == pytest.approx(entry["whole"]["value"] - off["value"]) for off in entry["off"]
        )


def test_what_is_frozen_has_no_update(finished):
    run = open_run(finished)
    units = held_out_units(run.config, "val", ["cls", "identify"], limit=4)

    def under(*rules):
        train = dataclasses.replace(run.config.train, rules=(*rules, *run.config.train.rules))
        config = dataclasses.replace(run.config, train=train)
        return updates.analyse(dataclasses.replace(run, config=config), units, 1, 2)

    found = under(RuleConfig("connector/router/*", train=False))
    assert "connector" in found["groups"] and "router" not in found["groups"] and not found["notes"]
    with pytest.raises(UserError, match="its connector does not train.*--steps=0"):
        under(RuleConfig("connector/*", train=False))


def edited(run, **connector):
    """Changes the run's settings, as a run of another kind has them."""
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["connector"] |= connector
    (run / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "words, change, match",
    [
        (["experts"], {"kind": "mlp2x_gelu", "task_tokens": 0}, "which has no experts"),
        (["ablation"], {"experts": 1, "router": "constant", "task_tokens": 0}, "has one expert"),
        (["routing"], {"kind": "linear", "task_tokens": 0}, "which has no experts"),
        (["tokens"], {"gates": 3}, "config.model.connector"),
        (["experts", "--task=report"], {}, "--task=report is not a task"),
        (["routing", "--split=tset"], {}, "no example in split 'tset'; did you mean 'test'"),
        (["routing", "--by=colours"], {}, "--by=colours gives no group"),
        (["ablation", "--task=qa"], {}, "no task with images is left"),
        (["tokens", "--task=cls"], {}, "--by=task gives the one group 'cls'"),
        (["experts", "--task=cls", "--steps=1"], {}, "only squares/val/cls has held-out examples"),
        (["experts", "--limit=2", "--repeats=9"], {}, "too few for --repeats=9"),
        (["tokens", "--tokens=1"], {}, "--tokens=1 cannot be used; give a number from 4"),
        (["experts", "--limit=-1"], {}, "--limit=-1 cannot be used"),
        (["expert"], {}, "did you mean 'experts'"),
    ],
)
def test_a_mistake_is_one_sentence(run, capsys, words, change, match):
    edited(run, **change)
    assert cli.main(["analyze", words[0], f"--run={run}", *words[1:]]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1
    assert not list((run / "analysis").glob("*.json"))


def test_experts_of_a_decoder_are_counted_by_group(finished):
    run = open_run(finished)
    settings = dataclasses.replace(run.config.model, moe=MoeConfig(experts=3))
    model = tiny.model(settings)
    path = next(path for path in parameters(model) if path.endswith("moe/router/bias"))
    bias = jnp.asarray(parameters(model)[path]).at[..., 1].set(1e4)  # everything goes to expert 1
    planted = dataclasses.replace(
        run,
        model=with_parameters(model, {path: bias}),
        config=dataclasses.replace(run.config, model=settings),
    )
    units = held_out_units(planted.config, "val", ["cls", "qa"], limit=4)
    found = decoder_routing.analyse(planted, units, ["template"])
    assert found["layers"] == [0] and set(found["groups"]["task"]) == {"cls", "qa"}
    assert found["groups"]["task"]["qa"]["visual"] is None  # it has no image
    for groups in found["groups"].values():
        for entry in groups.values():
            np.testing.assert_array_equal(entry["text"]["shares"], [[0, 1, 0]])
            assert entry["examples"] == 4
    run = dataclasses.replace(planted, model=tiny.model(settings))
    shares = decoder_routing.analyse(run, units, [])["groups"]["task"]["cls"]["visual"]
    np.testing.assert_allclose(np.sum(shares["shares"], axis=-1), 1)
    assert np.shape(shares["ci95"]) == (1, 3, 2)
