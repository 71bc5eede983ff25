import collections
import dataclasses
import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from unimed_jax.config import TASKS
from unimed_jax.data import packing
from unimed_jax.data.example import Example
from unimed_jax.data.order import source_order
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict


class Words:
    """A tokenizer whose ids are words, in the order met."""

    bos, eos, pad, coordinate_start = 1, 2, 0, None

    def __init__(self):
        self.ids = {}
        self.encoded = 0

    def encode(self, string):
        self.encoded += 1
        # The id is a function of the word alone, so that two runs agree.
        return [3 + sum(ord(c) * 31**i for i, c in enumerate(word)) % 50000 for word in string.split()]


class Fake:
    """Images of 8 x 8 with five questions each in two tasks, reports, and text alone."""

    id, checksum = "fake", ""

    def __init__(self, images=40, texts=60, split="train"):
        self.splits, self._images = (split,), {}
        rng = np.random.default_rng(0)
        self._examples = []
        for i in range(images):
            self._images[f"im{i}"] = rng.integers(1, 256, (8 if i % 2 else 11, 8, 3), dtype=np.uint8)
            for j in range(5):
                question, words = f"is w{i} x{j} ?", " ".join(["yes"] * rng.integers(1, 5))
                self._examples.append(Example(f"vqa{i}.{j}", "vqa", question, words, images=(f"im{i}",)))
            self._examples.append(
                Example(f"ref{i}", "refer", f"thing{i}", "{ a b c d }", images=(f"im{i}",))
            )
            report = f"report{i} " + "word " * int(rng.integers(5, 20))
            self._examples.append(Example(f"cap{i}", "caption", "", report, images=(f"im{i}",)))
        for i in range(texts):
            question = "what " + "is " * int(rng.integers(1, 8)) + f"t{i} ?"
            self._examples.append(Example(f"qa{i}", "qa", question, f"answer{i}"))

    def examples(self, split):
        return self._examples if split in self.splits else []

    def image(self, key):
        return self._images[key]


def sources(*parts):
    return [dict(zip(("tasks", "weight", "questions"), p, strict=True)) for p in parts]


MIXTURE = sources((("vqa",), 2.0, 3), (("refer",), 1.0, 1), (("caption",), 1.0, 1), (("qa",), 3.0, 1))


def config(mixture=MIXTURE, seed=0, fidelity="default", **data):
    data = {
        "rows": 4,
        "row_tokens": 96,
        "row_images": 2,
        "row_answers": 64,
        "window": 32,
        "threads": 0,
    } | data
    return from_config_dict(
        {
            "seed": seed,
            "fidelity": fidelity,
            "model": {
                "vision": {"image_size": 8, "patch_size": 2, "width": 8, "heads": 2},
                "connector": {"rate": 4},
            },
            "data": data | {"sources": [{"name": "fake"} | s for s in mixture]},
        }
    )


def pipeline(*args, dataset=None, tokenizer=None, **kwargs):
    settings = config(*args, **kwargs)
    return Pipeline([dataset or Fake()] * len(settings.data.sources), settings, tokenizer or Words())


def take(pipe, n, *args, **kwargs):
    return list(itertools.islice(pipe.batches(*args, **kwargs), n))


def same(left, right):
    assert len(left) == len(right) and left
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], key)


def test_batch_shapes_types_and_images():
    pipe = pipeline()
    batch = take(pipe, 1)[0]
    expected = {
        "images": ("uint8", (4, 2, 8, 8, 3)),
        "image_tasks": ("int32", (4, 2)),
        **{k: ("int32", (4, 96)) for k in ("tokens", "visual", "segments", "prefixes", "positions")},
        **{k: ("int32", (4, 64)) for k in ("target_index", "targets", "target_tasks")},
        "weights": ("float32", (4, 64)),
    }
    assert {k: (str(v.dtype), v.shape) for k, v in batch.items()} == expected
    filled = batch["images"].reshape(4, 2, -1).any(axis=-1)
    np.testing.assert_array_equal(filled, batch["image_tasks"] >= 0)
    np.testing.assert_array_equal(filled.sum(axis=1) * 4, (batch["visual"] >= 0).sum(axis=1))


def test_each_example_weighs_one():
    pipe = pipeline()
    for step, batch in enumerate(take(pipe, 5)):
        ids = pipe.record_ids(step)
        assert batch["weights"].sum() == pytest.approx(len(ids))
        assert pipe.stats(batch)["examples"] == len(ids) == len(set(ids))
        assert all(i.startswith("fake/") for i in ids)
        predicted = np.take_along_axis(batch["segments"], batch["target_index"], 1)[batch["weights"] > 0]
        assert (predicted > 0).all()


def drawn(pipe, rows):
    return [draw for row in range(rows) for draw in pipe.draws_of_row(row)]


def test_every_draw_is_placed_once():
    pipe = pipeline()
    draws = drawn(pipe, 400)
    assert len(set(draws)) == len(draws)
    # What is missing among the first draws waits in the open window: at most one back.
    missing = set(range(max(draws))) - set(draws)
    assert all(draw > max(draws) - 3 * 32 for draw in missing)


def test_an_epoch_is_every_group_once():
    pipe = pipeline(sources(((), 1.0, 2)), packing=False, rows=30)
    groups = 40 * 3 + 60
    order = [pipe.draw(k) for k in range(2 * groups)]
    keys = [(pipe.record(draw, 0).split(".")[0], draw.task) for draw in order]
    assert len(set(keys[:groups])) == len(set(keys[groups:])) == groups
    assert keys[:groups] != keys[groups:]  # another order


@pytest.mark.parametrize("fidelity", ["default", "paper"])
def test_an_epoch_of_single_questions_is_every_example_once(fidelity):
    pipe = pipeline(sources(((), 1.0, 1)), fidelity=fidelity)
    examples = 40 * 7 + 60
    asked = [pipe.record(pipe.draw(k), 0) for k in range(2 * examples)]
    assert len(set(asked[:examples])) == len(set(asked[examples:])) == examples
    assert asked[:examples] != asked[examples:]


@pytest.mark.parametrize("questions", [1, 2, 4])
@pytest.mark.parametrize("weight", [2.0, 0.5])
def test_a_weight_says_how_often_an_example_comes(questions, weight):
    """Where examples of both weights share an image, and where they do not."""

    class Mixed(Fake):
        def __init__(self):
            super().__init__(images=0, texts=0)
            for i in range(30):
                self._images[f"im{i}"] = np.zeros((8, 8, 3), np.uint8)
                heavy = i % 3 * 2  # of six: none, two, four
                self._examples += [
                    Example(f"{j < heavy:d}/{i}.{j}", "vqa", "is x ?", "yes", images=(f"im{i}",),
                            meta={"template": "heavy" if j < heavy else "light"})
                    for j in range(6)
                ]  # fmt: skip

    source = {"tasks": ("vqa",), "questions": questions, "weights": {"template": {"heavy": weight}}}
    pipe = Pipeline([Mixed()], config([source]), Words())
    asked = collections.Counter(
        name.split("/")[1]
        for draw in map(pipe.draw, range(1200))
        for name in (pipe.record(draw, i) for i in range(len(draw.rows)))
    )
    heavy, light = 10 * 2 + 10 * 4, 10 * 6 + 10 * 4 + 10 * 2
    assert asked["1"] / heavy / (asked["0"] / light) == pytest.approx(weight, rel=0.1)


def test_weights_are_shares_of_draws():
    pipe = pipeline()
    counts = np.bincount([pipe.draw(k).source for k in range(700)], minlength=4)
    assert abs(counts / 700 - np.array([2, 1, 1, 3]) / 7).max() < 0.01


def test_questions_of_a_draw_share_image_and_task():
    pipe = pipeline(sources((("vqa",), 1.0, 3), (("refer",), 1.0, 3)))
    asked = set()
    for k in range(200):
        draw = pipe.draw(k)
        records = [pipe.record(draw, i) for i in range(len(draw.rows))]
        assert len(records) == (3 if draw.source == 0 else 1) and len(set(records)) == len(records)
        assert draw.task == ("vqa", "refer")[draw.source]
        if draw.source == 0:
            assert len({record.split(".")[0] for record in records}) == 1
        asked.update(records)
    assert len(asked) > 200  # of 240: chosen at random, not always the first
    variants = {pipe.draw(k).variants for k in range(200)}
    assert len(variants) > 4  # the instructions vary


def test_fewer_questions_where_they_do_not_fit():
    wide = pipeline(sources((("vqa",), 1.0, 5)))
    narrow = pipeline(sources((("vqa",), 1.0, 5)), row_tokens=40)
    few = pipeline(sources((("vqa",), 1.0, 5)), row_answers=6)
    for k in range(100):
        assert len(wide.draw(k).rows) == 5
        for pipe in (narrow, few):
            size = pipe.draw(k).size
            assert 1 <= len(pipe.draw(k).rows) < 5
            assert size[0] <= pipe.shape.tokens and size[1] == 1 and size[2] <= pipe.shape.answers
    take(narrow, 10), take(few, 10)


def test_a_batch_depends_on_seed_and_step_alone():
    expected = take(pipeline(), 8)
    same(take(pipeline(threads=3), 8), expected)
    resumed = pipeline()
    same(take(resumed, 3, start_step=5), expected[5:])
    same(take(resumed, 8), expected)
    asked = pipeline()
    asked.record_ids(6)
    same(take(asked, 1, start_step=2), expected[2:3])
    with pytest.raises(AssertionError):
        same(take(pipeline(seed=1), 8), expected)
    with pytest.raises(AssertionError):
        same(expected[:4], expected[4:])


@pytest.mark.parametrize("mode", [{}, {"packing": False}, {"packing": False, "mixing": "per_batch"}])
def test_processes_share_the_global_batch(mode):
    whole = take(pipeline(**mode), 4)
    rows = ([0, 3], [1, 2])  # not always neighbours
    parts = [take(pipeline(threads=2, **mode), 2, start_step=2, own=own) for own in rows]
    for step in range(2):
        for key, expected in whole[2 + step].items():
            for own, part in zip(rows, parts, strict=True):
                np.testing.assert_array_equal(part[step][key], expected[own])


def test_threads_may_ask_at_once():
    pipe, expected = pipeline(), pipeline()
    seen = {}
    threads = [
        threading.Thread(target=lambda r=r: seen.update({r: pipe.draws_of_row(r)}))
        for r in reversed(range(60))
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert seen == {r: expected.draws_of_row(r) for r in range(60)}


def test_one_source_a_batch():
    pipe = pipeline(packing=False, mixing="per_batch", rows=5)
    order = source_order([2.0, 1.0, 1.0, 3.0], 0)
    expected = list(itertools.islice(order, 60))
    records = []
    for step, batch in enumerate(take(pipe, 60)):
        tasks = set(batch["target_tasks"][batch["target_tasks"] >= 0])
        assert tasks == {TASKS.index(("vqa", "refer", "caption", "qa")[expected[step]])}
        records += [(expected[step], i) for i in pipe.record_ids(step)]
    refer = [i for source, i in records if source == 1]
    # a source goes on where its last batch ended
    assert len(set(refer[:40])) == min(40, len(refer)) > 30
    same(
        take(pipe, 3, start_step=20), take(pipeline(packing=False, mixing="per_batch", rows=5), 23)[20:]
    )


def test_published_order_of_sources():
    file = Path(__file__).parents[1] / "goldens" / "uni_med" / "open" / "aux.json"
    golden = json.loads(file.read_text())["multi_iter"]
    order = source_order(golden["ratios"], golden["python_random_seed"])
    assert list(itertools.islice(order, 100)) == golden["first_100"]
    mixture = [((TASKS[i % 2],), float(weight), 1) for i, weight in enumerate(golden["ratios"])]
    pipe = pipeline(sources(*mixture), seed=golden["python_random_seed"], fidelity="paper")
    assert [pipe.draw(4 * step).source for step in range(100)] == golden["first_100"]


def test_paper_rows_hold_one_example():
    pipe = pipeline(sources((("vqa",), 1.0, 1)), fidelity="paper")
    batch = take(pipe, 1)[0]
    assert batch["segments"].max() == 1 and len(pipe.record_ids(0)) == 4
    assert set(np.unique(batch["weights"])) == {0, 1}


def test_first_fit_counts_all_quotas():
    sizes = np.array([[6, 1, 1], [5, 1, 1], [4, 0, 1], [3, 1, 1], [2, 0, 3], [1, 0, 1]])
    row_of = packing.first_fit(sizes, np.array([10, 1, 3]), range(6))
    assert row_of.tolist() == [0, 1, 0, 2, 3, 1]
    for row in range(4):
        assert (sizes[row_of == row].sum(axis=0) <= [10, 1, 3]).all()


def synthetic_sizes(text_share, n=20000):
    """Image groups of about 90 tokens, short questions of about 30."""
    rng = np.random.default_rng(0)
    text = rng.random(n) < text_share
    tokens = np.where(text, rng.integers(20, 40, n), 20 + rng.integers(55, 90, n))
    return np.stack([tokens, ~text, tokens // 4], axis=1)


def test_packing_wastes_little():
    sizes = synthetic_sizes(0.6)
    plan = packing.PackingPlan(lambda d: tuple(sizes[d]), (256, 2, 128), 512, 0)
    rows = [plan[r] for r in range(1600)]
    filled = np.array([sizes[row].sum(axis=0) for row in rows])
    assert (filled <= [256, 2, 128]).all()
    padding, vision = 1 - filled[:, :2].mean(axis=0) / [256, 2]
    assert padding < 0.05 and vision < 0.10
    draws = np.array([d for row in rows for d in row])
    assert len(set(draws)) == len(draws)
    # nobody waits for more than the next window
    assert np.abs(draws - np.arange(len(draws))).max() < 2 * 512


def test_a_plan_that_goes_on_at_a_mark_asks_for_no_draw_before_it():
    sizes, asked = synthetic_sizes(0.6), []

    def size(draw):
        asked.append(draw)
        return tuple(sizes[draw])

    plan = packing.PackingPlan(size, (256, 2, 128), 512, 7)
    rows = [plan[r] for r in range(1600)]
    again = packing.PackingPlan(size, (256, 2, 128), 512, 7)
    mark = json.loads(json.dumps(plan.mark(1000)))
    assert 700 < mark[0] <= 1000
    again.go_on(packing.Mark(*mark))
    asked.clear()
    assert [again[r] for r in range(1000, 1600)] == rows[1000:]
    assert min(asked) >= min([*mark[3], mark[2]]) > 1000
    assert again.mark(1500).rows > 1000 and again[3] == rows[3]  # from the beginning after all


def test_batches_go_on_from_a_mark():
    expected, first, second = take(pipeline(), 8), pipeline(), pipeline()
    take(first, 5)
    second.go_on(json.loads(json.dumps(first.mark(4))))
    same(take(second, 4, start_step=4), expected[4:])
    assert pipeline(packing=False).mark(4) is None


def test_packing_of_rows_that_never_fill_goes_on():
    plan = packing.PackingPlan(lambda d: (60, 1, 1), (100, 1, 10), 16, 0)
    draws = [d for r in range(200) for d in plan[r]]
    assert len(draws) == len(set(draws)) == 200 and max(draws) < 232


def test_no_draw_waits_for_more_than_the_next_window():
    # The large ones fill a row, the others stay alone in theirs: waiting does not help them.
    plan = packing.PackingPlan(lambda d: (60 if d % 16 == 0 else 95, 0, 1), (100, 1, 10), 32, 0)
    assert {plan[r][0] for r in range(400)} >= set(range(400 - 2 * 32))


def test_stats():
    batch = take(pipeline(), 1)[0]
    stats = pipeline().stats(batch)
    assert stats["tokens"] == (batch["segments"] > 0).sum()
    assert stats["padding_waste"] == pytest.approx(1 - stats["tokens"] / (4 * 96))
    assert stats["vision_waste"] == pytest.approx((batch["image_tasks"] < 0).sum() / 8)
    text = take(pipeline(sources((("qa",), 1.0, 1)), row_images=0), 1)[0]
    assert pipeline().stats(text)["vision_waste"] == 0 and text["images"].shape == (4, 0, 8, 8, 3)


def test_questions_are_tokenised_once():
    words = Words()
    pipe = pipeline(sources((("refer",), 1.0, 1)), tokenizer=words)
    measured = words.encoded
    drawn(pipe, 400)
    assert words.encoded == measured  # the plan needs lengths only
    take(pipe, 50)
    encoded = words.encoded
    take(pipe, 50)
    assert encoded == words.encoded <= 2 * (1 + 40 * 5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            {"mixture": sources((("identify",), 1.0, 1))},
            "'fake' has no train examples of identify .it has caption",
        ),
        ({"mixture": []}, "config.data.sources is empty"),
        ({"row_images": 0}, "config.data.row_images=0.*'fake' has images"),
        (
            {"row_tokens": 10},
            r"need more than config.data.row_tokens=10: fake/.* \(\d+\), .* \.\.\.; "
            r"set config.data.row_tokens=",
        ),
        (
            {"row_answers": 3},
            r"need more than config.data.row_answers=3: fake/.*; "
            r"set config.data.row_answers=\d+ or lower",
        ),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(UserError, match=message):
        take(pipeline(**kwargs), 3)


def test_errors_come_through_threads_as_they_are():
    with pytest.raises(UserError, match="row_answers=3"):
        take(pipeline(row_answers=3, threads=2), 3)


def test_empty_data():
    with pytest.raises(UserError, match="'fake' has no train examples .its splits: test"):
        pipeline(sources(((), 1.0, 1)), dataset=Fake(split="test"))


@pytest.mark.parametrize(
    "change, message", [({"task": "qa"}, "is text only"), ({"images": ()}, "needs an image")]
)
def test_task_and_image_go_together(change, message):
    dataset = Fake()
    dataset._examples[3] = dataclasses.replace(dataset._examples[3], **change)
    with pytest.raises(UserError, match=f"record vqa0.3.*{message}"):
        pipeline(sources(((), 1.0, 1)), dataset=dataset)
