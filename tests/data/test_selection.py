"""What the settings take of a prepared set: tasks, filters, weights and made splits."""

import pytest
from support.opened import NAME, opened

from unimed_jax.config import SourceConfig
from unimed_jax.data import selection
from unimed_jax.data.columns import columns_of
from unimed_jax.data.selection import draw_weights
from unimed_jax.errors import UserError


def test_filters_and_tasks_choose_examples(tmp_path):
    (data,) = opened(tmp_path, tasks=("vqa", "cls"), only={"prompt": ("red", "blue")})
    found = list(data.examples("train"))
    assert (
        found
        and {e.task for e in found} == {"vqa", "cls"}
        and {e.meta["prompt"] for e in found} == {"red", "blue"}
    )
    one, two = opened(tmp_path, SourceConfig(NAME, tasks=("vqa",)), SourceConfig(NAME, tasks=("qa",)))
    # one set, seen by two sources
    assert one is two and {e.task for e in one.examples("val")} == {"vqa", "qa"}


def test_weights_multiply(tmp_path):
    source = SourceConfig(NAME, weights={"prompt": {"red": 3.0, "blue": 0.0}, "template": {"cls": 2.0}})
    (data,) = opened(tmp_path, source)
    weights = draw_weights(columns_of(data, "train"), source)
    for example, weight in zip(data.examples("train"), weights, strict=True):
        expected = {"red": 3.0, "blue": 0.0}.get(example.meta["prompt"], 1.0) * (
            2 if example.task == "cls" else 1
        )
        assert weight == expected


def test_made_splits_keep_clusters_together_and_take_from_their_origin(tmp_path):
    (data,) = opened(tmp_path, splits={"val": "train[60%:] by cluster"}, options={"images": 60})
    train, val = ({e.cluster for e in data.examples(split)} for split in ("train", "val"))
    assert train and val and not train & val and len(train | val) == 6
    both = {"train": "train[:60%] by cluster", "held": "train[60%:] by cluster"}
    (again,) = opened(tmp_path, splits=both, options={"images": 60})
    assert {e.cluster for e in again.examples("held")} == val and again.splits == (
        "train",
        "val",
        "test",
        "held",
    )
    (by_id,) = opened(tmp_path, splits={"half": "train[:50%]"}, options={"images": 60})
    assert 130 < len(by_id.examples("half")) < 230
    assert len(by_id.examples("half")) + len(by_id.examples("train")) == 360


def test_a_made_split_that_replaces_one_of_the_set_is_said_once(tmp_path, capsys):
    """Its scores are not those of the official split."""
    selection._say_replaced.cache_clear()
    for _ in range(2):
        (data,) = opened(tmp_path, splits={"test": "train[60%:]"})
        assert all(example.id.startswith("train") for example in data.examples("test"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "in place of" in line]
    assert "squares: split 'test' is made by the rule 'train[60%:]'" in line and "144 examples" in line
    # where it is said what becomes of its own, and where it has none
    (cut,) = opened(tmp_path, splits={"val": "val[:50%]"})
    assert 0 < len(cut.examples("val")) < 144 == len(cut.examples("test"))
    (two,) = opened(tmp_path, splits={"test": "train[60%:] by cluster", "official": "test[:]"})
    ids = {split: {e.id for e in two.examples(split)} for split in two.splits}
    assert len(ids["official"]) == 144 and all(name.startswith("test") for name in ids["official"])
    assert ids["test"] and all(name.startswith("train") for name in ids["test"])
    source = SourceConfig("support.squares_without_val", splits={"val": "train[60%:]"})
    (made,) = opened(tmp_path, source)
    assert len(made.examples("val")) + len(made.examples("train")) == 48
    assert "in place of" not in capsys.readouterr().out


MISTAKES = {
    "a rule": ({"splits": {"val": "train 90%"}}, "rule 'train 90%' is not understood; write it as"),
    "an origin": (
        {"splits": {"val": "trian[:9%]"}},
        "made of 'trian', which it has not; did you mean 'train'",
    ),
    "a word": (
        {"splits": {"val": "train[:9%] by patient"}},
        "'patient' is neither 'cluster' nor a meta key",
    ),
    "an empty split": ({"splits": {"val": "train[50%:50%] by cluster"}}, "leaves it empty; widen it"),
    "a key": (
        {"only": {"promt": ("red",)}},
        "only names 'promt', which no example has; did you mean 'prompt'",
    ),
    "a value": ({"only": {"prompt": ("read",)}}, "no example has prompt='read'; did you mean 'red'"),
    "a weight": (
        {"weights": {"prompt": {"rad": 1.0}}},
        "weights matches nothing, because no example has prompt='rad'",
    ),
    "nothing left": ({"tasks": ("cls",), "only": {"template": ("vqa",)}}, "together match no example"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_source_is_one_sentence(tmp_path, mistake):
    fields, sentence = MISTAKES[mistake]
    with pytest.raises(UserError, match=f"config.data.sources: data set 'squares'.*{sentence}"):
        opened(tmp_path, **fields)
