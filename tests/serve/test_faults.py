"""Every fault has its status and one sentence; nothing is executed, fetched, opened, logged or kept."""

import json
import socket
import struct
import time
import zlib

import numpy as np
import pytest
from serve.conftest import png, square, url

from unimed_jax.serve.app import application, names_of

CHAT, TASKS, IMAGES = "/v1/chat/completions", "/v1/tasks", "/v1/images"
SQUARE = url(square(0))


def shown(link, text="[vqa] What is it?"):
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": link}}]
    return {"messages": [{"role": "user", "content": content}]}


def said(*texts, **more):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages} | more


def bomb(width=12_000, height=12_000) -> bytes:
    """A PNG whose header says 12,000 x 12,000 pixels, as small as such a file can be."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(width + 1) * 60, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOXED = {"task": "identify", "images": [SQUARE]}
ASKED = {"task": "vqa", "question": "a"}
REFER = {"task": "refer", "question": "a"}
TEXT = {"task": "qa", "question": "a"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:1/x.png"/></svg>'
HTML = b"<!doctype html><html><script>alert(1)</script></html>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/owned) (w) file closefile\nshowpage\n"

FAULTS = {
    # pictures
    "http": (CHAT, shown("http://127.0.0.1:1/a.png"), 400, "never opened"),
    "https": (CHAT, shown("https://example.com/a.png"), 400, "never opened"),
    "private address": (CHAT, shown("http://169.254.169.254/latest/meta-data"), 400, "never opened"),
    "file": (CHAT, shown("file:///etc/passwd"), 400, "never opened"),
    "path": (CHAT, shown("../../etc/passwd"), 400, "never opened"),
    "ftp": (IMAGES, {"image": "ftp://127.0.0.1/a.png"}, 400, "never opened"),
    "data of a page": (CHAT, shown(url(HTML, "text/html")), 400, "send a picture"),
    "page": (CHAT, shown(url(HTML)), 400, "page"),
    "svg": (CHAT, shown(url(SVG, "image/svg+xml")), 400, "none of the formats"),
    "svg as png": (IMAGES, {"image": url(SVG)}, 400, "none of the formats"),
    "eps": (IMAGES, {"image": url(EPS)}, 400, "none of the formats"),
    "pdf": (IMAGES, {"image": url(b"%PDF-1.7\n")}, 400, "none of the formats"),
    "empty picture": (CHAT, shown("data:image/png;base64,"), 400, "empty"),
    "cut webp": (CHAT, shown(url(png(square(0), "WEBP")[:40], "image/webp")), 400, "cannot be read"),
    "cut png": (CHAT, shown(url(png(np.full((64, 64, 3), 9, np.uint8))[:60])), 400, "cannot be read"),
    "not base64": (CHAT, shown("data:image/png;base64,@@@"), 400, "not base64"),
    "base64 of another alphabet": (CHAT, shown("data:image/png;base64,é"), 400, "not base64"),
    "base64 without its end": (CHAT, shown("data:image/png;base64,abc"), 400, "not base64"),
    "percent": (CHAT, shown("data:image/png,%89PNG"), 400, "not base64"),
    "too many pixels": (CHAT, shown(url(bomb())), 400, "12000 x 12000"),
    "far too many pixels": (IMAGES, {"image": url(bomb(60_000, 60_000))}, 400, "3600000000 pixels"),
    "too many images": (TASKS, {"images": [SQUARE] * 5, "question": "?"}, 400, "more than the 4"),
    "an image that is a number": (TASKS, {"images": [7], "question": "?"}, 400, "is a number"),
    "a frame that is not there": (IMAGES, {"image": SQUARE, "frame": 3}, 400, "no frame 3"),
    "a window of a png": (IMAGES, {"image": SQUARE, "window": "lung"}, 400, "fits DICOM alone"),
    "an unknown window": (IMAGES, {"image": SQUARE, "window": "lungs"}, 400, "did you mean 'lung'"),
    "a window of no width": (IMAGES, {"image": SQUARE, "window": [1, 0]}, 400, "width"),
    "no image": (IMAGES, {}, 400, "is missing"),
    # bodies
    "no JSON": (CHAT, b"nothing", 400, "is not JSON"),
    "no text": (CHAT, b"\xff\xfe\x00", 400, "not UTF-8"),
    "empty body": (CHAT, b"", 400, "is not JSON"),
    "deep": (CHAT, b"[" * 100_000 + b"]" * 100_000, 400, "nested too deep"),
    "NaN": (TASKS, b'{"task": "qa", "question": "?", "temperature": NaN}', 400, "NaN is not a number"),
    "infinite": (TASKS, b'{"task": "qa", "question": "?", "temperature": 1e999}', 400, "too large"),
    "a key twice": (TASKS, b'{"task": "qa", "task": "vqa"}', 400, "twice"),
    "half of a pair": (TASKS, b'{"task": "qa", "question": "\\ud800"}', 400, "surrogate"),
    "a list": (CHAT, [1], 400, "is a list, not an object"),
    "too large": (CHAT, shown("data:image/png;base64," + "A" * (1 << 20)), 413, "1048576 bytes"),
    # values
    "no messages": (CHAT, {}, 400, "must end with one of the role 'user'"),
    "messages of another type": (CHAT, {"messages": "hi"}, 400, "is a text, not a list"),
    "a message of another type": (CHAT, {"messages": ["hi"]}, 400, "message 0 is a text"),
    "content of another type": (CHAT, said(7), 400, "is a number"),
    "a part of another type": (CHAT, said([{"type": "input_audio"}]), 400, "send text or image_url"),
    "a part without a type": (CHAT, said([{}]), 400, "'type' of part 0 of message 0 is missing"),
    "a tool": (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "use system, user"),
    "out of turn": (CHAT, {"messages": said("a")["messages"] * 2}, 400, "out of turn"),
    "an answer last": (CHAT, said("a", "b"), 400, "must end with one of the role 'user'"),
    "an image of the assistant": (
        CHAT,
        {"messages": [{"role": "assistant", "content": shown(SQUARE)["messages"][0]["content"]}]},
        400,
        "only those of 'user' may",
    ),
    "10,000 turns": (CHAT, said(*["a", "b"] * 10_000, "c"), 400, "20001 entries"),
    "long turns": (CHAT, said(*["why " * 900] * 9), 400, "leave out the oldest turns"),
    "a long question": (TASKS, {"task": "qa", "question": "a" * 4001}, 400, "4001 characters"),
    "too long for the model": (TASKS, {"task": "qa", "question": "why " * 400}, 400, "the model reads 160"),
    "temperature": (CHAT, said("a", temperature=-1), 400, "from 0 to 2"),
    "a tiny temperature": (CHAT, said("a", temperature=1e-9), 400, "0.01"),
    "temperature as text": (CHAT, said("a", temperature="0"), 400, "is a text, not a number"),
    "no tokens": (CHAT, said("a", max_tokens=0), 400, "from 1"),
    "negative tokens": (CHAT, said("a", max_tokens=-5), 400, "from 1"),
    "tokens and a half": (CHAT, said("a", max_tokens=1.5), 400, "not a whole number"),
    "a flag as a number": (CHAT, said("a", stream=1), 400, "not true or false"),
    "an endless seed": (CHAT, said("a", seed=10**30), 400, "must lie from"),
    "tools": (CHAT, said("a", tools=[{}]), 400, "not supported"),
    "an unknown task": (CHAT, said("a", task="vqaa"), 400, "did you mean 'vqa'"),
    "two tasks": (CHAT, said("[qa] a", task="vqa"), 400, "leave one of them out"),
    "an image for qa": (CHAT, shown(SQUARE, "[qa] a"), 400, "is text only"),
    "vqa without an image": (CHAT, said("[vqa] a"), 400, "needs an image"),
    "no question": (CHAT, said(" "), 400, "needs a question"),
    "two images for refer": (TASKS, {**REFER, "images": [SQUARE] * 2}, 400, "one image"),
    "an unknown field": (TASKS, {"task": "qa", "qestion": "a"}, 400, "did you mean 'question'"),
    "a box of three": (TASKS, {**BOXED, "box": [1, 2, 3]}, 400, "four numbers"),
    "a box of texts": (TASKS, {**BOXED, "box": ["1"] * 4}, 400, "four numbers"),
    "a box outside": (TASKS, {**BOXED, "box": [-1, 0, 9, 9]}, 400, "leaves its image"),
    "a box turned over": (TASKS, {**BOXED, "box": [9, 9, 1, 1]}, 400, "is empty"),
    "a thin box": (TASKS, {**BOXED, "box": [1, 1, 1.1, 9]}, 400, "thinner"),
    "a box of words": (TASKS, {**BOXED, "question": "there"}, 400, "hundredths"),
    "a box for vqa": (TASKS, {**ASKED, "images": [SQUARE], "box": [1, 1, 9, 9]}, 400, "takes no box"),
    "options twice": (TASKS, {**TEXT, "options": ["a", "a"]}, 400, "different texts"),
    "too many options": (TASKS, {**TEXT, "options": ["a"] * 33}, 400, "more than the 32"),
    "history of texts": (TASKS, {**TEXT, "history": ["a"]}, 400, "turn 0 of 'history'"),
    "history without an answer": (
        TASKS, {"task": "qa", "question": "a", "history": [{"question": "b"}]}, 400, "is missing",
    ),
    # paths
    "another path": ("/v1/completions", {}, 404, "nothing at this path"),
    "a path out": ("/page/..%2f..%2f..%2fetc%2fpasswd", {}, 404, "nothing at this path"),
    "another method": ("/v1/models", {}, 405, "does not take that method"),
}  # fmt: skip


def test_every_fault_has_its_status_and_one_sentence(live, trace, capfd):
    wrong = []
    live.post(
        TASKS, {"task": "vqa", "question": "?", "images": [url(png(square(0), "WEBP"))]}
    )  # imports
    with trace as events:
        for name, (path, body, status, words) in FAULTS.items():
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


def harmless(event) -> bool:
    """Whether it reads a module of Python's own, or how much memory the machine has."""
    kind, path, *mode = event
    reads = kind == "open" and (mode or ["r"])[0] in ("r", "rb", "None")
    return reads and (path.endswith((".py", ".pyc", ".so")) or path.startswith(("/sys/", "/proc/")))


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


# ---- who asks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, status, words",
    [
        ({"Host": "evil.example"}, 421, "under that name"),
        ({"Host": "localhost:9"}, 200, ""),
        ({"Origin": "http://evil.example"}, 403, "another site"),
        ({"Origin": "null"}, 403, "another site"),
        ({"Sec-Fetch-Site": "cross-site"}, 403, "another site"),
        ({"Sec-Fetch-Site": "same-origin"}, 200, ""),
        ({"Content-Type": "text/plain"}, 415, "must be JSON"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415, "must be JSON"),
    ],
)
def test_browsers_of_other_sites_are_kept_out(live, headers, status, words):
    found, _, content = live.post(TASKS, {"task": "qa", "question": "?"}, **headers)
    assert found == status and words in json.dumps(content)


def test_a_token_is_asked_for_where_it_is_set(live):
    """The guard by itself, which no request passes without the token."""
    import asyncio

    app = application(live.service, names_of("0.0.0.0"), token="s3cret-s3cret-s3cret")

    def status(path, authorization=None, method="GET"):
        headers = [(b"host", b"any")]
        headers += [(b"authorization", authorization.encode("latin-1"))] if authorization else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        asyncio.run(app(scope, receive, send))
        return sent[0]["status"]

    for path in ("/v1/models", "/metrics", "/v1/tasks"):
        assert status(path) == status(path, "Bearer wrong") == status(path, "Bearer é") == 401
        assert status(path, "Basic s3cret-s3cret-s3cret") == 401
        assert status(path, "Bearer s3cret-s3cret-s3cret") == 200
    assert status("/health") == 200 and status("/v1/images", method="POST") == 401
    assert names_of("127.0.0.1") and names_of("::1") and names_of("localhost") and not names_of("::")


# ---- slow clients ------------------------------------------------------------------------------


def connected(live) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    return found


def received(client: socket.socket) -> bytes:
    """Everything that comes until the other side closes, or b"" if it breaks off."""
    found = b""
    try:
        while part := client.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def head(path, length, **more) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {length}", *(f"{name}: {value}" for name, value in more.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_slow_and_broken_clients_are_let_go(live):
    """Headers and bodies that do not come, what is no HTTP, and headers without end."""
    clients = {
        name: connected(live) for name in ("silent", "headers", "body", "no HTTP", "long", "left")
    }
    started = time.monotonic()
    clients["headers"].sendall(b"POST /v1/tasks HTTP/1.1\r\nHost: loc")
    clients["body"].sendall(head(TASKS, 100) + b'{"task": ')
    clients["no HTTP"].sendall(b"\x16\x03\x01\x00\xff nothing\r\n\r\n")
    clients["long"].sendall(b"GET /health HTTP/1.1\r\nA: " + b"a" * 100_000)
    clients["left"].sendall(head(TASKS, 100) + b'{"task": ')
    clients.pop("left").close()
    found = {name: received(client) for name, client in clients.items()}
    for client in clients.values():
        client.close()
    assert time.monotonic() - started < 12
    assert found["silent"] == found["headers"] == b""
    assert b" 408 " in found["body"] and b"did not come within 2 seconds" in found["body"]
    assert found["no HTTP"].startswith(b"HTTP/1.1 400 ") and found["long"].startswith(b"HTTP/1.1 400 ")
    assert live.get("/health")[0] == 200


def test_a_body_without_a_length_is_counted_as_it_comes(live):
    with connected(live) as client:
        lines = "POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall((lines + "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n").encode())
        piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        for _ in range(17):
            client.sendall(piece)
        client.sendall(b"0\r\n\r\n")
        assert b" 413 " in received(client)
    with connected(live) as client:  # and one whose header says too much is refused unread
        client.sendall(head(TASKS, 1 << 40, Connection="close"))
        assert b" 413 " in client.recv(1000)


def test_bodies_in_memory_are_bounded_together(live):
    """Each of them is small enough, but not all at once."""
    half = b'{"a": "' + b"a" * ((1 << 20) - 4096)
    clients = [connected(live) for _ in range(10)]
    for client in clients:
        client.sendall(head(TASKS, len(half) + 2) + half)
    time.sleep(0.5)
    found = []
    for client in clients:
        client.sendall(b'"}')
        found.append(client.recv(1000)[9:12])
        client.close()
    assert set(found) == {b"400", b"429"} and found.count(b"429") <= 3
