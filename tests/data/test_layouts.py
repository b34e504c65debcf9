"""Rows of VL-BART's layouts: prompts to the byte, cuts, targets and their weights, features pooled, published files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="h5py is not installed")

from visual_folders import make_bart_folder, make_image_folder, make_video_folder, write_grid

from doralib.data.features import fit_features, read_features, write_features
from doralib.data.layouts import LAYOUTS, choose_tasks, make_questions, read_layout
from doralib.data.rows import hash_sources, read_both
from doralib.data.visual_rows import VisualCollator, encode_rows, encode_target, encode_text
from doralib.errors import DoraError, UsageError
from doralib.evaluation.visual import read_choice, write_predictions
from doralib.recipe import DataSettings, VisualSettings

SHARED = Path(os.environ.get("DORALIB_VALUE", "/work/shared/data/value"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    make_bart_folder(root / "bart")
    make_image_folder(root / "images", count=6)
    make_video_folder(root / "videos", count=4)
    return root


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "bart")


def settings(folder, layout="vlbart", **changes):
    name = {"vlbart": "images", "value": "videos"}[layout]
    return DataSettings(**{"train": str(folder / name), "layout": layout, **changes})


IMAGE_TEXTS = {
    "vqa": "vqa: what color is it?",
    "gqa": "gpa: what color?",
    "nlvr": "nlvr: both are one color",
    "caption": "caption: ",
}
QUESTION = "[Subs] say {c} [Q] what color? [TS] (0.5-3.25) [Choices] a0: {0}. a1: {1}. a2: {2}. a3: {3}."
VIDEO_TEXTS = {
    "tvqa": f"{QUESTION} a4: none. tvqa: ",
    "how2qa": f"{QUESTION} how2qa: ",
    "tvc": "[Subs] say {c} [TS] ([0, 3.38]) tvc: ",
    "yc2c": "[Subs] say {c} yc2c: ",
}


def test_texts_of_pictures_to_the_byte(folder):
    rows = read_both(settings(folder), 0).train
    assert {row["task"]: row["text"] for row in rows} == IMAGE_TEXTS


def test_videos_of_value_are_questions_for_models_that_see_them(folder, tmp_path):
    rows = read_both(settings(folder, "value", tasks={"tvqa": 1}), 0).train
    asked = make_questions(rows, None)
    own = [*zip(rows["text"], [targets[0] for targets in rows["targets"]], strict=True)]
    assert [(row["question"], row["answer"]) for row in asked] == [(text.strip(), right) for text, right in own]
    names = [Path(row["features"][0]).stem for row in rows]
    there = {row["video"] for row in asked}
    assert there == {str(folder / "videos" / "videos" / "tv" / f"{name}.mp4") for name in names}
    # elsewhere, under another ending
    (tmp_path / f"{names[0]}.mkv").write_bytes(b"film")
    assert make_questions(rows, str(tmp_path))["video"][0] == str(tmp_path / f"{names[0]}.mkv")


def test_texts_of_videos_to_the_byte(folder):
    rows = list(read_both(settings(folder, "value"), 0).train)
    for task, form in VIDEO_TEXTS.items():
        row = next(row for row in rows if row["task"] == task)
        file = next((folder / "videos" / "ann" / task).glob("*train*"))
        first = json.loads(file.read_text().splitlines()[0])
        choices = [first.get(f"a{i}", "").strip(".") for i in range(4)]
        color = next(word for word in row["text"].split() if word in ("red", "green", "blue", "black"))
        assert row["text"] == form.format(*choices, c=color)


def test_what_is_trained_and_what_is_tested(folder):
    train, _ = read_layout(settings(folder), str(folder / "images"), "train", "data.train")
    test, numbers = read_layout(settings(folder), str(folder / "images"), "test", "data.train")
    count = lambda rows: {task: rows["task"].count(task) for task in choose_tasks(settings(folder))}
    # in training a row for each caption; restval is trained on too
    assert count(train) == {"vqa": 6, "gqa": 6, "nlvr": 6, "caption": 12}
    assert count(test) == {"vqa": 8, "gqa": 8, "nlvr": 8, "caption": 8}
    assert numbers[8] == "gqa:1"
    vqa, gqa, nlvr, caption = (next(row for row in test if row["task"] == task) for task in count(test))
    assert vqa["answers"] == [vqa["targets"][0]] * 9 + ["x"]
    assert "/GQA/clip_features/data_clip_RN101_att/1000.h5" in gqa["features"][0]
    assert [Path(file).name for file in nlvr["features"]] == ["test-1000-0-img0.h5", "test-1000-0-img1.h5"]
    assert nlvr["targets"] in (["true"], ["false"])
    assert len(caption["answers"]) == 2
    assert caption["answers"][1] == caption["answers"][1].strip()
    trained_gqa = next(row for row in train if row["task"] == "gqa")
    assert "/VG/" in trained_gqa["features"][0]


def test_a_limit_is_of_each_task(folder):
    rows = read_both(settings(folder, limit=2), 0).train
    assert rows["task"][:] == ["vqa"] * 2 + ["gqa"] * 2 + ["nlvr"] * 2 + ["caption"] * 2


def test_the_files_that_are_hashed_are_those_that_are_read(folder):
    names = hash_sources(settings(folder, validation=str(folder / "images"), validation_split="test"))
    assert sum("data.train" in name for name in names) == 5
    assert any(name.endswith("v2_mscoco_val2014_annotations.json") for name in names)


def test_a_long_question_is_cut_and_long_subtitles_are_left_out(folder, tokenizer):
    tasks, given = choose_tasks(settings(folder)), settings(folder)
    row = {"text": "vqa: " + "is it red? " * 30, "spare": 0}
    ids = encode_text(row, tasks["vqa"], given, tokenizer)
    assert len(ids) == 20
    assert ids == tokenizer(row["text"], truncation=True, max_length=20)["input_ids"]
    assert len(encode_text(row, tasks["nlvr"], given, tokenizer)) > 100
    spoken = "say red " * 200
    text = f"[Subs] {spoken.strip()} [Q] what color? tvqa: "
    value = choose_tasks(settings(folder, "value"))["tvqa"]
    cut = encode_text(
        {"text": text, "spare": len(spoken.strip())}, value, settings(folder, "value", max_length=60), tokenizer
    )
    said = tokenizer.decode(cut, skip_special_tokens=True)
    assert 56 < len(cut) <= 60
    assert said.startswith("[Subs] say red say")
    assert said.endswith("[Q] what color? tvqa: ")


def test_a_target_ends_whatever_its_length(tokenizer):
    assert encode_target("red", 10, tokenizer)[-1] == tokenizer.eos_token_id
    long = encode_target("a red thing on a black thing", 6, tokenizer)
    assert len(long) == 6
    assert long == tokenizer("a red thing on a black thing", truncation=True, max_length=6)["input_ids"]


def make_collator(**changes):
    visual = VisualSettings(features=8, tokens=9)
    return VisualCollator(**{"visual": visual, "pad_id": 1, "seed": 5, "by_token": frozenset({"caption"}), **changes})


def make_rows(folder, tokenizer, learn=True, **changes):
    given = settings(folder, **changes)
    rows = read_both(given, 0)
    return encode_rows(rows.train, rows.train_numbers, given, tokenizer, learn=learn).rows


def test_weights_are_the_published_losses(folder, tokenizer):
    rows = list(make_rows(folder, tokenizer))
    collate, losses = make_collator(), torch.rand(4, 16)
    for task in ("vqa", "gqa", "nlvr", "caption"):
        own = [row for row in rows if row["task"] == task][:4]
        batch = collate(own)
        learned = batch["labels"] >= 0
        loss = losses[:, : batch["labels"].shape[1]]
        each = (loss * learned).sum(1) / learned.sum(1)
        scores = torch.tensor([row["scores"][collate._draw(row)] for row in own])
        wanted = loss[learned].mean() if task == "caption" else (each * scores).mean()
        torch.testing.assert_close((loss * batch["weights"]).sum(), wanted)
        assert batch["weights"][~learned].eq(0).all()
        assert batch["features"].shape == (4, 18 if task == "nlvr" else 9, 8)
        places = batch["places"][0].tolist()
        assert places == [[k, i] for k in range(2 if task == "nlvr" else 1) for i in range(9)]


def test_a_target_is_drawn_by_its_score_and_the_epoch_alone(folder, tokenizer):
    collate = make_collator()
    row = {"scores": [1.0, 0.3], "row": 7}
    drawn = []
    for epoch in range(2000):
        collate.set_epoch(epoch)
        drawn.append(collate._draw(row))
    again = make_collator(epoch=11)
    assert again._draw(row) == drawn[11]
    assert sum(drawn) / 2000 == pytest.approx(0.3 / 1.3, abs=0.03)
    held = make_rows(folder, tokenizer, learn=False)
    assert all(len(row["targets"]) == 1 for row in held)


def test_a_batch_of_several_tasks_pads_the_pictures(folder, tokenizer):
    rows = list(make_rows(folder, tokenizer))
    batch = make_collator()([rows[0], next(row for row in rows if row["task"] == "nlvr")])
    assert batch["features"].shape == (2, 18, 8)
    assert batch["places"][0, 9:].eq(-1).all()
    assert batch["features"][0, 9:].eq(0).all()
    text, targets = batch["attention_mask"].sum(), (batch["labels"] >= 0).sum()
    assert batch["num_tokens"] == text + targets + 9 + 18


@pytest.mark.parametrize(("side", "wanted"), [(7, 6), (3, 3), (5, 2)])
def test_a_grid_is_pooled_as_numpy_does(side, wanted):
    features = torch.randn(side * side, 5)
    found = fit_features(features, wanted * wanted, Path("a.h5")).reshape(wanted, wanted, 5)
    grid = features.reshape(side, side, 5).numpy()
    edges = [(i * side // wanted, -(-(i + 1) * side // wanted)) for i in range(wanted)]
    for i, (top, bottom) in enumerate(edges):
        for j, (left, right) in enumerate(edges):
            np.testing.assert_array_equal(found[i, j], grid[top:bottom, left:right].max((0, 1)))


def test_frames_are_pooled_or_followed_by_zeros():
    features = torch.randn(10, 3)
    few = fit_features(features, 16, Path("a.npz"))
    assert few[:10].equal(features)
    assert few[10:].eq(0).all()
    many = fit_features(features, 4, Path("a.npz"))
    for i in range(4):
        window = features[i * 10 // 4 : -(-(i + 1) * 10 // 4)]
        assert many[i].equal(window.max(0).values)


@pytest.mark.parametrize("name", ["a b.h5", "clip_1.npz"])
def test_features_are_read_as_they_were_written(tmp_path, name):
    features = torch.randn(49, 6)
    write_features(tmp_path / name, features)
    assert read_features(tmp_path / name).equal(features)


def test_damaged_features_are_told_by_their_name(tmp_path):
    for name, content in {"a.h5": b"no", "b.npz": b"PK no", "c.npz": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DoraError, match=rf"{name} holds no features"):
            read_features(tmp_path / name)
    np.savez(tmp_path / "d.npz", other=np.zeros(3))
    np.savez(tmp_path / "e.npz", features=np.array([{}], dtype=object))
    np.savez(tmp_path / "f.npz", features=np.full((2, 3), np.nan))
    np.savez(tmp_path / "g.npz", features=np.zeros(3))
    for name, told in {"d": "no features", "e": "no features", "f": "NaN", "g": r"\(3,\)"}.items():
        with pytest.raises(DoraError, match=told):
            read_features(tmp_path / f"{name}.npz")
    write_grid(tmp_path / "x.h5", "red")
    (tmp_path / "x.h5").rename(tmp_path / "y.h5")
    with pytest.raises(DoraError, match=r"y\.h5 holds no features"):
        read_features(tmp_path / "y.h5")


def test_bad_rows_of_a_layout_are_told_by_file_and_row(folder, tmp_path):
    (tmp_path / "vqa").mkdir()
    file = tmp_path / "vqa" / "karpathy_train.json"
    file.write_text('[{"question_id": 1, "img_id": "x", "sent": "?", "label": {}}, {"question_id": 2}]')
    with pytest.raises(DoraError, match=r"karpathy_train.json: row 2 has no 'question'"):
        read_layout(settings(folder, tasks={"vqa": 1}), str(tmp_path), "train", "data.train")
    file.write_text("{}")
    with pytest.raises(DoraError, match="should hold a list"):
        read_layout(settings(folder, tasks={"vqa": 1}), str(tmp_path), "train", "data.train")
    with pytest.raises(UsageError, match="is a folder, and there is none"):
        read_layout(settings(folder), str(tmp_path / "absent"), "train", "data.train")


@pytest.mark.parametrize(
    ("said", "choice"), [("a2", 2), (" a0 ", 0), ("3", 3), ("a4", None), ("a", None), ("b1", None), ("a1: red", 1)]
)
def test_a_choice_is_read_from_an_answer(said, choice):
    assert read_choice(said, 4) == choice


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="VALUE's own files are not here")
def test_published_files_of_value_are_read_and_written_alike(tmp_path):
    """The validation files, and predictions with the fields and types of VALUE's own samples."""
    notes = tmp_path / "ann"
    for task in ("how2qa", "yc2c"):
        (notes / task).mkdir(parents=True)
        (notes / task / f"{task}_val_release.jsonl").symlink_to(SHARED / f"{task}_val_release.jsonl")
    for videos in ("how2", "yc2"):
        (notes / f"{videos}_subtitles.jsonl").write_text("")
    given = settings(tmp_path, "value", tasks={"how2qa": 1, "yc2c": 1}, validation="x", validation_split="validation")
    rows, _ = read_layout(given, str(tmp_path), "validation", "data.validation")
    for task, kind in (("how2qa", dict), ("yc2c", list)):
        own = [row for row in rows if row["task"] == task]
        name, text = write_predictions(task, choose_tasks(given)[task], own, ["a2"] * len(own), given)
        sample = (SHARED / f"sample_{name}").read_text()
        if kind is dict:
            wanted, made = json.loads(sample), json.loads(text)
            assert made.keys() == wanted.keys()
            assert {type(value) for value in made.values()} == {type(value) for value in wanted.values()} == {int}
        else:
            wanted, made = ([json.loads(line) for line in each.splitlines()] for each in (sample, text))
            assert len(made) == len(wanted)
            assert [each | {"descs": 0} for each in made] == [each | {"descs": 0} for each in wanted]
            shape = lambda row: (list(row), [type(value) for value in row.values()], [list(d) for d in row["descs"]])
            assert {json.dumps(shape(row), default=str) for row in made} == {
                json.dumps(shape(row), default=str) for row in wanted
            }


def test_layouts_have_the_published_tasks():
    assert {name: list(layout.tasks) for name, layout in LAYOUTS.items()} == {
        "vlbart": ["vqa", "gqa", "nlvr", "caption"],
        "value": ["tvqa", "how2qa", "tvc", "yc2c"],
    }
    assert {t.num_beams for layout in LAYOUTS.values() for t in layout.tasks.values() if t.scoring == "caption"} == {5}
    assert {t.num_beams for layout in LAYOUTS.values() for t in layout.tasks.values() if t.scoring != "caption"} == {1}
