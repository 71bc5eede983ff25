"""Reads text and JSON of any origin: what is read, and the one sentence for everything else."""

import json
import os

import pytest

from unimed_jax import files
from unimed_jax.config import default_config
from unimed_jax.errors import UserError
from unimed_jax.predict.predictor import Request, as_example
from unimed_jax.settings import from_config_dict


@pytest.mark.parametrize(
    "data, value",
    [
        (b'\xef\xbb\xbf{"a": [1, 2.5, null, true]}', {"a": [1, 2.5, None, True]}),
        ('["\u5de6 caf\u00e9"]'.encode(), ["\u5de6 caf\u00e9"]),
        (b'"\\ud83d\\ude00"', "\U0001f600"),  # a whole pair
        (b"[" * 100 + b"]" * 100, None),
        (b'[{"a": 1}, {"a": 2}]\r\n', [{"a": 1}, {"a": 2}]),
    ],
)
def test_read_json(tmp_path, data, value):
    file = tmp_path / "a.json"
    file.write_bytes(data)
    found = files.read_json(file)
    assert found == value if value is not None else len(found) == 1


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "is not JSON"),
        (b'{"a": 1,}', "is not JSON .*line 1"),
        (b'[\n1,\n"caf\xe9"]', "line 3: the byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("{}".encode("utf-16"), "line 1: the byte 0xff is not UTF-8"),
        (b"[" * 101 + b"]" * 101, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": 1, "b": 2, "a": 3}', "an object has the key 'a' twice"),
        (b"[NaN]", "NaN is not a number of JSON"),
        (b"[-Infinity]", "-Infinity is not a number of JSON"),
        (b"[1e999]", "the number 1e999 is too large"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
        (b'[{"a": ["x", "\\ud800y"]}]', r"\[0\]\['a'\]\[1\] holds half of a surrogate pair"),
        (b'{"\\udc00": 1}', "the text holds half of a surrogate pair"),
        (b'"\\ud83d"', "the text holds half of a surrogate pair"),
    ],
)
def test_read_json_refuses(tmp_path, data, sentence):
    file = tmp_path / "a.json"
    file.write_bytes(data)
    with pytest.raises(UserError, match=sentence) as error:
        files.read_json(file)
    assert str(file) in str(error.value)
    str(error.value).encode()  # can be printed


def test_read_text_refuses_what_is_no_file(tmp_path):
    """A folder, a pipe (which would wait for ever), nothing, names that no file has, too large a file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").write_bytes(b"1" * 100)
    for name, sentence in (
        (".", "is a folder, where a file belongs; mend"),
        ("pipe", "is a pipe or a device"),
        ("none", "none does not exist; mend"),
        ("loop", "cannot be read"),
        ("n" * 300, "cannot be read .*too long"),
        ("a\0b", "cannot be read"),
        ("large/below", "cannot be read"),
        ("large", "has 100 bytes, more than the 99 that are read"),
    ):
        with pytest.raises(UserError, match=sentence):
            files.read_text(tmp_path / name, "mend", largest=99)
    with pytest.raises(UserError, match="is a pipe or a device"):
        files.read_text("/dev/zero")


def test_json_lines_name_the_line():
    assert list(files.json_lines('{"a": 1}\r\n\n[2]', "x")) == [(1, {"a": 1}), (3, [2])]
    with pytest.raises(UserError, match=r"x, line 2, is not JSON"):
        list(files.json_lines('1\n{"a"\n', "x"))


def test_half_a_surrogate_pair_is_refused_in_settings_and_requests():
    settings = default_config()
    settings.data.sources = (dict(name="brain", info=dict(note="a \ud800")),)
    with pytest.raises(UserError, match=r"sources\[0\].info\['note'\]='a .ud800' holds half of a surrogate"):
        from_config_dict(settings)
    with pytest.raises(UserError, match=r"request 'q.udfff' holds half of a surrogate pair"):
        as_example(Request("qa", "q\udfff"))


def test_not_finite_numbers_where_they_are_meant():
    assert files.parse_json(json.dumps([float("inf")]), "x", finite=False) == [float("inf")]
