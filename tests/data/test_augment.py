"""Variations of training pictures: boxes follow the pixels, batches depend on (seed, step) alone."""

import dataclasses
import itertools

import numpy as np
import pytest

from unimed_jax.config import AugmentConfig
from unimed_jax.data import augment
from unimed_jax.data.box_text import box_to_text, text_to_box, valid_box
from unimed_jax.data.example import Example
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.effects import without_effect
from unimed_jax.errors import UserError
from unimed_jax.settings import from_config_dict

SIZES = ((160, 120), (90, 210), (64, 64))  # width, height
ALL = {
    "turns": True, "rotate": 10.0, "scale": (0.7, 1.6), "shift": 0.4, "contrast": 0.2, "brightness": 0.1,
}  # fmt: skip


class Digits:
    """A tokenizer of characters, in which a box is longer the more digits it has."""

    bos, eos, pad, coordinate_start, fingerprint = 1, 2, 0, None, ""

    def encode(self, string):
        return [3 + ord(c) for c in string]


class Planted:
    """Grey pictures with one red rectangle each, asked about by refer, identify and vqa."""

    id, checksum, splits = "planted", "", ("train",)

    def __init__(self, words="thing", count=12):
        rng = np.random.default_rng(0)
        self.pictures, self.boxes, self.found = {}, {}, []
        for i in range(count):
            width, height = SIZES[i % 3]
            w, h = rng.integers(14, 30, 2)
            x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            box, key = (int(x), int(y), int(x + w), int(y + h)), f"im{i}"
            picture = np.full((height, width, 3), 120, np.uint8)
            picture[y : y + h, x : x + w] = (250, 20, 20)
            self.pictures[key], self.boxes[key] = picture, box
            text = box_to_text(box, width, height)
            self.found += [
                Example(f"r{i}", "refer", words, text, (key,), box),
                Example(f"i{i}", "identify", text, "thing", (key,), box),
                Example(f"v{i}", "vqa", f"is it {i} ?", "yes", (key,)),
            ]

    def examples(self, split):
        return self.found

    def image(self, key):
        return self.pictures[key]


def settings(augmented, fidelity="default", **data):
    data = {
        "rows": 4, "row_tokens": 400, "row_images": 2, "row_answers": 200, "window": 16, "threads": 0,
    } | data  # fmt: skip
    source = {"name": "planted", "augment": augmented} if augmented is not None else {"name": "planted"}
    return from_config_dict(
        {
            "fidelity": fidelity,
            "model": {"vision": {"image_size": 64, "patch_size": 32, "width": 8, "heads": 2}},
            "data": data | {"sources": [source]},
        }
    )


def pipeline(augmented, dataset=None, **data):
    return Pipeline([dataset or Planted()], settings(augmented, **data), Digits())


def take(pipe, n, **kwargs):
    return list(itertools.islice(pipe.batches(**kwargs), n))


def same(left, right):
    assert left and len(left) == len(right)
    return all(np.array_equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a)


def red(pixels):
    """Returns the box of what is red in a picture, in shares of its sides."""
    across = pixels.astype(int)
    rows, columns = np.nonzero(across[..., 0] - across[..., 1] > 90)
    height, width = pixels.shape[:2]
    return np.array(
        [columns.min() / width, rows.min() / height, (columns.max() + 1) / width,
         (rows.max() + 1) / height]
    )  # fmt: skip


KINDS = [
    {"turns": True},
    {"scale": (0.5, 1.0)},
    {"scale": (1.0, 9.0)},
    {"shift": 1.0},
    {"contrast": 0.3, "brightness": 0.1},
    {"turns": True, "scale": (0.7, 3.0), "shift": 0.5},
    ALL | {"rotate": 0.0},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "+".join(kind))
def test_boxes_follow_the_pixels(kind):
    """The red rectangle is found again where its box says, within two pixels of the working copy."""
    data, given = Planted(), AugmentConfig(**kind)
    different = set()
    for draw, (key, picture) in itertools.product(range(6), data.pictures.items()):
        example = next(e for e in data.found if e.images == (key,))
        working = augment.working(picture, given, 64)
        drawn = augment.variation(given, 0, draw, [example])
        by = augment.map_of(drawn, working.size, [example.box])
        shown = augment.lit(augment.seen(working, by), drawn)
        box, sides = by.box(example.box), np.array(by.size * 2)
        assert 0 <= box[0] < box[2] <= by.size[0] and 0 <= box[1] < box[3] <= by.size[1]
        pixel = 2 / np.array(shown.shape[1::-1] * 2)
        assert (np.abs(red(shown) - box / sides) <= pixel).all(), (draw, key)
        text = augment.moved(example, by, working.size).answer
        assert text == box_to_text(box, *by.size)
        different.add((key, text, shown.tobytes()))
    assert len(different) > 24  # each picture in several ways


def test_turns_are_the_eight_of_a_square():
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    sideways = np.rot90(picture)
    expected = {
        shown.tobytes()
        for upright in (picture, sideways)
        for half in (upright, upright[::-1, ::-1])
        for shown in (half, half[:, ::-1])
    }
    found = set()
    for quarter, mirrored in itertools.product(range(4), (False, True)):
        by = augment.map_of(augment.Variation(quarter, mirrored), (12, 8), ())
        shown = augment.seen(augment.Working(picture, (12, 8)), by)
        assert shown.shape == ((12, 8, 3) if quarter % 2 else (8, 12, 3))
        found.add(shown.tobytes())
    assert found == expected and len(found) == 8


def test_beyond_the_edge_is_the_colour_of_the_edge():
    picture = np.full((20, 30, 3), 200, np.uint8)
    picture[[0, -1]] = picture[:, [0, -1]] = (10, 60, 30)
    by = augment.map_of(augment.Variation(scale=0.5, shift=0.5, places=(0.0, 1.0)), (30, 20), ())
    shown = augment.seen(augment.Working(picture, (30, 20)), by)
    assert (shown[:4, 12:] == (10, 60, 30)).all() and (shown[17:, :5] == 200).all()


def test_rotated_boxes_hold_what_they_held():
    data, given = Planted(), AugmentConfig(rotate=90.0)
    for draw, example in itertools.product(range(8), data.found[::3]):
        working = augment.working(data.image(example.images[0]), given, 64)
        drawn = augment.variation(given, 0, draw, [example])
        assert 0 < abs(drawn.degrees) <= augment.BOXED_DEGREES
        by = augment.map_of(drawn, working.size, [example.box])
        box, shown = np.array(by.box(example.box)) / (by.size * 2), augment.seen(working, by)
        assert (np.abs(red(shown) - box) <= 4 / min(shown.shape[:2])).all()
    free = [augment.variation(given, 0, draw, data.found[2:3]).degrees for draw in range(20)]
    assert max(map(abs, free)) > 60  # a question without a box


def test_questions_in_a_batch_have_the_boxes_of_its_pictures():
    pipe = pipeline(ALL | {"rotate": 0.0}, row_images=1)
    checked = set()
    for batch in take(pipe, 12):
        for row in range(4):
            text = "".join(chr(t - 3) for t in batch["tokens"][row] if t > 3)
            if "{" not in text:
                continue
            box = np.array(text_to_box(text[text.index("{") :])) / 100
            assert (np.abs(red(batch["images"][row, 0]) - box) < 0.06).all(), text
            checked.add(text)
    assert len(checked) > 15


def test_several_pictures_of_a_draw_vary_alike():
    """The box is of the first; the second, of another size, is turned and shifted in the same way."""
    data = Planted()
    data.found = [
        Example("r", "refer", "thing", box_to_text(data.boxes["im0"], 160, 120), ("im0", "im1"),
                data.boxes["im0"])
    ]  # fmt: skip
    plain = take(pipeline(None, data, row_tokens=200), 1)[0]["images"][0]
    shown = set()
    for batch in take(pipeline({"turns": True}, data, row_tokens=200), 6):
        for row in range(4):
            text = "".join(chr(t - 3) for t in batch["tokens"][row] if t > 3)
            box = np.array(text_to_box(text[text.index("{") :])) / 100
            first, second = batch["images"][row]
            assert (np.abs(red(first) - box) < 0.06).all()
            ours, theirs = (np.linalg.norm(red(x)[:2] + red(x)[2:] - 1) for x in (second, plain[1]))
            assert abs(ours - theirs) < 0.1  # as far from the middle as before
            shown.add((first.tobytes(), second.tobytes()))
    assert 4 < len(shown) <= 8  # never one picture turned in another way than its neighbour


def test_a_draw_with_several_boxes_keeps_them_all():
    size = (100, 80)
    boxes = [(0, 0, 9, 9), (90, 70, 100, 80), (40, 0, 60, 11)]
    given = AugmentConfig(turns=True, rotate=15.0, scale=(0.5, 4.0), shift=1.0)
    example = Example("r", "refer", "thing", box_to_text(boxes[0], *size), ("a",), boxes[0])
    for draw in range(60):
        by = augment.map_of(augment.variation(given, 0, draw, [example]), size, boxes)
        for box in boxes:
            corners = by.matrix @ np.array(box).reshape(2, 2).T + by.offset[:, None]
            limits = np.array(by.size)[:, None]
            assert (corners > -1e-6).all() and (corners < limits + 1e-6).all()
            x1, y1, x2, y2 = by.box(box)
            assert x1 < x2 and y1 < y2


def test_a_batch_depends_on_seed_and_step_alone():
    expected = take(pipeline(ALL), 6)
    assert same(take(pipeline(ALL, threads=3), 6), expected)
    assert same(take(pipeline(ALL, image_cache_mib=0), 6), expected)
    assert same(take(pipeline(ALL), 2, start_step=4), expected[4:])
    rows = pipeline(ALL)._config.data.rows
    halves = [take(pipeline(ALL), 6, own=range(*part)) for part in ((0, rows // 2), (rows // 2, rows))]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert same(joined, expected)
    assert not same(take(pipeline(None), 6), expected)


def test_off_means_the_same_batches():
    assert same(take(pipeline(None), 4), take(pipeline({}), 4))
    # Questions without a box keep their tokens, and every picture is another one.
    plain, varied = (take(pipeline(a, row_images=1), 4) for a in (None, {"brightness": 0.2}))
    for a, b in zip(plain, varied, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        assert all((x != y).any() for x, y in zip(a["images"], b["images"], strict=True))


@pytest.mark.parametrize(
    "words", ["leftmost cell", "the upper lobe", "Right lung", "左肺", "what is above it"]
)
def test_words_that_name_a_side_are_never_turned(words):
    example = Example("r", "refer", words, "{<1><2><30><40>}", ("a",), (1, 2, 30, 40))
    drawn = [
        augment.variation(AugmentConfig(**ALL), 0, draw, [example, dataclasses.replace(example)])
        for draw in range(16)
    ]
    assert {(d.quarter, d.mirrored, d.degrees) for d in drawn} == {(0, False, 0.0)}
    assert len({d.scale for d in drawn}) == 16
    free = dataclasses.replace(example, question="brightest cell")
    turned = {
        (d.quarter, d.mirrored)
        for draw in range(60)
        for d in [augment.variation(AugmentConfig(**ALL), 0, draw, [free])]
    }
    assert len(turned) == 8


@pytest.mark.parametrize("turn", [("Which lung, the left one?", "Yes"), ("Where?", "In the left lung.")])
def test_a_side_that_an_earlier_turn_names_is_never_turned(turn):
    given = AugmentConfig(turns=True, rotate=90.0)

    def drawn(*history):
        example = Example("v", "vqa", "How large is it?", "3 cm", ("a",), history=history)
        return [augment.variation(given, 0, draw, [example]) for draw in range(60)]

    sided = drawn(turn, ("Sure?", "Yes"))
    assert {(d.quarter, d.mirrored) for d in sided} == {(0, False)}
    assert max(abs(d.degrees) for d in sided) <= augment.BOXED_DEGREES
    assert not any(d.degrees for d in drawn(turn, ("{<1><2><30><40>}", "a mass")))  # with a box
    free = drawn(("Which lung?", "One."), ("Sure?", "Yes"))
    assert len({(d.quarter, d.mirrored) for d in free}) == 8
    assert max(abs(d.degrees) for d in free) > 60


def test_a_named_side_without_a_box_is_rotated_a_little_at_most():
    """Beyond a right angle what is on the left would be on the right."""
    sided = Example("v", "vqa", "Is the left lung collapsed?", "yes", ("a",))
    free = dataclasses.replace(sided, question="Is a lung collapsed?")
    for most in (180.0, 90.0, 10.0):
        given = AugmentConfig(rotate=most)
        limit = min(most, augment.BOXED_DEGREES)
        for draw in range(60):
            one, other = (augment.variation(given, 0, draw, [e]).degrees for e in (sided, free))
            assert abs(one) <= limit and one / limit == pytest.approx(other / most)


def test_questions_without_sides_and_history_vary_as_ever():
    """Runs of one seed see the same pictures: these numbers were drawn by the first version."""
    free = Example("v", "vqa", "how many cells ?", "yes", ("a",))
    given = AugmentConfig(turns=True, rotate=90.0, scale=(0.6, 1.0), shift=0.2)
    drawn = [augment.variation(given, 0, draw, [free]) for draw in range(3)]
    assert [(d.quarter, d.mirrored, d.degrees, d.scale) for d in drawn] == [
        (0, False, -20.186422416500168, 0.6993945035517284),
        (0, True, 55.34293410496746, 0.8491761215043016),
        (0, False, -66.87099933063381, 0.7918932901021499),
    ]


@pytest.mark.parametrize("box", [(100, 100, 103, 103), (58, 99, 59, 110), (114, 115, 118, 117)])
def test_a_box_keeps_an_area_in_every_draw(box):
    """Hundredths are rounded down: a box of 3 of 200 pixels, made smaller, could end where it begins."""
    size = (200, 200)
    example = Example("r", "refer", "spot", box_to_text(box, *size), ("a",), box)
    assert valid_box(example.answer)
    given = AugmentConfig(turns=True, scale=(0.6, 1.0), shift=0.2)
    kept = 0
    for draw in range(500):
        by = augment.map_of(augment.variation(given, 0, draw, [example]), size, [box])
        answer = augment.moved(example, by, size).answer
        assert valid_box(answer), (draw, answer)
        if np.array_equal(by.matrix, np.eye(2)):
            assert answer == example.answer and not by.offset.any() and by.size == size
            kept += 1
        else:
            assert answer == box_to_text(by.box(box), *by.size)
    assert 0 < kept < 450  # the others vary


def test_boxes_that_keep_their_area_move_as_ever():
    """These were drawn by the first version."""
    size, box = (200, 200), (100, 100, 103, 103)
    example = Example("r", "refer", "spot", "{<50><50><51><51>}", ("a",), box)
    given = AugmentConfig(scale=(0.6, 1.0), shift=0.2)
    maps = [augment.map_of(augment.variation(given, 0, d, [example]), size, [box]) for d in range(4)]
    expected = ["{<33><58><34><59>}", "{<38><65><39><67>}", "{<63><34><64><35>}", "{<40><59><42><61>}"]
    assert [augment.moved(example, by, size).answer for by in maps] == expected


def test_a_box_that_had_no_area_holds_nothing_up():
    size, box = (200, 200), (100, 100, 101, 101)
    example = Example("r", "identify", "{<50><50><50><50>}", "spot", ("a",), box)
    given = AugmentConfig(scale=(0.6, 1.0), shift=0.2)
    maps = [augment.map_of(augment.variation(given, 0, d, [example]), size, [box]) for d in range(20)]
    assert len({by.matrix[0, 0] for by in maps}) == 20 and 1.0 not in {by.matrix[0, 0] for by in maps}


@pytest.mark.parametrize(
    "text", ["{<50><50><50><60>}", "{<28><56><29><57>}", "{<100><100><100><100>}", "{<0><99><1><100>}"]
)
def test_a_thin_box_in_the_words_of_a_question_is_moved(text):
    """Its corners were rounded down: it may have been a hundredth wide, and is moved like that."""
    size = (100, 100)
    example = Example("q", "vqa", f"What is at {text}?", "a spot", ("a",))
    for given in (AugmentConfig(scale=(0.5, 1.0), shift=0.2), AugmentConfig(brightness=0.1)):
        for draw in range(200):
            boxes = list(augment.boxes_of(example, size).values())
            by = augment.map_of(augment.variation(given, 0, draw, [example]), size, boxes)
            (found,) = augment.boxes_in(augment.moved(example, by, size))
            assert valid_box(found), (draw, found)
            if np.array_equal(by.matrix, np.eye(2)) and valid_box(text):
                assert found == text


def test_room_is_kept_for_the_longest_box():
    """A box near the corner is written in few digits, and anywhere else in more."""
    data = Planted()
    data.found = [
        Example("r", "refer", "thing", "{<0><0><9><9>}", ("im2",), (0, 0, 6, 6)),
        Example("i", "identify", "{<0><0><9><9>}", "thing", ("im2",), (0, 0, 6, 6)),
    ]
    plain, varied = pipeline(None, data), pipeline({"shift": 1.0, "turns": True}, data)
    for draw in range(2):
        assert varied.draw(draw).size[0] == plain.draw(draw).size[0] + 8
    used = {int((b["segments"] > 0).sum()) for b in take(varied, 12, start_step=0)}
    assert len(used) > 3


def test_what_a_person_can_set_wrong():
    with pytest.raises(UserError, match=r"sources\[0\].augment.scale.*the smaller factor first"):
        settings({"scale": (2.0, 1.0)})
    with pytest.raises(UserError, match=r"sources\[0\].augment: published training varies no"):
        settings({"shift": 0.1}, fidelity="paper")
    assert settings({}, fidelity="paper").data.sources[0].augment == AugmentConfig()


def test_where_it_changes_nothing_this_is_said():
    varied = [{"name": "brain", "augment": {"shift": 0.1}}]

    def said(**changes):
        found = without_effect(from_config_dict(changes), {})
        return [sentence for _, sentence in found if "augment" in sentence]

    assert not said(data={"sources": varied})
    (one,) = said(evaluate={"sources": varied})
    assert one.startswith("config.evaluate.sources[0].augment has no effect, because nothing is varied")
    (one,) = said(data={"sources": varied}, job="router", router_fit={"key": "plane"})
    assert one.startswith("config.data.sources[0].augment has no effect, because the router")
