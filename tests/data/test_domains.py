"""The domains set: no source picture in two splits, balanced domains and closed questions, nothing
unanswerable.
"""

import collections

import numpy as np
import pytest

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data import datasets
from unimed_jax.data.datasets import domains
from unimed_jax.data.datasets.domains import images as domains_images
from unimed_jax.errors import UserError

SPLITS = ("train", "val", "test")


def opened(name, cache, **options):
    (found,) = datasets.open_sources(DataConfig((SourceConfig(name, options=options),), cache=cache))
    return found


@pytest.fixture(scope="module")
def slices(cache):
    return opened("brain", cache, jitters=1)


@pytest.fixture(scope="module")
def data(cache):
    return opened("domains", cache, jitters=1)


def every(data, split, task=None):
    return [e for e in data.examples(split) if task in (None, e.task)]


def test_a_source_belongs_to_one_split(data):
    homes = collections.defaultdict(set)
    for split in SPLITS:
        for e in data.examples(split):
            homes[e.cluster].add(split)
            if "kind" in e.meta:
                assert e.images[0].rsplit("_", 1)[0] == e.cluster
    assert all(len(splits) == 1 for splits in homes.values())
    pictures = [s.name for s in domains_images.SOURCES]
    assert len(set(pictures)) == len(pictures) == 27 and set(pictures) <= set(homes)


def test_no_two_sources_are_the_same_picture():
    """Nor one a copy of another in colours, size or encoding: correlation of 16 x 16 grey pictures."""
    from unimed_jax.data.fitting import resize

    small = [resize(domains_images.pixels(s.file), 16).mean(-1).ravel() for s in domains_images.SOURCES]
    likeness = np.corrcoef(small) - np.eye(len(small))
    assert likeness.max() < 0.9
    # left out for this
    copy = resize(domains_images.pixels("examples_rgb_color.dcm"), 16).mean(-1).ravel()
    at = [s.file for s in domains_images.SOURCES].index("examples_jpeg2k.dcm")
    assert np.corrcoef(copy, small[at])[0, 1] > 0.98


def test_domains_have_as_many_images(data):
    for split in ("val", "test"):  # train has fewer slices with one jitter
        images = {e.images: e.meta["modality"] for e in data.examples(split)}
        assert collections.Counter(images.values()) == dict.fromkeys(
            domains.MODALITIES, domains.IMAGES[split]
        )
    for split in SPLITS:
        for e in data.examples(split):
            assert (
                data.image(e.images[0]).shape == (64, 64, 3)
                and data.image(e.images[0]).dtype == np.uint8
            )


def test_closed_questions_about_kinds_do_not_give_themselves_away(data):
    for split in SPLITS:
        answers = collections.defaultdict(collections.Counter)
        for e in every(data, split, "vqa"):
            if e.meta["template"] == "is_kind":
                answers[e.question][e.answer] += 1
                assert e.meta["answer_type"] == "CLOSED"
                assert (e.answer == "yes") == (domains_images.KINDS[e.meta["kind"]] in e.question)
        assert answers and all(c["yes"] == c["no"] for c in answers.values())


def test_what_is_asked_when_held_out_was_answered_in_training(data):
    for task in ("vqa", "cls"):
        known = {(e.meta["template"], e.answer) for e in every(data, "train", task)}
        assert {
            (e.meta["template"], e.answer) for s in ("val", "test") for e in every(data, s, task)
        } <= known


def test_brain_questions_are_the_brain_sets_own(data, slices):
    own = {e.id: e for split in SPLITS for e in slices.examples(split)}
    kept = [e for split in SPLITS for e in data.examples(split) if e.id in own]
    assert len(kept) > 1000
    for e in kept:
        old = own[e.id]
        assert (e.question, e.answer, e.images, e.cluster) == (
            old.question,
            old.answer,
            old.images,
            old.cluster,
        )
        assert e.meta["modality"] == (domains.T1 if old.meta["map"] == "t1" else domains.TISSUE)
    asked = {e.images for e in every(data, "test", "cls") if e.meta["template"] == "domain"}
    assert asked == {e.images for e in data.examples("test")}
    assert not every(data, "test", "caption") and every(data, "train", "caption")


def test_the_same_seed_gives_the_same_set(data, cache, tmp_path):
    assert opened("domains", str(tmp_path), jitters=1).checksum == data.checksum
    assert opened("domains", cache, jitters=1, seed=1).checksum != data.checksum
    only = SourceConfig("domains", options={"jitters": 1}, tasks=("cls",))
    (only,) = datasets.open_sources(DataConfig((only,), cache=cache))
    assert only.checksum == data.checksum and {e.task for e in only.examples("train")} == {"cls"}


def test_sources_of_each_domain(data):
    counts = collections.defaultdict(set)
    for split in SPLITS:
        for e in data.examples(split):
            counts[split, e.meta["modality"]].add(e.cluster)
    assert (
        len(counts) == 12
        and len(counts["train", "other scan"]) == 5
        and len(counts["test", "optical image"]) == 7
    )


def test_refusals(data, monkeypatch):
    with pytest.raises(UserError, match="no split 'dev'"):
        data.examples("dev")
    with pytest.raises(UserError, match="no image 'nothing'"):
        data.image("nothing")
    domains_images.pixels.cache_clear()
    with pytest.raises(UserError, match="none.png is missing from skimage; install"):
        domains_images.pixels("none.png")
    monkeypatch.setattr(domains_images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"inside pydicom; run pip install -e '.\[demo\]'"):
        domains_images.pixels("CT_small.dcm")


def test_the_expected_numbers_are_those_of_all_splits():
    """They are compared when a set is prepared without options (test_store.py)."""
    for info in (domains.INFO, datasets.brain.INFO):
        assert set(info.counts) == set(info.splits) and all(count > 0 for count in info.counts.values())


@pytest.mark.slow
def test_both_sets_have_as_many_examples_as_expected():
    for module in (domains, datasets.brain):
        read = {split: sum(1 for _ in module.read(None, split, {}, [])) for split in module.INFO.splits}
        assert read == module.INFO.counts
