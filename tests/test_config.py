"""Settings: what is refused and in which sentence, fidelity, round trips, config files."""

import copy
import dataclasses
import json
import math
import operator
import pickle

import pytest

from unimed_jax.config import Config, RuleConfig, config_hash, default_config, to_dict
from unimed_jax.errors import UserError, nearest
from unimed_jax.settings import FIDELITY, from_config_dict


def with_settings(**settings):
    """Default settings with `section__key=value` changed."""
    config = default_config()
    for key, value in settings.items():
        *groups, name = key.split("__")
        place = config
        for group in groups:
            place = place[group]
        place[name] = value
    return config


def refused(settings, *words: str) -> str:
    """-> the sentence, which holds the words, says it in one line and ends as a sentence does."""
    with pytest.raises(UserError) as error:
        from_config_dict(settings)
    sentence = str(error.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence and sentence[-1] in ".?"
    return sentence


def test_defaults_stand():
    config = from_config_dict(default_config())
    knobs = dataclasses.replace(config.model.moe, eval_noise=None, route_padding=None)
    assert (
        dataclasses.replace(config.model, moe=knobs) == Config().model and config.fidelity == "default"
    )


@pytest.mark.parametrize(
    "key, right",
    [
        ("sed", "config.sed is not a setting; did you mean 'seed'?"),
        ("model__vision__widht", "config.model.vision.widht is not a setting; did you mean 'width'?"),
        (
            "model__connector__num_experts",
            "config.model.connector.num_experts is not a setting; did you mean 'experts'?",
        ),
        ("optimizer__zzz", "config.optimizer.zzz is not a setting."),
    ],
)
def test_unknown_keys(key, right):
    assert refused(with_settings(**{key: 1})) == right


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("seed", "one", "config.seed must be int, not 'one'."),
        ("seed", 1.5, "config.seed must be int, not 1.5."),
        ("seed", True, "config.seed must be int, not True."),
        ("optimizer__lr", "1e-3", "config.optimizer.lr must be float, not '1e-3'."),
        ("optimizer__betas", (0.9,), "config.optimizer.betas must have 2 entries, not 1: (0.9,)."),
        ("optimizer__skip_unused", 1, "config.optimizer.skip_unused must be bool, not 1."),
        (
            "model__decoder__attention_bias",
            "q",
            "config.model.decoder.attention_bias must be a tuple, not 'q'.",
        ),
        ("model__decoder__windows", (1, "2"), "config.model.decoder.windows[1] must be int, not '2'."),
        ("model__vision", 3, "config.model.vision must be a group of settings, not 3."),
        ("model__connector__hidden", "wide", "config.model.connector.hidden must be int, not 'wide'."),
        (
            "train__rules",
            (("*", "train", 1.0),),
            "config.train.rules[0] must be a group of settings, not ('*', 'train', 1.0).",
        ),
        (
            "train__rules",
            ({"match": "*"},),
            "config.train.rules[0] needs train; add it to {'match': '*'}.",
        ),
    ],
)
def test_wrong_types(key, value, sentence):
    assert refused(with_settings(**{key: value})) == sentence


def test_whole_numbers_are_floats_too():
    config = from_config_dict(
        with_settings(optimizer__lr=1, train__rules=[{"match": "*", "train": True, "lr_scale": 2}])
    )
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.train.rules == (RuleConfig("*", True, lr_scale=2.0),)
    assert from_config_dict(with_settings(model__connector__hidden=7)).model.connector.hidden == 7
    assert from_config_dict(with_settings(model__connector__hidden=None)).model.connector.hidden is None


@pytest.mark.parametrize("fidelity", ["default", "paper"])
def test_fidelity_is_expanded_once(fidelity):
    """Every knob that it names is None by default, has its value afterwards, and nothing else
    differs.
    """
    before, config = Config(), from_config_dict(with_settings(fidelity=fidelity))
    for key, value in FIDELITY[fidelity].items():
        at = operator.attrgetter(key)
        assert at(before) is None and at(config) == value, key
    assert FIDELITY["default"].keys() == FIDELITY["paper"].keys()
    moe = dataclasses.replace(config.model.moe, eval_noise=None, route_padding=None)
    assert dataclasses.replace(config.model, moe=moe) == before.model and config.train == before.train


def test_fidelity_yields_to_what_is_set():
    config = from_config_dict(
        with_settings(fidelity="paper", text__max_words=9, optimizer__skip_unused=False)
    )
    assert (
        config.text.max_words == 9
        and config.optimizer.skip_unused is False
        and config.text.double_bos is True
    )
    refused(
        with_settings(fidelity="published"),
        "config.fidelity: 'published' is unknown; choose from default, paper.",
    )


def test_round_trip_and_hash():
    """config.json -> the same settings and the same hash, whatever the order of its keys."""
    config = from_config_dict(
        with_settings(
            fidelity="paper",
            model__decoder__rope_scaling={"factor": 4.0},
            data__sources=(
                {
                    **{
                        "name": "brain",
                        "tasks": ("vqa", "cls"),
                        "weight": 2,
                        "only": {"template": ["where", "what"]},
                    },
                    **{
                        "weights": {"organ": {"liver": 2}},
                        "options": {"jitters": [8, {"seed": 0}], "fast": True},
                    },
                },
            ),
        )
    )
    stored = json.loads(json.dumps(to_dict(config)))
    backwards = {key: stored[key] for key in reversed(stored)}
    again = from_config_dict(backwards)
    assert again == config and config_hash(again) == config_hash(config)
    assert (
        config.data.sources[0].weight == 2.0
        and config.model.decoder.rope_scaling.original_positions == 8192
    )
    assert config.data.sources[0].options == {"jitters": (8, {"seed": 0}), "fast": True}
    assert len(config_hash(config)) == 16 and hash(config) == hash(again)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(TypeError, match="cannot be changed"):
        config.data.sources[0].options["jitters"] = 9
    other = from_config_dict(backwards | {"seed": 1})
    assert config_hash(other) != config_hash(config)


# ---------------------------------------------------------------------------------------------
# What cannot go together
# ---------------------------------------------------------------------------------------------

CHOICES = {
    "model__vision__activation": "relu",
    "model__vision__qkv_bias": "k",
    "model__vision__position_init": "zeros",
    "model__connector__aggregation": "resampler",
    "model__connector__router": "softmax",
    "model__connector__router_input": "router_token",
    "model__connector__activation": "relu",
    "model__connector__form": "quick",
    "model__decoder__norm": "batch",
    "model__decoder__activation": "quick_gelu",
    "model__compute_dtype": "float16",
    "model__frozen_dtype": "int4",
    "model__frozen_kernels": "nf3",
    "optimizer__moments_dtype": "float16",
    "model__attention": "flash",
    "model__remat": "half",
    "data__mixing": "random",
    "loss__reduction": "sum",
    "evaluate__scoring": "best",
}


@pytest.mark.parametrize("key", CHOICES)
def test_choices(key):
    where = "config." + key.replace("__", ".")
    refused(with_settings(**{key: CHOICES[key]}), f"{where}: {CHOICES[key]!r} is unknown; choose from")


MODELS = {
    "patches that do not tile": ({"vision__patch_size": 7}, ["image_size=64", "patch_size=7"]),
    "heads that do not divide": ({"vision__heads": 3}, ["heads=3", "width=128"]),
    "no such feature layer": ({"vision__feature_layer": -5}, ["feature_layer=-5", "depth=4"]),
    "a feature layer from the front": ({"vision__feature_layer": 1}, ["feature_layer=1"]),
    "sincos of an odd width": (
        {"vision__position_init": "sincos", "vision__width": 126, "vision__heads": 2},
        ["width=126", "sincos"],
    ),
    "unknown connector": ({"connector__kind": "mlp"}, ["'mlp' is unknown", "mlpNx_gelu"]),
    "connector of no layer": ({"connector__kind": "mlp0x_gelu"}, ["'mlp0x_gelu' is unknown"]),
    "two task tokens": (
        {"connector__task_tokens": 2},
        ["config.model.connector.task_tokens: 2", "0, 1"],
    ),
    "pools of another rate": (
        {"connector__aggregation": "avgpool", "connector__rate": 2},
        ["avgpool", "rate=4"],
    ),
    "pools of an odd grid": (
        {"connector__aggregation": "maxpool", "vision__image_size": 24, "connector__rate": 4},
        ["grid of 3"],
    ),
    "a block that is not square": (
        {"connector__aggregation": "block", "connector__rate": 2},
        ["square", "rate=2"],
    ),
    "a rate that does not divide": ({"connector__rate": 3}, ["rate=3", "64 patches"]),
    "a rate of nothing": ({"connector__rate": 0}, ["config.model.connector.rate=0"]),
    "no experts": ({"connector__experts": 0}, ["config.model.connector.experts=0"]),
    "no task token to read": ({"connector__task_tokens": 0}, ["'task_token'", "router_input='token'"]),
    "no task to read": (
        {"connector__task_tokens": 0, "connector__router": "sparse", "connector__router_input": "task"},
        ["'task'", "task_tokens=1"],
    ),
    "too many kept": ({"connector__router": "sparse", "connector__top_k": 6}, ["top_k=6 of 5"]),
    "none kept": ({"connector__router": "sparse", "connector__top_k": 0}, ["top_k=0 of 5"]),
    "key heads that do not divide": ({"decoder__kv_heads": 3}, ["kv_heads=3", "heads=4"]),
    "no key heads": ({"decoder__kv_heads": 0}, ["config.model.decoder.kv_heads=0"]),
    "a scaling of another kind": (
        {"decoder__rope_scaling": {"kind": "yarn"}},
        ["rope_scaling.kind: 'yarn' is unknown"],
    ),
    "an adapter of a gate that is not there": (
        {"decoder__gated_mlp": False, "lora__rank": 2},
        ["config.model.lora.targets: ", "'gate'", "gated_mlp=False"],
    ),
    "a bias of an unknown linear": (
        {"decoder__attention_bias": ("q", "query")},
        ["attention_bias", "'query'"],
    ),
    "an adapter of an unknown linear": (
        {"lora__targets": ("q", "gates")},
        ["lora.targets[1]: 'gates' is unknown", "gate, up, down"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be(name):
    settings, words = MODELS[name]
    refused(
        with_settings(**{f"model__{key}": value for key, value in settings.items()}),
        "config.model.",
        *words,
    )


ALLOWED = {
    "the image alone, without task tokens": {
        "connector__task_tokens": 0,
        "connector__router_input": "token",
    },
    "hard, without task tokens": {"connector__task_tokens": 0, "connector__router": "hard"},
    "all experts kept": {"connector__router": "sparse", "connector__top_k": 5},
    "dense, whatever the router says": {
        **{"connector__kind": "mlp3x_gelu", "connector__task_tokens": 0},
        **{"connector__router": "hard", "connector__experts": 2},
    },
    "every patch a token": {"connector__rate": 1},
    "the first block": {"vision__feature_layer": -4},
    "no gate and no adapters": {"decoder__gated_mlp": False},
    "no gate, and adapters of what is there": {
        **{"decoder__gated_mlp": False, "lora__rank": 2},
        "lora__targets": ("q", "k", "v", "o", "up", "down"),
    },
}


@pytest.mark.parametrize("name", ALLOWED)
def test_models_that_can_be(name):
    sources = ({"tasks": ("cls", "qa")},)
    from_config_dict(
        with_settings(data__sources=sources, **{f"model__{k}": v for k, v in ALLOWED[name].items()})
    )


@pytest.mark.parametrize("named", [True, False])
def test_a_source_of_which_nothing_else_is_evaluated_needs_no_more_experts(named):
    entry = {"source": "brain", "task": "vqa", "split": "val"}
    from_config_dict(
        with_settings(
            model__connector__router="hard",
            model__connector__experts=1,
            data__sources=({"name": "brain", "tasks": ("vqa",)},),
            evaluate__sources=({"name": "brain"},),
            evaluate__entries=(entry,) * named,
            evaluate__splits=(),
        )
    )


RUNS = {
    "hard routing of a task without its expert": (
        {
            **{"model__connector__router": "hard", "model__connector__experts": 3},
            "data__sources": ({"name": "brain", "tasks": ("vqa", "caption")},),
        },
        ["'caption' to expert 3", "there are 3", "experts=5"],
    ),
    "hard routing of all tasks": (
        {
            **{"model__connector__router": "hard", "model__connector__experts": 4},
            "data__sources": ({"name": "brain"},),
        },
        ["'cls' to expert 4"],
    ),
    "hard routing of a held-out task without its expert": (
        {
            **{"model__connector__router": "hard", "model__connector__experts": 1},
            "data__sources": ({"name": "brain", "tasks": ("vqa",)},),
            "evaluate__sources": ({"name": "brain", "tasks": ("vqa", "cls")},),
        },
        ["'cls' to expert 4", "there are 1"],
    ),
    "hard routing of an evaluated task without its expert": (
        {
            **{"model__connector__router": "hard", "model__connector__experts": 1},
            "data__sources": ({"name": "brain", "tasks": ("vqa",)},),
            "evaluate__entries": ({"source": "brain", "task": "cls", "split": "val"},),
        },
        ["'cls' to expert 4"],
    ),
    "one source a batch, packed": (
        {"data__mixing": "per_batch", "data__packing": True},
        ["data.packing=False"],
    ),
    "paper, packed": ({"fidelity": "paper", "data__packing": True}, ["per_batch", "data.packing=False"]),
    "micro-batches that do not divide": ({"train__accumulation": 3}, ["accumulation=3", "rows=16"]),
    "no micro-batches": ({"train__accumulation": 0}, ["config.train.accumulation=0"]),
    "no rows": ({"data__rows": 0}, ["config.data.rows=0"]),
    "a rule of another word": (
        {"train__rules": ({"match": "*", "train": "frozen"},)},
        ["config.train.rules[0].train must be bool, not 'frozen'"],
    ),
    "an unknown task": (
        {"data__sources": ({"tasks": ("captions",)},)},
        ["config.data.sources[0].tasks[0]: 'captions' is unknown; choose from vqa, refer"],
    ),
}


BOUNDS = [
    ("seed", -1, "config.seed=-1: set 0 to 4294967295."),
    ("seed", 2**32, "config.seed=4294967296: set a number of at most 32 bits."),
    ("optimizer__lr", math.nan, "config.optimizer.lr=nan: set a number that float32 can hold."),
    ("optimizer__lr", -1e-3, "config.optimizer.lr=-0.001: set at least 0."),
    ("optimizer__clip", math.inf, "config.optimizer.clip=inf: set a number that float32 can hold."),
    ("optimizer__betas", (0.9, 1.0), "config.optimizer.betas[1]=1.0: set a number below 1."),
    ("optimizer__eps", 0, "config.optimizer.eps=0.0: set a number above 0."),
    ("optimizer__eps", 1e-50, "config.optimizer.eps=1e-50: set a number that float32 can hold."),
    ("train__steps", 10**12, "config.train.steps=1000000000000: set a number of at most 32 bits."),
    ("train__rules", (), "config.train.rules is empty (()); name at least one."),
    ("init", (), "config.init is empty (()); name at least one."),
    ("data__threads", 10**6, "config.data.threads=1000000: set 0 to 1024."),
    ("model__lora__dropout", 1.0, "config.model.lora.dropout=1.0: set a number below 1."),
    ("model__lora__targets", ("q", "q"), "config.model.lora.targets names 'q' twice; name it once."),
    ("model__vision__std", (0.2, 0.0, 0.2), "config.model.vision.std[1]=0.0: set a number above 0."),
    ("model__decoder__windows", (8, -1), "config.model.decoder.windows[1]=-1: set at least 0."),
    ("model__decoder__rotary_fraction", 1.5, "config.model.decoder.rotary_fraction=1.5: set 0 to 1."),
    (
        "model__decoder__attention_softcap",
        0.0,
        "config.model.decoder.attention_softcap=0.0: set a number above 0.",
    ),
    ("model__moe__capacity_factor", -1, "config.model.moe.capacity_factor=-1.0: set a number above 0."),
    ("data__image_cache_mib", -1, "config.data.image_cache_mib=-1: set at least 0."),
    ("evaluate__top_p", 0.0, "config.evaluate.top_p=0.0: set a number above 0."),
    ("evaluate__splits", ("test", " "), "config.evaluate.splits[1] is empty (' '); name at least one."),
    (
        "train__rules",
        ({"match": "", "train": True},),
        "config.train.rules[0].match is empty (''); name at least one.",
    ),
    ("router_fit__labels", (0, 3), "config.router_fit.labels[0]=0: set at least 1."),
    *(
        ("data__sources", ({"name": "brain", **wrong},), f"config.data.sources[0].{sentence}")
        for wrong, sentence in [
            ({"weight": 0}, "weight=0.0: set a number above 0."),
            ({"weight": math.inf}, "weight=inf: set a number that float32 can hold."),
            ({"questions": 0}, "questions=0: set at least 1."),
            ({"name": ""}, "name is empty (''); name at least one."),
            ({"only": {"template": ()}}, "only['template'] is empty (()); name at least one."),
            ({"only": {"template": "where"}}, "only['template'] must be a tuple, not 'where'."),
            ({"only": ("template",)}, "only must be a dict, not ('template',)."),
            (
                {"weights": {"template": {"where": -1}}},
                "weights['template']['where']=-1.0: set at least 0.",
            ),
            (
                {"info": {"license": "CC0"}},
                "info, key 'license': 'license' is unknown; choose from licence, citation, note, "
                "cluster_word.",
            ),
            (
                {"options": {"jitters": math.nan}},
                "options['jitters']=nan: set a number that float32 can hold.",
            ),
            (
                {"options": {"part": [print]}},
                f"options['part'][0] must be text, a number, a list or a dict, not {print!r}.",
            ),
        ]
    ),
]


@pytest.mark.parametrize("key, value, sentence", BOUNDS)
def test_bounds(key, value, sentence):
    assert refused(with_settings(**{key: value})) == sentence


ENTRY = {"source": "brain", "task": "vqa", "split": "val"}
RUNS |= {
    "a router without classes": ({"job": "router"}, ["config.job='router'", "config.router_fit.key"]),
    "patience for nothing": ({"train__patience": 3}, ["config.train.patience=3", "config.train.best"]),
    "the best of what is not measured": (
        {"train__best": "accuracy/brain/val/vqa", "evaluate__entries": (ENTRY,)},
        ["config.train.best='accuracy/brain/val/vqa'", "`every`; it has none."],
    ),
    "the best of another split": (
        {"train__best": "accuracy/brain/test/vqa", "evaluate__entries": (ENTRY | {"every": 10},)},
        ["config.train.best='accuracy/brain/test/vqa'", "it has brain/val/vqa."],
    ),
    "nothing that trains": (
        {"train__rules": ({"match": "*", "train": False},)},
        ["config.train.rules freezes every parameter", "job='router'"],
    ),
    "adapters of nothing": (
        {"model__lora__rank": 2, "model__lora__targets": ()},
        ["config.model.lora.targets is empty", "rank=2"],
    ),
    "the highest loss": (
        {"train__best": "loss/brain/val/vqa", "evaluate__entries": (ENTRY | {"every": 10},)},
        ["best_mode='min'"],
    ),
    "an entry twice": (
        {"evaluate__entries": (ENTRY, ENTRY)},
        ["config.evaluate.entries names brain/val/vqa twice"],
    ),
    "a scaling upside down": (
        {"model__decoder__rope_scaling": {"low_freq_factor": 4.0}},
        ["high_freq_factor=4.0", "low_freq_factor=4.0"],
    ),
    "heads too narrow to rotate": (
        {"model__decoder__rotary_fraction": 0.01},
        ["rotary_fraction=0.01", "head_dim=32"],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_that_cannot_be(name):
    settings, words = RUNS[name]
    refused(with_settings(**settings), *words)


def test_nearest():
    assert (
        nearest("grte", ["gate", "up"]) == "; did you mean 'gate'?" and nearest("xyz", ["gate"]) == "."
    )
