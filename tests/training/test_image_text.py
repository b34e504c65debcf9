"""A model that takes pictures, from a folder of photos with a table of questions to answers, reports and files."""

import json
import re
from dataclasses import replace

import peft
import pytest
import torch
import transformers

pytest.importorskip("PIL", reason="pictures are read by pillow")
from films import write_video
from PIL import Image
from seeing_models import ALONE, WITH_TORCHVISION, build
from visual_folders import make_video_folder

from doralib.adapters.load import load_adapter
from doralib.adapters.param_groups import learning_rates
from doralib.adapters.registry import config_of
from doralib.adapters.towers import find_parts
from doralib.checkpoints.load import load_model
from doralib.checkpoints.merge import merge_checkpoint
from doralib.checkpoints.models import load_image_text
from doralib.cli.chat import Chat
from doralib.data.picture_encoder import PictureEncoder, make_encoder
from doralib.data.picture_rows import ask_with_pictures, find_layout, read_picture_row
from doralib.data.pictures import Picture
from doralib.data.videos import Video
from doralib.errors import DoraError, UsageError
from doralib.evaluation.evaluate import evaluate
from doralib.evaluation.generation import Answer, answer_pictures
from doralib.evaluation.likelihood import score_options
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task_file import KINDS, load_tasks
from doralib.evaluation.visual import read_choice
from doralib.recipe import DataSettings, ModelSettings, Recipe
from doralib.runs.report import write_report
from doralib.training.job import fine_tune
from doralib.training.sampler import SortedSampler, count_rows

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 180, 20)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A stranger's folder: photos and a table of questions, one of them about a photo that is not there."""
    folder = tmp_path_factory.mktemp("photos")
    lines = ["photo,question,answer"]
    for i in range(24):
        name = list(COLORS)[i % 3]
        Image.new("RGB", (30 + i, 40), COLORS[name]).save(folder / f"{i}.jpg")
        lines.append(f"{i}.jpg,What color is it?,{name}")
    lines.append("lost.jpg,What color is it?,red")
    (folder / "questions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "base"
    model, processor = build(ALONE["llava"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def recipe(base, photos, out, **changes):
    values = {
        "model": {"path": str(base)},
        "data": {"train": str(photos / "questions.csv"), "validation": 0.25, "max_length": 128},
        "adapter": {"r": 4},
        "training": {
            "max_steps": 40,
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 9,
            "save_steps": 20,
            "logging_steps": 1,
        },
        "out": str(out),
    }
    for group, given in changes.items():
        values[group] = {**values.get(group, {}), **given} if isinstance(given, dict) else given
    return Recipe(**values)


@pytest.fixture(scope="module")
def trained(base, photos, tmp_path_factory):
    whole = {"modules_to_save": ["multi_modal_projector"]}
    return fine_tune(recipe(base, photos, tmp_path_factory.mktemp("run") / "run", adapter=whole))


def look(model, processor, picture, question="What color is it?"):
    """Logits behind a question about a picture."""
    encoder = PictureEncoder(processor, 448)
    inputs = encoder.call([encoder.ask(ask_with_pictures(question, [Picture(str(picture))]))])
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_the_files_of_a_run(trained, photos):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.85 * losses[0]  # the head is frozen and random
    samples = json.loads((trained / "samples.json").read_text())
    assert len(samples) == 5
    assert {sample["prompt"] for sample in samples} == {"What color is it?"}
    assert all(sample["expected"] in COLORS and "before" in sample and "after" in sample for sample in samples)
    assert json.loads((trained / "doralib_prompt.json").read_text()) == {
        "style": "chat",
        "prompt": "question",
        "fields": ["question"],
        "joined": False,
        "pictures": True,
        "image_pixels": 448,
        "video_frames": 8,
    }
    page = write_report(trained, figures=False).read_text()
    assert len(re.findall(r'<img src="data:image/webp;base64,[\w+/=]+"', page)) == 5
    assert len(page) < 3_000_000
    data = json.loads((trained / "data.json").read_text())
    assert data["splits"]["validation"]["dropped"] == {"without its picture": 1}
    assert data["splits"]["train"]["num_twice"] == 0  # other pictures, the same words
    assert any("<image> x 4" in text for text, _ in data["shown"][0]["pieces"])


def test_every_door_opens_onto_the_same_model(trained, base, photos, tmp_path):
    model, processor = load_model(str(trained))
    assert type(processor).__name__ == "LlavaProcessor"
    want = look(model, processor, photos / "1.jpg")
    plain = load_image_text(ModelSettings(path=str(base)))[0]
    assert not torch.allclose(look(plain, processor, photos / "1.jpg"), want, atol=1e-2)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForImageTextToText.from_pretrained(base), trained)
    torch.testing.assert_close(look(theirs, processor, photos / "1.jpg"), want, atol=1e-4, rtol=1e-3)
    merge_checkpoint(trained, base, tmp_path / "merged")
    merged, own = load_model(str(tmp_path / "merged"))
    assert type(merged) is transformers.LlavaForConditionalGeneration
    torch.testing.assert_close(look(merged, own, photos / "1.jpg"), want, atol=1e-4, rtol=1e-3)


def test_a_run_that_was_cut_goes_on_as_if_nothing_had_been(base, photos, trained, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    for name in ("adapter_model.safetensors", "samples.json", "summary.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-40")
    whole = {"modules_to_save": ["multi_modal_projector"]}
    fine_tune(recipe(base, photos, tmp_path / "run", adapter=whole), resume=True)
    read = lambda run: peft.utils.load_peft_weights(str(run), device="cpu")
    for (name, value), other in zip(
        sorted(read(trained).items()), dict(sorted(read(tmp_path / "run").items())).values(), strict=True
    ):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-5, msg=name)


def test_the_language_model_is_adapted_unless_another_part_is_named(base, photos, tmp_path, caplog):
    model = load_image_text(ModelSettings(path=str(base)))[0]
    assert find_parts(model) == {
        "language model": "model.language_model",
        "vision tower": "model.vision_tower",
        "projector": "model.multi_modal_projector",
    }
    short = {"max_steps": 1}
    with pytest.raises(UsageError) as told:
        fine_tune(
            recipe(base, photos, tmp_path / "a", adapter={"target_modules": ["q_proj", "v_proj"]}, training=short)
        )
    said = str(told.value)
    assert "4 in the language model (model.language_model), 6 in the vision tower (model.vision_tower)" in said
    pattern = re.search(r"set it to '(.*)'", said)[1]
    run = fine_tune(recipe(base, photos, tmp_path / "b", adapter={"target_modules": pattern}, training=short))
    load_adapter(model, run)
    layers = {name.partition(".lora_A")[0] for name, p in model.named_parameters() if ".lora_A" in name}
    assert len(layers) == 4
    assert all(name.startswith("model.language_model.") for name in layers)
    assert config_of(model).target_modules is not None


def test_the_projector_has_a_rate_of_its_own(trained, base):
    model = load_image_text(ModelSettings(path=str(base)))[0]
    load_adapter(model, trained)
    for p in model.parameters():
        p.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or ".trained." in name)
    rates = learning_rates(model, config_of(model), 2e-4, 2e-5)
    names = {id(p): name for name, p in model.named_parameters()}
    whole = {names[id(p)] for p, rate in rates.items() if rate == 2e-5}
    assert len(whole) == 4
    assert all(name.startswith("model.multi_modal_projector") for name in whole)


def test_rows_of_two_kinds_never_share_a_batch():
    kinds, lengths = [1] * 13 + [0] * 6, [*range(13), *range(6)]
    for grouped in (False, True):
        sampler = SortedSampler(lengths, kinds, 4, 7, grouped=grouped)
        order = list(sampler)
        assert len(order) == len(sampler) == count_rows(kinds, 4) == 24
        assert set(order) == set(range(19))
        batches = [order[at : at + 4] for at in range(0, 24, 4)]
        assert all(len({kinds[i] for i in batch}) == 1 for batch in batches)
        assert 12 in batches[0]  # the longest of those with pictures
        assert list(sampler) == order
        sampler.set_epoch(1)
        assert list(sampler) != order


def test_rows_with_and_without_pictures_train_together(base, photos, tmp_path):
    talk = lambda words, answer: [{"role": "user", "content": words}, {"role": "assistant", "content": answer}]
    rows = [{"images": [f"{i}.jpg"], "messages": talk("what?", "red")} for i in range(5)]
    rows += [
        {"images": [f"{i}.jpg", f"{i + 1}.jpg"], "messages": talk("what are they?", "red, blue")} for i in range(2)
    ]
    rows += [{"images": [], "messages": talk("what is blue?", "a color")} for _ in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "validation": 0.2, "root": str(photos)}
    steps = {
        "max_steps": -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "save_steps": 1.0,
        "eval_strategy": "epoch",
    }
    run = fine_tune(recipe(base, photos, tmp_path / "run", data=data, training=steps))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train_rows"] == 8
    assert summary["steps"] in (4, 5)
    assert summary["status"] == "finished"


def make_task(kind, data, **settings):
    given = {"kind": kind, "name": kind, "data": str(data), "images": "photo", "prompt": "question", "answer": "answer"}
    return KINDS[kind](**{**given, **settings})


def test_tasks_about_pictures(trained, photos, tmp_path):
    lines = (photos / "questions.csv").read_text().splitlines()
    (tmp_path / "q.csv").write_text("\n".join(lines[:13]) + "\n")
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:13]]
    people = [{**row, "answer": [row["answer"]] * 7 + ["grey"] * 3} for row in rows]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in people))
    chosen = [{**row, "choices": list(COLORS)} for row in rows]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    asked = [
        {**row, "question": f"Is it {color}?", "answer": "yes" if color == row["answer"] else "no"}
        for row in rows
        for color in ("red", "blue")
    ]
    (tmp_path / "yes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    root = {"root": str(photos), "max_new_tokens": 12}
    tasks = [
        make_task("exact_match", tmp_path / "q.csv", **root),
        make_task("vqa", tmp_path / "people.jsonl", **root),
        make_task("yes_no", tmp_path / "yes.jsonl", **root),
        KINDS["choice"](
            kind="choice",
            name="choice",
            data=str(tmp_path / "choices.jsonl"),
            images="photo",
            prompt="question",
            answer="answer",
            choices="choices",
            root=str(photos),
        ),
    ]
    model, processor = load_model(str(trained))
    found = evaluate(model, processor, tasks, batch_size=5)
    assert found["exact_match"].metrics["accuracy"].value > 0.9
    assert found["vqa"].metrics["vqa_accuracy"].value > 0.9
    assert found["choice"].n == 12
    assert set(found["yes_no"].metrics) == {"accuracy", "precision", "recall", "f1", "yes_rate"}
    # one at a time, the same answers
    assert evaluate(model, processor, tasks[:1], batch_size=1)["exact_match"].right == found["exact_match"].right
    with pytest.raises(UsageError, match="asks about pictures, and this model takes text alone"):
        evaluate(model, processor.tokenizer, tasks[:1])
    seen = tasks[0].model_copy(update={"images": None, "videos": "photo"})
    with pytest.raises(UsageError, match="asks about videos, and this model takes text alone"):
        evaluate(model, processor.tokenizer, [seen])
    lost = make_task("exact_match", photos / "questions.csv", max_new_tokens=4)
    with pytest.raises(Exception, match=r"of its pictures and videos 1 cannot be read:\s+there is no file .*lost.jpg"):
        evaluate(model, processor, [lost])


def test_options_are_as_likely_as_each_is_alone(trained, photos):
    model, processor = load_model(str(trained))
    encoder = PictureEncoder(processor)
    asked = encoder.ask(ask_with_pictures("What color is it?", [Picture(str(photos / "1.jpg"))]))
    found = score_options(model, encoder, asked, [" red", " green", " blue"])
    before = encoder.call([asked])["input_ids"].shape[1]
    for option, (logp, count) in zip((" red", " green", " blue"), found, strict=True):
        inputs = encoder.call([replace(asked, text=asked.text + option)])
        with torch.no_grad():
            logp_TV = model(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0]
        want = sum(logp_TV[at - 1, ids[at]].item() for at in range(before, len(ids)))
        assert (count, len(processor.tokenizer.encode(option))) == (len(ids) - before,) * 2
        assert abs(logp - want) < 1e-3


def test_generate_asks_about_a_picture(run, trained, photos, base):
    status, out, _ = run(
        "generate", trained, "--image", photos / "1.jpg", "--prompt", "What color is it?", "--max-new-tokens", 3
    )
    assert (status, out) == (0, "blue\n"), out
    status, out, err = run("generate", trained, "--image", photos / "none.jpg", "--prompt", "What?")
    assert (status, "there is no file" in err) == (2, True)
    status, _, err = run("generate", trained, "--image", photos / "1.jpg", "--prompt", "What?", "--raw")
    assert (status, "leave --raw out" in err) == (2, True)
    status, _, err = run("generate", trained, "--image", photos / "1.jpg", "--prompt", "<image> and <image>?")
    assert (status, "pictures: 1, places for them (<image>): 2" in err) == (2, True)


def test_a_text_model_takes_no_picture(run, tiny_llama_folder, photos):
    status, _, err = run("generate", tiny_llama_folder, "--image", photos / "1.jpg", "--prompt", "What?")
    assert (status, "takes text alone, and no pictures" in err) == (2, True)


@pytest.fixture
def films(tmp_path):
    """A stranger's folder of videos with a table of questions, one of them about a video that is cut off."""
    pytest.importorskip("av", reason="videos are read by PyAV")
    lines = ["film,question,answer"]
    for i in range(6):
        color = list(COLORS)[i % 3]
        write_video(tmp_path / f"{i}.mp4", [COLORS[color]] * 5)
        lines.append(f"{i}.mp4,What color is it?,{color}")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "0.mp4").read_bytes()[:200])
    (tmp_path / "questions.csv").write_text("\n".join([*lines, "cut.mp4,What color is it?,red"]) + "\n")
    return tmp_path


def test_a_model_that_takes_pictures_alone_refuses_videos(base, films, tmp_path):
    data = {"train": str(films / "questions.csv"), "validation": None}
    with pytest.raises(UsageError, match="LlavaProcessor takes pictures and no videos; models that take both are"):
        fine_tune(recipe(base, films, tmp_path / "run", data=data))
    (films / "questions.csv").write_text("film,question,answer\n0.mp4,What color is it?,red\n")
    with pytest.raises(UsageError, match="vqa: asks about videos, and LlavaProcessor takes pictures alone"):
        evaluate(*load_model(str(base)), [make_task("vqa", films / "questions.csv", images=None, videos="film")])


def test_videos_that_a_task_cannot_show_are_told(films):
    task = make_task("vqa", films / "questions.csv", images=None, videos="film")
    with pytest.raises(DoraError, match=r"of its pictures and videos 1 cannot be read:\s+.*cut\.mp4"):
        read_examples(task)
    made = read_examples(task, 6)
    assert [example.pictures for example in made] == [(Video(str(films / f"{i}.mp4")),) for i in range(6)]


def test_videos_train_and_are_asked_about(films, tmp_path, run):
    pytest.importorskip("torchvision", reason="its processor takes videos too", exc_type=Exception)
    model, processor = build(WITH_TORCHVISION["qwen2_5_vl"])
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    data = {"train": str(films / "questions.csv"), "validation": 0.34, "video_frames": 4, "max_length": 256}
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 2}
    made = fine_tune(recipe(tmp_path / "base", films, tmp_path / "run", data=data, training=steps))
    samples = json.loads((made / "samples.json").read_text())
    assert all(len(sample["pictures"]) == 3 for sample in samples)
    reported = json.loads((made / "data.json").read_text())["splits"]
    assert {"with a video that cannot be read": 1} in [part["dropped"] for part in reported.values()]
    assert json.loads((made / "doralib_prompt.json").read_text())["video_frames"] == 4
    assert load_model(str(made))[0].doralib_video_frames == 4
    asked = ("generate", made, "--prompt", "What color is it?", "--max-new-tokens", "2", "--video")
    status, out, err = run(*asked, films / "1.mp4")
    assert status == 0, out + err
    status, out, err = run(*asked, films / "cut.mp4")
    assert status == 2
    assert "--video: " in err
    assert "cannot be read as a video" in err
    (films / "few.csv").write_text("film,question,answer\n0.mp4,What color is it?,red\n1.mp4,What color is it?,blue\n")
    task = make_task("vqa", films / "few.csv", images=None, videos="film", max_new_tokens=2)
    scored = evaluate(*load_model(str(made)), [task])["vqa"]
    said = [run(*asked, films / f"{i}.mp4")[1].strip() for i in range(2)]
    wrong = iter(each["predicted"] for each in scored.wrong)
    told = [word if right == "1" else next(wrong) for word, right in zip(("red", "blue"), scored.right, strict=True)]
    assert told == said
    # in the chat, whose rows train again
    loaded, beside = load_model(str(made))
    lines = iter(
        [
            f"/video {films / 'cut.mp4'}",
            f"/video {films / '1.mp4'}",
            "What is <video>?",
            f"/save {tmp_path / 't.jsonl'}",
        ]
    )
    said = []
    encoder = make_encoder(loaded, beside)
    Chat(loaded, beside.tokenizer, lambda _: next(lines, "/quit"), said.append, max_new_tokens=2, encoder=encoder).run()
    told = "".join(said)
    assert "/video FILE: " in told
    assert "5 frames, of which 4 are seen" in told
    row = json.loads((tmp_path / "t.jsonl").read_text())
    assert row["videos"] == [str(films / "1.mp4")]
    settings = find_layout(DataSettings(train="t"), list(row), row, "t")
    assert read_picture_row(row, settings, tmp_path).pictures == (Video(str(films / "1.mp4")),)


@pytest.fixture
def values(tmp_path):
    """A folder in the layout of VALUE with the videos themselves, but for the last two of each task."""
    pytest.importorskip("av", reason="videos are read by PyAV")
    folder = make_video_folder(tmp_path / "value", count=4)
    for file in (folder / "ann").rglob("*_release.jsonl"):
        place = folder / "videos" / {"tvqa": "tv", "tvc": "tv", "how2qa": "how2", "yc2c": "yc2"}[file.parent.name]
        place.mkdir(parents=True, exist_ok=True)
        for line in file.read_text().splitlines()[:-2]:
            write_video(place / f"{json.loads(line)['vid_name']}.mp4", [COLORS["red"]] * 3)
    return folder


def test_values_questions_are_asked_about_the_videos_themselves(values, tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="its processor takes videos too", exc_type=Exception)
    model, processor = build(WITH_TORCHVISION["qwen2_5_vl"])
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    data = {
        "layout": "value",
        "train": str(values),
        "validation": str(values),
        "tasks": {"tvqa": 1.0, "how2qa": 1.0},
        "video_frames": 2,
        "max_length": 512,
    }
    made = fine_tune(
        recipe(
            tmp_path / "base",
            values,
            tmp_path / "run",
            data=data,
            training={"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 2},
            eval={"tasks": [f"value/tvqa={values}"]},
        )
    )
    reported = json.loads((made / "data.json").read_text())["splits"]
    assert [part["dropped"] for part in reported.values()] == [{"without its video": 4}] * 2
    after = json.loads((made / "results.json").read_text())["after"]["value/tvqa"]
    assert (after["n"], list(after["metrics"])) == (4, ["accuracy"])
    (asked,) = load_tasks([f"value/tvqa={values}"])
    examples = read_examples(asked)
    assert all(example.pictures[0].path.endswith(".mp4") for example in examples)
    model, processor = load_model(str(made))
    scored = evaluate(model, processor, [asked])["value/tvqa"]
    assert scored.right == after["right"]
    said = answer_pictures(
        model,
        make_encoder(model, processor),
        [make_encoder(model, processor).ask(ask_with_pictures(e.prompt, e.pictures)) for e in examples],
        max_new_tokens=10,
        batch_size=1,
    )
    choice = [str(read_choice(answer.text.strip(), 5)) for answer in said]
    truth = [example.answer.removeprefix("a") for example in examples]
    assert scored.right == "".join("01"[one == other] for one, other in zip(choice, truth, strict=True))
    told = [Answer(text, cut=False) for text in (examples[0].answer, "a7", f" {examples[2].answer} ", "nothing")]
    monkeypatch.setattr("doralib.evaluation.asking.answer_pictures", lambda *_, **__: told)
    assert evaluate(model, processor, [asked])["value/tvqa"].right == "1010"
    with pytest.raises(UsageError, match=r"asks a VL-BART about features, and this is a Qwen2_5_VL.*value/tvqa"):
        evaluate(model, processor, load_tasks([f"vl-bart/tvqa={values}"]))


def test_tasks_about_videos_say_what_they_lack(tmp_path):
    folder = make_video_folder(tmp_path / "value", count=4)
    with pytest.raises(UsageError, match=r"no row has its video; the first would be .*videos/tv/tvqa_val_release_0\."):
        read_examples(*load_tasks([f"value/tvqa={folder}"]))
    with pytest.raises(UsageError, match="videos: layout vlbart is about pictures"):
        KINDS["folder"](name="t", layout="vlbart", task="vqa", videos="video")
