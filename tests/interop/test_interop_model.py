"""The complete model as a Hugging Face folder: torch answers as we do, asked as evaluation asks."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.exported_model import TOLERANCE, VARIANTS, answers, merged, settings_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch_answers

from unimed_jax.config import TASKS, VISUAL_TASKS
from unimed_jax.data import fitting, images, layout
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.interop.families import unimed_hf
from unimed_jax.interop.families.unimed_hf import (
    portable,
)
from unimed_jax.model.parameters import parameters
from unimed_jax.model.vision import normalise

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("name", VARIANTS)
def test_torch_answers_as_we_do(name, exported, asked, torch, tokenizer_folder):
    """Six tasks in one left-padded batch: tokens, and logits along them.

    Tokens and texts of two alone.
    """
    config, model, folder = exported(name)
    tokenizer = Tokenizer.load(tokenizer_folder)
    ours, theirs = torch_answers.Ours(model, config, tokenizer), torch_answers.Torch(folder)
    records = torch_answers.compare(ours, theirs, *asked)
    for record in records:
        assert record["same"] and record["logits"] < TOLERANCE, record
        assert record["largest"] > 0.5  # of a size at which the tolerance says something
    assert [r["task"] for r in records] == list(TASKS)
    examples, pixels = asked
    together, texts = (
        theirs.tokens(examples, pixels),
        answers(model, config, tokenizer, examples, pixels),
    )
    assert len({tuple(row) for row in together}) > 1
    for i in (0, 5):
        assert theirs.tokens(examples[i : i + 1], pixels[i : i + 1]) == together[i : i + 1]
        shown = Image.fromarray(pixels[i][0]) if pixels[i] else None
        assert (
            theirs.model.answer(theirs.tokenizer, shown, examples[i].task, examples[i].question)
            == texts[i]
        )


@pytest.mark.parametrize("name", ["as published", pytest.param("gemma 2", marks=pytest.mark.slow)])
def test_torch_answers_about_several_images_as_we_do(name, exported, torch, tokenizer_folder):
    """One left-padded batch of no image, one, two and five: tokens, logits, prompts, and their order."""
    config, model, folder = exported(name)
    tokenizer, rng = Tokenizer.load(tokenizer_folder), np.random.default_rng(1)
    ours, theirs = torch_answers.Ours(model, config, tokenizer), torch_answers.Torch(folder)
    pixels = [
        [rng.integers(0, 256, (20 + i, 30, 3)).astype(np.uint8) for i in range(count)]
        for count in (5, 0, 2, 1)
    ]
    examples = [
        Example(f"{len(own)}", task, "Which side?", "", tuple(map(str, range(len(own)))))
        for task, own in zip(("vqa", "qa", "caption", "cls"), pixels, strict=True)
    ]
    for record in torch_answers.compare(ours, theirs, examples, pixels):
        assert record["same"] and record["logits"] < TOLERANCE < record["largest"], record
    encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)
    for example, own in zip(examples, pixels, strict=True):
        ids = theirs.model.prompt_ids(theirs.tokenizer, len(own), example.task, example.question)
        encoded = encoder.prompt(example)
        assert ids == [*encoded.prefix.tolist(), *encoded.suffix.tolist()]
    said = answers(model, config, tokenizer, examples, pixels)
    shown = [Image.fromarray(view) for view in pixels[0]]
    assert theirs.model.answer(theirs.tokenizer, shown, "vqa", "Which side?") == said[0]
    one, there = examples[:1], pixels[0]
    in_order, turned = (theirs.logits(one, [own], [[1]])[0] for own in (there, there[::-1]))
    assert np.abs(turned - in_order).max() > 10 * TOLERANCE


def test_answers_end_within_these_tests(exported, asked, torch):
    """Some rows above end before the others, so that what follows their end is covered."""
    names = ("as published", "phi")
    lengths = {
        len(row) for name in names for row in torch_answers.Torch(exported(name)[2]).tokens(*asked)
    }
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
            encoded = encoder.prompt(
                Example("", task, text, "", images=("",) if task in VISUAL_TASKS else ())
            )
            expected = [*encoded.prefix.tolist(), *encoded.suffix.tolist()]
            assert peer.model.prompt_ids(peer.tokenizer, task in VISUAL_TASKS, task, text) == expected, (
                task,
                text,
            )


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


def test_a_task_without_an_expert_is_refused(exported, torch):
    peer = torch_answers.Torch(exported("avgpool, hard")[2])
    pixels = torch.zeros(1, 3, 16, 16)
    assert peer.model.image_tokens(pixels, "cls").abs().max() > 0
    peer.model.config.unimed["model"]["connector"]["experts"] = 4
    with pytest.raises(ValueError, match="'cls' has no expert in this model"):
        peer.model.image_tokens(pixels, "cls")


def test_pixels_are_those_of_evaluation(exported, torch, tmp_path):
    """Every mode that PNG knows, larger, smaller and equal.

    Also through the description of the image processor.
    """
    config, _, folder = exported("as published")
    from transformers import AutoImageProcessor

    peer, processor = torch_answers.Torch(folder), AutoImageProcessor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    for size in ((40, 23), (7, 9), (16, 16)):
        grey, colour = rng.integers(0, 256, size, np.uint8), rng.integers(0, 256, (*size, 3), np.uint8)
        pictures = {
            mode: Image.fromarray(colour).convert(mode) for mode in ("RGB", "RGBA", "P", "L", "LA", "1")
        }
        for mode in ("RGBA", "LA"):
            pictures[mode].putalpha(Image.fromarray(grey))
        pictures["turned"] = pictures["RGB"].copy()
        pictures["turned"].getexif()[0x0112] = 6  # to be turned by a quarter
        pictures["I;16"] = Image.fromarray(grey.astype(np.uint16) * 16)
        for mode, picture in pictures.items():
            file = tmp_path / "image.png"
            picture.save(file, exif=picture.getexif())
            pixels = fitting.resize(images.read_image(file), 16)
            expected = np.asarray(normalise(jnp.asarray(pixels)[None], config.model.vision, "float32"))[
                0
            ]
            with Image.open(file) as opened:
                actual = peer.model.pixels(opened).numpy().transpose(1, 2, 0)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6, err_msg=mode)
        array = peer.model.pixels(colour).numpy()
        np.testing.assert_array_equal(array, peer.model.pixels(pictures["RGB"]).numpy())
        described = np.asarray(processor(pictures["RGB"])["pixel_values"][0])
        np.testing.assert_allclose(described, array, rtol=0, atol=1e-5)
