"""A tokenizer whose ids have gaps needs a row for its highest id: refused before training, and in
every export.
"""

import dataclasses
import json

import pytest
from support import tiny

from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.targets import TARGETS, Content
from unimed_jax.model.parameters import parameters
from unimed_jax.runs.open import initial_model
from unimed_jax.settings import from_config_dict


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """407 tokens, of which the last has the id 5,000."""
    folder = tmp_path_factory.mktemp("gaps")
    ids = {
        word: i for i, word in enumerate(("<s>", "</s>", "<unk>", *(f"w{i}" for i in range(403))))
    } | {"last": 5000}
    assert len(ids) == 407
    model = {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"}
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    given = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder


def config_of(vocab: int):
    model = tiny.config(decoder={"vocab": vocab}, lora={"rank": 0})
    return dataclasses.replace(from_config_dict({}), model=model)


def test_before_training(tokenizer):
    words = Tokenizer.load(tokenizer)
    for vocab in (407, 512, 5000):
        with pytest.raises(UserError, match=f"decoder.vocab={vocab} is less than the 5001 rows"):
            initial_model(config_of(vocab), words)


@pytest.mark.parametrize("kind", ["model", "decoder", "med_moe"])
def test_in_exports(kind, tokenizer, tmp_path):
    config = config_of(512)
    content = Content(config, parameters(tiny.model(config.model)), tokenizer)
    with pytest.raises(UserError, match="decoder.vocab=512 is less than the 5001 rows"):
        TARGETS[kind].write(tmp_path / "out", content)
    assert not (tmp_path / "out").exists()
