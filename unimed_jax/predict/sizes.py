"""Chooses how large the engine's two programs are, from the requests that come or from the settings."""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from unimed_jax.config import Config
from unimed_jax.errors import UserError
from unimed_jax.model.attention import hardware
from unimed_jax.model.sharding import rows_multiple
from unimed_jax.predict.request import Prompt, shared_by

PLACES = 16  # lengths are rounded up to multiples, so that few shapes are compiled
ROW = 256  # tokens of a row, unless a prompt needs more
SHARE = 4  # rows are made for one in so many of the slots
MOST_SLOTS = {"cpu": 32}  # a processor's cost grows with every slot, an accelerator's hardly does
CALL = {"cpu": 1024}  # tokens that enter at once
LARGEST_CALL = 4096  # the same on accelerators
ENDLESS = 1 << 30


class Sizes(NamedTuple):
    """Says how large the two programs are."""

    slots: int  # N
    prompt: int  # P: places for the prompt of a slot
    answer: int  # W: tokens of an answer
    rows: int  # R: rows that enter at once
    tokens: int  # S: of a row
    images: int  # of a row
    questions: int  # of a row
    turns: int  # tokens that a slot picks for all requests, one after another, at most


def check_room(prompt: Prompt, what: str, has: int, most: int) -> None:
    """Raises UserError for a prompt that asks for more of something than there is space for."""
    if has > most:
        raise UserError(
            f"request {prompt.name} asks for {has} {what}, and there is space for {most}; ask for less."
        )


def slots_of(batch: int) -> int:
    """Returns how many answers are made at once on these devices where `batch` are wanted."""
    return min(batch, MOST_SLOTS.get(hardware(), batch))


def sizes_for(prompts: Iterable[Prompt], slots: int) -> Sizes:
    """Chooses sizes for requests that are known."""
    known: set[Hashable] = set()  # of what is shared
    count = total = longest = answer = images = new = 0
    with_images = shown = 0  # tokens beside images, and images, what is shared counted once
    for prompt in prompts:
        tokens, own, shared = prompt.encoded.tokens, len(prompt.images), shared_by(prompt)
        count += 1
        new += prompt.most
        longest, answer, images = max(longest, tokens), max(answer, prompt.most), max(images, own)
        more = tokens if shared not in known else tokens - len(prompt.encoded.prefix)
        total += more
        if own:
            with_images += more
            shown += own if shared not in known else 0
        known.add(shared)
    if not count:
        raise ValueError("nothing is announced")

    def images_of(tokens: int) -> int:
        return max(images, round(shown / with_images * tokens)) if shown else 0

    slots = min(slots, 1 << (count - 1).bit_length())
    return _rows(slots, longest, answer, new, total, total / count, images_of)


def sizes_for_any(config: Config, slots: int) -> Sizes:
    """Chooses sizes for whatever the settings allow."""
    longest = config.text.max_prompt
    mean = min(longest, config.model.tokens_per_image + 2 * PLACES)
    answer = config.evaluate.max_new_tokens
    return _rows(slots, longest, answer, ENDLESS, ENDLESS, mean, lambda tokens: max(1, tokens // mean))


def _rows(
    slots: int,
    longest: int,
    answer: int,
    new: int,
    total: int,
    mean: float,
    images_of: Callable[[int], int],
) -> Sizes:
    """Chooses rows: for a share of the slots, as far as the device takes so much at once.

    new: tokens of all answers; total, mean: of all prompts and of one, what they share counted once;
    images_of: gives the images of a row from its tokens.
    """
    slots = slots_of(slots)
    prompt = -(-longest // PLACES) * PLACES
    wanted = min(total, CALL.get(hardware(), LARGEST_CALL), int(mean * max(1, slots // SHARE)))
    tokens = max(prompt, min(ROW, -(-wanted // PLACES) * PLACES))
    multiple = rows_multiple()
    rows = max(1, round(wanted / tokens))
    if slots >= multiple:
        rows = min(-(-rows // multiple) * multiple, slots)
    questions = max(1, min(-(-tokens * 5 // int(4 * mean)), slots // rows))
    return Sizes(slots, prompt, answer, rows, tokens, images_of(tokens), questions, -(-new // slots))
