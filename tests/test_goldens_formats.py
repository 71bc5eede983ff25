"""Checks variants of the golden folders that the format allows, as changes to tests/goldens."""

import json
from types import SimpleNamespace

import pytest
import test_goldens_uni_med
from support import med_moe_checks
from support.golden_folders import GOLDENS

MED_MOE = GOLDENS / "med_moe"


@pytest.fixture
def changed(tmp_path):
    """Writes a golden file with changes; gives the folder and the manifest's entry for it."""

    def write(name, change):
        data = json.loads((MED_MOE / name).read_text())
        change(data)
        (tmp_path / name).write_text(json.dumps(data))
        return tmp_path, {"file": name}

    return write


@pytest.mark.parametrize("kind", ["other", "", "Open", "yes/no", "closed"])
@pytest.mark.parametrize("scored", [True, False])
def test_med_moe_ignores_answers_of_an_unknown_type(changed, kind, scored):
    def change(data):
        item = {**data["items"][0], "answer_type": kind, "counted": "ignored"}
        keep = ("pred", "gt", "norm_pred", "norm_gt", "answer_type", "counted")
        data["items"].insert(1, item if scored else {key: item[key] for key in keep})

    med_moe_checks.check_eval_metrics(*changed("eval_metrics.json", change))


def test_an_ignored_answer_that_is_counted_is_noticed(changed):
    def change(data):
        data["items"].append({**data["items"][0], "answer_type": "OPEN", "counted": "ignored"})

    with pytest.raises(AssertionError):
        med_moe_checks.check_eval_metrics(*changed("eval_metrics.json", change))


@pytest.mark.parametrize(
    "question", ["Is there a pleural effusion?\n<image>", "Is there a pleural effusion? <image>"]
)
def test_med_moe_asks_with_the_image_first_wherever_it_stands(changed, question):
    """Only the prompt moves it; the published training keeps the question as it is."""

    def change(data):
        data["cases"] = [case for case in data["cases"] if case["name"] == "one_turn_image"]
        for case in data["cases"]:
            case["name"], case["conversations"][0]["value"] = "image_tag_last", question
            case.pop("train_input_ids", None)

    folder, entry = changed("prompts.json", change)
    med_moe_checks.check_prompts(folder, entry)
    asked = {case["eval_prompt"] for case in json.loads((folder / "prompts.json").read_text())["cases"]}
    assert len(asked) >= 2 and all("<image>\nIs there a pleural effusion?" in text for text in asked)


def test_a_uni_med_manifest_may_list_nothing_broken(tmp_path):
    manifest = json.loads((GOLDENS / "uni_med" / "manifest.json").read_text())
    del manifest["broken"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = {}
    config = SimpleNamespace(getoption={"--goldens": tmp_path}.get)
    for name in ("case_name", "broken"):
        collect = SimpleNamespace(
            fixturenames=[name],
            config=config,
            module=test_goldens_uni_med,
            parametrize=lambda name, values, ids=None: found.update({name: values}),
        )
        test_goldens_uni_med.pytest_generate_tests(collect)
    assert found["broken"] == [] and len(found["case_name"]) == len(manifest["cases"])
