"""Conversations as text and ids: Med-MoE's chat template, its image-and-caption form and LLaVA-Med's.

`<image>` in a message stands for an image's visual tokens. Targets are the answers, each with its end of text.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from unimed_jax.config import TextConfig
from unimed_jax.data import prompts
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns become text: system, then for each turn `role: message` and what closes it."""

    system: str = ""
    roles: tuple[str, str] = ("", "")  # who asks and who answers; none: the messages alone
    after_system: str = ""
    after_question: str = ""
    after_answer: str = ""  # where `ends` is not set
    ends: bool = False  # the end of text closes each answer
    history: str = ""  # turns that always come first, as text
    trained: bool = True


_CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAVA_MED = (
    "You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at Microsoft, based on "
    "the general domain LLaVA architecture.You are designed to assist human with a variety of medical and clinical "
    "research tasks using natural language.Follow the instructions carefully."
)
# The published names. "plain" trains on an image and its caption alone; "simple" only asks.
TEMPLATES = {
    **dict.fromkeys(("stablelm", "phi"), Template(_CHAT, ("USER", "ASSISTANT"), " ", " ", ends=True)),
    "plain": Template(after_question="\n", after_answer="\n"),
    "simple": Template(
        _LLAVA_MED,
        ("Human", "Assistant"),
        *("###", "###", "###"),
        history="Human: Hi!###Assistant: Hi there!  How can I help you today?\n###",
        trained=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a conversation's text that is either all target or none of it."""

    text: str
    target: bool = False
    ends: bool = False  # the end-of-text token follows


def template(name: str) -> Template:
    """The template of that name. Raises UserError for an unknown one."""
    if name not in TEMPLATES:
        raise UserError(f"config.text.template: {name!r} is unknown; choose from {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def turns_of(messages: Sequence[Mapping[str, str]], where: str = "conversation") -> list[tuple[str, str]]:
    """LLaVA's messages ({"from": "human" or "gpt", "value": text}) -> (question, answer) turns.

    An answer in front of the first question is left out, as published. Raises UserError where they do not alternate.
    """
    messages = messages[1:] if messages and messages[0]["from"] == "gpt" else messages
    speakers = [message["from"] for message in messages]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise UserError(f"{where}: messages come from {speakers}; questions ('human') and answers ('gpt') take turns.")
    texts = [message["value"] for message in messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def training_pieces(form: Template, turns: Sequence[tuple[str, str]]) -> list[Piece]:
    """(question, answer) turns as published training shows them.

    Without roles only the image and the one answer stand there, and what was asked is left out. Raises UserError for
    a template that is not trained on, and there for several turns or a question without its image.
    """
    if not form.trained:
        raise UserError("this chat template is one of evaluation alone; train with stablelm, phi or plain.")
    if not form.roles[0]:
        if len(turns) != 1 or IMAGE not in turns[0][0]:
            raise UserError("template 'plain' takes one image with one caption; use another for conversations.")
        return [Piece(IMAGE), Piece(turns[0][1] + form.after_answer, target=True)]
    user, assistant = form.roles
    pieces, head = [], form.system + form.after_system + form.history
    for question, answer in turns:
        pieces.append(Piece(f"{head}{user}: {question}{form.after_question}{assistant}:"))
        pieces.append(Piece(f" {answer}" + ("" if form.ends else form.after_answer), target=True, ends=form.ends))
        head = ""
    return pieces


def prompt_pieces(form: Template, turns: Sequence[tuple[str, str]], question: str) -> list[Piece]:
    """Earlier turns and a question to be answered."""
    user, assistant = form.roles
    if not user:
        return [Piece(question + form.after_question)]
    before = training_pieces(form, turns) if turns else [Piece(form.system + form.after_system + form.history)]
    before = [dataclasses.replace(piece, target=False) for piece in before]
    return [*before, Piece(f"{user}: {question}{form.after_question}{assistant}:")]


def example_pieces(example: Example, text: TextConfig, answer: str | None = None) -> list[Piece]:
    """An example in the form of `config.text.form`, for training with its answer or as a prompt without.

    Its image stands in front of the first question; the first instruction of its task, without tag, asks.
    """
    form = template(text.form)
    turns = [*example.history, (prompts.asked(example, 0, text), answer or "")]
    if example.images:
        marks = f"{IMAGE}\n" * len(example.images)
        turns[0] = (marks + turns[0][0], turns[0][1])
    return prompt_pieces(form, turns[:-1], turns[-1][0]) if answer is None else training_pieces(form, turns)


def text_of(pieces: Sequence[Piece], end: str = "") -> str:
    """The pieces as one text, with `end` where the end-of-text token stands."""
    return "".join(piece.text + (end if piece.ends else "") for piece in pieces)


def encode(
    pieces: Sequence[Piece], tokenise: Callable[[str], Sequence[int]], eos: int, image: int
) -> tuple[list[int], list[bool]]:
    """-> ids, with `image` at each `<image>`, and which of them are targets.

    Pieces meet where tokenisers cut anyway (in front of a blank, behind the end of text), so their ids are those of
    the whole text.
    """
    ids: list[int] = []
    targets: list[bool] = []
    text = ""  # pieces that are alike and not ended are one text for the tokeniser

    def flush(target: bool) -> None:
        nonlocal text
        for i, part in enumerate(text.split(IMAGE)):
            new = ([image] if i else []) + (list(tokenise(part)) if part else [])
            ids.extend(new)
            targets.extend([target] * len(new))
        text = ""

    for i, piece in enumerate(pieces):
        text += piece.text
        following = pieces[i + 1] if i + 1 < len(pieces) else None
        if piece.ends or following is None or following.target != piece.target:
            flush(piece.target)
        if piece.ends:
            ids.append(eos)
            targets.append(piece.target)
    return ids, targets
