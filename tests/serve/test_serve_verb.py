"""The verb: its mistakes as sentences, and both campaigns against a server in a process of its own."""

import argparse
import socket

import pytest
from serve.conftest import serving
from support import fake_brain

from unimed_jax import main as cli


@pytest.mark.parametrize(
    "arguments, environment, words",
    [
        (["--run=none", "--port=70000"], {}, "--port=70000 must lie from 0 to 65535"),
        (["--run=none", "--queue=0"], {}, "--queue=0 must lie from 1"),
        (["--run=none", "--origin=unimed.hospital"], {}, "write it as https://unimed.hospital"),
        (["--run=none", "--origin=https://unimed.hospital/"], {}, "without a path"),
        (["--run=none", "--origin=https://Unimed.hospital"], {}, "in small letters"),
        (["--run=none"], {}, "none"),
        (["--run=none"], {"UNIMED_SERVE_TOKEN": "short"}, "at least 16 letters"),
        (
            ["--run=none", "--token-file={file}"],
            {"UNIMED_SERVE_TOKEN": "a" * 20},
            "leave one of them out",
        ),
        (["--run=none", "--token-file={file}"], {}, "is empty"),
        (["--run=none", "--token-file=nowhere"], {}, "nowhere"),
        (["--run=none", "--token=abc"], {}, "--token-file"),
        ([], {}, "--run"),
    ],
)
def test_mistakes_are_sentences(arguments, environment, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "token").write_text("\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = [argument.replace("{file}", str(tmp_path / "token")) for argument in arguments]
    assert cli.main(["serve", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "a" * 70, "", "no\0name"])
def test_where_nobody_can_listen_is_a_sentence(host, tmp_path, capsys, monkeypatch):
    """A port in use, or what is no name of a machine."""
    from unimed_jax.config import Config

    monkeypatch.setattr("unimed_jax.runs.open.settings_of", lambda folder: Config())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["serve", f"--run={tmp_path}", f"--host={host}", f"--port={port}"]) == 2
    said = capsys.readouterr().err
    assert "cannot listen there" in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def finished(on_one_device, built_once):
    return str(built_once("finished", fake_brain.finished) / "run")


@pytest.mark.slow
def test_the_campaign_of_faults_finds_nothing(finished):
    """Every fault, dropped streams and SIGTERM under load; traced in a process of its own."""
    found = serving.faults(argparse.Namespace(run=finished, clients=6, quick=True))
    assert found["wrong"] == [] and found["answered around SIGTERM"] > 6 and found["faults"] > 70


@pytest.mark.slow
def test_the_campaign_of_load_finds_nothing(finished):
    given = argparse.Namespace(run=finished, questions=48, clients=16, alone=24, memory=150)
    found = serving.load(given)
    assert found["wrong"] == [] and len(found["tasks"]) == 6
    first, *_, last = found["MiB after each round"]
    assert last < first + 20
