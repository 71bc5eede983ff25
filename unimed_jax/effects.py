"""Finds settings that change nothing, because another setting leaves them unread.

Only settings that differ from their default count. Some are refused when the settings are read. Others
are only named when training starts: they are what remains in a config file when an ablation overrides
the setting that they belong to.
"""

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from unimed_jax.bounds import shown
from unimed_jax.config import AugmentConfig, Config
from unimed_jax.errors import UserError


class Need(NamedTuple):
    """Says what settings need so that they are read."""

    group: str  # dotted path of their group
    fields: str  # their names, with blanks between
    met: Callable[[Config], Any]
    without: str  # why they are not read otherwise


def _routes(config: Config) -> bool:
    connector = config.model.connector
    return connector.is_moe and connector.router in ("soft", "sparse")


def _limited(config: Config) -> bool:
    moe = config.model.moe
    return moe.top_k == 2 or (moe.capacity_factor, moe.eval_capacity_factor) != (None, None)


REFUSED = (
    Need(
        "text",
        "chat_template double_bos training_blank",
        lambda c: c.text.form == "unimed",
        "only the form 'unimed' reads it",
    ),
    Need(
        "data.reencode",
        "quality",
        lambda c: c.data.reencode.asked and c.data.reencode.format != "png",
        "no image is encoded again as JPEG or WebP (config.data.reencode)",
    ),
    Need("train", "best_mode", lambda c: c.train.best, "config.train.best is empty"),
    Need("mesh", "data fsdp tensor expert", lambda c: not c.mesh.auto, "config.mesh.auto is True"),
    Need(
        "evaluate",
        "top_p",
        lambda c: c.evaluate.temperature,
        "nothing is sampled (config.evaluate.temperature=0)",
    ),
    Need(
        "model.connector",
        "top_k",
        lambda c: not c.model.connector.is_moe or c.model.connector.router == "sparse",
        "only the router 'sparse' reads it",
    ),
    Need(
        "model.vision",
        "output_norm_eps",
        lambda c: c.model.vision.output_norm,
        "config.model.vision.output_norm is False",
    ),
    Need(
        "model.decoder",
        "local_rope_theta",
        lambda c: any(c.model.decoder.windows),
        "config.model.decoder.windows gives no layer a window",
    ),
    Need(
        "model.decoder.rope_scaling",
        "low_freq_factor high_freq_factor original_positions",
        lambda c: c.model.decoder.rope_scaling is None or c.model.decoder.rope_scaling.kind == "llama3",
        "only the kind 'llama3' reads it",
    ),
    Need(
        "model.moe",
        "placement layers top_k meta residual capacity_factor eval_capacity_factor min_capacity "
        "random gate_noise aux_coef path",
        lambda c: c.model.moe.experts,
        "config.model.moe.experts is 0",
    ),
    Need(
        "model.moe", "placement", lambda c: not c.model.moe.layers, "config.model.moe.layers replaces it"
    ),
    Need(
        "model.lora", "alpha dropout targets", lambda c: c.model.lora.rank, "config.model.lora.rank is 0"
    ),
)
SAID = (
    Need(
        "model.vision",
        "mean std",
        lambda c: c.model.vision.normalise == "fixed" or c.data.fit == "pad",
        "config.model.vision.normalise is 'picture'",
    ),
    Need(
        "model.connector",
        "experts router router_input router_hidden top_k task_token_width form",
        lambda c: c.model.connector.is_moe,
        "config.model.connector.kind has no experts",
    ),
    Need(
        "model.connector",
        "hidden",
        lambda c: c.model.connector.has_hidden,
        "config.model.connector.kind has no hidden units",
    ),
    Need(
        "model.connector",
        "activation",
        lambda c: c.model.connector.has_hidden or _routes(c),
        "neither the connector's projection nor its router has hidden units",
    ),
    Need(
        "model.connector",
        "router_input router_hidden task_token_width",
        lambda c: not c.model.connector.is_moe or _routes(c),
        "config.model.connector.router computes nothing",
    ),
    Need(
        "model.moe",
        "random",
        lambda c: not c.model.moe.experts or _limited(c),
        "no expert is full or sampled",
    ),
    Need(
        "model",
        "frozen_kernels",
        lambda c: c.job == "router" or not all(rule.train for rule in c.train.rules),
        "config.train.rules freezes no parameter",
    ),
    Need("train", "cache_features", lambda c: c.job == "model", "config.job is 'router'"),
    Need(
        "train", "cache_features", lambda c: c.data.row_images, "config.data.row_images is 0: text alone"
    ),
    Need("text", "vocab", lambda c: not c.text.tokenizer, "config.text.tokenizer names a tokenizer"),
    Need("data", "window", lambda c: c.data.packing, "config.data.packing is False"),
    Need(
        "router_fit",
        "key classes labels epochs batch lr",
        lambda c: c.job == "router",
        "config.job is 'model'",
    ),
    Need(
        "evaluate",
        "splits",
        lambda c: not c.evaluate.entries,
        "config.evaluate.entries name their own splits",
    ),
    Need(
        "optimizer",
        "warmup_lr",
        lambda c: c.optimizer.warmup_steps,
        "config.optimizer.warmup_steps is 0",
    ),
)
_DEFAULT = Config()


def without_effect(
    config: Config, knobs: Mapping[str, Any], needs: Collection[Need] = REFUSED + SAID
) -> Iterator[tuple[str, str]]:
    """Yields (dotted name, sentence) of each setting that changes nothing.

    `knobs`: what `fidelity` fills in, by dotted name; nobody has set that by hand.
    """
    for need in needs:
        group = operator.attrgetter(need.group)
        if group(config) is None or need.met(config):
            continue
        for field in need.fields.split():
            value, name = getattr(group(config), field), f"{need.group}.{field}"
            default = getattr(group(_DEFAULT) or type(group(config))(), field)
            if value not in (default, knobs.get(name)):
                yield (
                    name,
                    (
                        f"config.{name}={shown(value)} has no effect, because {need.without}; "
                        f"change that, or leave it at {shown(default)}."
                    ),
                )
    if needs is not REFUSED:
        unread = [("evaluate", "nothing is varied in evaluation")]
        if config.job == "router":
            unread.append(("data", "the router is fitted on pictures as they are"))
        for part, reason in unread:
            for i, source in enumerate(getattr(config, part).sources):
                if source.augment != AugmentConfig():
                    sentence = f"config.{part}.sources[{i}].augment has no effect, because {reason}; "
                    yield f"{part}.sources", sentence + "leave it out."
    if config.evaluate.entries:
        for i, entry in enumerate(config.evaluate.entries):
            if entry.every > config.train.steps and needs is not REFUSED:
                yield (
                    "evaluate.entries",
                    (
                        f"config.evaluate.entries[{i}].every={entry.every} has no effect, because "
                        f"training takes config.train.steps={config.train.steps}; lower it."
                    ),
                )


def refuse_without_effect(
    config: Config,
    knobs: Mapping[str, Any],
    only: Collection[str] | None = None,
    needs: Collection[Need] = REFUSED,
) -> None:
    """Raises UserError for the first setting (of those named in `only`) that changes nothing."""
    for name, sentence in without_effect(config, knobs, needs):
        if only is None or name in only:
            raise UserError(sentence)
