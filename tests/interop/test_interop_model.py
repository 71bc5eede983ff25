"""The complete model as a Hugging Face folder: torch answers as we do, and what is read back is what was written."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from support import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch_answers

from unimed_jax.config import TASKS, VISUAL_TASKS, Config, SourceConfig, TextConfig, to_dict
from unimed_jax.data import images, layout
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer, train_tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families import unimed_hf
from unimed_jax.interop.families.unimed_hf import (
    export_unimed_hf,
    exported_config,
    is_exported,
    load_exported,
    merged_leaves,
    portable,
)
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.model.vision import normalise
from unimed_jax.predict.predictor import Predictor, Request
from unimed_jax.settings import from_config_dict

pytestmark = pytest.mark.usefixtures("quick_compiles")

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
TEXTS = ["[INST] <Img></Img> [vqa] Is the left thalamus seen? [/INST]", "{<12><3><40><99>}", "a report of 12 words"] * 5
VOCAB, EOS = 480, 1
TOLERANCE = 1e-4

# What differs from tiny.CONFIG, which has a class token, biases on q and v, strips, a soft router on both tokens, LoRA.
VARIANTS = {
    "as published": {},
    "block, sparse on the visual token, as CLIP, tied": {
        "vision": {
            **{"cls_token": False, "qkv_bias": "qkv", "pre_norm": True, "feature_layer": -2, "depth": 3},
            **{"output_norm": False, "patch_bias": False, "activation": "quick_gelu"},
        },
        "connector": {"aggregation": "block", "kind": "moe_linear", "router": "sparse", "router_input": "token"},
        "decoder": {"tied_head": True},
    },
    "avgpool, hard": {
        "vision": {"qkv_bias": "none", "activation": "gelu_tanh"},
        "connector": {"aggregation": "avgpool", "router": "hard", "activation": "silu", "experts": 4},
        "decoder": {"attention_bias": ("q", "k", "v"), "kv_heads": 4, "head_dim": 4},
    },
    "maxpool, soft on a narrow task token": {
        "vision": {"activation": "silu"},
        "connector": {"aggregation": "maxpool", "router_input": "task", "task_token_width": 6, "router_hidden": None},
        "decoder": {"windows": (9,)},
    },
    "constant": {"connector": {"router": "constant", "kind": "moe_linear"}, "lora": {"rank": 0}},
    "linear": {"connector": {"kind": "linear", "task_tokens": 0, "rate": 1}},
    "mlp": {"connector": {"kind": "mlp3x_gelu", "activation": "gelu_tanh"}},
    "gemma 2": {
        "decoder": {
            **{"norm": "rms_zero", "scaled_embedding": True, "tied_head": True, "post_norms": True, "windows": (9, 0)},
            **{"activation": "gelu_tanh", "query_scale": 0.25, "attention_softcap": 2.0, "logit_softcap": 5.0},
        }
    },
    "phi": {
        "decoder": {
            **{"norm": "layer", "parallel_block": True, "gated_mlp": False, "activation": "gelu_tanh", "kv_heads": 4},
            **{"attention_bias": ("q", "k", "v", "o"), "mlp_bias": True, "head_bias": True, "rotary_fraction": 0.5},
            **{"head_dim": 4},
        },
        "lora": {"targets": ("q", "v")},
    },
}
QUESTIONS = {
    "vqa": "Is the  left\tthalamus seen?",
    "refer": "left thalamus",
    "identify": "{<12><3><40><99>}",
    "caption": "",
    "cls": "",
    "qa": "What is 1 plus </s> 1?",
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=NEEDS)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, TextConfig(vocab=VOCAB), folder)
    return folder


def settings_of(model, **text) -> Config:
    base = from_config_dict({})
    return dataclasses.replace(
        base,
        name="tiny",
        model=model,
        text=dataclasses.replace(base.text, **{"max_prompt": 128, "tokenizer": "/secret/folder/tokens", **text}),
        data=dataclasses.replace(
            base.data, root="/secret", sources=(SourceConfig("slake", path="/secret/slake", tasks=("vqa",)),)
        ),
        init=(("seed", ""), ("hf", "/secret/folder/some-llama")),
        evaluate=dataclasses.replace(base.evaluate, max_new_tokens=8, batch=8),
    )


def random_model(settings):
    """A model that sometimes ends its answers."""
    model = tiny.model(settings)
    leaf = "embedding" if settings.decoder.tied_head else "head"
    values = parameters(model)[f"decoder/{leaf}"]
    place = (EOS, slice(None)) if leaf == "embedding" else (slice(None), EOS)
    return with_parameters(model, {f"decoder/{leaf}": values.at[place].multiply(2.5)})


@pytest.fixture(scope="module")
def exported(tokenizer_folder, tmp_path_factory):
    """variant -> (config, model, folder), made once."""

    @functools.cache
    def make(name):
        parts = {part: dict(fields) for part, fields in VARIANTS[name].items()}
        parts.setdefault("decoder", {})["vocab"] = VOCAB
        config = settings_of(tiny.config(**parts))
        model = random_model(config.model)
        folder = tmp_path_factory.mktemp("exported") / re.sub(r"\W+", "_", name)
        export_unimed_hf(folder, config, parameters(model), tokenizer_folder)
        return config, model, folder

    return make


@pytest.fixture(scope="module")
def asked():
    """An example of each task; images of several sizes, one of them the model's own."""
    rng = np.random.default_rng(0)
    examples, pixels = [], []
    for i, (task, question) in enumerate(QUESTIONS.items()):
        visual = task in VISUAL_TASKS
        examples.append(Example(task, task, question, "", images=(task,) if visual else ()))
        size = (16, 16) if i == 2 else (20 + i, 40 - 3 * i)
        pixels.append([rng.integers(0, 256, (*size, 3)).astype(np.uint8)] if visual else [])
    return examples, pixels


def answers(model, config, tokenizer, examples, pixels) -> list[str]:
    requests = [Request(e.task, e.question, tuple(own)) for e, own in zip(examples, pixels, strict=True)]
    return Predictor(model, config, tokenizer).answers(requests)


@pytest.mark.parametrize("name", VARIANTS)
def test_torch_answers_as_we_do(name, exported, asked, torch, tokenizer_folder):
    """Six tasks in one left-padded batch: tokens, and logits along them; tokens and texts of two alone."""
    config, model, folder = exported(name)
    tokenizer = Tokenizer.load(tokenizer_folder)
    ours, theirs = torch_answers.Ours(model, config, tokenizer), torch_answers.Torch(folder)
    records = torch_answers.compare(ours, theirs, *asked)
    for record in records:
        assert record["same"] and record["logits"] < TOLERANCE, record
        assert record["largest"] > 0.5  # of a size at which the tolerance says something
    assert [r["task"] for r in records] == list(TASKS)
    examples, pixels = asked
    together, texts = theirs.tokens(examples, pixels), answers(model, config, tokenizer, examples, pixels)
    assert len({tuple(row) for row in together}) > 1
    for i in (0, 5):
        assert theirs.tokens(examples[i : i + 1], pixels[i : i + 1]) == together[i : i + 1]
        shown = Image.fromarray(pixels[i][0]) if pixels[i] else None
        assert theirs.model.answer(theirs.tokenizer, shown, examples[i].task, examples[i].question) == texts[i]


def test_answers_end_within_these_tests(exported, asked, torch):
    """Some rows above end before the others, so that what stands behind their end is covered."""
    names = ("as published", "phi")
    lengths = {len(row) for name in names for row in torch_answers.Torch(exported(name)[2]).tokens(*asked)}
    assert 8 in lengths and min(lengths) < 8


def test_adapters_and_tasks_matter(exported, asked, torch):
    """The comparison above would see a missing adapter, and a task token of another task."""
    config, model, folder = exported("as published")
    peer = torch_answers.Torch(folder)
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32))
    with torch.no_grad():
        tokens = [peer.model.image_tokens(image, task) for task in VISUAL_TASKS]
    assert all((tokens[0] - other).abs().max() > 100 * TOLERANCE for other in tokens[1:])
    folded, plain = merged(model), parameters(model)
    assert not any("lora" in path for path in folded)
    path = "decoder/layers/attention/q/kernel"
    assert np.abs(folded[path] - plain[path]).max() > 100 * TOLERANCE


# --------------------------------------------------------------------------------------------------
# Prompts and pixels
# --------------------------------------------------------------------------------------------------

ODD = [
    "",
    " ",
    "  a  b\n\n",
    "one\n",
    "tab\t",
    "\nx",
    "{question}",
    "</s> <pad> <Img> [INST]",
    "w " * 30,
    "é \u00a0 日本",
]
RULES = {
    "default": {},
    "paper": {"max_words": 5, "double_bos": True, "training_blank": True},
    "without template": {"chat_template": False},
    "without template, cut": {"chat_template": False, "max_words": 3},
}


@pytest.mark.parametrize("rules", RULES)
def test_prompts_are_those_of_evaluation(rules, exported, torch, tokenizer_folder):
    config, _, folder = exported("as published")
    config = settings_of(config.model, **RULES[rules])
    peer, tokenizer = torch_answers.Torch(folder), Tokenizer.load(tokenizer_folder)
    stored = unimed_hf.published_shapes(
        unimed_hf.exported_table(portable(config).model), merged(exported("as published")[1])
    )
    peer.model.config = type(peer.model.config)(**unimed_hf.hub_config(config, tokenizer, stored))
    encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)
    for task in TASKS:
        for text in ODD:
            encoded = encoder.prompt(Example("", task, text, "", images=("",) if task in VISUAL_TASKS else ()))
            expected = [*encoded.prefix.tolist(), *encoded.suffix.tolist()]
            assert peer.model.prompt_ids(peer.tokenizer, task in VISUAL_TASKS, task, text) == expected, (task, text)


def test_what_cannot_be_asked(exported, torch):
    peer = torch_answers.Torch(exported("as published")[2])
    image = Image.new("RGB", (9, 9))
    for arguments, match in (
        ((image, "vqqa", "x"), "is not a task"),
        ((None, "vqa", "x"), "needs an image"),
        ((image, "qa", "x"), "text only"),
        ((image, "vqa", "x " * 200), "shorten the text"),
    ):
        with pytest.raises(ValueError, match=match):
            peer.model.answer(peer.tokenizer, *arguments)
    places = torch.full((1, 3), peer.model.config.image_token_id)
    pixels = torch.zeros(1, 3, 16, 16)
    for words, match in (
        ({}, "no pixel_values"),
        ({"pixel_values": pixels, "task": "vqa"}, "3 places of visual tokens, but 1 images make 4"),
        ({"pixel_values": pixels, "task": "qa"}, "not a task with an image"),
        ({"pixel_values": pixels, "task": ["vqa", "cls"]}, "as many tasks"),
    ):
        with pytest.raises(ValueError, match=match):
            peer.model(places, **words)


def test_pixels_are_those_of_evaluation(exported, torch, tmp_path):
    """Every mode that PNG knows, larger, smaller and equal; also through the description of the image processor."""
    config, _, folder = exported("as published")
    from transformers import AutoImageProcessor

    peer, processor = torch_answers.Torch(folder), AutoImageProcessor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    for size in ((40, 23), (7, 9), (16, 16)):
        grey, colour = rng.integers(0, 256, size, np.uint8), rng.integers(0, 256, (*size, 3), np.uint8)
        pictures = {mode: Image.fromarray(colour).convert(mode) for mode in ("RGB", "RGBA", "P", "L", "LA", "1")}
        pictures["I;16"] = Image.fromarray(grey.astype(np.uint16) * 16)
        for mode, picture in pictures.items():
            file = tmp_path / "image.png"
            picture.save(file)
            pixels = images.resize(images.read_image(file), 16)
            expected = np.asarray(normalise(jnp.asarray(pixels)[None], config.model.vision, "float32"))[0]
            with Image.open(file) as opened:
                actual = peer.model.pixels(opened).numpy().transpose(1, 2, 0)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6, err_msg=mode)
        array = peer.model.pixels(colour).numpy()
        np.testing.assert_array_equal(array, peer.model.pixels(pictures["RGB"]).numpy())
        described = np.asarray(processor(pictures["RGB"])["pixel_values"][0])
        np.testing.assert_allclose(described, array, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Back again
# --------------------------------------------------------------------------------------------------


def same_bits(a, b) -> None:
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and bool((a[path] == b[path]).all()), path


def merged(model):
    """The leaves of a model, adapters folded in."""
    return {path: np.asarray(leaf) for path, leaf in merged_leaves(model.config, parameters(model)).items()}


def leaves_of(folder):
    """All leaves of an exported folder."""
    model = exported_config(folder).model
    return load_exported(folder, model, Destination(parameters(abstract(model))))


@pytest.mark.parametrize("name", VARIANTS)
def test_read_back_to_the_bit(name, exported):
    config, model, folder = exported(name)
    assert is_exported(folder)
    again = exported_config(folder)
    leaves = leaves_of(folder)
    same_bits(leaves, merged(model))
    assert leaves.keys() == parameters(abstract(again.model)).keys()
    assert again.text.tokenizer == str(folder)
    assert again.model == from_config_dict(to_dict(portable(config))).model
    Tokenizer.load(folder)


def test_what_is_read_back_answers_the_same(exported, asked, tokenizer_folder):
    """The merged model, opened as `run.open_run` does, gives the texts of the one with adapters."""
    config, model, folder = exported("as published")
    again = exported_config(folder)
    opened = with_parameters(abstract(again.model), leaves_of(folder))
    texts = answers(opened, again, Tokenizer.load(folder), *asked)
    assert texts == answers(model, config, Tokenizer.load(tokenizer_folder), *asked)


def test_saved_again_by_transformers(exported, torch, tmp_path):
    """What a user saves after loading, fine-tuned or not, is read back too."""
    _, model, folder = exported("block, sparse on the visual token, as CLIP, tied")
    peer = torch_answers.Torch(folder)
    peer.model.save_pretrained(tmp_path / "again")
    same_bits(leaves_of(tmp_path / "again"), merged(model))


def test_dtypes_are_kept(exported, tokenizer_folder, tmp_path, torch):
    """Frozen leaves in bfloat16 beside others in float32."""
    config, model, _ = exported("constant")
    halved = {k: v.astype(jnp.bfloat16) for k, v in parameters(model).items() if not k.startswith("connector")}
    model = with_parameters(model, halved)
    export_unimed_hf(tmp_path / "out", config, parameters(model), tokenizer_folder)
    same_bits(leaves_of(tmp_path / "out"), parameters(model))
    assert torch_answers.Torch(tmp_path / "out").model.dtype == torch.float32


def test_a_damaged_export_is_one_sentence(exported, tokenizer_folder, tmp_path, monkeypatch):
    config, model, _ = exported("as published")
    monkeypatch.setattr(unimed_hf, "write_safetensors", functools.partial(unimed_hf.write_safetensors, limit=20_000))
    out = tmp_path / "out"
    export_unimed_hf(out, config, parameters(model), tokenizer_folder)
    index = out / "model.safetensors.index.json"
    files = sorted({*json.loads(index.read_text())["weight_map"].values()})
    assert len(files) > 2
    same_bits(leaves_of(out), merged(model))

    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            leaves_of(out)
        assert "\n" not in str(error.value) and str(error.value)[-1] in ".?"

    with pytest.raises(UserError, match="exists already"):
        export_unimed_hf(out, config, parameters(model), tokenizer_folder)
    whole = (out / files[1]).read_bytes()
    (out / files[1]).unlink()
    refused(f"names the file '{files[1]}', which is not next to it")
    (out / files[1]).write_bytes(whole[:-7])
    refused(f"{files[1]} is damaged")
    (out / files[1]).write_bytes(whole)

    tensors = {name: value for file in files for name, value in load_file(out / file).items()}
    for file in (*files, index.name):
        (out / file).unlink()
    name = "connector.moe_layers.1.0.weight"
    nan = tensors[name].copy()
    nan[2, 3] = np.nan
    for change, match in (
        ({name: tensors[name].T}, rf"{name} is of shape \[48, 10\] in place of \[10, 48\]"),
        ({name: nan}, f"{name} holds NaN"),
        ({name: None}, f"{name} is missing"),
        ({"extra": nan}, "extra is not known"),
    ):
        changed = {k: np.ascontiguousarray(v) for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, out / "model.safetensors")
        refused(match)
    save_file(tensors, out / "model.safetensors")

    description = json.loads((out / "config.json").read_text())
    connector = description["unimed"]["model"]["connector"]
    for changed, match in (
        ("{", "is not JSON"),
        ("[]", "another kind of model"),
        (json.dumps({"model_type": "llama"}), "another kind of model"),
        (json.dumps(description).replace('"rate": 4', '"rate": 5'), "rate=5 does not divide"),
        (json.dumps(description).replace('"rate": 4', '"rats": 4'), "rats is not a setting"),
    ):
        assert connector["rate"] == 4
        (out / "config.json").write_text(changed)
        refused(match)
    assert not is_exported(out / "nowhere")
    (out / "config.json").unlink()
    refused("no config.json")


def test_nothing_is_left_of_a_failed_export(exported, tokenizer_folder, tmp_path):
    config, model, _ = exported("as published")
    odd = dataclasses.replace(config.model.decoder, logit_softcap=3.0)
    with pytest.raises(UserError, match="no Hugging Face decoder"):
        export_unimed_hf(
            tmp_path / "out",
            dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=odd)),
            parameters(model),
            tokenizer_folder,
        )
    assert list(tmp_path.iterdir()) == []


def test_code_in_the_folder_is_not_run_by_us(exported, tokenizer_folder, tmp_path):
    config, model, _ = exported("linear")
    out = tmp_path / "out"
    export_unimed_hf(out, config, parameters(model), tokenizer_folder)
    (out / "modeling_unimed.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    leaves_of(out)
    Tokenizer.load(out)
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------
# The folder as a user meets it
# --------------------------------------------------------------------------------------------------


def test_the_snippet_of_the_card_in_a_fresh_process(exported, tokenizer_folder, asked, torch, tmp_path):
    """No network, nobody to answer questions, and neither jax nor this package loaded."""
    config, model, folder = exported("as published")
    examples, pixels = asked
    Image.fromarray(pixels[0][0]).save(tmp_path / "image.png")
    card = (folder / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    snippet = snippet.replace("path/of/this/folder", str(folder))
    snippet += "import sys\nassert not {'jax', 'flax', 'unimed_jax'} & set(sys.modules)\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    example = dataclasses.replace(examples[0], question="Which plane is this?")
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert done.stdout == answers(model, config, tokenizer, [example], pixels[:1])[0] + "\n"


def test_the_card(exported, tokenizer_folder, tmp_path):
    yaml = pytest.importorskip("yaml")
    config, model, folder = exported("as published")
    files = {path.name for path in folder.iterdir()}
    assert files == {
        *("config.json", "generation_config.json", "preprocessor_config.json", "README.md", "modeling_unimed.py"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "unknown" and header["library_name"] == "transformers"
    for words in ("not a medical device", "decoder: `some-llama`", "`slake`: vqa", "Not evaluated.", "base weights"):
        assert words in card
    for path in folder.iterdir():
        assert b"/secret" not in path.read_bytes(), path.name  # no folder of this machine leaves it
    metrics = {
        "split": "test",
        "config_hash": "abc",
        "data": {"slake": {"note": "Slices of 642 patients.", "licence": ""}},
        "sets": {
            "slake": {
                "test": {
                    "vqa": {
                        **{"n": 24, "primary": "exact", "corrected": {"exact": {"value": 0.5, "ci95": [0.25, 0.75]}}},
                        "margin": {"value": 0.125, "ci95": [-0.25, 0.5], "baseline": "majority"},
                    },
                    "cls": {
                        "n": 3,
                        "primary": "exact",
                        "corrected": {"exact": {"value": 0.5, "ci95": None}},
                        "margin": None,
                    },
                }
            }
        },
    }
    scratch = dataclasses.replace(config, init=(("seed", ""),))
    export_unimed_hf(tmp_path / "out", scratch, parameters(model), tokenizer_folder, metrics)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| slake | vqa | 24 | exact | 0.500 [0.250, 0.750] | +0.125 [-0.250, +0.500] (majority) |" in card
    assert "| slake | cls | 3 | exact | 0.500 | - |" in card and "config_hash `abc`" in card
    assert "Slices of 642 patients." in card
    assert "trained from random numbers" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["unimed"] == json.loads(
        json.dumps(to_dict(portable(scratch)))
    )
