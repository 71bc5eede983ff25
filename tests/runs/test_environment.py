"""environment.json: one entry for every session that trains, and nothing of the machine or its user."""

import platform
import signal
from types import SimpleNamespace

import pytest
from support.toy import toy_config

from unimed_jax.interruption import Stopped
from unimed_jax.runs import environment
from unimed_jax.train import loop


def test_the_environment_is_kept_once_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/unimed_jax/main.py", "train", "--config=a b.py"])
    environment.keep(tmp_path)
    environment.keep(tmp_path)
    (only,) = environment.kept(tmp_path)
    assert only["command"] == "python -m unimed_jax.main train '--config=a b.py'"
    assert only["devices"].endswith("cpu") and only["packages"]["jax"]
    assert only.keys() == {"command", "code_version", "python", "system", "devices", "packages"}
    system = platform.uname()
    assert only["system"] == f"{system.system} {system.machine}"  # not its name, not its release
    monkeypatch.setattr("sys.argv", ["pytest"])
    environment.keep(tmp_path)
    assert [one["command"] for one in environment.kept(tmp_path)][1:] == [""]
    (tmp_path / environment.FILE).write_text("{}")
    assert environment.kept(tmp_path) == []


def test_a_session_that_is_stopped_is_kept_too(tmp_path, monkeypatch):
    def stopped(start):
        raise Stopped(signal.SIGTERM)

    start = SimpleNamespace(finished=False, done=1, program=SimpleNamespace(mesh=None))
    monkeypatch.setattr(loop, "prepare", lambda *arguments: start)
    monkeypatch.setattr(loop, "describe", lambda start: None)
    monkeypatch.setattr(loop, "run_steps", stopped)
    with pytest.raises(Stopped):
        loop.train(toy_config(), tmp_path)
    assert len(environment.kept(tmp_path)) == 1
