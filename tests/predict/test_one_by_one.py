"""Models whose answers depend on their batch answer one request at a time, as predict does alone."""

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from support.fake_brain import tiny_config

from unimed_jax.errors import UserError
from unimed_jax.predict.one_by_one import OneByOne
from unimed_jax.predict.predictor import Predictor
from unimed_jax.predict.request import Request
from unimed_jax.runs.open import Run
from unimed_jax.serve.limits import Limits
from unimed_jax.serve.question import Asked
from unimed_jax.serve.service import Service
from unimed_jax.settings import from_config_dict

pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.slow]


@pytest.fixture(scope="module")
def config():
    settings = tiny_config()
    settings.evaluate.max_new_tokens = 12
    settings.model.moe.experts, settings.model.moe.capacity_factor = 2, 1.0
    settings.model.moe.eval_capacity_factor = 1.0
    return from_config_dict(settings)


def test_answers_are_those_of_predict_alone(config, tokenizer):
    assert config.model.answers_depend_on_batch
    model = tiny.sharp_model(config.model)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    requests = [
        Request("qa", "Why?"),
        Request("vqa", "Which colour?", (picture,)),
        Request("qa", "Why?", temperature=0.8, seed=-3),
        Request("qa", "Why?", max_new_tokens=2),
        Request("qa", "Never asked?"),
    ]
    loop = OneByOne(model, config, tokenizer)
    numbers = [loop.submit(request) for request in requests]
    with pytest.raises(UserError, match="text.max_prompt"):
        loop.submit(Request("qa", "why " * 900))
    loop.cancel(numbers[-1])
    texts, ends = dict.fromkeys(numbers, ""), {}
    while not loop.idle:
        for piece in loop.step(4):
            texts[piece.number] += piece.text
            if piece.ended:
                ends[piece.number] = (piece.tokens, piece.stopped)
    predictor = Predictor(model, config, tokenizer)
    alone = [predictor.answers([request])[0] for request in requests[:4]]
    assert [texts[number] for number in numbers] == [*alone, ""]
    assert ends[numbers[3]] == (2, False) and set(ends) == set(numbers[:4])
    assert loop.prompt_tokens(requests[1]) > loop.prompt_tokens(requests[0])
    number = loop.submit(dataclasses.replace(requests[0]))
    loop.step(1)
    loop.cancel(number)
    assert loop.idle and loop.step() == []

    async def served() -> list[str]:
        service = Service(Run(Path("run"), config, tokenizer, model, 0), "it", Limits(12))
        asked = [Asked(request, ()) for request in requests[:2]]
        spoken = [await service.ask(one, service.enter()) for one in asked]
        texts = await asyncio.gather(*(one.whole() for one in spoken))
        service.close()
        return texts

    assert asyncio.run(served()) == alone[:2]
