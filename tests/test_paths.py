"""Odd paths: every verb with every kind of path that cannot be used ends in one sentence that names
it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.fake_brain import Squares, tiny_config

from unimed_jax import main as cli
from unimed_jax import paths
from unimed_jax.analyze import chain
from unimed_jax.errors import UserError
from unimed_jax.evaluate.report.pictures import draw_box
from unimed_jax.processes import quiet
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.folder import load_text, write_config
from unimed_jax.settings import from_config_dict
from unimed_jax.train.log import Log

ROOT = Path(__file__).parents[1]
CONFIG = "from support.fake_brain import tiny_config as get_config\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with configs, a run's folder without checkpoints, and one of each odd kind of path."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "squares.py").write_text(CONFIG)
    (folder / "chain.py").write_text(
        "import ml_collections\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({{'stages': ({str(folder / 'squares.py')!r},)}})\n"
    )
    config = from_config_dict(tiny_config())
    write_config(folder / "run", config)
    load_text(folder / "run", config, [Squares()])
    (folder / "file").write_text("a file\n")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    return folder


def refused(arguments: list[str], capsys, *words: str, at_once: bool = True) -> str:
    """The sentence with which the arguments are refused: one line, status 2.

    `at_once`: nothing printed before.
    """
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    (said,) = err.splitlines()
    assert said.startswith("unimed_jax: ") and said.endswith((".", "?")), said
    assert not (out and at_once), out
    for word in words:
        assert word in said, said
    return said


# ---- what is written -------------------------------------------------------------------------------
# The verbs that write, up to the path; in braces the folder of the fixture.
WRITERS = {
    "train": ["--config={place}/squares.py", "--workdir="],
    "chain": ["--config={place}/chain.py", "--workdir="],
    "params": ["params", "--config={place}/squares.py", "--json="],
    "export": ["export", "--run={place}/run", "--format=model", "--out="],
    "data": ["data", "export", "--config={place}/squares.py", "--out="],
    "show": ["data", "show", "squares", "--config={place}/squares.py", "--out="],
    "check": ["data", "check", "--config={place}/squares.py", "--out="],
    "twin": ["data", "twin", "slake", "--out="],
    "evaluate": ["evaluate", "--predictions={place}/file", "--config={place}/squares.py", "--out="],
    "predict": ["predict", "--run={place}/run", "--task=refer", "--text=x", "--image=x.png", "--out="],
}
# The path, and what the sentence says of it.
UNWRITABLE = {
    "below a file": ("{place}/file/x/y.png", "which is a file"),
    "a link loop": ("{place}/loop/x.png", "Too many levels of symbolic links"),
    "a link to nothing": ("{place}/dangling/x.png", "a link to nothing"),
    "a long name": ("{place}/" + "n" * 256 + ".png", "a name of 260 bytes"),
    "a name of many bytes": ("{place}/" + "\u80ba" * 90 + ".png", "a name of 274 bytes"),
    "a long path": ("{place}" + "/folder" * 700 + "/x.png", "bytes"),
    "below /proc": ("/proc/x.png", "/proc"),
    "read-only": ("{disk}/x.png", "Read-only file system"),
    "below read-only": ("{disk}/x/y.png", "Read-only file system"),
    "no text": ("{place}/caf\udce9.png", "caf\\xe9.png is not text in utf-8"),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[Path | None]:
    """A file system that takes no writes, None where we may not mount one."""
    folder = tmp_path_factory.mktemp("disk")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder], capture_output=True
    )
    yield None if done.returncode else folder
    if not done.returncode:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("verb", WRITERS)
def test_a_place_that_takes_no_file_is_refused_first(verb, kind, place, disk, capsys):
    path, words = UNWRITABLE[kind]
    if "{disk}" in path and disk is None:
        pytest.skip("needs the right to mount a file system")
    arguments = [word.format(place=place) for word in WRITERS[verb]]
    arguments[-1] += path.format(place=place, disk=disk)
    refused(arguments, capsys, words, arguments[-1].partition("=")[0])


@pytest.mark.parametrize("verb", WRITERS)
def test_an_empty_path_is_refused(verb, place, capsys):
    refused([word.format(place=place) for word in WRITERS[verb]], capsys, WRITERS[verb][-1].strip("="))


@pytest.mark.parametrize(
    ("verb", "path", "words"),
    [
        *((verb, "{place}/file", "is a file") for verb in ("train", "chain", "evaluate")),
        ("export", "{place}/run", "exists already"),
        ("data", "{place}/file", "exists already"),
        *(("params", path, "is a folder") for path in ("{place}/folder", "{place}/new/", "/")),
        *(("params", path, "is a pipe or a device") for path in ("{place}/pipe", "/dev/null")),
        *(
            ("predict", path, "is not the name of a picture")
            for path in ("{place}/folder", "a.xyz", "x", "a.npg", ".")
        ),
        ("predict", "{place}/pictures.png", "is a folder"),
    ],
)
def test_a_file_or_folder_of_the_wrong_kind_is_refused(verb, path, words, place, capsys):
    (place / "pictures.png").mkdir(exist_ok=True)
    arguments = [word.format(place=place) for word in WRITERS[verb]]
    arguments[-1] += path.format(place=place)
    if verb == "export":  # known when the run is open
        assert cli.main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        return
    refused(arguments, capsys, words)
    assert (place / "file").read_text() == "a file\n" and (place / "pipe").is_fifo()


def test_a_box_beside_a_read_only_run_is_to_be_drawn_elsewhere(place, disk, tmp_path, capsys):
    if disk is None:
        pytest.skip("needs the right to mount a file system")
    words = ["predict", f"--run={disk}", "--task=refer", "--text=x", "--image=x.png"]
    refused(words, capsys, "Read-only file system", "name another file for the picture with --out")


@pytest.mark.parametrize("name", [*paths.FILES, *paths.FOLDERS])
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_something_else_in_the_place_of_a_runs_file_or_folder_is_named(
    verb, name, place, tmp_path, capsys
):
    shutil.copytree(place / "run", tmp_path / "run")
    strange = tmp_path / "run" / name
    if strange.is_dir():
        shutil.rmtree(strange)
    strange.unlink(missing_ok=True)
    if name in paths.FOLDERS:
        strange.write_text("a file")
    else:
        strange.mkdir()
    train = [f"--config={place}/squares.py", f"--workdir={tmp_path}/run"]
    words = train if verb == "train" else ["evaluate", f"--run={tmp_path}/run"]
    refused(words, capsys, str(strange), "remove it")
    if name in paths.FILES:
        strange.rmdir()
        os.mkfifo(strange)  # opening one would wait forever
        refused(words, capsys, str(strange), "pipe or a device")


@pytest.mark.parametrize("verb", ["predict", "export"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer", "checkpoints"])
def test_a_run_whose_files_are_of_another_kind_is_not_opened(verb, name, place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    strange = tmp_path / "run" / name
    if name == "config.json":
        strange.unlink()
        strange.mkdir()
    else:
        shutil.rmtree(strange, ignore_errors=True)
        strange.write_text("a file")
    more = {
        "predict": ["--task=qa", "--text=why"],
        "export": ["--format=model", f"--out={tmp_path}/out"],
    }
    refused([verb, f"--run={tmp_path}/run", *more[verb]], capsys, name)


@pytest.mark.parametrize("kind", ["file", "pipe", "loop", "device", "folder"])
@pytest.mark.parametrize("place_of", ["4", "4/note", "4/note/note.json"])
def test_a_checkpoint_of_another_kind_is_damaged(kind, place_of, place, tmp_path):
    """And is looked at once: nothing waits for it to become one."""
    strange = tmp_path / place_of
    strange.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(strange)
    elif kind == "folder":
        strange.mkdir()
    else:
        strange.symlink_to("/dev/zero" if kind == "device" else place / kind)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.saved_weights() == set() and checkpoints.newest_note() == {}
    with pytest.raises(UserError, match="holds only damaged checkpoints"):
        checkpoints.restore({"weight": np.zeros(3, np.float32)})
    checkpoints.close()


# ---- what is read ----------------------------------------------------------------------------------
READERS = {
    "train --config": ["--workdir={place}/new", "--config="],
    "params --config": ["params", "--config="],
    "data --config": ["data", "export", "--out={place}/new", "--config="],
    "show --config": ["data", "show", "squares", "--out={place}/new.png", "--config="],
    "show --path": ["data", "show", "llava", "--out={place}/new.png", "--path="],
    "check --config": ["data", "check", "--out={place}/new", "--config="],
    "predict --config": ["predict", "--task=qa", "--text=x", "--config="],
    "evaluate --config": ["evaluate", "--predictions={place}/file", "--config="],
    "evaluate --run": ["evaluate", "--run="],
    "predict --run": ["predict", "--task=qa", "--text=x", "--run="],
    "export --run": ["export", "--format=model", "--out={place}/new", "--run="],
    "evaluate --predictions": ["evaluate", "--config={place}/squares.py", "--predictions="],
    "evaluate --predictions of a run": ["evaluate", "--run={place}/run", "--predictions="],
    "predict --image": ["predict", "--run={place}/run", "--task=cls", "--image="],
}
UNREADABLE = {
    "nothing": "{place}/nowhere",
    "a folder": "{place}/folder",
    "a file": "{place}/file",
    "below a file": "{place}/file/x",
    "a link loop": "{place}/loop",
    "a link to nothing": "{place}/dangling",
    "a pipe": "{place}/pipe",
    "a device": "/dev/zero",
    "below /proc": "/proc/x",
    "a long name": "{place}/" + "n" * 300,
    "a long path": "{place}" + "/folder" * 700,
    "no text": "{place}/caf\udce9",
    "empty": "",
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("reader", READERS)
def test_a_path_that_cannot_be_read_is_one_sentence(reader, kind, place, capsys):
    arguments = [word.format(place=place) for word in READERS[reader]]
    path = UNREADABLE[kind].format(place=place)
    for ending in ("", ".py") if "--config" in reader and kind in ("nothing", "a long name") else ("",):
        refused([*arguments[:-1], arguments[-1] + path + ending], capsys)
    assert not (place / "new").exists()


# ---- what settings name ----------------------------------------------------------------------------
SOURCE = "--config.data.sources=({{'name': 'llava', 'path': '{path}'}},)"
SETTINGS = {
    "data.cache": ["--config.data.cache={path}/x"],
    "data.root": ["--config.data.root={path}", SOURCE.replace("{path}", "x")],
    "data.sources path": [SOURCE],
    "text.tokenizer": ["--config.text.tokenizer={path}"],
    **{
        f"init {kind}": [
            f"--config.init=(('seed', ''), ('{kind}', '{{path}}'))",
            "--config.model.lora.rank=2",
        ]
        for kind in ("run", "hf", "eva", "clip", "siglip", "unimed", "med_moe", "gguf", "peft")
    },
    "init router": [
        "--config.init=(('seed', ''), ('router', '{path}'))",
        "--config.model.moe.experts=2",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["nothing", "a folder", "a file", "a link loop", "a pipe", "a device", "a long path"]
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_path_in_the_settings_that_cannot_be_read_is_one_sentence(
    setting, kind, place, tmp_path, capsys
):
    path = UNREADABLE[kind].format(place=place)
    if setting == "data.cache" and kind in ("nothing", "a folder"):
        return  # a folder for the cache may be new
    words = [f"--config={place}/squares.py", f"--workdir={tmp_path}/run", "--config.train.steps=1"]
    refused([*words, *(word.format(path=path) for word in SETTINGS[setting])], capsys, at_once=False)
    if setting in ("text.tokenizer", "init hf", "init gguf", "init run"):
        words = ["predict", words[0], "--task=qa", "--text=x"]
        refused([*words, *(word.format(path=path) for word in SETTINGS[setting])], capsys, at_once=False)


# ---- in a process of its own -----------------------------------------------------------------------
def program(*words: str | bytes, **options) -> subprocess.CompletedProcess:
    own = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "unimed_jax.main", *words]
    environment = os.environ | own | options.pop("environment", {})
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, timeout=300, **options)


def without_reader() -> int:
    """A pipe's end for writing whose other end is closed, as after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    "words", [["--help"], ["params", "--help"], ["params", "--config={place}/squares.py"]], ids=str
)
def test_a_reader_that_has_left_ends_it_quietly(words, place):
    writer = without_reader()
    done = program(*(word.format(place=place) for word in words), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_the_working_directory_is_gone(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in WRITERS.values():
        refused(
            [*(word.format(place=place) for word in words[:-1]), f"{words[-1]}x.png"],
            capsys,
            "working directory",
        )


def test_a_working_directory_whose_name_is_no_text(place, tmp_path, monkeypatch, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    refused(
        [f"--config={place}/squares.py", "--workdir=run"],
        capsys,
        "--workdir=run is not UTF-8",
        "caf\\udce9",
    )


@pytest.mark.parametrize("verb", [*cli.VERBS, ""])
@pytest.mark.parametrize(
    "word", ["--text=caf\udce9", "--config.name=caf\udce9", "\ud800", "--run=\udcff"]
)
def test_an_argument_that_is_no_text_is_one_sentence(verb, word, capsys):
    refused([*([verb] if verb else []), word], capsys, "is not text in utf-8")


def test_a_sentence_stays_on_one_line_whatever_it_quotes(capsys):
    said = refused(["--config=two\nlines\x1b[31m.py"], capsys, "two lines\\x1b[31m.py does not exist")
    assert "\x1b" not in said


def test_a_defect_is_no_sentence(place, monkeypatch):
    """What no person caused keeps its traceback."""
    for error in (
        TypeError("a defect"),
        KeyError("x"),
        ValueError("y"),
        AssertionError(),
        RuntimeError("z"),
    ):

        def broken(*_, error=error):
            raise error

        monkeypatch.setattr("unimed_jax.verbs.params.read_config", broken)
        with pytest.raises(type(error)):
            cli.main(["params", f"--config={place}/squares.py"])


# A process without the rights that let root read and write everything.
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.mark.slow
def test_no_permission_is_one_sentence(place, tmp_path):
    prefix = UNPRIVILEGED if os.geteuid() == 0 else []
    if prefix and (shutil.which("setpriv") is None or subprocess.run([*prefix, "true"]).returncode):
        pytest.skip("needs setpriv, since root may do everything")
    (tmp_path / "closed").mkdir()
    shutil.copytree(place / "run", tmp_path / "closed" / "run")
    (tmp_path / "secret.py").write_text(CONFIG)
    (tmp_path / "secret.png").write_bytes(b"")
    cases = [
        [*(w.format(place=place) for w in words[:-1]), f"{words[-1]}{tmp_path}/closed/x.png"]
        for words in WRITERS.values()
    ]
    for reader, words in READERS.items():
        file = (
            "secret.py"
            if "--config" in reader
            else "secret.png"
            if "--image" in reader
            else "closed/run"
        )
        cases.append([*(w.format(place=place) for w in words[:-1]), f"{words[-1]}{tmp_path}/{file}"])
    for path in ("closed", "secret.py", "secret.png"):
        (tmp_path / path).chmod(0)
    code = (
        "import contextlib, io, json, sys\nfrom unimed_jax import main\nfound = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n        status = "
        "main.main(words)\n"
        "    found.append((status, said.getvalue()))\nprint(json.dumps(found))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = [*prefix, sys.executable, "-c", code, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    (tmp_path / "closed").chmod(0o755)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == len(cases)
    for words, (status, said) in zip(cases, found, strict=True):
        assert status == 2 and len(said.splitlines()) == 1, (words, said)
        assert "ermission" in said, (words, said)


@pytest.mark.slow
def test_training_whose_output_nobody_reads_ends_quietly(place, tmp_path):
    writer = without_reader()
    done = program(
        f"--config={place}/squares.py",
        f"--workdir={tmp_path}/run",
        stdout=writer,
        environment={"XLA_FLAGS": ""},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--text=caf\u00e9"], [b"--text=caf\xe9"]], ids=["UTF-8", "Latin-1"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_arguments_under_any_locale(words, locale, place):
    done = program(
        "predict",
        f"--run={place}/run",
        "--task=qa",
        *words,
        stdout=subprocess.DEVNULL,
        environment={"LC_ALL": locale},
    )
    said = "caf\\xe9 is not text in utf-8" if isinstance(words[0], bytes) else "does not exist"
    assert done.returncode == 2 and said in done.stderr.decode() and done.stderr.count(b"\n") == 1


# ---- under a run -----------------------------------------------------------------------------------
RUN = ("checkpoints", "checkpoints/*", "tensorboard", "log.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["", "/run", *(f"/run/{name}" for name in RUN)])
def test_what_is_deleted_under_a_run_is_one_sentence_or_harmless(
    gone, place, tmp_path, monkeypatch, capsys, quick_compiles
):
    """The folder itself, its parts, or the working directory, in which it was named."""
    monkeypatch.setattr(chain, "evaluate_run", lambda run, config: None)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write = Log.write

    def deleting(self, step, values):
        if step == 5:
            for target in list(tmp_path.glob(f"work{gone}")):
                while target.is_dir():  # a save may be under way in it
                    shutil.rmtree(target, ignore_errors=True)
                target.unlink(missing_ok=True)
        write(self, step, values)

    monkeypatch.setattr(Log, "write", deleting)
    status = cli.main([f"--config={place}/squares.py", "--workdir=run"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unimed_jax")]
    assert "Traceback" not in "".join(said)
    assert (status, len(said)) in ((2, 1), (0, 0)), said
    if status:
        assert "run" in said[0] or "working directory" in said[0]


def test_letters_that_a_font_lacks_are_no_warning(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet():
            draw_box(
                tmp_path / "x.png",
                np.zeros((8, 8, 3), np.uint8),
                (1, 1, 50, 50),
                "\u80ba\u708e \u0e1b\u0e35",
            )
    assert not seen and (tmp_path / "x.png").exists()


def test_a_full_disk_is_said_as_such(tmp_path, monkeypatch):
    """By whoever says it of all full disks, not as a place that takes no file."""

    def full(**_):
        raise OSError(28, "No space left on device", "/x")

    monkeypatch.setattr(paths.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        paths.check_output(tmp_path / "x", "--out")
    with pytest.raises(UserError, match="lies below"):
        (tmp_path / "file").touch()
        paths.check_output(tmp_path / "file" / "x", "--out")
