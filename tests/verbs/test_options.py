"""Settings on the command line: what is laid over a config, and what is refused in one sentence."""

import pytest
from support.fake_brain import tiny_config

from unimed_jax.errors import UserError
from unimed_jax.verbs.options import with_overrides

# A word that is laid over the settings, and the value that it gives.
TAKEN = {
    "--config.seed=5": ("seed", 5),
    "--config.name=a b": ("name", "a b"),
    "--config.name=5": ("name", "5"),
    "--config.data.packing=false": ("data.packing", False),
    "--config.optimizer.betas=(0.8, 0.9)": ("optimizer.betas", (0.8, 0.9)),
    "--config.optimizer.betas=[0.8, 0.9]": ("optimizer.betas", (0.8, 0.9)),
    "--config.evaluate.splits=('test',)": ("evaluate.splits", ("test",)),
    "--config.evaluate.splits=()": ("evaluate.splits", ()),
}
GROUP, LIST = "is a group of settings", "config.data.sources"
REFUSED = {
    "--config.model={}": f"--config.model {GROUP}; give one of its keys (--config.model.KEY=value; ",
    "--config.model=5": "--config.model is a group of settings",
    "--config.model.vision={'depth': 3}": "--config.model.vision is a group of settings",
    "--config.train=None": "--config.train is a group of settings",
    "--config.data.sources=brain": f"--{LIST} takes a list, not 'brain'; write it in the config file",
    "--config.data.sources=": "--config.data.sources takes a list, not ''",
    "--config.data.sources={'name': 'brain'}": "--config.data.sources takes a list",
    "--config.data.sources={[]: 1}": "--config.data.sources takes a list",
    "--config.data.sources=('brain',)": f"{LIST}[0] must be a group of settings, not 'brain'.",
    "--config.data.sources.0.name=brain": f"{LIST}.0.name: its group is a list; change it in the config",
    "--config.data.sources[0].name=brain": "--config.data.sources[0].name is not a setting",
    "--config.evaluate.splits=test": "--config.evaluate.splits takes a list, not 'test'",
    "--config.init=seed": "--config.init takes a list",
    "--config.seed.x=1": "--config.seed.x is not a setting.",
    "--config.=1": "--config. is not a setting",
    "--config.model.=1": "--config.model. is not a setting",
    "--config..seed=1": "--config..seed is not a setting",
    "--config.seed": "'--config.seed' is unknown",
    "--config.to_dict=1": "--config.to_dict is not a setting",
    "--config.seed=" + "9" * 5000: "config.seed",
    "--config.seed=" + "(" * 5000: "config.seed",
    "--config.seed=" + "[" * 90 + "]" * 90: "config.seed must be int",
    "--config.seed=1+1": "config.seed must be int, not '1+1'.",
    "--config.seed=__import__('os').getcwd()": "config.seed must be int",
    "--config.seed={'a.b': 1}": "--config.seed=",
    "--config.seed={1: 1}": "config.seed",
    "seed=5": "'seed=5' is unknown; settings are given as --config.key=value.",
}


@pytest.mark.parametrize("word", TAKEN)
def test_a_setting_is_laid_over_the_file(word):
    path, value = TAKEN[word]
    found = with_overrides(tiny_config(), [word])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("word", REFUSED, ids=lambda word: word[:40])
def test_a_word_that_sets_nothing_is_one_sentence(word):
    with pytest.raises(UserError) as error:
        with_overrides(tiny_config(), [word])
    sentence = str(error.value)
    assert REFUSED[word] in sentence and "\n" not in sentence, sentence
