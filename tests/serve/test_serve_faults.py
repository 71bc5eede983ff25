"""Every fault has its status and one sentence; nothing is executed, fetched, opened, logged or kept."""

import asyncio
import copy
import dataclasses
import json
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from serve.conftest import LIMITS

from unimed_jax.serve.app import application, names_of
from unimed_jax.serve.limits import Refused
from unimed_jax.serve.server import server_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from serving_faults import (
    CHAT,
    IMAGES,
    SQUARE,
    TASKS,
    connected,
    faults,
    harmless,
    head,
    received,
    shown,
    slow_clients,
    what_slow_clients_got,
)


@pytest.mark.filterwarnings("ignore:Image size")  # of Pillow, whose warnings the server silences
def test_every_fault_has_its_status_and_one_sentence(live, trace, capfd):
    wrong = []
    with trace as events:
        for name, (path, body, status, words) in faults(live.get(TASKS)[2]["limits"]).items():
            found, headers, content = live.post(path, body)
            error = content["error"] if isinstance(content, dict) else {}
            message = error.get("message", "")
            if found != status or words not in message or "\n" in message or message[-1:] not in ".?":
                wrong.append((name, found, message or content))
            assert set(error) == {"message", "type", "param", "code"} and error["code"], name
            assert (
                headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
            )
            assert "Server" not in headers and "Access-Control-Allow-Origin" not in headers
    assert not wrong
    assert [event for event in events if not harmless(event)] == []
    assert capfd.readouterr() == ("", "")


def test_honest_requests_open_and_keep_nothing(live, trace, capfd):
    measured = {"routing": True, "confidence": True}
    bodies = [
        (TASKS, {"task": "vqa", "question": "Whose?", "images": [SQUARE]} | measured),
        (TASKS, {"task": "caption", "images": [SQUARE], "stream": True}),
        (CHAT, shown(SQUARE)),
        (IMAGES, {"image": SQUARE}),
    ]  # fmt: skip
    for path, body in bodies:
        live.post(path, body)
    with trace as events:
        for path, body in bodies:
            assert live.post(path, body)[0] == 200
        _, _, metrics = live.get("/metrics")
    assert [event for event in events if not harmless(event)] == []
    assert capfd.readouterr() == ("", "")
    lines = metrics.decode()
    assert "Whose" not in lines and 'unimed_answers_total{task="caption"' in lines
    assert 'unimed_responses_total{path="/v1/tasks",status="200"}' in lines
    assert live.service.engine._engine._prompts._encoder._ids.cache_info().currsize == 0


def test_a_fault_of_ours_says_nothing_of_the_request(live, capfd, monkeypatch):
    engine = live.service.engine._engine
    body = {"task": "qa", "question": "secret words"}

    def fails(tokens):
        raise RuntimeError("secret words")

    monkeypatch.setattr(engine, "step", fails)
    status, _, found = live.post(TASKS, body)
    assert status == 500 and found["error"]["type"] == "server_error"
    monkeypatch.setattr("unimed_jax.serve.tasks.question_of", lambda *a: fails(0))
    assert live.post(TASKS, body)[0] == 500
    monkeypatch.undo()
    assert live.service.engine._engine is not engine and live.post(TASKS, body)[0] == 200
    out, err = capfd.readouterr()
    assert "RuntimeError at" in err and "secret" not in out + err + json.dumps(found)


def test_the_tokenizers_own_store_of_words_can_be_emptied(live):
    """A release of the package without these calls, which are its own, would have to be looked at."""
    tokenizer = live.run.tokenizer
    assert hasattr(tokenizer._rust.model, "_resize_cache")
    assert hasattr(tokenizer._rust.model, "_clear_cache")
    before = tokenizer.encode("hippocampus")
    tokenizer.keep_no_words()
    assert tokenizer.encode("hippocampus") == before


# ---- who asks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, status, words",
    [
        ({"Host": "evil.example"}, 421, "under that name"),
        ({"Host": "localhost:9"}, 200, ""),
        ({"Host": "[::1]:9"}, 200, ""),
        ({"Host": "[::1]evil.example"}, 421, "under that name"),
        ({"Host": "localhost.evil.example"}, 421, "under that name"),
        ({"Host": "localhost:9", "Origin": "http://localhost:9"}, 200, ""),
        ({"Host": "localhost:9", "Origin": "http://localhost:8"}, 403, "another site"),
        ({"Origin": "http://evil.example"}, 403, "another site"),
        ({"Origin": "null"}, 403, "another site"),
        ({"Sec-Fetch-Site": "cross-site"}, 403, "another site"),
        ({"Sec-Fetch-Site": "same-origin"}, 200, ""),
        ({"Content-Type": "text/plain"}, 415, "must be JSON"),
        ({"Content-Encoding": "gzip"}, 415, "compressed"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415, "must be JSON"),
    ],
)
def test_browsers_of_other_sites_are_kept_out(live, headers, status, words):
    found, _, content = live.post(TASKS, {"task": "qa", "question": "?"}, **headers)
    assert found == status and words in json.dumps(content)


def status_of(app, path, method="GET", **headers):
    """What an application answers, without a server."""
    given = [(name.encode(), words.encode("latin-1")) for name, words in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": given, "query_string": b""}
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


def test_a_page_behind_a_proxy_is_served_under_the_names_that_were_given(live):
    """Whether the proxy keeps the name that the browser asked for, or sends its own."""
    names, origin = names_of("127.0.0.1", "127.0.0.1"), "https://unimed.hospital"
    named = application(live.service, names, origins=[origin])
    for app, expected in ((named, 415), (application(live.service, names), None)):
        for host in ("127.0.0.1:8000", "unimed.hospital"):
            found = status_of(app, TASKS, "POST", host=host, origin=origin)
            assert found == expected or expected is None and found in (403, 421)
    for other in ("http://unimed.hospital", "https://unimed.hospital.evil.example"):
        assert status_of(named, TASKS, "POST", host="127.0.0.1:8000", origin=other) == 403
    assert status_of(named, "/health", host="evil.example") == 421


def test_a_token_is_asked_for_where_it_is_set(live):
    """The guard by itself, which no request passes without the token."""

    app = application(live.service, names_of("0.0.0.0", "0.0.0.0"), token="s3cret-s3cret-s3cret")

    def status(path, authorization=None, method="GET"):
        headers = {"authorization": authorization} if authorization else {}
        return status_of(app, path, method, host="any", **headers)

    for path in ("/v1/models", "/metrics", "/v1/tasks"):
        assert status(path) == status(path, "Bearer wrong") == status(path, "Bearer é") == 401
        assert status(path, "Basic s3cret-s3cret-s3cret") == 401
        assert status(path, "Bearer s3cret-s3cret-s3cret") == 200
    assert status("/health") == status("/ready") == status("/") == status("/page/main.js") == 200
    assert status("/v1/images", method="POST") == 401


@pytest.mark.parametrize(
    "host, address, named",
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("LocalHost", "127.0.0.1", True),
        ("my-machine", "127.0.1.1", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", True),
        ("0", "0.0.0.0", False),
        ("::", "::", False),
        ("my-machine", "10.0.0.7", False),
    ],
)
def test_a_server_on_this_machine_alone_has_names_however_it_was_called(host, address, named):
    assert bool(names_of(host, address)) == named


def test_a_connection_goes_on_after_errors(live):
    """Each of several requests in a row has its own answer, whatever became of those before it."""
    body = json.dumps({"task": "qa", "question": "?", "max_tokens": 2}).encode()
    whole = head(TASKS, len(body)) + body
    wrong = (
        head(TASKS, 7) + b"nothing",
        head(TASKS, 50_000, "Origin: http://evil.example") + b"x" * 50_000,
        head(TASKS, len(body)).replace(b"/json", b"/xml") + body,
        b"OPTIONS /v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"HEAD /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n",
        head("/", 50_000) + b"x" * 50_000,
    )
    with connected(live.port) as client:
        client.sendall(b"".join([whole, *wrong, head(TASKS, len(body), "Connection: close") + body]))
        found = received(client)
    statuses = [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", found)]
    assert statuses == [200, 400, 403, 415, 405, 404, 405, 200]
    assert found.count(b'"answer"') == 2


@pytest.mark.parametrize(
    "lines", ["Host: evil.example\r\n", "Content-Length: 3\r\n", "Transfer-Encoding: gzip\r\n"]
)
def test_headers_of_two_meanings_are_no_http(live, lines):
    with connected(live.port) as client:
        client.sendall(head(TASKS, 2)[:-2] + f"{lines}\r\n".encode() + b"{}")
        assert received(client).startswith(b"HTTP/1.1 400 ")


# ---- what goes wrong after the answer --------------------------------------------------------------

MEASURED = {"task": "qa", "question": "?", "max_tokens": 2, "confidence": True, "options": ["a", "b"]}


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_in_what_is_measured_ends_the_answer_in_order(live, capfd, monkeypatch, stream):
    def fails(*a):
        raise RuntimeError("secret words")

    monkeypatch.setattr("unimed_jax.serve.measures.likelihood_of", fails)
    status, _, content = live.post(TASKS, MEASURED | {"stream": stream})
    if stream:
        *_, last, done, _ = content.decode().split("\n\n")
        assert (status, done) == (200, "data: [DONE]")
        content = json.loads(last.removeprefix("data: "))
    else:
        assert status == 500
    assert content["error"]["type"] == "server_error" and "secret" not in str(content)
    assert "secret" not in str(capfd.readouterr())


@pytest.mark.parametrize("stream", [True, False])
def test_the_time_of_a_request_holds_for_what_is_measured_too(live, monkeypatch, stream):
    slow = threading.Event()

    def slowly(*a):
        slow.set()
        time.sleep(1.1)

    monkeypatch.setattr("unimed_jax.serve.measures.likelihood_of", slowly)
    limits = dataclasses.replace(live.service.limits, seconds=0.8)
    monkeypatch.setattr(live.service, "limits", limits)
    status, _, content = live.post(TASKS, MEASURED | {"stream": stream})
    assert slow.is_set(), "it was late before"
    assert status == (200 if stream else 504) and "more than 0.8 seconds" in str(content)


def test_a_client_that_leaves_while_it_is_measured_leaves_no_work(live, monkeypatch):
    calls = []

    def slowly(*a):
        calls.append(a)
        time.sleep(0.3)

    monkeypatch.setattr("unimed_jax.serve.measures.likelihood_of", slowly)
    body = json.dumps(MEASURED).encode()
    with connected(live.port) as client:
        client.sendall(head(TASKS, len(body)) + body)
        live.until(lambda: calls, 10)
    live.until(lambda: not live.service.open, 10)
    live.post(TASKS, {"task": "qa", "question": "?", "routing": True})  # whose turn would come after
    assert len(calls) == 1, "the options were compared for nobody"


# ---- slow clients ------------------------------------------------------------------------------


def test_slow_and_broken_clients_are_let_go(live):
    """Headers and bodies that do not come, bytes that are not HTTP, and headers without end."""
    started = time.monotonic()
    assert what_slow_clients_got(slow_clients(live.port)) == []
    assert time.monotonic() - started < 15
    assert live.get("/health")[0] == 200


def test_more_connections_than_the_limit_are_closed(live):
    clients = [connected(live.port) for _ in range(LIMITS.connections + 5)]
    assert received(clients[-1]) == b""
    for client in clients:
        client.close()
    live.until(lambda: live.get("/health")[0] == 200, 10)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_let_go(live):
    """It asks again and again, until what it was answered fills all buffers on the way."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", live.port))
        with pytest.raises((ConnectionError, TimeoutError)) as error:
            for _ in range(20_000):
                client.sendall(b"GET /v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        assert not isinstance(error.value, TimeoutError)


def test_a_body_without_a_length_is_counted_as_it_comes(live):
    with connected(live.port) as client:
        lines = "POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall((lines + "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n").encode())
        piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        for _ in range(17):
            client.sendall(piece)
        client.sendall(b"0\r\n\r\n")
        assert b" 413 " in received(client)
    with connected(live.port) as client:  # and one whose header says too much is refused unread
        client.sendall(head(TASKS, 1 << 40, "Connection: close"))
        assert b" 413 " in client.recv(1000)


def test_bodies_in_memory_are_bounded_together(live):
    """Each of them is small enough, but not all at once."""
    half = b'{"a": "' + b"a" * ((1 << 20) - 4096)
    clients = [connected(live.port) for _ in range(10)]
    for client in clients:
        client.sendall(head(TASKS, len(half) + 2) + half)
    time.sleep(0.5)
    found = []
    for client in clients:
        client.sendall(b'"}')
        found.append(client.recv(1000)[9:12])
        client.close()
    assert set(found) == {b"400", b"429"} and found.count(b"429") <= 3


def test_a_model_that_cannot_answer_stops_the_server(live, capfd):
    """Found while the first answers are made, before anybody asks."""
    service = copy.copy(live.service)
    service.ready = False

    class Broken:
        async def ask(self, request):
            raise Refused(500, "the model failed on this request; ask again.", "internal_error")

    service.engine = Broken()
    asyncio.run(service.warm())
    assert service.failed.startswith("the model failed") and not service.ready

    async def one_look() -> bool:
        return await server_of(application(service), service.limits).on_tick(1)

    assert asyncio.run(one_look())
    service.failed = ""
    assert not asyncio.run(one_look())
