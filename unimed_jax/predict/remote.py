"""Answers requests with a decoder that another engine serves, such as vLLM.

The images are encoded here, and the whole prompt is sent as embeddings, which need no agreement about
prompts, image slots or tokenizers: the other side is any server of OpenAI's completions that takes
`prompt_embeds` (vLLM with --enable-prompt-embeds), with the folder that `export --format=decoder`
wrote. docs/vllm.md says how.
"""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from unimed_jax.predict.plain import rows_of
from unimed_jax.predict.request import Prompt, Prompts, Request
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

        url: up to and with /v1; key: which it wants as a bearer token; seconds: that an answer may take.
        Raises UserError if it cannot be reached, and for a decoder with experts, of which no export
        exists that it could serve.
        """
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"the decoder's address {url!r} does not start with http:// or https://; give one "
                "that ends with /v1."
            )
        if config.model.moe.experts:
            raise UserError(
                "the decoder of this model has experts, which export --format=decoder cannot write; "
                "serve the run itself."
            )
        self._url, self._key, self._seconds = url.rstrip("/"), key, seconds
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
        batch = batch or self._config.evaluate.batch
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
            tokens = [int(token) for token in reply["choices"][0]["token_ids"]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._odd(f"its reply has no token_ids ({error!r})") from error
        if not all(0 <= token < self._config.model.decoder.vocab for token in tokens):
            raise self._odd("it returned ids that this model's vocabulary does not have")
        return tokens

    def _called(self, place: str, content: Any = None) -> Any:
        """Sends a request to the other side and returns its reply."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self._url}/{place}", data, headers)
        try:
            with _OPENER.open(request, timeout=self._seconds) as reply:
                return json.loads(reply.read(LARGEST))
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            raise self._odd(f"it answered with status {error.code}: {said}") from error
        except (OSError, ValueError) as error:  # not there, too slow, or no JSON
            reason = getattr(error, "reason", None) or error
            raise self._odd(str(reason)) from error

    def _odd(self, reason: str) -> UserError:
        return UserError(
            f"the decoder at {self._url} does not answer as it should ({reason.rstrip('.')}); start it "
            "as docs/vllm.md says."
        )


class _Stays(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: what is sent is for the address that was given."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


# Without the proxies of the environment, too.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stays())


@jax.jit
def _embedded(model: UniMed, batch: Batch) -> jax.Array:
    """Embeds the tokens and visual tokens of prompts, [B, S, D]."""
    return model.embed(batch)[0]
