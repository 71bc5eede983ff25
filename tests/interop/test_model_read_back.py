"""The exported model read back: what was written to the bit, or one sentence.

And how its user meets it.
"""

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
from support.exported_model import (
    VARIANTS,
    answers,
    merged,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch_answers

from unimed_jax.config import SourceConfig, to_dict
from unimed_jax.data.datasets import reader_of
from unimed_jax.data.info import NO_LICENCE
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families import unimed_hf
from unimed_jax.interop.families.unimed_hf import (
    export_unimed_hf,
    exported_config,
    is_exported,
    load_exported,
    portable,
)
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.settings import from_config_dict
from unimed_jax.verbs import export

pytestmark = pytest.mark.usefixtures("quick_compiles")


def same_bits(a, b) -> None:
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and bool((a[path] == b[path]).all()), path


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


def test_no_folder_of_this_machine_is_written():
    own = "/home/somebody/hospital"
    options = {"images": f"{own}/pictures", "size": 3, "also": [{"more": [f"~/{own}/set"]}]}
    there = dict(name="jsonl", path=f"{own}/set", options=options)
    config = from_config_dict(
        {
            "data": {"root": own, "cache": f"{own}/cache", "sources": (there,)},
            "evaluate": {"sources": (dict(there, id="held_out"),)},
            "text": {"tokenizer": f"{own}/words"},
            "init": (("seed", ""), ("run", f"{own}/run")),
        },
        effects=False,
    )
    said = json.dumps(to_dict(portable(config)))
    assert own in json.dumps(to_dict(config)) and "somebody" not in said
    assert portable(config).evaluate.sources[0].options == {
        "images": "pictures",
        "size": 3,
        "also": ({"more": ("set",)},),
    }


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
    halved = {
        k: v.astype(jnp.bfloat16) for k, v in parameters(model).items() if not k.startswith("connector")
    }
    model = with_parameters(model, halved)
    export_unimed_hf(tmp_path / "out", config, parameters(model), tokenizer_folder)
    same_bits(leaves_of(tmp_path / "out"), parameters(model))
    assert torch_answers.Torch(tmp_path / "out").model.dtype == torch.float32


def test_a_damaged_export_is_one_sentence(exported, tokenizer_folder, tmp_path, monkeypatch):
    config, model, _ = exported("as published")
    monkeypatch.setattr(
        unimed_hf, "write_safetensors", functools.partial(unimed_hf.write_safetensors, limit=20_000)
    )
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
        *(
            "config.json",
            "generation_config.json",
            "preprocessor_config.json",
            "README.md",
            "modeling_unimed.py",
        ),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "unknown" and header["library_name"] == "transformers"
    for words in (
        "not a medical device",
        "decoder: `some-llama`",
        "`slake`: vqa",
        "Not evaluated.",
        "base weights",
    ):
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
                        **{
                            "n": 24,
                            "primary": "exact",
                            "corrected": {"exact": {"value": 0.5, "ci95": [0.25, 0.75]}},
                        },
                        "margin": {"value": 0.125, "ci95": [-0.25, 0.5], "baseline": "majority"},
                        "peer_margin": {"value": -0.5, "ci95": [-0.75, -0.25], "baseline": "tfidf"},
                        "templates": {
                            "plain": {"margin": {"value": 0.5, "ci95": [0.25, 0.75]}},
                            "odd": {"margin": {"value": 0.0, "ci95": [-0.25, 0.25]}},
                        },
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
    score = {"visual_reliance_score": {"value": 0.5, "ci95": [0.25, 0.75]}}
    reliance = {"sets": {"slake": {"vqa": {"scores": score}}}}
    about = metrics, (), None, reliance
    export_unimed_hf(tmp_path / "out", scratch, parameters(model), tokenizer_folder, *about)
    card = (tmp_path / "out" / "README.md").read_text()
    row = "| slake | vqa | 24 | exact | 0.500 [0.250, 0.750] | +0.125 [-0.250, +0.500] (majority) | "
    assert f"{row}undecided |" in card
    assert (
        "- slake, vqa: not shown to be better than the best guess without the image; of its question "
        "templates not shown to be better: odd; tfidf, which reads the same text, answers better; "
        "relies on the image." in card
    )
    assert "- slake, cls: not compared with a guess without the image" in card
    assert "serve --run=FOLDER" in card and "**Not for** diagnosis" in card
    assert "| slake | cls | 3 | exact | 0.500 | - | no verdict |" in card and "config_hash `abc`" in card
    assert "Slices of 642 patients." in card
    assert "trained from random numbers" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["unimed"] == json.loads(
        json.dumps(to_dict(portable(scratch)))
    )


def test_the_card_says_what_the_passports_say(exported, tokenizer_folder, tmp_path):
    """Licences and notes of the training sources: the reader's, the folder's info.json, the
    settings' own.
    """
    config, model, _ = exported("as published")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/info.json").write_text(
        json.dumps({"licence": "CC BY 4.0", "note": "Of one hospital."})
    )
    sources = (
        SourceConfig("brain"),
        SourceConfig("llava", path="mine", tasks=("vqa",)),
        SourceConfig("classes", path="nowhere", info={"note": "Of two scanners."}),
        SourceConfig("no_such_reader"),
    )
    changed = dataclasses.replace(
        config, data=dataclasses.replace(config.data, root=str(tmp_path), sources=sources)
    )
    metrics = {"data": {"brain": {"note": "Scored with care.", "licence": "CC0"}}}
    export_unimed_hf(tmp_path / "out", changed, parameters(model), tokenizer_folder, metrics)
    card = (tmp_path / "out" / "README.md").read_text()
    brain = reader_of("brain").INFO
    assert brain.note and brain.licence != NO_LICENCE
    for words in (
        f"- `brain`: all its tasks ({brain.licence})",
        "- `llava`: vqa (CC BY 4.0)",
        f"- `classes`: all its tasks ({NO_LICENCE})",
        f"- `no_such_reader`: all its tasks ({NO_LICENCE})",
        *(
            brain.note,
            "Of one hospital.",
            "Of two scanners.",
            "Scored with care.",
            "Scored on `brain`: CC0.",
        ),
    ):
        assert words in card, words
    assert str(tmp_path) not in card


def test_the_card_takes_only_reliance_that_belongs_to_the_scores(tmp_path):
    assert export._scores(tmp_path) == (None, None)
    metrics, measured = {"step": 3, "data_checksum": "a"}, {"step": 3, "data_checksum": "a"}
    (tmp_path / "reliance").mkdir()
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    for other in ({}, {"step": 2}, {"data_checksum": "b"}):
        (tmp_path / "reliance" / "reliance.json").write_text(json.dumps(measured | other))
        assert export._scores(tmp_path) == (metrics, None if other else measured)
    assert export._stale(metrics, 3) == export._stale(None, 3) == export._stale({"step": None}, 3) == []
    (note,) = export._stale(metrics, 4)
    assert "after step 3" in note and "step 4" in note
