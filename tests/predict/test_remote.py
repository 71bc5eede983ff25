"""A decoder elsewhere gives the engine's answers: a stand-in decodes the embeddings that it is sent."""

import base64
import contextlib
import dataclasses
import http.server
import json
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.fake_brain import Squares, tiny_config

from unimed_jax.config import MoeConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.tensors.torch_file import TorchFile
from unimed_jax.model.cache import Span
from unimed_jax.predict import remote as remote_module
from unimed_jax.predict.predictor import Predictor
from unimed_jax.predict.remote import RemoteDecoder
from unimed_jax.predict.request import Request
from unimed_jax.settings import from_config_dict

pytestmark = pytest.mark.usefixtures("quick_compiles")
PICTURE = Squares().image("test0")
REQUESTS = [
    Request("vqa", "What colour is the square?", (PICTURE,)),
    Request("qa", "Which chapter?"),
    Request("refer", "red square", (PICTURE,), max_new_tokens=3),
]


@pytest.fixture(scope="module")
def config():
    settings = tiny_config()
    settings.evaluate.batch, settings.evaluate.max_new_tokens = 2, 5
    return from_config_dict(settings)


@pytest.fixture(scope="module")
def model(config):
    return tiny.sharp_model(config.model)


class StandIn(http.server.BaseHTTPRequestHandler):
    """Serves a decoder as vLLM does: embeddings in, greedy ids out."""

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers), None))
        self.reply(self.server.fault or {"data": [{"id": "it"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), asked))
        self.reply(self.server.answer or {"choices": [{"token_ids": self.tokens(asked)}]})

    def tokens(self, asked):
        with self.server.lock:  # one JAX program at a time is enough here
            file = self.server.folder / "embeddings.pt"
            file.write_bytes(base64.b64decode(asked["prompt_embeds"]))
            sent = TorchFile(file)
            embeddings = sent.read(sent.tree)
            assert embeddings.dtype == np.float32
            return self.server.decode(embeddings, asked["max_tokens"], asked["stop_token_ids"])

    def reply(self, content):
        status, content = content if isinstance(content, tuple) else (200, content)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/v1/models")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side need not wait for all of it
            for start in range(0, len(body), self.server.piece):
                time.sleep(self.server.pause)
                self.wfile.write(body[start : start + self.server.piece])

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server(model, config, tmp_path_factory):
    length = config.text.max_prompt + config.evaluate.max_new_tokens

    @jax.jit
    def following(x, count):  # [S, D]: the id after the first `count` vectors
        ones, places = jnp.ones((1, length), jnp.int32), jnp.arange(length)[None]
        hidden = model.decoder(x[None], Span(places, ones, ones)).hidden
        return model.decoder.logits(hidden[0, count - 1]).argmax()

    def decode(embeddings, most, stops):
        x = np.zeros((length, embeddings.shape[1]), np.float32)
        x[: len(embeddings)], count, found = embeddings, len(embeddings), []
        while len(found) < most and not set(found) & set(stops):
            found.append(int(following(x, count)))
            x[count] = np.asarray(model.decoder.embed(jnp.array([[found[-1]]]), jnp.float32))[0, 0]
            count += 1
        return found

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.seen, server.fault, server.answer, server.lock = [], None, None, threading.Lock()
    server.folder, server.decode = tmp_path_factory.mktemp("sent"), decode
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server):
    server.fault = server.answer = None
    server.piece, server.pause = 1 << 30, 0.0
    server.seen.clear()
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def test_answers_are_those_of_the_engine(model, config, tokenizer, server, url):
    remote = RemoteDecoder(model, config, tokenizer, url + "/", key="secret")
    assert remote.answers(REQUESTS) == Predictor(model, config, tokenizer).answers(REQUESTS)
    paths = [path for path, *_ in server.seen]
    assert paths == ["/v1/models", *["/v1/completions"] * 3]
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer secret"}
    asked = [content for *_, content in server.seen[1:]]
    assert sorted(one["max_tokens"] for one in asked) == [3, 5, 5]
    assert {one["model"] for one in asked} == {"it"} and {one["temperature"] for one in asked} == {0.0}


def test_faults_are_one_sentence(model, config, tokenizer, server, url, monkeypatch):
    def refused(match, address=url, seconds=5.0, key=""):
        with pytest.raises(UserError, match=match) as error:
            remote = RemoteDecoder(model, config, tokenizer, address, key=key, seconds=seconds)
            remote.answers(REQUESTS[:1])
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
        assert "secret" not in str(error.value)

    for address, match in (
        ("file:///etc/secret", "does not start with http://"),
        ("http:///v1", "does not start with http://"),
        ("http://127.0.0.1:secret/v1", "no host and port"),
        ("http://[secret/v1", "no host and port"),
        (url.replace("//", "//user:secret@"), "holds a user"),
        (f"{url}?key=secret", "holds a user or a query"),
        (f"{url} secret", "characters that none can have"),
        ("http://127.0.0.1:1/v1", "Connection refused"),
    ):
        refused(match, address)
    refused("key has characters", key="secret\n")
    server.seen.clear()
    for server.fault, match in (
        ((503, b"not\nready"), "status 503: not ready"),
        ((302, b""), "status 302"),
        (b"<html>", "Expecting value"),
        (b"[" * 5000, "nested too deep"),
        ((204, b""), "status 204"),
        ({"data": []}, "lists no model"),
    ):
        refused(match)
    assert {path for path, *_ in server.seen} == {"/v1/models"}  # none was followed elsewhere
    server.fault = None
    for server.answer, match in (
        ((400, {"error": {"message": "enable it"}}), "status 400.*enable it"),
        ({"choices": []}, "no token_ids"),
        ({"choices": [{"token_ids": None}]}, "no token_ids"),
        ({"choices": [{"token_ids": [config.model.decoder.vocab]}]}, "vocabulary does not have"),
        ({"choices": [{"token_ids": [-1]}]}, "vocabulary does not have"),
        ({"choices": [{"token_ids": [1.5]}]}, "vocabulary does not have"),
        ({"choices": [{"token_ids": [9] * 6}]}, "returned 6 tokens, where 5"),
    ):
        refused(match)
    server.answer = None
    monkeypatch.setattr(remote_module, "LARGEST", 10)
    refused("more than 0 MiB")
    server.piece, server.pause = 1, 0.1  # 25 bytes: no piece is late, but all together are
    refused("did not answer within 0.4 s", seconds=0.4)


@pytest.mark.parametrize(
    "said", [b"no http at all\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000]
)
def test_what_does_not_speak_http_is_one_sentence(model, config, tokenizer, said):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            there, _ = listening.accept()
            with there, contextlib.suppress(OSError):
                there.recv(1 << 16)
                there.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="does not answer as it should"):
            RemoteDecoder(model, config, tokenizer, url, seconds=5)
        thread.join()


def test_tokens_end_with_the_end_of_text(model, config, tokenizer, server, url):
    remote = RemoteDecoder(model, config, tokenizer, url)
    server.answer = {"choices": [{"token_ids": [9, tokenizer.eos, 9]}]}
    assert remote.tokens(REQUESTS[:1]) == [[9, tokenizer.eos]]
    server.answer = {"choices": [{"token_ids": []}]}
    assert remote.tokens(REQUESTS[:1]) == [[]]


@pytest.mark.parametrize("batch", [0, -1])
def test_no_batch_is_refused(model, config, tokenizer, url, batch):
    with pytest.raises(UserError, match=f"batch={batch} .* at least 1"):
        RemoteDecoder(model, config, tokenizer, url).answers(REQUESTS, batch)


def test_a_decoder_with_experts_is_refused(model, config, tokenizer, url):
    moe = dataclasses.replace(config.model, moe=MoeConfig(experts=2))
    with pytest.raises(UserError, match="has experts"):
        RemoteDecoder(model, dataclasses.replace(config, model=moe), tokenizer, url)
