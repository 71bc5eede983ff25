"""Blind baselines, permuted images, the schema of metrics.json and the files of a report, on a toy data set."""

import dataclasses
import json
import sys
from collections import Counter

import numpy as np
import pytest

from unimed_jax.config import TASKS, default_config
from unimed_jax.data.example import Example
from unimed_jax.data.forms import box_to_text, text_to_box
from unimed_jax.errors import UserError
from unimed_jax.evaluate import baselines, tasks
from unimed_jax.evaluate.metrics import captions
from unimed_jax.evaluate.report import write_report
from unimed_jax.evaluate.report.markdown import verdict
from unimed_jax.evaluate.report.pictures import draw_routing, token_grid
from unimed_jax.settings import from_config_dict

SIZE = (48, 32)  # width, height: not square, so that mixing them up shows


class Toy:
    """Twelve images in six slabs a split; the image alone tells the answers."""

    name, checksum = "toy", "c" * 64

    def __init__(self, per_task=24, left_out=()):
        self.splits = {}
        for s, split in enumerate(("train", "val", "test")):
            self.splits[split] = [
                self.example(split, s, task, i) for task in TASKS if task not in left_out for i in range(per_task)
            ]

    def example(self, split, s, task, i):
        shape = ("disc", "ring", "bar")[i % 3]
        # Every slab has its place for the box, so that another slab's image misleads.
        x, y = 2 + 3 * (i % 12), 2 + (i % 3)
        box = (x, y, x + 10, y + 12)
        text = box_to_text(box, *SIZE)
        question, answer, meta = {
            "vqa": (f"Is the {shape} seen?", ("yes", "no")[i % 2], {"template": "seen", "answer_type": "closed"})
            if i % 4
            else ("What is it?", shape, {"template": "what", "answer_type": "open"}),
            "refer": (shape, text, {"plane": ("axial", "coronal")[i % 2]}),
            "identify": (text, shape, {}),
            "caption": ("", f"A {shape} stands in the picture, small and bright, number {i % 12}.", {}),
            "cls": ("", shape, {"template": "shape"}),
            "qa": (f"Chapter of {i}?", ("heart", "lung")[i % 2], {"template": "chapter"}),
        }[task]
        return Example(
            f"{split}-{task}-{i}",
            task,
            question,
            answer,
            () if task == "qa" else (f"{s}-{i % 12}",),
            box if task in ("refer", "identify") else None,
            f"slab{i % 6}" if task != "qa" else "",
            meta,
        )

    def examples(self, split):
        return self.splits[split]

    def image(self, key):
        s, i = map(int, key.split("-"))
        return np.full((SIZE[1], SIZE[0], 3), 20 * i + s, np.uint8)


class Model:
    """Answers rightly where it sees the right image (or needs none); remembers what it was asked."""

    def __init__(self, toy):
        self.toy, self.calls = toy, []

    def __call__(self, examples, images):
        assert len(examples) == len(images) <= 16
        self.calls.append(len(examples))
        out = []
        for example, shown in zip(examples, images, strict=True):
            assert len(shown) == len(example.images)
            right = all(np.array_equal(a, self.toy.image(key)) for a, key in zip(shown, example.images, strict=True))
            out.append(example.answer if right else "")
        return out


@pytest.fixture
def config():
    settings = default_config()
    settings.name = "toy"
    settings.evaluate.bootstrap = 200
    settings.evaluate.batch = 16
    return from_config_dict(settings)


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)  # METEOR takes 9 s to start


# ------------------------------------------------------------------------------ baselines


def make(task, question="", answer="", name="x", **meta):
    return Example(name, task, question, answer, meta=meta)


def test_majority_per_template_and_per_question():
    train = [make("vqa", "a?", answer, template="t") for answer in ("yes", "yes", "no")]
    train += [make("vqa", "b?", answer, template="t") for answer in ("no", "no", "no")]
    train += [make("vqa", "c?", "lung", template="u"), make("cls", "", "disc", template="t")]
    fitted = baselines.fit("vqa", train)
    per_template, per_question = fitted["majority_per_template"], fitted["majority_per_question"]
    assert per_template(make("vqa", "a?", template="t")) == "no"
    assert per_question(make("vqa", "a?", template="t")) == "yes"
    assert per_question(make("vqa", "unseen?", template="u")) == "lung"
    assert per_template(make("vqa", "a?", template="unseen")) == "no"
    assert baselines.most_frequent(["b", "a", "b", "a", "c"]) == "a"  # equals: by the alphabet, not by order
    assert baselines.fit("qa", train) == {}


def test_median_box_per_prompt_and_plane():
    boxes = {"axial": ["{<0><0><10><10>}", "{<2><2><12><12>}", "{<90><4><99><14>}"], "sagittal": ["{<50><50><60><60>}"]}
    train = [make("refer", "disc", text, plane=plane) for plane, texts in boxes.items() for text in texts]
    train.append(make("refer", "bar", "{<20><20><30><30>}", plane="axial"))
    fitted = baselines.fit("refer", train)
    asked = make("refer", "disc", plane="axial")
    assert fitted["median_box_per_prompt"](asked) == "{<26><3><36><13>}"
    assert fitted["median_box_per_prompt_and_plane"](asked) == "{<2><2><12><12>}"
    assert fitted["median_box_per_prompt_and_plane"](make("refer", "bar", plane="coronal")) == "{<20><20><30><30>}"
    assert text_to_box(fitted["median_box_per_prompt"](make("refer", "unseen"))) is not None
    assert list(baselines.fit("refer", [make("refer", "disc", "{<0><0><9><9>}")])) == ["median_box_per_prompt"]
    with pytest.raises(UserError, match="record bad: no box"):
        baselines.fit("refer", [make("refer", "disc", "on the left", name="bad")])


def test_nearest_boxes_vote_with_25_neighbours():
    near = [make("identify", f"{{<{i}><0><50><50>}}", "near") for i in range(13)]
    ring = [make("identify", f"{{<{i}><0><50><50>}}", "ring") for i in range(20, 32)]
    far = [make("identify", "{<60><60><90><90>}", "far")] * 40
    answer = baselines.fit("identify", far + ring + near)["nearest_25_boxes"]
    assert answer(make("identify", "{<0><0><50><50>}")) == "near"  # 13 against 12
    assert answer(make("identify", "box {<61><60><90><90>}")) == "far"
    assert baselines.fit("identify", near[:1])["nearest_25_boxes"](make("identify", "{<9><9><10><10>}")) == "near"


def test_medoid_report_is_the_most_typical():
    typical = "the left ventricle is wide and the brain is small"
    reports = [f"{typical} {end}" for end in ("today", "here", "now")] + [typical] + ["nothing to see here at all"] * 2
    assert baselines.medoid(reports) == typical
    assert baselines.medoid(reports * 500) == typical  # sampled, evenly
    assert baselines.medoid(["x"]) == "x"


def test_baselines_see_training_examples_only(config):
    toy = Toy()
    scores, records = tasks.evaluate(Model(toy), toy, toy.examples("train"), config, "test")
    changed = Toy()
    changed.splits["test"] = [
        dataclasses.replace(e, answer="zebra") if e.task in ("vqa", "cls", "qa", "identify", "caption") else e
        for e in changed.splits["test"]
    ]
    _, again = tasks.evaluate(Model(changed), changed, changed.examples("train"), config, "test")
    for before, after in zip(records, again, strict=True):
        names = [name for name in before["blind"] if name != tasks.PERMUTED]
        assert names and all(before["blind"][name] == after["blind"][name] for name in names)


# ------------------------------------------------------------------------------ permutation and selection


@pytest.mark.parametrize("seed", range(5))
def test_permuted_images_leave_image_and_slab(seed):
    rng = np.random.default_rng(seed)
    slabs = np.repeat(np.arange(9), rng.integers(1, 12, 9))
    examples = [
        Example(str(i), "cls", "", "", f"{slab}-{rng.integers(3)}", cluster=f"s{slab}") for i, slab in enumerate(slabs)
    ]
    images = tasks.permute_images(examples, seed)
    assert Counter(images) == Counter(e.images for e in examples)
    assert all(image[0].split("-")[0] != e.images[0].split("-")[0] for image, e in zip(images, examples, strict=True))
    assert images == tasks.permute_images(examples, seed) != tasks.permute_images(examples, seed + 1)


def test_permutation_where_one_slab_holds_most():
    examples = [Example(str(i), "cls", "", "", f"image{i % 5}", cluster="s" if i < 8 else "t") for i in range(10)]
    images = tasks.permute_images(examples, 0)
    assert all(image != e.images for image, e in zip(images, examples, strict=True))
    assert tasks.permute_images(examples[:1], 0) is None
    assert tasks.permute_images([dataclasses.replace(e, images=("one",)) for e in examples], 0) is None


def test_limit_spreads_over_clusters_whatever_the_seed():
    examples = [Example(str(i), "cls", "", "", "x", cluster=f"s{min(i // 40, 4)}") for i in range(200)]
    chosen = tasks.select(examples, 50)
    assert Counter(e.cluster for e in chosen) == {f"s{k}": 10 for k in range(5)}
    assert chosen == tasks.select(examples, 50) and tasks.select(examples, 0) == examples
    assert [int(e.id) for e in chosen] == sorted(int(e.id) for e in chosen)
    one_item_clusters = [dataclasses.replace(e, cluster="") for e in examples]
    assert len(tasks.select(one_item_clusters, 50)) == 50


# ------------------------------------------------------------------------------ scores


def test_a_model_that_sees_beats_every_baseline(config):
    toy = Toy()
    model = Model(toy)
    scores, records = tasks.evaluate(model, toy, toy.examples("train"), config, "test")
    assert list(scores) == list(TASKS) and len(records) == 6 * 24
    assert sum(model.calls) == 11 * 24  # five tasks with permuted images, six with their own
    for task, part in scores.items():
        primary = part["primary"]
        assert part["n"] == 24 and part["clusters"] == (24 if task == "qa" else 6)
        assert part["corrected"][primary]["value"] > (0.85 if task == "refer" else 0.999)
        assert part["blind"] and all(primary in values for values in part["blind"].values())
        if task != "qa":
            assert part["blind"][tasks.PERMUTED][primary] == 0.0
        best = max(part["blind"], key=lambda name: part["blind"][name][primary])
        assert part["margin"]["baseline"] == best
        difference = part["corrected"][primary]["value"] - part["blind"][best][primary]
        assert part["margin"]["value"] == pytest.approx(difference)
        low, high = part["margin"]["ci95"]
        assert low <= part["margin"]["value"] + 1e-12 and part["margin"]["value"] <= high + 1e-12
    assert scores["qa"]["published"] == {}
    assert scores["refer"]["published"]["miou"] > 0.85
    assert scores["caption"]["published"]["meteor"] == "not computed: needs Java"
    vqa = scores["vqa"]
    assert (vqa["n_open"], vqa["n_closed"]) == (6, 18) and vqa["published"]["closed_accuracy"] == 1.0
    assert {name: part["n"] for name, part in vqa["per_template"].items()} == {"seen": 18, "what": 6}
    assert vqa["per_template"]["what"]["blind"][tasks.PERMUTED] == 0.0
    assert verdict(scores["cls"]["margin"]) == "above blind"


def test_a_blind_or_silent_model_does_not_win(config):
    toy = Toy()
    scores, _ = tasks.evaluate(lambda e, i: [""] * len(e), toy, toy.examples("train"), config, "test")
    for part in scores.values():
        assert part["corrected"][part["primary"]]["value"] == 0.0 and part["n"] == 24
        assert part["margin"]["value"] < 0 and part["margin"]["ci95"][0] < 0
        assert verdict(part["margin"]) in ("below blind", "undecided")
    assert verdict(scores["refer"]["margin"]) == verdict(scores["caption"]["margin"]) == "below blind"
    assert scores["caption"]["published"]["pairs_scored"] == 0


def test_predictions_keep_their_example(config):
    toy = Toy()
    _, records = tasks.evaluate(lambda e, i: [x.id for x in e], toy, toy.examples("train"), config, "val")
    assert all(record["prediction"] == record["id"] and record["split"] == "val" for record in records)
    assert {tuple(r["image_size"]) for r in records if r["images"]} == {SIZE}
    assert [r["box"] for r in records if r["id"] == "val-refer-1"] == [[5, 3, 15, 15]]


def test_chat_forms_are_scored_as_med_moe_publishes(config):
    """Recall of open and a substring for closed answers, in per cent; the corrected ones read whole words."""
    rows = [("OPEN", "left lung", "the lung"), ("CLOSED", "no", "it is normal"), ("CLOSED", "yes", "yes")]
    records = [
        {"task": "vqa", "cluster": str(i), "template": "", "reference": reference, "prediction": prediction}
        | {"box": None, "image_size": [9, 9], "meta": {"answer_type": kind}, "blind": {}}
        for i, (kind, reference, prediction) in enumerate(rows)
    ]
    chat = dataclasses.replace(config, text=dataclasses.replace(config.text, form="phi"))
    published, ours = (tasks.score("vqa", records, chat)[key] for key in ("published", "corrected"))
    assert published["open_recall"] == 50.0 and published["closed_accuracy"] == 100.0 and "bleu4" not in published
    assert ours["open_recall"]["value"] == 0.5 and ours["closed_accuracy"]["value"] == 0.5
    assert "open_recall" not in tasks.score("vqa", records, config)["published"]  # Uni-Med's rules


def test_published_references_are_cut_under_max_words(config):
    record = {
        "task": "identify",
        "cluster": "a",
        "template": "",
        "reference": "one two three",
        "prediction": "one two",
        "box": None,
        "image_size": [9, 9],
        "meta": {},
        "blind": {},
    }
    cut = dataclasses.replace(config, text=dataclasses.replace(config.text, max_words=2))
    assert tasks.score("identify", [record], config)["published"]["accuracy"] == 0.0
    scores = tasks.score("identify", [record], cut)
    assert scores["published"]["accuracy"] == 1.0 and scores["corrected"]["exact_match"]["value"] == 0.0
    assert scores["corrected"]["exact_match"]["ci95"] is None and scores["margin"] is None and len(scores["notes"]) == 3


def test_a_split_without_any_example_is_an_error(config):
    toy = Toy(per_task=0)
    with pytest.raises(UserError, match="'toy' has no example in split 'test'"):
        tasks.evaluate(Model(toy), toy, [], config, "test")


# ------------------------------------------------------------------------------ files


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("routed", [True, False])
def test_report_writes_every_file(config, tmp_path, routed):
    toy = Toy(left_out=("cls",))
    results, records = {}, []
    for split in ("val", "test"):
        results[split], lines = tasks.evaluate(Model(toy), toy, toy.examples("train"), config, split)
        records += lines
    routing = {
        "tv_trained": {"value": np.float32(0.25), "ci95": np.array([0.2, 0.3])},
        "tv_step0": {"value": 0.01, "ci95": [0.0, 0.02]},
        "tv_token_router": 0.0,
        "mean_weights": np.full((5, 3), 1 / 3),
        "maps": np.random.default_rng(0).random((5, config.model.tokens_per_image, 3)),
    }
    returned = write_report(
        tmp_path / "run", config, toy.checksum, results, records, toy.image, routing if routed else None
    )
    folder = tmp_path / "run"
    metrics = strict((folder / "metrics.json").read_text())
    assert metrics == returned
    assert set(metrics) >= {"config_hash", "data_checksum", "code_version", "fidelity", "knobs", "seed", "split"}
    assert metrics["split"] == "test" and set(metrics["tasks"]) == set(metrics["validation"]["tasks"]) == set(TASKS)
    assert metrics["knobs"]["evaluate.scoring"] == "corrected"
    for task, part in metrics["tasks"].items():
        if task == "cls":
            assert part["n"] == 0 and part["corrected"] == {} and part["notes"]
            continue
        for entry in part["corrected"].values():
            low, high = entry["ci95"]
            assert low - 1e-9 <= entry["value"] <= high + 1e-9
    assert ("routing" in metrics) == routed == (folder / "routing.png").exists()
    if routed:
        assert metrics["routing"]["tv_trained"]["ci95"][0] == pytest.approx(0.2) and "maps" not in metrics["routing"]
    lines = [strict(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == len(records) == 2 * 5 * 24
    keys = "id task split template cluster question images reference prediction box image_size meta"
    assert set(keys.split()) <= set(lines[0])
    assert (folder / "predictions.png").stat().st_size > 10_000
    text = (folder / "report.md").read_text()
    for piece in ("not a medical device", f"evaluate --run={folder}", "| refer | 24 | miou |", "no example"):
        assert piece in text
    assert "predictions.png" in text
    assert "ONE average brain" not in text and ("routing.png" in text) == routed


def test_scores_can_be_made_again_from_predictions(config, tmp_path):
    toy = Toy()
    results, records = tasks.evaluate(Model(toy), toy, toy.examples("train"), config, "test")
    write_report(tmp_path, config, toy.checksum, {"test": results}, records, toy.image)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for task in TASKS:
        again = tasks.plain(tasks.score(task, [line for line in lines if line["task"] == task], config))
        assert again == tasks.plain(results[task])


def test_report_says_that_the_demo_data_is_one_brain_and_leads_with_published(tmp_path):
    settings = default_config()
    settings.data.sources = ({"name": "brain"},)
    settings.evaluate.scoring, settings.evaluate.bootstrap = "published", 20
    config, toy = from_config_dict(settings), Toy(per_task=4)
    results, records = tasks.evaluate(Model(toy), toy, toy.examples("train"), config, "test")
    write_report(tmp_path, config, toy.checksum, {"test": results}, records, toy.image)
    text = (tmp_path / "report.md").read_text()
    assert "ONE average brain" in text and text.index("as published on test") < text.index("Corrected scores on test")


def test_without_matplotlib_the_numbers_are_still_written(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    toy = Toy(per_task=4)
    results, records = tasks.evaluate(Model(toy), toy, toy.examples("train"), config, "test")
    write_report(tmp_path, config, toy.checksum, {"test": results}, records, toy.image)
    assert (tmp_path / "metrics.json").exists() and "install matplotlib" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "aggregation, rate, image, expected",
    [
        ("projection", 4, 64, (8, 2)),
        ("projection", 4, 48, (1, 9)),  # strips wrap over the rows of a 6 x 6 grid
        ("block", 4, 64, (4, 4)),
        ("avgpool", 4, 64, (4, 4)),
    ],
)
def test_token_grid(aggregation, rate, image, expected, tmp_path):
    settings = default_config()
    settings.model.connector.aggregation, settings.model.connector.rate = aggregation, rate
    settings.model.vision.image_size = image
    config = from_config_dict(settings)
    assert token_grid(config) == expected
    tokens = expected[0] * expected[1]
    draw_routing(tmp_path / "r.png", {"maps": np.full((5, tokens, 2), 0.5)}, expected)  # equal weights draw too


def test_numbers_that_are_not_finite_become_null():
    assert tasks.plain({"a": [float("nan"), np.float32("inf"), np.arange(2)], 3: np.int64(1)}) == {
        "a": [None, None, [0, 1]],
        "3": 1,
    }


def test_code_version_names_the_package():
    version = tasks.code_version()
    assert version and "\n" not in version
