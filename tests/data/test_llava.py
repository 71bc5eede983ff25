"""LLaVA-Med's and Med-MoE's JSON: every spelling, every record counted, every fault one sentence."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unimed_jax.config import Config, DataConfig, EvaluateConfig, SourceConfig, TextConfig
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.forms import form_of, text_of
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.errors import UserError
from unimed_jax.evaluate.metrics.text import is_closed
from unimed_jax.evaluate.tasks import data_notes, open_sets, units_of


def said(*values):
    return [
        {"from": who, "value": v} for who, v in zip(("human", "gpt") * len(values), values, strict=False)
    ]


class Letters:
    """A tokenizer of characters."""

    bos, eos, pad = 1, 2, 0
    coordinate_start = None

    def encode(self, text):
        return [ord(letter) for letter in text]


ASKED = {
    "id": "7",
    "image": "a.jpg",
    "conversations": said("<image>\nIs it clear?", "no"),
    "answer_type": "CLOSED",
}


def opened(path, tmp_path, **more):
    """The set as sources open it."""
    (data,) = open_sources(
        DataConfig((SourceConfig("llava", path=str(path), **more),), cache=str(tmp_path / "cache"))
    )
    return data


def write(folder, images=("a.jpg",), **splits):
    folder.mkdir(exist_ok=True, parents=True)
    for split, records in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(records))
    for name in images:
        file = folder / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 6, 3), 77, np.uint8)).save(file)
    return folder


def test_conversations_become_examples(tmp_path):
    talk = said("Which organ?\n<image>", "lung", "Which side?", "left")
    folder = write(
        tmp_path / "rad",
        ("a.jpg", "deep/b.png"),
        train=[
            {
                "id": 1,
                "image": ["deep/b.png"],
                "conversatons": talk,
                "domain": {"mri": False, "ct_scan": True},
            },
            {"id": 2, "conversations": said("What is a lung?", "an organ")},
        ],
        test=[ASKED | {"answer_type": "OPEN ", "modality": "MRI"}, ASKED],
    )
    data = opened(folder, tmp_path)
    first, text = data.examples("train")
    assert (first.task, first.question, first.answer) == ("vqa", "Which side?", "left")
    assert first.history == (("Which organ?", "lung"),) and first.meta == {"modality": "ct_scan"}
    assert (
        data.image(first.images[0]).shape == (8, 6, 3)
        and abs(int(data.image(first.images[0]).mean()) - 77) < 2
    )
    assert (text.task, text.images, text.question) == ("qa", (), "What is a lung?")
    open_question, closed = data.examples("test")
    assert dict(open_question.meta) == {"template": "open", "answer_type": "OPEN", "modality": "MRI"}
    assert is_closed(closed.meta) and not is_closed(open_question.meta)
    assert data.splits == ("train", "test") and data.id == "llava" and data.skipped == 0
    assert len({e.id for split in ("train", "test") for e in data.examples(split)}) == 4


def test_an_example_reads_as_the_record(tmp_path):
    """The published text of a conversation, from file to pieces."""
    (example,) = opened(write(tmp_path, train=[ASKED]), tmp_path).examples("train")
    text = text_of(form_of(TextConfig(form="phi")).training(example, 0), "$")
    assert text.endswith("questions. USER: <image>\nIs it clear? ASSISTANT: no$")


def test_what_is_left_out_is_counted_and_listed(tmp_path, capsys):
    lost = [ASKED | {"id": f"l{i}", "image": f"lost{i}.jpg"} for i in range(9)]
    folder = write(tmp_path / "set", train=[ASKED, *lost])
    data = opened(folder, tmp_path)
    assert len(data.examples("train")) == 1 and data.skipped == 9
    printed = capsys.readouterr().out
    assert (
        "llava: 9 records left out, 1 used" in printed
        and f"l0: no image {folder}/images/lost0.jpg" in printed
    )
    listed = (data.folder / "skipped.txt").read_text().splitlines()
    assert len(listed) == 9 and listed[0] == f"train: l0: no image {folder}/images/lost0.jpg"
    opened(folder, tmp_path)
    assert not capsys.readouterr().out  # said once, when it was prepared


def test_several_images_are_one_example(tmp_path):
    two = {"id": "t", "image": ["a.jpg", "b.jpg"], "conversations": said("<image><image> Same?", "yes")}
    (example,) = opened(write(tmp_path / "set", ("a.jpg", "b.jpg"), train=[two]), tmp_path).examples(
        "train"
    )
    assert example.images == ("a.jpg", "b.jpg") and example.question == "Same?"


def test_a_file_alone_is_for_training(tmp_path):
    folder = write(tmp_path, (), align=[ASKED])
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.jpg")  # beside it
    data = opened(folder / "align.json", tmp_path)
    assert (
        data.splits == ("train",)
        and len(data.examples("train")) == 1
        and data.image("a.jpg").shape == (4, 4, 3)
    )


def test_a_set_that_is_only_tested_on_needs_no_train_json(tmp_path):
    data = opened(write(tmp_path / "elsewhere", test=[ASKED]), tmp_path)
    assert data.splits == ("test",) and len(data.examples("test")) == 1


def test_paths_start_at_the_root_and_ids_must_differ(tmp_path):
    for name in ("align", "rad", "more/rad"):
        write(tmp_path / name, train=[ASKED])

    def at(*paths, **more):
        sources = tuple(SourceConfig("llava", path=path, **more) for path in paths)
        return open_sources(DataConfig(sources, root=str(tmp_path), cache=str(tmp_path / "cache")))

    assert [dataset.id for dataset in at("align", "rad")] == ["llava-align", "llava-rad"]
    one, again = at("rad", "rad")
    assert one is again and one.id == "llava"
    with pytest.raises(UserError, match="two data sets have the id 'llava-rad'"):
        at("more/rad", "rad")
    with pytest.raises(UserError, match="two data sets have the id 'mine'"):
        at("align", "rad", id="mine")


def test_the_checksum_follows_the_records(tmp_path):
    sums = [
        opened(write(tmp_path / str(i), train=[record]), tmp_path).checksum
        for i, record in enumerate((ASKED, ASKED, ASKED | {"answer_type": "OPEN"}))
    ]
    assert sums[0] == sums[1] != sums[2]


FAULTS = {
    "no list": (7, "is not a list of records"),
    "an object": ({"a": 1}, "line 1: 'conversations' must be a list"),
    "no record": ([ASKED, [ASKED]], "record 1 is no object, so this is not a list of records"),
    "no messages": ([{"id": "7"}], "record 0: 'conversations' must be a list"),
    "a message without text": (
        [{"conversations": [{"from": "human"}]}],
        "record 0: 'conversations' must be a list",
    ),
    "a question that is null": (
        [{"conversations": said(None, "no")}],
        "record 0: 'conversations' must be a list",
    ),
    "a number as answer": (
        [{"conversations": said("Why?", 5)}],
        "record 0: 'conversations' must be a list",
    ),
    "a number as answer_type": (
        [ASKED | {"answer_type": 3}],
        "record 0: 'answer_type' is 3; give a text",
    ),
    "a list as modality": (
        [ASKED | {"modality": ["x" * 99]}],
        r"record 0: 'modality' is \['x+\.\.\.; give a text",
    ),
    "nobody answers": (
        [ASKED, {"conversations": said("Why?")}],
        r"record 1: messages come from \['human'\]",
    ),
    "a number as image": ([ASKED | {"image": 3}], "record 0: 'image' is 3"),
    "no mark": ([ASKED | {"conversations": said("Clear?", "no")}], "1 images, and <image> 0 times"),
    "no image": ([{"conversations": said("<image>Clear?", "no")}], "0 images, and <image> 1 times"),
    "a late mark": (
        [ASKED | {"conversations": said("Hello?", "Hi.", "<image>Clear?", "no")}],
        "in the first question",
    ),
    "an answered mark": (
        [ASKED | {"conversations": said("<image>Clear?", "<image>")}],
        "in the first question",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_its_record(name, tmp_path):
    records, sentence = FAULTS[name]
    with pytest.raises(UserError, match=sentence) as error:
        opened(write(tmp_path, train=records), tmp_path)
    assert str(tmp_path / "train.json") in str(error.value)


PLACES = ("/etc/a.jpg", "../a.jpg", "../../a.jpg", "x/../../../a.jpg")


@pytest.mark.parametrize("place", PLACES)
def test_pictures_outside_the_folder_are_nobodys_data(tmp_path, place):
    folder = write(tmp_path / "deep" / "set", train=[ASKED, ASKED | {"image": [place]}])
    for outside in (tmp_path / "deep" / "a.jpg", tmp_path / "a.jpg"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(outside)
    if place == "../a.jpg":  # from images/ on: this one lies in the data folder
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "a.jpg")
        assert len(opened(folder, tmp_path).examples("train")) == 2
        return
    with pytest.raises(
        UserError, match=r"record 1: image '.*' lies outside .*set; give its path within .*images"
    ):
        opened(folder, tmp_path)


def test_answer_type_and_modality_that_are_null_count_as_absent(tmp_path):
    (example,) = opened(
        write(tmp_path, train=[ASKED | {"answer_type": None, "modality": None}]), tmp_path
    ).examples("train")
    assert dict(example.meta) == {}


def test_turns_that_the_form_leaves_out_are_counted_by_name(tmp_path, capsys):
    """Uni-Med's form holds one turn; the chat forms train on all of them."""
    talk = [{"conversations": said("Why?", "so", "Sure?", "yes", "And?", "no")} for _ in range(7)]
    folder = write(tmp_path / "set", train=[{"conversations": said("Why?", "so")}, *talk])
    data = DataConfig(
        (SourceConfig("llava", path=str(folder)),), cache=str(tmp_path / "cache"), row_tokens=999
    )
    for form in ("unimed", "phi"):
        Pipeline(
            open_sources(data), Config(data=data, text=TextConfig(form=form, max_prompt=999)), Letters()
        )
        sentence = (
            "config.text.form='unimed' trains on the last turn of 7 conversations and leaves out "
            "the 14 turns before (llava/train/1, llava/train/2, llava/train/3, llava/train/4, "
            "llava/train/5 ...); choose stablelm or phi"
        )
        assert (sentence in capsys.readouterr().out) == (form == "unimed")


def test_results_say_what_was_not_scored(tmp_path):
    talk = {"conversations": said("Why?", "so", "Sure?", "yes")}
    folder = write(tmp_path / "set", test=[ASKED, talk, ASKED | {"image": "lost.jpg"}])
    config = Config(
        data=DataConfig((SourceConfig("llava", path=str(folder)),), cache=str(tmp_path / "cache")),
        evaluate=EvaluateConfig(splits=("test",)),
    )
    units, _ = units_of(config, open_sets(config.held_out))
    assert data_notes(units) == [
        "llava: 1 records were left out when it was prepared (skipped.txt names them)",
        "llava/test/qa: 1 questions are asked without the turns before them (test/1)",
    ]


BLANK = ("", " \n\t", "\u200b\ufeff", "\u3164", None)


@pytest.mark.parametrize("blank", BLANK)
def test_answers_that_are_empty_are_left_out_by_name(tmp_path, capsys, blank):
    talk = said("<image>Clear?", blank, "Sure?", "yes")
    records = [
        ASKED,
        ASKED | {"conversations": said("<image>Clear?", blank)},
        ASKED | {"conversations": talk},
    ]
    data = opened(write(tmp_path, train=records), tmp_path)
    assert len(data.examples("train")) == 1 and data.skipped == 2
    assert (
        "2 records left out, 1 used (train: train/1: its answer is empty; train: train/2: an "
        "earlier answer is empty)" in (capsys.readouterr().out)
    )


NO_TEXT = {
    "question": ASKED | {"conversations": said("<image>Is it \ud800 clear?", "no")},
    "answer": ASKED | {"conversations": said("<image>Is it clear?", "n\udfff")},
    "meta": ASKED | {"answer_type": "\ud83d"},
    "image": ASKED | {"image": "\udce9.jpg"},
    "earlier turn": ASKED | {"conversations": said("<image>\ud800?", "no", "Sure?", "yes")},
}


@pytest.mark.parametrize("field", NO_TEXT)
@pytest.mark.parametrize("lines", [False, True])
def test_half_a_surrogate_pair_names_the_record(tmp_path, field, lines):
    folder = write(tmp_path / "set", train=[])
    records = [json.dumps(record) for record in (ASKED, NO_TEXT[field])]
    if field == "image":  # a file of that name, which is not UTF-8
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "images" / "a.png")
        (folder / "images" / "a.png").rename(folder / "images" / "\udce9.jpg")
    (folder / "train.json").write_text("\n".join(records) if lines else f"[{','.join(records)}]")
    with pytest.raises(
        UserError, match=f"record llava/train/1: its {field} holds half of a surrogate pair"
    ) as error:
        opened(folder, tmp_path)
    str(error.value).encode()


def test_an_id_that_is_no_text_is_written_with_backslashes(tmp_path, capsys):
    folder = write(tmp_path / "set", train=[ASKED, ASKED | {"id": "\ud800", "image": "lost.jpg"}])
    (listed,) = (opened(folder, tmp_path).folder / "skipped.txt").read_text().splitlines()
    assert listed.startswith("train: \\ud800: no image") and "\\ud800" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "alone.jsonl", "alone.json"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_records_one_a_line_and_byte_order_marks(tmp_path, name, mark):
    folder = write(tmp_path / "set", train=[])
    (folder / "train.json").unlink()
    lines = "\r\n\n".join(json.dumps(record) for record in (ASKED, ASKED, ASKED))
    (folder / name).write_bytes(mark + lines.encode())
    data = opened(folder / name if "alone" in name else folder, tmp_path)
    assert len(data.examples("train")) == 3 and data.examples("train")[2].question == "Is it clear?"
    (folder / name).write_bytes(mark + lines.encode() + b"\n{")
    with pytest.raises(UserError, match=f"{name}, line 6, is not JSON .*one record a line"):
        opened(folder / name if "alone" in name else folder, tmp_path)
    # a list, whatever the file is called
    (folder / name).write_bytes(mark + json.dumps([ASKED]).encode())
    assert len(opened(folder / name if "alone" in name else folder, tmp_path).examples("train")) == 1


def test_an_image_that_is_no_file_is_named_for_what_it_is(tmp_path, capsys):
    odd = {
        "a folder": "deep",
        "nothing": "",
        "too long": "n" * 300,
        "a NUL": "a\0b",
        "below a file": "a.jpg/b",
    }
    folder = write(
        tmp_path / "set",
        train=[ASKED, *(ASKED | {"id": why, "image": [name]} for why, name in odd.items())],
    )
    (folder / "images" / "deep").mkdir()
    data = opened(folder, tmp_path)
    listed = (data.folder / "skipped.txt").read_text().splitlines()
    assert len(data.examples("train")) == 1 and len(listed) == data.skipped == 5
    for line, words in zip(
        listed, ("is a folder", "is a folder", "name too long", "can have this", "Not a"), strict=True
    ):
        assert words.lower() in line.lower(), line
    assert "deep is a folder, where a file belongs" in capsys.readouterr().out


def test_a_file_that_is_no_picture_is_left_out_before_the_first_step(tmp_path, capsys):
    """By its header: what nobody can train on is named when the set is prepared, not when its turn
    comes.
    """
    odd = {
        "text.png": (b"not an image", "none of the formats that are read"),
        "empty.jpg": (b"", "it is empty"),
        "page.jpg": (b"<html>404 not found</html>", "is a web page, not the data itself"),
        "ps.png": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "none of the formats that are read",
        ),
        "large.png": (png_header(60_000, 60_000), "pixels"),
    }
    records = [ASKED, *(ASKED | {"id": name, "image": name} for name in odd)]
    folder = write(tmp_path / "set", train=records)
    for name, (content, _) in odd.items():
        (folder / "images" / name).write_bytes(content)
    data = opened(folder, tmp_path)
    listed = (data.folder / "skipped.txt").read_text().splitlines()
    assert len(data.examples("train")) == 1 and len(listed) == data.skipped == 5
    for line, (name, (_, words)) in zip(listed, odd.items(), strict=True):
        assert name in line and words in line, line
    assert "5 records left out, 1 used" in capsys.readouterr().out


def png_header(width, height):
    """Makes the beginning of a PNG, without its pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\0\0\0\1IDAT"
    )


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="train.json does not exist"):
        opened(tmp_path, tmp_path)
    (tmp_path / "train.json").write_text("[")
    with pytest.raises(UserError, match="train.json is not JSON"):
        opened(tmp_path, tmp_path)
    (tmp_path / "train.json").write_bytes(b'[{"id": "caf\xe9"}]')
    with pytest.raises(
        UserError, match="train.json, line 1: the byte 0xe9 is not UTF-8; save the file as UTF-8"
    ):
        opened(tmp_path, tmp_path)
    (tmp_path / "train.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="train.json is nested too deep"):
        opened(tmp_path, tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="train.json and train.jsonl stand side by side"):
        opened(tmp_path, tmp_path)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.json").unlink()
    (tmp_path / "train.json").mkdir()
    with pytest.raises(UserError, match="train.json is a folder, where a file belongs"):
        opened(tmp_path, tmp_path)
    (tmp_path / "train.json").rmdir()
    (tmp_path / "table.csv").write_text("")
    with pytest.raises(UserError, match="table.csv is neither a folder nor a .json or .jsonl file"):
        opened(tmp_path / "table.csv", tmp_path)
    with pytest.raises(UserError, match="no split 'dev'"):
        opened(write(tmp_path, train=[ASKED]), tmp_path).examples("dev")
