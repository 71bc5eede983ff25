"""The verb of docs/adding_a_verb.md works as it is printed there: one new file, nothing else."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from unimed_jax import main as cli
from unimed_jax import verbs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The documented file as a part of the package, for this test only."""
    (code,) = re.findall(
        r"```python\n# unimed_jax/verbs/agree\.py\n(.*?)```",
        (ROOT / "docs/adding_a_verb.md").read_text(),
        re.S,
    )
    (tmp_path / "agree.py").write_text(code)
    monkeypatch.setattr(verbs, "__path__", [*verbs.__path__, str(tmp_path)])
    yield importlib.reload(cli)
    monkeypatch.undo()
    sys.modules.pop("unimed_jax.verbs.agree", None)
    importlib.reload(cli)


def test_one_file_makes_a_verb(added, tmp_path, capsys):
    assert added.main(["--help"]) == 0
    assert "agree      Counts the answers" in capsys.readouterr().out
    assert added.main(["agree", f"--run={tmp_path}"]) == 2
    assert "predictions.jsonl does not exist" in capsys.readouterr().err
    lines = [{"prediction": "a", "reference": "a"}, {"prediction": "a", "reference": "b"}]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert added.main(["agree", f"--run={tmp_path}"]) == 0
    assert capsys.readouterr().out == "1 of 2 answers are equal to their reference\n"


def test_it_is_gone_again(capsys):
    assert cli.main(["agree"]) == 2
    assert "'agree' is not a verb" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--help"], ["trian"], *([verb, "--help"] for verb in cli.VERBS), ["train"]]
)
def test_help_and_a_wrong_verb_answer_without_jax(words):
    """In a process of its own; `main` may exit by argparse."""
    code = (
        "import sys\nfrom unimed_jax.main import main\nstatus = 0\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as end:\n    status = end.code\n"
        "assert not {'jax', 'flax', 'transformers', 'numpy'} & set(sys.modules), "
        "sorted(sys.modules)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == (2 if words in (["trian"], ["train"]) else 0), done.stderr
    assert (done.stdout if done.returncode == 0 else done.stderr).strip()
