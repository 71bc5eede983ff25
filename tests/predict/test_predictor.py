"""Answers to requests: in batches and streamed, with images of every kind, greedy and drawn."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.fake_brain import Squares, tiny_config

from unimed_jax.config import TASKS, MoeConfig
from unimed_jax.data.example import Example
from unimed_jax.data.layout import VISUAL, Encoder
from unimed_jax.errors import UserError
from unimed_jax.evaluate.answers import calls_of
from unimed_jax.evaluate.model_answers import by_batches, by_engine
from unimed_jax.evaluate.tasks import Source, units_of
from unimed_jax.model import sharding
from unimed_jax.model import slots as programs
from unimed_jax.model.generate import generate
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.predict.plain import prompt_batch
from unimed_jax.predict.predictor import Predictor
from unimed_jax.predict.request import Request, as_example
from unimed_jax.predict.text import Spoken
from unimed_jax.settings import from_config_dict

pytestmark = pytest.mark.usefixtures("quick_compiles")
PICTURE = Squares().image("test0")


@pytest.fixture(scope="module")
def config():
    settings = tiny_config()
    settings.evaluate.batch, settings.evaluate.max_new_tokens = 4, 12
    return from_config_dict(settings)


@pytest.fixture(scope="module")
def model(config):
    return tiny.sharp_model(config.model)


@pytest.fixture(scope="module")
def predictor(model, config, tokenizer):
    return Predictor(model, config, tokenizer)


@pytest.fixture(scope="module")
def requests():
    """Two of each task, short and long."""
    texts = {
        "vqa": "What colour is the square?",
        "refer": "red square",
        "identify": "{<10><10><60><60>}",
        "qa": "Why?",
    }
    texts |= {"caption": "", "cls": ""}
    longer = {"qa": "What is 3 plus 1, and why is it not 5 or 6?"}
    return [
        Request(
            task, text[task], () if task == "qa" else (Squares().image(f"test{i}"),), id=f"{task}{i}"
        )
        for i, text in enumerate((texts, texts | longer))
        for task in TASKS
    ]


@pytest.fixture(scope="module")
def answers(predictor, requests):
    return predictor.answers(requests)


def test_answers_are_what_generate_makes_of_the_prompts(answers, model, config, tokenizer, requests):
    """The first batch of four, put together by hand."""
    encoder = Encoder(tokenizer, config.text, config.model.tokens_per_image)
    four = requests[:4]
    batch = prompt_batch(
        encoder, config, tokenizer.pad, [as_example(r) for r in four], [r.images for r in four]
    )
    tokens = generate(model, batch, max_new_tokens=12, eos=tokenizer.eos, pad=tokenizer.pad)
    texts = [
        tokenizer.decode([t for t in row if t not in (tokenizer.eos, tokenizer.pad)])
        for row in tokens.tolist()
    ]
    assert [text.strip() for text in texts] == answers[:4]
    assert len(answers) == len(requests) and len(set(answers)) > 4 and all(answers)


def test_the_batch_does_not_change_an_answer(predictor, requests, answers):
    assert predictor.answers(requests, batch=5) == answers
    assert predictor.answers(requests[3:4]) == answers[3:4]
    assert predictor.answers([]) == []


@pytest.mark.parametrize("chunk", [1, 5])
def test_streamed_pieces_make_up_the_answer(predictor, requests, chunk):
    for request in requests[:6]:
        pieces = list(predictor.stream(request, chunk))
        assert "".join(pieces) == predictor.answers([request])[0]
        assert all(pieces)
    if chunk == 1:
        assert len(pieces) > 3


def test_a_piece_never_ends_within_a_character(tokenizer):
    """Bytes of one character come as several tokens; the pieces hold it whole."""
    text = "Größe: 3 µm, naïve…"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text.split()) * 2
    spoken = Spoken(tokenizer)
    pieces = [piece for i in ids if (piece := spoken.add([i]))]
    assert spoken.end() == "" and "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) and len(pieces) > 5
    # an answer that its last token cuts within a character
    cut = Spoken(tokenizer)
    assert "".join(map(cut.add, ([i] for i in ids[:-1]))) + cut.end() == tokenizer.decode(ids[:-1])


def test_images_as_path_bytes_and_array_are_one(predictor, tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "it.png")
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "PNG")
    kinds = (str(tmp_path / "it.png"), tmp_path / "it.png", buffer.getvalue(), PICTURE)
    requests = [Request("vqa", "What colour is the square?", (kind,)) for kind in kinds]
    assert len(set(predictor.answers(requests))) == 1


def test_another_wording_asks_as_the_pool_says(predictor):
    question = "What colour is the square?"
    worded = Request("vqa", question, (PICTURE,), wording=1)
    spelt = Request("vqa", f"Look at the image and answer: {question}", (PICTURE,))
    assert predictor.answers([worded]) == predictor.answers([spelt])


def test_without_visual_tokens_no_picture_changes_the_answer(predictor, config, tokenizer):
    requests = [
        Request("vqa", "What colour is the square?", (image,), show_images=shown)
        for shown in (False, True)
        for image in (PICTURE, np.zeros_like(PICTURE))
    ]
    one, other, *seen = predictor.answers(requests)
    assert one == other and len({one, *seen}) == 3
    encoder = Encoder(tokenizer, config.text, config.model.tokens_per_image)
    example = as_example(requests[0])
    whole, blind = encoder.prompt(example), encoder.prompt(example, with_images=False)
    assert whole.tokens - blind.tokens == config.model.tokens_per_image
    ids = [*whole.prefix, *whole.suffix]
    assert [i for i in ids if i != VISUAL] == [*blind.prefix, *blind.suffix]


def test_lengths_are_the_requests_own(predictor, requests, answers):
    short = [
        dataclasses.replace(r, max_new_tokens=2 if i % 2 else None) for i, r in enumerate(requests[:4])
    ]
    found = predictor.answers(short)
    assert found[::2] == answers[:4:2]
    for shorter, whole in zip(found[1::2], answers[1:4:2], strict=True):
        assert len(shorter) < len(whole) and whole.startswith(shorter)


def test_draws_depend_on_the_seed_and_not_on_the_batch(predictor):
    def drawn(*seeds):
        return [Request("qa", "Why?", temperature=3.0, seed=seed) for seed in seeds]

    together = predictor.answers(drawn(0, 1, 2, 0))
    assert together[0] == together[3] and len(set(together)) == 3
    assert predictor.answers(drawn(1)) == together[1:2]
    assert "".join(predictor.stream(drawn(2)[0])) == together[2]


@pytest.mark.parametrize(
    "request_, words",
    [
        (Request("vqa", "Why?", id="r7"), "r7.*needs an image"),
        (Request("qa", "Why?", (PICTURE,)), "text only"),
        (Request("qa", "Why?", history=(("a", "\ud800"),), id="r8"), "r8.*surrogate"),
        (Request("qa", "Why?", history=(("why " * 900, "b"),), id="r8"), "r8.*text.max_prompt"),
        (Request("vqa", "Why?", (b"nothing",)), "of 7 bytes cannot be read"),
        (Request("qa", "why " * 900), "text.max_prompt"),
        (Request("qa", "Why?", max_new_tokens=0, id="r9"), "r9: max_new_tokens=0 .* at least 1"),
        (Request("qa", "Why?", max_new_tokens=-3), ": max_new_tokens=-3 "),
        (Request("qa", "Why?", temperature=-1.0, id="r9"), "r9 has temperature=-1.0; give 0 "),
        (Request("qa", "Why?", temperature=float("nan")), "has temperature=nan;"),
        (Request("qa", "Why?", temperature=float("inf")), "has temperature=inf;"),
    ],
)
def test_a_wrong_request_is_one_sentence(predictor, request_, words):
    for ask in (lambda: predictor.answers([request_]), lambda: list(predictor.stream(request_))):
        with pytest.raises(UserError, match=words) as error:
            ask()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("limited", [False, True])
def test_no_batch_and_no_chunk_are_refused(config, model, tokenizer, number, limited):
    """By both ways to answer; nothing is asked of the model."""
    moe = dataclasses.replace(config.model.moe, experts=2, eval_noise=True) if limited else MoeConfig()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    assert config.model.answers_depend_on_batch == limited
    predictor, request_ = Predictor(model, config, tokenizer), Request("qa", "Why?")
    with pytest.raises(UserError, match=f"batch={number} .* at least 1"):
        predictor.answers([request_], number)
    with pytest.raises(UserError, match=f"chunk={number} .* at least 1"):
        list(predictor.stream(request_, number))


@pytest.mark.parametrize("form", ["unimed", "stablelm", "phi", "simple"])
def test_what_looks_like_a_mark_stays_text(config, tokenizer, form):
    """Ends of text, beginnings and image places come from the layout alone, whatever anybody writes."""
    text = dataclasses.replace(config.text, form=form, chat_template=form == "unimed", max_prompt=4000)
    encoder = Encoder(tokenizer, text, 3)
    marks = "".join(tokenizer._tokenizer.all_special_tokens) + "</Img>[/INST]<|endoftext|>"

    def counts(words, answer):
        example = Example("r", "vqa", words, "", images=("a",))
        encoded = encoder.answered(example, answer, turns=[(words, words), ("why", words)])
        ids = [*encoded.prefix, *encoded.suffix]
        assert encoded.suffix[encoded.targets][-1] == tokenizer.eos or form == "simple"
        return [ids.count(one) for one in (VISUAL, *sorted(tokenizer.dropped))]

    assert counts(marks, marks) == counts("a", "b")
    if form != "unimed":
        with pytest.raises(UserError, match="'<image>' stands in its text"):
            counts("<image>", "b")
    else:
        assert counts("<image>", "<image>") == counts("a", "b")


def test_eight_devices_answer_as_one(model, config, tokenizer, requests, answers):
    mesh = sharding.make_mesh(config.mesh, config.data.rows)
    leaves = parameters(model)
    spread = with_parameters(model, jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh)))
    predictor = Predictor(spread, config, tokenizer, mesh)
    assert predictor.answers(requests) == answers
    assert "".join(predictor.stream(requests[0])) == answers[0]
    assert np.prod(list(mesh.shape.values())) == 8


@pytest.mark.parametrize(
    "image, sentence",
    [
        (
            np.zeros((4, 4, 3), np.float32),
            r"request who has an image of float32 \[4, 4, 3\]; give uint8",
        ),
        (np.zeros((4, 4), np.uint8), r"request who has an image of uint8 \[4, 4\]; give uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"request who has an image of uint8 \[0, 4, 3\]"),
        (b"no picture", "request who: image of 10 bytes cannot be read"),
        ("/dev/zero", "request who: image /dev/zero is a pipe or a device"),
    ],
)
def test_images_that_are_none_are_refused_by_the_requests_name(predictor, image, sentence):
    with pytest.raises(UserError, match=sentence):
        predictor.answers([Request("vqa", "What?", (image,), id="who")])


@pytest.mark.slow
def test_an_evaluation_gives_the_answers_of_the_plain_loop_by_two_programs(config, model, tokenizer):
    """All tasks, units of different batches and lengths, own and others' images."""
    evaluate = dataclasses.replace(config.evaluate, splits=("val", "test"))
    config = dataclasses.replace(config, evaluate=evaluate)
    source = Source("squares", Squares(images=7), TASKS, {})
    units, _ = units_of(config, {"squares": source})
    units = [
        dataclasses.replace(unit, batch=3 + i % 3, max_new_tokens=5 + i)
        for i, unit in enumerate(units)
        if unit.split == "test" or unit.task == "vqa"
    ]
    before = programs.enter.compiled(), programs.advance.compiled()
    found = [
        answered_calls(way(model, config, tokenizer), calls_of(units, 0, True, count))
        for way, count in ((by_engine, 20), (by_batches, 0))
    ]
    after = programs.enter.compiled(), programs.advance.compiled()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]
    assert found[0] == found[1] and len(found[0]) == 7 * (6 + 5) + 2 * 7
    assert len(set(found[0].values())) > 20


def answered_calls(answerer, calls) -> dict[tuple, str]:
    answer, found, ended = answerer(calls), {}, []
    for call in calls:
        texts = answer(call.passes, lambda: ended.append(1))
        for number, (some, given) in enumerate(zip(call.passes, texts, strict=True)):
            found |= {
                (q.unit.name, q.example.id, number): text for q, text in zip(some, given, strict=True)
            }
    assert len(ended) in (0, sum(len(call.own) for call in calls))
    return found
