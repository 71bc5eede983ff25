"""The published configuration from end to end at a tiny size: a LLaMA folder and an EVA file go in,
a run goes out in every format, and what is read back answers as the run does.
"""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from support import tiny
from support.fake_brain import Squares

from unimed_jax import main as cli
from unimed_jax.config import MeshConfig, VisionConfig
from unimed_jax.config_file import load_config_file
from unimed_jax.data.tokenizer import Tokenizer, corpus, train_tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families.hf import export_decoder
from unimed_jax.interop.families.towers import eva_table
from unimed_jax.interop.tensors.table import to_published
from unimed_jax.model import sharding
from unimed_jax.model.cache import Span
from unimed_jax.model.parameters import parameters
from unimed_jax.model.sharding import make_mesh
from unimed_jax.runs.open import open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train.loop import saved_state
from unimed_jax.train.start import prepare

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
# configs/cmoe.py at a size that trains in seconds; what is not named here is as published.
CONFIG = """
from unimed_jax.config_file import load_config_file
def get_config():
    config = load_config_file("configs/cmoe.py")
    vision, decoder = config.model.vision, config.model.decoder
    vision.image_size, vision.patch_size, vision.width = 16, 4, 12
    vision.depth, vision.heads, vision.mlp_width = 2, 2, 20
    decoder.vocab, decoder.width, decoder.depth, decoder.mlp_width = 640, 16, 2, 24
    decoder.heads, decoder.kv_heads, decoder.head_dim = 4, 4, 4
    config.model.connector.router_hidden = None
    config.model.lora.dropout = 0.0
    config.model.compute_dtype = config.model.frozen_dtype = "float32"
    config.init = (("seed", ""), ("hf", "{llama}"), ("eva", "{eva}"))
    config.text.tokenizer = "{llama}"
    config.data.sources = (dict(name="support.squares", id="squares"),)
    config.data.rows, config.data.row_tokens, config.data.row_answers = 4, 192, 96
    config.text.max_prompt, config.text.max_answer = 128, 64
    config.optimizer.lr = config.optimizer.warmup_lr = 3e-2
    config.train.steps, config.train.save_every, config.train.log_every = 12, 12, 4
    config.evaluate.batch, config.evaluate.max_new_tokens, config.evaluate.bootstrap = 8, 8, 20
    config.evaluate.splits, config.evaluate.limit = ("test",), 2
    return config
"""


def bases(folder):
    """A LLaMA folder and an EVA file of random numbers, as they would be downloaded."""
    text = dataclasses.replace(from_config_dict(load_config_file("configs/cmoe.py")).text, vocab=640)
    settings = tiny.config(
        vision={"qkv_bias": "qv"},
        decoder={
            "vocab": 640,
            "width": 16,
            "depth": 2,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 4,
            "mlp_width": 24,
        },
        lora={"rank": 0},
    )
    model = tiny.model(settings)
    train_tokenizer(corpus(Squares().examples("train"), text), text, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    export_decoder(folder / "llama", settings.decoder, parameters(model), folder / "tokenizer", ids)
    vision = VisionConfig(image_size=16, patch_size=4, width=12, depth=2, heads=2, mlp_width=20)
    save_file(to_published(eva_table(vision), parameters(model)), folder / "eva.safetensors")
    return {"llama": folder / "llama", "eva": folder / "eva.safetensors"}


@pytest.fixture(scope="module")
def place(on_one_device, built_once):
    """A folder with the base weights, a config, an image, and the run that it makes."""
    return built_once("cmoe", trained)


def trained(folder):
    made = bases(folder)
    (folder / "cmoe.py").write_text(
        CONFIG.replace("{llama}", str(made["llama"])).replace("{eva}", str(made["eva"]))
    )
    Image.fromarray(Squares().image("test0")).save(folder / "image.png")
    assert cli.main([f"--config={folder / 'cmoe.py'}", f"--workdir={folder / 'run'}"]) == 0


@pytest.fixture(scope="module")
def run(place):
    return place / "run"


def answers(place, capsys, *which: str) -> list[str]:
    """What `predict` says of an image and of text alone."""
    said = []
    image = f"--image={place / 'image.png'}"
    for words in (
        ["--task=caption", image],
        ["--task=vqa", "--text=What colour?", image],
        ["--task=qa", "--text=Why?"],
    ):
        assert cli.main(["predict", *which, *words]) == 0, capsys.readouterr().err
        said.append(capsys.readouterr().out)
    return said


def test_the_published_config_trains_from_a_llama_folder_and_an_eva_file(run, place, capsys):
    assert json.loads((run / "metrics.json").read_text())["fidelity"] == "paper"
    opened = open_run(run)
    saved = json.loads((run / "checkpoints/12/note/note.json").read_text())
    base = saved["note"]["base"]
    assert {entry["source"].split()[0] for entry in base.values()} == {"hf", "eva"}
    assert not any(path in saved["arrays"]["weights"] for path in base)
    leaves = parameters(opened.model)
    assert np.abs(leaves["decoder/layers/attention/q/lora_b"]).max() > 1e-3  # the adapters have moved


def test_what_is_exported_answers_as_the_run(run, place, capsys):
    expected = answers(place, capsys, f"--run={run}")
    assert any(text.strip() for text in expected)
    for kind in ("model", "unimed"):
        out = place / f"{kind}.pth"
        assert cli.main(["export", f"--run={run}", f"--out={out}", f"--format={kind}"]) == 0
        assert f"wrote {out}" in capsys.readouterr().out
        assert cli.main(["export", f"--run={run}", f"--out={out}", f"--format={kind}"]) == 2
        assert "exists already" in capsys.readouterr().err
    assert answers(place, capsys, f"--run={place / 'model.pth'}") == expected
    init = [("seed", ""), ("hf", str(place / "llama")), ("eva", str(place / "eva.safetensors"))]
    config = f"--config={place / 'cmoe.py'}"
    original = [*init, ("unimed", str(place / "unimed.pth"))]
    assert answers(place, capsys, config, f"--config.init={tuple(original)}") == expected
    # The checkpoint is what makes them so.
    assert cli.main(["predict", config, "--task=qa", "--text=Why?"]) == 2
    assert "config.init gives random numbers for connector/" in capsys.readouterr().err


@pytest.mark.parametrize("devices", [1, 8])
def test_training_goes_on_with_the_moments_of_an_original_checkpoint(
    run, place, tmp_path, monkeypatch, devices
):
    checkpoint = tmp_path / "original.pth"
    assert cli.main(["export", f"--run={run}", f"--out={checkpoint}", "--format=unimed"]) == 0
    there, moments = saved_state(open_run(run))
    mesh = None if devices == 1 else make_mesh(MeshConfig(auto=False, fsdp=4, tensor=2), 4)
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: mesh)
    settings = load_config_file(f"{place}/cmoe.py")
    settings.init = (*settings.init, ("unimed", str(checkpoint)))
    settings.train.moments = "init"
    settings.train.steps = 1
    start = prepare(from_config_dict(settings), tmp_path / "run")
    found = start.state.moments
    for ours, saved in zip(found, moments, strict=True):
        assert ours.keys() == saved.keys() == there.keys()
        for path, leaf in saved.items():
            assert ours[path].dtype == leaf.dtype and ours[path].shape == leaf.shape
            np.testing.assert_array_equal(ours[path], leaf, err_msg=path)
    assert max(int(np.max(count)) for count in found.count.values()) == 12
    if mesh is not None:
        assert any(not leaf.is_fully_replicated for leaf in found.mean.values())
    start.checkpoints.close()


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"init": (("seed", ""),)}, "config.train.moments=.init. needs an original checkpoint"),
        ({"optimizer.skip_unused": False}, "config.optimizer.skip_unused=True"),
        (
            {"train.rules": (dict(match="*", train=True),)},
            r"holds no state of .*; freeze it by config.train.rules",
        ),
    ],
)
def test_moments_that_an_original_checkpoint_cannot_give(run, place, tmp_path, changes, match):
    checkpoint = tmp_path / "original.pth"
    assert cli.main(["export", f"--run={run}", f"--out={checkpoint}", "--format=unimed"]) == 0
    settings = load_config_file(f"{place}/cmoe.py")
    settings.init = (*settings.init, ("unimed", str(checkpoint)))
    settings.train.moments = "init"
    settings.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=match):
        prepare(from_config_dict(settings), tmp_path / "run")


def test_decoder_and_adapter_mean_the_same_in_torch(run, place):
    torch = pytest.importorskip("torch", reason=NEEDS)
    peft = pytest.importorskip("peft", reason=NEEDS)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for kind in ("decoder", "peft"):
        assert cli.main(["export", f"--run={run}", f"--out={place / kind}", f"--format={kind}"]) == 0
    ids = np.random.default_rng(0).integers(4, 640, (2, 24)).astype(np.int32)
    decoder, ones = open_run(run).model.decoder, np.ones_like(ids)
    hidden, *_ = decoder(
        decoder.embed(ids, "float32"), Span(np.tile(np.arange(24, dtype=np.int32), (2, 1)), ones, ones)
    )
    ours = np.asarray(decoder.logits(hidden))

    def logits(model) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(torch.tensor(ids, dtype=torch.long)).logits.numpy()

    named = json.loads((place / "peft" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(place / "llama")
    base = AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32)
    assert np.abs(logits(base) - ours).max() > 0.05  # without the adapters it is another model
    np.testing.assert_allclose(
        logits(peft.PeftModel.from_pretrained(base, str(place / "peft"))), ours, atol=1e-4
    )
    merged = AutoModelForCausalLM.from_pretrained(place / "decoder", dtype=torch.float32)
    np.testing.assert_allclose(logits(merged), ours, atol=1e-4)
    text = "What colour is the square?"
    assert AutoTokenizer.from_pretrained(place / "decoder").encode(
        text, add_special_tokens=False
    ) == list(Tokenizer.load(place / "llama").encode(text))


MISTAKES = {
    "no format": (["export", "--run={run}", "--out={new}"], ["--format"]),
    "unknown format": (["export", "--run={run}", "--out={new}", "--format=onnx"], ["onnx", "decoder"]),
    "no run": (["export", "--run=nowhere", "--out={new}", "--format=model"], ["nowhere"]),
    "both": (
        ["predict", "--run={run}", "--config=x.py", "--task=qa", "--text=x"],
        ["--run", "--config"],
    ),
    "neither": (["predict", "--task=qa", "--text=x"], ["--run", "--config"]),
    "lost base": (
        ["predict", "--config=configs/cmoe.py", "--task=qa", "--text=x"],
        ["'hf'", "'eva'", "tokenizer"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(run, tmp_path, capsys, name):
    arguments, words = MISTAKES[name]
    assert cli.main([word.format(run=run, new=tmp_path / "new") for word in arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and all(word in said for word in words), said
    assert not (tmp_path / "new").exists()
