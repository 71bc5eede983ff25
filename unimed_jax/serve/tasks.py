"""Answers `/v1/tasks`, our own form: boxes in pixels, likelihoods, and routing of an answer."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response

from unimed_jax.config import TASKS
from unimed_jax.data.box_text import valid_box
from unimed_jax.evaluate.report.pictures import token_grid
from unimed_jax.serve import measures
from unimed_jax.serve.events import Events, event
from unimed_jax.serve.fields import Fields, text
from unimed_jax.serve.limits import Limits, Refused, wrong
from unimed_jax.serve.question import NEEDS_TEXT, Asked, question_of, sampling_of, task_of
from unimed_jax.serve.service import Service, Spoken, Ticket, unless_gone

TITLES = {
    "vqa": ("Question about an image", "In which plane is this slice?"),
    "refer": ("Find a structure", "left hippocampus"),
    "identify": ("Name what a box holds", "{<40><35><60><55>}"),
    "caption": ("Report", ""),
    "cls": ("Classify", "Axial, coronal or sagittal?"),
    "qa": ("Question without an image", "What is the hippocampus?"),
}
FIELDS = (
    "task",
    "question",
    "images",
    "box",
    "history",
    "options",
    "routing",
    "confidence",
    "max_tokens",
    "temperature",
    "seed",
    "stream",
)


class Wanted(NamedTuple):
    """Holds what a body asks for."""

    asked: Asked
    options: tuple[str, ...]
    routing: bool
    confidence: bool
    streams: bool


async def describe(http: Http) -> JSONResponse:
    """Lists the tasks, and what a request may hold."""
    service: Service = http.app.state.service
    connector, limits = service.config.model.connector, service.limits
    tasks = [
        {
            "task": task,
            "title": TITLES[task][0],
            "trained": task in service.trained,
            "needs_image": task != "qa",
            "needs_box": task == "identify",
            "gives_box": task == "refer",
            "needs_question": task in NEEDS_TEXT and task != "identify",  # whose box is the question
            "example": TITLES[task][1],
        }
        for task in TASKS
    ]
    return JSONResponse(
        {
            "model": service.name,
            "tasks": tasks,
            "experts": connector.experts if connector.is_moe else 0,
            "grid": list(token_grid(service.config)),
            "fit": service.config.data.fit,  # which part of an image the grid covers
            "limits": {
                "bytes": limits.bytes,
                "pixels": limits.pixels,
                "images": limits.images,
                "max_tokens": limits.max_tokens,
                "question": limits.question,
                "turns": limits.turns,
            },
        }
    )


async def answer(http: Http) -> Response:
    """Answers one question, whole or as server-sent events."""
    service: Service = http.app.state.service
    wanted, ticket = await service.read(http, lambda body: understood(service, body))
    try:
        spoken = await unless_gone(http, service.ask(wanted.asked, ticket))
        if wanted.streams:
            return Events(_events(service, wanted, spoken, ticket), spoken, ticket)
        await unless_gone(http, spoken.whole())
        found = await unless_gone(http, _result(service, wanted, spoken, ticket))
    except BaseException:
        ticket.leave()
        raise
    ticket.leave()
    return JSONResponse(found)


def understood(service: Service, body: Any) -> Wanted:
    """Makes of a body the question that it asks, with its pictures decoded; raises Refused."""
    fields, limits = Fields(body, "the body", FIELDS), service.limits
    urls = fields.listing("images", 1 << 10)
    task, question = task_of(
        fields.text("task", 40, "") or None, fields.text("question", limits.question), bool(urls)
    )
    options = tuple(
        text(value, f"option {number}", limits.question)
        for number, value in enumerate(fields.listing("options", limits.options))
    )
    if len(set(options)) < len(options) or not all(option.strip() for option in options):
        raise wrong("'options' must be different texts that are not empty; change them.")
    if sum(map(len, options)) > limits.characters:
        raise wrong(f"'options' have more than {limits.characters} characters together; send fewer.")
    box = fields.listing("box", 4) if fields.has("box") else None
    if box is not None and (len(box) != 4 or not all(type(v) in (int, float) for v in box)):
        raise wrong(
            "'box' must be four numbers, x0, y0, x1, y1 in pixels of the image; change it.",
            "invalid_box",
        )
    sampling, turns = sampling_of(fields, limits), _turns(fields, limits)
    asked = question_of(service.config, limits, task, question, urls, turns, sampling, box)
    flags = fields.flag("routing"), fields.flag("confidence"), fields.flag("stream")
    return Wanted(asked, options, *flags)


def _turns(fields: Fields, limits: Limits) -> list[tuple[str, str]]:
    turns = []
    for number, turn in enumerate(fields.listing("history", limits.turns)):
        own = Fields(turn, f"turn {number} of 'history'", ("question", "answer"))
        asked, said = (own.text(name, limits.question, None) for name in ("question", "answer"))
        turns.append((asked, said))
    return turns


async def _result(service: Service, wanted: Wanted, spoken: Spoken, ticket: Ticket) -> dict[str, Any]:
    """Completes an answer that has ended by what was asked for beside it."""
    request, engine, run = wanted.asked.request, service.engine, service.run
    confidence, options, routing = None, [], None
    async with ticket.within():
        if wanted.confidence:
            found = await engine.call(lambda: measures.likelihood_of(run, request, [spoken.text]))
            confidence = measures.confidence(found, spoken.finish == "stop")
        if wanted.options:
            found = await engine.call(lambda: measures.likelihood_of(run, request, wanted.options))
            options = measures.compared(wanted.options, found)
        if wanted.routing:
            routing = await engine.call(lambda: measures.routing_of(run, request))
    return {
        "task": request.task,
        "answer": spoken.text,
        "boxes": _boxes(request.task, spoken.text, wanted.asked.sizes),
        "finish_reason": spoken.finish,
        "confidence": confidence,
        "options": options,
        "routing": routing,
        "usage": spoken.usage,
    }


def _boxes(task: str, words: str, sizes: Sequence[tuple[int, int]]) -> list[list[float]]:
    """Returns the box that an answer of `refer` begins with, in pixels of the first picture."""
    found = valid_box(words) if task == "refer" else None
    if found is None:
        return []
    width, height = sizes[0]
    return [[value * side / 100 for value, side in zip(found, (width, height) * 2, strict=True)]]


async def _events(
    service: Service, wanted: Wanted, spoken: Spoken, ticket: Ticket
) -> AsyncGenerator[str]:
    try:
        async with aclosing(spoken.pieces()) as pieces:
            async for piece in pieces:
                yield event({"text": piece})
        yield event({"result": await _result(service, wanted, spoken, ticket)})
    except Refused as refused:
        yield event(refused.content)
    yield "data: [DONE]\n\n"
