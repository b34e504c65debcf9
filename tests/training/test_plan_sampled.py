"""What is planned of models that see more than text: against their real parts, and the bytes that a real step keeps."""

import json
import shutil

import pytest
import torch

from doralib.adapters.adapt import adapt
from doralib.recipe import Recipe
from doralib.training.configure import configure_adapter
from doralib.training.modalities import choose_modality
from doralib.training.plan.estimate import estimate_run
from doralib.training.plan.growth import Growth
from doralib.training.plan.sampled import Sampled

pytestmark = pytest.mark.estimates


def pictures(kind, folder):
    pytest.importorskip("diffusers", reason="diffusers is not installed here")
    from pipelines import make_pictures, make_pipeline

    make_pipeline(kind, folder / kind)
    shown = make_pictures(folder / "shown")
    return {
        "model": {"path": str(folder / kind), "kind": "text-to-image"},
        "data": {"train": str(shown), "instance_prompt": "a cat"},
        "diffusion": {"resolution": 16},
        "adapter": {"r": 2},
    }


def spoken(folder):
    pytest.importorskip("soundfile", reason="sounds are an extra")
    pytest.importorskip("soxr", reason="sounds are an extra")
    pytest.importorskip("jiwer", reason="sounds are an extra")
    from speech_kinds import save_whisper, write_clips

    save_whisper(folder / "base")
    return {
        "model": {"path": str(folder / "base")},
        "data": {"train": write_clips(folder), "language": "ro"},
        "adapter": {"r": 3, "target_modules": ["q_proj", "fc1"]},
    }


def translated(folder):
    from translators import make_model, make_tokenizer, write_rows

    make_model("t5").save_pretrained(folder / "base")
    make_tokenizer("t5").save_pretrained(folder / "base")
    return {
        "model": {"path": str(folder / "base")},
        "data": {"train": write_rows(folder), "prompt": "{en}", "target": "{ro}"},
        "adapter": {"r": 3, "target_modules": ["q", "v"]},
    }


def seen(folder):
    pytest.importorskip("PIL", reason="pictures are read by pillow")
    from PIL import Image
    from seeing_models import ALONE, build

    for part in build(ALONE["llava"]):
        part.save_pretrained(folder / "base")
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    (folder / "rows.jsonl").write_text('{"image": "a.png", "question": "What is it?", "answer": "a stone"}\n' * 8)
    return {
        "model": {"path": str(folder / "base")},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 128},
        "adapter": {"r": 3},
    }


MAKE = {
    "sdxl": lambda folder: pictures("sdxl", folder),
    "flux": lambda folder: pictures("flux", folder),
    "whisper": spoken,
    "t5": translated,
    "llava": seen,
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = Recipe(**MAKE[kind](folder), out=str(folder / "run"))
        return made[kind]

    return make


def sample(recipe):
    modality = choose_modality(recipe)
    return Sampled(recipe, modality, modality.check_rows(recipe.data, recipe.seed))


def load(recipe):
    """The model with its weights, adapted, and what makes a batch of its first rows."""
    modality = choose_modality(recipe)
    rows = modality.check_rows(recipe.data, recipe.seed)
    model, processor = modality.load(recipe.model)
    model = adapt(model, configure_adapter(modality, model, processor, recipe)).train()
    data = modality.prepare(rows, recipe.data, model, processor)
    return model, processor, lambda count: modality.collate(model, processor, data)([data.train.rows[0]] * count)


def count_kept(model, batch):
    """The bytes that a real step keeps for its backward pass."""
    known = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    batch.pop("num_tokens", None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)["loss"].sum()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", MAKE)
def test_the_bytes_are_those_of_the_real_model(kind, recipes):
    recipe = recipes(kind)
    found = estimate_run(recipe, sample=lambda: sample(recipe), calibrate=False)
    parts = {part.name: part.bytes for part in found.parts}
    model, processor, collate = load(recipe)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert parts["weights"] == frozen
    assert parts["adapter"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    growth = Growth.of_sampled(sample(recipe))
    more = growth.step(3).kept - growth.step(1).kept
    assert more == pytest.approx(count_kept(model, collate(3)) - count_kept(model, collate(1)), rel=0.12)
    if hasattr(processor, "pipeline"):
        whole = sum(p.nbytes for part in processor.pipeline.components.values() if isinstance(part, torch.nn.Module)
                    for p in part.parameters())  # fmt: skip
        assert parts["pipeline"] == whole - frozen - parts["adapter"]


def test_another_device_holds_the_rest_of_a_pipeline_before_training(recipes):
    recipe = recipes("flux")
    parts = {
        part.name: part for part in estimate_run(recipe, gpus=1, gpu_memory=24, sample=lambda: sample(recipe)).parts
    }
    beside = sample(recipe).beside
    pipeline = load(recipe)[1].pipeline
    encoders = [getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2")]
    assert beside.most >= sum(p.nbytes for part in encoders for p in part.parameters()) > 0
    moving = sum(parts[name].bytes for name in ("optimizer", "gradients", "activations", "logits", "working"))
    assert 0 < beside.most < beside.weights + sum(part.bytes for part in parts.values())
    assert moving > 0
    assert parts["pipeline"].bytes == max(0, beside.most - moving)


def test_a_step_with_checkpoints_or_four_bits_takes_less(recipes):
    recipe = recipes("sdxl")
    plain = Growth.of_sampled(sample(recipe))
    checkpointed = recipe.model_copy(update={"training": {"gradient_checkpointing": True}})
    assert Growth.of_sampled(sample(checkpointed)).step(2).kept < 0.7 * plain.step(2).kept
    four = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "nf4"})})
    packed = Growth.of_sampled(sample(four))
    assert packed.whole.frozen == plain.whole.frozen
    assert 0 < packed.whole.quantized < packed.whole.frozen
    assert packed.whole.frozen_bytes < plain.whole.frozen_bytes


def test_what_is_trained_in_full_is_planned(recipes):
    recipe = recipes("t5")
    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"method": "full"})})
    found = estimate_run(recipe, sample=lambda: sample(recipe), calibrate=False)
    parts = {part.name: part.bytes for part in found.parts}
    assert parts["adapter"] > 0
    assert parts["optimizer"] == 2 * parts["adapter"]


def test_a_run_of_pictures_is_planned_and_told(run, recipes, tmp_path):
    recipe = recipes("sdxl")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(exclude_defaults=True, mode="json")))
    status, out, err = run("plan", file, "--gpus", 1, "--gpu-memory", 16)
    assert status == 0, err
    for word in ("pipeline", "(latents 4 x 8 x 8)", "fits in 16.00 GiB"):
        assert word in out
    status, out, err = run("check", file)
    assert status == 0, err
    assert "memory    about " in out


def test_a_pipeline_without_one_of_its_parts_is_told(run, recipes, tmp_path):
    recipe = recipes("sdxl")
    shutil.copytree(recipe.model.path, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer"))
    values = recipe.model_dump(exclude_defaults=True, mode="json")
    values["model"]["path"] = str(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    status, _, err = run("plan", tmp_path / "recipe.yaml")
    assert (status, "has no folder tokenizer, which its model_index.json names" in err) == (1, True), err


def test_what_a_step_asks_of_values_is_said(run, tmp_path):
    pytest.importorskip("soundfile", reason="sounds are an extra")
    pytest.importorskip("soxr", reason="sounds are an extra")
    from speech_kinds import save_wav2vec2, write_clips

    save_wav2vec2(tmp_path / "base")
    values = {
        "model": {"path": str(tmp_path / "base")},
        "data": {"train": write_clips(tmp_path)},
        "adapter": {"target_modules": ["q_proj"]},
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    status, _, err = run("plan", tmp_path / "recipe.yaml")
    assert status == 2
    assert "not estimated: its step asks for values" in err
    status, _, err = run("plan", tmp_path / "recipe.yaml", "data.train=no.jsonl")
    assert status == 2
    assert "needs its data" in err
