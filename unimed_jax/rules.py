"""Decides which leaves train, and how: `train.rules` applied to parameter paths."""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from unimed_jax.config import OptimizerConfig, TrainConfig
from unimed_jax.errors import UserError, nearest


class LeafRule(NamedTuple):
    """Says how one leaf is treated."""

    train: bool
    lr_scale: float  # factor of the learning rate
    weight_decay: float


def leaf_rules(
    paths: Iterable[str],
    train: TrainConfig,
    optimizer: OptimizerConfig,
) -> dict[str, LeafRule]:
    """Finds the rule of every leaf, by path: the first of `train.rules` whose pattern matches.

    A rule without a weight decay follows the published grouping: biases and norm scales are not
    decayed, everything else is (task tokens and LoRA, too). Raises UserError if a leaf matches no
    pattern, or a pattern no leaf, or if the encoder trains and its features are to be cached.
    """
    rules: dict[str, LeafRule] = {}
    used = set()
    for path in paths:
        for rule in train.rules:
            if fnmatch.fnmatchcase(path, rule.match):
                decay = rule.weight_decay
                if decay is None:
                    decay = 0.0 if path.endswith(("bias", "scale")) else optimizer.weight_decay
                rules[path] = LeafRule(rule.train, rule.lr_scale, decay)
                used.add(rule.match)
                break
        else:
            raise UserError(
                f"config.train.rules: no pattern matches the parameter {path!r}; add one, last "
                "match='*'.",
            )
    for pattern in (rule.match for rule in train.rules):
        if pattern in used or pattern == "*":
            continue
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise UserError(
                f"config.train.rules: {pattern!r} matches no parameter{nearest(pattern, paths)}",
            )
    if train.cache_features:
        for path, found in rules.items():
            if path.startswith("vision/") and found.train:
                raise UserError(
                    f"config.train.cache_features=True needs a frozen encoder, and {path} trains; put "
                    "dict(match='vision/*', train=False) first in config.train.rules, or leave "
                    "cache_features out."
                )
    return rules


def refuse_idle_rules(paths: Sequence[str], train: TrainConfig) -> None:
    """Raises UserError if every leaf is frozen, or if a rule applies to no leaf.

    A rule for `*` may apply to none.
    """
    applied = set()
    for path in paths:
        applied.add(
            next(
                (i for i, rule in enumerate(train.rules) if fnmatch.fnmatchcase(path, rule.match)), None
            )
        )
    if not any(i is not None and train.rules[i].train for i in applied):
        raise UserError(
            "config.train.rules freezes every parameter of this model; let some of them train."
        )
    for i, rule in enumerate(train.rules):
        if i not in applied and rule.match != "*":
            raise UserError(
                f"config.train.rules[{i}]: {rule.match!r} never applies, because earlier rules "
                "match the same parameters; put it first, or leave it out."
            )
