"""Turns an example's question, images and answer into text by prompt forms.

A `Form` turns an example into `Piece`s, either for training (with its answer) or as a generation
prompt (without); `layout` turns the pieces into ids. Uni-Med's tags are one form, Med-MoE's chat
templates the others; a new form is a subclass of `Form`, a line in `FORMS` and its name in
`config.TextConfig.form`.
"""

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from unimed_jax.config import VISUAL_TASKS, TextConfig
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError

Turns = Sequence[tuple[str, str]]  # of questions, each with its answer
IMAGE = "<image>"  # marks an image in the text of a conversation, as in LLaVA's files

# ---------------------------------------------------------------------------------------------
# Parts that forms share
# ---------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Holds a part of an example: a text, or one image.

    A text is either all target or none of it; a piece without text is an image.
    """

    text: str = ""
    target: bool = False
    ends: bool = False  # the end-of-text token follows
    image: bool = False
    apart: bool = False  # tokenised by itself, as answers are that stand in no training target


TAGS = {task: f"[{task}]" for task in (*VISUAL_TASKS, "qa")}

# task -> templates. Index 0 is the fixed one of evaluation; training draws among all. Where an example
# brings no question of its own (caption, most of cls), what is left of the template says it all.
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "vqa": (
        "{question}",
        "Look at the image and answer: {question}",
        "{question} Answer in a few words.",
        "Judging by this image alone, {question}",
    ),
    "refer": (
        "Where is the {question}?",
        "Give the box of the {question}.",
        "Find the {question} and box it in.",
        "Point out the {question}.",
    ),
    "identify": (
        "What lies in {question}?",
        "Name what is shown inside {question}.",
        "Which structure does the box {question} hold?",
        "{question} marks what?",
    ),
    "caption": (
        "Report what this image shows. {question}",
        "Write the findings. {question}",
        "Tell what can be seen here. {question}",
        "Give a report of this image. {question}",
    ),
    "cls": (
        "Classify this image. {question}",
        "Put this image in its class. {question}",
        "Choose the class that fits. {question}",
        "To which class does the image belong? {question}",
    ),
    "qa": (
        "{question}",
        "Answer this: {question}",
        "{question} Answer in a few words.",
    ),
}


_TAG = re.compile(rf"\s*\[({'|'.join(TAGS)})\]\s*")


def tagged(text: str) -> tuple[str | None, str]:
    """Splits a task's tag off the start of a text: (task, rest), or (None, text) without one."""
    found = _TAG.match(text)
    return (found[1], text[found.end() :]) if found else (None, text)


def collapse(text: str) -> str:
    """Replaces two or more whitespace characters by one blank.

    Drops line breaks at the end, blanks at both ends.

    A single tab or line break inside stays, as published.
    """
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


def cut_words(text: str, n: int = 50) -> str:
    """Tidies the text and keeps its first `n` words (the published text processor)."""
    return " ".join(collapse(text).split(" ")[:n])


def shorten(words: str, text: TextConfig) -> str:
    """Tidies the text, and cuts it to `text.max_words` words if that is set."""
    return collapse(words) if text.max_words is None else cut_words(words, text.max_words)


def is_cut(question: str, has_image: bool, task: str, text: TextConfig) -> bool:
    """Says whether a model with these settings reads a part of a question only (`text.max_words`)."""
    whole = question if has_image else f"{TAGS.get(task)} {question}"
    return shorten(whole, text) != shorten(whole, dataclasses.replace(text, max_words=len(whole) + 1))


def answer_text(example: Example, text: TextConfig) -> str:
    """Returns the answer as training and scores use it.

    A report passes the text processor.
    """
    return shorten(example.answer, text) if example.task == "caption" else example.answer


def asked(example: Example, variant: int, text: TextConfig) -> str:
    """Fills an instruction of the task with the question of the example.

    It is number `variant`, modulo the number of instructions. `text.max_words` cuts the question of
    an image example. Raises UserError if a visual task has no image, or the text-only task `qa` has
    one.
    """
    task = example.task
    if task not in TAGS:
        raise UserError(f"record {example.id}: task {task!r} is unknown; choose from {', '.join(TAGS)}.")
    visual = task in VISUAL_TASKS
    if visual != bool(example.images):
        raise UserError(
            f"record {example.id}: task {task!r} "
            + (
                "needs an image; give one or use task 'qa'."
                if visual
                else "is text only; use 'vqa' for its image."
            )
        )
    question = shorten(example.question, text) if visual else example.question
    pool = INSTRUCTIONS[task]
    return collapse(pool[variant % len(pool)].replace("{question}", question))


def text_of(pieces: Sequence[Piece], end: str = "") -> str:
    """Joins the pieces to one text.

    `<image>` takes the place of each image, and `end` that of the end-of-text token.
    """
    return "".join((IMAGE if p.image else p.text) + (end if p.ends else "") for p in pieces)


def runs_of(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins neighbouring texts that the tokenizer can take as one text.

    They are alike (all targets or none) and none but the last has an end.

    Pieces meet before a blank or after the end of text, where most tokenizers cut anyway; the ids
    of the runs are then those of the whole text. `layout.piece_ids` minds those that do not.
    """
    runs: list[Piece] = []
    for piece in pieces:
        last = runs[-1] if runs else None
        apart = not last or last.image or piece.image or last.ends or last.apart or piece.apart
        if last and not apart and last.target == piece.target:
            runs[-1] = piece._replace(text=last.text + piece.text)
        else:
            runs.append(piece)
    return runs


# ---------------------------------------------------------------------------------------------
# The forms
# ---------------------------------------------------------------------------------------------


class Form(abc.ABC):
    """Turns examples into pieces under one set of text settings."""

    published = ""  # the system whose published rules score vqa answers in this form
    exported = False  # whether the torch model of `export --format=model` can ask in this form
    turns = False  # whether it holds the turns before the question
    # whether question and answer are tokenised as one text, and not each by itself (as published)
    joined = False
    # whether answers are cut to `text.max_answer` tokens, end of text included (as published)
    cut = False

    def __init__(self, text: TextConfig):
        self.text = text

    def variants(self, task: str) -> int:
        """Returns how many instructions training draws from."""
        return 1

    def beginnings(self, training: bool) -> int:
        """Returns how many beginning-of-text tokens come first."""
        return 0

    @abc.abstractmethod
    def training(self, example: Example, variant: int) -> list[Piece]:
        """Returns the example with its answer, under instruction number `variant`."""

    @abc.abstractmethod
    def prompt(self, example: Example, variant: int = 0) -> list[Piece]:
        """Returns the generation prompt: an instruction (evaluation's is number 0) and no answer."""

    @abc.abstractmethod
    def said(self, answer: str) -> Piece:
        """Returns the piece that follows a generation prompt if `answer` is what the model says."""

    def following(self, example: Example, turns: Turns, variant: int = 0) -> list[Piece]:
        """Returns the generation prompt that goes on after earlier turns of one or more.

        Each turn is laid out as the form lays out a question with its answer; the images stand in the
        first one. A question that begins with a task's tag was of that task, the others of the
        example's own. Raises UserError for a form that holds one question alone.
        """
        raise UserError(f"config.text.form={self.text.form!r} holds one question; ask it by itself.")

    def _earlier(self, example: Example, turn: tuple[str, str]) -> Example:
        task, question = tagged(turn[0])
        return dataclasses.replace(
            example, task=task or example.task, question=question, answer=turn[1], history=()
        )


class UniMed(Form):
    """Puts a task tag and an instruction after the image, as Uni-Med does.

    The instructions are our own words.

    With an image: `[INST] <Img>` + visual tokens + `</Img> [tag] instruction [/INST]`; text alone:
    `[INST] [qa] question [/INST]`.
    """

    published, exported, cut = "Uni-Med", True, True

    def variants(self, task: str) -> int:
        return len(INSTRUCTIONS[task])

    def beginnings(self, training: bool) -> int:
        return 2 if self.text.double_bos and not training else 1

    def training(self, example: Example, variant: int) -> list[Piece]:
        answer = self.said(answer_text(example, self.text))
        return [*self._asked(example, variant, " " if self.text.training_blank else ""), answer]

    def prompt(self, example: Example, variant: int = 0) -> list[Piece]:
        return self._asked(example, variant, "")

    def said(self, answer: str) -> Piece:
        return Piece(answer, target=True, ends=True)

    def following(self, example: Example, turns: Turns, variant: int = 0) -> list[Piece]:
        pieces = []
        for i, turn in enumerate(turns):
            earlier = self._earlier(example, turn)
            pieces += self._asked(earlier, 0, "", shows=i == 0)
            answer = self.said(answer_text(earlier, self.text))
            pieces.append(answer._replace(target=False, apart=True))
        return pieces + self._asked(example, variant, "", shows=False)

    def _asked(self, example: Example, variant: int, blank: str, shows: bool = True) -> list[Piece]:
        """Puts tag and instruction after the images, if they are shown here.

        Text without one is cut as a whole, tag included (published).
        """
        opens, closes = ("[INST] ", " [/INST]") if self.text.chat_template else ("", "")
        body = collapse(f"{TAGS.get(example.task)} {asked(example, variant, self.text)}")
        if not example.images:
            return [Piece(f"{opens}{shorten(body, self.text)}{closes}")]
        if not shows:
            return [Piece(f"{opens}{body}{closes}")]
        between = [Piece("</Img> <Img>"), Piece(image=True)] * (len(example.images) - 1)
        after = Piece(f"</Img> {body}{blank}{closes}")
        return [Piece(f"{opens}<Img>"), Piece(image=True), *between, after]


@dataclasses.dataclass(frozen=True)
class Template:
    """Says how turns become text.

    First come the system's words, then for each turn `role: message` and what closes it.
    """

    system: str
    roles: tuple[str, str]  # who asks and who answers
    after_system: str
    after_question: str
    after_answer: str = ""  # where `ends` is not set
    ends: bool = False  # the end of text closes each answer
    history: str = ""  # turns that always come first, as text


_CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAVA_MED = (
    "You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at "
    "Microsoft, based on the general domain LLaVA architecture.You are designed to assist human "
    "with a variety of medical and clinical research tasks using natural language.Follow the "
    "instructions carefully."
)
_TURNS = Template(_CHAT, ("USER", "ASSISTANT"), " ", " ", ends=True)
_GREETED = Template(
    _LLAVA_MED,
    ("Human", "Assistant"),
    *("###", "###", "###"),
    history="Human: Hi!###Assistant: Hi there!  How can I help you today?\n###",
)


class Conversation(Form):
    """Holds what Med-MoE's forms share: turns of questions and answers.

    `<image>` takes the place of each image. Every answer is a target. All images come before the
    first question, in their order; the task's first instruction asks, untagged.
    """

    published, turns = "Med-MoE", True
    published = "Med-MoE"
    joined = True

    def training(self, example: Example, variant: int) -> list[Piece]:
        return self.training_turns(self._turns(example, answer_text(example, self.text)))

    def prompt(self, example: Example, variant: int = 0) -> list[Piece]:
        *before, (question, _) = self._turns(example, "", variant)
        return self.prompt_turns(before, question)

    def _turns(self, example: Example, answer: str, variant: int = 0) -> list[tuple[str, str]]:
        turns = [*example.history, (asked(example, variant, self.text), answer)]
        if any(IMAGE in text for turn in turns for text in turn):
            raise UserError(
                f"record {example.id}: {IMAGE!r} stands in its text; only its images are marked so."
            )
        marks = f"{IMAGE}\n" * len(example.images)
        turns[0] = (marks + turns[0][0], turns[0][1])
        return turns

    @abc.abstractmethod
    def training_turns(self, turns: Sequence[tuple[str, str]]) -> list[Piece]:
        """Returns (question, answer) turns as published training shows them."""

    @abc.abstractmethod
    def prompt_turns(self, turns: Sequence[tuple[str, str]], question: str) -> list[Piece]:
        """Returns earlier turns and a question to be answered."""


class Chat(Conversation):
    """Asks and answers by Med-MoE's chat templates; LLaVA-Med's (`simple`) only asks."""

    def __init__(self, text: TextConfig, template: Template):
        super().__init__(text)
        self.template = template

    def training_turns(self, turns: Sequence[tuple[str, str]]) -> list[Piece]:
        if not self.template.ends:
            raise UserError(
                f"config.text.form={self.text.form!r} only asks; train with unimed, stablelm, phi "
                "or plain."
            )
        return self._answered(turns)

    def prompt_turns(self, turns: Sequence[tuple[str, str]], question: str) -> list[Piece]:
        before = [piece._replace(target=False) for piece in self._answered(turns)]
        head = "" if turns else self._head()
        return [*before, *_marked(head + self._question(image_first(question)))]

    def following(self, example: Example, turns: Turns, variant: int = 0) -> list[Piece]:
        earlier = [self._earlier(example, turn) for turn in turns]
        history = tuple((asked(one, 0, self.text), answer_text(one, self.text)) for one in earlier)
        return self.prompt(dataclasses.replace(example, history=history), variant)

    def said(self, answer: str) -> Piece:
        t = self.template
        return Piece(f" {answer}" + ("" if t.ends else t.after_answer), target=True, ends=t.ends)

    def _head(self) -> str:
        t = self.template
        return t.system + t.after_system + t.history

    def _question(self, question: str) -> str:
        user, assistant = self.template.roles
        return f"{user}: {question}{self.template.after_question}{assistant}:"

    def _answered(self, turns: Sequence[tuple[str, str]]) -> list[Piece]:
        pieces = []
        for i, (question, answer) in enumerate(turns):
            pieces += _marked(("" if i else self._head()) + self._question(question))
            pieces.append(self.said(answer))
        return pieces


class Plain(Conversation):
    """Shows an image (or several) and its caption, and leaves out what was asked (Med-MoE's stage 1)."""

    def training_turns(self, turns: Sequence[tuple[str, str]]) -> list[Piece]:
        images = turns[0][0].count(IMAGE)
        if len(turns) != 1 or not images:
            raise UserError(
                "config.text.form='plain' takes images with one caption; use another for conversations."
            )
        return [*[Piece(image=True)] * images, self.said(turns[0][1])]

    def prompt_turns(self, turns: Sequence[tuple[str, str]], question: str) -> list[Piece]:
        return _marked(f"{image_first(question)}\n")

    def said(self, answer: str) -> Piece:
        return Piece(answer + "\n", target=True)


def _marked(text: str) -> list[Piece]:
    """Splits a text at each `<image>`, which becomes a piece of its own."""
    first, *rest = text.split(IMAGE)
    pieces = [Piece(first)]
    for part in rest:
        pieces += [Piece(image=True), Piece(part)]
    return [piece for piece in pieces if piece.image or piece.text]


# The published names.
FORMS: dict[str, Callable[[TextConfig], Form]] = {
    "unimed": UniMed,
    "stablelm": lambda text: Chat(text, _TURNS),
    "phi": lambda text: Chat(text, _TURNS),
    "plain": Plain,
    "simple": lambda text: Chat(text, _GREETED),
}


def form_of(text: TextConfig) -> Form:
    """Returns the form that `text.form` names."""
    return FORMS[text.form](text)


def turns_of(
    messages: Sequence[Mapping[str, str]], where: str = "conversation"
) -> list[tuple[str, str]]:
    """Pairs LLaVA's messages into (question, answer) turns.

    A message is {"from": "human" or "gpt", "value": text}. An answer before the first question is
    left out, as published. Raises UserError if they do not alternate.
    """
    messages = messages[1:] if messages and messages[0]["from"] == "gpt" else messages
    speakers = [message["from"] for message in messages]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise UserError(
            f"{where}: messages come from {speakers}; questions ('human') and answers ('gpt') take "
            "turns."
        )
    texts = [message["value"] for message in messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def image_first(question: str) -> str:
    """Moves the `<image>` marks of a question to its beginning, a line each, as Med-MoE does.

    They may be anywhere in the question.
    """
    marks = question.count(IMAGE)
    return f"{IMAGE}\n" * marks + question.replace(IMAGE, "").strip() if marks else question
