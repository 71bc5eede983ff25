"""Makes of a model what `answers.answer_units` asks."""

from collections.abc import Callable, Sequence
from typing import Any

from unimed_jax.config import Config, ModelConfig
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.evaluate.answers import Answer, Answerer, Call, Question
from unimed_jax.evaluate.tasks import Unit
from unimed_jax.model.unimed import UniMed
from unimed_jax.predict.engine import Engine
from unimed_jax.predict.plain import PlainLoop
from unimed_jax.predict.request import Request

# Examples of a call for each answer that is made at once. A kill costs a call's answers, and at the end
# of a call answers run out.
ROUNDS = 4


def together(model: ModelConfig, units: Sequence[Unit]) -> int:
    """Counts the examples that are asked in one call; 0: those of a batch of one unit."""
    if model.answers_depend_on_batch:
        return 0
    return ROUNDS * max((unit.batch for unit in units), default=1)


def model_answers(
    model: UniMed,
    config: Config,
    tokenizer: Tokenizer,
    change: Callable[[Request], Request] = lambda request: request,
) -> Answerer:
    """Makes of a model what answers questions with the settings of their units.

    `change` alters each request. It is to be called inside `run.inside()`, on all processes alike.
    """
    way = by_batches if config.model.answers_depend_on_batch else by_engine
    return way(model, config, tokenizer, change)


def by_engine(
    model: UniMed,
    config: Config,
    tokenizer: Tokenizer,
    change: Callable[[Request], Request] = lambda request: request,
    slots: int | None = None,
) -> Answerer:
    """Answers calls by the engine, with slots for the largest batch of a unit, or as many as given."""

    def prepared(calls: Sequence[Call]) -> Answer:
        every = [question for call in calls for some in call.passes for question in some]
        count = slots or max(question.unit.batch for question in every)
        announced = (change(_asked(question)) for question in every)
        engine = Engine(model, config, tokenizer, None, announced, count)

        def answer(passes: Sequence[Sequence[Question]], ended: Callable[[], Any]) -> list[list[str]]:
            questions = [question for some in passes for question in some]
            # Those whose reference is long are asked first, so that the last answers are short ones.
            order = sorted(
                range(len(questions)), key=lambda i: len(questions[i].example.answer), reverse=True
            )

            def said(place: int) -> None:
                if order[place] < len(passes[0]):
                    ended()

            texts = engine.answers([change(_asked(questions[i])) for i in order], said)
            found = dict(zip(order, texts, strict=True))
            answers = iter([found[i] for i in range(len(questions))])
            return [[next(answers) for _ in some] for some in passes]

        return answer

    return prepared


def by_batches(
    model: UniMed,
    config: Config,
    tokenizer: Tokenizer,
    change: Callable[[Request], Request] = lambda request: request,
) -> Answerer:
    """Answers calls by the plain loop, each pass in batches of its unit."""
    loop = PlainLoop(model, config, tokenizer)
    return lambda calls: (
        lambda passes, ended: [
            loop.answers([change(_asked(question)) for question in some], some[0].unit.batch)
            for some in passes
        ]
    )


def _asked(question: Question) -> Request:
    example = question.example
    return Request(
        example.task,
        example.question,
        question.images,
        max_new_tokens=question.unit.max_new_tokens,
        seed=question.seed,
        id=example.id,
    )
