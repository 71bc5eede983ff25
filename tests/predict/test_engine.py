"""The engine picks the tokens of the plain loop: every family, mixed prompts, one and eight devices."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from support import tiny

from unimed_jax import memory
from unimed_jax.config import Config, EvaluateConfig
from unimed_jax.data import layout
from unimed_jax.errors import UserError
from unimed_jax.model import decoding, sharding
from unimed_jax.model import slots as programs
from unimed_jax.model.generate import Sampling, generate
from unimed_jax.model.parameters import parameters, tree_bytes, with_parameters
from unimed_jax.predict import engine as engines
from unimed_jax.predict import sizes
from unimed_jax.predict.engine import Engine
from unimed_jax.predict.request import Picture, Prompt, Request

pytestmark = pytest.mark.usefixtures("quick_compiles")

NEW = 7
EOS = 39  # an id that the tiny model says now and then
TOKENIZER = SimpleNamespace(
    eos=EOS,
    pad=tiny.PAD,
    encode=lambda text: list(text.encode()),
    decode=lambda ids: " ".join(str(int(i)) for i in ids),
)

GEMMA = dict(
    norm="rms_zero", post_norms=True, scaled_embedding=True, tied_head=True, query_scale=0.3,
    windows=(6, 0), local_rope_theta=30.0, qk_norm=True, attention_softcap=20.0, logit_softcap=9.0,
)  # fmt: skip
PHI = dict(
    norm="layer", parallel_block=True, gated_mlp=False, head_bias=True, mlp_bias=True,
    rotary_fraction=0.5, attention_bias=("q", "k", "v", "o"), activation="gelu_tanh",
)  # fmt: skip
ALONE = dict(eval_noise=False, route_padding=False)
ATTENTION = dict(targets=("q", "k", "v", "o"))
FAMILIES = {
    "llama with LoRA": {},
    "gemma": dict(decoder=GEMMA),
    "med-moe": dict(moe=dict(experts=4, top_k=2, **ALONE), lora=ATTENTION),
    "phi": dict(decoder=PHI, lora=dict(rank=0)),
    "mistral": dict(decoder=dict(windows=(5,)), lora=dict(rank=0)),
    "qwen": dict(decoder=dict(attention_bias=("q", "k", "v"), qk_norm=True, windows=(0, 9))),
    "stablelm": dict(decoder=dict(norm="layer", attention_bias=("q", "k", "v"), rotary_fraction=0.25)),
    "med-moe, residual": dict(
        moe=dict(experts=3, placement="dense", residual=True, **ALONE), lora=ATTENTION
    ),
}
QUICK = tuple(FAMILIES)[:2]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Prompts of random ids: what a tokenizer would make of requests, by the question's number."""

    groups: tuple[layout.Group, ...]

    def requests(self, **fields) -> list[Request]:
        return [
            Request(group.questions[0].task, str(i), images=group.images, seed=i, **fields)
            for i, group in enumerate(self.groups)
        ]


@pytest.fixture(scope="module")
def asked() -> Asked:
    """Several questions about one image, two about two images, single ones, and text alone.

    The texts begin alike, and one prompt is three times as long as the others.
    """
    rng = np.random.default_rng(0)
    shared = [
        tiny.group(rng, "vqa", questions=4, question=3, answer=0),
        tiny.group(rng, "caption", questions=2, question=2, answer=0, images=2),
        *(tiny.group(rng, task, question=4 + i, answer=0) for i, task in enumerate(("refer", "cls"))),
        tiny.group(rng, "vqa", question=25, answer=0),
    ]
    found = [layout.Group((q,), group.images) for group in shared for q in group.questions]
    start = rng.integers(20, 120, 5)
    for length in (3, 6, 1):
        ids = [*start, *rng.integers(20, 120, length)]
        found.append(layout.Group((layout.encode_ids([ids], [], 4, tiny.BOS, task="qa", record="r"),)))
    order = rng.permutation(len(found))
    return Asked(tuple(found[i] for i in order))


@pytest.fixture(autouse=True)
def prompts(monkeypatch, asked):
    class Prompts:
        def __init__(self, config, tokenizer, keeps):
            self.config = config

        def __call__(self, request):
            if request.question == "wrong":
                raise UserError("request wrong is wrong; mend it.")
            group = asked.groups[int(request.question)]
            settings = self.config.evaluate
            most, temperature = request.max_new_tokens, request.temperature or 0.0
            return Prompt(
                group.questions[0], request.images, most or settings.max_new_tokens, temperature,
                request.seed, request.question,
            )  # fmt: skip

        def pixels(self, prompt):
            return tuple(i.read() if isinstance(i, Picture) else i for i in prompt.images)

    monkeypatch.setattr(engines, "Prompts", Prompts)


def engine(model, requests, slots=4, mesh=None) -> Engine:
    settings = EvaluateConfig(max_new_tokens=NEW, top_p=0.9)
    config = Config(model=model.config, evaluate=settings)
    return Engine(model, config, TOKENIZER, mesh, requests, slots)


def plain(model, asked, mesh=None, **how) -> list[list[int]]:
    """The tokens of the plain loop, up to the end of text."""
    rows = layout.prompt_batch(asked.groups, tiny.shape(tokens=40), tiny.PAD)
    how = {"max_new_tokens": NEW, "eos": EOS, "pad": tiny.PAD, **how}
    with sharding.inside(mesh):
        out = np.asarray(generate(model, rows, **how)).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in out]


def texts(rows) -> list[str]:
    return [TOKENIZER.decode(row) for row in rows]


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def expected(model, asked):
    return plain(model, asked)


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_greedy_tokens_are_those_of_the_plain_loop(family, asked):
    model = tiny.model(tiny.config(**FAMILIES[family]))
    rows = plain(model, asked)
    assert len({tuple(row) for row in rows}) > 7
    requests = asked.requests()
    made = engine(model, requests)
    assert made.sizes.slots == 4 and made.sizes.prompt == 32
    assert made.answers(requests) == texts(rows)
    # other questions in other company, from slots that have been used
    assert made.answers(requests[::-2]) == texts(rows[::-2])


@pytest.mark.parametrize(
    "family",
    [
        n if n in QUICK[:1] else pytest.param(n, marks=pytest.mark.slow)
        for n in ("llama with LoRA", "med-moe")
    ],
)
def test_separate_layers_pick_the_same_tokens(family, asked, monkeypatch):
    """A large model gets them if what is asked is worth compiling them; the caller's stays stacked."""
    model = tiny.model(tiny.config(**FAMILIES[family]))
    rows, requests = plain(model, asked), asked.requests()
    monkeypatch.setattr(decoding, "LARGE", 100)
    assert not isinstance(engine(model, requests)._parts.model().decoder.layers, nnx.List)
    monkeypatch.setattr(decoding, "WORTH", {"cpu": 10})
    made = engine(model, requests)
    separate = made._parts.model().decoder
    assert made.sizes.turns == -(-len(requests) * NEW // 4) and len(separate.layers) == 2
    assert tree_bytes(separate) == tree_bytes(model.decoder)
    assert made.answers(requests) == texts(rows)
    assert tree_bytes(model.decoder.layers) > 100 and not isinstance(model.decoder.layers, nnx.List)
    # for as long as the engine lives, unless there is no memory for both
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * tree_bytes(model))
    assert not isinstance(engine(model, requests)._parts.model().decoder.layers, nnx.List)
    # a model that only answers is separated itself, and its stacks are freed
    stacked = weakref.ref(model.decoder.layers.attention.q.kernel[...])
    decoding.prepare(model)
    gc.collect()
    assert stacked() is None and plain(model, asked) == rows


def test_options_for_gpus_are_known_to_jaxlib():
    """jaxlib for CPU reads the options of GPUs too, and refuses an unknown one."""
    for options in (*decoding.OPTIONS.values(), {"xla_gpu_no_such_option": 1}):
        run = jax.jit(lambda x: 2 * x, compiler_options=options)
        if "xla_gpu_no_such_option" in options:
            with pytest.raises(Exception, match="xla_gpu_no_such_option"):
                run(1)
        else:
            assert run(1) == 2


def test_answers_end_at_the_end_of_text_or_at_their_own_length(model, asked, expected):
    lengths = [1 + i % NEW for i in range(len(asked.groups))]
    requests = [
        dataclasses.replace(r, max_new_tokens=n) for r, n in zip(asked.requests(), lengths, strict=True)
    ]
    found = engine(model, requests).answers(requests)
    assert found == texts(row[:n] for row, n in zip(expected, lengths, strict=True))
    assert any(len(row) < NEW for row in expected) and any(len(row) == NEW for row in expected)


def test_two_programs_are_compiled_whatever_is_asked(model, asked):
    """Another evaluation of the same sizes compiles nothing."""
    requests = asked.requests()
    before = programs.enter.compiled(), programs.advance.compiled()
    made = engine(model, requests, slots=5)
    for some in (requests, requests[:1], [r for r in requests if r.task == "qa"], requests[3:]):
        made.answers(some)
    engine(model, requests, slots=5).answers(requests)
    after = programs.enter.compiled(), programs.advance.compiled()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


def test_what_is_shared_runs_once(model, asked, expected, monkeypatch):
    """The questions about one image enter after one copy of it, whoever else asks in between."""
    seen = []
    enter = programs.enter
    monkeypatch.setattr(
        programs,
        "enter",
        lambda parts, state, batch, entry: seen.append(batch) or enter(parts, state, batch, entry),
    )
    requests = asked.requests()
    made = engine(model, requests)
    assert made.answers(requests) == texts(expected)
    images = sum(int((batch["image_tasks"] >= 0).sum()) for batch in seen)
    assert images == 1 + 2 + 2 + 1 < sum(len(r.images) for r in requests)
    tokens = sum(int((batch["segments"] > 0).sum()) for batch in seen)
    assert tokens < sum(group.questions[0].tokens for group in asked.groups)
    assert any((batch["image_tasks"] < 0).all() for batch in seen)


def test_pictures_are_read_when_they_enter_and_only_then(model, asked, expected):
    reads = []

    def picture(image):
        key = image.tobytes()
        return Picture(key, lambda: reads.append(key) or image)

    requests = [
        dataclasses.replace(r, images=tuple(picture(i) for i in r.images)) for r in asked.requests()
    ]
    made = engine(model, requests)
    assert not reads and made.answers(requests) == texts(expected)
    assert len(reads) == len(set(reads)) == 6


@pytest.mark.slow
def test_draws_are_those_of_the_plain_loop(model, asked):
    key = jax.random.key(0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(asked.groups), dtype=np.uint32))
    drawn = plain(model, asked, sampling=Sampling(2.0, 0.9), key=keys)
    requests = asked.requests(temperature=2.0)
    assert engine(model, requests).answers(requests) == texts(drawn)
    # some are drawn, some not
    mixed = [dataclasses.replace(r, temperature=2.0 if i % 2 else 0.0) for i, r in enumerate(requests)]
    greedy = plain(model, asked)
    found = engine(model, mixed).answers(mixed)
    assert found == texts(drawn[i] if i % 2 else greedy[i] for i in range(len(mixed)))


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data", "tensor", "expert"])
def test_eight_devices_answer_as_one(axes, asked):
    family = "med-moe" if axes == "expert" else "llama with LoRA"
    model = tiny.model(tiny.config(**FAMILIES[family]))
    shape = {"data": 8} if axes == "data" else {"data": 2, "tensor": 4}
    if axes == "expert":
        shape = {"data": 2, "tensor": 2, "expert": 2}
    mesh = jax.make_mesh(
        tuple(shape.get(axis, 1) for axis in sharding.MESH_AXES), sharding.MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
    )  # fmt: skip
    leaves = parameters(model)
    spread = with_parameters(model, jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh)))
    requests = asked.requests()
    expected = texts(plain(model, asked))
    before = programs.enter.compiled(), programs.advance.compiled()
    made = engine(spread, requests, slots=8, mesh=mesh)
    assert made.answers(requests) == expected and made.answers(requests[2:7]) == expected[2:7]
    after = programs.enter.compiled(), programs.advance.compiled()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


# ---- asked one by one ------------------------------------------------------------------------------


def drained(made: Engine, pieces: dict[int, list], steps: int = 1000, tokens: int = 2) -> None:
    while not made.idle and steps:
        for piece in made.step(tokens):
            assert not (pieces.get(piece.number) and pieces[piece.number][-1].ended)
            pieces.setdefault(piece.number, []).append(piece)
        steps -= 1


def test_pieces_of_requests_that_come_while_others_run(model, asked, expected):
    requests = asked.requests()
    made = engine(model, requests)
    pieces: dict[int, list] = {}
    numbers = []
    for request in requests:
        numbers.append(made.submit(request))
        drained(made, pieces, steps=1)
    drained(made, pieces)
    for number, row in zip(numbers, expected, strict=True):
        own = pieces[number]
        assert "".join(piece.text for piece in own) == TOKENIZER.decode(row)
        assert [piece.ended for piece in own] == [False] * (len(own) - 1) + [True]
        counts = [0, *(piece.tokens for piece in own)]
        assert all(b - a <= 2 for a, b in zip(counts, counts[1:], strict=False))
    assert max(len(own) for own in pieces.values()) > 2


def test_answers_go_on_while_a_long_queue_enters(model, asked):
    requests = asked.requests()
    made = engine(model, requests, slots=4)
    made.submit(requests[0])
    kinds = []
    for _ in range(3):
        for request in requests[1:]:
            made.submit(request)
    for _ in range(8):
        made.step(1)
        kinds.append(made._entered)
    assert True in kinds and not any(a and b for a, b in zip(kinds, kinds[1:], strict=False))


def test_answers_grow_between_two_calls_of_which_others_enter(model, asked, expected):
    """Also where the next ones would find free slots at once."""
    requests = asked.requests()
    made = engine(model, requests)
    number = next(i for i, row in enumerate(expected) if len(row) == NEW)
    made.submit(requests[number])
    made.step(2)
    made.submit(requests[number - 1])
    (piece,) = made.step(2)
    assert not made._entered and piece.tokens == 3
    made.step(2)
    assert made._entered


def test_those_that_join_others_keep_nobody_waiting(model, asked):
    """A question about an image comes to its turn however many texts are asked after it."""
    requests = asked.requests()
    words = next(r for r in requests if r.task == "qa")
    made = engine(model, None, slots=2)
    for _ in range(200):  # more than a plan looks at
        made.submit(words)
    late = made.submit(next(r for r in requests if r.task == "refer"))
    entered: list[int] = []
    while late not in entered:
        assert len(entered) < 250
        plan = made._planned()
        new = [one.number for row in plan.rows for part in row for one in part.asked]
        entered += new
        made._take(plan)
        made._slots = [None] * len(made._slots)  # as if they had been answered at once
        for _ in new:
            made.submit(words)
    assert sorted(entered)[:201] == list(range(201))


def test_steps_are_counted_for_as_long_as_a_server_lives(model, asked, expected):
    requests = asked.requests()
    made = engine(model, requests)
    pieces: dict[int, list] = {}
    numbers = [made.submit(request) for request in requests]
    drained(made, pieces, steps=2)
    answer, steps = made.sizes.answer, int(made._state.steps)
    # the same place in the ring, years later
    more = (2**31 - 4) // answer * answer - steps // answer * answer
    made._state = made._state._replace(steps=made._state.steps + np.int32(more))
    drained(made, pieces, steps=60)
    assert made.idle
    for number, row in zip(numbers, expected, strict=True):
        assert "".join(piece.text for piece in pieces[number]) == TOKENIZER.decode(row)


def test_a_slot_takes_the_next_question_while_others_are_answered(model, asked, expected):
    requests = asked.requests(max_new_tokens=2)
    alone = [r for r in requests if r.task in ("qa", "refer", "cls")]
    long = next(r for r in alone if len(expected[r.seed]) == NEW)
    order = [dataclasses.replace(long, max_new_tokens=NEW), *[r for r in alone if r is not long] * 2]
    ended: list[int] = []
    found = engine(model, order, slots=3).answers(order, ended.append)
    assert sorted(ended) == list(range(len(order))) and found[0] == TOKENIZER.decode(expected[long.seed])
    assert ended.index(0) > 2  # more than the two others that are answered beside it


def test_memory_counts_slots_and_the_prompts_that_enter(model, asked, monkeypatch):
    requests = asked.requests()
    s = engine(model, requests).sizes
    c = model.config.decoder
    token = 2 * 4 * c.depth * c.kv_heads * c.head_dim  # keys and values in float32
    slots = s.slots * (s.prompt + s.answer)
    entering = s.rows * (s.tokens + s.questions * s.prompt)
    needed = tree_bytes(parameters(model)) + token * (slots + entering)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    engine(model, requests)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match="answering 4 prompts at once"):
        engine(model, requests)


def test_a_cancelled_request_gives_its_slot_away(model, asked, expected):
    requests = asked.requests()
    made = engine(model, requests)
    numbers = [made.submit(request) for request in requests]
    pieces: dict[int, list] = {}
    drained(made, pieces, steps=2)
    going = next(n for n in pieces if not pieces[n][-1].ended)
    waiting = next(n for n in numbers if n not in pieces)
    made.cancel(going)
    made.cancel(waiting)
    said = len(pieces[going])
    drained(made, pieces)
    assert set(pieces) == {*numbers} - {waiting} and len(pieces[going]) == said
    for number, row in zip(numbers, expected, strict=True):
        if number not in (going, waiting):
            assert "".join(piece.text for piece in pieces[number]) == TOKENIZER.decode(row)
    made.cancel(numbers[-1])  # too late, and no mistake
    assert made.idle and made.answers(requests[:2]) == texts(expected[:2])


def test_what_does_not_fit_is_one_sentence_and_stops_nobody(model, asked, expected):
    requests = asked.requests()
    small = [r for r, g in zip(requests, asked.groups, strict=True) if g.questions[0].tokens < 20]
    made = engine(model, [r for r in small if len(r.images) < 2], slots=2)
    long = next(r for r, g in zip(requests, asked.groups, strict=True) if g.questions[0].tokens > 30)
    two = next(r for r in small if len(r.images) == 2)
    longer = dataclasses.replace(small[0], max_new_tokens=NEW + 1)
    for wrong, words in (
        (long, "tokens in its prompt, and there is space for 16"),
        (two, "asks for 2 images"),
        (longer, f"asks for {NEW + 1} tokens in its answer"),
        (Request("vqa", "wrong"), "is wrong"),
    ):
        with pytest.raises(UserError, match=words) as error:
            made.submit(wrong)
        assert "\n" not in str(error.value) and made.idle


def test_sizes_follow_the_requests_or_the_settings(model, asked):
    requests = asked.requests()
    one = engine(model, requests[:1]).sizes
    assert (one.slots, one.rows, one.tokens, one.prompt) == (1, 1, 16, 16)
    assert one.images == len(requests[0].images)
    many = engine(model, requests * 9, slots=64).sizes
    assert many.slots == sizes.MOST_SLOTS["cpu"] and many.rows * many.questions <= many.slots
    assert engine(model, [r for r in requests if r.task == "qa"]).sizes.images == 0
    whatever = engine(model, None, slots=3).sizes
    assert (whatever.slots, whatever.prompt, whatever.answer) == (3, 512, NEW) and whatever.images > 2
