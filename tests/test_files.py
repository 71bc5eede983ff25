"""Reads text and JSON of any origin: what is read, and the one sentence for everything else."""

import json
import os

import pytest

from unimed_jax import parsing
from unimed_jax.config import default_config
from unimed_jax.data.datasets import llava
from unimed_jax.data.datasets.llava import INFO
from unimed_jax.data.info import described
from unimed_jax.data.store import Store
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families import peft
from unimed_jax.interop.families.hf_config import read_hf_config
from unimed_jax.interop.families.med_moe import read_med_moe_config
from unimed_jax.interop.families.unimed_hf import exported_config
from unimed_jax.interop.tensors.files import open_weights
from unimed_jax.predict.request import Request, as_example
from unimed_jax.runs import inputs
from unimed_jax.runs.folder import read_config
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
    found = parsing.read_json(file)
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
        parsing.read_json(file)
    assert str(file) in str(error.value)
    str(error.value).encode()  # can be printed


def test_read_text_refuses_what_is_no_file(tmp_path):
    """A folder, a pipe (which would wait for ever), nothing, names that no file has, too large a
    file.
    """
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
            parsing.read_text(tmp_path / name, "mend", largest=99)
    with pytest.raises(UserError, match="is a pipe or a device"):
        parsing.read_text("/dev/zero")


def test_json_lines_name_the_line():
    assert list(parsing.json_lines('{"a": 1}\r\n\n[2]', "x")) == [(1, {"a": 1}), (3, [2])]
    with pytest.raises(UserError, match=r"x, line 2, is not JSON"):
        list(parsing.json_lines('1\n{"a"\n', "x"))


def test_half_a_surrogate_pair_is_refused_in_settings_and_requests():
    settings = default_config()
    settings.data.sources = (dict(name="brain", info=dict(note="a \ud800")),)
    with pytest.raises(
        UserError, match=r"sources\[0\].info\['note'\]='a .ud800' holds half of a surrogate"
    ):
        from_config_dict(settings)
    with pytest.raises(UserError, match=r"request 'q.udfff' holds half of a surrogate pair"):
        as_example(Request("qa", "q\udfff"))


def test_not_finite_numbers_where_they_are_meant():
    assert parsing.parse_json(json.dumps([float("inf")]), "x", finite=False) == [float("inf")]


# Everything in the library that reads somebody's JSON: the file's name, and who reads it in a folder.
JSON_READERS = {
    "a run": ("config.json", read_config),
    "an exported model": ("config.json", exported_config),
    "a Med-MoE checkpoint": ("config.json", read_med_moe_config),
    "a Hugging Face decoder": ("config.json", read_hf_config),
    "an index of weights": ("model.safetensors.index.json", open_weights),
    "an adapter": ("adapter_config.json", lambda folder: peft._rank_and_alpha(folder)),
    "a tokenizer": ("tokenizer_config.json", Tokenizer.load),
    "the inputs of a run": ("inputs.json", inputs.kept),
    "a prepared set": ("manifest.json", Store),
    "a set's passport": ("info.json", lambda folder: described(INFO, folder, {})),
    "records": ("train.json", lambda folder: list(llava.read(folder, "train", {}, []))),
}
NO_JSON = {
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 2000 + b"1" + b"}" * 2000,
    "Latin-1": '{"model_type": "caf\u00e9"}'.encode("latin-1"),
    "UTF-16": '{"model_type": "x"}'.encode("utf-16"),
    "half a surrogate": b'{"model_type": "\\ud800"}',
    "a doubled key": b'{"model_type": "llama", "model_type": "phi"}',
    "not a number": b'{"model_type": NaN}',
    "a long number": b'{"r": ' + b"9" * 6000 + b"}",
    "cut": b'{"model_type": "lla',
    "nothing": b"",
    "a list": b"[1]",
    "a number": b"7",
}


@pytest.mark.parametrize("damage", NO_JSON)
@pytest.mark.parametrize("name", JSON_READERS)
def test_whoever_reads_json_says_in_a_sentence_what_is_wrong(tmp_path, name, damage):
    file, read = JSON_READERS[name]
    (tmp_path / file).write_bytes(NO_JSON[damage])
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    assert file in str(error.value) or name == "a tokenizer"
