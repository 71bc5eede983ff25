"""The log of a run that continues: which lines stay, whatever happened to the file."""

import json
import random

import pytest

from unimed_jax.train.log import DAMAGED, continue_lines


def line(step: int) -> bytes:
    return json.dumps({"step": step, "train/loss": step / 7, "loss/qa": None}).encode() + b"\n"


LINES = [line(step) for step in (0, 1, 2, 2, 3, 4, 5, 6)]  # 2 also has a line of the held-out data


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"".join(LINES))
    return file


def test_lines_from_the_first_step_on_go_and_a_torn_one(log, capsys):
    for torn in (b"", b'{"step": 7, "tra', line(7)[:-1]):
        log.write_bytes(b"".join(LINES) + torn)
        continue_lines(log, 7)
        assert log.read_bytes() == b"".join(LINES)
    continue_lines(log, 3)
    assert log.read_bytes() == b"".join(LINES[:4])
    continue_lines(log, 0)
    assert log.read_bytes() == b"" and not capsys.readouterr().err
    log.unlink()
    continue_lines(log, 0)
    assert [path.name for path in log.parent.iterdir()] == []


@pytest.mark.parametrize("first", [4, 7])
@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_costs_its_line_alone(log, first, seed, capsys):
    """Lines that can still be read stay as they are; those of steps before `first` are never lost."""
    rng, content = random.Random(seed), bytearray(b"".join(LINES))
    place = rng.randrange(len(content) - 1)
    content[place] ^= 1 << rng.randrange(8)
    log.write_bytes(content)
    continue_lines(log, first)
    whole = [one for one in LINES if json.loads(one)["step"] < first]
    hit = sum(place >= sum(map(len, LINES[: i + 1])) for i in range(len(LINES)))
    # two if its end was hit
    around = {hit, hit + 1} if LINES and content[place : place + 1] != b"\n" else {hit}
    found = log.read_bytes().splitlines(keepends=True)
    for i, one in enumerate(whole):
        assert one in found or i in around, (i, place)
    assert len(found) <= len(whole) + 1 and all(
        isinstance(json.loads(one)["step"], int) for one in found
    )
    said = capsys.readouterr().err
    aside = log.with_name(DAMAGED)
    assert bool(said) == aside.exists() and said.count("\n") <= 1
    before = log.read_bytes()
    continue_lines(log, first)
    assert log.read_bytes() == before and not capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\n",
        b'{"step": 3, "train/loss": "caf\xe9"}\n',
        b"[" * 100_000 + b"\n",
        b"null\n",
        b"5\n",
        b"\n",
        b'{"step": "3"}\n',
        b'{"step": true}\n',
        b'{"step": 2.5}\n',
        b'{"step": 900}\n',
        b'{"loss": 1}\n',
        b"\0" * 5000 + b"\n",
        b'{"step": 3} {"step": 3}\n',
    ],
)
def test_a_damaged_line_is_kept_aside_and_named_and_those_after_it_stay(log, damage, capsys):
    log.write_bytes(b"".join([*LINES[:3], damage, *LINES[3:]]) + damage[:3].replace(b"\n", b""))
    continue_lines(log, 5)
    assert log.read_bytes() == b"".join(LINES[:6])
    assert log.with_name(DAMAGED).read_bytes() == damage
    (said,) = capsys.readouterr().err.splitlines()
    assert (
        f"{log}: line 4 is damaged and kept in {log.with_name(DAMAGED)}; the other lines stay." in said
    )


def test_a_damaged_last_line_is_kept_aside_too(log, capsys):
    log.write_bytes(b"".join([*LINES, b"{x\n", b"{y\n"]))
    continue_lines(log, 7)
    assert log.read_bytes() == b"".join(LINES) and log.with_name(DAMAGED).read_bytes() == b"{x\n{y\n"
    assert "lines 9, 10 are damaged" in capsys.readouterr().err
