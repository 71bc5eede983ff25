"""The hard router has an expert for each task: a task without one would see nothing, and is refused."""

import numpy as np
import pytest
from support import tiny

from unimed_jax.config import Config, EvaluateConfig, TextConfig
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError
from unimed_jax.predict.likelihood import Asked, Likelihoods
from unimed_jax.predict.predictor import Predictor
from unimed_jax.predict.request import Request

pytestmark = pytest.mark.usefixtures("quick_compiles")
SENTENCE = "request mine: the hard router sends task 'cls' to expert 4, and this model has 1"


@pytest.fixture
def config():
    return Config(
        model=tiny.config(connector=dict(router="hard", experts=1)),
        text=TextConfig(max_prompt=128, double_bos=False),
        evaluate=EvaluateConfig(max_new_tokens=4),
    )


def test_images_of_a_task_without_an_expert_are_refused(config, byte_ids):
    predictor = Predictor(tiny.model(config.model), config, byte_ids)
    rng = np.random.default_rng(0)
    pictures = [tiny.image(rng) for _ in range(4)]
    for ask in (lambda r: predictor.answers([r]), lambda r: list(predictor.stream(r))):
        with pytest.raises(UserError, match=SENTENCE) as error:
            ask(Request("cls", "q", (pictures[0],), id="mine"))
        assert "\n" not in str(error.value)
    # those of a task with one are seen, and what shows no image needs none
    assert len(set(predictor.answers([Request("vqa", "q", (one,)) for one in pictures]))) > 1
    blind = Request("cls", "q", (pictures[0],), show_images=False)
    assert all(predictor.answers([blind, Request("qa", "q")]))


def test_likelihoods_of_a_task_without_an_expert_are_refused(config, byte_ids):
    model = tiny.model(config.model)
    asked = {t: Asked(Example("mine", t, "q", "", images=("a",)), ("x", "y")) for t in ("vqa", "cls")}
    Likelihoods(model, config, byte_ids, [[asked["vqa"]]])
    with pytest.raises(UserError, match=SENTENCE):
        Likelihoods(model, config, byte_ids, [[asked["vqa"]], [asked["cls"]]])
