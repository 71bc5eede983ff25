"""Bounds what a request may ask for, and says in one form why a request is refused."""

import dataclasses
from collections.abc import Mapping

from starlette.responses import JSONResponse

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}  # by status, as OpenAI's API names them; other 4xx are invalid requests


@dataclasses.dataclass(frozen=True)
class Limits:
    """Says how much one request, and all of them together, may take."""

    max_tokens: int  # of an answer
    question: int = 4000  # characters of one text
    characters: int = 16_000  # of all texts of a request: earlier turns, question, options
    turns: int = 64  # earlier ones
    options: int = 32
    images: int = 4
    pixels: int = 1 << 25  # of one image, by its header
    bytes: int = 32 << 20  # of a request's body
    values: int = 200_000  # of a body's JSON, whose objects in memory are larger than their text
    held: int = 8  # bodies of that size which are in memory at once, over all requests
    queue: int = 64  # requests that wait or are answered
    connections: int = 512  # more are closed at once
    seconds: float = 120.0  # from the last byte of a request to the last of its answer
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    send_seconds: float = 30.0  # for which a client may leave what it was sent unread
    drain_seconds: float = 30.0  # for answers that go on when the server is asked to stop


class Refused(Exception):
    """Refuses a request: an HTTP status, one sentence of what is wrong, and a word for programs."""

    def __init__(self, status: int, sentence: str, code: str, headers: Mapping[str, str] | None = None):
        super().__init__(sentence)
        self.status, self.code, self.headers = status, code, dict(headers or {})

    @property
    def content(self) -> dict:
        """Returns what a client reads."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def wrong(sentence: str, code: str = "invalid_value") -> Refused:
    """Makes the refusal of a request that its sender can mend."""
    return Refused(400, sentence, code)
