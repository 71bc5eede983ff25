"""A picture that cannot be read costs its own request's answer, and no answer is ever another's."""

import numpy as np
import pytest
from support import tiny

from unimed_jax.config import Config, EvaluateConfig, TextConfig
from unimed_jax.errors import UserError
from unimed_jax.model import slots as programs
from unimed_jax.predict.engine import Engine
from unimed_jax.predict.one_by_one import OneByOne
from unimed_jax.predict.request import Picture, Request

pytestmark = pytest.mark.usefixtures("quick_compiles")
MODEL = tiny.config(connector=dict(router="hard", experts=1))  # whose answers depend on the picture


@pytest.fixture
def config():
    text = TextConfig(max_prompt=96, double_bos=False)
    return Config(model=MODEL, text=text, evaluate=EvaluateConfig(max_new_tokens=6))


@pytest.fixture(params=[Engine, OneByOne])
def made(request, config, byte_ids):
    parts = tiny.model(MODEL), config, byte_ids
    return Engine(*parts, slots=2) if request.param is Engine else OneByOne(*parts)


@pytest.fixture
def engine(config, byte_ids):
    return Engine(tiny.model(MODEL), config, byte_ids, slots=2)


def picture(number: int) -> np.ndarray:
    return tiny.image(np.random.default_rng(number))


def broken(name: str = "b") -> Request:
    def read():
        raise UserError("the file is damaged; get it again.")

    return Request("vqa", "what?", (Picture(name, read),))


def drained(made, tokens: int = 4) -> tuple[dict[int, str], int]:
    """Steps until nothing is left; returns the text of each request, and how many steps failed."""
    texts: dict[int, str] = {}
    failed = 0
    for _ in range(100):
        try:
            for piece in made.step(tokens):
                texts[piece.number] = texts.get(piece.number, "") + piece.text
        except (UserError, KeyboardInterrupt, RuntimeError):
            failed += 1
        if made.idle:
            return texts, failed
    raise AssertionError("requests are left")


def test_a_request_whose_picture_fails_has_no_text(made):
    """In particular not that of the request before it in its slot."""
    made.submit(Request("qa", "secret of patient A"))
    assert len(drained(made)[0]) == 1
    made.submit(broken())
    with pytest.raises(UserError, match="the file is damaged"):
        made.step(4)
    assert made.idle and made.step(4) == []


def test_others_are_answered_when_a_picture_fails(made):
    good = [Request("qa", "hello" * i) for i in range(1, 4)]
    good += [Request("vqa", "x", (Picture(str(i), lambda i=i: picture(i)),)) for i in range(3)]
    alone = []
    for request in good:
        made.submit(request)
        alone += drained(made)[0].values()
    order = [good[0], broken("b"), *good[1:4], broken("c"), *good[4:]]
    numbers = [made.submit(request) for request in order]
    texts, failed = drained(made)
    expected = dict(zip(good, alone, strict=True))
    asked = dict(zip(numbers, order, strict=True))
    assert failed == 2
    assert texts == {number: expected[one] for number, one in asked.items() if one in expected}
    assert len(set(alone)) > 3


def test_questions_about_one_picture_that_fails_fail_together(engine):
    shared = broken().images
    requests = [Request("vqa", word, shared) for word in ("a", "b")] + [Request("qa", "c")]
    *_, last = [engine.submit(request) for request in requests]
    texts, failed = drained(engine)
    assert set(texts) == {last} and failed == 1


@pytest.mark.parametrize("wrong", [broken(), Request("qa", "long" * 99)])
def test_after_a_failure_an_engine_answers_what_it_is_asked_next(engine, wrong):
    requests = [Request("qa", "hello" * i) for i in range(1, 4)]
    expected = engine.answers(requests)
    with pytest.raises(UserError):
        engine.answers([*requests, wrong])
    assert engine.idle and engine.answers(requests) == expected


def test_what_an_interrupt_kept_from_entering_enters_again(engine, monkeypatch):
    """Ctrl-C while a picture is read, or a device that fails once: nobody's pixels are lost."""
    expected = engine.answers([Request("vqa", "x", (picture(i),)) for i in range(6)])
    other = next(i for i in range(6) if expected[i] != expected[0])
    early = Request("vqa", "x", (picture(other),))
    read = failing_once(lambda: picture(0), KeyboardInterrupt())
    for late in (Picture("a", read), picture(0)):
        if isinstance(late, np.ndarray):
            enter = failing_once(programs.enter, RuntimeError("the device is away"))
            monkeypatch.setattr(programs, "enter", enter)
        numbers = [engine.submit(early), engine.submit(Request("vqa", "x", (late,)))]
        texts, failed = drained(engine)
        assert failed == 1 and [texts[n] for n in numbers] == [expected[other], expected[0]]


def failing_once(function, error: BaseException):
    errors = [error]

    def called(*parts):
        if errors:
            raise errors.pop()
        return function(*parts)

    return called


def test_a_reused_buffer_is_read_when_a_request_is_submitted(made):
    """In the encoder's size, and in one of which it takes a part."""
    for shape in ((16, 16, 3), (16, 24, 3)):
        pictures = np.random.default_rng(1).integers(0, 256, (4, *shape)).astype(np.uint8)
        for one in pictures:
            made.submit(Request("vqa", "q", (one,)))
        own = list(drained(made)[0].values())
        buffer = np.empty_like(pictures[0])
        for one in pictures:
            buffer[:] = one
            made.submit(Request("vqa", "q", (buffer,)))
        assert list(drained(made)[0].values()) == own and len(set(own)) > 1


def test_an_image_that_is_none_is_refused_when_it_is_submitted(made):
    with pytest.raises(UserError, match="image of 8 bytes cannot be read"):
        made.submit(Request("vqa", "q", (b"no image",)))
    assert made.idle


def test_more_tokens_than_there_is_space_for_are_refused(made):
    with pytest.raises(UserError, match="asks for 50 tokens in its answer, and there is space for 6"):
        made.submit(Request("qa", "q", max_new_tokens=50))
    assert made.idle


@pytest.mark.parametrize("slots", [0, -1])
def test_no_slots_are_refused(config, byte_ids, slots):
    with pytest.raises(UserError, match=f"slots={slots} "):
        Engine(tiny.model(MODEL), config, byte_ids, slots=slots)


@pytest.mark.parametrize("tokens", [0, -1])
def test_steps_of_no_token_are_refused(made, tokens):
    made.submit(Request("qa", "q"))
    with pytest.raises(UserError, match=f"tokens={tokens} "):
        made.step(tokens)
    assert len(drained(made)[0]) == 1
