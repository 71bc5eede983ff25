import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.published_rows import training_rows

from unimed_jax.config import TASKS, VISUAL_TASKS, TextConfig
from unimed_jax.data import layout, lengths
from unimed_jax.data.example import Example
from unimed_jax.data.forms import answer_text
from unimed_jax.data.layout import Encoder, Group, RowShape, encode_ids
from unimed_jax.errors import UserError

T = 3
SPECIALS = SimpleNamespace(bos=1, eos=2, pad=0)
SHAPE = RowShape(tokens=64, images=3, answers=16, tokens_per_image=T, image_size=2)


def question(right, answer, task="vqa", record="", left=(10, 11)):
    return encode_ids([left, right], answer, T, SPECIALS.bos, task=task, record=record)


def text(ids, answer):
    return encode_ids([ids], answer, T, SPECIALS.bos, task="qa")


def sees(batch, b):
    """The attention rule, written out: [S, S]."""
    segments, prefixes = batch["segments"][b], batch["prefixes"][b]
    i, j = np.indices((len(segments),) * 2)
    same = (segments[j] == segments[i]) | (segments[j] == prefixes[i])
    return (segments[j] != 0) & (segments[i] != 0) & (j <= i) & same


def stream(batch, b, i):
    """What position i reads, in order: (token or image token, position)."""
    slots = batch["visual"][b] // T
    own = np.flatnonzero(sees(batch, b)[i])
    first = min([slots[j] for j in own if batch["visual"][b, j] >= 0], default=0)
    visual = batch["visual"][b] - first * T
    tokens = [("image", visual[j]) if batch["visual"][b, j] >= 0 else batch["tokens"][b, j] for j in own]
    return list(zip(tokens, batch["positions"][b, own], strict=True))


def answers(batch, b=0):
    """Each target with all that its prediction may read."""
    used = np.flatnonzero(batch["weights"][b])
    return [(batch["targets"][b, a], stream(batch, b, batch["target_index"][b, a])) for a in used]


def rows(*groups, reduction="token", shape=SHAPE):
    return layout.training_batch([list(groups)], shape, SPECIALS.pad, reduction)


def test_one_question_is_the_published_row():
    batch = rows(Group((question([20, 21], [30, 31, 2]),)))
    length = 1 + 2 + T + 2 + 3
    assert batch["tokens"][0, :length].tolist() == [1, 10, 11, 0, 0, 0, 20, 21, 30, 31, 2]
    assert batch["visual"][0, :length].tolist() == [-1, -1, -1, 0, 1, 2, -1, -1, -1, -1, -1]
    assert batch["positions"][0, :length].tolist() == list(range(length))
    assert (batch["segments"][0, :length] == 1).all() and (batch["segments"][0, length:] == 0).all()
    assert (batch["prefixes"] == batch["segments"]).all()
    assert batch["target_index"][0, :3].tolist() == [7, 8, 9]
    assert batch["targets"][0, :4].tolist() == [30, 31, 2, 0]
    assert batch["weights"][0].tolist() == [1, 1, 1] + [0] * 13
    assert batch["target_tasks"][0].tolist() == [TASKS.index("vqa")] * 3 + [-1] * 13
    assert batch["image_tasks"].tolist() == [[VISUAL_TASKS.index("vqa"), -1, -1]]
    types = {k: (str(v.dtype), v.shape[1:]) for k, v in batch.items()}
    assert types.pop("images") == ("uint8", (3, 2, 2, 3)) and types.pop("weights") == ("float32", (16,))
    assert {dtype for dtype, _ in types.values()} == {"int32"}


def test_a_question_reads_the_same_alone_shared_and_packed():
    first = question([20, 21], [30, 2])
    second = question([22], [31, 32, 33, 2])
    other = question([25], [36, 2], task="refer")
    plain = text([40, 41], [42, 2])
    alone = [answers(rows(Group((q,)))) for q in (first, second, other, plain)]
    packed = rows(Group((plain,)), Group((other,)), Group((first, second)))
    assert answers(packed) == alone[3] + alone[2] + alone[0] + alone[1]
    assert packed["image_tasks"].tolist() == [
        [VISUAL_TASKS.index("refer"), VISUAL_TASKS.index("vqa"), -1]
    ]
    assert packed["target_tasks"][0, :10].tolist() == [5] * 2 + [1] * 2 + [0] * 6
    assert (packed["visual"][0][packed["visual"][0] >= 0] == np.arange(2 * T)).all()
    # The image of the shared group is read by both of its questions and by nothing else.
    shared = np.flatnonzero(packed["visual"][0] >= T)
    readers = set(packed["segments"][0][sees(packed, 0)[:, shared].any(axis=1)])
    assert readers == {3, 4, 5}


def test_two_images_in_one_example():
    encoded = encode_ids([[10], [11], [12]], [30, 2], T, 1, task="vqa")
    pixels = tuple(np.full((2, 2, 3), i, np.uint8) for i in (7, 9))
    batch = rows(Group((question([20], [2]),)), Group((encoded,), pixels))
    at = 1 + 2 + T + 2
    assert batch["tokens"][0, at : at + 13].tolist() == [1, 10, 0, 0, 0, 11, 0, 0, 0, 12, 30, 2, 0]
    assert batch["visual"][0, at : at + 12].tolist() == [-1, -1, 3, 4, 5, -1, 6, 7, 8, -1, -1, -1]
    assert batch["image_tasks"].tolist() == [[0, 0, 0]]
    assert [int(i.max()) for i in batch["images"][0]] == [0, 7, 9]


def test_text_alone_touches_no_slot():
    batch = rows(Group((text([40, 41], [42, 2]),)))
    assert (
        (batch["visual"] == -1).all()
        and (batch["image_tasks"] == -1).all()
        and not batch["images"].any()
    )
    assert batch["tokens"][0, :6].tolist() == [1, 40, 41, 42, 2, 0]


def test_example_reduction_gives_each_example_one():
    group = Group((question([20], [30, 2]), question([21], [31, 32, 33, 2]), question([22], [2])))
    weights = rows(group, reduction="example")["weights"][0]
    assert weights[:7] == pytest.approx([0.5] * 2 + [0.25] * 4 + [1])
    assert weights.sum() == pytest.approx(3)


def test_groups_that_do_not_fit_are_never_cut():
    small = dataclasses.replace(SHAPE, tokens=12)
    with pytest.raises(ValueError):
        rows(Group((question([20] * 5, [30, 2]),)), shape=small)
    with pytest.raises(ValueError):
        rows(Group((question([20], [30] * 9),)), shape=dataclasses.replace(SHAPE, answers=8))


def test_answers_are_cut_with_their_end():
    words = Words()
    a, b, c = (words.encode(word)[0] for word in "abc")

    def trained(answer, limit):
        encoded = Encoder(words, TextConfig(max_answer=limit), T).training(
            Example("r", "qa", "is it ?", answer), 0
        )
        assert encoded.targets[-1] == len(encoded.suffix) - 1
        return encoded.suffix[encoded.targets].tolist()

    assert trained("a b", 4) == trained("a b", 3) == [a, b, words.eos]
    assert trained("a b c", 3) == [a, b, c] and trained("a b c", 1) == [a]


def test_prompts_are_padded_on_the_left():
    long, short = question([20, 21, 22], ()), text([40], ())
    pixels = np.full((2, 2, 3), 5, np.uint8)
    shape = RowShape(tokens=12, images=1, answers=0, tokens_per_image=T, image_size=2)
    batch = layout.prompt_batch([Group((long,), (pixels,)), Group((short,))], shape, SPECIALS.pad)
    assert "targets" not in batch and batch["images"][0].min() == 5 and not batch["images"][1].any()
    assert batch["tokens"][0].tolist() == [0] * 3 + [1, 10, 11, 0, 0, 0, 20, 21, 22]
    assert batch["visual"][0].tolist() == [-1] * 6 + [0, 1, 2, -1, -1, -1]
    assert batch["positions"][0].tolist() == [0] * 3 + list(range(9))
    assert batch["segments"][1].tolist() == [0] * 10 + [1, 1] and batch["image_tasks"].tolist() == [
        [0],
        [-1],
    ]
    with pytest.raises(UserError, match="record r7.*longer"):
        layout.prompt_batch([Group((question([1] * 9, (), record="r7"),))], shape, 0)


class Words:
    """A tokenizer of words."""

    bos, eos, pad = 1, 2, 0

    def __init__(self):
        self.ids = {}

    def encode(self, string):
        return [self.ids.setdefault(word, len(self.ids) + 3) for word in string.split()]


def test_encoder_training_and_prompt():
    words = Words()
    encoder = Encoder(words, TextConfig(max_answer=3, double_bos=False), T)
    example = Example("r1", "vqa", "is it CT ?", "a b c d", images=("x",))
    encoded = encoder.training(example, 0)
    names = {v: k for k, v in words.ids.items()} | {1: "BOS", layout.VISUAL: "IMG"}
    right = ["</Img>", "[vqa]", "is", "it", "CT", "?", "[/INST]"]
    assert [names[i] for i in encoded.prefix] == ["BOS", "[INST]", "<Img>"] + ["IMG"] * T
    assert [names[i] for i in encoded.suffix] == [*right, "a", "b", "c"]
    assert (encoded.answer, encoded.record, encoded.task) == (3, "r1", "vqa")
    prompt = encoder.prompt(example)
    assert [names[i] for i in prompt.suffix] == right and prompt.answer == 0
    double = Encoder(words, TextConfig(double_bos=True), T)
    assert double.prompt(example).prefix[:3].tolist() == [1, 1, words.ids["[INST]"]]
    assert double.training(example, 0).prefix[:2].tolist() == [1, words.ids["[INST]"]]
    # shared, not copied
    assert encoder.training(example, 0).prefix is encoder.training(example, 1).prefix


def test_reports_pass_the_text_processor():
    example = Example("r1", "caption", "", "a  b\n\n" + "c " * 60, images=("x",))
    assert answer_text(example, TextConfig()).startswith("a b c c")
    assert len(answer_text(example, TextConfig(max_words=50)).split()) == 50
    plain = dataclasses.replace(example, task="qa", images=())
    assert answer_text(plain, TextConfig(max_words=50)) == example.answer


def test_a_prompt_of_exactly_the_limit_passes_and_one_more_token_does_not():
    words, asked = Words(), Example("r9", "vqa", "w w", "", images=("x",))
    length = Encoder(words, TextConfig(), T).prompt(asked).tokens
    assert Encoder(words, TextConfig(max_prompt=length), T).prompt(asked).tokens == length
    with pytest.raises(
        UserError, match=f"prompt has {length} tokens, more than config.text.max_prompt={length - 1};"
    ):
        Encoder(words, TextConfig(max_prompt=length - 1), T).prompt(asked)
    trained = dataclasses.replace(asked, answer="a b c d e")  # the answer is not of the prompt
    assert Encoder(words, TextConfig(max_prompt=length), T).training(trained, 0).answer == 6


@pytest.mark.parametrize("setting", ["max_prompt", "row_answers", "row_tokens", "row_images"])
def test_training_records_of_exactly_the_limit_pass(setting):
    words, text = Words(), TextConfig()
    examples = [
        Example("a", "vqa", "w", "a b", images=("x",)),
        Example("b", "vqa", "w w", "a b c", images=("x", "y")),
    ]
    found = lengths.measure(examples, words, text, T, None, "")
    encoded = max(
        (Encoder(words, text, T).training(examples[1], v) for v in range(4)), key=lambda e: e.tokens
    )
    least = {
        "max_prompt": encoded.tokens - encoded.answer,
        "row_answers": encoded.answer,
        "row_tokens": encoded.tokens,
        "row_images": 2,
    }
    group = "text" if setting == "max_prompt" else "data"

    def check(limit):
        shape = layout.RowShape(999, 999, 999, T, 2)
        fields = {"row_answers": "answers", "row_tokens": "tokens", "row_images": "images"}
        if setting in fields:
            shape = dataclasses.replace(shape, **{fields[setting]: limit})
        settings = TextConfig(max_prompt=limit if group == "text" else 999)
        lengths.check(found, np.array([1, 2]), examples, "set", shape, settings)

    check(least[setting])
    need = f"1 of 2 training records need more than config.{group}.{setting}={least[setting] - 1}: "
    with pytest.raises(
        UserError, match=f"{need}set/b .{least[setting]}.; set config.{group}.{setting}={least[setting]}"
    ):
        check(least[setting] - 1)


@pytest.mark.parametrize("limit, cut", [(2, 1), (3, 1), (4, 0), (5, 0)])
def test_an_answer_of_exactly_the_limit_is_not_cut(limit, cut):
    """Three words and the end of text."""
    example = Example("a", "qa", "w", "a b c")
    assert lengths.measure([example], Words(), TextConfig(max_answer=limit), T, None, "").cut == cut


def test_too_long_a_prompt_names_its_record():
    with pytest.raises(UserError, match=r"record r9.*config\.text\.max_prompt=10"):
        Encoder(Words(), TextConfig(max_prompt=10), T).prompt(
            Example("r9", "vqa", "w " * 20, "", images=("x",))
        )


def cases():
    file = Path(__file__).parents[1] / "goldens" / "uni_med" / "loader.py"
    spec = importlib.util.spec_from_file_location("golden_loader", file)
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    for name, case in loader.CASES.items():
        base = loader.M["bases"][case["base"]]
        yield (
            name,
            case,
            SimpleNamespace(bos=base["bos_id"], eos=base["eos_id"], pad=base["pad_id"]),
            loader,
        )


def test_published_rows():
    seen = 0
    for name, case, specials, loader in cases():
        if "prompt_segments" not in case:
            continue
        _, _, arrays, _ = loader.load_case(name)
        visual = (arrays["layout_ids"] == -1).sum(axis=1).max()
        segments = [s if isinstance(s[0], list) else [s] for s in case["prompt_segments"]]
        tokens_per_image = int(visual // max(1, max(len(s) - 1 for s in segments)))
        ends = [[i for i in ids if i != specials.pad] for ids in case["answer_ids"]]
        batch = training_rows(
            segments, ends, tokens_per_image, specials, tasks=[case["task"]] * len(ends)
        )
        np.testing.assert_array_equal(
            np.where(batch["visual"] >= 0, -1, batch["tokens"]), arrays["layout_ids"], name
        )
        np.testing.assert_array_equal(batch["segments"] > 0, arrays["attention_mask"], name)
        targets = np.full(arrays["targets"].shape, -100)
        b, a = np.nonzero(batch["weights"])
        targets[b, batch["target_index"][b, a] + 1] = batch["targets"][b, a]
        np.testing.assert_array_equal(targets, arrays["targets"], name)
        seen += 1
    assert seen


def test_published_prompts():
    seen = 0
    for name, case, specials, loader in cases():
        if case.get("kind") != "generate" or case["image_index"] is None:
            continue
        _, _, arrays, _ = loader.load_case(name)
        mask = arrays["left_padded_mask"] == 1
        calls = [ids for _, ids, _ in case["token_calls"]]
        texts = [len(left) + len(right) for left, right in zip(calls[::2], calls[1::2], strict=True)]
        per_image = int(mask[0].sum()) - texts[0]
        encoded = [
            encode_ids(
                [left[2:], right], (), per_image, specials.bos, task=case["task"], double_bos=True
            )
            for left, right in zip(calls[::2], calls[1::2], strict=True)
        ]
        shape = RowShape(mask.shape[1], 1, 0, per_image, 0)
        batch = layout.prompt_batch([Group((e,)) for e in encoded], shape, specials.pad)
        np.testing.assert_array_equal(batch["segments"] > 0, mask)
        np.testing.assert_array_equal(batch["positions"][mask], arrays["first_position_ids"][mask])
        assert (batch["visual"] >= 0).sum() == per_image * len(encoded)
        seen += 1
    assert seen
