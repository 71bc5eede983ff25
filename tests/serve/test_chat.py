"""OpenAI's client as it is: whole and streamed answers are the engine's, whoever asks beside it."""

import asyncio
import contextlib
import dataclasses
import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from serve.conftest import NEW, square, url
from starlette.requests import ClientDisconnect

from unimed_jax.predict.request import Request
from unimed_jax.serve.engine_thread import EngineThread
from unimed_jax.serve.events import Events
from unimed_jax.serve.limits import Refused
from unimed_jax.serve.question import Sampling, question_of

BOX = "{<10><10><60><60>}"
TEXTS = {
    "vqa": "What colour is the square?",
    "refer": "red square",
    "identify": BOX,
    "caption": "",
    "cls": "",
    "qa": "What is 3 plus 1?",
}


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0, timeout=60)


def user(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if images else text}


def said(answer) -> str:
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def questions():
    """Two of each task: the request, and the message that asks the same."""
    found = []
    for number in range(2):
        for task, text in TEXTS.items():
            images = () if task == "qa" else (square(number),)
            request = Request(task, text + " Why?" * (number and task == "qa"), images)
            found.append((request, user(f"[{task}] {request.question}", *images)))
    return found


@pytest.fixture(scope="module")
def expected(live, questions):
    answers = live.expected([request for request, _ in questions])
    assert all(answers) and len(set(answers)) > 4
    return answers


def test_answers_are_those_of_predict_whole_and_streamed(client, questions, expected):
    for (request, message), answer in zip(questions[:6], expected[:6], strict=True):
        whole = client.chat.completions.create(model="squares", messages=[message])
        assert said(whole) == answer, request.task
        usage = whole.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert 0 < usage.completion_tokens <= NEW and usage.prompt_tokens > 4
        chunks = list(
            client.chat.completions.create(
                model="squares", messages=[message], stream=True, stream_options={"include_usage": True}
            )
        )
        pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
        assert "".join(filter(None, pieces)) == answer
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage == usage and not chunks[-1].choices
        assert len({chunk.id for chunk in chunks}) == 1


def test_many_at_once_get_the_same_answers(live, client, questions, expected):
    """Requests of all tasks share the engine's steps."""
    found: dict[int, str] = {}

    def ask(number):
        message = questions[number % 12][1]
        found[number] = said(client.chat.completions.create(model="squares", messages=[message]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    most = 0
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(live.service.engine._answers))
    assert [found[number] for number in range(20)] == (expected * 2)[:20]
    assert most > 4, "they were answered one after the other"


def test_the_task_comes_from_a_field_a_tag_a_system_message_or_the_images(live, client):
    image = square(0)
    for system, text, field in (
        ("[caption] ", "", None),
        ("caption", "[caption]", None),
        ("[vqa] You are a radiologist.", "[caption]", None),
        ("You are a radiologist.", "", "caption"),
        ("[vqa]", "", "caption"),
    ):
        messages = [{"role": "system", "content": system}, user(text, image)]
        answer = client.chat.completions.create(
            model="squares", messages=messages, extra_body={"task": field} if field else {}
        )
        assert said(answer) == live.expected([Request("caption", "", (image,))])[0], (system, text)
    for text, images, task in (("What is it?", (image,), "vqa"), ("What is it?", (), "qa")):
        answer = client.chat.completions.create(model="squares", messages=[user(text, *images)])
        assert said(answer) == live.expected([Request(task, text, images)])[0]


def test_earlier_turns_and_several_images_are_read(live, client):
    images = square(0), square(1)
    messages = [
        user("What colour is the square?", images[0]),
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        user("[refer] red square"),
        {"role": "assistant", "content": "{<1><2><30><40>}"},
        user("And here?", images[1]),
    ]
    history = (("What colour is the square?", "red"), ("[refer] red square", "{<1><2><30><40>}"))
    request = Request("vqa", "And here?", images, history)
    answer = client.chat.completions.create(model="squares", messages=messages)
    alone = Request("vqa", "And here?", images)
    expected = live.expected([request, alone])
    assert said(answer) == expected[0] != expected[1]


def test_draws_are_repeated_by_their_seed_and_bounded_by_max_tokens(live, client):
    def drawn(**how):
        answer = client.chat.completions.create(model="squares", messages=[user("Why?")], **how)
        return said(answer), answer.choices[0].finish_reason, answer.usage.completion_tokens

    request = Request("qa", "Why?", temperature=2.0, seed=5)
    assert drawn(temperature=2.0, seed=5)[0] == live.expected([request])[0]
    assert len({drawn(temperature=2.0)[0] for _ in range(4)}) > 1, "without a seed each is another"
    for how in ({"max_tokens": 2}, {"max_completion_tokens": 2, "max_tokens": 9}):
        text, finish, tokens = drawn(**how)
        assert (finish, tokens) == ("length", 2) and live.expected([Request("qa", "Why?")])[0] != text
    assert drawn(max_tokens=100_000)[2] <= NEW


def test_what_is_refused_is_the_clients_own_kind_of_error(live, client):
    create = client.chat.completions.create
    assert [model.id for model in client.models.list()] == ["squares"]
    assert client.models.retrieve("squares").owned_by == "unimed_jax"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("lab/other")
    with pytest.raises(openai.NotFoundError, match="is not served here") as error:
        create(model="gpt-4", messages=[user("Why?")])
    assert error.value.code == "model_not_found" and error.value.type == "not_found_error"
    with pytest.raises(openai.BadRequestError, match="never opened"):
        part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
        words = {"type": "text", "text": "What is it?"}
        create(model="squares", messages=[{"role": "user", "content": [part, words]}])
    with pytest.raises(openai.BadRequestError, match="'n' is not supported"):
        create(model="squares", messages=[user("Why?")], n=2)
    with pytest.raises(openai.BadRequestError, match="the prompt has .* tokens") as error:
        list(create(model="squares", messages=[user("why " * 400)], stream=True))
    assert error.value.code == "context_length_exceeded"
    tickets = [live.service.enter() for _ in range(live.service.limits.queue)]
    with pytest.raises(openai.RateLimitError, match="server is full") as error:
        create(model="squares", messages=[user("Why?")])
    assert int(error.value.response.headers["retry-after"]) >= 1
    for ticket in tickets:
        ticket.leave()
        ticket.leave()  # which counts once
    assert live.service.open == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(live, client, monkeypatch, stream):
    engine, counts = live.service.engine._engine, live.service.counts
    before, step, cancel = counts.answers["qa", "cancelled"], engine.step, engine.cancel
    cancelled = []

    def slowly(tokens):
        time.sleep(0.1)
        return step(1)

    monkeypatch.setattr(engine, "step", slowly)
    monkeypatch.setattr(engine, "cancel", lambda number: (cancelled.append(number), cancel(number)))
    how = {"model": "squares", "messages": [user("Why?")], "stream": stream}
    if stream:
        answer = client.chat.completions.create(**how)
        next(iter(answer))
        answer.response.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(**how)
    live.until(lambda: not live.service.open, 5)
    assert counts.answers["qa", "cancelled"] == before + 1
    live.until(lambda: engine.idle, 5)
    assert len(cancelled) == 1


def test_a_stream_that_nobody_begins_to_read_is_given_up():
    """A generator that has not begun runs no `finally`, so this cannot be left to it."""
    left = []
    spoken = SimpleNamespace(give_up=lambda: left.append("answer"))
    ticket = SimpleNamespace(leave=lambda: left.append("ticket"))

    async def source():
        yield "never read"

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        raise OSError("the client has left")

    with pytest.raises((OSError, ClientDisconnect)):
        asyncio.run(Events(source(), spoken, ticket)({"type": "http"}, receive, send))
    assert left == ["answer", "ticket"]


def test_the_forms_of_two_evaluation_kits_are_understood(live):
    """As lmms-eval (models/openai_compatible.py) and VLMEvalKit (api/gpt.py) write them."""
    part = {"type": "image_url", "image_url": {"url": url(square(0))}}
    small = {"type": "image_url", "image_url": {"url": url(square(0)), "detail": "low"}}
    words = {"type": "text", "text": "What colour is the square?"}
    of_lmms_eval = {
        "messages": [{"role": "user", "content": [words, part]}],
        "model": "squares",
        "max_completion_tokens": 1024,
        "temperature": 0,
    }
    of_vlmevalkit = {
        "model": "squares",
        "messages": [
            {"role": "system", "content": "You answer."},
            {"role": "user", "content": [small, words]},
        ],
        "n": 1,
        "temperature": 0,
        "max_tokens": 2048,
    }
    expected = live.expected([Request("vqa", words["text"], (square(0),))])
    for body in (of_lmms_eval, of_vlmevalkit):
        status, _, found = live.post("/v1/chat/completions", body, Authorization="Bearer sk-any")
        assert status == 200 and [found["choices"][0]["message"]["content"]] == expected


def test_pixels_are_seen_as_they_were_sent(live, client):
    """A picture of another size and form gives the answer that predict gives to its pixels."""
    wide = np.random.default_rng(0).integers(0, 256, (20, 44, 3)).astype(np.uint8)
    answer = client.chat.completions.create(model="squares", messages=[user("What is it?", wide)])
    assert said(answer) == live.expected([Request("vqa", "What is it?", (wide,))])[0]


def test_messages_in_other_forms_that_the_api_allows(live):
    """A long system message is not read, two of 'user' are one turn, top_p is for draws."""

    def said(messages, **more):
        return live.post("/v1/chat/completions", {"messages": messages, **more})[2]

    user = {"role": "user", "content": "a\nb"}
    expected = said([user])["choices"][0]["message"]["content"]
    apart = [{"role": "user", "content": word} for word in "ab"]
    for messages, more in (
        ([{"role": "system", "content": "be brief " * 2000}, user], {}),
        (apart, {}),
        ([user], {"temperature": 0, "top_p": 0.9}),
        ([user], {"top_k": -1, "ignore_eos": False, "repetition_penalty": 1.0}),
    ):
        assert said(messages, **more)["choices"][0]["message"]["content"] == expected
    for more in ({"temperature": 1, "top_p": 0.9}, {"top_k": 3}, {"web_search_options": {}}):
        assert next(iter(set(more) - {"temperature"})) in said([user], **more)["error"]["message"]


def test_a_question_that_the_model_would_cut_is_refused(live):
    """A model of `fidelity="paper"` reads the first words alone: two questions would be one."""
    text = dataclasses.replace(live.run.config.text, max_words=50)
    config = dataclasses.replace(live.run.config, text=text)
    sampling = Sampling(4, 0.0, 0)
    words = " ".join(["word"] * 49)
    for turns, question, cut in (
        ([], words, False),
        ([], f"{words} and more", True),
        ([(f"{words} and more", "yes")], "why?", True),
    ):
        with contextlib.ExitStack() as stack:
            if cut:
                stack.enter_context(pytest.raises(Refused, match="first 50 words of a question"))
            question_of(config, live.service.limits, "qa", question, [], turns, sampling)
            question_of(live.run.config, live.service.limits, "qa", question, [], turns, sampling)
    question_of(live.run.config, live.service.limits, "qa", f"{words} and more", [], [], sampling)


def test_who_leaves_late_cancels_nobody_elses_answer():
    """After an engine has failed the next one counts from 0 again."""

    class Fails:
        sizes, idle, numbers = None, True, itertools.count()

        def cancel(self, number):
            raise AssertionError("another answer was cancelled")

    thread = EngineThread(Fails)
    one, other = SimpleNamespace(number=0), SimpleNamespace(number=0)
    thread._answers[0] = other
    thread.forget(one)
    assert thread._answers == {0: other}
    thread.close()
