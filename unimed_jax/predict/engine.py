"""Answers requests as they come: each takes a slot, and the next one enters when an answer has ended.

Questions about the same images, and texts with the same beginning, enter together: what they share is
run once. Two programs are compiled, whatever is asked (model/slots.py); their sizes follow from the
requests that are announced, or from the settings.

A prompt enters whole: rows are as long as the longest prompt. Cutting it over several calls would
need a third program, in which a row attends to a slot, and `config.text.max_prompt` bounds prompts.
"""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unimed_jax.config import Config
from unimed_jax.data import layout, packing
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.memory import answering_bytes, check_answering, spare_for
from unimed_jax.model import decoding
from unimed_jax.model import slots as programs
from unimed_jax.model.sharding import inside
from unimed_jax.model.unimed import UniMed
from unimed_jax.predict.request import Picture, Prompt, Prompts, Request, at_least_one, shared_by
from unimed_jax.predict.sizes import ENDLESS, Sizes, check_room, sizes_for, sizes_for_any
from unimed_jax.predict.text import Spoken, text_of


class Piece(NamedTuple):
    """Holds what is new of one answer."""

    number: int  # what `Engine.submit` returned
    text: str  # never ends within a character
    tokens: int  # of the answer so far
    ended: bool
    stopped: bool = False  # ended by an end of text, and not by its length


class _Asked:
    """Holds a request on its way: waiting, in a slot, or given up."""

    def __init__(
        self, number: int, key: Hashable, prompt: Prompt, pixels: tuple[np.ndarray, ...] | None
    ):
        self.number, self.key, self.prompt, self.pixels = number, key, prompt, pixels
        self.tokens: list[int] = []
        self.spoken: Spoken | None = None
        self.given_up = False


class _Part(NamedTuple):
    """Names questions that enter in one row, with what they share."""

    asked: Sequence[_Asked]
    questions: tuple[layout.Encoded, ...]

    @property
    def size(self) -> tuple[int, int, int]:
        """Counts tokens, images and questions, as `packing.first_fit` takes them."""
        first = self.questions[0]
        tokens = len(first.prefix) + sum(len(question.suffix) for question in self.questions)
        return tokens, len(self.asked[0].prompt.images), len(self.questions)


class _Plan(NamedTuple):
    """Says what enters next."""

    rows: list[list[_Part]]
    needed: int  # slots


_Placed = list[list[tuple[_Part, list[int]]]]  # the parts of each row, with the slots of their questions


class Engine:
    """Answers requests with one model, many at once.

    All processes make the same calls and get the same texts. `submit` and `cancel` may be called while
    another thread is in `step`.
    """

    def __init__(
        self,
        model: UniMed,
        config: Config,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        announced: Iterable[Request] | None = None,
        slots: int | None = None,
    ):
        """Takes the requests that will come, which decide the sizes; None: any that the settings allow.

        mesh: over which the model lies, unless all calls are made inside `run.inside()`; slots: how
        many answers are made at once at most (default: `config.evaluate.batch`). The layers of a large
        model get arrays of their own, if that is worth it (model/decoding.py) and memory holds both.
        Raises UserError for an announced request that cannot be asked, and if memory cannot hold the
        answers.
        """
        self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
        # What comes unannounced comes from others: nothing of it is kept, and nobody waits for ever.
        self._from_others = announced is None
        self._prompts = Prompts(config, tokenizer, keeps=not self._from_others)
        slots = at_least_one("slots", config.evaluate.batch if slots is None else slots)
        with inside(mesh):
            if announced is None:
                self.sizes = sizes_for_any(config, slots)
            else:
                self.sizes = sizes_for(map(self._prompts, announced), slots)
            s = self.sizes
            entering = s.rows * (s.tokens + s.questions * s.prompt)
            needs = (config.model, model, s.slots, s.prompt + s.answer, entering)
            check_answering(*needs)
            worth = decoding.wants_separate(model.decoder, s.turns)
            if worth and spare_for(model.decoder.layers, answering_bytes(*needs)):
                model = decoding.prepared(model)
        # Where requests are announced, the first one that draws says so when it is put in (`_put`).
        self._parts = programs.Parts.of(
            model, tokenizer.eos, config.evaluate.top_p, config.seed, draws=announced is None
        )
        self._state: programs.Slots | None = None
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, list[_Asked]] = {}  # those that share something -> the questions
        self._plan: _Plan | None = None
        self._slots: list[_Asked | None] = [None] * s.slots
        self._entered = False  # in the last step
        self._first = True  # the next call is the first one of answers that are to be the same again
        self._count = 0

    # ---- for those who wait for all answers ----------------------------------------------------

    def answers(
        self, requests: Sequence[Request], ended: Callable[[int], Any] = lambda place: None
    ) -> list[str]:
        """Answers all requests, in order; `ended` is called with the place of each as its answer ends.

        The engine must be idle, and is so again if a request fails. The answers depend on these
        requests and the engine's sizes alone, down to rounding.
        """
        assert self.idle, "the engine is still answering others"
        self._first = True
        try:
            asked = [self._put(request) for request in requests]
            while not self.idle:
                for one, _, over in self._step(None):
                    if over:
                        ended(one.number - asked[0].number)
        except BaseException:
            with self._lock:  # nobody waits for the others any more
                self._waiting, self._plan, self._slots = {}, None, [None] * len(self._slots)
            raise
        return [text_of(self._tokenizer, one.tokens) for one in asked]

    # ---- for those who answer as they are asked ------------------------------------------------

    def submit(self, request: Request) -> int:
        """Puts a request at the end of those that wait, and returns its number.

        Raises UserError as `answers` does, and for a request that is larger than the sizes.
        """
        return self._put(request).number

    def cancel(self, number: int) -> None:
        """Gives a request up, whether it waits or is being answered; no piece of it comes any more."""
        with self._lock:
            for asked in [one for some in self._waiting.values() for one in some]:
                asked.given_up |= asked.number == number
            for asked in filter(None, self._slots):
                asked.given_up |= asked.number == number
            self._waiting = {
                key: left
                for key, some in self._waiting.items()
                if (left := [one for one in some if not one.given_up])
            }
            self._plan = None

    def step(self, tokens: int = 8) -> list[Piece]:
        """Runs one program: those that wait enter, or all answers grow by at most `tokens`.

        Answers that are being made go on between two calls of which others enter. Returns what is
        new of each answer. Raises UserError for a picture that cannot be read: no piece comes of the
        requests about it, and the next steps answer the others.
        """
        pieces = []
        for asked, new, ended in self._step(at_least_one("tokens", tokens)):
            asked.spoken = asked.spoken or Spoken(self._tokenizer)
            text = asked.spoken.add(new)
            if ended:
                text += asked.spoken.end()
            stopped = ended and asked.tokens[-1] == self._tokenizer.eos
            pieces.append(Piece(asked.number, text, len(asked.tokens), ended, stopped))
        return pieces

    @property
    def idle(self) -> bool:
        """Says that there is nothing to answer."""
        return not self._waiting and not any(self._slots)

    def prompt_tokens(self, request: Request) -> int:
        """Counts the tokens of a request's prompt, visual ones included."""
        return self._prompts(request).encoded.tokens

    # ---- both ----------------------------------------------------------------------------------

    def _put(self, request: Request) -> _Asked:
        prompt = self._prompts(request)
        self._check(prompt)
        later = all(isinstance(image, Picture) for image in prompt.images)
        pixels = None if later else self._prompts.pixels(prompt)
        key = shared_by(prompt)
        with self._lock:
            if prompt.temperature and not self._parts.draws:
                self._parts = dataclasses.replace(self._parts, draws=True)
            asked = _Asked(self._count, key, prompt, pixels)
            self._count += 1
            self._waiting.setdefault(key, []).append(asked)
            self._plan = None
        return asked

    def _check(self, prompt: Prompt) -> None:
        """Raises UserError for a prompt that is larger than what the programs were made for."""
        limits = (
            ("tokens in its prompt", prompt.encoded.tokens, self.sizes.prompt),
            ("tokens in its answer", prompt.most, self.sizes.answer),
            ("images", len(prompt.images), self.sizes.images),
        )
        for what, has, most in limits:
            check_room(prompt, what, has, most)

    def _step(self, tokens: int | None) -> list[tuple[_Asked, list[int], bool]]:
        """Runs one program, and returns each answer that grew, its new tokens, and whether it ended."""
        placed: _Placed = []
        with self._lock:
            plan = self._planned()
            free = self._slots.count(None)
            enters = plan is not None and plan.needed <= free
            if enters and tokens is not None and self._entered and free < len(self._slots):
                enters = False  # those in slots have waited for one call already
            if enters:
                assert plan is not None
                placed = self._take(plan)
            kept = np.array([one is not None for one in self._slots])
        self._entered = enters
        try:
            with inside(self._mesh):
                if self._state is None:
                    s = self.sizes
                    self._state = programs.empty(self._parts, s.slots, s.prompt, s.answer)
                if enters:
                    arrays, entry = self._arrays(placed)
                    self._state = programs.enter(self._parts, self._state, arrays, entry)
                    self._first = False
                else:
                    # others enter as soon as there is space; where there is already, it is their turn
                    enough = plan.needed if plan is not None and plan.needed > free else ENDLESS
                    most = self.sizes.answer if tokens is None else tokens
                    self._state = programs.advance(self._parts, self._state, most, enough, kept)
                out, done, live = jax.device_get((self._state.out, self._state.done, self._state.live))
        except BaseException:
            # Their slots still hold the answers of those before them.
            self._take_back(placed)
            raise
        for part, _ in itertools.chain(*placed):
            for asked in part.asked:
                asked.pixels = ()
        return self._grown(out.reshape(len(done), -1), done, live)  # [N, W]

    def _grown(
        self, out: np.ndarray, done: np.ndarray, live: np.ndarray
    ) -> list[tuple[_Asked, list[int], bool]]:
        grown: list[tuple[_Asked, list[int], bool]] = []
        with self._lock:
            for slot, asked in enumerate(self._slots):
                if asked is None:
                    continue
                ended = not live[slot]
                new = out[slot, len(asked.tokens) : done[slot]].tolist()
                asked.tokens += new
                if ended or asked.given_up:
                    self._slots[slot] = None
                if (new or ended) and not asked.given_up:
                    grown.append((asked, new, ended))
        return grown

    def _planned(self) -> _Plan | None:
        """Says which of those that wait enter next: the first ones, packed into rows."""
        if self._plan is None and self._waiting:
            s = self.sizes
            parts: list[_Part] = []
            tokens = 0
            waiting: Iterable[list[_Asked]] = self._waiting.values()
            if self._from_others:
                # Those that join others who wait already must not keep older ones waiting.
                waiting = sorted(waiting, key=lambda some: some[0].number)
            for some in waiting:
                for part in _parts(some, s):
                    parts.append(part)
                    tokens += part.size[0]
                if tokens > 2 * s.rows * s.tokens:
                    break
            needed = np.array([part.size for part in parts])
            capacity = np.array((s.tokens, s.images, s.questions))
            row_of = packing.first_fit(needed, capacity, range(len(parts)))
            rows: list[list[_Part]] = [[] for _ in range(s.rows)]
            for part, row in zip(parts, row_of, strict=True):
                if row < s.rows:
                    rows[row].append(part)
            self._plan = _Plan(rows, sum(len(part.asked) for row in rows for part in row))
        return self._plan

    def _take(self, plan: _Plan) -> _Placed:
        """Gives the questions of a plan their slots, and takes them from those that wait."""
        free = iter([slot for slot, one in enumerate(self._slots) if one is None])
        placed = []
        for row in plan.rows:
            placed.append([(part, [next(free) for _ in part.asked]) for part in row])
            for part, numbers in placed[-1]:
                for asked, slot in zip(part.asked, numbers, strict=True):
                    self._slots[slot] = asked
        entered = {one.number for one in filter(None, self._slots)}
        self._waiting = {
            key: left
            for key, some in self._waiting.items()
            if (left := [one for one in some if one.number not in entered])
        }
        self._plan = None
        return placed

    def _take_back(self, placed: _Placed) -> None:
        """Frees the slots of questions that did not enter; they wait again unless they are given up."""
        with self._lock:
            again = [one for some in self._waiting.values() for one in some]
            for part, numbers in itertools.chain(*placed):
                again += part.asked
                for slot in numbers:
                    self._slots[slot] = None
            self._waiting = {}
            for one in sorted(again, key=lambda one: one.number):
                if not one.given_up:
                    self._waiting.setdefault(one.key, []).append(one)
            self._plan = None

    def _read(self, part: _Part) -> tuple[np.ndarray, ...]:
        """Reads the pictures that the questions of a part share, which are given up if that fails."""
        try:
            return self._prompts.pixels(part.asked[0].prompt)
        except Exception:
            for asked in part.asked:
                asked.given_up = True
            raise

    def _arrays(self, placed: _Placed) -> tuple[layout.Batch, programs.Entry]:
        """Lays questions out in rows, and says where the tokens of each are."""
        s, model = self.sizes, self._config.model
        shape = layout.RowShape(s.tokens, s.images, 0, model.tokens_per_image, model.vision.image_size)
        count = s.rows * s.questions
        entry = programs.Entry(
            np.full(count, s.slots, np.int32),
            np.zeros((count, s.prompt), np.int32),
            np.ones(count, np.int32),
            np.ones(count, np.int32),
            np.zeros(count, np.uint32),
            np.zeros(count, np.float32),
            np.bool_(self._first),
        )
        groups: list[list[layout.Group]] = []
        q = 0
        for r, row in enumerate(placed):
            groups.append([])
            at = r * s.tokens
            for part, numbers in row:
                pixels = part.asked[0].pixels
                groups[-1].append(
                    layout.Group(part.questions, self._read(part) if pixels is None else pixels)
                )
                prefix = np.arange(at, at + len(part.questions[0].prefix))
                at += len(prefix)
                for asked, question, slot in zip(part.asked, part.questions, numbers, strict=True):
                    own = np.arange(at, at + len(question.suffix))
                    at += len(own)
                    places = np.concatenate([prefix, own])
                    entry.slots[q], entry.prompts[q] = slot, len(places)
                    entry.places[q, : len(places)] = places
                    entry.most[q], entry.seeds[q] = asked.prompt.most, asked.prompt.seed % 2**32
                    entry.temperatures[q] = asked.prompt.temperature
                    q += 1
        batch = layout.training_batch(groups, shape, self._tokenizer.pad, "token")
        kept = ("images", "image_tasks", "tokens", "visual", "segments", "prefixes", "positions")
        return {name: batch[name] for name in kept}, entry


# ---------------------------------------------------------------------------------------------
# What questions share
# ---------------------------------------------------------------------------------------------


def _parts(some: Sequence[_Asked], sizes: Sizes) -> Iterator[_Part]:
    """Cuts questions that share something into parts of which each fits a row."""
    encoded = [one.prompt.encoded for one in some]
    most = sizes.tokens
    if not len(encoded[0].prefix) and len(some) > 1:
        # Texts share their first tokens; in small parts they fill what others leave of the rows.
        most //= 4
        shared = _common([one.suffix for one in encoded])
        encoded = [
            layout.Encoded(one.record, one.task, one.suffix[:shared], one.suffix[shared:], one.targets)
            for one in encoded
        ]
    first, total = 0, len(encoded[0].prefix)
    for i, one in enumerate(encoded):
        if i > first and (total + len(one.suffix) > most or i - first == sizes.questions):
            yield _Part(some[first:i], tuple(encoded[first:i]))
            first, total = i, len(one.prefix)
        total += len(one.suffix)
    yield _Part(some[first:], tuple(encoded[first:]))


def _common(texts: Sequence[np.ndarray]) -> int:
    """Counts the ids with which all texts begin, less the last one of the shortest."""
    least, most = min(texts, key=tuple), max(texts, key=tuple)
    length = min(map(len, texts)) - 1
    same = least[:length] == most[:length]
    return length if same.all() else int(same.argmin())
