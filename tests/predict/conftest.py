"""What the tests of this folder share."""

import pytest
from support.fake_brain import Squares

from unimed_jax.data.tokenizer import Tokenizer, corpus, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(config, tmp_path_factory):
    """A tokenizer trained on the squares, for the module's own `config`."""
    folder = tmp_path_factory.mktemp("tokenizer") / "it"
    train_tokenizer(corpus(Squares().examples("train"), config.text), config.text, folder)
    return Tokenizer.load(folder)
