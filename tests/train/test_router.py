"""Med-MoE's router by itself, on coloured squares: a dense run, its hidden states, a classifier of
colours, experts.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.fake_brain import COLOURS, Squares, tiny_config

from unimed_jax import main as cli
from unimed_jax.data import fitting, layout
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters
from unimed_jax.model.unimed import span_of
from unimed_jax.runs.folder import missing_inputs, tokenizer_folder
from unimed_jax.runs.open import initial_leaves, open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train import loop, router

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = """
from support.fake_brain import tiny_config
def get_config(run):
    config = tiny_config()
    config.data.sources = (dict(name="support.squares", id="squares", options=dict(images=300)),)
    config.name, config.init = "colours", (("run", run),)
    config.train.rules = (dict(match="*", train=False),)
    config.job = "router"
    config.router_fit.key, config.router_fit.labels = "prompt", (4, 300)
    config.router_fit.lr, config.router_fit.epochs = 0.1, 400
    return config
"""


def one_device(*settings):
    """No mesh: programs for eight devices compile slowly."""


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", one_device)


@pytest.fixture(scope="module")
def dense(quick_compiles, built_once):
    """A dense run of few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", one_device)
        settings = tiny_config(steps=2)
        settings.model.decoder.depth = 2
        return open_run(
            built_once("dense", lambda folder: loop.train(from_config_dict(settings), folder))
        )


def settings(dense, **changes):
    config = tiny_config()
    config.data.sources = (dict(name="support.squares", id="squares", options=dict(images=300)),)
    config.model.decoder.depth = 2
    config.init = (("run", str(dense.folder)),)
    config.train.rules = (dict(match="*", train=False),)
    config.job = "router"
    config.router_fit.key = "prompt"
    config.router_fit.update(changes)
    return config


@pytest.fixture(scope="module")
def routed(dense, tmp_path_factory):
    """The router's run, through the cli."""
    folder = tmp_path_factory.mktemp("router")
    file = folder / "colours.py"
    file.write_text(CONFIG)
    words = [
        f"--config={file}:{dense.folder}",
        f"--workdir={folder / 'run'}",
        "--config.model.decoder.depth=2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", one_device)
        assert cli.main(words) == 0
    return words, folder / "run"


def test_colours_are_told_apart(routed):
    _, folder = routed
    report = json.loads((folder / "router.json").read_text())
    assert report["classes"] == sorted(COLOURS) and report["images"] == {
        "train": 300,
        "without label": 0,
    }
    for split in ("val", "test"):
        result = report["splits"][split]
        few, many = result["accuracy"]
        assert (few["labels"], many["labels"], result["images"]) == (4, 300, 300)
        assert few["value"] < 0.5 and many["value"] > 0.7  # chance: 0.25
        assert many["ci95"][0] <= many["value"] <= many["ci95"][1]
        confusion = np.array(result["confusion"])
        assert confusion.sum() == 300 and np.trace(confusion) / 300 == pytest.approx(many["value"])
        truth = [e.meta["prompt"] for e in Squares(images=300).examples(split) if e.task == "cls"]
        assert confusion.sum(axis=1).tolist() == [truth.count(colour) for colour in sorted(COLOURS)]
    assert (folder / "router.png").stat().st_size > 10_000
    stored = load_file(folder / "router" / "model.safetensors")
    assert {name: (v.shape, v.dtype) for name, v in stored.items()} == {
        "fc1.weight": ((4, 32), np.float32),
        "fc1.bias": ((4,), np.float32),
    }


def test_a_router_scored_on_one_cluster_has_no_interval(routed, tmp_path):
    _, folder = routed
    report = json.loads((folder / "router.json").read_text())
    examples = [Example("x", "cls", "?", "a", cluster="one")] * 2
    some = SimpleNamespace(
        classes=np.array([0, 1]), examples=examples, datasets=[SimpleNamespace(id="s")] * 2
    )
    config = SimpleNamespace(evaluate=SimpleNamespace(bootstrap=20), seed=0)
    found = router._accuracy(np.array([0, 0]), some, config)
    assert found == {"value": 0.5, "ci95": None}
    for entry in report["splits"]["val"]["accuracy"]:
        entry |= found
    assert "val: 50.0% (no interval) with 4 labels" in router.summary(report)
    router._draw(tmp_path / "router.png", report)
    assert (tmp_path / "router.png").stat().st_size > 10_000


def test_the_stored_router_is_the_scored_one(routed, dense):
    """fc1 on the embeddings of the dense run gives the report's last accuracy again."""
    _, folder = routed
    config = from_config_dict(settings(dense))
    dataset = Squares(images=300)
    some = router.labelled([dataset], "test", config, sorted(COLOURS))
    inputs = router.embedder(dense.model, config, dense.tokenizer)(some.examples, some.datasets)
    stored = load_file(folder / "router" / "model.safetensors")
    right = (inputs @ stored["fc1.weight"].T + stored["fc1.bias"]).argmax(axis=1) == some.classes
    report = json.loads((folder / "router.json").read_text())
    assert right.mean() == pytest.approx(report["splits"]["test"]["accuracy"][-1]["value"])


def test_a_finished_router_is_not_trained_again(routed, monkeypatch, capsys):
    words, folder = routed
    monkeypatch.setattr(router, "initial_model", None)
    assert cli.main(words) == 0
    assert "with 300 labels" in capsys.readouterr().out
    assert cli.main([*words, "--config.router_fit.epochs=3"]) == 2
    assert "config.router_fit.epochs is 400 there and 3 now" in capsys.readouterr().err


def test_one_that_was_killed_before_its_report_is_trained_again(routed, tmp_path):
    words, folder = routed
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "router.json").unlink()
    assert cli.main([words[0], f"--workdir={tmp_path / 'run'}", *words[2:]]) == 0
    for name in ("router.json", "router/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


def test_every_layer_with_experts_gets_the_router(routed, dense):
    """Exact, also where what is frozen is stored in bfloat16.

    And a MoE run trains with it, unchanged.
    """
    _, folder = routed
    config = tiny_config(steps=2)
    config.model.decoder.depth = 2
    config.model.frozen_dtype = "bfloat16"
    config.model.moe.update(experts=4, placement="dense")
    config.init = (("seed", ""), ("run", str(dense.folder)), ("router", str(folder / "router")))
    config.train.rules = (
        dict(match="decoder/layers/moe/router/*", train=False),
        dict(match="decoder/layers/m*", train=True),
        dict(match="*", train=False),
    )
    config = from_config_dict(config)
    assert missing_inputs(config) is None
    run = loop.train(config, folder.parent / "moe")
    stored = load_file(folder / "router" / "model.safetensors")
    leaves = parameters(run.model)
    assert leaves["decoder/embedding"].dtype == "bfloat16"
    for name, theirs in (("kernel", stored["fc1.weight"].T), ("bias", stored["fc1.bias"])):
        for ours in leaves[f"decoder/layers/moe/router/{name}"]:
            np.testing.assert_array_equal(ours, theirs)
    again = parameters(open_run(run.folder).model)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_an_image_counts_if_one_of_its_records_has_the_label():
    class Partly(Squares):
        """Of the records of an image, the last one alone has the label."""

        def examples(self, split):
            last = {example.images: i for i, example in enumerate(super().examples(split))}
            return [
                dataclasses.replace(example, meta={"seen": "yes"} if last[example.images] == i else {})
                for i, example in enumerate(super().examples(split))
            ]

    config = tiny_config()
    config.router_fit.key = "seen"
    found = router.labelled([Partly()], "train", from_config_dict(config), ["yes"])
    images = {example.images for example in Squares().examples("train") if example.images}
    assert len(found.examples) == len(images) and found.left_out == 0


def test_an_embedding_is_the_mean_over_states_and_tokens(dense):
    """Of each prompt alone and without padding, whatever stands beside it."""
    config, dataset = from_config_dict(settings(dense)), Squares()
    examples = [e for e in dataset.examples("test") if e.images][:3]  # prompts of different lengths
    ours = router.embedder(dense.model, config, dense.tokenizer)(examples, [dataset] * len(examples))
    encoder = layout.Encoder(dense.tokenizer, config.text, config.model.tokens_per_image)
    lengths = set()
    for example, mean in zip(examples, ours, strict=True):
        prompt = encoder.prompt(example)
        lengths.add(prompt.tokens)
        shape = layout.RowShape(prompt.tokens, 1, 0, config.model.tokens_per_image, 32)
        pixels = fitting.fit(dataset.image(example.images[0]), config.data.fit, config.model.vision)
        batch = layout.prompt_batch([layout.Group((prompt,), (pixels,))], shape, dense.tokenizer.pad)
        x, _ = dense.model.embed(batch)
        states = dense.model.decoder(x, span_of(batch), states=True).states
        assert states.shape == (3, 1, prompt.tokens, 32)
        np.testing.assert_array_equal(states[0], x)
        np.testing.assert_allclose(mean, states.mean(axis=(0, 2))[0], rtol=1e-5, atol=1e-6)
    assert len(lengths) == 3


def test_the_classifier_is_torchs():
    """Linear, cross-entropy and Adam from the same start over the same batches, the last of an
    epoch short.
    """
    torch = pytest.importorskip(
        "torch", reason="a peer of the extra `parity`: pip install -e '.[parity]'"
    )
    config = tiny_config()
    config.router_fit.update(epochs=3, batch=8, lr=0.01)
    config = from_config_dict(config)
    rng = np.random.default_rng(0)
    inputs, labels = rng.standard_normal((21, 6)).astype(np.float32), rng.integers(0, 4, 21)
    keys = jax.random.split(jax.random.key(config.seed), 5)
    theirs = torch.nn.Linear(6, 4)
    with torch.no_grad():
        for leaf, key, shape in ((theirs.weight, keys[0], (6, 4)), (theirs.bias, keys[1], (4,))):
            start = jax.random.uniform(key, shape, minval=-(6**-0.5), maxval=6**-0.5)
            leaf.copy_(torch.tensor(np.asarray(start).T))
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for key in keys[2:]:
        order = np.asarray(jax.random.permutation(key, 21))
        assert sorted(order) == list(range(21))
        for rows in (order[:8], order[8:16], order[16:]):
            optimizer.zero_grad()
            logits = theirs(torch.tensor(inputs[rows]))
            torch.nn.functional.cross_entropy(logits, torch.tensor(labels[rows])).backward()
            optimizer.step()
    kernel, bias = router.fit(inputs, labels, 4, config)
    np.testing.assert_allclose(kernel, theirs.weight.detach().numpy().T, atol=1e-5)
    np.testing.assert_allclose(bias, theirs.bias.detach().numpy(), atol=1e-5)


def test_one_prompt_of_each_labelled_image(dense):
    """Drawn among its examples, by the seed; images without the label are counted."""
    dataset, config = Squares(), from_config_dict(settings(dense))
    for example in dataset.examples("train")[:12]:
        example.meta.pop("prompt")
    some = router.labelled([dataset], "train", config, sorted(COLOURS))
    keys = [example.images for example in some.examples]
    assert len(set(keys)) == len(keys) == 22 and some.left_out == 2
    assert len({example.task for example in some.examples}) > 2
    assert keys != sorted(keys, key=lambda key: int(key[0].removeprefix("train")))
    assert [sorted(COLOURS)[c] for c in some.classes] == [
        example.meta["prompt"] for example in some.examples
    ]
    assert router.labelled([dataset], "train", config, sorted(COLOURS)).examples == some.examples


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"key": "modality"},
            "config.router_fit.key='modality': no train image of squares has this label",
        ),
        (
            {"classes": ("red", "green")},
            r"prompt='\w+' is none of config.router_fit.classes \(red, green\)",
        ),
        ({"labels": (10, 400)}, "the training split has 300 labelled images"),
    ],
)
def test_mistakes(dense, changes, match, tmp_path):
    with pytest.raises(UserError, match=match):
        router.train_router(from_config_dict(settings(dense, **changes)), tmp_path)
    assert not (tmp_path / "router").exists() and not (tmp_path / "router.json").exists()


def test_labels_rise(dense):
    for labels in ((3, 2), (0, 2), (2, 2)):
        with pytest.raises(UserError, match="labels"):
            from_config_dict(settings(dense, labels=labels))


def test_a_run_reads_with_the_words_of_the_run_it_starts_from(dense, tmp_path):
    """Through several runs; with a tokenizer of its own where it names one."""
    config = from_config_dict(settings(dense))
    (tmp_path / "config.json").write_text((dense.folder / "config.json").read_text())
    assert tokenizer_folder(tmp_path / "new", config) == dense.folder / "tokenizer"
    second = settings(dense)
    second.init = (("seed", ""), ("run", str(tmp_path)))
    assert tokenizer_folder(tmp_path / "new", from_config_dict(second)) == tmp_path / "tokenizer"
    second.text.tokenizer = "words"
    assert str(tokenizer_folder(tmp_path / "new", from_config_dict(second))) == "words"
    leaves, sources = initial_leaves(config, Tokenizer.load(dense.folder / "tokenizer"))
    assert set(sources.values()) == {f"run {dense.folder}"} and leaves
