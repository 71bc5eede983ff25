"""Runs the application by uvicorn: timeouts for slow clients, and an orderly end."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from unimed_jax.interruption import Stoppable
from unimed_jax.serve.limits import Limits
from unimed_jax.serve.service import Service

LOOK_SECONDS = 0.5  # between two looks at what a connection waits for


class Protocol(H11Protocol):
    """Ends connections whose client sends or reads too slowly, which uvicorn waits for without end."""

    limits: Limits

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self.limits.connections:
            self.transport.abort()
        self._stage, self._since = "", time.monotonic()
        self._look = self.loop.call_later(LOOK_SECONDS, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        stage, now = self._waits_for(), time.monotonic()
        if stage != self._stage:
            self._stage, self._since = stage, now
        most = {
            "headers": self.limits.header_seconds,
            "rest": self.limits.body_seconds,  # of a body that was refused
            "reader": self.limits.send_seconds,
        }.get(stage, float("inf"))
        if now - self._since > most:
            self.transport.abort()
            return
        self._look = self.loop.call_later(LOOK_SECONDS, self._check)

    def _waits_for(self) -> str:
        """Names what the client has to do next; empty if it is our turn, or if it may be idle."""
        if self.flow.write_paused:
            return "reader"
        between = self.cycle is None or self.cycle.response_complete
        if between and self.timeout_keep_alive_task is None:
            return "rest" if self.conn.their_state is h11.SEND_BODY else "headers"
        return ""

    def send_400_response(self, msg: str) -> None:
        super().send_400_response("The request is not HTTP; mend the client.")


class Server(uvicorn.Server):
    """Stops when a signal was noted, after the answers that are being made."""

    def __init__(self, config: uvicorn.Config, service: Service, stops: Callable[[], bool]):
        super().__init__(config)
        self._service, self._stops = service, stops

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= self._stops() or bool(self._service.failed)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stops = True
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `interruption.Stoppable`."""
        yield


def server_of(app: Starlette, limits: Limits, stops: Callable[[], bool] = lambda: False) -> Server:
    """Makes the server of an application; `run(sockets=[...])` runs it until `stops()`."""
    for name in ("uvicorn.error", "uvicorn.access", "asyncio"):  # they would quote requests
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    kind = type("Protocol", (Protocol,), {"limits": limits})
    config = uvicorn.Config(
        app,
        http=kind,
        ws="none",
        loop="asyncio",
        log_config=None,
        log_level=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(limits.drain_seconds),
    )
    return Server(config, app.state.service, stops)


def listening(host: str, port: int) -> socket.socket:
    """Opens the socket; raises OSError if it cannot."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
        found.setblocking(False)
    except BaseException:
        found.close()
        raise
    return found


def stopped_by_signal() -> Callable[[], bool]:
    """Returns what says whether a signal asked this process to stop; signals are then only noted."""
    signals = Stoppable.current
    if signals is None:
        return lambda: False
    signals.delayed, signals.doing = True, "answering those that wait"
    return lambda: signals.number is not None
