"""Our own form: boxes in pixels, likelihoods, routing, and pictures as the model sees them."""

import asyncio
import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from serve.conftest import LIMITS, png, square, url
from support.dicom_files import dicom_file
from support.fake_brain import tiny_config

from unimed_jax.config import TASKS, VISUAL_TASKS, ImageConfig
from unimed_jax.data.box_text import box_to_text
from unimed_jax.data.fitting import fit
from unimed_jax.data.images import read_image
from unimed_jax.evaluate.routing import weights_by_task
from unimed_jax.predict.likelihood import Asked, Likelihoods
from unimed_jax.predict.request import Request, as_example
from unimed_jax.serve.images import shown
from unimed_jax.serve.limits import Refused
from unimed_jax.serve.service import Service, trained
from unimed_jax.serve.tasks import _boxes
from unimed_jax.settings import from_config_dict

WIDE = np.random.default_rng(1).integers(0, 256, (40, 100, 3)).astype(np.uint8)


def asked(live, **body):
    status, _, found = live.post("/v1/tasks", body)
    assert status == 200, found
    return found


def test_every_task_is_described_and_answered(live):
    _, headers, found = live.get("/v1/tasks")
    assert [task["task"] for task in found["tasks"]] == list(TASKS)
    assert found["experts"] == live.run.config.model.connector.experts and found["grid"] == [2, 2]
    assert found["limits"]["pixels"] == live.service.limits.pixels
    for task in found["tasks"]:
        images = [square(0)] * task["needs_image"]
        answer = asked(live, task=task["task"], question=task["example"], images=[*map(url, images)])
        request = Request(task["task"], task["example"], tuple(images))
        assert answer["answer"] == live.expected([request])[0]
        assert answer["task"] == task["task"] and answer["finish_reason"] in ("stop", "length")
        assert answer["confidence"] is None and answer["routing"] is None and answer["options"] == []


@pytest.mark.slow
def test_a_server_of_single_tokens_starts(live):
    service = Service(live.run, "short", dataclasses.replace(LIMITS, max_tokens=1))
    asyncio.run(service.warm())
    service.close()
    assert service.ready and not service.failed


def test_tasks_that_were_not_trained_are_named(live, monkeypatch):
    def named() -> list[str]:
        return [task["task"] for task in live.get("/v1/tasks")[2]["tasks"] if task["trained"]]

    assert named() == list(TASKS)  # the settings name no source
    monkeypatch.setattr(live.service, "trained", {"vqa", "cls", "qa"})
    assert named() == [task for task in TASKS if task in ("vqa", "cls", "qa")]


@pytest.mark.parametrize(
    "sources, expected",
    [
        ([("squares", ("vqa", "cls")), ("lost", ("qa",))], {"vqa", "cls", "qa"}),
        ([("vqa_rad", ())], {"vqa"}),  # what the reader says
        ([("vqa_rad", ()), ("ran_when_imported.reader", ())], set(TASKS)),
        ([("ran_when_imported", ())], set(TASKS)),  # no name of a reader of ours
    ],
)
def test_what_was_trained_is_found_without_foreign_code(sources, expected, tmp_path, monkeypatch):
    """The settings of a model from elsewhere may name any module that is installed."""
    (tmp_path / "ran_when_imported").mkdir()
    for name in ("__init__", "reader"):
        (tmp_path / f"ran_when_imported/{name}.py").write_text("raise SystemExit('it was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config()
    config.data.sources = [dict(name=name, tasks=tasks) for name, tasks in sources]
    assert trained(from_config_dict(config)) == expected


def test_boxes_go_in_and_out_as_pixels_of_the_image_as_sent(live):
    box = [10.5, 4, 61, 30.25]
    answer = asked(live, task="identify", box=box, images=[url(WIDE)])
    request = Request("identify", box_to_text(box, 100, 40), (WIDE,))
    assert answer["answer"] == live.expected([request])[0]
    assert _boxes("refer", "{<10><20><30><50>} and more", [(200, 40)]) == [[20.0, 8.0, 60.0, 20.0]]
    assert (
        _boxes("refer", "{<10><20><10><50>}", [(200, 40)]) == _boxes("vqa", "{<1><2><3><4>}", []) == []
    )


@pytest.mark.parametrize("few_programs", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_likelihoods_are_those_that_evaluation_measures(live, few_programs):
    """Evaluation's own rows, which hold several questions, compile a program of their own."""
    history = [{"question": "Is it clear?", "answer": "no"}]
    options = ["red", "green square", "blue"]
    common = {"task": "vqa", "question": "Which colour?", "images": [url(WIDE)], "history": history}
    answer = asked(live, **common, options=options, confidence=True)
    request = Request("vqa", "Which colour?", (WIDE,), (("Is it clear?", "no"),))
    assert answer["answer"] == live.expected([request])[0]
    texts = (*options, answer["answer"])
    batch = [Asked(as_example(request), texts, request.history)]
    run = live.service.run
    measure = Likelihoods(run.model, run.config, run.tokenizer, [batch], few_programs)
    found = measure.of(batch, [[WIDE]])[0]
    sums = [option["log_likelihood"] for option in answer["options"]]
    np.testing.assert_allclose(sums, found.sums[:3], rtol=1e-4)
    shares = np.exp(sums) / np.exp(sums).sum()
    np.testing.assert_allclose([o["probability"] for o in answer["options"]], shares, rtol=1e-6)
    assert [option["text"] for option in answer["options"]] == options
    each = np.exp(found.each[3] if answer["finish_reason"] == "stop" else found.each[3][:-1])
    np.testing.assert_allclose(answer["confidence"], each.mean(), rtol=1e-4)
    np.testing.assert_allclose(found.sums[3], found.each[3].sum())


def test_routing_is_a_map_of_weights_for_each_expert(live):
    answer = asked(live, task="cls", images=[url(WIDE)], routing=True)
    config = live.run.config
    pixels = fit(WIDE, config.data.fit, config.model.vision)[None]
    weights = np.asarray(weights_by_task(live.run.model, pixels))[0, VISUAL_TASKS.index("cls")]
    experts = answer["routing"]["experts"]
    maps = np.array([expert["map"] for expert in experts])
    np.testing.assert_allclose(maps, weights.T.reshape(-1, 2, 2), atol=1e-4)
    np.testing.assert_allclose([expert["mean"] for expert in experts], weights.mean(axis=0), atol=1e-4)
    assert asked(live, task="qa", question="Why?", routing=True)["routing"] is None


def test_a_stream_ends_with_the_whole_result(live):
    body = {"task": "caption", "images": [url(WIDE)], "confidence": True}
    whole = asked(live, **body)
    status, headers, content = live.post("/v1/tasks", body | {"stream": True})
    assert status == 200 and headers.get_content_type() == "text/event-stream"
    *events, done = [line.removeprefix("data: ") for line in content.decode().split("\n\n") if line]
    *pieces, last = map(json.loads, events)
    assert done == "[DONE]" and last == {"result": whole}
    assert "".join(piece["text"] for piece in pieces) == whole["answer"]


def test_pictures_come_back_as_the_model_sees_them(live):
    values = np.linspace(-1000, 1000, 48 * 32).reshape(48, 32).astype(np.int16)
    ct = dicom_file(values, Modality="CT", RescaleSlope=1, RescaleIntercept=0, RescaleType="HU")
    film = png(WIDE, "GIF", save_all=True, append_images=[Image.fromarray(255 - WIDE)])
    pages = png(WIDE[:6, :8], "TIFF", save_all=True, append_images=[Image.fromarray(WIDE)])
    upright = Image.Exif()
    upright[274] = 6
    for content, kind, size, frames, view in (
        (png(WIDE), "png", (100, 40), 1, {}),
        (png(WIDE, "JPEG", exif=upright), "jpeg", (40, 100), 1, {}),
        (png(WIDE, "TIFF"), "tiff", (100, 40), 1, {}),
        (png(WIDE, "WEBP"), "webp", (100, 40), 1, {}),
        (film, "gif", (100, 40), 2, {"frame": 1}),
        (pages, "tiff", (8, 6), 2, {}),
        (pages, "tiff", (100, 40), 2, {"frame": 1}),
        (ct, "dicom", (32, 48), 1, {}),
        (ct, "dicom", (32, 48), 1, {"window": "bone"}),
        (ct, "dicom", (32, 48), 1, {"window": [40, 400.5]}),
    ):
        media = "application/dicom" if kind == "dicom" else f"image/{kind}"
        status, _, found = live.post("/v1/images", {"image": url(content, media), **view})
        assert status == 200, found
        assert (found["kind"], found["width"], found["height"], found["frames"]) == (kind, *size, frames)
        assert found["frame"] == view.get("frame", 0)
        assert bool(found["windows"]) == (kind == "dicom")
        shown = Image.open(io.BytesIO(base64.b64decode(found["image"].partition(",")[2])))
        window = tuple(view["window"]) if isinstance(view.get("window"), list) else view.get("window")
        settings = live.run.config.data.common_image.__class__(frame=view.get("frame"), window=window)
        assert np.array_equal(np.asarray(shown.convert("RGB")), read_image(content, settings))
    assert {"name": "brain", "centre": 40.0, "width": 80.0} in found["windows"]
    assert shown.mode == "L"


def test_each_page_of_a_film_has_its_own_size(live):
    """The limit of pixels holds for the page that is read, and the answer says which one it is."""
    large = Image.new("L", (300, 300))
    pages = png(WIDE[:6, :8], "TIFF", save_all=True, append_images=[large])
    status, _, found = live.post("/v1/images", {"image": url(pages, "image/tiff"), "frame": 1})
    assert status == 400 and "300 x 300 pixels by its header" in found["error"]["message"]
    last = dataclasses.replace(live.run.config.data.sources[0], image=ImageConfig(frame="last"))
    data = dataclasses.replace(live.run.config.data, sources=(last,))
    config = dataclasses.replace(live.run.config, data=data)
    with pytest.raises(Refused, match="300 x 300 pixels by its header"):
        shown(config, live.service.limits, {"image": url(pages, "image/tiff")})
    small = png(WIDE[:6, :8], "TIFF", save_all=True, append_images=[Image.fromarray(WIDE)])
    found = shown(config, live.service.limits, {"image": url(small, "image/tiff")})
    assert (found["frame"], found["width"], found["height"]) == (1, 100, 40)


@pytest.mark.parametrize("path", ["/", "/page/none.js", "/page/..%2f..%2fapp.py", "/page/../app.py"])
def test_only_the_pages_own_files_are_served(live, path):
    status, headers, content = live.get(path)
    assert status == 404 or (path == "/" and b"<html" in content.lower())
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
