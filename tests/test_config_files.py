"""Config files: found from anywhere, with what they share; mistakes named with file and line; docs/settings.md."""

import importlib.util
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType

import ml_collections
import pytest

from unimed_jax.config import to_dict
from unimed_jax.config_file import load_config_file
from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict

ROOT = Path(__file__).parents[1]


def write(tmp_path, body: str) -> str:
    path = tmp_path / "mine.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    path.write_text(
        f"from unimed_jax.config import default_config\n\n\ndef get_config(size='s'):\n"
        f"    config = default_config()\n{lines}    return config\n"
    )
    return str(path)


def test_config_file(tmp_path):
    path = write(tmp_path, "config.seed = 4\nconfig.model.decoder.depth = {'s': 2, 'l': 8}[size]")
    settings = load_config_file(path)
    assert isinstance(settings, ml_collections.ConfigDict) and settings.name == "mine"
    assert from_config_dict(settings).model.decoder.depth == 2
    assert from_config_dict(load_config_file(f"{path}:l")).model.decoder.depth == 8


CONFIGS = ROOT / "configs"
STAGES = [f"med_moe/{stage}.py:{size}" for stage in ("align", "instruct", "router", "moe") for size in ("phi2", "tiny")]


@pytest.mark.parametrize("name", ["brain_tiny.py", "brain_smollm2.py", "cmoe.py", "cmoe_gemma.py", *STAGES])
def test_configs_of_the_repository(name, tmp_path, monkeypatch):
    """From any folder, and without a trace of the modules that they share."""
    monkeypatch.chdir(tmp_path)
    mine, path = ModuleType("common"), list(sys.path)
    monkeypatch.setitem(sys.modules, "common", mine)
    config = from_config_dict(load_config_file(f"{CONFIGS / name}"))
    file, _, size = name.partition(":")
    assert config.name == (f"med_moe_{size}/{Path(file).stem}" if size else Path(file).stem)
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config == pickle.loads(pickle.dumps(config))
    assert sys.modules["common"] is mine and "cmoe" not in sys.modules and sys.path == path


def test_a_folder_of_configs(tmp_path):
    """Neighbours and common.py above are imported; a mistake in them is named with its own file and line."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "common.py").write_text("def small(config):\n    config.model.decoder.depth = 0\n    return 1 / ONE\n")
    (tmp_path / "mine" / "beside.py").write_text("ONE = 1\n")
    path = write(tmp_path / "mine", "import beside, common\ncommon.ONE = beside.ONE\ncommon.small(config)")
    with pytest.raises(UserError) as error:
        load_config_file(path)
    assert str(error.value) == (
        f"--config={path} ({tmp_path / 'common.py'}, line 2): config.model.decoder.depth=0: set at least 1."
    )
    with pytest.raises(UserError) as error:
        load_config_file(write(tmp_path / "mine", "import beside, common\ncommon.ONE = 0\ncommon.small(config)"))
    assert str(error.value) == f"--config={tmp_path / 'common.py'}, line 3: division by zero"
    (tmp_path / "common.py").write_text("def small(:\n")
    with pytest.raises(UserError, match=r"--config=.*common.py, line 1: "):
        load_config_file(path)


@pytest.mark.parametrize(
    "body, line",
    [
        ("config.seed = 4\nconfig.model.vision.width = 'wide'", 7),
        ("vision = config.model.vision\nconfig.model.decoder.width = 8\nvision.width = 0", 8),
        ("width = config.model.decoder\nwidth.width = 8\nconfig.model.vision.width = 0", 8),
        ("config.data.sources = (\n    dict(name='brain'),\n    dict(name='brain', weight=-1),\n)", 8),
        ("config.data.sources = (dict(name='a', weight=1),\n    dict(name='brain', weight=-1))", None),
        ("for key in ('seed',):\n    config[key] = 'one'", None),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path, body, line):
    path = write(tmp_path, body)
    with pytest.raises(UserError) as error:
        load_config_file(path)
    assert str(error.value).startswith(f"--config={path}{f', line {line}' if line else ''}: config.")


def test_missing_file(tmp_path):
    path = write(tmp_path, "pass")
    with pytest.raises(UserError, match=r"--config=.*mina.py does not exist; did you mean '.*mine.py'\?$"):
        load_config_file(path.replace("mine", "mina"))
    with pytest.raises(UserError, match="does not exist"):
        load_config_file("nowhere/at_all.py")


@pytest.mark.parametrize(
    "body, words",
    [
        ("config.model.vison.width = 3", ["vison", "vision"]),
        ("config.model.vision.widht = 3", ["config.model.vision.widht is not a setting; did you mean 'width'?"]),
        ("config.model.vision.width = 'wide'", ["config.model.vision.width must be int, not 'wide'."]),
        ("config.optimizer.betas = [0.9, 0.98]\nconfig.seed = 1.5", ["config.seed must be int, not 1.5."]),
    ],
    ids=["a group misspelt", "a key misspelt", "a word for a number", "a fraction for a whole number"],
)
def test_mistakes_in_a_file(tmp_path, body, words):
    """A sentence, whether ml_collections or our own check finds it."""
    with pytest.raises(UserError) as error:
        from_config_dict(load_config_file(write(tmp_path, body)))
    sentence = str(error.value)
    assert all(word in sentence for word in words) and "\n" not in sentence, sentence


def test_the_page_of_settings_is_that_of_config():
    """docs/settings.md is what docs/make_settings.py writes, and no setting is without a word."""
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs" / "make_settings.py")
    make_settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_settings)
    page = make_settings.page()
    assert (ROOT / "docs" / "settings.md").read_text() == page, "run python docs/make_settings.py > docs/settings.md"
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 180 and not [row for row in rows if row.endswith("|  |")]
