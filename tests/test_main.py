"""The command line: verbs, overrides, and every mistake as one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.fake_brain import Squares

from unimed_jax import main as cli
from unimed_jax.config import TASKS, to_dict
from unimed_jax.settings import from_config_dict

CONFIG = """
from support.fake_brain import tiny_config
def get_config(argument=""):
    config = tiny_config()
    config.name = "squares" + argument
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("configs") / "squares.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def run(on_one_device, config_file, built_once, tmp_path_factory):
    """A run started as a user would (trained, evaluated, reported): a copy of its own for each
    worker.
    """

    def start(folder):
        assert (
            cli.main([f"--config={config_file}", f"--workdir={folder}", "--config.train.steps=6"]) == 0
        )

    return shutil.copytree(built_once("main", start), tmp_path_factory.mktemp("main") / "run")


def test_a_run_leaves_scores_in_the_agreed_schema(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"config_hash", "data_checksum", "code_version", "fidelity"} <= set(metrics)
    for task in TASKS:
        entry = metrics["sets"]["squares"]["test"][task]
        assert entry["n"] == 24
        for value in entry["corrected"].values():
            assert {"value", "ci95"} <= set(value)
        assert entry["primary"] in entry["corrected"]
        for baseline in entry["blind"].values():
            assert entry["primary"] in baseline
    assert metrics["routing"]["tv_token_router"] == 0.0
    assert metrics["routing"]["tv_trained"]["ci95"][0] <= metrics["routing"]["tv_trained"]["value"]
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 2 * 6 * 24
    assert {p.name for p in run.iterdir()} >= {
        "report.md",
        "report.html",
        "environment.json",
        "predictions.png",
        "routing.png",
        "log.jsonl",
        "tokenizer",
    }
    assert "medical device" in (run / "report.md").read_text()


def test_evaluate_scores_a_finished_run_again_to_the_same_numbers(run):
    before = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    assert cli.main(["evaluate", f"--run={run}"]) == 0
    assert json.loads((run / "metrics.json").read_text()) == before


def test_a_run_is_scored_as_another_config_says(run, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(CONFIG.replace("return config", "config.evaluate.limit = 2\n    return config"))
    words = [f"--config={other}", "--config.evaluate.splits=('test',)", f"--out={tmp_path / 'out'}"]
    assert cli.main(["evaluate", f"--run={run}", *words]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["sets"]["squares"]) == {"test"}
    assert {entry["n"] for entry in metrics["sets"]["squares"]["test"].values()} == {2}
    assert metrics["step"] == json.loads((run / "metrics.json").read_text())["step"]


def test_a_longer_prompt_may_be_allowed_for_a_finished_run(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    words = [
        "--config.text.max_prompt=300",
        "--config.evaluate.limit=2",
        "--config.evaluate.splits=('test',)",
    ]
    assert cli.main(["evaluate", f"--run={copy}", *words]) == 0
    assert json.loads((copy / "metrics.json").read_text())["sets"]["squares"]["test"]["vqa"]["n"] == 2


def test_predictions_of_another_tool_are_scored_as_our_own(run, config_file, tmp_path, capsys):
    """A run's own predictions, given back as a file, have the run's scores.

    Ids that do not fit are counted.
    """
    own = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    own = [record for record in own if record["split"] == "test"]
    test = "--config.evaluate.splits=('test',)"
    ids = [record["id"] for record in own]
    lines = [{"id": record["id"], "prediction": record["prediction"]} for record in own]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = f"--config={config_file}"
    assert cli.main(["evaluate", f"--predictions={tmp_path / 'all.jsonl'}", config, test]) == 0
    found = json.loads((tmp_path / "all.scores" / "metrics.json").read_text())
    ours = json.loads((run / "metrics.json").read_text())
    for task in TASKS:
        one, other = (m["sets"]["squares"]["test"][task] for m in (found, ours))
        assert one["corrected"] == other["corrected"] and one["published"] == other["published"], task
        assert "/form=external/" in one["protocol"] != other["protocol"]
        assert all("/form=external" in protocol for protocol in one["protocols"].values())
        assert set(one["protocols"]) == set(other["protocols"]) - {"likelihood"} >= set(one["corrected"])
        assert ("likelihood" in other) == (task == "cls") and "likelihood" not in one
    assert found["notes"] == [] and found["predictions"]["missing"] == 0

    lines = [*lines[6:], lines[-1], {"id": "squares/test/nobody", "prediction": "x"}]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [
        "evaluate",
        f"--predictions={tmp_path / 'some.jsonl'}",
        f"--run={run}",
        f"--out={tmp_path / 'some'}",
    ]
    assert cli.main([*words, test, "--config.evaluate.bootstrap=2"]) == 0
    found = json.loads((tmp_path / "some" / "metrics.json").read_text())
    assert {key: found["predictions"][key] for key in ("unknown", "missing", "doubled")} == {
        "unknown": 1,
        "missing": 6,
        "doubled": 1,
    }
    said = capsys.readouterr().out
    assert "1 ids unknown: squares/test/nobody" in said and f"1 ids doubled: {ids[-1]}" in said
    assert f"6 ids missing, counted as wrong: {', '.join(ids[:5])}\n" in said  # the first five of them


def test_export_writes_what_another_tool_needs(run, config_file, tmp_path, capsys):
    out = tmp_path / "asked"
    assert cli.main(["data", "export", f"--config={config_file}", f"--out={out}", "--split=test"]) == 0
    lines = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    own = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    own = {record["id"]: record for record in own if record["split"] == "test"}
    assert [line["id"] for line in lines] == list(own)
    assert not {"reference", "answer", "box"} & set(lines[0])
    for line in lines:
        record = own[line["id"]]
        assert line["question"] == record["question"] and line["question"] in line["instruction"]
        for path, key in zip(line["images"], record["images"], strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(out / path)), Squares().image(key))
    assert (
        len(list((out / "images").iterdir())) == 24 and "--predictions=FILE" in capsys.readouterr().out
    )


def test_overrides_reach_the_run(run):
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 6


@pytest.mark.parametrize("kind", ["png", "jpg", "dcm"])
def test_predict_answers_from_an_image_file(run, tmp_path, capsys, kind):
    if kind == "dcm":
        from pydicom.data import get_testdata_file

        file = get_testdata_file("CT_small.dcm")
    else:
        file = tmp_path / f"image.{kind}"
        Image.fromarray(Squares().image("test0")).save(file)
    assert (
        cli.main(
            [
                "predict",
                f"--run={run}",
                f"--image={file}",
                "--task=vqa",
                "--text=What colour is the square?",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out.strip()
    assert said
    if kind == "png":  # the evaluation asked the same of the same pixels
        lines = map(json.loads, (run / "predictions.jsonl").read_text().splitlines())
        (asked,) = (
            x for x in lines if x["task"] == "vqa" and x["images"] == ["test0"] and x["split"] == "test"
        )
        assert said == asked["prediction"]


def test_predict_draws_the_box(run, tmp_path, capsys):
    file, out = tmp_path / "image.png", tmp_path / "drawn.png"
    Image.fromarray(Squares().image("test0")).save(file)
    words = [
        "predict",
        f"--run={run}",
        f"--image={file}",
        "--task=identify",
        "--text={<10><10><60><60>}",
    ]
    assert cli.main([*words, f"--out={out}"]) == 0
    assert f"drew {out}" in capsys.readouterr().out
    assert np.asarray(Image.open(out)).std() > 0


def test_predict_answers_about_several_images(run, tmp_path, capsys):
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for i, file in enumerate(files):
        Image.fromarray(Squares().image(f"test{i}")).save(file)
    words = ["predict", f"--run={run}", "--task=vqa", "--text=Are both squares red?"]
    assert cli.main([*words, *(f"--image={file}" for file in files)]) == 0
    assert capsys.readouterr().out.strip()
    assert (
        cli.main([*words[:2], "--task=refer", "--text=red", *(f"--image={file}" for file in files)]) == 2
    )
    assert "task 'refer' is about one image, not 2" in capsys.readouterr().err


def test_predict_answers_text_alone(run, capsys):
    assert cli.main(["predict", f"--run={run}", "--task=qa", "--text=What is 3 plus 1?"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_question_that_the_model_would_cut_is_refused(run, tmp_path, capsys):
    """A run of `fidelity="paper"` reads the first 50 words alone."""
    short = shutil.copytree(run, tmp_path / "run")
    settings = json.loads((short / "config.json").read_text())
    settings["text"]["max_words"] = 50
    (short / "config.json").write_text(json.dumps(settings))
    words = " ".join(["word"] * 50)
    for folder, text, status in ((short, words, 2), (short, words[:-5], 0), (run, words, 0)):
        assert cli.main(["predict", f"--run={folder}", "--task=qa", f"--text={text}"]) == status
        said = capsys.readouterr().err
        assert ("the first 50 words of a question" in said) == bool(status)


def test_a_run_answers_in_torch_as_here(run, tmp_path, capsys, monkeypatch):
    """benchmarks/torch_answers.py from a run's folder to its table, by way of the exported folder."""
    pytest.importorskip("torch", reason="a peer of the extra `parity`: pip install -e '.[parity]'")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import torch_answers

    words = [
        f"--run={run}",
        f"--export={tmp_path}/exported",
        "--examples=13",
        f"--out={tmp_path}/records.json",
    ]
    monkeypatch.setattr("sys.argv", ["torch_answers.py", *words])
    torch_answers.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == [*TASKS, "all"] and "13 of 13" in lines[-1]
    records = json.loads((tmp_path / "records.json").read_text())["records"]
    assert len({record["id"] for record in records}) == 13
    # the run's scores
    assert "| squares | vqa | 24 |" in (tmp_path / "exported" / "README.md").read_text()


PREDICT = ["predict", "--run={run}"]
# name: (arguments, words that the sentence must hold); names in braces are files made by the test.
MISTAKES = {
    "no config": (["--workdir=x"], ["--config"]),
    "missing config": (["--config=configs/brain_tny.py"], ["configs/brain_tny.py", "brain_tiny.py"]),
    "a bucket": (["{config}", "--workdir=gs://b/run"], ["gs://b/run", "not a folder", "mount"]),
    "unknown verb": (["trian"], ["trian", "did you mean 'train'"]),
    "unknown key": (["{config}", "--config.optimizer.lrr=1"], ["optimizer.lrr", "did you mean 'lr'"]),
    "unknown group": (["{config}", "--config.optimiser.lr=1"], ["did you mean 'optimizer'"]),
    "unknown word": (["{config}", "--worker=3"], ["--worker"]),
    "wrong type": (["{config}", "--config.train.steps=many"], ["config.train.steps", "int", "'many'"]),
    "wrong choice": (
        ["{config}", "--config.model.connector.router=softmax"],
        ["router", "soft, sparse, hard"],
    ),
    "no such run": (["evaluate", "--run=nowhere"], ["nowhere/config.json"]),
    "changed run": (["evaluate", "--run={run}", "--config.seed=3"], ["config.seed", "config.evaluate"]),
    "changed data": (
        ["evaluate", "--run={run}", "--config.data.rows=3"],
        ["config.data.rows", "text.max_prompt"],
    ),
    "nothing to evaluate": (["evaluate"], ["--run=DIR", "--predictions=FILE"]),
    "predictions of nothing": (["evaluate", "--predictions=x.jsonl"], ["--config=FILE or --run=DIR"]),
    "no predictions": (
        ["evaluate", "--predictions=no.jsonl", "{config}"],
        ["no.jsonl", "does not exist", "--predictions"],
    ),
    "broken predictions": (
        ["evaluate", "--predictions={text}", "{config}"],
        ["text.dcm, line 1", "mend the line"],
    ),
    "foreign predictions": (
        ["evaluate", "--predictions={foreign}", "{config}"],
        ["none of its 1 ids", "squares/val/"],
    ),
    "unknown data command": (["data", "exprot"], ["did you mean 'export'"]),
    "unknown split": (
        ["data", "export", "{config}", "--out={run}/x", "--split=tset"],
        ["did you mean 'test'"],
    ),
    "unknown metric": (
        [
            "{config}",
            "--workdir={run}/y",
            "--config.evaluate.entries=({{'source': 'squares', 'task': 'vqa', "
            "'split': 'test', 'metrics': ('exact_mach',)}},)",
        ],
        ["did you mean 'exact_match'"],
    ),
    "empty split": (
        ["{config}", "--workdir={run}/z", "--config.evaluate.splits=('tset',)"],
        ["did you mean 'test'"],
    ),
    "long test prompt": (
        ["{config}", "--workdir={run}/w", "--config.text.max_prompt=12"],
        ["squares/val/vqa cannot be evaluated", "config.text.max_prompt=12"],
    ),
    "missing image": ([*PREDICT, "--task=cls", "--image=no.png"], ["no.png"]),
    "broken image": ([*PREDICT, "--task=cls", "--image={broken}"], ["broken.png"]),
    "no DICOM": ([*PREDICT, "--task=cls", "--image={text}"], ["text.dcm"]),
    "wrong task": ([*PREDICT, "--task=reefer", "--text=x"], ["did you mean 'refer'"]),
    "no text": ([*PREDICT, "--task=refer", "--image={image}"], ["--text"]),
    "no image": ([*PREDICT, "--task=cls"], ["needs an image"]),
    "image for qa": ([*PREDICT, "--task=qa", "--text=why", "--image={image}"], ["text only"]),
    "box is no box": (
        [*PREDICT, "--task=identify", "--image={image}", "--text=left"],
        ["'left'", "<x1>"],
    ),
    "long prompt": ([*PREDICT, "--task=qa", "--text=" + "why " * 900], ["tokens", "text.max_prompt"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(run, config_file, tmp_path, capsys, name):
    files = {
        "broken": tmp_path / "broken.png",
        "text": tmp_path / "text.dcm",
        "image": tmp_path / "good.png",
    }
    files["broken"].write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    files["text"].write_text("no image")
    files["foreign"] = tmp_path / "foreign.jsonl"
    files["foreign"].write_text('{"id": "x/test/1", "prediction": "y"}\n')
    Image.fromarray(Squares().image("test0")).save(files["image"])
    arguments, words = MISTAKES[name]
    assert (
        cli.main([word.format(run=run, config=f"--config={config_file}", **files) for word in arguments])
        == 2
    )
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) <= 3 and "Traceback" not in said, said
    for word in words:
        assert word in said, said
    assert not list(tmp_path.glob("*.scores"))  # nor a folder for scores that are none


def test_another_tokenizer_than_the_models_is_refused(run, tmp_path, capsys):
    settings = to_dict(from_config_dict(json.loads((run / "config.json").read_text())))
    settings["text"]["tokenizer"] = str(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert cli.main(["predict", f"--run={tmp_path}", "--task=qa", "--text=why"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_the_full_size_config_says_what_it_needs(capsys):
    assert cli.main(["--config=configs/cmoe.py"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("'hf'", "'eva'", "slake", "mimic_cxr", "config.data.root"))
    assert len(said.strip().splitlines()) == 1


def test_an_empty_data_set_is_refused(config_file, tmp_path, capsys):
    none = "--config.data.sources=({'name': 'support.squares', 'options': {'images': 0}},)"
    assert cli.main([f"--config={config_file}", f"--workdir={tmp_path}", none]) == 2
    assert "data set squares has no example" in capsys.readouterr().err
