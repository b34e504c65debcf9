"""VL-BART from the recipe to the adapter that is loaded again: four tasks in one run, resumed, scored, reported."""

import json
import shutil

import pytest
import torch

pytest.importorskip("h5py", reason="h5py is not installed")

from visual_folders import COLORS, make_bart_folder, make_image_folder, make_video_folder

from doralib.checkpoints.load import load_model
from doralib.checkpoints.models import load_vl_bart
from doralib.data.layouts import choose_tasks
from doralib.data.rows import read_both
from doralib.data.visual_rows import stack_features
from doralib.errors import UsageError
from doralib.evaluation import captions, visual
from doralib.evaluation.layout_scores import score_layout
from doralib.evaluation.metrics import Score
from doralib.files import read_tensors
from doralib.recipe import DataSettings, Recipe, VisualSettings
from doralib.training.job import fine_tune, train
from doralib.training.modalities import vl_bart
from doralib.training.task_batches import TaskBatches

ADAPTER = {
    "r": 4,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "all",
    "modules_to_save": ["visual_embedding", "layer_norm", "layernorm_embedding"],
}
IMAGE_TASKS = {"vqa": 1.0, "gqa": 1.5, "nlvr": 0.5, "caption": 0.75}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("visual")
    make_bart_folder(root / "bart")
    make_image_folder(root / "images")
    make_video_folder(root / "videos")
    return root


@pytest.fixture(autouse=True)
def _without_java(monkeypatch):
    """Captions are scored by another package, which has tests of its own."""
    right = lambda said, references, seed: {
        "cider": Score(sum(text in given for text, given in zip(said, references, strict=True)) / len(said), 0.0, 1.0)
    }
    monkeypatch.setattr(visual, "caption_scores", right)
    monkeypatch.setattr(vl_bart, "check_caption_tools", lambda _: None)


def make_recipe(folders, out, layout="vlbart", base="bart", tasks=None, **changes):
    data = folders / {"vlbart": "images", "value": "videos"}[layout]
    split = {"vlbart": "test", "value": "validation"}[layout]
    values = {
        "model": {"path": str(folders / base), "kind": "vl-bart", "visual": {"features": 8, "tokens": 9}},
        "data": {"train": str(data), "validation": str(data), "validation_split": split, "layout": layout},
        "adapter": ADAPTER,
        "training": {"max_steps": 4, "per_device_train_batch_size": 8, "eval_strategy": "no"},
        "out": str(folders / out),
    }
    if layout == "vlbart":
        values["data"]["tasks"] = IMAGE_TASKS if tasks is None else tasks
    return Recipe(**{**values, **changes})


@pytest.fixture(scope="module")
def trained(folders):
    """Trained in full: a BART of random weights has nothing that an adapter could turn."""
    patch = pytest.MonkeyPatch()
    patch.setattr(visual, "caption_scores", lambda *_: {"cider": Score(0.0, 0.0, 0.0)})
    patch.setattr(vl_bart, "check_caption_tools", lambda _: None)
    settings = {"num_train_epochs": 10, "per_device_train_batch_size": 8, "learning_rate": 4e-3, "eval_strategy": "no"}
    run = train(make_recipe(folders, "full", adapter={"method": "full"}, training=settings))
    patch.undo()
    return run


def test_the_answer_is_learned_from_the_picture(trained):
    results = json.loads((trained / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert list(after) == ["vqa", "gqa", "nlvr", "caption"]
    assert {name: result["kind"] for name, result in after.items()} == {
        "vqa": "vqa",
        "gqa": "label",
        "nlvr": "truth",
        "caption": "caption",
    }
    assert before["gqa"]["metrics"]["accuracy"]["value"] < 0.3
    # four colors: half of the answers would not come from guessing
    assert after["gqa"]["metrics"]["accuracy"]["value"] > 0.6
    assert after["vqa"]["metrics"]["vqa_accuracy"]["value"] > 0.5
    assert len(after["nlvr"]["right"]) == after["nlvr"]["n"] == 8
    page = (trained / "report.html").read_text()
    assert "vqa: what color is it?" in page
    assert "gpa: what color?" in page
    # the picture of a row, where it lies in the layout's folder
    assert page.count('<img src="data:image/webp;base64,') == 2


def test_a_saved_model_is_a_vl_bart_again(trained):
    model, tokenizer = load_model(str(trained / "model"))
    assert type(model).__name__ == "VLBart"
    assert model.config.visual == {"features": 8, "tokens": 9, "images": 2, "boxes": False}
    assert tokenizer.convert_tokens_to_ids("<vis_extra_id_0>") == len(model.get_input_embeddings().weight) - 1


def test_a_model_is_told_where_features_are(folders):
    asked = {"features": 8, "tokens": 9, "images": 2, "boxes": True}
    model = {"path": str(folders / "bart"), "kind": "vl-bart", "visual": asked}
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "eval_strategy": "no"}
    recipe = make_recipe(folders, "boxes", tasks={"vqa": 1.0}, model=model, training=training, eval={"before": False})
    run = fine_tune(recipe)
    # without boxes it is multiplied by zeros, and never learns
    learned = read_tensors(run / "adapter_model.safetensors")["base_model.model.visual_embedding.position.0.weight"]
    drawn = load_vl_bart(recipe.model, seed=recipe.seed)[0].visual_embedding.position[0].weight
    assert not learned.equal(drawn)
    model, _ = load_model(str(run))
    assert model.config.visual == asked
    file = str(next((folders / "images").rglob("*.h5")))
    stacked = stack_features([[file, file], [file]], VisualSettings(**asked))
    for i in range(18):
        row, column = i % 9 // 3, i % 3
        edges = torch.tensor([column, column + 1, row, row + 1]) / 3
        assert stacked["boxes"][:, i].allclose(edges.expand(2, 4))
    words = torch.tensor([[5, 6], [7, 8]])
    given = {"input_ids": words, "attention_mask": torch.ones_like(words), **stacked}
    with torch.no_grad():
        told = model(**given, decoder_input_ids=words).logits
        untold = model(**{**given, "boxes": None}, decoder_input_ids=words).logits
    assert not told.allclose(untold)


def test_an_adapter_goes_with_the_visual_embedding_into_one_folder(folders, trained, run):
    merge = run
    run = train(
        make_recipe(folders, "adapter", base="full/model", model={"path": str(trained / "model"), "kind": "vl-bart"})
    )
    names = read_tensors(run / "adapter_model.safetensors")
    assert any(name.endswith("q_proj.lora_magnitude_vector") for name in names)
    assert "base_model.model.visual_embedding.feature.0.weight" in names
    assert any(name.endswith("self_attn_layer_norm.weight") for name in names)
    assert any(name.endswith("fc1.bias") for name in names)
    model, tokenizer = load_model(str(run))
    settings = make_recipe(folders, "x").data
    rows = read_both(settings, 0).validation
    results, files = score_layout(visual.VisualModel(model, tokenizer, settings, 3), list(rows))
    after = json.loads((run / "results.json").read_text())["after"]
    assert {name: result.right for name, result in results.items()} == {n: r["right"] for n, r in after.items()}
    assert {name: (run / "predictions" / name).read_text() for name in files} == files
    status, told, err = merge("merge", run, "--out", folders / "merged", "--verify")
    assert status == 0, told + err
    assert "logits of the merged and the adapted model differ by" in told
    merged, _ = load_model(str(folders / "merged"))
    assert all(name.startswith("visual") or "lora" not in name for name in merged.state_dict())
    again, _ = score_layout(visual.VisualModel(merged, tokenizer, settings, 3), list(rows))
    assert {name: result.right for name, result in again.items()} == {n: r.right for n, r in results.items()}
    status, _, err = merge("merge", run, "--out", folders / "merged2", "--verify", "exact")
    assert (status, "--verify exact: an adapter of a VL-BART is merged alone" in err) == (2, True)
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 8
    assert all({"prompt", "expected", "before", "after"} <= set(sample) for sample in samples)
    assert len(rows) == 32


def test_eval_gives_the_scores_of_the_run(folders, trained, run, monkeypatch):
    monkeypatch.setattr(captions, "check_caption_tools", lambda _: None)
    out = folders / "scores.json"
    tasks = f"vl-bart/image={folders / 'images'}"
    status, told, err = run("eval", trained / "model", "--tasks", tasks, "--out", out, "--batch-size", "5")
    assert status == 0, told + err
    found = json.loads(out.read_text())["after"]
    wanted = json.loads((trained / "results.json").read_text())["after"]
    for name in ("vqa", "gqa", "nlvr"):
        assert found[f"vl-bart/{name}"]["right"] == wanted[name]["right"]
        assert found[f"vl-bart/{name}"]["metrics"] == wanted[name]["metrics"]
    assert found["vl-bart/caption"]["n"] == 8


def test_generate_answers_about_a_file_of_features(folders, trained, run):
    model, tokenizer = load_model(str(trained / "model"))
    settings = make_recipe(folders, "x", tasks={"gqa": 1, "nlvr": 1}).data
    rows = {row["task"]: row for row in read_both(settings, 0).validation}
    (said,) = visual.VisualModel(model, tokenizer, settings).answer(choose_tasks(settings)["gqa"], [rows["gqa"]])
    asked = ("generate", trained / "model", "--prompt", rows["gqa"]["text"])
    status, out, err = run(*asked, "--features", rows["gqa"]["features"][0])
    assert (status, out.strip()) == (0, said), err
    two = [each for file in rows["nlvr"]["features"] for each in ("--features", file)]
    status, out, err = run(*asked[:2], "--prompt", rows["nlvr"]["text"], *two)
    assert (status, out.strip() in ("true", "false")) == (0, True), err
    status, _, err = run(*asked)
    assert (status, "give one --prompt as in its training" in err) == (2, True)
    status, _, err = run(*asked, "--features", folders / "absent.h5")
    assert (status, "there is no file" in err) == (2, True)


def test_a_language_model_is_not_asked_about_features(folders, run, tiny_llama_folder):
    status, _, err = run("eval", tiny_llama_folder, "--tasks", f"vl-bart/gqa={folders / 'images'}")
    assert status == 2
    assert "asks a VL-BART about features, and this is a LlamaForCausalLM" in err
    status, _, err = run("eval", tiny_llama_folder, "--tasks", f"vl-bart/gqa={folders / 'bart'}")
    assert status == 2
    assert "testdev.json, which is not there" in err


def test_what_a_server_takes(trained):
    folder = trained / "predictions"
    vqa = json.loads((folder / "vqa_test_predictions.json").read_text())
    assert [set(each) for each in vqa] == [{"question_id", "answer"}] * 8
    assert vqa[0]["question_id"] == 10_000
    truth = (folder / "nlvr_test_predictions.csv").read_text().splitlines()
    assert truth[0] in ("test-1000-0-0,True", "test-1000-0-0,False")
    captions = json.loads((folder / "caption_test_predictions.json").read_text())
    assert captions[3]["image_id"] == 1003


@pytest.mark.long
@pytest.mark.parametrize("layout", ["vlbart", "value"])
def test_cut_and_resumed_is_the_same_run(folders, layout):
    # four checkpoints in two epochs; what a kill after the second leaves
    training = {"max_steps": 12 if layout == "value" else 28, "per_device_train_batch_size": 8, "eval_strategy": "no"}
    training |= {"save_steps": training["max_steps"] // 4, "save_total_limit": 9, "learning_rate": 1e-2}
    wanted = make_recipe(folders, f"cut-{layout}", layout, training=training, eval={"before": False})
    run = fine_tune(wanted)
    whole, scored = read_tensors(run / "adapter_model.safetensors"), json.loads((run / "results.json").read_text())
    for name in ("adapter_model.safetensors", "adapter_config.json", "summary.json", "results.json"):
        (run / name).unlink()
    shutil.rmtree(run / "predictions")
    for k in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{k * training['save_steps']}")
    fine_tune(wanted, resume=True)
    again = read_tensors(run / "adapter_model.safetensors")
    assert all(again[name].equal(tensor) for name, tensor in whole.items())
    results = json.loads((run / "results.json").read_text())["after"]
    assert {name: result["right"] for name, result in results.items()} == {
        name: result["right"] for name, result in scored["after"].items()
    }


def test_files_of_video_predictions(folders):
    run = fine_tune(make_recipe(folders, "video", "value", eval={"before": False}))
    folder = run / "predictions"
    assert {file.name for file in folder.iterdir()} == {
        "tvqa_val_predictions.json",
        "how2qa_val_predictions.json",
        "tvc_val_predictions.jsonl",
        "yc2c_val_predictions.jsonl",
    }
    tvqa = json.loads((folder / "tvqa_val_predictions.json").read_text())
    assert list(tvqa) == [str(100 + i) for i in range(6)]
    assert all(choice in range(5) for choice in tvqa.values())
    first = json.loads((folder / "tvc_val_predictions.jsonl").read_text().splitlines()[0])
    assert first | {"descs": 0} == {"vid_name": "tvc_val_release_0", "clip_id": 500, "ts": [0, 3.38], "descs": 0}
    assert isinstance(first["descs"][0]["desc"], str)
    other = json.loads((folder / "yc2c_val_predictions.jsonl").read_text().splitlines()[5])
    assert set(other) == {"video_id", "clip_id", "descs"}


def test_the_verbs_about_a_recipe(folders, run):
    file = folders / "recipe.yaml"
    file.write_text(make_recipe(folders, "from-a-file", tasks={"gqa": 1, "nlvr": 0.5}).to_yaml())
    status, out, err = run("check", file)
    assert status == 0, out + err
    assert "of one task, its size times 1 (gqa), 0.5 (nlvr)" in out
    # 24 of gqa in batches of 8, 24 of nlvr in batches of 4
    assert "4, 9 an epoch" in out
    status, _, err = run("data", file)
    assert (status, "doralib data shows rows of one text" in err) == (2, True)
    status, out, err = run("plan", file)
    assert (status, "features" in out) == (0, True), err
    status, out, err = run("train", file, "training.max_steps=1", "eval.before=false")
    assert status == 0, out + err
    assert (folders / "from-a-file" / "doralib_visual.json").is_file()
    status, _, err = run("train", file, "data.train=" + str(folders / "videos"))
    assert (status, "task gqa is read from" in err) == (2, True)


def test_true_or_false_is_a_matter_of_two_logits(trained):
    model, tokenizer = load_model(str(trained / "model"))
    settings = DataSettings(train=str(trained.parent / "images"), layout="vlbart", tasks={"nlvr": 1})
    rows = list(read_both(settings, 0).train)[:5]
    asked, task = visual.VisualModel(model, tokenizer, settings, 2), choose_tasks(settings)["nlvr"]
    with torch.no_grad():
        said = asked.answer(task, rows)
        for row, word in zip(rows, said, strict=True):
            loss = {
                each: model(**asked._batch(task, [row]), labels=torch.tensor([tokenizer(each)["input_ids"]])).logits
                for each in ("true", "false")
            }
            ids = [tokenizer(each)["input_ids"][1] for each in ("false", "true")]
            assert word == ("false", "true")[int(loss["true"][0, 1, ids].argmax())]


def test_batches_are_of_one_task_and_of_its_size():
    tasks = ["vqa"] * 25 + ["nlvr"] * 7 + ["caption"] * 12
    batches = TaskBatches(tasks, {"vqa": 10, "nlvr": 3, "caption": 8}, seed=3)
    first, again = list(batches), list(batches)
    assert first == again
    assert len(batches) == len(first) == 3 + 3 + 2
    assert sorted(i for batch in first for i in batch) == list(range(44))
    assert all(len({tasks[i] for i in batch}) == 1 for batch in first)
    sizes = sorted((tasks[batch[0]], len(batch)) for batch in first)
    assert sizes == [("caption", 4), ("caption", 8), ("nlvr", 1), *[("nlvr", 3)] * 2, ("vqa", 5), *[("vqa", 10)] * 2]
    batches.set_epoch(1)
    assert list(batches) != first
    orders = set()
    for epoch in range(40):
        batches.set_epoch(epoch)
        orders.add(tuple(tasks[batch[0]] for batch in batches))
    assert len(orders) > 20


def test_a_visual_embedding_follows_from_the_seed(folders):
    settings = make_recipe(folders, "x").model
    first, again, other = (load_vl_bart(settings, seed=seed)[0] for seed in (1, 1, 2))
    weight = lambda model: model.visual_embedding.feature[0].weight
    assert weight(first).equal(weight(again))
    assert not weight(first).equal(weight(other))
    assert weight(first).std().item() == pytest.approx(0.2, rel=0.2)
    assert first.visual_embedding.feature[1].weight.eq(1).all()
    assert first.visual_embedding.position[0].bias.eq(0).all()


def test_boxes_are_those_of_a_square():
    with pytest.raises(UsageError, match="boxes are those of a square grid, and 8 tokens make none"):
        VisualSettings(tokens=8, boxes=True)


def test_frames_have_no_boxes(folders):
    file = str(next((folders / "videos").rglob("*.npz")))
    with pytest.raises(UsageError, match=r"model\.visual\.boxes: frames of a video have no place in a grid: .*\.npz"):
        stack_features([[file]], VisualSettings(features=8, tokens=9, boxes=True))


MISTAKES = {
    "no layout": ({"data": {"train": "images"}}, "model.kind vl-bart reads folders: set data.layout"),
    "other task": ({"tasks": {"vqua": 1}}, "layout vlbart has no 'vqua'; did you mean 'vqa'"),
    "width": ({"visual": {"features": 9, "tokens": 9}}, "features in .* have 8 numbers; set it to that"),
    "tokens": ({"visual": {"features": 8, "tokens": 8}}, "has 9 places, and 8 are asked for"),
    "images": ({"visual": {"features": 8, "tokens": 9, "images": 1}, "tasks": {"nlvr": 1}}, "a row has 2 pictures"),
    "split": ({"validation_split": "dev"}, "a layout has validation and test, not 'dev'"),
}


@pytest.mark.parametrize(("changes", "told"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_training(folders, changes, told):
    values = make_recipe(folders, "wrong").model_dump()
    for key, value in changes.items():
        place = values if key == "data" else values["model"] if key == "visual" else values["data"]
        place[key] = value
    with pytest.raises(UsageError, match=told):
        fine_tune(Recipe(**values))
    assert not (folders / "wrong").exists()


def test_missing_files_are_told_at_once(folders):
    shutil.copytree(folders / "images", folders / "broken")
    (folders / "broken" / "vqa" / "karpathy_train.json").unlink()
    (folders / "broken" / "nlvr" / "train.json").unlink()
    values = make_recipe(folders, "wrong").model_dump()
    values["data"]["train"] = str(folders / "broken")
    with pytest.raises(UsageError, match=r"(?s)task vqa is read from .*karpathy_train.json.*task nlvr is read from"):
        fine_tune(Recipe(**values))


def test_rows_without_features_are_left_out_and_told(folders, caplog):
    caplog.set_level("INFO", logger="doralib")
    shutil.copytree(folders / "images", folders / "fewer")
    gone = sorted((folders / "fewer" / "VG" / "clip_features" / "data_clip_RN101_att").iterdir())[:2]
    for file in gone:
        file.unlink()
    wanted = make_recipe(folders, "fewer-run", tasks={"gqa": 1}, eval={"before": False})
    data = wanted.data.model_copy(update={"train": str(folders / "fewer"), "validation": None})
    fine_tune(wanted.model_copy(update={"data": data}))
    assert "of 24 rows: 2 left out, without features" in caplog.text
    assert "there is no" in caplog.text
    assert len(COLORS) == 4
