"""Puts the server together: routes, the guard in front of them, and the page."""

import asyncio
import contextlib
import hmac
import ipaddress
import mimetypes
import re
from collections.abc import AsyncIterator, Sequence
from importlib import resources

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unimed_jax.serve import chat, images, tasks
from unimed_jax.serve.engine_thread import print_fault
from unimed_jax.serve.limits import Refused
from unimed_jax.serve.service import Service

OPEN_PATHS = ("/", "/health", "/ready")  # and the page's files: those that need no token
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
PAGE_TYPES = (".html", ".css", ".js", ".svg", ".png", ".ico", ".woff2")


def application(
    service: Service, hosts: Sequence[str] = (), token: str = "", origins: Sequence[str] = ()
) -> Starlette:
    """Makes the application.

    hosts: the names by which clients may call it, any if there are none; token: which they must send,
    if it is not empty; origins: of the page behind a proxy, such as "https://unimed.hospital".
    """
    page = page_files()

    async def index(http: Http) -> Response:
        return _file(page, "index.html")

    async def file(http: Http) -> Response:
        return _file(page, http.path_params["name"])

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        warming = asyncio.create_task(service.warm())
        yield
        warming.cancel()
        service.close()

    app = Starlette(
        routes=[
            Route("/", index, methods=["GET"]),
            Route("/page/{name}", file, methods=["GET"]),
            Route("/health", _health, methods=["GET"]),
            Route("/ready", _ready, methods=["GET"]),
            Route("/metrics", _metrics, methods=["GET"]),
            Route("/v1/models", chat.models, methods=["GET"]),
            Route("/v1/models/{name:path}", chat.models, methods=["GET"]),
            Route("/v1/chat/completions", chat.chat, methods=["POST"]),
            Route("/v1/tasks", tasks.describe, methods=["GET"]),
            Route("/v1/tasks", tasks.answer, methods=["POST"]),
            Route("/v1/images", images.show, methods=["POST"]),
        ],
        exception_handlers={
            Refused: _refused,
            HTTPException: _no_route,
            ClientDisconnect: _gone,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a path is written in one way
    names = [*hosts, *(_name_of(origin.partition("://")[2]) for origin in origins)] if hosts else []
    app.add_middleware(Guard, service=service, hosts=names, token=token, origins=frozenset(origins))
    app.state.service = service
    return app


class Guard:
    """Looks at the headers of each request, adds those of security to each response, and counts it."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        hosts: Sequence[str],
        token: str,
        origins: frozenset[str] = frozenset(),
    ):
        self._app, self._service, self._hosts, self._token = app, service, hosts, token.encode()
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, unread = False, scope["method"] == "POST"

        async def receiving() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                if unread and message["status"] != 408:
                    await self._drop_rest(scope, receiving)
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                self._count(scope, message["status"])
            await send(message)

        try:
            try:
                self._check(scope)
                await self._app(scope, receiving, sending)
            except Refused as refused:
                await refused.response()(scope, receiving, sending)
        except Exception as error:
            print_fault(error)
            if started:
                raise
            fault = Refused(500, "the server failed on this request; ask again.", "internal_error")
            await fault.response()(scope, receiving, sending)

    async def _drop_rest(self, scope: Scope, receive: Receive) -> None:
        """Reads a refused body to its end, if that is near: a client that sends cannot read why."""
        limits = self._service.limits
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > 2 * limits.bytes:
            return
        dropped = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(5.0, limits.body_seconds)):
                while dropped <= 2 * limits.bytes:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _check(self, scope: Scope) -> None:
        """Raises Refused for a request that does not come from where it should."""
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if self._hosts and _name_of(host) not in self._hosts:
            raise Refused(
                421, "this server does not answer under that name; call it by its address.", "wrong_host"
            )
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            ours = origin is None or origin in self._origins or origin.partition("://")[2] == host
            if not ours or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                raise Refused(
                    403,
                    "a page of another site cannot use this server; open the server's own page.",
                    "cross_site",
                )
        if self._token and path not in OPEN_PATHS and not path.startswith("/page/"):
            kind, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self._token)
            if kind.lower() != "bearer" or not same:
                raise Refused(
                    401,
                    "the token is missing or wrong; send Authorization: Bearer TOKEN.",
                    "invalid_api_key",
                    {"WWW-Authenticate": "Bearer"},
                )

    def _count(self, scope: Scope, status: int) -> None:
        route = scope.get("route")  # a path as we wrote it, never as it was sent
        self._service.counts.responses[getattr(route, "path", "other"), status] += 1


def _name_of(host: str) -> str:
    """Returns the name in a Host header, without its port; empty for what is no such header."""
    found = re.fullmatch(r"(\[[\da-f:.]+\]|[^\[\]:]*)(:\d*)?", host.lower())
    return found[1] if found else ""


def names_of(host: str, address: str) -> tuple[str, ...]:
    """Returns the names that a server answers to: few on this machine, any on a network.

    host: as it was asked to listen; address: the one at which it does.
    """
    found = ipaddress.ip_address(address)
    here = (getattr(found, "ipv4_mapped", None) or found).is_loopback
    own = f"[{address}]" if ":" in address else address
    return ("127.0.0.1", "localhost", "[::1]", own, host.lower()) if here else ()


def page_files() -> dict[str, tuple[bytes, str]]:
    """Reads the page's files: name -> content and media type."""
    folder = resources.files("unimed_jax.serve") / "page"
    found = (
        [file for file in folder.iterdir() if file.name.endswith(PAGE_TYPES)] if folder.is_dir() else []
    )
    return {file.name: (file.read_bytes(), _type(file.name)) for file in found}


def _type(name: str) -> str:
    known = {".js": "text/javascript", ".woff2": "font/woff2", ".ico": "image/x-icon"}
    ending = name[name.rindex(".") :]
    return known.get(ending) or mimetypes.types_map[ending]


def _file(page: dict[str, tuple[bytes, str]], name: str) -> Response:
    if name not in page:
        raise Refused(
            404, "that page does not exist; open / instead, or see docs/serving.md.", "not_found"
        )
    content, kind = page[name]
    return Response(content, media_type=kind)


async def _health(http: Http) -> Response:
    return JSONResponse({"status": "ok"})


async def _ready(http: Http) -> Response:
    service: Service = http.app.state.service
    if service.stops or not service.ready:
        word = "stopping" if service.stops else "starting"
        return JSONResponse({"status": word}, 503, {"Retry-After": "5"})
    return JSONResponse({"status": "ready"})


async def _metrics(http: Http) -> Response:
    service: Service = http.app.state.service
    words = service.counts.text(service.open, service.ready and not service.stops)
    return PlainTextResponse(words, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _refused(http: Http, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _no_route(http: Http, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        words = "this path does not take that method; see docs/serving.md."
        return Refused(405, words, "method_not_allowed", error.headers).response()
    words = "there is nothing at this path; see docs/serving.md."
    return Refused(error.status_code, words, "not_found").response()


async def _gone(http: Http, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads
