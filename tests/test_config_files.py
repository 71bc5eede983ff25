"""Config files: found from anywhere, with what they share; mistakes named with file and line.

docs/settings.md.
"""

import importlib.util
import io
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType

import ml_collections
import pytest

from unimed_jax import main as cli
from unimed_jax.config import to_dict
from unimed_jax.config_file import load_config_file
from unimed_jax.errors import UserError
from unimed_jax.interruption import Stoppable, Stopped
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
STAGES = [
    f"med_moe/{stage}.py:{size}"
    for stage in ("align", "instruct", "router", "moe")
    for size in ("phi2", "tiny")
]


@pytest.mark.parametrize(
    "name",
    [
        *("brain_tiny.py", "brain_frozen.py", "brain_smollm2.py", "real_small.py"),
        *("cmoe.py", "cmoe_gemma.py", *STAGES),
    ],
)
def test_configs_of_the_repository(name, tmp_path, monkeypatch):
    """From any folder, and without a trace of the modules that they share."""
    monkeypatch.chdir(tmp_path)
    mine, path = ModuleType("common"), list(sys.path)
    monkeypatch.setitem(sys.modules, "common", mine)
    config = from_config_dict(load_config_file(f"{CONFIGS / name}"))
    file, _, size = name.partition(":")
    assert config.name == (f"med_moe_{size}/{Path(file).stem}" if size else Path(file).stem)
    assert (
        from_config_dict(json.loads(json.dumps(to_dict(config))))
        == config
        == pickle.loads(pickle.dumps(config))
    )
    assert sys.modules["common"] is mine and "cmoe" not in sys.modules and sys.path == path


def test_a_folder_of_configs(tmp_path):
    """Neighbours and common.py above are imported.

    A mistake in them is named with its own file and line.
    """
    (tmp_path / "mine").mkdir()
    (tmp_path / "common.py").write_text(
        "def small(config):\n    config.model.decoder.depth = 0\n    return 1 / ONE\n"
    )
    (tmp_path / "mine" / "beside.py").write_text("ONE = 1\n")
    path = write(
        tmp_path / "mine", "import beside, common\ncommon.ONE = beside.ONE\ncommon.small(config)"
    )
    with pytest.raises(UserError) as error:
        load_config_file(path)
    assert str(error.value) == (
        f"--config={path} ({tmp_path / 'common.py'}, line 2): config.model.decoder.depth=0: set at "
        "least 1."
    )
    with pytest.raises(UserError) as error:
        load_config_file(
            write(tmp_path / "mine", "import beside, common\ncommon.ONE = 0\ncommon.small(config)")
        )
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


def test_a_setting_that_is_assigned_twice_is_named_with_both_lines(tmp_path):
    path = write(tmp_path, "config.seed = 4\nconfig.model.decoder.depth = 0\nconfig.seed -= 5")
    with pytest.raises(
        UserError, match=r"mine.py, line 7: config.model.decoder.depth=0|lines 6 and 8: config.seed=-1"
    ):
        load_config_file(path)
    path = write(tmp_path, "config.seed = 4\nconfig.seed = -1")
    with pytest.raises(UserError) as error:
        load_config_file(path)
    assert str(error.value) == f"--config={path}, lines 6 and 7: config.seed=-1: set 0 to 4294967295."


def test_missing_file(tmp_path):
    path = write(tmp_path, "pass")
    with pytest.raises(
        UserError, match=r"--config=.*mina.py does not exist; did you mean '.*mine.py'\?$"
    ):
        load_config_file(path.replace("mine", "mina"))
    with pytest.raises(UserError, match="does not exist"):
        load_config_file("nowhere/at_all.py")


@pytest.mark.parametrize(
    "body, words",
    [
        ("config.model.vison.width = 3", ["vison", "vision"]),
        (
            "config.model.vision.widht = 3",
            ["config.model.vision.widht is not a setting; did you mean 'width'?"],
        ),
        ("config.model.vision.width = 'wide'", ["config.model.vision.width must be int, not 'wide'."]),
        (
            "config.optimizer.betas = [0.9, 0.98]\nconfig.seed = 1.5",
            ["config.seed must be int, not 1.5."],
        ),
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
    assert (ROOT / "docs" / "settings.md").read_text() == page, (
        "run python docs/make_settings.py > docs/settings.md"
    )
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 180 and not [row for row in rows if row.endswith("|  |")]


# ---- whatever a config file does -------------------------------------------------------------------
# The body of get_config(), and what the sentence says after file and line 5, where the body begins.
RAISES = {
    "assert False": "AssertionError",
    "assert 1 == 2, 'sizes differ'": "sizes differ",
    "raise ValueError": "ValueError",
    "raise ValueError('first line\\nsecond line')": "first line second line",
    "raise ValueError('x' * 10_000)": "x" * 286 + " ...",
    "import nowhere_at_all": "No module named 'nowhere_at_all'",
    "from os import nothing_at_all": "cannot import name 'nothing_at_all' from 'os'",
    "1 / 0": "division by zero",
    "[][3]": "list index out of range",
    "{}['key']": "KeyError: 'key'",
    "undefined": "name 'undefined' is not defined",
    "None.x": "'NoneType' object has no attribute 'x'",
    "open('/nowhere/at/all')": "No such file or directory: '/nowhere/at/all'",
    "b'\\xff'.decode()": "'utf-8' codec can't decode byte 0xff",
    "'\\ud800'.encode()": "surrogates not allowed",
    "raise MemoryError": "MemoryError",
    "raise NotImplementedError('later')": "NotImplementedError: later",
    "raise StopIteration": "StopIteration",
    "raise BaseException('odd')": "BaseException: odd",
    "raise GeneratorExit": "GeneratorExit",
    "exit()": "ends the program (exit status None)",
    "import sys; sys.exit()": "ends the program (exit status 0)",
    "raise SystemExit('enough of it')": "ends the program (exit status enough of it)",
    "raise ExceptionGroup('both', [ValueError('x')])": "both (1 sub-exception)",
    "class Odd(Exception):\n        def __str__(self): raise self\n    raise Odd": "Odd",
    "get_config()": "maximum recursion depth exceeded",
    "int('9' * 5000)": "Exceeds the limit (4300 digits)",
    "object() + 1": "unsupported operand",
    "raise UserWarning('odd one')": "odd one",
}


@pytest.mark.parametrize("body", RAISES)
def test_whatever_a_file_raises_is_one_sentence_with_its_line(body, tmp_path):
    path = tmp_path / "mine.py"
    for before in ("import os\n\n\ndef get_config():\n", "get_config = 5\n\n\nif True:\n"):
        if before.startswith("get_config") and body == "get_config()":
            continue
        path.write_text(f"{before}    {body}\n")
        with pytest.raises(UserError) as error:
            load_config_file(str(path))
        sentence = str(error.value)
        assert RAISES[body] in sentence and "\n" not in sentence and len(sentence) < 500
        assert sentence.startswith(f"--config={path}, line {5 + body.count(chr(10))}: "), sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "defines no function get_config()"),
        (b"get_config = 5\n", "defines no function get_config()"),
        (b"def get_config(:\n", "line 1: "),
        (b"def get_config():\n  x = 1\n    return x\n", "line 3: unexpected indent"),
        (b"x = '\xff'\n", "line "),
        (b"# coding: nonsense\n", "unknown encoding"),
        (b"x = 1\x00\n", "null bytes"),
        (b"\xef\xbb\xbfdef get_config():\n    1 / 0\n", "line 2: division by zero"),
        (b"# coding: latin-1\nx = '\xe9'\ndef get_config():\n    1 / 0\n", "line 4: division by zero"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "null bytes"),
        (b"((" * 300 + b"\n", "too many nested parentheses"),
        (b"print 'two'\n", "line 1: "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_not_python_is_one_sentence(content, words, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_config_file(str(path))
    sentence = str(error.value)
    assert sentence.startswith(f"--config={path}") and words in sentence and "\n" not in sentence, (
        sentence
    )


# What the next ones begin with.
HEAD = """
from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder
from unimed_jax.config import default_config
def Dict(given=(), **keys):
    return ConfigDict({**dict(given), **keys})
def get_config():
    return """
# What get_config() returns, and what the sentence says.
RETURNS = {
    "None": "get_config() returned None; let it return the ConfigDict",
    "'text'": "a value of type str",
    "5": "a value of type int",
    "True": "a value of type bool",
    "{'name': 'x'}": "a value of type dict",
    "[1]": "a value of type list",
    "()": "a value of type tuple",
    "object()": "a value of type object",
    "Dict": "a value of type function",
    "(config for config in ())": "a value of type generator",
    "default_config().model": "is not a setting",
    "default_config().to_json()": "a value of type str",
    "Dict(x=1)": "config.x is not a setting",
    "Dict(name=5)": "config.name must be str, not 5.",
    "Dict(name='caf\\udce9')": "config.name='caf\\udce9' holds half of a surrogate pair",
    "Dict(data=dict(cache='a\\0b'))": "config.data.cache='a\\x00b' holds the character NUL",
    "Dict(data=dict(sources=[dict(only=dict(a=['\\ud800']))]))": "holds half of a surrogate pair",
    "Dict(model=5)": "config.model must be a group of settings, not 5.",
    "Dict(model=None)": "config.model must be a group of settings, not None.",
    "Dict(seed=placeholder(int, required=True))": "required",
    "Dict(stages=5)": "stages must name at least one stage, each by its config file, not 5.",
    "Dict(stages=None)": "stages must name at least one stage",
    "Dict(stages='x')": "stages must name at least one stage",
    "Dict(stages=())": "stages must name at least one stage",
    "Dict(stages=[1])": "stages must name at least one stage",
    "Dict(stages=[''])": "stages must name at least one stage",
    "Dict(stages=['a.py', None])": "stages must name at least one stage",
    "Dict(stages=Dict(a='a.py'))": "stages must name at least one stage",
    "Dict(stages=[Dict(name='x')])": "stages must name at least one stage",
    "Dict(stages=default_config())": "stages must name at least one stage",
    "Dict(stages=['a.py'], name=5)": "config.name must be str, not 5.",
}


@pytest.mark.parametrize("value", RETURNS)
def test_whatever_a_file_returns_is_settings_or_one_sentence(value, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{HEAD}{value}\n")
    with pytest.raises(UserError) as error:
        load_config_file(str(path))
    sentence = str(error.value)
    assert sentence.startswith(f"--config={path}") and "\n" not in sentence
    assert RETURNS[value] in sentence and len(sentence) < 600, sentence


@pytest.mark.parametrize(
    "made", ["Dict()", "FrozenConfigDict(Dict(seed=3))", "Dict(name=None, seed=3)", "Dict(name='')"]
)
def test_settings_in_part_or_frozen_are_taken_and_named(made, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{HEAD}{made}\n")
    settings = load_config_file(str(path))
    assert settings.name == "mine" and from_config_dict(settings).name == "mine"
    settings.seed = 5  # what the command line does


@pytest.mark.parametrize(
    ("signature", "argument", "words"),
    [
        ("", ":x", "its get_config() takes no argument; leave 'x' out."),
        ("size", "", "its get_config() needs an argument; write"),
        ("a, b", ":x", "takes no argument"),
        ("*, size", "", "needs an argument"),
    ],
)
def test_an_argument_too_many_or_too_few_is_one_sentence(signature, argument, words, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from unimed_jax.config import default_config\n\n\ndef get_config({signature}):\n    "
        "return default_config()\n"
    )
    with pytest.raises(UserError) as error:
        load_config_file(f"{path}{argument}")
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_type_error_inside_is_not_taken_for_a_wrong_argument(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(size='s'):\n    return len(5)\n")
    with pytest.raises(UserError, match=r"mine.py, line 2: object of type 'int' has no len\(\)$"):
        load_config_file(f"{path}:x")


def test_a_stop_inside_a_file_is_a_stop(tmp_path):
    """Neither Ctrl-C nor SIGTERM is a mistake of the file."""
    path = tmp_path / "mine.py"
    for number in ("SIGTERM", "SIGINT"):
        path.write_text(f"import signal\nsignal.raise_signal(signal.{number})\n")
        with pytest.raises(Stopped), Stoppable():
            load_config_file(str(path))
    path.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_config_file(str(path))


def test_settings_with_keys_that_are_no_text_are_one_sentence(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import ml_collections\ndef get_config():\n"
        "    return ml_collections.ConfigDict({1: 2, 'a': 3})\n"
    )
    with pytest.raises(UserError) as error:
        load_config_file(str(path))
    assert str(error.value).startswith(f"--config={path}: ") and str(error.value).isprintable()


@pytest.mark.parametrize("gone", ["closed", "none"])
def test_a_config_that_loses_the_outputs_still_ends_in_status_2(gone, tmp_path, monkeypatch, capfd):
    (tmp_path / "mine.py").write_text("raise ValueError('what is wrong')\n")
    for name in ("stdout", "stderr"):
        stream = None if gone == "none" else io.StringIO()
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, f"__{name}__", stream)
    assert cli.main(["params", f"--config={tmp_path / 'mine.py'}"]) == 2
    assert capfd.readouterr() == ("", "")
