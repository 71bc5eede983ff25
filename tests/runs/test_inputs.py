"""Data and tokenizer belong to a run as its weights do: others are refused, or accepted and said in
every result.
"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support.fake_brain import tiny_config

from unimed_jax import main as cli
from unimed_jax.config import Config
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.runs import inputs
from unimed_jax.runs.checkpoint import newest_note
from unimed_jax.runs.open import open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train import loop
from unimed_jax.train.log import Log

pytestmark = pytest.mark.usefixtures("quick_compiles")


def one_device(*settings):
    """No mesh: programs for eight devices compile slowly."""


@pytest.fixture(autouse=True)
def without_mesh(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", one_device)


def records(folder, count, answer="no", split="train"):
    """Writes questions about one image, and some without."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(folder / "images" / "a.png")
    asked = [
        {
            "image": ["a.png"] if i % 2 else [],
            "conversations": [
                {"from": "human", "value": "<image>" * (i % 2) + f"Is it {i}?"},
                {"from": "gpt", "value": answer if i % 3 else "yes"},
            ],
        }
        for i in range(count)
    ]
    (folder / f"{split}.json").write_text(json.dumps(asked))


def settings(place, **changes) -> Config:
    config = tiny_config(steps=4, save_every=2)
    config.data.sources = (dict(name="llava", path=str(place / "set")),)
    config.evaluate.sources = (dict(name="llava", id="held", path=str(place / "held")),)
    config.data.cache = str(place / "cache")
    config.evaluate.splits, config.evaluate.entries = ("test",), ()
    config.evaluate.limit, config.evaluate.max_new_tokens = 2, 2
    config.data.changed = changes.get("data", "refuse")
    config.text.changed = changes.get("text", "refuse")
    return from_config_dict(config)


@pytest.fixture(scope="module")
def finished(quick_compiles, tmp_path_factory):
    """A folder with data (set/, held/), and a run that was killed after two of its four steps (run/)."""
    place = tmp_path_factory.mktemp("inputs")
    records(place / "set", 20)
    records(place / "held", 6, split="test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", one_device)
        stop_at(patch, 3)
        with pytest.raises(Killed):
            loop.train(settings(place), place / "run")
    return place


class Killed(Exception):
    pass


def stop_at(monkeypatch, step):
    write = Log.write

    def stopping(self, at, values):
        if at == step:
            raise Killed
        write(self, at, values)

    monkeypatch.setattr(Log, "write", stopping)


@pytest.fixture
def place(finished, tmp_path):
    """A copy of it, whose settings name the copied data."""
    shutil.copytree(finished, tmp_path / "in")
    file = tmp_path / "in" / "run" / "config.json"
    file.write_text(file.read_text().replace(str(finished), str(tmp_path / "in")))
    return tmp_path / "in"


def reversed_ids(folder):
    """Gives a tokenizer's words each other's ids."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    kept = {word: i for word, i in vocab.items() if i < 4}
    others = [word for word in vocab if word not in kept]
    ids = [vocab[word] for word in others]
    content["model"]["vocab"] = kept | dict(zip(others, reversed(ids), strict=True))
    file.write_text(json.dumps(content))


def test_a_run_and_its_checkpoints_hold_their_inputs(place):
    held = json.loads((place / "run" / "inputs.json").read_text())
    assert (
        sorted(held["inputs"]) == ["data/llava", "evaluate/held", "tokenizer"] and held["changes"] == []
    )
    step, note = newest_note(place / "run" / "checkpoints")
    assert step == 2 and note["inputs"] == held
    before = (place / "run" / "inputs.json").read_bytes()
    run = loop.train(settings(place), place / "run")
    assert run.step == 4 and run.notes == () and (place / "run" / "inputs.json").read_bytes() == before


CHANGES = {
    "halved": ("data set 'llava' is not what", lambda place: records(place / "set", 10)),
    "other answers": ("data set 'llava' is not what", lambda place: records(place / "set", 20, "maybe")),
    "held out": (
        "data set 'held' of config.evaluate.sources is not what",
        lambda place: records(place / "held", 6, "maybe", "test"),
    ),
    "ids reversed": (
        "another tokenizer than it finds now",
        lambda place: reversed_ids(place / "run" / "tokenizer"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_is_refused_when_training_goes_on(place, name):
    sentence, change = CHANGES[name]
    change(place)
    group = "text" if "ids" in name else "data"
    for _ in range(2):
        with pytest.raises(UserError, match=f"{sentence}.*restore.*config.{group}.changed='accept'"):
            loop.train(settings(place), place / "run")
    (place / "run" / "inputs.json").unlink()  # the checkpoint knows, too
    with pytest.raises(UserError, match=sentence):
        loop.train(settings(place), place / "run")
    assert not (place / "run" / "inputs.json").exists()


@pytest.mark.slow
def test_accepted_changes_are_noted_in_every_result(place, capsys, monkeypatch):
    records(place / "set", 10)
    reversed_ids(place / "run" / "tokenizer")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)  # killed before the change is in a checkpoint
        with pytest.raises(Killed):
            loop.train(settings(place, data="accept", text="accept"), place / "run")
    said = capsys.readouterr().out
    assert (
        said.count("data set 'llava' changed after step 2")
        == said.count("the tokenizer changed after step 2")
        == 1
    )
    run = loop.train(settings(place), place / "run")  # accepted once: the folder is as it was left
    assert run.step == 4 and len(run.notes) == 2
    assert cli.main(["evaluate", f"--run={place / 'run'}"]) == 0
    noted = json.loads((place / "run" / "metrics.json").read_text())["notes"]
    assert [note for note in noted if "changed after step 2" in note] == list(run.notes)
    assert (
        cli.main(["export", f"--run={place / 'run'}", "--format=model", f"--out={place / 'out'}"]) == 0
    )
    card = (place / "out" / "README.md").read_text()
    assert all(f"**Note:** {note}." in card for note in run.notes)
    states = json.loads((place / "run" / "inputs.json").read_text())["inputs"]
    assert "Trained with `" in card and all(
        f"`{name}@{state[:8]}`" in card for name, state in states.items()
    )
    capsys.readouterr()
    assert cli.main(["predict", f"--run={place / 'run'}", "--task=qa", "--text=Is it?"]) == 0
    said = capsys.readouterr().err
    assert all(note in said for note in run.notes)


@pytest.mark.slow
def test_every_verb_refuses_another_tokenizer_and_says_one_that_is_accepted(place, capsys):
    loop.train(settings(place), place / "run")
    assert (
        cli.main(["export", f"--run={place / 'run'}", "--format=model", f"--out={place / 'model'}"]) == 0
    )
    for folder, tokenizer in (("run", "run/tokenizer"), ("model", "model")):
        reversed_ids(place / tokenizer)
        verbs = [
            ["predict", "--task=qa", "--text=Is it?"],
            ["export", "--format=decoder", f"--out={place / folder}-out"],
        ]
        verbs += [["evaluate"]] if folder == "run" else []
        for verb in verbs:
            words = [*verb, f"--run={place / folder}"]
            capsys.readouterr()
            assert cli.main(words) == 2
            said = capsys.readouterr().err
            assert "another tokenizer than it finds now" in said and said.count("\n") == 1, verb
            assert cli.main([*words, "--config.text.changed=accept"]) == 0
            heard = capsys.readouterr()
            if verb[0] != "evaluate":
                assert "the tokenizer changed after step" in heard.err + heard.out, verb
    noted = json.loads((place / "run" / "metrics.json").read_text())["notes"]
    assert any("the tokenizer changed after step 4" in note for note in noted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halved", "held out"])
def test_evaluation_refuses_other_data(place, capsys, name):
    loop.train(settings(place), place / "run")
    sentence, change = CHANGES[name]
    change(place)
    assert cli.main(["evaluate", f"--run={place / 'run'}"]) == 2
    assert sentence in capsys.readouterr().err and not (place / "run" / "metrics.json").exists()
    assert cli.main(["evaluate", f"--run={place / 'run'}", "--config.data.changed=accept"]) == 0
    (noted,) = json.loads((place / "run" / "metrics.json").read_text())["notes"]
    assert "changed after step 4" in noted and noted in (place / "run" / "report.md").read_text()
    (place / "answers.jsonl").write_text('{"id": "held/test/test/0", "prediction": "no"}\n')
    words = ["evaluate", f"--run={place / 'run'}", f"--predictions={place / 'answers.jsonl'}"]
    assert cli.main(words) == 2
    assert sentence in capsys.readouterr().err
    assert cli.main([*words, "--config.data.changed=accept"]) == 0
    assert noted in json.loads((place / "answers.scores" / "metrics.json").read_text())["notes"]


@pytest.mark.slow
def test_a_run_that_starts_from_another_notices_its_tokenizer(place):
    loop.train(settings(place), place / "run")
    config = tiny_config(steps=2)
    config.data.sources = (dict(name="llava", path=str(place / "set")),)
    config.data.cache, config.evaluate.splits = str(place / "cache"), ()
    config.init = (("seed", ""), ("run", str(place / "run")))
    reversed_ids(place / "run" / "tokenizer")
    with pytest.raises(UserError, match="/run was trained with another tokenizer than it finds now"):
        loop.train(from_config_dict(config), place / "second")


def test_the_same_in_another_place_is_no_change(place):
    """A harmless edit of the tokenizer's files, a store that is built again, newer data files of
    the same content.
    """
    file = place / "run" / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))  # other white space
    shutil.rmtree(place / "cache")
    records(place / "set", 20)
    assert loop.train(settings(place), place / "run").notes == ()


DAMAGE = {
    "half": ('{"inputs": {"tok', "inputs.json is not JSON"),
    "a list": ("[]", "inputs.json does not say what the run was trained on"),
    "a number": ('{"inputs": 3, "changes": []}', "inputs.json does not say what the run was trained on"),
    "another run's": (
        '{"inputs": {"tokenizer": "y/z"}, "changes": []}',
        r"inputs.json is not that of the run's checkpoints \(the tokenizer differs\); "
        r"restore it, or remove it",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_one_sentence(place, name):
    text, sentence = DAMAGE[name]
    (place / "run" / "inputs.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        open_run(place / "run")
    with pytest.raises(UserError, match=sentence):
        loop.train(settings(place), place / "run")


def test_states_agree_in_one_part():
    assert inputs.same_state("a/b", "a/c") and inputs.same_state("a/b", "c/b")
    assert not inputs.same_state("a/b", "b/a") and not inputs.same_state("a", "b")


def test_the_state_of_a_tokenizer_follows_its_files_and_what_it_does(place):
    folder = place / "run" / "tokenizer"
    before = Tokenizer.load(folder).state(folder)
    (folder / "README.md").write_text("words")
    assert Tokenizer.load(folder).state(folder) == before
    reversed_ids(folder)
    after = Tokenizer.load(folder).state(folder)
    assert not inputs.same_state(before, after)
