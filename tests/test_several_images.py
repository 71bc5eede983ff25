"""Studies of no image, one, two and five, from their records to an exported model that answers."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support.fake_brain import tiny_config

from unimed_jax import main as cli
from unimed_jax.analyze.chain import train_and_evaluate
from unimed_jax.config import VISUAL_TASKS, TextConfig
from unimed_jax.data import fitting
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.example import Example
from unimed_jax.data.forms import IMAGE, form_of, text_of
from unimed_jax.data.layout import VISUAL, Encoder
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.data.tokenizer import Tokenizer, corpus, train_tokenizer
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters
from unimed_jax.predict.predictor import Predictor
from unimed_jax.predict.request import Request
from unimed_jax.runs.open import open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train import loop

pytestmark = pytest.mark.usefixtures("quick_compiles")
COUNTS = {"qa": 0, "cls": 1, "vqa": 2, "caption": 5}  # images of a study, by the task that asks


def studies(folder, each=4):
    """Writes studies of each count, in our own form; every image has a colour of its own."""
    rng, lines = np.random.default_rng(0), []
    (folder / "views").mkdir(parents=True)
    for split in ("train", "test"):
        for i in range(each * len(COUNTS)):
            task, count = list(COUNTS.items())[i % len(COUNTS)]
            keys = [f"views/{split}{i}_{view}.png" for view in range(count)]
            for key in keys:
                Image.new("RGB", (20, 16), tuple(rng.integers(0, 256, 3).tolist())).save(folder / key)
            record = {"id": f"{split}{i}", "images": keys, "task": task, "split": split}
            record |= {"cluster": f"patient{i}", "answer": f"study {i} of {count}"}
            lines.append(json.dumps(record | {"question": f"What does study {i} show?"}))
    (folder / "studies.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder):
    config = tiny_config(steps=2, save_every=1)
    config.data.sources = (dict(name="jsonl", id="studies", path=str(folder)),)
    config.data.cache = str(folder / "cache")
    config.data.rows, config.data.row_images, config.data.row_tokens = 4, 7, 224
    config.evaluate.splits, config.evaluate.max_new_tokens = ("test",), 4
    return config


@pytest.fixture(scope="module")
def folder(built_once):
    return built_once("studies", lambda place: studies(place / "set")) / "set"


@pytest.fixture(scope="module")
def run(quick_compiles, built_once, folder):
    """A run of two steps on the studies, scored."""
    config = from_config_dict(settings(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *settings: None)
        yield open_run(built_once("studies_run", lambda place: train_and_evaluate(config, place)))


def batches(config, tokenizer):
    """Returns the data set, its pipeline, and the first two batches."""
    datasets = open_sources(config.data)
    pipeline = Pipeline(datasets, config, tokenizer)
    rows = pipeline.batches()
    return datasets[0], pipeline, [next(rows), next(rows)]


def test_images_stand_in_their_order_in_the_slots_of_the_row(folder, tmp_path):
    config = from_config_dict(settings(folder))
    train = open_sources(config.data)[0].examples("train")
    train_tokenizer(corpus(train, config.text), config.text, tmp_path / "tokenizer")
    data, pipeline, found = batches(config, Tokenizer.load(tmp_path / "tokenizer"))
    read = {e.id: e for e in data.examples("train")}
    seen = dict.fromkeys(COUNTS, 0)
    per_image, vision = config.model.tokens_per_image, config.model.vision
    for step, batch in enumerate(found):
        for b, row in enumerate(pipeline.plan(step)):
            slot = 0
            for segment, draw in enumerate(row, start=1):
                example = read[pipeline.record(draw, 0).partition("/")[2]]
                seen[example.task] += 1
                here = batch["segments"][b] == segment
                places = batch["visual"][b][here]
                last = slot + len(example.images)
                expected = np.arange(slot * per_image, last * per_image)
                np.testing.assert_array_equal(places[places >= 0], expected)
                for i, key in enumerate(example.images):
                    pixels = fitting.fit(data.image(key), config.data.fit, vision)
                    np.testing.assert_array_equal(batch["images"][b, slot + i], pixels)
                    assert batch["image_tasks"][b, slot + i] == VISUAL_TASKS.index(example.task)
                slot = last
            assert (batch["image_tasks"][b, slot:] == -1).all()
    assert all(seen.values()), seen


@pytest.mark.slow
def test_a_run_continues_to_the_bit_and_counts_every_image(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: None)
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    again = loop.train(run.config, tmp_path / "run")
    for path, leaf in parameters(run.model).items():
        np.testing.assert_array_equal(parameters(again.model)[path], leaf, err_msg=path)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    for line, batch in zip(lines, batches(run.config, run.tokenizer)[2], strict=True):
        assert line["waste/vision"] == pytest.approx((batch["image_tasks"] < 0).mean())
        for task in VISUAL_TASKS:  # routing is the mean over the images of a task
            weights = [line[f"routing/{task}_{e}"] for e in range(run.config.model.connector.experts)]
            if (batch["image_tasks"] == VISUAL_TASKS.index(task)).any():
                assert sum(weights) == pytest.approx(1, abs=1e-5)
            else:
                assert set(weights) == {None}


@pytest.mark.slow
def test_scores_name_every_image_and_permuted_ones_are_of_other_studies(run):
    lines = (run.folder / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["task"] for record in records} == set(COUNTS)
    for record in records:
        count, number = COUNTS[record["task"]], record["id"].removeprefix("studies/test/test")
        assert record["images"] == [f"views/test{number}_{view}.png" for view in range(count)]
        assert len(record["permuted_images"] or ()) == count
        assert not set(record["images"]) & set(record["permuted_images"] or ())
    routing = json.loads((run.folder / "metrics.json").read_text())["routing"]
    assert routing["images"] == 4 * sum(COUNTS.values())
    assert (run.folder / "predictions.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_study_is_answered_alone_as_among_others_and_its_order_matters(run):
    data = open_sources(run.config.data)[0]
    predictor = Predictor(run.model, run.config, run.tokenizer)
    requests = [
        Request(e.task, e.question, tuple(data.image(key) for key in e.images), id=e.id)
        for e in data.examples("test")
    ][:8]
    assert [len(request.images) for request in requests[:4]] == list(COUNTS.values())
    assert predictor.answers(requests) == [predictor.answers([request])[0] for request in requests]
    encoder = Encoder(run.tokenizer, run.config.text, run.config.model.tokens_per_image)
    five = next(e for e in data.examples("test") if len(e.images) == 5)
    assert (encoder.prompt(five).prefix == VISUAL).sum() == 5 * run.config.model.tokens_per_image
    with pytest.raises(UserError, match=r"tokens \(360 of 90 images\), more than .*fewer images"):
        predictor.answers([Request("caption", "", requests[3].images * 18, id="many")])


@pytest.mark.slow
def test_predict_takes_each_image_of_run_and_export(run, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: None)
    out = tmp_path / "model"
    assert cli.main(["export", f"--run={run.folder}", f"--out={out}", "--format=model"]) == 0
    views = folder / "views"
    asked = [
        ["--task=qa", "--text=Why?"],
        ["--task=vqa", "--text=What?", *(f"--image={views}/test2_{i}.png" for i in range(2))],
        ["--task=caption", *(f"--image={views}/test3_{i}.png" for i in range(5))],
    ]
    for words in asked:
        said = []
        for model in (run.folder, out):
            capsys.readouterr()
            assert cli.main(["predict", f"--run={model}", *words]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
    assert cli.main(["predict", f"--run={out}", "--task=refer", "--text=it", *asked[1][2:]]) == 2
    assert "task 'refer' is about one image, not 2" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["training", "evaluation while training"])
def test_a_row_with_too_few_slots_is_one_sentence_before_training(folder, tmp_path, monkeypatch, where):
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: None)
    config = settings(folder)
    config.data.row_images = 4
    match = r"4 of 16 .* than config.data.row_images=4: studies/train3 \(5\), .*row_images=5\.$"
    if where != "training":
        source = dict(config.data.sources[0])
        config.data.sources = (source | dict(tasks=("vqa",)),)
        config.evaluate.sources = (source,)
        entry = dict(source="studies", task="caption", split="test", every=1)
        config.evaluate.entries = (entry,)
        match = r"studies/test/test3 needs rows of .* row_images"
    with pytest.raises(UserError, match=match) as error:
        train_and_evaluate(from_config_dict(config), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run/log.jsonl").exists()


@pytest.mark.parametrize("form", ["unimed", "stablelm", "phi", "plain", "simple"])
def test_every_form_marks_every_image_once(form):
    found = form_of(TextConfig(form=form))
    for count in (1, 2, 5):
        example = Example("e", "caption", "", "a report", images=tuple("abcde"[:count]))
        pieces = [found.prompt(example)]
        if form != "simple":  # it only asks
            pieces.append(found.training(example, 0))
        for some in pieces:
            assert sum(piece.image for piece in some) == count == text_of(some).count(IMAGE)
        words = [piece.text for piece in pieces[-1] if not piece.image]
        if form == "plain":
            assert words == ["a report\n"]
