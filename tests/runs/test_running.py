"""A run that trains while others evaluate, ask and export it: nothing is called damaged or written
there.
"""

import shutil
import subprocess
import sys

import pytest
from PIL import Image
from support import fake_brain
from support.fake_brain import Squares

from unimed_jax import interruption
from unimed_jax import main as cli
from unimed_jax.interruption import owner

# Holds the run and changes its checkpoints as training does, only faster: a new one, then the
# oldest goes.
TRAINS = """
import pathlib, shutil, sys
from unimed_jax.interruption import claim
folder = pathlib.Path(sys.argv[1])
claim(folder)
step, checkpoints = 4, folder / "checkpoints"
print("trains", flush=True)
while True:
    unfinished = checkpoints / f"{step + 2}.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints / str(step), unfinished)
    unfinished.rename(checkpoints / str(step + 2))
    gone = (checkpoints / str(step - 2)).rename(checkpoints / f"{step - 2}.deleted")
    shutil.rmtree(gone)
    step += 2
"""


@pytest.fixture(scope="module")
def finished(on_one_device, built_once):
    folder = built_once("finished", fake_brain.finished) / "run"
    assert not owner(folder)  # training has ended
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A run that trains in another process.

    Changes but in its checkpoints and its lock fail the test.
    """
    folder = shutil.copytree(finished, tmp_path / "run")
    trains = subprocess.Popen(
        [sys.executable, "-c", TRAINS, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert trains.stdout.readline() == "trains\n"
    before = contents(folder)
    yield folder
    assert trains.poll() is None
    trains.kill()
    trains.communicate()
    assert contents(folder) == before


def contents(folder) -> dict[str, bytes]:
    parts = [path for path in folder.iterdir() if path.name != "checkpoints"]
    inside = [file for part in parts for file in (part.rglob("*") if part.is_dir() else [part])]
    return {str(file): file.read_bytes() for file in inside if file.is_file()}


def test_an_evaluation_is_refused_or_writes_elsewhere(run, tmp_path, monkeypatch, capsys):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "squares/test/test4/vqa", "prediction": "x"}')
    with monkeypatch.context() as patch:  # before the model is opened
        patch.setattr("unimed_jax.runs.open.open_run", None)
        for words in ([], [f"--predictions={answers}", f"--out={run}"]):
            assert cli.main(["evaluate", f"--run={run}", *words]) == 2
            said = capsys.readouterr().err
            assert "is in use by the run of process" in said
            assert "write the results elsewhere with --out=FOLDER" in said
    assert cli.main(["evaluate", f"--run={run}", f"--out={tmp_path / 'scores'}"]) == 0
    assert "damaged" not in capsys.readouterr().err
    assert not any(tmp_path in lock.parents for lock in interruption._claims)  # the command has ended
    assert not owner(tmp_path / "scores")
    assert owner(run).startswith("process")
    lines = (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 6 and (tmp_path / "scores" / "metrics.json").is_file()


def test_it_answers_and_is_exported(run, tmp_path, capsys):
    for number in range(3):
        for words in (["--format=model"], ["--format=decoder"]):
            assert (
                cli.main(["export", f"--run={run}", f"--out={tmp_path}/{words[0][9:]}{number}", *words])
                == 0
            )
    image = tmp_path / "image.png"
    Image.fromarray(Squares().image("test0")).save(image)
    words = [
        "predict",
        f"--run={run}",
        f"--image={image}",
        "--task=identify",
        "--text={<10><10><60><60>}",
    ]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "damaged" not in said and "name another file for the picture with --out" in said
    assert cli.main([*words, f"--out={tmp_path / 'drawn.png'}"]) == 0
    assert (tmp_path / "drawn.png").is_file() and "damaged" not in capsys.readouterr().err
