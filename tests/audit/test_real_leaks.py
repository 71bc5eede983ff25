"""The audit finds what is known of the real sets, figure by figure (skipped where they are not)."""

import pytest
from support.real_slake import slake_with_pictures

from unimed_jax.audit.check import audit
from unimed_jax.config import Config, DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources
from unimed_jax.evaluate import baselines
from unimed_jax.evaluate.metrics.published import clean_prediction, published_bleu
from unimed_jax.evaluate.metrics.text import token_recall

PICTURES = {"images": "../vqa_rad/VQA_RAD Image Folder"}


@pytest.fixture(scope="module")
def found(real_data, cache):
    """The audit of VQA-RAD in three layouts, MedPix 2.0, PubMedQA and BCCD together."""
    sources = (
        SourceConfig("vqa_rad"),
        SourceConfig("vqa_rad", id="mmq", path="vqa_rad_mmq", options=PICTURES),
        SourceConfig("vqa_rad", id="resplit", path="vqa_rad_resplit", options=PICTURES),
        SourceConfig("medpix2"),
        SourceConfig("pubmedqa"),
        SourceConfig("voc", id="bccd", path="bccd"),
    )
    for source in sources:
        if not (real_data / (source.path or source.name)).is_dir():
            pytest.skip(f"needs {real_data / (source.path or source.name)} (docs/real_data.md)")
    return audit(Config(data=DataConfig(sources, root=str(real_data), cache=cache)))[0]


def leaks(found, name, between="train_test"):
    return {kind: counts[between] for kind, counts in found["sets"][name]["leaks"].items()}


def test_leaks_of_vqa_rad_in_three_layouts(found):
    official, mmq, resplit = (leaks(found, name) for name in ("vqa_rad", "mmq", "resplit"))
    # By design of the split, 446 of 451 questions are about 202 images of train.
    assert official["cluster"] == 446 and official["image"] == 202
    assert found["sets"]["vqa_rad"]["by_design"]["image"]
    assert official["question"] == 1 and official["similar_question"] == 3
    assert mmq["similar_question"] == 93 and mmq["repeating"] == 24
    assert mmq["cluster"] == 451 and resplit["similar_question"] == 26
    between = found["between"]
    # rows of the original's question_frame (291) and question_rephrase
    assert between["mmq/train~vqa_rad/test"]["reworded"] == 292
    assert between["mmq/train~vqa_rad/test"]["rewording"] == 286
    assert between["resplit/train~vqa_rad/test"]["question"] == 377  # 376 by their number
    assert between["vqa_rad/test~mmq/test"]["question_answer"] == 451
    look = "\n".join(found["look"])
    assert "mmq: 93 of test are given away by train (similar_question)" in look
    assert "given away by train (image)" not in look and "(cluster)" not in look


def test_a_copier_scores_far_above_blind_where_rewordings_leak(found):
    score = {}
    for name in ("vqa_rad", "mmq"):
        templates = found["sets"][name]["copier"]["train_test"]["templates"]
        score[name] = {template: round(part["value"], 3) for template, part in templates.items()}
    assert score == {
        "vqa_rad": {"closed": 0.404, "open": 0.011},
        "mmq": {"closed": 0.695, "open": 0.458},
    }
    blind = found["sets"]["mmq"]["blind"]["test"]["vqa"]["majority_per_question"]
    assert blind["templates"]["open"] < 0.1


def test_counts_are_those_that_were_published(found):
    names = {name: one["published"].get("name") for name, one in found["sets"].items()}
    assert names["mmq"] == "MMQ" and names["resplit"] == "a random re-split"
    for name, one in found["sets"].items():
        numbers = one["published"].get("counts", {})
        assert bool(numbers) == (name != "bccd")
        assert all(n["here"] == n["published"] for n in numbers.values()), name
    assert not [line for line in found["look"] if "as published" in line]


def test_images_of_vqa_rad_are_found_in_medpix2_by_name_and_by_sight(found):
    between = found["between"]
    assert {s: between[f"mmq/train~medpix2/{s}"]["name"] for s in ("train", "val", "test")} == {
        "train": 17,
        "val": 1,
        "test": 1,
    }
    assert between["medpix2/train~vqa_rad/test"]["name"] == 9
    by_sight = between["medpix2/train~vqa_rad/test"]
    assert by_sight["image"] + by_sight["near"] == 10  # a neighbouring slice is the tenth
    assert "medpix2/train and vqa_rad/test share images" in "\n".join(found["look"])


def test_faults_and_repetitions_of_medpix2_and_bccd(found):
    medpix, bccd = (found["sets"][name] for name in ("medpix2", "bccd"))
    assert medpix["left_out"]["n"] == 23 and list(medpix["left_out"]["reasons"]) == [
        "a placeholder stands for the caption ..."
    ]
    repeated = [facts["repeated"]["captions of a cluster"] for facts in medpix["splits"].values()]
    assert repeated == [545, 62, 71]
    assert not any(
        leaks(found, "medpix2", b)["cluster"] for b in ("train_test", "train_val", "val_test")
    )
    # Two cases of one patient, and two frames of one slide, lie in different splits.
    assert leaks(found, "medpix2", "train_val")["near"] == 1
    assert leaks(found, "bccd", "train_val")["near"] == 1
    assert leaks(found, "bccd")["near"] == leaks(found, "medpix2")["near"] == 0
    assert bccd["left_out"]["reasons"] == {"object ...: box ... is empty": 2}
    assert bccd["wrong_boxes"]["n"] == 0 and not bccd["personal"]
    blind = found["sets"]["pubmedqa"]["blind"]["test"]["qa"]["majority_per_template"]["exact_match"]
    assert blind == pytest.approx(0.552)


@pytest.fixture(scope="module")
def slake(real_data, cache, tmp_path_factory):
    return slake_with_pictures(real_data, tmp_path_factory.mktemp("slake"))


def test_slake_in_two_languages_shares_images_between_splits(slake, cache):
    languages = {"both": "all", "english": "en", "chinese": "zh"}
    sources = tuple(SourceConfig("slake", id=id, path=str(slake), options={"language": language})
                    for id, language in languages.items())  # fmt: skip
    content = {
        source.id: audit(Config(data=DataConfig((source,), cache=cache)), processes=1)[0]["sets"][
            source.id
        ]
        for source in sources
    }
    images = {id: one["leaks"]["image"] for id, one in content.items()}
    assert images["both"] == {"train_test": 142, "train_val": 130, "val_test": 26}
    assert images["english"] == images["chinese"] == dict.fromkeys(images["both"], 0)
    numbers = {
        id: {what: (n["here"], n["published"]) for what, n in one["published"]["counts"].items()}
        for id, one in content.items()
    }
    # Question 1622 has no answer.
    assert numbers["both"] == {
        "train vqa": (9834, 9835),
        "val vqa": (2099, 2099),
        "test vqa": (2094, 2094),
    }
    assert numbers["english"]["train vqa"] == (4918, 4919) and numbers["english"]["test vqa"] == (
        1061,
        1061,
    )
    assert numbers["chinese"]["train vqa"] == (4916, 4916)
    assert content["english"]["left_out"]["first"] == ["train: train/1622: its answer is empty"]
    facts = content["both"]["splits"]["train"]["language"]
    assert facts == {"en": 4918, "zh": 4916}
    # 997 literally, 1,000 without case and punctuation
    assert content["english"]["leaks"]["question_text"]["train_test"] >= 997


FIGURES = {  # exact match of all, open, closed; recall of open; BLEU-1
    "slake": (0.536, 0.456, 0.661, 0.512, 0.567),
    "vqa_rad": (None, 0.073, 0.511, None, 0.340),
}


@pytest.mark.parametrize("name", FIGURES)
def test_blind_scores_are_those_that_were_measured(name, real_data, slake, cache):
    """With the library's metrics and baseline, which takes the first of equally common answers."""
    path = str(slake) if name == "slake" else str(real_data / "vqa_rad")
    (data,) = open_sources(DataConfig((SourceConfig(name, path=path),), cache=cache))
    train, test = ([e for e in data.examples(split) if e.task == "vqa"] for split in ("train", "test"))
    answers = baselines.simple("vqa", train)["majority_per_question"](test)
    pairs = [(answer, example.answer) for answer, example in zip(answers, test, strict=True)]
    right = [answer.lower() == said.lower() for answer, said in pairs]
    closed = [example.meta["answer_type"] == "CLOSED" for example in test]
    bleu1 = [published_bleu(clean_prediction(answer), said)[0] for answer, said in pairs]
    recall = [token_recall(*pair) for pair, c in zip(pairs, closed, strict=True) if not c]
    parts = [[r for r, c in zip(right, closed, strict=True) if c == kind] for kind in (False, True)]
    values = [sum(some) / len(some) for some in (right, *parts, recall, bleu1)]
    for value, expected in zip(values, FIGURES[name], strict=True):
        assert expected is None or value == pytest.approx(expected, abs=0.002)
    (source,) = audit(Config(data=DataConfig((SourceConfig(name, path=path),), cache=cache)))[0][
        "sets"
    ].values()
    audited = source["blind"]["test"]["vqa"]["majority_per_question"]
    assert audited["bleu1"] == pytest.approx(FIGURES[name][-1], abs=0.005)
