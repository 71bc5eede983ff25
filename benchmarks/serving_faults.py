"""Lists faulty requests to a server, each with the status and the words that must answer it."""

import base64
import math
import socket
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

CHAT, TASKS, IMAGES = "/v1/chat/completions", "/v1/tasks", "/v1/images"


class Fault(NamedTuple):
    """Holds a request and what must answer it."""

    path: str
    body: Any  # bytes, or what becomes JSON
    status: int
    words: str  # in the sentence


def url(content: bytes, media: str = "image/png") -> str:
    """Makes a data URL."""
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def png(width: int, height: int, rows: bytes) -> bytes:
    """Writes a grey PNG; rows: each a 0 and `width` bytes, or fewer of them than the header says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def bomb(side: int) -> bytes:
    """Makes a PNG whose header says side x side pixels; the file is small."""
    return png(side, side, bytes(side + 1) * 60)


def shown(link: Any, text: str = "[vqa] What is it?") -> dict[str, Any]:
    """Asks a chat about one image."""
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": link}}]
    return {"messages": [{"role": "user", "content": content}]}


def said(*texts: Any, **more: Any) -> dict[str, Any]:
    """Asks a chat without images, in turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages} | more


SQUARE = url(png(32, 32, (b"\0" + bytes(range(0, 256, 8))) * 32))
BOXED = {"task": "identify", "images": [SQUARE]}
SEEN = {"task": "vqa", "question": "a", "images": [SQUARE]}
REFER = {"task": "refer", "question": "a"}
TEXT = {"task": "qa", "question": "a"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:1/x.png"/></svg>'
HTML = b"<!doctype html><html><script>alert(1)</script></html>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(owned) (w) file closefile\nshowpage\n"
WEBP = b"RIFF\x24\0\0\0WEBPVP8 \x18\0\0\0"  # cut off there


def faults(limits: Mapping[str, int]) -> dict[str, Fault]:
    """Makes the table for a server with these limits (`GET /v1/tasks`)."""
    most, long = limits["images"] + 1, limits["question"]
    found: dict[str, tuple[str, Any, int, str]] = {
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
        "cut webp": (CHAT, shown(url(WEBP, "image/webp")), 400, "cannot be read"),
        "cut png": (CHAT, shown(url(png(64, 64, bytes(65) * 64)[:60])), 400, "cannot be read"),
        "not base64": (CHAT, shown("data:image/png;base64,@@@"), 400, "not base64"),
        "base64 of another alphabet": (CHAT, shown("data:image/png;base64,é"), 400, "not base64"),
        "base64 without its end": (CHAT, shown("data:image/png;base64,abc"), 400, "not base64"),
        "percent": (CHAT, shown("data:image/png,%89PNG"), 400, "not base64"),
        "base64 in lines": (IMAGES, {"image": SQUARE.replace("A", "A\n")}, 400, "without line breaks"),
        "too many pixels": (CHAT, shown(url(bomb(12_000))), 400, "12000 x 12000"),
        "a few pixels too many": (
            CHAT, shown(url(bomb(math.isqrt(limits["pixels"]) + 1))), 400, "by its header, more than",
        ),
        "far too many pixels": (IMAGES, {"image": url(bomb(60_000))}, 400, "3600000000 pixels"),
        "too many images": (TASKS, {"images": [SQUARE] * most, "question": "?"}, 400, "images, more"),
        "an image that is a number": (TASKS, {"images": [7], "question": "?"}, 400, "is a number"),
        "a frame that is not there": (IMAGES, {"image": SQUARE, "frame": 3}, 400, "no frame 3"),
        "a window of a png": (IMAGES, {"image": SQUARE, "window": "lung"}, 400, "fits DICOM alone"),
        "an unknown window": (IMAGES, {"image": SQUARE, "window": "lungs"}, 400, "did you mean 'lung'"),
        "an endless window": (IMAGES, {"image": SQUARE, "window": [10**400, 1]}, 400, "a centre from"),
        "a window of no width": (IMAGES, {"image": SQUARE, "window": [1, 0]}, 400, "width"),
        "no image": (IMAGES, {}, 400, "is missing"),
        # bodies
        "no JSON": (CHAT, b"nothing", 400, "is not JSON"),
        "no text": (CHAT, b"\xff\xfe\x00", 400, "not UTF-8"),
        "empty body": (CHAT, b"", 400, "is not JSON"),
        "deep": (CHAT, b"[" * 100_000 + b"]" * 100_000, 400, "nested too deep"),
        "many values": (CHAT, b"[" + b"[]," * 150_000 + b"0]", 400, "values; send fewer"),
        "a head without end": (IMAGES, {"image": "data:" + ";" * 300_000}, 400, "never opened"),
        "NaN": (TASKS, b'{"temperature": NaN}', 400, "NaN is not a number"),
        "infinite": (TASKS, b'{"temperature": 1e999}', 400, "too large"),
        "a key twice": (TASKS, b'{"task": "qa", "task": "vqa"}', 400, "twice"),
        "half of a pair": (TASKS, b'{"task": "qa", "question": "\\ud800"}', 400, "surrogate"),
        "a list": (CHAT, [1], 400, "is a list, not an object"),
        "too large": (CHAT, b' ' * (limits["bytes"] + 1), 413, "bytes that are read"),
        # values
        "no messages": (CHAT, {}, 400, "must end with one of the role 'user'"),
        "messages of another type": (CHAT, {"messages": "hi"}, 400, "is a text, not a list"),
        "a message of another type": (CHAT, {"messages": ["hi"]}, 400, "message 0 is a text"),
        "content of another type": (CHAT, said(7), 400, "is a number"),
        "a part of another type": (CHAT, said([{"type": "input_audio"}]), 400, "send text or image_url"),
        "a part without a type": (CHAT, said([{}]), 400, "'type' of part 0 of message 0 is missing"),
        "a tool": (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "use system, user"),
        "out of turn": (CHAT, {"messages": said("a", "b")["messages"][1:]}, 400, "out of turn"),
        "an answer last": (CHAT, said("a", "b"), 400, "must end with one of the role 'user'"),
        "an image of the assistant": (
            CHAT,
            {"messages": [{**shown(SQUARE)["messages"][0], "role": "assistant"}]},
            400,
            "only those of 'user' may",
        ),
        "10,000 turns": (CHAT, said(*["a", "b"] * 10_000, "c"), 400, "20001 entries"),
        "long turns": (CHAT, said(*["a " * (long // 2)] * 9), 400, "leave out the oldest turns"),
        "a long question": (TASKS, {"task": "qa", "question": "a" * (long + 1)}, 400, "shorten it"),
        # a word is a token at least, and most prompts have no place for 6,000 of them
        "too long for the model": (
            CHAT, said(*["a " * (long // 2 - 1)] * 3), 400, "tokens with its images",
        ),
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
        "a box for vqa": (TASKS, {**SEEN, "box": [1, 1, 9, 9]}, 400, "takes no box"),
        "options twice": (TASKS, {**TEXT, "options": ["a", "a"]}, 400, "different texts"),
        "too many options": (TASKS, {**TEXT, "options": ["a"] * 33}, 400, "more than the 32"),
        "history of texts": (TASKS, {**TEXT, "history": ["a"]}, 400, "turn 0 of 'history'"),
        "history of another task": (
            TASKS, {**SEEN, "history": [{"question": "[qa] a", "answer": "b"}]}, 400, "0 begins with",
        ),
        "history of an image": (CHAT, said("[vqa] a", "b", "c"), 400, "[vqa], which needs an image"),
        "history without an answer": (
            TASKS, {"task": "qa", "question": "a", "history": [{"question": "b"}]}, 400, "is missing",
        ),
        # paths
        "another path": ("/v1/completions", {}, 404, "nothing at this path"),
        "a path with a slash more": ("/v1/tasks/", {}, 404, "nothing at this path"),
        "a path out": ("/page/..%2f..%2f..%2fetc%2fpasswd", {}, 404, "nothing at this path"),
        "another method": ("/v1/models", {}, 405, "does not take that method"),
    }  # fmt: skip
    return {name: Fault(*fault) for name, fault in found.items()}


# ---- plain sockets -------------------------------------------------------------------------------


def head(path: str, length: int, *more: str) -> bytes:
    """Writes the headers of a request whose body has `length` bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return ("\r\n".join([*lines, f"Content-Length: {length}", *more]) + "\r\n\r\n").encode()


def connected(port: int, seconds: float = 60) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=seconds)


def received(client: socket.socket) -> bytes:
    """Returns all that comes until the other side closes or breaks off."""
    found = b""
    try:
        while part := client.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def slow_clients(port: int) -> dict[str, socket.socket]:
    """Connects clients that send nothing, too slowly, no HTTP, or leave in the middle."""
    names = ("silent", "headers", "body", "no HTTP", "long headers", "left")
    clients = {name: connected(port) for name in names}
    clients["headers"].sendall(b"POST /v1/tasks HTTP/1.1\r\nHost: loc")
    clients["body"].sendall(head(TASKS, 100) + b'{"task": ')
    clients["no HTTP"].sendall(b"\x16\x03\x01\x00\xff nothing\r\n\r\n")
    clients["long headers"].sendall(b"GET /health HTTP/1.1\r\nA: " + b"a" * 100_000)
    clients["left"].sendall(head(TASKS, 100) + b'{"task": ')
    clients.pop("left").close()
    return clients


def what_slow_clients_got(clients: Mapping[str, socket.socket]) -> list[str]:
    """Waits for the ends of slow clients, and names those whose end was another than it should be."""
    starts = {
        "silent": b"",
        "headers": b"",
        "body": b"HTTP/1.1 408 ",
        "no HTTP": b"HTTP/1.1 400 ",
        "long headers": b"HTTP/1.1 400 ",
    }
    wrong = []
    for name, client in clients.items():
        found = received(client)
        client.close()
        if not (found.startswith(starts[name]) if starts[name] else found == b""):
            wrong.append(f"{name}: {found[:60]!r}")
    return wrong


# ---- what a server opened ------------------------------------------------------------------------

WATCHED = ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec")


def harmless(event: tuple[str, ...]) -> bool:
    """Says whether an audit event reads a module of Python's own, or how much memory there is."""
    kind, path, mode = event
    reads = kind == "open" and mode in ("r", "rb", "None")
    return reads and (path.endswith((".py", ".pyc", ".so")) or path.startswith(("/sys/", "/proc/")))
