"""Gives every score the id of its protocol: two scores can be compared if and only if theirs are equal.

What is in the id is what a score depends on besides the model and how it decodes (tokenizer, length of
answers, temperature): set, revision (checksum, which covers how images are read), filter, split with its
rule, number of chosen examples, rule for closed questions, normaliser, prompt, what references are cut
to, image fit, labels, metric. An ingredient at its default adds nothing to the id.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

from unimed_jax.config import Config, SourceConfig
from unimed_jax.data.forms import form_of
from unimed_jax.evaluate.classes import BINS
from unimed_jax.evaluate.labels import OPTIONS, Labels
from unimed_jax.evaluate.tasks import Unit
from unimed_jax.provenance import protocol_id


def protocols(
    unit: Unit, config: Config, labels: Iterable[Labels] = (), external: bool = False
) -> dict[str, str]:
    """Returns the ids of a unit's scores: by metric, and "published" and "likelihood".

    The last two are for all scores of that kind, whose names complete them: "<id>/bleu1". labels: of
    the unit's questions whose likelihoods were measured; external: another tool answered, with a
    prompt and images that are its own affair.
    """
    text, data = config.text, config.data

    def named(metric: str, normaliser: str = "", labels: str = "") -> str:
        return protocol_id(
            set_id=unit.source.id,
            checksum=unit.source.data.checksum,
            only=filter_of(unit.source.settings, unit.task),
            split=unit.split,
            rule=unit.source.rules.get(unit.split, ""),
            limit=unit.limit,
            closed=unit.task == "vqa",
            normaliser=normaliser,
            form="external" if external else prompt_of(config),
            max_words=text.max_words,
            fit=data.fit if not external and any(example.images for example in unit.examples) else "",
            labels=labels,
            metric=metric,
        )

    found = {metric.name: named(metric.name, metric.normaliser) for metric in unit.metrics}
    found["published"] = named(f"published={form_of(text).published}")
    if given := sorted(set(labels)):
        found["likelihood"] = named(f"likelihood-bins={BINS}", "", labels_part(given))
    return found


def prompt_of(config: Config) -> str:
    """Names the prompt of evaluation: the form, and what of it is not as usual."""
    text = config.text
    parts: list[str] = [text.form]
    if text.form == "unimed":
        parts += ["" if text.chat_template else "bare", "bos2" if text.double_bos else ""]
    return "-".join(part for part in parts if part)


def filter_of(sources: Sequence[SourceConfig], task: str) -> str:
    """Names by 8 hex digits what the sources of a set let through of a task; "" if that is all of it."""
    filters = [
        {key: list(values) for key, values in source.only.items()}
        for source in sources
        if not source.tasks or task in source.tasks
    ]
    return "" if not filters or {} in filters else _digest(sorted(filters, key=json.dumps))


def labels_part(labels: Sequence[Labels]) -> str:
    """Names the rules by which labels were found and, by 8 hex digits, the labels."""
    rules = "+".join(sorted({one.rule.replace("/", "-") for one in labels}))
    shared = sorted({one.labels for one in labels if one.rule != OPTIONS})  # options belong to the set
    return f"{rules}:{_digest(shared)}" if shared else rules


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
