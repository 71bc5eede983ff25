"""Every field of the settings with hostile values: refused in one sentence that names it, or meaningful.

What is meaningful is written out here, apart from the bounds in config.py. A field that is missing
here, or that has a number or text without bounds, fails.
"""

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from campaigns.fuzz_settings import Field, Tried, fields, settings_with, trials

from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict

Check = Callable[[Any], bool]


# ---- what is meaningful -----------------------------------------------------------------------
def whole(low: int, high: int) -> Check:
    return lambda v: type(v) is int and low <= v <= high


def number(low: float, high: float, zero: bool = False) -> Check:
    return lambda v: type(v) is float and math.isfinite(v) and (low <= v <= high or zero and v == 0)


def one_of(*choices) -> Check:
    return lambda v: any(v == choice and type(v) is type(choice) for choice in choices)


def text(most: int, pattern: str = r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]*") -> Check:
    return lambda v: type(v) is str and len(v) <= most and bool(re.fullmatch(pattern, v))


def optional(check: Check) -> Check:
    return lambda v: v is None or check(v)


def tuple_of(check: Check, least: int = 0, most: int = 10**6, distinct: bool = True) -> Check:
    def checked(v) -> bool:
        once = not distinct or len(set(v)) == len(v)
        return type(v) is tuple and least <= len(v) <= most and all(map(check, v)) and once

    return checked


def dict_of(key: Check, value: Check) -> Check:
    return lambda v: isinstance(v, Mapping) and all(key(k) and value(e) for k, e in v.items())


def json_value(v: Any) -> bool:
    if isinstance(v, Mapping):
        return all(type(k) is str and json_value(e) for k, e in v.items())
    if isinstance(v, tuple):
        return all(map(json_value, v))
    if type(v) is str:
        return not re.search(r"[\x00\ud800-\udfff]", v)
    return v is None or type(v) in (bool, int) or type(v) is float and math.isfinite(v)


LINE = r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]*"
flag, maybe = one_of(True, False), optional(one_of(True, False))
place, filled = text(4096), text(4096, rf"\s*\S{LINE}")
folder = text(
    200, r"(?!\.{1,2}$)[^\s/\x00-\x1f\x7f-\x9f\ud800-\udfff]([^/\x00-\x1f\x7f-\x9f\ud800-\udfff]*\S)?"
)
count, size, axis, pixels = whole(1, 2**31 - 1), whole(1, 2**20), whole(1, 65536), whole(1, 8192)
any_count = whole(0, 2**31 - 1)
tasks = ("vqa", "refer", "identify", "caption", "cls", "qa")
linears = ("q", "k", "v", "o", "gate", "up", "down")
factor, epsilon = number(1e-6, 1e6), number(1e-20, 1)
source = {
    "name": text(200, r"[\w-]+(\.[\w-]+)*"),
    "id": lambda v: v == "" or folder(v),
    "path": place,
    "tasks": tuple_of(one_of(*tasks)),
    "weight": factor,
    "questions": size,
    "only": dict_of(filled, tuple_of(place, least=1)),
    "weights": dict_of(filled, dict_of(place, number(0, 1e6))),
    "augment": dataclasses.is_dataclass,
    "splits": dict_of(folder, filled),
    "info": dict_of(
        one_of("licence", "citation", "note", "cluster_word"), text(65536, r"[^\x00\ud800-\udfff]*")
    ),
    "options": dict_of(filled, json_value),
    "image": dataclasses.is_dataclass,
}
image = {
    "frame": optional(lambda v: any_count(v) or v in ("first", "middle", "last")),
    "window": optional(
        lambda v: (
            v
            in (
                "abdomen",
                "bone",
                "brain",
                "liver",
                "lung",
                "mediastinum",
                "spine",
                "stroke",
                "subdural",
            )
            or len(v) == 2
            and number(-1e6, 1e6, zero=True)(v[0])
            and number(1e-6, 1e6)(v[1])
        )
    ),
    "background": lambda v: v in ("white", "black") or tuple_of(whole(0, 255), 3, 3, distinct=False)(v),
}
augment = {
    "turns": flag,
    "rotate": number(0, 180),
    "scale": lambda v: tuple_of(number(0.1, 10), 2, 2, distinct=False)(v) and v[0] <= v[1],
    **dict.fromkeys(("shift", "contrast", "brightness"), number(0, 1)),
}
group_of_settings = dataclasses.is_dataclass
MEANINGFUL: dict[str, dict[str, Check]] = {
    "": {
        "name": lambda v: v == "" or len(v) <= 1000 and all(map(folder, v.split("/"))),
        "job": one_of("model", "router"),
        "seed": whole(0, 2**32 - 1),
        "fidelity": one_of("default", "paper"),
        **dict.fromkeys(
            ("model", "text", "data", "loss", "optimizer", "train", "mesh"), group_of_settings
        ),
        **dict.fromkeys(("evaluate", "router_fit"), group_of_settings),
        "init": tuple_of(tuple_of(place, 2, 2, distinct=False), least=1),
    },
    "model": {
        **dict.fromkeys(("vision", "connector", "decoder", "moe", "lora"), group_of_settings),
        "compute_dtype": one_of("float32", "bfloat16"),
        "frozen_dtype": one_of("float32", "bfloat16"),
        "frozen_kernels": one_of("plain", "int8", "nf4"),
        "attention": one_of("auto", "xla", "cudnn", "splash"),
        "remat": one_of("none", "dots", "full"),
    },
    "model.vision": {
        **dict.fromkeys(("image_size", "patch_size"), pixels),
        **dict.fromkeys(("width", "heads", "mlp_width"), size),
        **dict.fromkeys(("patch_bias", "pre_norm", "cls_token", "output_norm"), flag),
        **dict.fromkeys(("norm_eps", "output_norm_eps"), epsilon),
        "depth": whole(1, 1024),
        "activation": one_of("gelu", "gelu_tanh", "quick_gelu", "silu"),
        "qkv_bias": one_of("qv", "qkv", "none"),
        "feature_layer": whole(-1024, -1),
        "position_init": one_of("normal", "sincos"),
        "normalise": one_of("fixed", "picture"),
        "mean": tuple_of(number(0, 1), 3, 3, distinct=False),
        "std": tuple_of(number(1e-3, 100), 3, 3, distinct=False),
    },
    "model.connector": {
        "aggregation": one_of("projection", "block", "avgpool", "maxpool"),
        "rate": size,
        "kind": text(12, r"linear|moe_linear|moe_mlp|mlp[1-9]\d?x_gelu"),
        "experts": whole(1, 1024),
        **dict.fromkeys(("hidden", "router_hidden", "task_token_width"), optional(size)),
        "router": one_of("soft", "sparse", "hard", "constant"),
        "router_input": one_of("task_token", "token", "task"),
        "top_k": whole(1, 5),  # of the five experts of the default
        "task_tokens": one_of(0, 1),
        "activation": one_of("gelu", "gelu_tanh", "silu"),
        "form": one_of("fast", "literal"),
    },
    "model.decoder": {
        **dict.fromkeys(("vocab", "width", "heads", "kv_heads", "mlp_width"), size),
        "depth": whole(1, 1024),
        "head_dim": whole(2, 65536),
        "norm": one_of("rms", "rms_zero", "layer"),
        "norm_eps": epsilon,
        **dict.fromkeys(("post_norms", "parallel_block", "gated_mlp", "mlp_bias", "qk_norm"), flag),
        **dict.fromkeys(("scaled_embedding", "tied_head", "head_bias"), flag),
        "activation": one_of("silu", "gelu", "gelu_tanh"),
        "attention_bias": tuple_of(one_of(*linears[:4])),
        **dict.fromkeys(("query_scale", "attention_softcap", "logit_softcap"), optional(factor)),
        "rope_theta": number(1, 1e12),
        "local_rope_theta": optional(number(1, 1e12)),
        "rope_scaling": optional(group_of_settings),
        "rotary_fraction": number(2 / 32, 1),  # at least a pair of the 32 numbers of a head
        "windows": tuple_of(any_count, most=4, distinct=False),  # of the four layers of the default
    },
    "model.decoder.rope_scaling": {
        "kind": one_of("llama3", "linear"),
        "factor": number(1, 1e4),
        **dict.fromkeys(("low_freq_factor", "high_freq_factor"), factor),
        "original_positions": count,
    },
    "model.moe": {
        "experts": whole(0, 1024),
        "placement": one_of("sparse", "first_half", "second_half", "dense"),
        "layers": tuple_of(whole(0, 3)),
        "top_k": whole(1, 2),
        **dict.fromkeys(("meta", "residual", "random"), flag),
        **dict.fromkeys(("eval_noise", "route_padding"), maybe),
        **dict.fromkeys(("capacity_factor", "eval_capacity_factor"), optional(number(1e-3, 1000))),
        "min_capacity": whole(0, 2**20),
        "gate_noise": one_of("none", "jitter", "rsample"),
        "aux_coef": number(0, 1000),
        "path": one_of("dense", "grouped", "capacity"),
    },
    "model.lora": {
        "rank": whole(0, 65536),
        "alpha": factor,
        "dropout": number(0, 0.99),
        "targets": tuple_of(one_of(*linears), least=1),
    },
    "text": {
        **dict.fromkeys(("vocab", "max_answer", "max_prompt"), size),
        "tokenizer": place,
        "form": one_of("unimed", "stablelm", "phi", "plain", "simple"),
        **dict.fromkeys(("coordinate_tokens", "chat_template"), flag),
        "max_words": optional(size),
        "changed": one_of("refuse", "accept"),
        **dict.fromkeys(("double_bos", "training_blank"), maybe),
    },
    "data": {
        "sources": tuple_of(group_of_settings, distinct=False),
        **dict.fromkeys(("root", "cache"), place),
        "mixing": optional(one_of("per_example", "per_batch")),
        "packing": maybe,
        **dict.fromkeys(("rows", "window"), axis),
        **dict.fromkeys(("row_tokens", "row_answers"), size),
        "row_images": whole(0, 4096),
        "fit": one_of("stretch", "crop", "pad"),
        "threads": whole(0, 1024),
        "image_cache_mib": whole(0, 2**20),
        "changed": one_of("refuse", "accept"),
        "strict": flag,
        "reencode": group_of_settings,
    },
    "data.reencode": {
        "size": whole(0, 8192),
        "format": one_of("", "png", "jpeg", "webp"),
        "quality": whole(1, 100),
    },
    "data.sources[0]": source,
    "evaluate.sources[0]": source,
    "data.sources[0].augment": augment,
    "evaluate.sources[0].augment": augment,
    **dict.fromkeys(("data.sources[0].image", "evaluate.sources[0].image"), image),
    "loss": {
        "reduction": optional(one_of("token", "example")),
        "coordinate_sd": number(0.01, 100, zero=True),
        "coordinate_weight": factor,
    },
    "optimizer": {
        **dict.fromkeys(("lr", "min_lr", "warmup_lr", "weight_decay"), number(0, 10)),
        "warmup_steps": any_count,
        "betas": tuple_of(number(0, 0.999999), 2, 2, distinct=False),
        "eps": epsilon,
        "moments_dtype": one_of("float32", "bfloat16"),
        "clip": number(1e-6, 1e6, zero=True),
        "skip_unused": maybe,
    },
    "train": {
        **dict.fromkeys(("steps", "save_every", "log_every", "keep"), count),
        "accumulation": lambda v: type(v) is int and v in (1, 2, 4, 8, 16),  # divisors of the 16 rows
        "rules": tuple_of(group_of_settings, least=1),
        "moments": one_of("zeros", "init"),
        "gradients": one_of("sum", "pcgrad", "gradvac", "equal-norm"),
        "cache_features": flag,
        "best": one_of(""),  # nothing is measured by default
        "best_mode": one_of("max", "min"),
        "patience": any_count,
        "longer": one_of("refuse", "restart", "stretch"),
        "wandb": flag,
    },
    "train.rules[0]": {
        "match": filled,
        "train": one_of(True),  # what would train otherwise?
        "lr_scale": number(0, 1000),
        "weight_decay": optional(number(0, 10)),
    },
    "mesh": {"auto": flag, **dict.fromkeys(("data", "fsdp", "tensor", "expert"), size)},
    "evaluate": {
        "sources": tuple_of(group_of_settings, distinct=False),
        "entries": tuple_of(group_of_settings),
        "splits": tuple_of(folder),
        **dict.fromkeys(("batch", "max_new_tokens"), axis),
        "limit": any_count,
        "temperature": number(0.01, 100, zero=True),
        "top_p": number(1e-37, 1),
        "bootstrap": whole(2, 10**5),
        "scoring": optional(one_of("corrected", "published")),
        "likelihood": flag,
    },
    "evaluate.entries[0]": {
        **dict.fromkeys(("source", "split"), folder),
        "task": one_of(*tasks),
        "metrics": tuple_of(filled),
        "limit": optional(any_count),
        "every": any_count,
        **dict.fromkeys(("max_new_tokens", "batch"), optional(axis)),
    },
    "router_fit": {
        "key": filled,
        "classes": lambda v: len(v) != 1 and tuple_of(filled)(v),
        "labels": lambda v: tuple_of(count)(v) and list(v) == sorted(v),
        "epochs": whole(1, 10**6),
        "batch": axis,
        "lr": number(1e-37, 10),
    },
}


# ---- the enumeration ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tried() -> list[Tried]:
    return list(trials())


def split_name(field: Field) -> tuple[str, str]:
    group, _, name = field.name.rpartition(".")
    return group, name


def value_of(one: Tried) -> Any:
    value: Any = one.config
    for part in one.field.path:
        value = value[part] if isinstance(part, int) else getattr(value, part)
    return value


def test_every_field_is_written_out_here():
    listed = {(group, name) for group, names in MEANINGFUL.items() for name in names}
    assert listed == {split_name(field) for field in fields()}


def test_every_number_and_text_has_bounds():
    """A plain int, float or str in config.py would allow what nothing means."""

    def plain(hint, bounded=False) -> bool:
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
            return plain(parts[0], True)
        if origin in (typing.Union, types.UnionType):
            return any(plain(part, bounded) for part in parts)
        if origin is tuple or origin is not None and origin is not typing.Literal:
            return any(plain(part) for part in parts)
        return hint in (int, float, str) and not bounded

    assert not [field.name for field in fields() if plain(field.hint)]


def test_values_are_refused_by_name_or_mean_something(tried):
    wrong = []
    for one in tried:
        group, name = split_name(one.field)
        if one.config is None:
            owner = "config." + group.removesuffix("[0]")
            by_group = owner in one.sentence and re.search(rf"\b{name}\b", one.sentence)
            named = f"config.{one.field.name}" in one.sentence or by_group
            if (
                not named
                or "\n" in one.sentence
                or len(one.sentence) > 500
                or one.sentence[-1] not in ".?"
            ):
                wrong.append((one.field.name, one.value, one.sentence))
        elif not MEANINGFUL[group][name](value_of(one)):
            wrong.append((one.field.name, one.value, "accepted"))
    assert not wrong, f"{len(wrong)} of {len(tried)}, such as {wrong[:3]}"


def test_accepted_values_are_kept_as_they_are(tried):
    """None is turned into a value by `fidelity` alone, a whole number into a float, lists into
    tuples.
    """
    knobs = ("max_words", "double_bos", "training_blank", "mixing", "packing", "reduction")
    for one in tried:
        kept = value_of(one) if one.config else None
        scalar = isinstance(one.value, bool | int | float | str)
        if one.config is None or not scalar or split_name(one.field)[1] in knobs:
            continue
        same_kind = isinstance(kept, bool) == isinstance(one.value, bool)
        assert kept == one.value and same_kind, (one.field.name, one.value, kept)


def test_enough_was_tried(tried):
    """Thousands of pairs.

    Every field has values that are refused and, so that this is no accident, others.
    """
    accepted, refused = (
        {one.field.name for one in tried if bool(one.config) is kept} for kept in (True, False)
    )
    assert len(tried) > 10_000 and accepted == refused == {field.name for field in fields()}


def test_two_seeds_are_two_runs():
    seeds = [0, 1, 2**31, 2**32 - 1]
    assert [from_config_dict({"seed": seed}).seed for seed in seeds] == seeds
    for seed in (2**32, 2**63, -1, True, 1.0):
        with pytest.raises(UserError, match=r"^config\.seed"):
            from_config_dict({"seed": seed})


def test_a_value_that_cannot_be_shown_is_refused_in_a_sentence_too():
    circle: list = []
    circle.append(circle)
    for value in (circle, 10**5000, Unshown()):
        field = Field(("data", "sources", 0, "options"), Any)
        with pytest.raises(UserError) as error:
            from_config_dict(settings_with(field, {"x": value}))
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)


class Unshown:
    def __repr__(self):
        raise ValueError
