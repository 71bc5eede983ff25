"""The settings name what is scored; examples are chosen and their images permuted."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from support.toy import Toy, sets_of, toy_config

from unimed_jax.config import TASKS, default_config
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError
from unimed_jax.evaluate import tasks
from unimed_jax.settings import from_config_dict


@pytest.fixture
def config():
    return toy_config()


# ------------------------------------------------------------------------------ permutation and
# selection


@pytest.mark.parametrize("seed", range(5))
def test_permuted_images_leave_image_and_slab(seed):
    rng = np.random.default_rng(seed)
    slabs = np.repeat(np.arange(9), rng.integers(1, 12, 9))
    examples = [
        Example(str(i), "cls", "", "", (f"{slab}-{rng.integers(3)}",), cluster=f"s{slab}")
        for i, slab in enumerate(slabs)
    ]
    images = tasks.permute_images(examples, seed)
    assert Counter(images) == Counter(e.images for e in examples)
    assert all(
        keys[0].split("-")[0] != e.images[0].split("-")[0]
        for keys, e in zip(images, examples, strict=True)
    )
    assert images == tasks.permute_images(examples, seed) != tasks.permute_images(examples, seed + 1)


def test_permutation_where_one_slab_holds_most():
    examples = [
        Example(str(i), "cls", "", "", (f"image{i % 5}",), cluster="s" if i < 8 else "t")
        for i in range(10)
    ]
    images = tasks.permute_images(examples, 0)
    assert all(keys != e.images for keys, e in zip(images, examples, strict=True))
    assert tasks.permute_images(examples[:1], 0) is None
    assert tasks.permute_images([dataclasses.replace(e, images=("one",)) for e in examples], 0) is None
    assert tasks.permute_images([dataclasses.replace(e, images=()) for e in examples], 0) is None


def test_examples_with_several_images_get_as_many_of_another():
    counts = [1 + i % 3 for i in range(12)]
    examples = [
        Example(str(i), "vqa", "", "", tuple(f"{i}.{k}" for k in range(n))) for i, n in enumerate(counts)
    ]
    images = tasks.permute_images(examples, 3)
    assert [len(keys) for keys in images] == counts
    assert all(keys != e.images for keys, e in zip(images, examples, strict=True))


def test_a_lone_study_borrows_images_of_other_patients():
    def study(patient, *keys):
        return Example(f"{patient}{keys}", "vqa", "", "", keys, None, patient)

    pairs = [study(f"p{i}", f"{i}a", f"{i}b") for i in range(6)]
    alone = study("p0", "0a", "0c", "0d")
    found = tasks.permute_images([*pairs, alone], 0)
    assert found is not None and found[:-1] == tasks.permute_images(pairs, 0)
    assert len(set(found[-1])) == 3 and not any(key.startswith("0") for key in found[-1])
    assert tasks.permute_images([*pairs, study("p9", *map(str, range(13)))], 0) is None
    assert tasks.permute_images([alone], 0) is None


def test_limit_spreads_over_clusters_whatever_the_seed():
    examples = [
        Example(str(i), "cls", "", "", ("x",), cluster=f"s{min(i // 40, 4)}") for i in range(200)
    ]
    chosen = tasks.select(examples, 50)
    assert Counter(e.cluster for e in chosen) == {f"s{k}": 10 for k in range(5)}
    assert chosen == tasks.select(examples, 50) and tasks.select(examples, 0) == examples
    assert [int(e.id) for e in chosen] == sorted(int(e.id) for e in chosen)
    one_item_clusters = [dataclasses.replace(e, cluster="") for e in examples]
    assert len(tasks.select(one_item_clusters, 50)) == 50


# ------------------------------------------------------------------------------ units


def units(config, *toys, **fields):
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **fields))
    found, notes = tasks.units_of(config, sets_of(*toys))
    return [unit.name for unit in found], notes, found


def entries(*rows):
    settings = default_config()
    settings.evaluate.entries = tuple(
        dict(zip(("source", "task", "split"), row, strict=False)) | row[3] for row in rows
    )
    return from_config_dict(settings).evaluate.entries


def test_by_default_every_task_of_every_source_is_scored_on_every_split(config):
    one, two = Toy(id="one"), Toy(id="two", left_out=("cls",))
    two.rows["val"] = []
    names, notes, _ = units(config, one, two, splits=("val", "test"))
    assert names == [f"one/val/{t}" for t in TASKS] + [f"one/test/{t}" for t in TASKS] + [
        f"two/test/{t}" for t in TASKS if t != "cls"
    ]
    assert notes == ["two: it has no example in split 'val'", "two/test: no example of task 'cls'"]
    assert units(config, one, splits=())[0] == []


def test_a_task_that_its_sources_leave_out_is_not_scored(config):
    sets = sets_of(Toy())
    sets["toy"] = dataclasses.replace(sets["toy"], tasks=("vqa", "qa"))
    assert [unit.task for unit in tasks.units_of(config, sets)[0]] == ["vqa", "qa"]


def test_entries_name_metrics_limits_and_lengths(config):
    chosen = entries(
        (
            "toy",
            "vqa",
            "val",
            dict(metrics=("token_f1", "exact_match"), limit=5, batch=3, max_new_tokens=7),
        )
    )
    names, notes, (unit,) = units(config, Toy(), entries=chosen)
    assert names == ["toy/val/vqa"] and not notes
    assert [metric.name for metric in unit.metrics] == ["token_f1", "exact_match"]
    assert (len(unit.examples), unit.batch, unit.max_new_tokens) == (5, 3, 7)
    _, _, (unit,) = units(config, Toy(), entries=entries(("toy", "vqa", "val", {})), limit=4)
    assert (len(unit.examples), unit.batch, unit.max_new_tokens) == (4, 16, 100)


MISTAKES = {
    "unknown set": (("to", "vqa", "test", {}), "'to' is not the id of a data set; did you mean 'toy'"),
    "unknown split": (
        ("toy", "vqa", "tset", {}),
        "'toy' has no example in split 'tset'; did you mean 'test'",
    ),
    "empty split": (("toy", "vqa", "val", {}), "'toy' has no example in split 'val'"),
    "lacking task": (
        ("toy", "cls", "test", {}),
        "'toy' has no example of task 'cls' in split 'test'; it has vqa, ",
    ),
    "unknown metric": (
        ("toy", "vqa", "test", dict(metrics=("exact",))),
        "'exact' is not a metric; did you mean",
    ),
    "metric of boxes": (
        ("toy", "vqa", "test", dict(metrics=("exact_match", "miou"))),
        "metric 'miou' reads answers of refer alone, not of 'vqa'; name another one",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_named_entry_that_cannot_be_scored_is_refused(config, name):
    toy = Toy(left_out=("cls",))
    toy.rows["val"] = []
    row, words = MISTAKES[name]
    with pytest.raises(UserError, match=f"config.evaluate.entries: .*{words}"):
        units(config, toy, entries=entries(row))


def test_a_split_of_no_set_is_refused(config):
    with pytest.raises(
        UserError, match="data set 'toy' has no example in split 'tset'; did you mean 'test'"
    ):
        units(config, Toy(), splits=("tset",))
    with pytest.raises(UserError, match="'toy' has no example in split 'test'"):
        units(config, Toy(per_task=0))
    with pytest.raises(UserError, match="did you mean 'test'"):
        units(config, Toy(), splits=("tset", "test"))


def test_where_nothing_is_left_to_score_it_is_said(config):
    sets = sets_of(Toy(left_out=("cls",)))
    sets["toy"] = dataclasses.replace(sets["toy"], tasks=("cls",))
    with pytest.raises(
        UserError, match=r"nothing is left to score on test \(toy/test: no example of task"
    ):
        tasks.units_of(config, sets)
