"""Turns the tokens of an answer into text, whole or piece by piece."""

from collections.abc import Sequence

import numpy as np

from unimed_jax.data.tokenizer import Tokenizer

CUT = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to
RARE = "\U000f0000"  # a character that no vocabulary has, and of four bytes


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
        self._certain = 0  # tokens whose text no later one changes
        # LLaMA's tokenizer reads the tokens of bytes that follow one another together: as characters, or
        # each of them as CUT if one fits none.
        self._bytes = tokenizer.encode(RARE)[-4:]
        self._rare = tokenizer.decode(self._bytes)
        self._together = not tokenizer.decode([*self._bytes, *self._bytes[:1]]).startswith(self._rare)

    def add(self, tokens: Sequence[int]) -> str:
        """Returns what more tokens add to the text, which may be nothing yet."""
        self._tokens += tokens
        for after, token in enumerate(reversed(tokens)):
            if not (self._together and self._is_byte(token)):
                self._certain = len(self._tokens) - after
                break
        # white space belongs to the answer only if something follows
        whole = text_of(self._tokenizer, self._tokens[: self._certain]).rstrip(CUT).rstrip()
        if not whole.startswith(self._said):
            return ""
        piece, self._said = whole[len(self._said) :], whole
        return piece

    def _is_byte(self, token: int) -> bool:
        """Says whether bytes before and after a token are read together; it is one, or leaves no text.

        A character and the first byte of another are no text, whatever byte stands between them.
        """
        between = [*self._bytes, token, *self._bytes[:1]]
        return not self._tokenizer.decode(between).startswith(self._rare)

    def end(self) -> str:
        """Returns the rest; joined, all pieces are the text of all tokens."""
        return text_of(self._tokenizer, self._tokens)[len(self._said) :]
