"""A seeded cut of the fuzz campaign: every reader, 200 cases.

And programs and settings that hypothesis makes.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from support.weight_files import archive

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from campaigns import fuzz, fuzz_weights

from unimed_jax.errors import UserError
from unimed_jax.interop.families.med_moe import model_from_med_moe, read_med_moe_config
from unimed_jax.interop.tensors.torch_file import TorchFile

CASES = 200
SEED = 7
# Half of these cases start a process of their own (data/tokenizer_probe.py).
FEWER = {"tokenizer": 60}
quick = hypothesis.settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.mark.parametrize("reader", fuzz_weights.READERS)
def test_only_sentences(reader):
    if reader in ("gguf", "sentencepiece"):
        pytest.importorskip(reader, reason=f"the format's own package: pip install -e '.[{reader}]'")
    said = set()
    for name, read in itertools.islice(fuzz_weights.cases(reader, SEED), FEWER.get(reader, CASES)):
        start = time.process_time()
        kind, what = fuzz.outcome(read)
        assert kind != "finding", f"{name}: {what}"
        assert time.process_time() - start < fuzz.SECONDS, name
        said.add(kind if kind == "read" else what)
    assert len(said) > 1  # the cases differ


def test_a_finding_is_found():
    """The campaign sees what it looks for."""

    def many_lines():
        raise UserError("x" * 10)

    def crashes():
        raise RecursionError("deep")

    assert fuzz.outcome(many_lines)[0] == "finding" and "not one sentence" in fuzz.outcome(many_lines)[1]
    assert (
        fuzz.outcome(crashes) == ("finding", fuzz.outcome(crashes)[1])
        and "RecursionError" in fuzz.outcome(crashes)[1]
    )
    assert fuzz.outcome(lambda: None) == ("read", "")
    again = [fuzz.outcome(read) for _, read in itertools.islice(fuzz_weights.cases("pth", 3), 8)]
    assert again == [fuzz.outcome(read) for _, read in itertools.islice(fuzz_weights.cases("pth", 3), 8)]


@pytest.mark.slow
def test_the_campaign_goes_on_after_a_process_that_ends(monkeypatch, tmp_path):
    """A case that ends its process, or fills the memory, is a finding; those after it still run."""
    module = tmp_path / "campaigns/fuzz_ending.py"
    for name in ("fuzz.py", "fuzz_changes.py"):
        module.parent.mkdir(exist_ok=True)
        (module.parent / name).write_text((Path(fuzz.__file__).parent / name).read_text())
    module.write_text(
        "import os\n"
        "from unimed_jax.errors import UserError\n"
        "def refuse():\n    raise UserError('no.')\n"
        "def fill():\n    bytearray(6 << 30)\n"
        "def cases(seed):\n"
        "    for number in range(6):\n"
        "        yield f'case {number}', (lambda: os._exit(7)) if number == 2 else fill if number "
        "== 4 else refuse\n"
    )
    own = (module.parent / "fuzz.py").read_text()
    (module.parent / "fuzz.py").write_text(
        own.replace('"fuzz_weights", "fuzz_images", "fuzz_data"', '"fuzz_ending",')
    )
    found = subprocess.run(
        [sys.executable, module.parent / "fuzz.py", "--cases=6"],
        env={**os.environ, "PYTHONPATH": str(Path(fuzz.__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert "| ending | 6 | 4 | 0 |" in found.stdout, found.stdout + found.stderr
    assert "case 2: the process ended (7)" in found.stdout and "case 4: MemoryError" in found.stdout
    assert "6 cases, 2 findings, seed 0" in found.stdout


def with_number(codes: list[bytes], size: int, numbers):
    """An opcode with a number of so many bytes."""
    return st.builds(lambda code, n: code + n.to_bytes(size, "little"), st.sampled_from(codes), numbers)


OPCODES = st.one_of(
    st.sampled_from(
        [b"(", b"0", b"1", b"2", b")", b"]", b"}", b"t", b"l", b"d", b"a", b"e", b"s", b"u", b"N", b"b"]
    ),
    st.sampled_from(
        [b"\x85", b"\x86", b"\x87", b"R", b"\x81", b"Q", b"\x94", b"\x93", b"\x88", b"I1\n", b"Va\n"]
    ),
    with_number(
        [b"X", b"r", b"j", b"J", b"\x8b"], 4, st.one_of(st.integers(0, 5), st.integers(0, (1 << 32) - 1))
    ),
    with_number([b"q", b"h", b"K", b"\x8c", b"U"], 1, st.integers(0, 255)),
    with_number([b"\x8d", b"\x8e", b"\x95", b"G"], 8, st.integers(0, (1 << 64) - 1)),
    st.sampled_from(
        [
            b"ccollections\nOrderedDict\n",
            b"ctorch\nFloatStorage\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
        ]
    ),
    st.binary(max_size=4),
)


@quick
@hypothesis.given(program=st.lists(OPCODES, max_size=40))
def test_any_pickle(tmp_path_factory, program):
    path = tmp_path_factory.getbasetemp() / "hypothesis.pth"
    archive(path, b"\x80\x02" + b"".join(program) + b".")

    def read():
        file = TorchFile(path)
        file.to_write(file.tree)
        file.tensors()

    assert fuzz.outcome(read)[0] != "finding", fuzz.outcome(read)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@quick
@hypothesis.given(
    changes=st.dictionaries(st.sampled_from(sorted(fuzz_weights.MED_MOE)), VALUES, max_size=3),
    experts=st.dictionaries(st.sampled_from(sorted(fuzz_weights.MED_MOE["moe"])), VALUES, max_size=2),
)
def test_any_settings(tmp_path_factory, changes, experts):  # fmt: skip
    folder = tmp_path_factory.getbasetemp()
    settings = {**fuzz_weights.MED_MOE, "moe": fuzz_weights.MED_MOE["moe"] | experts, **changes}
    (folder / "config.json").write_text(json.dumps(settings))

    def read():
        model_from_med_moe(read_med_moe_config(folder), where="config.json")

    assert fuzz.outcome(read)[0] != "finding", fuzz.outcome(read)
