"""Prompt forms: Uni-Med's tags as published, names, the refusals of all, and boxes as text."""

import dataclasses
from typing import NamedTuple, get_args, get_type_hints

import pytest

from unimed_jax.config import TASKS, TextConfig
from unimed_jax.data import box_text, forms
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError

TEXT = TextConfig(chat_template=True, training_blank=True)
BARE = TextConfig(chat_template=False, training_blank=True)


class Asked(NamedTuple):
    left: str
    right: str | None = None


def asked(example: Example, variant: int, text: TextConfig, *, evaluation: bool) -> Asked:
    """Uni-Med's text before and after the image, without the answer."""
    form = forms.form_of(text)
    pieces = form.prompt(example) if evaluation else form.training(example, variant)
    if not evaluation:
        *pieces, answer = pieces
        assert answer == forms.Piece(example.answer, target=True, ends=True)
    assert not any(piece.target or piece.ends for piece in pieces) and [p.image for p in pieces][
        1:2
    ] in ([], [True])
    return Asked(*(piece.text for piece in pieces if not piece.image))


def test_every_name_is_a_form():
    """Those that config.py names, in its order, are those that exist."""
    assert get_args(get_type_hints(TextConfig)["form"]) == tuple(forms.FORMS)
    for name in forms.FORMS:
        form = forms.form_of(TextConfig(form=name))
        assert form.exported == form.cut == (name == "unimed")
        assert form.published == ("Uni-Med" if name == "unimed" else "Med-MoE")
        assert [form.beginnings(training) for training in (True, False)] == [int(name == "unimed")] * 2
        assert form.variants("vqa") == (len(forms.INSTRUCTIONS["vqa"]) if name == "unimed" else 1)
    paper = forms.form_of(TextConfig(double_bos=True))
    assert (paper.beginnings(training=True), paper.beginnings(training=False)) == (1, 2)


def test_runs_are_what_a_tokenizer_sees():
    piece, image = forms.Piece, forms.Piece(image=True)
    given = [
        piece("a"),
        piece("b"),
        image,
        image,
        piece("c"),
        piece("d", True),
        piece("e", True, True),
        piece("f"),
    ]
    runs = forms.runs_of(given)
    assert runs == [piece("ab"), image, image, piece("c"), piece("de", True, True), piece("f")]
    assert forms.text_of(runs, "$") == forms.text_of(given, "$") == "ab<image><image>cde$f"


def example(task="vqa", question="what organ ?", image="i0"):
    return Example("r1", task, question, "a", images=(image,) if image and task != "qa" else ())


def test_image_prompt_has_the_published_form():
    prompt = asked(example(), 0, TEXT, evaluation=False)
    assert prompt.left == "[INST] <Img>"
    assert prompt.right == "</Img> [vqa] what organ ?  [/INST]"  # the training row's extra blank
    prompt = asked(example(), 3, TEXT, evaluation=True)
    assert prompt.right == "</Img> [vqa] what organ ? [/INST]"


def test_two_images_of_one_question_stand_before_it_in_their_order():
    two = Example("r1", "vqa", "Same ?", "yes", images=("i0", "i1"))
    for text in (
        TextConfig(training_blank=False),
        TextConfig(training_blank=False, chat_template=False),
    ):
        shown = forms.text_of(forms.form_of(text).training(two, 0), "$")
        body = "<Img><image></Img> <Img><image></Img> [vqa] Same ?"
        assert shown == (f"[INST] {body} [/INST]yes$" if text.chat_template else f"{body}yes$")
    three = dataclasses.replace(two, images=("i0", "i1", "i2"))
    assert forms.text_of(forms.form_of(TextConfig()).prompt(three)).count("</Img> <Img><image>") == 2
    chat = forms.text_of(forms.form_of(TextConfig(form="phi")).training(two, 0), "$")
    assert chat.endswith("USER: <image>\n<image>\nSame ? ASSISTANT: yes$")


def test_by_default_training_and_evaluation_prompts_are_the_same():
    text = TextConfig(training_blank=False)
    forms = [asked(example(), 0, text, evaluation=evaluation) for evaluation in (True, False)]
    assert forms[0] == forms[1]


def test_without_chat_template_there_is_no_wrapping():
    assert asked(example(), 0, BARE, evaluation=False) == Asked("<Img>", "</Img> [vqa] what organ ? ")
    assert asked(example("qa", "Why?"), 0, BARE, evaluation=False) == Asked("[qa] Why?", None)


def test_text_only_prompt_has_no_image_slot_and_no_trailing_blank():
    prompt = asked(example("qa", "is MRI a test ?"), 0, TEXT, evaluation=False)
    assert prompt == Asked("[INST] [qa] is MRI a test ? [/INST]", None)


def test_every_template_of_every_task_holds_the_question_once_and_the_tag():
    assert set(forms.INSTRUCTIONS) == set(forms.TAGS) == set(TASKS)
    for task, pool in forms.INSTRUCTIONS.items():
        assert len(set(pool)) == len(pool) > 1
        for variant, template in enumerate(pool):
            assert template.count("{question}") == 1
            prompt = asked(example(task, "QQ {x}"), variant, TEXT, evaluation=False)
            body = prompt.left if task == "qa" else prompt.right
            assert body is not None and body.count("QQ {x}") == 1 and body.count(f"[{task}] ") == 1
            empty = asked(example(task, ""), variant, TEXT, evaluation=True)
            assert "  " not in str(empty)


def test_evaluation_takes_one_fixed_instruction_and_training_all():
    fixed = {asked(example(), v, TEXT, evaluation=True) for v in range(8)}
    drawn = {asked(example(), v, TEXT, evaluation=False) for v in range(8)}
    assert len(fixed) == 1 and len(drawn) == len(forms.INSTRUCTIONS["vqa"])


def test_word_cut_counts_the_question_or_for_text_alone_everything():
    paper = TextConfig(max_words=50)
    words = " ".join(f"w{i}" for i in range(80))
    right = asked(example("vqa", words), 0, paper, evaluation=True).right
    assert right is not None and right.split()[2:-1] == [f"w{i}" for i in range(50)]
    left = asked(example("qa", words), 0, paper, evaluation=True).left
    assert left.split()[1:-1] == ["[qa]", *(f"w{i}" for i in range(49))]
    assert "w79" in asked(example("qa", words), 0, TEXT, evaluation=True).left


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two  spaces\n", "two spaces"),
        ("[vqa] Is  it?\tyes\n\n", "[vqa] Is it?\tyes"),
        ("a b " * 40, " ".join(["a b"] * 25)),
    ],
)
def test_text_processor_as_published(raw, clean):
    assert forms.cut_words(raw) == clean


def test_wrong_records_are_named():
    with pytest.raises(UserError, match="r1.*needs an image"):
        asked(example(image=None), 0, TEXT, evaluation=False)
    with pytest.raises(UserError, match="r1.*text only"):
        asked(Example("r1", "qa", "q", "a", images=("i",)), 0, TEXT, evaluation=False)
    with pytest.raises(UserError, match="r1.*'segment' is unknown"):
        asked(example("segment"), 0, TEXT, evaluation=False)


def test_box_to_text_floors_and_reaches_100():
    assert box_text.box_to_text((0, 0, 64, 64), 64, 64) == "{<0><0><100><100>}"
    assert box_text.box_to_text((1, 2, 3, 63), 64, 64) == "{<1><3><4><98>}"
    assert box_text.box_to_text((10, 10, 20, 40), 40, 80) == "{<25><12><50><50>}"


BAD_BOXES = [
    *((0, 0, 0, 5), (0, 0, 5, 0), (5, 5, 5, 9), (5, 5, 9, 5), (5, 5, 4, 9), (5, 5, 9, 4)),  # empty
    *((-1, 0, 4, 4), (0, -1, 4, 4), (0, 0, 65, 4), (0, 0, 4, 65), (-9, -9, -1, -1)),  # outside
]


@pytest.mark.parametrize("box", BAD_BOXES)
def test_box_outside_its_image_or_empty_is_refused(box):
    with pytest.raises(UserError, match="empty or leaves its image"):
        box_text.box_to_text(box, 64, 64)


def test_text_to_box():
    assert box_text.text_to_box("{<1><2><33><100>}") == (1, 2, 33, 100)
    assert box_text.text_to_box(" { <1> <2><3 3><100>} and more") == (1, 2, 33, 100)
    assert box_text.text_to_box("<unk>{<1><2><33><100>}") == (1, 2, 33, 100)
    for bad in ("", "box {<1><2><3><4>}", "{<1><2><3>}", "{<1><2><3><1000>}", "{<1><2><3><4>"):
        assert box_text.text_to_box(bad) is None


def test_text_form_comes_back_within_one_hundredth():
    for box in [(0, 1, 2, 3), (10, 20, 64, 50)]:
        back = box_text.text_to_box(box_text.box_to_text(box, 64, 64))
        assert back is not None and all(
            0 <= b / 64 * 100 - a < 1 for a, b in zip(back, box, strict=True)
        )
