"""Diffusion: each family's loss against its formula, and a run from pictures to files that diffusers reads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="diffusers is not installed here")

from pipelines import make_pictures, make_pipeline

from doralib.adapters.adapt import adapt
from doralib.checkpoints.pipelines import find_pipeline, load_adapted_pipeline
from doralib.data.captioned import fit_picture, open_captioned, read_pictures
from doralib.data.prepare import BadRow
from doralib.errors import UsageError
from doralib.evaluation.pictures import Drawing, draw_pictures
from doralib.files import read_json, read_tensors
from doralib.formats.base import Hints
from doralib.formats.files import read_any_format
from doralib.formats.pipeline import find_component
from doralib.recipe import DataSettings, DiffusionSettings, Recipe
from doralib.training.diffusion.families import FAMILIES, find_family, list_encoder_targets
from doralib.training.diffusion.model import TextToImage
from doralib.training.diffusion.noise import Diffusion, Flow
from doralib.training.diffusion.sizes import choose_size, list_sizes
from doralib.training.job import fine_tune, look_ahead, train

PARTS = {
    "sd15": {"unet", "text_encoder"},
    "sdxl": {"unet", "text_encoder", "text_encoder_2"},
    "sd3": {"transformer"},
    "flux": {"transformer"},
}
KINDS = ("sd15", "sdxl", "sd3", "flux")
SIZE = 16


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: (folder / kind, make_pipeline(kind, folder / kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures") / "shown")


def model_of(pipeline, kind, parts=(), **settings):
    family = next(each for each in FAMILIES if each.name == kind)
    chosen = {name: getattr(pipeline, name) for name in (family.network, *parts)}
    return TextToImage(family, pipeline, chosen, DiffusionSettings(**settings), "tiny")


def batch(count=3, channels=4, seed=1, dtype=torch.float64, shapes=((8, 8),)):
    torch.manual_seed(seed)
    return {
        "labels": [torch.rand(2, channels, *shapes[i % len(shapes)], dtype=dtype) for i in range(count)],
        "rows_B": torch.arange(100, 100 + count),
        "captions_B": torch.arange(count),
        "sizes_B6": torch.tensor([[20, 16, 3, 0, SIZE, SIZE]] * count),
        "prior_B": torch.zeros(count, dtype=torch.bool),
    }


def drawn(seed, like):
    """Latents, noise and the generator of one picture, as evaluation draws them: by the row's number."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(like.shape[1:], generator=generator).to(like)
    return like[0] + like[1] * normal(), normal(), generator


def conditions_of(pipeline, kind, captions):
    """By the pipeline's own encoders, as each pipeline's `__call__` asks them."""
    given = {"device": "cpu", "num_images_per_prompt": 1}
    if kind == "sd15":
        return (pipeline.encode_prompt(captions, **given, do_classifier_free_guidance=False)[0], None)
    if kind == "flux":
        return pipeline.encode_prompt(captions, None, **given)[:2]
    more = {"prompt_2": captions, "prompt_3": captions} if kind == "sd3" else {}
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, **more, **given, do_classifier_free_guidance=False)
    return embeds, pooled


def ask(pipeline, kind, noisy, time, embeds, pooled):
    """One picture through the network, as diffusers' own scripts call it."""
    time = torch.tensor([time])
    if kind == "sd15":
        return pipeline.unet(noisy[None], time, embeds[None]).sample[0]
    if kind == "sdxl":
        ids = torch.tensor([[20, 16, 3, 0, SIZE, SIZE]]).to(noisy)
        return pipeline.unet(
            noisy[None], time, embeds[None], added_cond_kwargs={"text_embeds": pooled[None], "time_ids": ids}
        ).sample[0]
    if kind == "sd3":
        return pipeline.transformer(noisy[None], embeds[None], pooled[None], time).sample[0]
    C, h, w = noisy.shape
    said = pipeline.transformer(
        pipeline._pack_latents(noisy[None], 1, C, h, w),
        embeds[None],
        pooled[None],
        time / 1000,
        pipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", noisy.dtype),
        torch.zeros(embeds.shape[0], 3).to(noisy),
        torch.tensor([3.5]).to(noisy),
    ).sample
    return pipeline._unpack_latents(said, 2 * h, 2 * w, 2)[0]


def alphas():
    """The product of 1 - beta, of the scaled linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def shifted(shift):
    """Sigmas of the flow, from 1 down."""
    sigma = torch.linspace(1, 1000, 1000, dtype=torch.float64).flip(0) / 1000
    return shift * sigma / (1 + (shift - 1) * sigma)


def plain_loss(pipeline, kind, given, prediction):
    captions = ["a cat", "a dog", "a dog 1"]
    embeds, pooled = conditions_of(pipeline, kind, captions)
    losses = []
    for i, like in enumerate(given["labels"]):
        x, noise, generator = drawn(100 + i, like)
        if kind in ("sd3", "flux"):
            normal = kind == "sd3"
            u = (
                torch.normal(0.0, 1.0, (1,), generator=generator).sigmoid()
                if normal
                else torch.rand(1, generator=generator)
            )
            sigma = shifted(3.0 if normal else 1.0)[int(u * 1000)]
            noisy, target, time = (1 - sigma) * x + sigma * noise, noise - x, float(sigma * 1000)
        else:
            time = int(torch.randint(1000, (1,), generator=generator))
            a = alphas()[time]
            noisy = a.sqrt() * x + (1 - a).sqrt() * noise
            target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x
        said = ask(pipeline, kind, noisy, time, embeds[i], None if pooled is None else pooled[i])
        losses.append((said - target).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("sd15", "epsilon"), ("sdxl", "epsilon"), ("sdxl", "v_prediction"), ("sd3", ""), ("flux", "")],
)
@torch.no_grad()
def test_loss_is_the_formula(kind, prediction, tmp_path):
    pipeline = make_pipeline(kind, tmp_path / "base", prediction or "epsilon", seed=3)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    model = model_of(pipeline, kind).eval()
    given = batch(channels=16 if kind == "sd3" else 4)
    conditions = model.encode(["a cat", "a dog", "a dog 1"])
    got = model(**given, conditions=conditions)["loss"]
    assert got.dtype == torch.float64
    # schedules are kept in float32 by diffusers
    torch.testing.assert_close(got, plain_loss(pipeline, kind, given, prediction), rtol=2e-5, atol=0)


def test_snr_weights():
    """min(SNR, gamma) of the error of the picture, by what the network says."""
    time = torch.tensor([0, 10, 300, 999])
    snr = alphas()[time] / (1 - alphas()[time])
    wanted = {
        "epsilon": snr.clamp(max=5) / snr,
        "v_prediction": snr.clamp(max=5) / (snr + 1),
        "sample": snr.clamp(max=5),
    }
    for kind, weight in wanted.items():
        noised = Diffusion(scheduler(kind), 5.0).add(torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2), time)
        torch.testing.assert_close(noised.weight_B.double(), weight, rtol=1e-4, atol=1e-7)
        assert torch.equal(
            Diffusion(scheduler(kind), None).add(*[torch.zeros(4, 1, 2, 2)] * 2, time).weight_B, torch.ones(4)
        )
    with pytest.raises(UsageError, match="prediction_type is flow_prediction"):
        Diffusion(SimpleNamespace(config={**scheduler("epsilon").config, "prediction_type": "flow_prediction"}), None)


def test_a_step_of_no_signal_has_a_weight():
    """With rescaled betas the last step has SNR 0, where min(SNR, gamma) / SNR is 1."""
    rescaled = type(scheduler("epsilon")).from_config({**scheduler("epsilon").config, "rescale_betas_zero_snr": True})
    noised = Diffusion(rescaled, 5.0).add(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.tensor([999]))
    assert noised.weight_B.tolist() == [1.0]


def scheduler(prediction):
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False
    )


@pytest.mark.parametrize("weighting", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_time_weightings_of_a_flow(weighting):
    from diffusers import FlowMatchEulerDiscreteScheduler

    flow = Flow(FlowMatchEulerDiscreteScheduler(), weighting)
    times = torch.cat([flow.draw_time(torch.Generator().manual_seed(i)) for i in range(400)])
    assert times.min() >= 0
    assert times.max() <= 999
    middle = ((times > 250) & (times < 750)).double().mean()
    assert (middle > 0.6) == (weighting in ("logit_normal", "mode"))
    noised = flow.add(torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([0, 500]))
    sigma = torch.tensor([1.0, 0.5])
    wanted = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))}
    torch.testing.assert_close(noised.weight_B, wanted.get(weighting, torch.ones(2)))


def test_a_mixed_batch_is_the_mean_of_its_pictures(bases):
    """Pictures of two shapes, in one batch or each alone: the same noise, by row, and the same loss."""
    model = model_of(bases["sdxl"][1], "sdxl").eval()
    given = batch(4, dtype=torch.float32, shapes=((8, 8), (4, 16)))
    with torch.no_grad():
        conditions = model.encode(["a", "b", "c", "d"])
        whole = model(**given, conditions=conditions)["loss"]
        each = [
            model(
                **{name: value[i : i + 1] for name, value in given.items()},
                conditions={name: value[i : i + 1] for name, value in conditions.items()},
            )["loss"]
            for i in range(4)
        ]
    torch.testing.assert_close(whole, torch.stack(each).mean())


def test_prior_preservation_adds_the_class(bases):
    model = model_of(bases["sd15"][1], "sd15", prior_weight=0.5).eval()
    given = batch(4, dtype=torch.float32)
    with torch.no_grad():
        conditions = model.encode(["a", "b", "cat", "cat"])
        loss = lambda rows: model(
            **{name: [value[i] for i in rows] if name == "labels" else value[rows] for name, value in given.items()},
            conditions={name: value[rows] for name, value in conditions.items()},
        )["loss"]
        own, prior = loss([0, 1]), loss([2, 3])
        given["prior_B"] = torch.tensor([False, False, True, True])
        torch.testing.assert_close(loss([0, 1, 2, 3]), own + 0.5 * prior)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_caption_dropout(kind, bases):
    """Of many pictures the share is as asked; SDXL sees zeros then, as its pipeline does where it is not guided."""
    pipeline = bases[kind][1]
    model = model_of(pipeline, kind, caption_dropout=0.3).train()
    torch.manual_seed(0)
    latents = torch.rand(2, 4, 2, 2)
    dropped = [model._draw(latents, seed).uncaptioned for seed in model._draw_seeds(1000)]
    assert abs(sum(dropped) / 1000 - 0.3) < 0.05
    assert not any(model.eval()._draw(latents, seed).uncaptioned for seed in range(100))
    with torch.no_grad():
        full = model.encode(["a cat", "a dog"])
        left = model._drop_captions(full, [False, True])
        empty = (
            {name: torch.zeros_like(value) for name, value in full.items()} if kind == "sdxl" else model.encode([""])
        )
    for name, value in left.items():
        assert torch.equal(value[0], full[name][0])
        torch.testing.assert_close(value[1], empty[name][-1], rtol=1e-5, atol=1e-6)


def test_noise_offset_is_the_same_over_a_channel(bases):
    model = model_of(bases["sd15"][1], "sd15", noise_offset=1.0)
    still = model_of(bases["sd15"][1], "sd15")
    latents = torch.rand(2, 4, 8, 8)
    offset = model._draw(latents, 5).noise_CHW - still._draw(latents, 5).noise_CHW
    assert offset.flatten(1).std(dim=1).max() < 1e-5
    assert offset.flatten(1).mean(dim=1).std() > 0.1


def test_buckets():
    family = FAMILIES[1]
    auto = list_sizes(DiffusionSettings(buckets="auto"), family)
    assert auto[0] == (1024, 1024)
    assert len(auto) == 11
    assert all(h % 16 == w % 16 == 0 and abs(h * w / 2**20 - 1) < 0.05 for h, w in auto)
    given = list_sizes(DiffusionSettings(buckets="64,128;128,64;96,96"), family)
    wide, tall, square = (Image.new("RGB", size) for size in ((300, 150), (10, 30), (50, 52)))
    assert [choose_size(each, given) for each in (wide, tall, square)] == [(64, 128), (128, 64), (96, 96)]
    for text, told in (("64x64", "Invalid bucket format"), ("60,64", "multiples of 8")):
        with pytest.raises(UsageError, match=told):
            list_sizes(DiffusionSettings(buckets=text), family)
    with pytest.raises(UsageError, match="flux takes multiples of 16"):
        list_sizes(DiffusionSettings(resolution=24), FAMILIES[3])


def test_a_picture_is_cut_to_its_middle():
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (10, 0, 30, 20))
    fitted = fit_picture(picture, (16, 16))
    assert fitted.sizes == [20, 40, 0, 8, 16, 16]
    assert torch.equal(fitted.pixels_CHW[:, 8, 8], torch.tensor([-1.0, -1.0, 1.0]))
    assert torch.equal(fitted.pixels_CHW[:, 8, 1], torch.tensor([-1.0, -1.0, 1.0]))


def test_where_a_picture_is_transparent_it_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_captioned({"picture": str(tmp_path / "a.png")}).getpixel((1, 1)) == (255, 255, 255)
    (tmp_path / "b.png").write_bytes(b"no picture")
    for path, told in (("b.png", "b.png: cannot identify"), ("c.png", "there is no file")):
        with pytest.raises(BadRow, match=told):
            open_captioned({"picture": str(tmp_path / path)})


def captions_of(rows):
    return [row["caption"] for row in rows]


def test_where_captions_come_from(tmp_path):
    folder = make_pictures(tmp_path / "p", 3)
    (folder / "1.txt").unlink()
    rows = read_pictures(DataSettings(train=str(folder), instance_prompt="TOK"), 0).train
    assert captions_of(rows) == ["a dog 0", "TOK", "a dog 2"]
    lines = [{"file_name": f"{i}.png", "text": f"number {i}", "kind": "square"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = lambda **more: read_pictures(DataSettings(train=str(folder), **more), 0)
    assert captions_of(read().train) == ["number 0", "number 1", "number 2"]
    assert captions_of(read(prompt="a {kind}, {text}").train)[1] == "a square, number 1"
    assert open_captioned(read().train[2]).size == (20, 16)
    held = read(validation=0.34)
    assert len(held.train) == 2
    assert len(held.validation) == 1
    with pytest.raises(UsageError, match="no column 'titel'"):
        read(prompt="{titel}")
    with pytest.raises(UsageError, match=r"data.target: pictures have captions"):
        read(target="label")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"image": f"p/{i}.png", "caption": f"c{i}"}) for i in range(2)))
    assert open_captioned(read_pictures(DataSettings(train=str(rows)), 0).train[1]).size == (20, 16)
    rows.write_text(json.dumps({"image": "/"}))
    assert captions_of(read_pictures(DataSettings(train=str(rows), instance_prompt="TOK"), 0).train) == ["TOK"]


def test_pictures_inside_rows(tmp_path):
    """A hub data set holds the files themselves."""
    import datasets

    made = datasets.Dataset.from_dict({"image": [Image.new("RGB", (6, 4))] * 2, "prompt": ["3d icon", "a 3dicon"]})
    made.cast_column("image", datasets.Image()).to_parquet(tmp_path / "train.parquet")
    rows = read_pictures(DataSettings(train=str(tmp_path / "train.parquet")), 0).train
    assert captions_of(rows) == ["3d icon", "a 3dicon"]
    assert open_captioned(rows[0]).size == (6, 4)


@pytest.fixture
def recipe(bases, pictures, tmp_path):
    def make(kind="sdxl", out="run", **groups):
        given = {
            "model": {"path": str(bases[kind][0])},
            "data": {"train": str(pictures)},
            "adapter": {"r": 2, "lora_alpha": 4},
            "diffusion": {"resolution": SIZE, "sample_steps": 2},
            "training": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.02, "save_steps": 2},
        }
        for name, group in groups.items():
            given[name] = {**given.get(name, {}), **group}
        given["training"] = {"logging_steps": 1, **given["training"]}
        return Recipe(**given, out=str(tmp_path / out))

    return make


def draw(pipeline, seed=1):
    drawing = Drawing(steps=2, size=(SIZE, SIZE), seed=seed)
    return torch.from_numpy(np.asarray(draw_pictures(pipeline, ["a cat 1"], drawing)[0]).copy())


@pytest.mark.parametrize(
    "kind", ["sdxl", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("sd15", "sd3", "flux"))]
)
def test_a_run_and_its_files(kind, recipe, bases):
    """From pictures to a report; diffusers reads the same numbers from our file, and draws what we draw."""
    import diffusers

    encoders = kind in ("sd15", "sdxl")
    run = train(recipe(kind, diffusion={"text_encoders": encoders, "sample_prompts": ("a red cat",)}))
    samples = read_json(run / "samples.json", list)
    assert [each["prompt"] for each in samples][:2] == ["a red cat", "a dog 0"]
    assert set(samples[0]) == {"prompt", "expected", "given", "before", "step 2", "after"}
    assert samples[0]["before"] != samples[0]["after"]
    page = (run / "report.html").read_text()
    assert "What it draws" in page
    assert page.count("<img") == 5 * 3 + 4
    assert "Pictures per second" in page
    assert "pipeline_tag: text-to-image" in (run / "README.md").read_text()

    ours = load_adapted_pipeline(str(run), find_pipeline(str(run)))

    def load_pipeline():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(bases[kind][0], **_without_t5(kind)).to("cpu")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    theirs = load_pipeline()
    plain = draw(theirs)
    theirs.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
    state = read_any_format(run, Hints())[1].state
    assert {find_component(name) for name in state.layers} == PARTS[kind]
    for name, layer in state.layers.items():
        part, _, inside = name.partition(".")
        theirs_too = getattr(theirs, part).get_submodule(inside)
        assert torch.equal(theirs_too.lora_A["default_0"].weight, layer.a_RI)
        assert torch.equal(theirs_too.lora_B["default_0"].weight, layer.b_OR)
        assert torch.equal(theirs_too.lora_magnitude_vector["default_0"].weight, layer.m_O)
        assert theirs_too.scaling["default_0"] == layer.scale == 2
    # two orders of the same sums, and from the same layers the same bits
    assert (draw(ours).int() - draw(theirs).int()).abs().max() <= 2
    assert draw(inject_by_peft(load_pipeline(), state.layers)).equal(draw(theirs))
    assert (draw(theirs).int() - plain.int()).abs().max() > 10


def inject_by_peft(pipeline, layers):
    """A pipeline with PEFT's own layers, which get the numbers one by one and read no file."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed here")
    for part in {find_component(name) for name in layers}:
        inside = {name.partition(".")[2]: layer for name, layer in layers.items() if name.startswith(f"{part}.")}
        first = next(iter(inside.values()))
        config = peft.LoraConfig(r=len(first.a_RI), lora_alpha=len(first.a_RI), use_dora=True, target_modules=[*inside])
        network = peft.inject_adapter_in_model(config, getattr(pipeline, part), "ours")
        for name, layer in inside.items():
            theirs = network.get_submodule(name)
            theirs.lora_A["ours"].weight.data.copy_(layer.a_RI)
            theirs.lora_B["ours"].weight.data.copy_(layer.b_OR)
            theirs.lora_magnitude_vector["ours"].weight.data.copy_(layer.m_O)
            theirs.scaling["ours"] = layer.scale
    return pipeline


def _without_t5(kind):
    return {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}


@pytest.mark.long
def test_a_resumed_run_is_the_same_run(recipe):
    asked = {"diffusion": {"caption_dropout": 0.3, "noise_offset": 0.1, "snr_gamma": 5.0}}
    asked["eval"] = {"before": False}
    whole = fine_tune(recipe(out="whole", **asked))
    cut = fine_tune(recipe(out="cut", **asked))
    (cut / "adapter_model.safetensors").unlink()
    for folder in sorted((cut / "checkpoints").glob("checkpoint-*")):
        if folder.name != "checkpoint-2":
            shutil.rmtree(folder)
    fine_tune(recipe(out="cut", **asked), resume=True)
    one, other = (read_tensors(run / "adapter_model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = lambda run: [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses(whole) == losses(cut)
    assert len(losses(cut)) == 4


def test_another_picture_is_another_run(recipe, tmp_path):
    folder = make_pictures(tmp_path / "shown")
    asked = {"data": {"train": str(folder)}, "eval": {"before": False}, "training": {"max_steps": 1, "save_steps": 1}}
    fine_tune(recipe(**asked))
    Image.new("RGB", (20, 16), "white").save(folder / "2.png")
    with pytest.raises(UsageError, match="the file of pictures and captions is not the one that this run began with"):
        fine_tune(recipe(**asked), resume=True)


def test_looking_ahead_needs_no_weights(recipe):
    outlook = look_ahead(recipe(diffusion={"text_encoders": True}))
    assert outlook.facts["rows"] == "4 of 4"
    assert outlook.facts["sizes"] == "16 x 16 pixels"


def test_what_does_not_go_together(recipe, tmp_path):
    for kind, group, told in (
        ("sd3", {"snr_gamma": 5.0}, "snr_gamma is for models that learn noise"),
        ("sdxl", {"time_weighting": "mode"}, "time_weighting is for models that learn flow"),
        ("sdxl", {"class_images": "there"}, "class_images goes with diffusion.class_prompt"),
        ("sdxl", {"resolution": 20}, "20 x 20 pixels: sdxl takes multiples of 8"),
    ):
        with pytest.raises(UsageError, match=told):
            fine_tune(recipe(kind, diffusion=group))
    with pytest.raises(UsageError, match="is a KandinskyPipeline, and those that can be trained are"):
        find_family({"_class_name": "KandinskyPipeline"}, "there")
    with pytest.raises(UsageError, match="without a caption"):
        fine_tune(recipe(data={"train": str(make_pictures(tmp_path / "bare", captions=False))}))


@pytest.mark.long
def test_class_pictures_are_drawn_by_the_base_and_kept(recipe, tmp_path):
    kept = tmp_path / "class"
    asked = {"class_prompt": "a dog", "class_images": str(kept), "num_class_images": 3}
    quick = {"training": {"max_steps": 1}, "eval": {"before": False}}
    fine_tune(recipe(diffusion=asked, **quick))
    assert [file.name for file in sorted(kept.iterdir())] == ["00000.png", "00001.png", "00002.png"]
    before = (kept / "00001.png").read_bytes()
    (kept / "00002.png").unlink()
    run = fine_tune(recipe(out="again", diffusion=asked, **quick))
    assert (kept / "00001.png").read_bytes() == before
    assert (kept / "00002.png").is_file()
    assert read_json(run / "summary.json")["tokens"] == 4  # two pictures, and one of the class beside each


def test_adapting_a_pipeline_starts_as_the_base(bases):
    _, pipeline = bases["sd15"]
    model = model_of(pipeline, "sd15").eval()
    given = batch(2, dtype=torch.float32)
    with torch.no_grad():
        conditions = model.encode(["a", "b"])
        before = model(**given, conditions=conditions)["loss"]
        adapt(model, {"r": 2, "target_modules": ["to_q", "to_out.0", "conv1"]})
        assert torch.equal(model(**given, conditions=conditions)["loss"], before)


def test_new_tokens_are_learned_and_written(recipe, bases):
    """Pivotal tuning: rows of both encoders, held still from half of the training on, as diffusers loads them."""
    import diffusers

    asked = {
        "model": {"new_tokens": ("<s0>", "<s1>")},
        "data": {"prompt": None, "instance_prompt": "icon of <s0><s1>"},
        "diffusion": {"new_tokens_share": 0.5, "text_encoder_lr_ratio": 0.5},
        "training": {"logging_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_total_limit": 9},
    }
    asked["data"]["train"] = str(make_pictures(bases["sdxl"][0].parent / "bare", captions=False))
    run = fine_tune(recipe(**asked))
    rows = read_tensors(run / "run_emb.safetensors")
    assert {name: tuple(value.shape) for name, value in rows.items()} == {"clip_l": (2, 16), "clip_g": (2, 16)}
    kept = [read_tensors(run / f"checkpoints/checkpoint-{step}/adapter.safetensors") for step in (2, 4)]
    deltas = [name for name in kept[0] if name.endswith("trainable_tokens_delta")]
    assert len(deltas) == 2
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in deltas)
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    drawing = Drawing(steps=2, size=(SIZE, SIZE))
    ours = load_adapted_pipeline(str(run), find_pipeline(str(run)))
    theirs = diffusers.DiffusionPipeline.from_pretrained(bases["sdxl"][0])
    theirs.set_progress_bar_config(disable=True)
    for name, key in (("", "clip_l"), ("_2", "clip_g")):
        parts = {
            "text_encoder": getattr(theirs, f"text_encoder{name}"),
            "tokenizer": getattr(theirs, f"tokenizer{name}"),
        }
        theirs.load_textual_inversion(rows[key], token=["<s0>", "<s1>"], **parts)
    theirs.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
    one, other = (np.asarray(draw_pictures(each, ["icon of <s0><s1>"], drawing)[0], int) for each in (ours, theirs))
    assert abs(one - other).max() <= 2
    with pytest.raises(UsageError, match=r"'<s2>' stands in no caption, such as 'icon of <s0><s1>'"):
        fine_tune(recipe(**asked | {"model": {"new_tokens": ("<s2>",)}}, out="other"))


def test_rates_of_text_encoders(bases):
    model = model_of(bases["sd15"][1], "sd15", ("text_encoder",), text_encoder_lr_ratio=0.25)
    assert model.find_rate_ratio("unet.conv_in.weight") == 1
    assert model.find_rate_ratio("text_encoder.encoder.layers.0.self_attn.q_proj.lora_A") == 0.25


@pytest.mark.long
def test_prodigy(recipe):
    pytest.importorskip("prodigyopt", reason="prodigyopt is not installed here")
    run = fine_tune(recipe(training={"optim": "prodigy", "learning_rate": 1.0, "max_steps": 3, "save_steps": 3}))
    assert read_json(run / "summary.json")["status"] == "finished"
    group = torch.load(run / "checkpoints/checkpoint-3/optimizer.pt", weights_only=True)["param_groups"][0]
    assert group["decouple"]
    assert group["safeguard_warmup"]
    assert group["d"] > 0


@pytest.mark.long
def test_a_validation_picture_has_the_same_noise_each_time(recipe):
    """Its loss is the same for any batch size, and before and after a step of size zero."""
    asked = {"data": {"validation": 0.5}, "training": {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-12}}
    losses = []
    for batch_size in (1, 2):
        more = {**asked["training"], "per_device_eval_batch_size": batch_size}
        run = fine_tune(recipe(out=f"run{batch_size}", **asked | {"training": more}, eval={"before": False}))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses += [line["eval_loss"] for line in lines if line["kind"] == "eval"]
    assert len(losses) == 4
    assert max(losses) - min(losses) < 1e-5


def test_what_nothing_sees_of_a_text_encoder_is_not_adapted(bases):
    """SDXL takes the last layer but one of its first encoder, and of the second the last too."""
    wanted = {"sdxl": {"text_encoder": 1, "text_encoder_2": 2}, "sd15": {"text_encoder": 2}}
    for kind, layers in wanted.items():
        family = next(each for each in FAMILIES if each.name == kind)
        found = list_encoder_targets(model_of(bases[kind][1], kind, family.encoders), family)
        assert {part: sum(name.startswith(f"{part}.") for name in found) for part in layers} == {
            part: 4 * count for part, count in layers.items()
        }


def test_a_network_in_four_bits(tmp_path):
    """NF4, as a GPU would load it: diffusers itself quantizes only there."""
    bnb = pytest.importorskip("bitsandbytes")
    pipeline = make_pipeline("flux", tmp_path / "base")
    network = pipeline.transformer
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.Linear) and "blocks" in name:
            made = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, quant_type="nf4")
            made.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, made.to("cpu"))
    model = model_of(pipeline, "flux").train()
    conditions = model.encode(["a cat", "a dog"])
    adapt(model, {"r": 2, "target_modules": ["attn.to_q", "ff.net.2"]})
    given = batch(2, dtype=torch.float32)
    model(**given, conditions=conditions)["loss"].backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.long
def test_two_processes_see_the_noise_of_one(recipe, tmp_path):
    """One row each is two rows of one process: the same pictures, noise, time steps and dropped captions."""
    asked = {"diffusion": {"caption_dropout": 0.3}, "eval": {"before": False}}
    alone = recipe(out="alone", **asked)
    shared = recipe(out="shared", **asked, training={**alone.training, "per_device_train_batch_size": 1})
    runs = []
    for each, processes in ((alone, 1), (shared, 2)):
        file = tmp_path / f"{processes}.yaml"
        file.write_text(each.to_yaml())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*command, "-m", "doralib", "train", str(file)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(read_tensors(Path(each.out) / "adapter_model.safetensors"))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-5)
