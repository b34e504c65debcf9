"""A tiny pipeline of SDXL's shape that draws flat icons by their names, made once on a CPU; and icons for DreamBooth.

    python benchmarks/tiny_sdxl.py --out tiny-sdxl --icons icons [--steps N] [--names N] [--threads N]

No weights of a diffusion model install from a registry, so this one is trained: two CLIP text encoders, a VAE (32
pixels to 16 x 16 x 4) and a U-Net of some five million parameters, on the Noto icons of npm's emoji-datasource-google
(Apache-2.0 art). 6,000 steps take two hours on one core of an AMD EPYC, one on an Intel Xeon; nearly every icon can
then be told. Every 500 steps the pipeline is written again, with pictures.png beside it: look at them. The same command
goes on where the last such writing was.

--icons gets the other side of the experiment, from npm's @lobehub/fluent-emoji-3d (MIT): `train/`, 23 icons with
captions "3d icon of NAME", as many as linoyts/3d_icon has; `valid/`, 20 more to choose rates by; `true/`, the 3D
icons of 40 other names, and `flat/`, the Noto icons of these; and `recipe.yaml`. benchmarks/score_icons.py scores runs.
"""

import argparse
import io
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from doralib.cli.demo_fetch import Package, fetch_package, read_members
from doralib.cli.demo_vision import EMOJI
from doralib.data.captioned import fit_picture
from doralib.disk import replacing
from doralib.evaluation.pictures import Drawing, draw_pictures, join_pictures
from doralib.files import write_json
from doralib.recipe import DiffusionSettings
from doralib.training.diffusion.families import FAMILIES
from doralib.training.diffusion.model import TextToImage

FLUENT = Package(
    "@lobehub/fluent-emoji-3d@1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    16_600_000,
    "the same icons in three dimensions",
    source="npm",
)
# concrete things, in this order until there are enough
GROUPS = (
    *("animal-mammal", "animal-bird", "animal-reptile", "animal-marine", "animal-bug", "animal-amphibian"),
    *("food-fruit", "food-vegetable", "food-sweet", "food-prepared", "drink", "plant-flower", "plant-other"),
    *("transport-ground", "transport-air", "transport-water", "musical-instrument", "tool", "sport", "sky & weather"),
)
PIXELS, TOKENS, CAPTIONS = 32, 16, ("{}", "icon of {}", "a picture of {}")
TRAINED, HELD_OUT, VALID = 23, 40, 20
_STATE = "state.pt"


def read_icons(cache, count):
    """Names, flat pictures and 3D pictures by code point, of the things that both packages have."""
    files = dict(
        read_members(fetch_package(EMOJI, cache), lambda n: n.endswith("emoji.json") or "/img/google/64/" in n)
    )
    solid = {
        Path(name).stem: data
        for name, data in read_members(fetch_package(FLUENT, cache), lambda n: n.endswith((".webp", ".png")))
    }
    rows = json.loads(next(data for name, data in files.items() if name.endswith("emoji.json")))
    flat = {Path(name).name: data for name, data in files.items() if name.endswith(".png")}
    rows = [row for row in rows if row["subcategory"] in GROUPS and row["name"] and row["image"] in flat]
    rows.sort(key=lambda row: (GROUPS.index(row["subcategory"]), row["sort_order"]))
    found = {}
    for row in rows:
        stem = Path(row["image"]).stem
        other = next((solid[each] for each in (stem, stem.removesuffix("-fe0f")) if each in solid), None)
        name = row["name"].lower()
        if other is not None and name not in found:
            found[name] = (flat[row["image"]], other)
    return dict(list(found.items())[:count])


def open_icon(data):
    """An icon on white."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def make_tokenizer(names, folder):
    """A tokenizer of CLIP's kind for the words of the names."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        end_of_word_suffix="</w>",
        initial_alphabet=[chr(i) for i in range(33, 127)],
        show_progress=False,
    )
    words.train_from_iterator([*names, "3d icon of in the style a picture of tok"] * 2, trainer)
    said = json.loads(words.to_str())["model"]
    # every sign may stand alone and at the end of a word
    tokens = dict.fromkeys([*map(chr, range(33, 127)), *(f"{chr(i)}</w>" for i in range(33, 127)), *said["vocab"]])
    tokens |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges = [each if isinstance(each, str) else " ".join(each) for each in said["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def make_pipeline(tokenizer):
    """The pipeline with random weights."""
    count, width = len(tokenizer), 64
    config = CLIPTextConfig(
        vocab_size=count,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=count - 2,
        eos_token_id=count - 1,
        pad_token_id=count - 1,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=PIXELS // 2,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=(2, 3, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        cross_attention_dim=2 * width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + width,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PIXELS,
        force_upcast=False,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    return diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**noise, steps_offset=1),
        add_watermarker=False,
    )


def train_vae(vae, pixels_BCHW, steps):
    """Let the VAE draw what it was shown, and say how large its latents are."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        shown = pixels_BCHW[torch.randint(len(pixels_BCHW), (32,))]
        found = vae.encode(shown).latent_dist
        drawn = vae.decode(found.sample()).sample
        loss = F.l1_loss(drawn, shown) + F.mse_loss(drawn, shown) + 1e-5 * found.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"vae {step}/{steps}  loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        found = torch.cat([vae.encode(each).latent_dist.mean for each in pixels_BCHW.split(64)])
    vae.register_to_config(scaling_factor=1 / found.std().item())
    vae.eval().requires_grad_(False)


@dataclass
class Training:
    """What a step changes, kept in a file so that the next call goes on from it."""

    model: TextToImage
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    mean: EMAModel
    loss: float = 1.0
    step: int = 0

    def write(self, file):
        """Write the file."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule", "mean")}
        state |= {"loss": self.loss, "step": self.step, "random": torch.get_rng_state()}
        with replacing(file) as part:
            torch.save(state, part)

    def read(self, file):
        """Go on as the file says, if it is there."""
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        for name in ("model", "optimizer", "schedule", "mean"):
            getattr(self, name).load_state_dict(state[name])
        self.loss, self.step = state["loss"], state["step"]
        torch.set_rng_state(state["random"])
        print(f"going on from step {self.step}", flush=True)


def train_network(pipeline, names, pixels_BCHW, options):
    """Let U-Net and text encoders learn what each name looks like; keep a running mean of their weights."""
    family = next(each for each in FAMILIES if each.name == "sdxl")
    parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    settings = DiffusionSettings(caption_dropout=0.1, snr_gamma=5.0)
    model = TextToImage(family, pipeline, parts, settings, "tiny-sdxl").train()
    with torch.no_grad():
        found = [pipeline.vae.encode(each[None]).latent_dist for each in pixels_BCHW]
    scale = pipeline.vae.config.scaling_factor
    latents = [torch.stack([each.mean[0] * scale, each.std[0] * scale]) for each in found]
    model.captions = [form.format(name) for name in names for form in CAPTIONS]
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.05)
    mean = EMAModel(trained, decay=0.998, use_ema_warmup=True, power=0.75)
    training = Training(model, optimizer, schedule, mean)
    training.read(options.out / _STATE)
    first, begun = training.step, time.perf_counter()
    while training.step < options.steps:
        rows = torch.randint(len(names), (options.batch,))
        loss = model(
            [latents[i] for i in rows.tolist()],
            rows,
            rows * len(CAPTIONS) + torch.randint(len(CAPTIONS), rows.shape),
            torch.tensor([[64, 64, 0, 0, PIXELS, PIXELS]] * len(rows)),
            torch.zeros(len(rows), dtype=torch.bool),
        )["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        mean.step(trained)
        training.step, training.loss = training.step + 1, 0.98 * training.loss + 0.02 * loss.item()
        if training.step % 100 == 0:
            speed = (training.step - first) / (time.perf_counter() - begun)
            left = f"{speed:.2f} steps/s, {(options.steps - training.step) / speed / 60:.0f} minutes to go"
            print(f"step {training.step}/{options.steps}  loss {training.loss:.4f}  {left}", flush=True)
        if training.step % options.every == 0 or training.step == options.steps:
            mean.store(trained)
            mean.copy_to(trained)
            show(pipeline, names, options.out)
            mean.restore(trained)
            training.write(options.out / _STATE)
    mean.copy_to(trained)


def show(pipeline, names, out):
    """Write the pipeline, and what it draws of 32 names."""
    pipeline.save_pretrained(out)
    drawing = Drawing(steps=25, guidance=3.0, size=(PIXELS, PIXELS))
    shown = list(names)[:: max(1, len(names) // 32)][:32]
    drawn = draw_pictures(pipeline, shown, drawing)
    join_pictures([each.resize((96, 96)) for each in drawn], 8).save(out / "pictures.png")
    write_json(out / "names.json", list(names))


def write_icons(icons, folder, base):
    """Icons to learn the style from, others to be compared with, and the recipe that learns."""
    names = sorted(icons)
    random.Random(0).shuffle(names)
    rest = names[TRAINED + HELD_OUT :][:VALID]
    for part, chosen in (("train", names[:TRAINED]), ("true", names[TRAINED:][:HELD_OUT]), ("valid", rest)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in chosen:
            picture = open_icon(icons[name][1]).resize((64, 64), Image.Resampling.LANCZOS)
            picture.save(folder / part / f"{name.replace(' ', '_')}.png")
            if part != "true":
                (folder / part / f"{name.replace(' ', '_')}.txt").write_text(f"3d icon of {name}")
            else:
                (folder / "flat").mkdir(exist_ok=True)
                open_icon(icons[name][0]).save(folder / "flat" / f"{name.replace(' ', '_')}.png")
    write_json(folder / "held_out.json", names[TRAINED:][:HELD_OUT])
    (folder / "recipe.yaml").write_text(f"""\
model: {{path: {base.absolute()}, kind: text-to-image, dtype: float32}}
data: {{train: {folder.absolute() / "train"}, validation: {folder.absolute() / "valid"}}}
adapter:
  r: 4
  lora_alpha: 4
  init_lora_weights: gaussian
  # with attention alone nobody can tell what is drawn
  target_modules: [to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, proj_in, proj_out, conv1, conv2]
diffusion: {{resolution: {PIXELS}, snr_gamma: 5.0, sample_prompts: ["3d icon of {names[TRAINED]}"]}}
training:
  max_steps: 300
  per_device_train_batch_size: 4
  learning_rate: 3.0e-4
  lr_scheduler_type: constant
  warmup_steps: 0
  eval_strategy: steps
  eval_steps: 100
  save_steps: 100
out: runs/icons
""")


def main():
    """Make both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-sdxl"))
    parser.add_argument("--icons", type=Path, default=Path("icons"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "doralib")
    parser.add_argument("--names", type=int, default=300)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--vae-steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=500, help="steps between two writings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    icons = read_icons(options.cache, options.names)
    write_icons(icons, options.icons, options.out)
    pixels = torch.stack([fit_picture(open_icon(flat), (PIXELS, PIXELS)).pixels_CHW for flat, _ in icons.values()])
    options.out.mkdir(parents=True, exist_ok=True)
    begun = (options.out / _STATE).is_file()
    if begun:
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(options.out, add_watermarker=False)
        pipeline.vae.eval().requires_grad_(False)
    else:
        pipeline = make_pipeline(make_tokenizer(icons, options.out / "words"))
    pipeline.set_progress_bar_config(disable=True)
    counts = {
        name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in ("unet", "vae", "text_encoder")
    }
    print(f"{len(icons)} icons; parameters: {counts}", flush=True)
    if not begun:
        train_vae(pipeline.vae, pixels, options.vae_steps)
    train_network(pipeline, icons, pixels, options)


if __name__ == "__main__":
    main()
