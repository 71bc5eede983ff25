"""Gradients of tasks compared: agreement and conflict that were planted, parts, passes, refusals."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from support import tiny
from support.fake_brain import Squares, tiny_config

from unimed_jax import main as cli
from unimed_jax.analyze import conflict, tug_of_war
from unimed_jax.analyze import tug_of_war_report as report
from unimed_jax.analyze.parts import groups_of, matching, parts_of
from unimed_jax.analyze.tug_of_war import (
    Batches,
    chosen_leaves,
    gram_by_group,
    joins,
    sides_of,
    turns_of,
)
from unimed_jax.config import RuleConfig
from unimed_jax.errors import UserError
from unimed_jax.evaluate.report import link_pages
from unimed_jax.evaluate.run import fingerprint_of
from unimed_jax.model import sharding
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.runs.folder import load_text, write_config
from unimed_jax.runs.open import open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train.loss import loss_sums

pytestmark = pytest.mark.usefixtures("quick_compiles")

MAKE_MESH = sharding.make_mesh  # which other tests replace


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    # programs for eight devices compile slowly
    monkeypatch.setattr(sharding, "make_mesh", lambda *settings: None)


@pytest.fixture(scope="module")
def folders(built_once):
    """Folders of two runs that were never trained, `cmoe` and `linear`, which --which=0 opens."""

    def build(folder):
        for name, kind in (("cmoe", "moe_mlp"), ("linear", "linear")):
            settings = tiny_config()
            settings.model.connector.kind = kind
            if kind == "linear":
                settings.model.connector.router_hidden = None
            config = from_config_dict(settings)
            write_config(folder / name, config)
            load_text(folder / name, config, [Squares()])

    return built_once("tug_of_war", build)


@pytest.fixture(scope="module")
def run(folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *settings: None)
        return open_run(folders / "cmoe", which=0)


# ---- inner products --------------------------------------------------------------------------------
def gram_of(gradients: np.ndarray) -> np.ndarray:
    """[U, B, D] -> [U, B, U, B]."""
    return np.einsum("ubd,vcd->ubvc", gradients, gradients)


def test_similarities_are_those_of_mean_gradients():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(4, 5, 7)) + 0.5
    gradients[2] = 0  # a task that never touches the parameters
    found = conflict.Measured(gram_of(gradients), np.eye(4), ["a", "b", "c", "d"])
    assert (found.names, found.absent) == (["a", "b", "d"], ["c"])
    means = gradients[[0, 1, 3]].mean(axis=1)
    norm = np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(found.cos, means @ means.T / np.outer(norm, norm), atol=1e-12)
    for i, j in ((0, 1), (1, 2)):
        expected = 2 * norm[i] * norm[j] / (norm[i] ** 2 + norm[j] ** 2)
        assert found.magnitude[i, j] == pytest.approx(expected)
    share = np.linalg.svd(means)[1] ** 2
    share /= share.sum()
    assert found.index("spectral_entropy") == pytest.approx(-(share * np.log(share)).sum())
    assert found.index("dominant_eigenvalue_ratio") == pytest.approx(share.max())
    # By task: the mean of two sets' gradients beside the third.
    rows = np.array([[0.5, 0.5, 0, 0], [0, 0, 0, 1]])
    joined = conflict.Measured(gram_of(gradients), rows, ["x", "y"])
    mean = gradients[:2].mean(axis=(0, 1))
    other = gradients[3].mean(axis=0)
    assert joined.cos[0, 1] == pytest.approx(mean @ other / np.linalg.norm(mean) / np.linalg.norm(other))


def test_conflicts_are_counted_and_named_without_evidence():
    """Three gradients in a plane, 120 degrees apart: every pair conflicts; orthogonal ones: none."""
    angles = np.array([0, 2, 4]) * np.pi / 3
    plane = np.stack([np.cos(angles), np.sin(angles)], axis=1)[:, None].repeat(4, axis=1)
    found = conflict.Measured(gram_of(plane), np.eye(3), "abc").plain()
    assert found["indices"]["conflicts"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert found["indices"]["spectral_entropy"]["value"] == pytest.approx(np.log(2))
    assert found["indices"]["mean_cos"]["value"] == pytest.approx(-0.5)
    assert found["signal"] == pytest.approx([1, 1, 1]) and found["n"] == 4
    # One batch: values without intervals, and nothing is known of its noise.
    single = conflict.Measured(gram_of(plane[:, :1]), np.eye(3), "abc").plain()
    assert single["ci"] == {"cos": None, "magnitude": None} and single["signal"] == [None] * 3
    assert single["indices"]["mean_cos"]["ci95"] is None
    # One gradient alone: nothing to compare.
    alone = conflict.Measured(gram_of(plane[:1]), np.eye(1), "a").plain()
    assert alone["indices"] == {} and alone["cos"] == [[1.0]]


def test_intervals_lie_around_the_value_and_hold_the_truth():
    """Noise makes the cosine of means smaller than that of expected gradients, .8 here."""
    truth = np.zeros((2, 40))
    truth[0, 0], truth[1, :2] = 1, (0.8, 0.6)
    inside, means, clean = 0, [], []
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(scale=0.5, size=(2, 12, 40))
        found = conflict.Measured(gram_of(truth[:, None] + noise), np.eye(2), "ab", 300)
        low, high = conflict.interval(found.drawn_index("mean_cos_without_noise"))
        inside += low <= 0.8 <= high
        means.append(found.index("mean_cos"))
        clean.append(found.index("mean_cos_without_noise"))
        low, high = conflict.interval(found.drawn_index("mean_cos"))
        assert low < means[-1] < high
    assert inside >= 50  # 95 % of 60 are 57; few batches give somewhat fewer
    assert abs(np.mean(clean) - 0.8) < 0.03 and np.mean(means) < 0.5


def test_runs_on_the_same_batches_differ_by_less_than_either_varies():
    rng = np.random.default_rng(1)
    one = rng.normal(size=(3, 8, 20)) + 0.3
    other = one + 0.05 * rng.normal(size=one.shape)
    first, second = (conflict.Measured(gram_of(g), np.eye(3), "abc") for g in (one, other))
    found = conflict.difference(first, second, "mean_cos")
    low, high = conflict.interval(first.drawn_index("mean_cos"))
    assert found["ci95"][0] < found["value"] < found["ci95"][1]
    assert found["ci95"][1] - found["ci95"][0] < (high - low) / 2


def test_pairs_of_noise_alone_are_counted_and_compared_with_nothing():
    """Of four gradients two have a direction; the others are noise, whose square may seem below 0."""
    rng = np.random.default_rng(4)
    signal = np.zeros((4, 1, 30))
    signal[:2, 0, 0] = 3.0
    noise = rng.normal(size=(4, 6, 30))
    noise[2:] -= 0.9 * noise[2:].mean(axis=1, keepdims=True)  # a mean of a tenth of what noise has
    first = conflict.Measured(gram_of(signal + noise), np.eye(4), "abcd")
    entry = first.plain()["indices"]["mean_cos_without_noise"]
    assert entry["pairs"] == [1, 6] and entry["value"] == pytest.approx(
        first.index("mean_cos_without_noise")
    )
    second = conflict.Measured(gram_of(signal + rng.normal(size=(4, 6, 30)) + 1), np.eye(4), "abcd")
    assert second.known.all()
    found = conflict.difference(first, second, "mean_cos_without_noise")
    pair = conflict.cosines(second.apart)[0, 1] - conflict.cosines(first.apart)[0, 1]
    assert found["value"] == pytest.approx(pair)


# ---- parts of parameters ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["moe_mlp", "moe_linear", "mlp2x_gelu"])
def test_every_number_is_in_one_part(kind):
    config = tiny.config(connector={"kind": kind, "hidden": None})
    shapes = {path: leaf.shape for path, leaf in parameters(abstract(config)).items()}
    parts = parts_of(shapes, config)
    marks = {path: np.zeros(shape, int) for path, shape in shapes.items()}
    for part in parts:
        pieces = list(part.split(shapes[part.leaf], 50))
        assert sum(piece.count(shapes[part.leaf]) for piece in pieces) == part.count(shapes[part.leaf])
        for piece in pieces:
            piece.of(marks[part.leaf])[...] += 1
    assert all((found == 1).all() for found in marks.values())
    groups = groups_of(parts)
    experts = [name for name in groups if name.startswith("connector: expert")]
    assert len(experts) == (3 if kind.startswith("moe") else 0)
    assert {"connector", "LoRA", "LoRA: layer 1", "vision: layer 0", "decoder: layer 1"} <= set(groups)
    assert ("connector: layer 1" in groups) == (kind == "mlp2x_gelu")
    for turn in turns_of(shapes, parts, 200):
        sizes = [piece.count(shapes[piece.leaf]) for _, piece in turn]
        assert sum(sizes) <= 200 or len(sizes) == 1


def test_layers_of_a_decoder_with_experts_have_their_own_numbers():
    """Experts are stacked over the layers that have them, other MLPs over the rest."""
    experts = {"experts": 2, "placement": "sparse"}
    config = tiny.config(decoder={"depth": 4}, moe=experts, lora={"targets": ("q", "v")})
    shapes = {path: leaf.shape for path, leaf in parameters(abstract(config)).items()}
    layers = {}
    for part in parts_of(shapes, config):
        if part.module == "decoder" and part.leaf.startswith("decoder/layers/"):
            layers.setdefault(part.leaf.split("/")[2], set()).add((part.start, part.name))
    assert layers["moe"] == {(0, "layer 0"), (1, "layer 2")}
    assert layers["mlp"] == {(0, "layer 1"), (1, "layer 3")}
    assert layers["attention"] == {(i, f"layer {i}") for i in range(4)}


def test_parts_of_experts_are_the_experts(run):
    """An expert's slices of the wide matrices are what the literal loop gives that expert."""
    c = run.config.model.connector
    experts = run.model.connector.experts
    parts = parts_of({p: leaf.shape for p, leaf in parameters(run.model).items()}, run.config.model)
    for e in range(c.experts):
        of = {
            part.leaf.split("/")[-1]: part.of(parameters(run.model)[part.leaf])
            for part in parts
            if part.name == f"expert {e}"
        }
        up = np.split(np.asarray(experts.up[...]), c.experts, axis=1)[e]
        np.testing.assert_array_equal(of["up"], up)
        np.testing.assert_array_equal(of["down"], np.split(np.asarray(experts.down[...]), c.experts)[e])
        np.testing.assert_array_equal(of["bias"][0], experts.bias[...][e])


# ---- gradients of a run ----------------------------------------------------------------------------
def grams(run, batches=3, matches=()):
    sides = sides_of(run.config, "val", batches)[:2]
    with run.inside():
        return gram_by_group(run, Batches(sides, run, batches), chosen_leaves(run, matches))


@pytest.mark.slow
def test_gradients_are_those_of_the_mean_loss_and_parts_add_up(run):
    sides = sides_of(run.config, "val", 3)[:2]
    batches = Batches(sides, run, 3)
    found = gram_by_group(run, batches, chosen_leaves(run, []))
    parts = [name for name in found if ":" in name]
    assert parts == [*(f"connector: expert {e}" for e in range(5)), "connector: router"]
    every = list(batches)
    assert len(every) == 6 and [side.name for side, _ in every[::3]] == ["vqa", "refer"]

    def loss(leaf, batch):
        model = with_parameters(run.model, {"connector/router/token_kernel": leaf})
        total, sums = loss_sums(model, batch, run.config.loss, run.tokenizer.coordinate_start, None)
        return total / sums["weight"]

    gradient = jax.jit(jax.grad(loss))
    leaf = parameters(run.model)["connector/router/token_kernel"]
    g = np.stack([np.asarray(gradient(leaf, batch)).ravel() for _, batch in every])
    only = gram_by_group(run, batches, ["connector/router/token_kernel"])["connector"]
    np.testing.assert_allclose(only.reshape(6, 6), g @ g.T, rtol=1e-4, atol=1e-5 * (g * g).sum(1).max())
    tokens = found["connector"] - sum(found[name] for name in parts)  # those of the tasks' tokens
    own = np.einsum("ubub->ub", tokens)
    assert (own > 0).all() and abs(tokens[0, :, 1]).max() < 1e-4 * own.max()


@pytest.mark.slow
def test_several_passes_give_what_one_gives(run, monkeypatch, capsys):
    one = grams(run, matches=["connector/router/*", "decoder/layers/norm1/scale"])
    assert "in 1 pass\n" in capsys.readouterr().out
    size = sum(leaf.size for path, leaf in parameters(run.model).items() if "router/" in path)
    monkeypatch.setattr(tug_of_war, "available_bytes", lambda: 4 * 4 * 6 * size * 0.6)
    several = grams(run, matches=["connector/router/*", "decoder/layers/norm1/scale"])
    assert re.search(r"in [23] passes\n", capsys.readouterr().out)
    assert list(one) == list(several) == ["connector", "decoder"]
    for name, gram in one.items():
        np.testing.assert_allclose(several[name], gram, rtol=1e-5, atol=1e-7 * gram.max())


@pytest.mark.slow
def test_a_killed_analysis_goes_on_after_its_last_pass(run, tmp_path, monkeypatch):
    matches = ["connector/router/*", "decoder/layers/norm1/scale"]
    size = sum(leaf.size for path, leaf in parameters(run.model).items() if "router/" in path)
    monkeypatch.setattr(tug_of_war, "available_bytes", lambda: 4 * 4 * 12 * size * 0.6)
    passes, most = [], 99

    class Counted(tug_of_war.Gradients):
        def __init__(self, run, pieces):
            if len(passes) == most:
                raise KeyboardInterrupt
            passes.append(repr(pieces))
            super().__init__(run, pieces)

    monkeypatch.setattr(tug_of_war, "Gradients", Counted)

    def measured(partial, batches=2):
        with run.inside():
            found = tug_of_war.analyse(run, "val", matches, batches, partial=partial)
        return json.dumps(found.plain())

    whole, expected = measured(None), list(passes)
    assert len(expected) > 1
    passes.clear()
    most = 1
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path)
    most = 99
    assert measured(tmp_path) == whole and passes == expected  # each pass once
    measured(tmp_path, batches=1)  # other examples, so passes of their own
    assert len(passes) > len(expected)


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(run, folders, monkeypatch):
    alone = grams(run)
    monkeypatch.setattr(sharding, "make_mesh", MAKE_MESH)
    shared = open_run(folders / "cmoe", which=0)
    assert shared.mesh is not None and shared.mesh.size == 8
    for name, gram in grams(shared).items():
        np.testing.assert_allclose(gram, alone[name], rtol=1e-3, atol=1e-5 * alone[name].max())


def test_the_picture_of_all_runs_shows_one_group(monkeypatch):
    """Where a pattern leads to other parts of each run, those of the first are shown."""
    from matplotlib.figure import Figure

    rng = np.random.default_rng(2)
    one, other = (
        conflict.Measured(gram_of(rng.normal(size=(3, 6, 9))), np.eye(3), "abc") for _ in range(2)
    )
    runs = [
        tug_of_war.Analysis({}, {"units": {"connector": one}}),
        tug_of_war.Analysis({}, {"units": {"decoder": other}}),
        tug_of_war.Analysis({}, {"units": {"decoder": one, "connector": other}}),
    ]
    part = Figure().subfigures()
    report._indices(part, "xyz", runs)
    (points,) = [
        [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
        for axes in part.axes
        if axes.get_title() == report.TITLES["conflicts"]
    ]
    assert points == [(one.index("conflicts"), 2), (other.index("conflicts"), 0)]


def test_answers_of_other_weights_have_another_fingerprint(run):
    """Of two runs of the same settings, say, trained on unlike devices."""
    leaves = parameters(run.model)
    path = next(iter(leaves))
    other = with_parameters(run.model, leaves | {path: leaves[path].at[(0,) * leaves[path].ndim].add(1)})
    same, changed = (fingerprint_of(dataclasses.replace(run, model=m), run.config, {})
                     for m in (with_parameters(run.model, leaves), other))  # fmt: skip
    assert same == fingerprint_of(run, run.config, {}) != changed


# ---- the verb --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def written(folders, built_once):
    """What one call writes about both runs, and the texts of its picture."""

    def build(folder):
        from matplotlib.figure import Figure
        from matplotlib.text import Text

        texts = []
        save = Figure.savefig

        def keep(figure, *arguments, **keywords):
            texts.extend(text.get_text() for text in figure.findobj(Text) if text.get_text())
            return save(figure, *arguments, **keywords)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "make_mesh", lambda *settings: None)
            patch.setattr(Figure, "savefig", keep)
            words = [f"--run={folders / name}" for name in ("cmoe", "linear")]
            options = ["--which=0", "--batches=4", "--planted", f"--out={folder}"]
            assert cli.main(["analyze", "tug-of-war", *words, *options]) == 0
        (folder / "texts.json").write_text(json.dumps(texts))

    return built_once("tug_of_war_written", build)


def test_planted_agreement_and_conflict_are_found_and_shown(written):
    first, second = json.loads((written / "tug_of_war.json").read_text())["runs"]
    for run in (first, second):
        found = run["planted"]["connector"]
        assert found["names"] == ["vqa", "vqa again", "vqa negated", "vqa x 10"]
        np.testing.assert_allclose(found["cos"][0], [1, 1, -1, 1], atol=0.02)
        np.testing.assert_allclose(found["magnitude"][0], [1, 1, 1, 20 / 101], atol=0.02)
        np.testing.assert_allclose(found["ci"]["cos"][0][2], [-1, -1], atol=0.02)
        np.testing.assert_allclose(found["ci"]["magnitude"][0][3], [20 / 101] * 2, atol=0.02)
    texts = json.loads((written / "texts.json").read_text())
    # 6 of the 16 cosines of each run, and 6 of its 16 magnitude similarities
    assert texts.count("-1.00") == 12 and texts.count("0.20") >= 12
    assert "connector: direction (cosine)" in texts and (written / "tug_of_war.png").stat().st_size > 1e4


def test_matrices_are_symmetric_with_ones(written):
    content = json.loads((written / "tug_of_war.json").read_text())
    assert content["schema"] == 1 and [run["step"] for run in content["runs"]] == [0, 0]
    assert [run["connector"] for run in content["runs"]] == ["moe_mlp", "linear"]
    groups = content["runs"][0]["units"]
    assert list(groups) == [
        "connector",
        *(f"connector: expert {e}" for e in range(5)),
        "connector: router",
    ]
    for found in groups.values():
        assert found["names"] == ["vqa", "refer", "identify", "caption", "cls"]
        assert found["absent"] == ["qa"] and found["n"] == 4
        for key in ("cos", "magnitude"):
            values, ci = np.array(found[key]), np.array(found["ci"][key])
            np.testing.assert_array_equal(values, values.T)
            np.testing.assert_array_equal(np.diagonal(values), 1)
            assert values.shape == (5, 5) and ci.shape == (5, 5, 2) and (ci[..., 0] <= ci[..., 1]).all()
            assert (values >= (-1 if key == "cos" else 0)).all() and (values <= 1).all()
    assert list(content["runs"][1]["units"]) == ["connector"]
    # Both runs saw the same batches, so that they are compared in pairs.
    (difference,) = content["differences"]
    value = [run["units"]["connector"]["indices"]["mean_cos"]["value"] for run in content["runs"]]
    assert difference["run"] == 1 and difference["mean_cos"]["value"] == pytest.approx(
        value[1] - value[0]
    )
    assert difference["mean_cos"]["ci95"][0] <= difference["mean_cos"]["value"]


def test_the_page_says_what_was_measured_and_the_report_names_it(written, tmp_path):
    page = (written / "tug_of_war.md").read_text()
    for words in (
        "cmoe (moe_mlp, soft router, step 0): 4 batches a task of split 'val'; examples and the "
        "clusters (such as patients) that they come from: vqa 24 of 6",
        "No gradient at connector: qa.",
        "| linear (linear, step 0) | connector | vqa - refer | ",
        "## Next to cmoe",
        "![Tug-of-war](tug_of_war.png)",
    ):
        assert words in page, words
    pages = tmp_path / "analysis"
    pages.mkdir()
    shutil.copy(written / "tug_of_war.md", pages)
    link_pages(pages)  # no report: nothing to do
    assert not (tmp_path / "report.md").exists()
    (tmp_path / "report.md").write_text("# Run: evaluation\n")
    for _ in range(2):
        link_pages(pages)
    link = "[Tug-of-war between tasks](analysis/tug_of_war.md)"
    expected = f"# Run: evaluation\n\n## Analyses\n\n- {link}\n"
    assert (tmp_path / "report.md").read_text() == expected


# ---- mistakes --------------------------------------------------------------------------------------
def refused(words, capsys) -> str:
    assert cli.main(["analyze", "tug-of-war", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("unimed_jax: ") and err.count("\n") == 1, err
    return err


def test_mistakes_are_one_sentence(folders, tmp_path, capsys):
    folder = f"--run={folders / 'cmoe'}"
    assert "names no checkpoint; give newest, best, all or" in refused([folder, "--which=last"], capsys)
    assert "--batches=0 cannot be used; give a number from 1 to 10000" in refused(
        [folder, "--batches=0"], capsys
    )
    assert "matches no parameter of this model" in refused(
        [folder, "--which=0", "--match=conector/*"], capsys
    )
    assert "has no example in split 'tset'" in refused([folder, "--which=0", "--split=tset"], capsys)
    assert "names no checkpoint" in refused([folder, "--which=" + 5000 * "9"], capsys)
    nowhere = tmp_path / "nowhere"
    for words in ([f"--run={nowhere}"], [folder, f"--run={nowhere}", "--which=0"]):
        assert "nowhere/config.json does not exist" in refused(words, capsys)
        assert not nowhere.exists()
    other = tmp_path / "other"
    shutil.copytree(folders / "cmoe", other)
    (other / "checkpoints").mkdir()  # killed before the first was saved
    sentence = refused([f"--run={other}", "--which=all"], capsys)
    assert "other holds no checkpoint; train it first, or measure it before its training" in sentence
    settings = json.loads((other / "config.json").read_text())
    settings["model"]["gates"] = 3
    (other / "config.json").write_text(json.dumps(settings))
    sentence = refused([f"--run={other}"], capsys)
    assert "config.json is of another version of this program, or was changed: config.model" in sentence


def test_one_task_has_nobody_to_pull_against(run):
    sources = (dataclasses.replace(run.config.data.sources[0], tasks=("vqa",)),)
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, sources=sources))
    with pytest.raises(UserError, match=r"only squares/val/vqa has examples in split 'val', and"):
        sides_of(config, "val", 3)


def test_a_frozen_connector_is_refused(run):
    rules = (RuleConfig("connector/*", False), RuleConfig("*", True))
    config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, rules=rules))
    frozen = dataclasses.replace(run, config=config)
    with pytest.raises(UserError, match=r"its connector does not train.*--match"):
        chosen_leaves(frozen, [])
    assert chosen_leaves(frozen, ["connector/router/*"])  # but may be named


def test_a_task_of_few_examples_says_that_there_are_few_batches(run):
    """And clusters are counted over the examples that are looked at."""
    sides = sides_of(run.config, "val", 4, ["refer", "vqa"])
    assert [side.name for side in sides] == ["vqa", "refer"]
    few = dataclasses.replace(sides[1].unit, examples=sides[1].unit.examples[:1])
    alone = [dataclasses.replace(example, cluster="") for example in sides[0].unit.examples]
    many = dataclasses.replace(sides[0].unit, examples=alone)  # each example is a cluster of its own
    new = [dataclasses.replace(s, unit=u) for s, u in zip(sides, (many, few), strict=True)]
    batches = Batches(new, run, 4)
    (note,) = batches.notes
    assert note.startswith("1 batches in place of 4, as squares/val/refer has no more examples")
    assert batches.clusters == batches.examples and batches.examples[1] == 1
    assert batches.examples[0] < len(alone)
    assert Batches(sides, run, 4).notes == []
    with pytest.raises(UserError, match="--task=refr is not a task; did you mean 'refer'"):
        sides_of(run.config, "val", 4, ["refr"])


def test_sides_are_joined_by_task_and_by_set(run):
    sides = sides_of(run.config, "val", 3)
    assert [kind for kind, *_ in joins(sides)] == ["units"]
    data = run.config.data
    second = dataclasses.replace(data.sources[0], id="again", options={"images": 8})
    two = dataclasses.replace(
        run.config, data=dataclasses.replace(data, sources=(*data.sources, second))
    )
    sides = sides_of(two, "val", 3)
    found = {kind: (names, rows) for kind, names, rows in joins(sides)}
    assert sides[0].name == "squares/vqa" and list(found) == ["units", "tasks", "sets"]
    names, rows = found["tasks"]
    assert names == ["vqa", "refer", "identify", "caption", "cls", "qa"] and rows.shape == (6, 12)
    np.testing.assert_array_equal(rows[0], [0.5, *[0] * 5, 0.5, *[0] * 5])
    assert found["sets"][0] == ["squares", "again"]


def test_patterns_name_leaves():
    assert matching(["a/b", "a/c", "d"], ["a/*"], "--match") == ["a/b", "a/c"]
