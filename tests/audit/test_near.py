"""Nearly equal images are found among many by hashes as if all were compared with all."""

import io

import numpy as np
import pytest
from PIL import Image

from unimed_jax.audit.fingerprints import MIRROR, SHAPE, shape_of
from unimed_jax.audit.near import ALIKE, LIKENESS, Hasher, likeness_of


def scene(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((120, 100), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=30)
    return np.asarray(Image.open(buffer))


CHANGES = {
    "compressed": jpeg,
    "smaller": lambda a: np.asarray(Image.fromarray(a).resize((50, 44), Image.Resampling.BILINEAR)),
    "of less contrast": lambda a: (a * 0.6 + 30).astype(np.uint8),
    "noisy": lambda a: (a * 0.9 + np.random.default_rng(0).normal(12, 4, a.shape)).astype(np.uint8),
    "grey": lambda a: np.repeat(np.asarray(Image.fromarray(a).convert("L"))[..., None], 3, axis=2),
    "with a line below": lambda a: np.concatenate([a[:-2], a[-2:] // 2]),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_stays_nearly_the_same(change):
    shapes = np.stack([shape_of(scene(i)) for i in range(12)])
    changed = np.stack([shape_of(CHANGES[change](scene(i))) for i in range(12)])
    likeness = shapes @ changed.T
    assert np.diag(likeness).min() >= LIKENESS
    assert (likeness - np.eye(12)).max() < LIKENESS  # and like no other


def test_the_mirror_image_changes_signs_only():
    image = scene(0)
    assert shape_of(image[:, ::-1]) @ (shape_of(image) * MIRROR) > 0.999
    assert shape_of(image[:, ::-1]) @ shape_of(image) < LIKENESS


def test_a_picture_of_one_colour_is_like_nothing():
    flat = np.stack([shape_of(np.full((40, 40, 3), value, np.uint8)) for value in (0, 90)])
    hasher = Hasher([flat.astype(np.float16)])
    found = hasher.matches(
        hasher.hashed(flat[:1].astype(np.float16)), hasher.hashed(flat[1:].astype(np.float16))
    )
    assert not flat.any() and (found.other == -1).all()


@pytest.mark.parametrize("common", [0.0, 0.8], ids=["unlike", "alike, as X-rays of the chest are"])
def test_matches_are_those_of_comparing_all(common):
    """Of 3,000 and 1,500 pictures, which have much or nothing in common, 300 are nearly the same."""
    rng = np.random.default_rng(1)
    wide = (1 + np.arange(SHAPE)) ** -0.5  # few directions hold most of the differences
    base = rng.standard_normal(SHAPE) * wide

    def made(count):
        own = rng.standard_normal((count, SHAPE)) * wide
        return np.sqrt(common) * base + np.sqrt(1 - common) * own

    earlier, later = made(3_000), made(1_500)
    planted = rng.permutation(3_000)[:300]
    later[:300] = earlier[planted] + made(300) * 0.05
    groups = [
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16) for x in (earlier, later)
    ]
    hasher = Hasher(groups)
    found = hasher.matches(*map(hasher.hashed, groups))
    every = groups[0].astype(np.float32) @ groups[1].astype(np.float32).T  # [3000, 1500]
    best = every.max(axis=0)
    first, likeness = found.other[:, 0], found.likeness[:, 0]
    hits = first >= 0
    np.testing.assert_allclose(likeness[hits], every[first[hits], np.nonzero(hits)[0]], atol=1e-5)
    assert not (hits & (best < LIKENESS)).any()  # no false one
    assert (first[:300] == planted).mean() > 0.99  # the planted ones, of likeness .99 and more
    assert hits[best >= LIKENESS].mean() > 0.97


@pytest.mark.parametrize("copies", [0, 60], ids=["", "one of them is there under 60 more names"])
@pytest.mark.parametrize("pictures", [3, 600], ids=["few", "many"])
def test_every_nearly_equal_image_is_found(pictures, copies):
    """Of 20 and 2 earlier pictures that are like a later one: the 16 most alike, or both."""
    rng = np.random.default_rng(2)
    base = rng.standard_normal((pictures, SHAPE))
    sizes = np.array([20, *[2] * (pictures - 1)])
    spread = rng.uniform(0.02, 0.1, (sizes.sum(), 1))
    earlier = np.repeat(base, sizes, axis=0) + spread * rng.standard_normal((sizes.sum(), SHAPE))
    distinct = np.arange(len(earlier)) + copies
    earlier = np.concatenate([np.repeat(earlier[-1:], copies, axis=0), earlier])
    groups = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16) for x in (earlier, base)]
    hasher = Hasher(groups)
    found = hasher.matches(*map(hasher.hashed, groups), distinct)
    every = groups[0].astype(np.float32) @ groups[1].astype(np.float32).T  # [earlier, later]
    assert (every[distinct] >= LIKENESS).sum(axis=0).tolist() == sizes.tolist()
    for later, size in enumerate(sizes):
        best = distinct[np.argsort(-every[distinct, later])][: min(size, ALIKE)]
        assert found.other[later].tolist() == [*best.tolist(), *[-1] * (ALIKE - len(best))]
        np.testing.assert_allclose(found.likeness[later, : len(best)], every[best, later], atol=1e-5)


def test_likeness_is_the_cosine():
    a, b = np.eye(SHAPE, dtype=np.float16)[:2]
    assert likeness_of(np.stack([a, a]), np.stack([a, b])).tolist() == [1, 0]
