"""A decoder elsewhere gives the engine's answers: a stand-in decodes the embeddings that it is sent."""

import base64
import dataclasses
import http.server
import json
import threading

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
            return self.server.decode(embeddings, asked["max_tokens"], asked["stop_token_ids"])

    def reply(self, content):
        status, content = content if isinstance(content, tuple) else (200, content)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/v1/models")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

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


def test_faults_are_one_sentence(model, config, tokenizer, server, url):
    def refused(match, address=url):
        with pytest.raises(UserError, match=match) as error:
            RemoteDecoder(model, config, tokenizer, address, seconds=5).answers(REQUESTS[:1])
        assert str(error.value).endswith(".") and "\n" not in str(error.value)

    refused("does not start with http://", "file:///etc/passwd")
    refused("refused", "http://127.0.0.1:1/v1")
    for server.fault, match in (
        ((503, b"not\nready"), "status 503: not ready"),
        ((302, b""), "status 302"),
        (b"<html>", "Expecting value"),
        ({"data": []}, "lists no model"),
    ):
        refused(match)
    server.fault = None
    for server.answer, match in (
        ((400, {"error": {"message": "enable it"}}), "status 400.*enable it"),
        ({"choices": []}, "no token_ids"),
        ({"choices": [{"token_ids": [1 << 20]}]}, "vocabulary does not have"),
    ):
        refused(match)


def test_a_decoder_with_experts_is_refused(model, config, tokenizer, url):
    moe = dataclasses.replace(config.model, moe=MoeConfig(experts=2))
    with pytest.raises(UserError, match="has experts"):
        RemoteDecoder(model, dataclasses.replace(config, model=moe), tokenizer, url)
