"""The card of an exported model says what it was trained for."""

import dataclasses

from support.toy import toy_config

from unimed_jax.config import SourceConfig
from unimed_jax.data.info import Info
from unimed_jax.interop.model_card import model_card


def test_tasks_that_no_source_trains_are_named_apart():
    config = toy_config()

    def card(*sources, **passports):
        data = dataclasses.replace(config.data, sources=sources)
        return model_card(dataclasses.replace(config, data=data), 10, None, passports=passports)

    one = card(SourceConfig("vqa_rad", tasks=("vqa",)))
    assert "answers 1 kind of questions" in one and "\n| `vqa` |" in one and "\n| `refer` |" not in one
    assert (
        "Not trained, so that answers mean nothing: `refer`, `identify`, `caption`, `cls`, `qa`" in one
    )
    two = card(SourceConfig("slake"), slake=Info("slake", ("vqa", "refer", "identify"), licence=""))
    assert "answers 3 kinds of questions" in two and "nothing: `caption`, `cls`, `qa`." in two
    unknown = card(SourceConfig("somewhere.reader"))
    assert "answers 6 kinds of questions" in unknown and "Not trained" not in unknown
