"""Runs on a quantised base, as users start them: killed and continued, opened, scored and exported."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support.fake_brain import Squares

from unimed_jax import main as cli
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters
from unimed_jax.model.quantised import Quantised
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.runs.open import open_run
from unimed_jax.train import loop
from unimed_jax.train.log import Log
from unimed_jax.verbs.options import read_config

pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.slow]

MESH = sharding.make_mesh
CONFIG = """
from support.fake_brain import tiny_config
def get_config(base=""):
    config = tiny_config(steps=3, save_every=1) if base else tiny_config(steps=1)
    config.name = "quantised"
    vision, decoder = config.model.vision, config.model.decoder
    vision.width = vision.mlp_width = 64
    decoder.width, decoder.mlp_width, decoder.heads = 64, 128, 4
    config.evaluate.splits, config.evaluate.limit, config.evaluate.max_new_tokens = ("test",), 2, 6
    if base:
        config.model.frozen_kernels, config.model.frozen_dtype = "nf4", "bfloat16"
        config.model.lora.rank, config.model.lora.dropout = 2, 0.1
        config.optimizer.moments_dtype = "bfloat16"
        config.train.rules = (
            dict(match="connector/*", train=True),
            dict(match="*/lora_?", train=True),
            dict(match="*", train=False),
        )
        # of the frozen encoder no file could give the numbers back
        config.init = (("seed", ""), ("run", base), ("seed", "vision/blocks/*"))
    return config
"""


@pytest.fixture(scope="module")
def place(on_one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    (folder / "config.py").write_text(CONFIG)
    Image.fromarray(Squares().image("test0")).save(folder / "image.png")
    loop.train(read_config(str(folder / "config.py")), folder / "base")
    assert (
        cli.main([f"--config={folder / 'config.py'}:{folder / 'base'}", f"--workdir={folder / 'run'}"])
        == 0
    )
    return folder


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_bit_for_bit(place, tmp_path, monkeypatch):
    config = read_config(f"{place / 'config.py'}:{place / 'base'}")
    write = Log.write

    def stopping(self, at, values):
        if at == 2:
            raise Killed
        write(self, at, values)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Log, "write", stopping)
        loop.train(config, tmp_path)
    ours, theirs = (
        parameters(loop.train(config, tmp_path).model),
        parameters(open_run(place / "run").model),
    )
    for path, leaf in theirs.items():
        jax.tree.map(np.testing.assert_array_equal, ours[path], leaf)


def test_a_checkpoint_holds_only_the_codes_that_no_file_gives_back(place):
    saved = Checkpoints(place / "run" / "checkpoints", read_only=True).saved_weights()
    leaves = parameters(open_run(place / "run").model)
    quantised = {path for path, leaf in leaves.items() if isinstance(leaf, Quantised)}
    assert {path.split("/")[0] for path in quantised} == {"vision", "decoder"}
    assert saved & quantised == {path for path in quantised if path.startswith("vision/")}
    base = parameters(open_run(place / "base").model)
    path = "decoder/layers/mlp/up/kernel"
    error = np.linalg.norm(np.asarray(leaves[path], np.float32) - base[path]) / np.linalg.norm(
        base[path]
    )
    assert 0.05 < error < 0.12


def answers(place, capsys, run) -> list[str]:
    said = []
    for words in (["--task=caption", f"--image={place / 'image.png'}"], ["--task=qa", "--text=Why?"]):
        assert cli.main(["predict", f"--run={run}", *words]) == 0
        said.append(capsys.readouterr().out)
    return said


def test_what_is_exported_answers_as_the_run(place, tmp_path, capsys):
    expected = answers(place, capsys, place / "run")
    out = tmp_path / "model"
    assert cli.main(["export", f"--run={place / 'run'}", "--format=model", f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "its frozen kernels are stored as nf4; what is written is the numbers" in said
    stored = load_file(next(out.glob("*.safetensors")))
    leaf = parameters(open_run(place / "run").model)["vision/blocks/up/kernel"]
    name = next(name for name in stored if name.endswith("layers.0.mlp.fc1.weight"))
    np.testing.assert_array_equal(stored[name], np.asarray(leaf[0]).T)
    assert json.loads((out / "config.json").read_text())["unimed"]["model"]["frozen_kernels"] == "plain"
    assert answers(place, capsys, out) == expected
    peft = tmp_path / "peft"
    assert cli.main(["export", f"--run={place / 'run'}", "--format=peft", f"--out={peft}"]) == 0
    assert "nf4" not in capsys.readouterr().out


def test_eight_devices_make_the_same_codes(place):
    """Those that the run was trained on, or it would not open; its checkpoint's are equal, too."""
    alone = parameters(open_run(place / "run").model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", MESH)
        spread = parameters(open_run(place / "run").model)
    for path, leaf in alone.items():
        if isinstance(leaf, Quantised):
            assert len(spread[path].codes.sharding.device_set) == 8
            jax.tree.map(np.testing.assert_array_equal, spread[path], leaf)
