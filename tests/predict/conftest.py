"""What the tests of this folder share."""

import pytest
from support import tiny
from support.fake_brain import Squares

from unimed_jax.data.tokenizer import Tokenizer, corpus, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(config, tmp_path_factory):
    """A tokenizer trained on the squares, for the module's own `config`."""
    folder = tmp_path_factory.mktemp("tokenizer") / "it"
    train_tokenizer(corpus(Squares().examples("train"), config.text), config.text, folder)
    return Tokenizer.load(folder)


class Bytes:
    """A tokenizer for `support.tiny` models: bytes are ids, and an answer is the list of its ids."""

    bos, eos, pad = tiny.BOS, tiny.EOS, tiny.PAD

    def encode(self, text):
        return [40 + byte % 70 for byte in text.encode()]

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids)


@pytest.fixture
def byte_ids():
    return Bytes()
