"""The verb predict and boxes: only a box with an area, within the image, is drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unimed_jax.config import Config
from unimed_jax.errors import UserError
from unimed_jax.evaluate.report import pictures
from unimed_jax.predict import predictor
from unimed_jax.runs import open as opening
from unimed_jax.verbs import predict

INVALID = [
    "{<90><90><10><10>}",
    "{<0><0><200><200>}",
    "{<50><50><50><50>}",
    "{<10><50><90><50>}",
    "{<0><0><50><101>}",
]


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Runs the verb with a model that gives a fixed answer; says what it printed and drew."""
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "scan.png")
    drawn = []

    def asked(task, question, answer, capsys):
        settings = Config()
        run = SimpleNamespace(
            model=None, config=settings, tokenizer=None, mesh=None, folder=tmp_path, notes=()
        )
        monkeypatch.setattr(opening, "settings_of", lambda folder: settings)
        monkeypatch.setattr(opening, "open_run", lambda folder, **switches: run)
        monkeypatch.setattr(
            predictor, "Predictor", lambda *parts: SimpleNamespace(stream=lambda request: iter([answer]))
        )
        monkeypatch.setattr(
            pictures, "draw_box", lambda path, image, box, words: drawn.append(tuple(box))
        )
        words = [
            f"--run={tmp_path}",
            f"--image={tmp_path / 'scan.png'}",
            f"--task={task}",
            f"--text={question}",
        ]
        predict.run([*words, f"--out={tmp_path / 'out.png'}"])
        return capsys.readouterr().out.splitlines(), drawn

    return asked


@pytest.mark.parametrize("answer", [*INVALID, "left lung", "", "a box {<1><2><3><4>}"])
def test_an_answer_without_a_valid_box_is_said_and_not_drawn(ask, capsys, answer):
    said, drawn = ask("refer", "the liver", answer, capsys)
    assert said[0] == answer and said[1].startswith("The answer holds no valid box") and len(said) == 2
    assert drawn == []


def test_a_valid_box_is_drawn(ask, capsys):
    said, drawn = ask("refer", "the liver", "{<0><0><100><100>}", capsys)
    assert drawn == [(0, 0, 100, 100)] and said[1].startswith("drew ") and len(said) == 2


@pytest.mark.parametrize("box", [*INVALID, "liver", "the box {<1><2><3><4>}"])
def test_identify_takes_only_a_valid_box(ask, capsys, box):
    with pytest.raises(UserError, match="is not a box; write"):
        ask("identify", box, "liver", capsys)
    assert ask("identify", "{<10><10><60><60>}", "liver", capsys)[1] == [(10, 10, 60, 60)]


@pytest.mark.parametrize("task", ["vqa", "caption", "cls"])
def test_a_place_for_boxes_is_refused_for_a_task_that_has_none(ask, capsys, task):
    with pytest.raises(UserError, match=f"--out draws boxes, which task '{task}' has none of; leave it"):
        ask(task, "why?", "yes", capsys)
