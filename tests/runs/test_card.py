"""README.md of a run: the hub reads its head, a person its text; patient with what is missing."""

import json

import pytest
from huggingface_hub import ModelCard
from runs import test_report

from doralib.runs.card import write_card

folder = test_report.run


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


def test_the_head_is_what_the_hub_reads(folder):
    card = ModelCard.load(write_card(folder))
    assert card.data.base_model == "models/tiny"
    assert card.data.library_name == "peft"
    assert "dora" in card.data.tags
    found = {(each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results}
    assert (
        found["movies", "accuracy"]
        == json.loads((folder / "results.json").read_text())["after"]["movies"]["metrics"]["accuracy"]["value"]
    )


def test_the_text_has_scores_with_intervals_and_how_to_load_it(folder):
    text = write_card(folder).read_text()
    after = json.loads((folder / "results.json").read_text())["after"]["movies"]["metrics"]["accuracy"]
    assert f"{after['value']:.3f} ({after['low']:.3f} to {after['high']:.3f})" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("a run")' in text
    assert "trained on rows.jsonl" in text
    assert "- r: 16" in text


def test_a_folder_of_this_machine_is_not_told(folder, tmp_path):
    base = tmp_path / "secret" / "tiny"
    base.mkdir(parents=True)
    change(folder, "summary.json", base_model=str(base))
    text = write_card(folder).read_text()
    assert "tiny" in text
    assert "secret" not in text


def test_the_card_of_full_fine_tuning_lies_beside_the_model(folder):
    change(folder, "summary.json", method="full")
    (folder / "model").mkdir()
    path = write_card(folder)
    assert path == folder / "model" / "README.md"
    assert ModelCard.load(path).data.library_name == "transformers"


@pytest.mark.parametrize("name", ["summary.json", "results.json", "config.yaml", "environment.json"])
@pytest.mark.parametrize("content", [None, "", "[1, 2]", '{"after": {"movies": {"metrics": [1]}}, "packages": 3}'])
def test_missing_and_damaged_files_are_left_out(folder, name, content):
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    assert write_card(folder).read_text().startswith("---\n")
