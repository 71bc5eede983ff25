"""Answers requests with a decoder that another engine serves, such as vLLM.

The images are encoded here, and the whole prompt is sent as embeddings, which need no agreement about
prompts, image slots or tokenizers: the other side is any server of OpenAI's completions that takes
`prompt_embeds` (vLLM with --enable-prompt-embeds), with the folder that `export --format=decoder`
wrote. docs/vllm.md says how.
"""

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import jax
import numpy as np
from jax.sharding import Mesh

from unimed_jax.config import Config
from unimed_jax.data import layout
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.tensors.torch_file import dump_torch
from unimed_jax.model.sharding import inside
from unimed_jax.model.unimed import Batch, UniMed
from unimed_jax.parsing import parse_json
from unimed_jax.predict.plain import rows_of
from unimed_jax.predict.request import Prompt, Prompts, Request, at_least_one
from unimed_jax.predict.text import text_of

LARGEST = 16 << 20  # bytes of the other side's reply


class RemoteDecoder:
    """Answers requests with this model's encoder and connector, and a decoder elsewhere.

    Of the model only encoder, connector and embeddings are used. Two threads may not call it at once.
    """

    def __init__(
        self,
        model: UniMed,
        config: Config,
        tokenizer: Tokenizer,
        url: str,
        mesh: Mesh | None = None,
        key: str = "",
        seconds: float = 120.0,
    ):
        """Asks the other side which model it has.

        url: up to and with /v1; key: which it wants as a bearer token; seconds: that an answer may
        take, from the first byte sent to the last one received. Raises UserError if it cannot be
        reached, and for a decoder with experts, of which no export exists that it could serve.
        """
        self._url, self._host, self._path, self._connection = _address(url)
        if not (key.isascii() and key.isprintable()):
            raise UserError("the decoder's key has characters that no header can hold; give it again.")
        if config.model.moe.experts:
            raise UserError(
                "the decoder of this model has experts, which export --format=decoder cannot write; "
                "serve the run itself."
            )
        self._key, self._seconds = key, seconds
        self._model, self._config, self._tokenizer, self._mesh = model, config, tokenizer, mesh
        self._prompts = Prompts(config, tokenizer)
        try:
            self._name = str(self._called("models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise self._odd(f"it lists no model ({error!r})") from error

    def answers(self, requests: Sequence[Request], batch: int | None = None) -> list[str]:
        """Answers all requests, in order, at most `batch` at once (default: `config.evaluate.batch`).

        Raises UserError for a request that does not fit its task, and for what the other side refuses.
        """
        return [text_of(self._tokenizer, row) for row in self.tokens(requests, batch)]

    def tokens(self, requests: Sequence[Request], batch: int | None = None) -> list[list[int]]:
        """Returns the ids of the answers, in order, each up to and with the end of text."""
        batch = at_least_one("batch", self._config.evaluate.batch if batch is None else batch)
        found: list[list[int]] = []
        with ThreadPoolExecutor(batch, "decoder") as threads:
            for start in range(0, len(requests), batch):
                prompts = [self._prompts(request) for request in requests[start : start + batch]]
                found += threads.map(self._answer, prompts, self._embeddings(prompts, batch))
        return found

    def _embeddings(self, prompts: Sequence[Prompt], batch: int) -> list[np.ndarray]:
        """Embeds prompts with their visual tokens: float [tokens of the prompt, D] each."""
        groups = [layout.Group((prompt.encoded,), self._prompts.pixels(prompt)) for prompt in prompts]
        rows = rows_of(groups, self._config, self._tokenizer.pad, batch)
        with inside(self._mesh):
            embedded = np.asarray(_embedded(self._model, rows), np.float32)  # [B, S, D]
        pairs = zip(embedded, prompts, strict=False)  # rows beyond the prompts are copies
        return [row[len(row) - prompt.encoded.tokens :] for row, prompt in pairs]

    def _answer(self, prompt: Prompt, embeddings: np.ndarray) -> list[int]:
        out = io.BytesIO()
        dump_torch(out, embeddings)
        reply = self._called(
            "completions",
            {
                "model": self._name,
                "prompt_embeds": base64.b64encode(out.getvalue()).decode(),
                "max_tokens": prompt.most,
                "temperature": prompt.temperature,
                "top_p": self._config.evaluate.top_p,
                "seed": prompt.seed,
                "stop_token_ids": [self._tokenizer.eos],
                "skip_special_tokens": False,
                "return_token_ids": True,
            },
        )
        try:
            tokens = list(reply["choices"][0]["token_ids"])
        except (KeyError, IndexError, TypeError) as error:
            raise self._odd(f"its reply has no token_ids ({error!r})") from error
        vocabulary = range(self._config.model.decoder.vocab)
        if not all(type(token) is int and token in vocabulary for token in tokens):
            raise self._odd("it returned ids that this model's vocabulary does not have")
        if len(tokens) > prompt.most:
            raise self._odd(f"it returned {len(tokens)} tokens, where {prompt.most} were asked for")
        eos = self._tokenizer.eos
        return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens

    def _called(self, place: str, content: Any = None) -> Any:
        """Sends a request to the other side and returns its reply."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        method, body = ("GET", None) if content is None else ("POST", json.dumps(content).encode())
        # http.client follows no redirect and no proxy of the environment: what is sent is for the
        # address that was given.
        connection = self._connection(self._host, timeout=self._seconds)
        late = threading.Event()
        try:
            with _ended_after(connection, self._seconds, late):
                connection.request(method, f"{self._path}/{place}", body, headers)
                with connection.getresponse() as reply:
                    read = reply.read(LARGEST + 1 if reply.status == 200 else 2000)
            if late.is_set():  # where a reply has no length, its end looks like any other
                raise TimeoutError
        except (OSError, ValueError, http.client.HTTPException) as error:
            slow = late.is_set() or isinstance(error, TimeoutError)
            raise self._odd(
                f"it did not answer within {self._seconds:g} s"
                if slow
                else str(getattr(error, "strerror", None) or error or type(error).__name__)
            ) from error
        if reply.status != 200:
            said = " ".join(read.decode(errors="replace").split())[:300]
            raise self._odd(f"it answered with status {reply.status}: {said}")
        if len(read) > LARGEST:
            raise self._odd(f"its reply has more than {LARGEST >> 20} MiB")
        return parse_json(read, f"the reply of the decoder at {self._url}", _ADVICE)

    def _odd(self, reason: str) -> UserError:
        return UserError(
            f"the decoder at {self._url} does not answer as it should ({reason.rstrip('.')}); {_ADVICE}."
        )


def _address(url: str) -> tuple[str, str, str, type[http.client.HTTPConnection]]:
    """Splits a server's address into (as errors name it, host and port, path, kind of connection).

    Raises UserError, without the address, which may hold a secret in a place where none belongs.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # the port raises ValueError where it is no number
    except ValueError as error:
        raise UserError(f"the decoder's address has no host and port; {_FORM}.") from error
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not host:
        raise UserError(f"the decoder's address does not start with http:// or https://; {_FORM}.")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(
            f"the decoder's address holds a user or a query, which nothing here would send; {_FORM}."
        )
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise UserError(f"the decoder's address has characters that none can have; {_FORM}.")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}", parts.netloc, path, kinds[parts.scheme]


_FORM = "give one like http://127.0.0.1:8100/v1"
_ADVICE = "start it as docs/vllm.md says"


@contextlib.contextmanager
def _ended_after(
    connection: http.client.HTTPConnection, seconds: float, late: threading.Event
) -> Iterator[None]:
    """Opens a connection for a block, and ends what the block still waits for after `seconds`.

    late: is set then. A socket's own timeout is about each piece, so that a reply could come byte by
    byte for hours.
    """
    connection.connect()
    opened = connection.sock

    def end() -> None:
        late.set()
        with contextlib.suppress(OSError):
            opened.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        connection.close()


@jax.jit
def _embedded(model: UniMed, batch: Batch) -> jax.Array:
    """Embeds the tokens and visual tokens of prompts, [B, S, D]."""
    return model.embed(batch)[0]
