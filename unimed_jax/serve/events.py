"""Sends server-sent events to a client, and ends what makes them if the client leaves."""

import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from unimed_jax.serve.service import Spoken, Ticket


class Events(StreamingResponse):
    """Streams events of an answer; however that ends, the rest is given up and the ticket leaves."""

    def __init__(self, source: AsyncGenerator[str], spoken: Spoken, ticket: Ticket):
        super().__init__(source, media_type="text/event-stream")
        self._source, self._spoken, self._ticket = source, spoken, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._spoken.give_up()
            self._ticket.leave()
            await self._source.aclose()


def event(content: Any) -> str:
    """Writes one event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
