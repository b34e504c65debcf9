"""A recipe that names the parts of its model: composed once, found again, and composed again where it is gone."""

import json
import shutil

import pytest
import torch
import transformers

pytest.importorskip("PIL", reason="pictures are read by pillow")
from PIL import Image
from seeing_models import make_parts

from doralib.checkpoints import parts as composing
from doralib.checkpoints.parts import compose_parts, find_composed
from doralib.errors import UsageError
from doralib.files import read_yaml
from doralib.recipe import ModelParts, ModelSettings
from doralib.training.recipe_file import read_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_parts(tmp_path_factory.mktemp("parts"))
    Image.new("RGB", (30, 20), (200, 30, 30)).save(made / "a.png")
    rows = [{"image": "a.png", "question": "what is it?", "answer": "red"}] * 6
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(composing, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def name_parts(folder, **more):
    return ModelParts(language=str(folder / "vicuna"), vision=str(folder / "clip"), **more)


def test_the_same_parts_are_one_model(folder, cache, tmp_path):
    whole = name_parts(folder, projector=str(folder / "mm_projector.bin"))
    out = compose_parts(whole, seed=0)
    assert out == find_composed(whole, seed=1) == compose_parts(whole, seed=1)
    assert list(cache.iterdir()) == [out]
    # without a projector it is drawn by the seed, and torch's own numbers stay as they were
    bare = name_parts(folder)
    before = torch.random.get_rng_state()
    made = [compose_parts(bare, seed=seed) for seed in (0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({out, *made}) == 3
    load = lambda path: transformers.AutoModelForImageTextToText.from_pretrained(path).model.multi_modal_projector
    weights = [load(path).linear_1.weight for path in made]
    assert not torch.equal(*weights)
    shutil.rmtree(made[0])
    assert torch.equal(load(compose_parts(bare, seed=0)).linear_1.weight, weights[0])
    # a part with other content makes another model
    other = shutil.copytree(folder / "clip", tmp_path / "clip")
    parts = ModelParts(language=str(folder / "vicuna"), vision=str(other))
    first = find_composed(parts, seed=0)
    (other / "more.json").write_text("{}")
    assert find_composed(parts, seed=0) != first


def test_what_cannot_be_is_said_at_once(folder, tmp_path):
    parts = {"language": str(folder / "vicuna"), "vision": str(folder / "clip")}
    assert ModelSettings(parts=parts).kind == "image-text"
    with pytest.raises(UsageError, match="path and parts are two ways") as error:
        ModelSettings(path="a", parts=parts, kind="causal", revision="main")
    assert "parts make a model of kind image-text, not causal; revision goes with path" in str(error.value)
    with pytest.raises(UsageError, match="path: which model"):
        ModelSettings()
    with pytest.raises(UsageError, match=r"did you mean 'language'"):
        ModelSettings(parts={**parts, "langage": "x"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as error:
        compose_parts(ModelParts(language=str(tmp_path / "empty"), vision=str(tmp_path), projector="nowhere.bin"), 0)
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        f"model.parts.{name}" for name in ("language", "vision", "projector")
    ]


@pytest.fixture
def recipe(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "recipe.yaml").write_text(
        "model: {parts: {language: vicuna, vision: clip, projector: mm_projector.bin}}\n"
        "data: {train: rows.jsonl, max_length: 256}\n"
        "adapter: {r: 2, modules_to_save: [multi_modal_projector]}\n"
        "training: {max_steps: 2, per_device_train_batch_size: 2, save_steps: 1, report_to: none}\n"
        f"out: {tmp_path}/run\n"
    )
    return tmp_path / "recipe.yaml"


def test_a_recipe_of_parts_is_checked_without_composing_them(recipe, cache, run):
    status, shown, err = run("check", recipe)
    assert status == 0, err
    assert "vicuna with " in shown
    assert not cache.exists()
    status, out, err = run("plan", recipe)
    assert (status, "pixel_values" in out) == (0, True), err
    assert not cache.exists()
    status, _, err = run("train", recipe, "model.path=x", "model.kind=causal")
    assert (status, "path and parts are two ways" in err, "not causal" in err) == (2, True, True)
    status, _, err = run(
        "check", recipe, "model.parts.projector=none.bin", "model.parts.vision=vicuna", "eval.tasks=[none]"
    )
    assert status == 2
    for told in ("model.parts.projector: there is no file none.bin", "no processor_config.json", "no task 'none'"):
        assert told in err, err


@pytest.mark.long
def test_a_recipe_of_parts_is_trained_asked_scored_merged_and_resumed(
    folder, recipe, cache, tmp_path, run, monkeypatch
):
    (tmp_path / "task.yaml").write_text(
        f"kind: vqa\ndata: {folder}/rows.jsonl\nimages: image\nprompt: question\nanswer: answer\nmax_new_tokens: 2\n"
    )
    out = tmp_path / "run"
    status, _, err = run("train", recipe)
    assert status == 0, err
    (base,) = cache.iterdir()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    kept = read_yaml(out / "config.yaml")["model"]
    assert (kept["path"], kept["parts"]["language"]) == ("", str(folder / "vicuna"))
    assert read_recipe(str(out / "config.yaml"), []).model.parts == ModelParts(**kept["parts"])
    born = base.stat().st_mtime_ns
    status, _, err = run("train", recipe, "adapter.method=lora", f"out={tmp_path}/lora")
    assert (status, base.stat().st_mtime_ns) == (0, born), err
    # the whole path again, once the composed model is gone
    shutil.rmtree(cache)
    monkeypatch.chdir(tmp_path)
    status, shown, err = run(
        "generate", out, "--image", folder / "a.png", "--prompt", "what is it?", "--max-new-tokens", 2
    )
    assert status == 0, err
    assert base.is_dir()
    status, shown, err = run("eval", out, "--tasks", tmp_path / "task.yaml")
    assert (status, "vqa accuracy" in shown) == (0, True), err
    shutil.rmtree(cache)
    status, _, err = run("merge", out, "--out", tmp_path / "merged")
    assert status == 0, err
    assert type(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")).__name__.startswith(
        "Llava"
    )
    shutil.rmtree(cache)
    monkeypatch.chdir(folder)
    shutil.rmtree(out / "checkpoints" / "checkpoint-2", ignore_errors=True)
    (out / "adapter_model.safetensors").unlink()
    status, _, err = run("train", recipe, "--resume")
    assert status == 0, err
    assert base.is_dir()
