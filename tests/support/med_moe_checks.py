"""Checks Med-MoE's golden cases that need no model: scores, prompts, images, router files."""

import hashlib
import json
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import golden_med_moe as golden_files

from unimed_jax.config import TextConfig
from unimed_jax.data import fitting, forms, layout
from unimed_jax.evaluate.metrics import published
from unimed_jax.interop.families import med_moe
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.vision import normalise


def close(actual, expected, what, atol=2e-5, rtol=1e-4):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol, err_msg=what)


def check_eval_metrics(folder, entry):
    data = json.loads((folder / entry["file"]).read_text())
    for item in data["items"]:
        pair = item["pred"].lower(), item["gt"].lower()
        scores = published.medmoe_scores(item["pred"], item["gt"])
        assert published.medmoe_kind(item["answer_type"]) == item["counted"], pair
        # The original scores no item that it ignores, so a file may leave those scores out.
        listed = [name for name in scores if item["counted"] != "ignored" or item.get(name) is not None]
        expected = {name: pytest.approx(float(item[name]), rel=1e-12, abs=0) for name in listed}
        assert {name: scores[name] for name in listed} == expected, pair
        assert tuple(map(published.normalise_answer, pair)) == (item["norm_pred"], item["norm_gt"])
    pairs = [(item["pred"], item["gt"]) for item in data["items"]]
    report = published.medmoe_report(pairs, [item["answer_type"] for item in data["items"]])
    assert report == {name: pytest.approx(value, rel=1e-12) for name, value in data["aggregate"].items()}
    assert [float(f"{value:.6g}") for value in report.values()] == list(data["table"].values())
    wrong = [
        i
        for i in data["items"]
        if i["counted"] == "closed" and not published.medmoe_scores(i["pred"], i["gt"])["contains"]
    ]
    said = [(w["correct_answer"], w["predicted_answer"]) for w in data["wrong_answers"]]
    assert [(i["gt"].lower(), i["pred"].lower()) for i in wrong] == said


def check_prompts(folder, entry):
    data = json.loads((folder / entry["file"]).read_text())
    pattern, eos, image = re.compile(data["pattern"]), 0, data["image_token_index"]

    def tokenise(text):
        return [zlib.crc32(piece.encode()) % 50000 + 10 for piece in pattern.findall(text)]

    assert data["cases"]
    for case in data["cases"]:
        what = f"{case['version']}, {case['name']}"
        form = forms.form_of(TextConfig(form=case["version"]))
        turns = forms.turns_of(case["conversations"])
        pieces = form.prompt_turns([], turns[0][0])
        assert forms.text_of(pieces, data["eos_token"]) == case["eval_prompt"], what
        assert layout.piece_ids(pieces, tokenise, eos, [image])[0] == case["eval_input_ids"], what
        if "train_input_ids" in case:
            ids, targets = layout.piece_ids(form.training_turns(turns), tokenise, eos, [image])
            assert ids == case["train_input_ids"], what
            labels = [
                i if target else data["ignore_index"] for i, target in zip(ids, targets, strict=True)
            ]
            assert labels == case["train_labels"], what


def check_image_preprocess(folder, entry):
    arrays, settings = load_file(folder / entry["file"]), entry["processor"]
    assert settings["shortest_edge"] == settings["crop"] and settings["resample"] == "bicubic"
    vision = golden_files.VisionConfig(
        image_size=settings["crop"], mean=tuple(settings["mean"]), std=tuple(settings["std"])
    )
    stored = {key.split(".")[0]: value for key, value in arrays.items() if key.endswith(".image_u8")}
    assert stored and len(arrays) == 4 * len(stored)
    for key, image in stored.items():
        square = fitting.pad_square(image, tuple(settings["pad_fill"]))
        np.testing.assert_array_equal(square, arrays[f"{key}.pad_square_u8"])
        for how, name in (("pad", "pixels_pad"), ("crop", "pixels_nopad")):
            pixels = normalise(jnp.asarray(fitting.fit(image, how, vision)), vision, "float32")
            close(
                np.asarray(pixels).transpose(2, 0, 1),
                arrays[f"{key}.{name}"],
                f"{key}.{name}",
                atol=1e-5,
                rtol=0,
            )


def check_router_import(folder, entry):
    """Reads the published files in data/med_moe of a folder above, or made-up ones that fit."""
    for file in json.loads((folder / entry["file"]).read_text()).values():
        check_router(folder, file)


def check_router(folder, file):
    (experts, width), name = file["keys"]["fc1.weight"][0], file["file"]
    decoder = golden_files.DecoderConfig(
        **{"vocab": 2, "heads": 1, "kv_heads": 1, "head_dim": 2, "mlp_width": 1, "depth": 4}, width=width
    )
    config = golden_files.ModelConfig(decoder=decoder, moe=golden_files.MoeConfig(experts=experts))
    leaves = parameters(golden_files.abstract(config))
    found = [parent / "data" / "med_moe" / name for parent in folder.resolve().parents]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        weight = np.zeros((experts, width), np.float32)
        weight[0, :4], weight[3, -2:] = file["first4_row0"], file["last2_row3"]
        tensors = {"fc1.weight": weight, "fc1.bias": np.array(file["bias"], np.float32)}
        loaded = golden_files.to_leaves(med_moe.router_table(config), tensors, leaves)
    else:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file["file_sha256"]
        loaded = med_moe.load_router(path, config, Destination(leaves))
    kernel, bias = (
        np.asarray(loaded[f"decoder/layers/moe/router/{part}"]) for part in ("kernel", "bias")
    )
    assert kernel.shape == (2, width, experts) and bias.shape == (2, experts)
    for layer in range(2):
        close(bias[layer], file["bias"], "bias", atol=0, rtol=1e-7)
        close(kernel[layer, :4, 0], file["first4_row0"], "row 0", atol=0, rtol=1e-7)
        close(kernel[layer, -2:, 3], file["last2_row3"], "row 3", atol=0, rtol=1e-7)
    if path is not None:
        assert (
            hashlib.sha256(np.ascontiguousarray(kernel[0].T).tobytes()).hexdigest()
            == file["weight_tensor_sha256"]
        )
        moe = jax.tree.map(
            lambda leaf: leaf[1],
            with_parameters(golden_files.abstract(config), loaded).decoder.layers.moe.router,
        )
        x = np.sin(0.1 * np.arange(1, width + 1))[None].astype(np.float32)
        logits = moe(jnp.asarray(x))[0]
        close(logits, file["golden"]["logits"], "logits")
        close(jax.nn.softmax(logits), file["golden"]["softmax"], "probabilities")
