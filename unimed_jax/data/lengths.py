"""Keeps the token lengths of examples as a side index.

With it, packing and the check of records need no tokens.

The lengths are computed once for a data set's rows, tokenizer and prompt form, and kept in
`<cache>/lengths`, memory-mapped.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unimed_jax import files
from unimed_jax.config import TextConfig
from unimed_jax.data.example import Example
from unimed_jax.data.forms import form_of
from unimed_jax.data.layout import Encoded, Encoder, RowShape
from unimed_jax.errors import UserError

VERSION = 2  # of the arrays and of how examples become tokens; raise it when either changes
NAMED = 5  # over-long records that a message names
# columns; from _SUFFIX on one for each instruction
_PREFIX, _ANSWER, _CUT, _DROPPED, _SUFFIX = 0, 1, 2, 3, 4
UNUSED = ("max_prompt", "tokenizer", "vocab", "changed")  # settings that no length depends on
_SHORTER = ("config.data.row_answers", "config.data.row_tokens")  # limits that shorter answers keep
_ANY = 1 << 30  # a limit on prompts that none reaches: here they are measured


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Holds the lengths in tokens of N examples under V instructions.

    It also holds what of the examples is not trained on.
    """

    table: np.ndarray  # int32 [N, 4 + V]

    def prefix(self, row: int) -> int:
        """Counts the tokens up to the last visual one, which the questions of an image share."""
        return self.table.item(row, _PREFIX)

    def suffix(self, row: int, variant: int) -> int:
        """Counts the tokens of each example after its prefix, under instruction `variant`."""
        return self.table.item(row, _SUFFIX + variant)

    def answer(self, row: int) -> int:
        """Counts the answer tokens, which the suffix includes."""
        return self.table.item(row, _ANSWER)

    def holds(self, row: int, variant: int, encoded: Encoded) -> bool:
        """Says whether an example that is written in another way fits the lengths measured for it."""
        room = self.suffix(row, variant), self.answer(row)
        return len(encoded.suffix) <= room[0] and encoded.answer <= room[1]

    @property
    def cut(self) -> int:
        """Counts the answers that are cut to `text.max_answer`."""
        return int(self.table[:, _CUT].sum())

    @property
    def dropped(self) -> np.ndarray:
        """Counts the earlier turns of each example that its prompt form leaves out, int [N]."""
        return self.table[:, _DROPPED]


def measure(
    examples: Sequence[Example],
    tokenizer,
    text: TextConfig,
    tokens_per_image: int,
    cache: Path | None,
    key: str,
) -> Lengths:
    """Returns the lengths of `examples`, from `cache` if they were measured before.

    `key` names the data set's state and the examples chosen. Without a cache, or a tokenizer with a
    `fingerprint`, they are measured each time.
    """
    fingerprint = getattr(tokenizer, "fingerprint", "")
    if cache is None or not fingerprint or not key:
        return Lengths(_measured(examples, tokenizer, text, tokens_per_image))
    settings = {k: v for k, v in dataclasses.asdict(text).items() if k not in UNUSED}
    facts = [VERSION, key, len(examples), fingerprint, settings, tokens_per_image]
    name = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]
    path = cache / "lengths" / f"{name}.npy"
    if not path.is_file():
        table = _measured(examples, tokenizer, text, tokens_per_image)
        files.remove_leftovers(path.parent)
        with files.written_whole(path) as unfinished, unfinished.open("wb") as file:
            np.save(file, table)
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"token lengths {path} cannot be read ({error}); delete the file and run again."
        ) from error
    if len(table) != len(examples):
        raise UserError(
            f"token lengths {path} are of {len(table)} of {len(examples)} examples; delete the file."
        )
    return Lengths(table)


def _measured(
    examples: Sequence[Example], tokenizer, text: TextConfig, tokens_per_image: int
) -> np.ndarray:
    encoder = Encoder(tokenizer, dataclasses.replace(text, max_prompt=_ANY), tokens_per_image)
    form = form_of(text)
    rows: list[list[int]] = []
    most = 1
    for example in tqdm(examples, "token lengths", unit=" examples", leave=False, disable=None, delay=2):
        variants = form.variants(example.task)
        encoded = [encoder.training(example, variant) for variant in range(variants)]
        first = encoded[0]
        # A cut answer has lost its end of text.
        targets = first.suffix[first.targets]
        cut = form.cut and first.answer >= text.max_answer and targets[-1] != tokenizer.eos
        dropped = 0 if form.turns else len(example.history)
        rows.append(
            [len(first.prefix), first.answer, int(cut), dropped, *(len(e.suffix) for e in encoded)]
        )
        most = max(most, variants)
    table = np.zeros((len(rows), _SUFFIX + most), np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def limits(
    lengths: Lengths, images: np.ndarray, shape: RowShape, text: TextConfig
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields each setting that limits a record, its value, and what the records need, int [N].

    `images` int [N]: number of images of each.
    """
    table = lengths.table
    tokens = table[:, _PREFIX] + table[:, _SUFFIX:].max(axis=1)
    yield "config.data.row_images", shape.images, images
    yield "config.text.max_prompt", text.max_prompt, tokens - table[:, _ANSWER]
    yield "config.data.row_answers", shape.answers, table[:, _ANSWER]
    yield "config.data.row_tokens", shape.tokens, tokens


def check(
    lengths: Lengths,
    images: np.ndarray,
    examples: Sequence[Example],
    id: str,
    shape: RowShape,
    text: TextConfig,
) -> None:
    """Raises UserError, naming up to five records, if some of them fit no row.

    `images` is as in `limits`.
    """
    for setting, limit, needs in limits(lengths, images, shape, text):
        (over,) = np.nonzero(needs > limit)
        if not len(over):
            continue
        named = ", ".join(f"{id}/{examples[int(i)].id} ({needs[i]})" for i in over[:NAMED])
        more = " ..." if len(over) > NAMED else ""
        hint = " or lower config.text.max_answer" if setting in _SHORTER else ""
        least = int(needs.max())
        raise UserError(
            f"{len(over)} of {len(needs)} training records need more than {setting}={limit}: "
            f"{named}{more}; set {setting}={least}{hint}."
        )
