"""`params`: counts from shapes alone, against published numbers and sums by hand.

Med-MoE's stage configs.
"""

import json
import math

import jax
import pytest
from support import med_moe_published as published
from support.fake_brain import tiny_config

from unimed_jax import main as cli
from unimed_jax.analyze import params
from unimed_jax.config_file import load_config_file
from unimed_jax.interop.families import med_moe
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.rules import leaf_rules
from unimed_jax.settings import from_config_dict
from unimed_jax.verbs.options import with_overrides

STAGES, SIZES = ("align", "instruct", "router", "moe"), ("stablelm", "phi2", "tiny")


def stage(name: str, size: str, *overrides: str):
    return with_overrides(load_config_file(f"configs/med_moe/{name}.py:{size}"), list(overrides))


@pytest.mark.parametrize(
    "size, layers, mlp, width, total, activated, dense, projector",
    [
        ("stablelm", 12, 34_603_008, 2048, 3_305_558_064, 2_059_849_776, 1_644_515_328, 6_295_552),
        ("phi2", 16, 52_441_600, 2560, 6_136_058_944, 3_618_862_144, 2_779_632_640, 9_180_160),
    ],
)
def test_med_moe_has_its_published_parameters(
    size, layers, mlp, width, total, activated, dense, projector, tmp_path, capsys
):
    """As a user starts it.

    Two more experts are two more MLPs and router rows in each layer, none of which runs.
    """
    before = jax.live_arrays()  # held, so that none of other tests is freed in between
    words = ["params", f"--config=configs/med_moe/moe.py:{size}"]
    assert cli.main([*words, f"--json={tmp_path}/four.json"]) == 0
    shown = capsys.readouterr().out
    assert cli.main([*words, f"--json={tmp_path}/six.json", "--config.model.moe.experts=6"]) == 0
    assert len(jax.live_arrays()) == len(before)
    four, six = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("four", "six"))
    decoder = four["modules"]["decoder"]
    assert (decoder["total"], decoder["activated"], four["dense"]["decoder"]) == (
        total,
        activated,
        dense,
    )
    assert (
        four["modules"]["connector"]["total"] == four["modules"]["connector"]["activated"] == projector
    )
    assert four["tower"] == 303_507_456
    assert four["ratios"]["decoder"] == {
        "activated/total": activated / total,
        "activated/dense": activated / dense,
    }
    # the tower without its last block (12,596,224) and norm (2,048)
    all_ = 290_909_184 + projector + activated
    assert four["modules"]["all"]["activated"] == all_
    assert decoder["trainable"] == layers * mlp * 6  # experts, meta, and as many plain layers
    gates = layers * 2 * (width + 1)
    assert six["modules"]["decoder"]["total"] - total == layers * 2 * mlp + gates
    assert six["modules"]["decoder"]["activated"] - activated == gates
    for number in (total, activated, dense, projector, 303_507_456):
        assert f"{number:,}" in shown
    assert params.DENSE in shown


@pytest.mark.parametrize(
    "settings, share",
    [
        ({"router": "soft"}, 5),
        ({"router": "constant"}, 5),
        ({"router": "sparse", "top_k": 2}, 2),
        ({"router": "hard"}, 1),
        ({"router": "sparse", "top_k": 3, "kind": "moe_linear"}, 3),
    ],
)
def test_the_connectors_experts_are_activated_as_they_are_routed(settings, share):
    config = tiny_config()
    config.model.connector.update(settings)
    config = from_config_dict(config)
    counted = params.count(config)
    width, out = 4 * config.model.vision.width, config.model.decoder.width
    mlp = width * out + out + (out * out + out if config.model.connector.kind == "moe_mlp" else 0)
    experts, connector = counted["modules"]["connector/experts"], counted["modules"]["connector"]
    assert (experts["total"], experts["activated"]) == (5 * mlp, share * mlp)
    assert connector["total"] - connector["activated"] == (5 - share) * mlp
    assert counted["dense"]["connector"] == mlp
    leaves = parameters(abstract(config.model))
    assert counted["modules"]["all"]["total"] == sum(math.prod(leaf.shape) for leaf in leaves.values())
    assert f"{share} of 5 ({settings['router']} router)" in params.table(counted, config.model)


def test_modules_add_up_and_trainable_follows_the_rules(capsys):
    """All parts that a model may have at once: adapters, residual experts, tied head, layers after
    the features.
    """
    config = tiny_config()
    config.model.decoder.update(depth=3, tied_head=True)
    config.model.moe.update(experts=4, layers=(0, 2), top_k=2, meta=False, residual=True)
    config.model.lora.update(rank=2, targets=("q", "o"))
    config.model.vision.update(depth=3, feature_layer=-2, output_norm=False)
    config.train.rules = (
        dict(match="*/lora_?", train=True),
        dict(match="*router*", train=True),
        dict(match="*", train=False),
    )
    counted = params.count(from_config_dict(config))
    mlp, block = 3 * 32 * 48, 4 * 16 * 16 + 2 * 16 + 16 + 2 * 16 * 32 + 16 + 32 + 2 * 2 * 16
    modules = counted["modules"]
    assert {name: row["total"] for name, row in modules.items() if name.startswith("decoder/")} == {
        "decoder/embedding": 640 * 32,
        "decoder/adapters": 3 * 2 * 2 * (32 + 32),
        "decoder/attention": 3 * 4 * 32 * 32,
        "decoder/MLPs": mlp,
        "decoder/routers": 2 * (32 * 4 + 4),
        "decoder/experts": 2 * 4 * mlp,
        "decoder/residual MLPs": 2 * (mlp + 32 * 2 + 2),
        "decoder/norms": (3 * 2 + 1) * 32,
    }
    assert modules["decoder/experts"]["activated"] == 2 * 2 * mlp
    trainable = {name for name, row in modules.items() if row["trainable"] and "/" in name}
    assert trainable == {"decoder/adapters", "decoder/routers", "connector/router"}
    assert counted["dense"]["decoder"] == 640 * 32 + 768 + 3 * 4096 + 3 * mlp + 224
    assert counted["tower"] - counted["modules"]["vision"]["total"] == block + 2 * 16
    for number in params.COUNTS:
        for top in params.TOP:
            inside = [row[number] for name, row in modules.items() if name.startswith(f"{top}/")]
            assert inside and sum(inside) == modules[top][number]
        assert sum(modules[top][number] for top in params.TOP) == modules["all"][number]


@pytest.mark.parametrize("size, theirs", [("stablelm", published.STABLELM), ("phi2", published.PHI)])
def test_the_published_sizes_are_those_of_the_checkpoints(size, theirs):
    """What Med-MoE's own config.json says; so its weights can be read."""
    depth = theirs["num_hidden_layers"]
    moe = {
        "moe_layers_idx": list(range(0, depth, 2)),
        "num_experts": [4] * (depth // 2),
        "top_k_experts": 1,
    }
    moe |= {"use_residual": False, "router_aux_loss_coef": 0.0, "moe_enable": True}
    checkpoint, ours = med_moe.model_from_med_moe({**theirs, "moe": moe}), stage("moe", size).model
    assert (ours.vision, ours.connector, ours.decoder) == (
        checkpoint.vision,
        checkpoint.connector,
        checkpoint.decoder,
    )
    assert med_moe.model_to_med_moe(ours)["moe"] == med_moe.model_to_med_moe(checkpoint)["moe"]
    assert ours.tokens_per_image == 576


# What trains, by module (facts of Med-MoE's stages).
TRAINS = {
    "align": {"connector/projector"},
    "instruct": {f"decoder/{m}" for m in ("embedding", "attention", "MLPs", "head", "norms")}
    | {"connector/projector"},
    "router": set(),
    "moe": {"decoder/MLPs", "decoder/experts", "decoder/meta experts", "connector/projector"},
}
PUBLISHED = {  # rate, examples of an epoch, epochs, form of the text (None: the decoder's), image
    "align": (1e-3, 500_000, 1, "plain", "crop"),
    "instruct": (2e-5, 60_000, 3, None, "pad"),
    "moe": (2e-5, 44_000, 9, None, "pad"),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_what_it_should(name, size):
    config = stage(name, size)
    assert config.name == f"med_moe_{size}/{name}"
    modules = {name: row for name, row in params.count(config)["modules"].items() if "/" in name}
    assert {module for module, row in modules.items() if row["trainable"]} == TRAINS[name]
    assert all(row["trainable"] in (0, row["total"]) for row in modules.values())
    rules = leaf_rules(parameters(abstract(config.model)), config.train, config.optimizer)
    assert {rule.weight_decay for rule in rules.values()} == {0.0}
    starts = [path for kind, path in config.init if kind == "run"]
    before = {"align": None, "instruct": "align", "router": "instruct", "moe": "instruct"}[name]
    assert starts == (
        [f"runs/med_moe_{size}/{before}"] if before else ["runs/brain_tiny"] * (size == "tiny")
    )
    if name == "moe":
        assert config.init[-1] == ("router", f"runs/med_moe_{size}/router/router")
    if name in PUBLISHED:
        lr, examples, epochs, form, image = PUBLISHED[name]
        default = {"phi2": "phi"}.get(size, "stablelm")
        assert (config.text.form, config.data.fit) == (form or default, image)
        assert config.optimizer.warmup_steps == math.ceil(0.03 * config.train.steps)
        if size != "tiny":
            assert config.train.steps == math.ceil(examples / 64) * epochs and config.optimizer.lr == lr
            assert (config.data.rows, config.data.row_tokens) == (64, 2048)
            assert config.model.compute_dtype == "bfloat16"


def test_the_tiny_chain_fits_a_run_of_brain_tiny():
    """Every leaf of its vision encoder and decoder has its place in stage 1."""
    theirs = parameters(abstract(with_overrides(load_config_file("configs/brain_tiny.py"), []).model))
    ours = parameters(abstract(stage("align", "tiny").model))
    for path, leaf in theirs.items():
        if not path.startswith("connector/"):
            assert ours[path].shape == leaf.shape, path
    assert all(path in theirs or path.startswith("connector/layers/") for path in ours)


def test_what_training_keeps_is_counted_as_it_is_stored(capsys):
    """Full-size Uni-Med: 7.16e9 numbers of frozen kernels at 4.25 bits in place of 16."""
    settings = (
        "--config.model.frozen_kernels=nf4",
        "--config.optimizer.moments_dtype=bfloat16",
    )
    whole, small = (
        params.count(with_overrides(load_config_file("configs/cmoe.py"), list(each)))["bytes"]
        for each in ((), settings)
    )
    trained = 4 * 727_068_165
    assert whole["trained"] == whole["gradients"] == small["trained"] == trained
    assert round(whole["moments"] / trained, 3) == 2 and round(small["moments"] / trained, 3) == 1
    decoder = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    encoder = 39 * (4 * 1408 * 1408 + 2 * 1408 * 6144)
    assert whole["frozen"] - small["frozen"] == (decoder + encoder) * (16 - 4.25) / 8
    assert cli.main(["params", "--config=configs/cmoe.py", *settings]) == 0
    assert "training keeps 12.31 GiB (frozen 4.18, trained 2.71, moments 2.71" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--config=configs/med_moe/align.py:stablelm"],
            ["'clip'", "'hf'", "text.tokenizer", "llava_med_align"],
        ),
        (
            ["--config=configs/med_moe/moe.py:phi2"],
            ["run runs/med_moe_phi2/instruct", "phi2/router/router", "slake"],
        ),
        (["--config=configs/med_moe/moe.py:phi"], ["'phi'", ":stablelm, :phi2, :tiny"]),
        (["--config=configs/med_moe/moe.py"], ["come in sizes, not ''"]),
        (["params", "--config=configs/med_moe/all.py:tiny"], ["is a chain", "moe.py:tiny"]),
        (
            ["params", "--config=configs/med_moe/moe.py:tiny", "--config.model.moe.top_k=5"],
            ["top_k=5 of 4"],
        ),
        (
            [
                "params",
                "--config=configs/brain_tiny.py",
                "--config.train.rules=({'match':'x','train':True},)",
            ],
            ["no pattern"],
        ),
    ],
)
def test_what_is_missing_is_one_sentence(words, said, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for word in said:
        assert word in error, error
