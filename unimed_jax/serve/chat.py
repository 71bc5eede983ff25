"""Answers `POST /v1/chat/completions` in the form of OpenAI's API.

Which task is asked says a field `task`, a tag at the start of the text (`[vqa] In which plane is this
slice?`) or a system message that begins with one; without any it is vqa where there is an image, else
qa. Other system messages are not read: no prompt form has a place for them. Pictures of all messages
stand in the first turn.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response

from unimed_jax.data.forms import tagged
from unimed_jax.serve.events import Events, event
from unimed_jax.serve.fields import Fields, kind, text
from unimed_jax.serve.limits import Limits, Refused, wrong
from unimed_jax.serve.question import Asked, question_of, sampling_of, task_of
from unimed_jax.serve.service import Service, Spoken, new_id, unless_gone

# Fields that would change the answer, with the values that do not; others than these are not read.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stop": ([], ""),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "store": (False,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "repetition_penalty": (1,),
    "web_search_options": (),
}


class Chat(NamedTuple):
    """Holds what a body asks for."""

    asked: Asked
    streams: bool
    counts_usage: bool


async def chat(http: Http) -> Response:
    """Answers one request, whole or as server-sent events."""
    service: Service = http.app.state.service
    (asked, streams, usage), ticket = await service.read(http, lambda body: understood(service, body))
    try:
        spoken = await unless_gone(http, service.ask(asked, ticket))
        if streams:
            return Events(_chunks(service, spoken, usage), spoken, ticket)
        await unless_gone(http, spoken.whole())
    except BaseException:
        ticket.leave()
        raise
    ticket.leave()
    message = {"role": "assistant", "content": spoken.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": spoken.finish}
    facts = _facts(service, "chat.completion", new_id("chatcmpl"))
    return JSONResponse(facts | {"choices": [choice], "usage": spoken.usage})


async def models(http: Http) -> Response:
    """Lists the one model that is served, or describes it under its name."""
    service: Service = http.app.state.service
    name = http.path_params.get("name", service.name)
    if name != service.name:
        raise _unknown_model(name, service)
    created = int(service.counts.started)
    model = {"id": service.name, "object": "model", "created": created, "owned_by": "unimed_jax"}
    return JSONResponse(model if http.path_params else {"object": "list", "data": [model]})


def _unknown_model(name: str, service: Service) -> Refused:
    words = f"the model {name[:100]!r} is not served here; ask for {service.name!r}."
    return Refused(404, words, "model_not_found")


def understood(service: Service, body: Any) -> Chat:
    """Makes of a body the question that it asks, with its pictures decoded; raises Refused."""
    fields, limits = Fields(body, "the body"), service.limits
    model = fields.text("model", 500, service.name)
    if model != service.name:
        raise _unknown_model(model, service)
    for name, harmless in NEUTRAL.items():
        if fields.has(name) and fields.get(name) not in harmless:
            raise wrong(f"{name!r} is not supported; leave it out.", "unsupported_field")
    top_p = fields.number("top_p", 0, 1)
    draws = bool(fields.number("temperature", 0, 2))
    if draws and top_p not in (None, 1.0, service.config.evaluate.top_p):
        raise wrong(
            f"'top_p' is {service.config.evaluate.top_p:g} on this server; leave it out.",
            "unsupported_field",
        )
    messages = fields.listing("messages", 2 * limits.turns + 3)
    task, turns, question, urls = _conversation(fields, messages, limits)
    longest = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    sampling = sampling_of(fields, limits, longest)
    options = Fields(fields.get("stream_options") or {}, "'stream_options'")
    asked = question_of(service.config, limits, task, question, urls, turns, sampling)
    return Chat(asked, fields.flag("stream"), options.flag("include_usage"))


def _conversation(
    fields: Fields, messages: Sequence[Any], limits: Limits
) -> tuple[str, list[tuple[str, str]], str, list[Any]]:
    """Reads task, earlier turns, question and image URLs out of the messages."""
    said: list[tuple[str, str]] = []  # role, text
    urls: list[Any] = []
    named = fields.text("task", 40, "") or None
    for number, message in enumerate(messages):
        where = f"message {number}"
        own = Fields(message, where)
        role = own.text("role", 40, None)
        read = role not in ("system", "developer")
        words, images = _content(own.get("content"), where, limits.question if read else limits.bytes)
        if images and role != "user":
            raise wrong(f"{where} is of the role {role!r} and has an image; only those of 'user' may.")
        urls += images
        if not read:
            tag = tagged(words)[0]
            if not said and tag is not None:
                named = named or tag
        elif role in ("user", "assistant"):
            if said and said[-1][0] == role == "user":  # two messages of one turn
                said[-1] = (role, f"{said[-1][1]}\n{words}")
                continue
            if role != ("user", "assistant")[len(said) % 2]:
                raise wrong(
                    f"{where} is of the role {role!r}, out of turn; 'user' and 'assistant' take "
                    "turns, beginning with 'user'.",
                    "invalid_messages",
                )
            said.append((role, words))
        else:
            raise wrong(
                f"{where} has the role {role!r}; use system, user or assistant.", "invalid_messages"
            )
    if len(said) % 2 == 0:
        raise wrong(
            "'messages' must end with one of the role 'user'; add the question.", "invalid_messages"
        )
    texts = [words for _, words in said]
    earlier = list(zip(texts[:-1:2], texts[1::2], strict=True))
    if tagged(texts[-1])[0] and not fields.has("task"):
        named = None  # the tag comes before a system message
    task, question = task_of(named, texts[-1], bool(urls))
    return task, earlier, question, urls


def _content(content: Any, where: str, most: int) -> tuple[str, list[Any]]:
    """Returns the text of a message, of `most` characters at most, and the image URLs in it."""
    name = f"'content' of {where}"
    if content is None or isinstance(content, str):
        return text(content or "", name, most), []
    if not isinstance(content, list):
        raise wrong(f"{name} is {kind(content)}; send a text or a list of parts.", "invalid_type")
    texts, urls = [], []
    for number, part in enumerate(content):
        own = Fields(part, f"part {number} of {where}")
        sort = own.text("type", 40, None)
        if sort == "text":
            texts.append(own.text("text", most, None))
        elif sort == "image_url":
            given = own.get("image_url")
            urls.append(given.get("url") if isinstance(given, dict) else given)
        else:
            raise wrong(
                f"part {number} of {where} is of the type {sort!r}; send text or image_url.",
                "invalid_messages",
            )
    return text("\n".join(texts), name, most), urls


async def _chunks(service: Service, spoken: Spoken, usage: bool) -> AsyncGenerator[str]:
    facts = _facts(service, "chat.completion.chunk", new_id("chatcmpl"))
    nothing = {"usage": None} if usage else {}

    def chunk(delta: dict, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event(facts | {"choices": [choice]} | nothing)

    try:
        yield chunk({"role": "assistant", "content": ""})
        async with contextlib.aclosing(spoken.pieces()) as pieces:
            async for piece in pieces:
                yield chunk({"content": piece})
    except Refused as refused:
        yield event(refused.content)
    else:
        yield chunk({}, spoken.finish)
        if usage:
            yield event(facts | {"choices": [], "usage": spoken.usage})
    yield "data: [DONE]\n\n"


def _facts(service: Service, sort: str, name: str) -> dict[str, Any]:
    return {"id": name, "object": sort, "created": int(time.time()), "model": service.name}
