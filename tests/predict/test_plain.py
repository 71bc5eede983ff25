"""The plain loop where experts take a limited number of tokens: prompts alone compete for them."""

import pytest
from support import tiny

from unimed_jax.config import Config, EvaluateConfig, TextConfig
from unimed_jax.model.generate import generate
from unimed_jax.predict import plain
from unimed_jax.predict.plain import PlainLoop
from unimed_jax.predict.request import Request

pytestmark = pytest.mark.usefixtures("quick_compiles")

LIMITED = dict(
    experts=3, top_k=2, random=False, eval_capacity_factor=0.5, eval_noise=False, route_padding=False,
    placement="dense",
)  # fmt: skip
END = 93  # an id that ends the first of the answers at once
REQUESTS = [Request("qa", words) for words in ("abc", "defg", "hijkl")]


def loop_of(tokenizer, **moe) -> PlainLoop:
    model = tiny.config(moe=LIMITED | moe, lora=dict(targets=("q",)))
    config = Config(
        model=model,
        text=TextConfig(max_prompt=128, double_bos=False),
        evaluate=EvaluateConfig(max_new_tokens=8),
    )
    tokenizer.eos = END
    return PlainLoop(tiny.model(model, seed=1), config, tokenizer)


@pytest.fixture
def rows(monkeypatch):
    """The numbers of rows with which answers were generated."""
    seen = []

    def generated(model, batch, **how):
        seen.append(len(batch["tokens"]))
        return generate(model, batch, **how)

    monkeypatch.setattr(plain, "generate", generated)
    return seen


def test_no_copy_of_a_prompt_takes_the_place_of_another(byte_ids, rows):
    loop = loop_of(byte_ids)
    assert loop.answers(REQUESTS, 4) == loop.answers(REQUESTS, 3)
    assert rows == [3, 3]


def test_few_numbers_of_rows_are_compiled_where_experts_take_all(byte_ids, rows):
    loop = loop_of(byte_ids, eval_capacity_factor=None)
    assert loop.answers(REQUESTS, 8) == loop.answers(REQUESTS * 2, 6)[:3]
    assert rows == [4, 6]


def test_what_follows_an_end_of_text_takes_no_place(byte_ids):
    """A row that has ended takes no capacity of experts, whatever the id of padding is."""
    found = []
    for byte_ids.pad in (0, 7):
        found.append(loop_of(byte_ids).answers(REQUESTS, 3))
        lengths = [len(text.split()) for text in found[-1]]
        assert min(lengths) == 1 and max(lengths) == 8
    assert found[0] == found[1]


def test_what_follows_an_end_of_text_takes_places_as_published(byte_ids):
    found = set()
    for byte_ids.pad in (0, 7):
        found.add(tuple(loop_of(byte_ids, route_padding=True).answers(REQUESTS, 3)))
    assert len(found) > 1
