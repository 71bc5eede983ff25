"""Turns the tokens of an answer into text, whole or piece by piece."""

from collections.abc import Sequence

import numpy as np

from unimed_jax.data.tokenizer import Tokenizer

CUT = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to


def text_of(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> str:
    """Decodes the tokens before the first end of text."""
    row = [int(token) for token in tokens]
    end = row.index(tokenizer.eos) if tokenizer.eos in row else len(row)
    return tokenizer.decode(row[:end]).strip()


class Spoken:
    """Cuts a growing answer into pieces, of which none ends within a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._said = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Returns what more tokens add to the text, which may be nothing yet."""
        self._tokens += tokens
        # white space belongs to the answer only if something follows
        whole = text_of(self._tokenizer, self._tokens).rstrip(CUT).rstrip()
        if not whole.startswith(self._said):
            return ""
        piece, self._said = whole[len(self._said) :], whole
        return piece

    def end(self) -> str:
        """Returns the rest; joined, all pieces are the text of all tokens."""
        return text_of(self._tokenizer, self._tokens)[len(self._said) :]
