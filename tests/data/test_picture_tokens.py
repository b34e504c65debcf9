"""Tokens and labels of rows with pictures, family by family, against transformers' own forward of each row alone."""

from dataclasses import replace

import datasets
import pytest
import torch

pytest.importorskip("PIL", reason="pictures are read by pillow")
from films import write_video
from PIL import Image
from seeing_models import ALONE, WITH_TORCHVISION, build
from torch.nn import functional as nnf

from doralib.checkpoints.models import load_image_text
from doralib.data.picture_encoder import PictureEncoder, PictureText
from doralib.data.picture_tokens import PictureCollator, read_text, tokenize_pictures
from doralib.data.pictures import Picture
from doralib.data.prepare import IGNORED
from doralib.errors import DoraError, UsageError
from doralib.recipe import DataSettings, ModelSettings
from doralib.training.loss import LabelLoss

TALKS = {
    "one": (["wide.png"], [("user", "<image>what is it?"), ("assistant", "a red cat")]),
    "two": (
        ["wide.png", "tall.png"],
        [("user", "what is <image> and <image>?"), ("assistant", "a cat"), ("user", "yes?"), ("assistant", "no")],
    ),
    "none": ([], [("user", "what?"), ("assistant", "a blue dog")]),
}
ROWS = [
    {"images": images, "messages": [{"role": role, "content": words} for role, words in talk]}
    for images, talk in TALKS.values()
]
SETTINGS = DataSettings(train="-", layout="messages", images="images", max_length=500)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in {"wide.png": (40, 30), "tall.png": (20, 60)}.items():
        noise = torch.randint(
            0, 255, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        Image.fromarray(noise.numpy()).save(folder / name)
    return folder


@pytest.fixture(scope="module", params=[*ALONE, *WITH_TORCHVISION])
def seeing(request, tmp_path_factory):
    """A family's model and processor, saved and loaded as a user's."""
    if request.param in WITH_TORCHVISION:
        pytest.importorskip("torchvision", reason="its processor takes videos too", exc_type=Exception)
        if request.param == "smolvlm":
            pytest.importorskip("num2words", reason="SmolVLM's processor writes numbers as words")
    model, processor = build({**ALONE, **WITH_TORCHVISION}[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, *load_image_text(ModelSettings(path=str(folder)))


def prepare(processor, folder, rows=ROWS, **settings):
    encoder = PictureEncoder(processor)
    numbers = [*range(1, len(rows) + 1)]
    return encoder, tokenize_pictures(
        datasets.Dataset.from_list(rows), numbers, SETTINGS.model_copy(update=settings), encoder, folder
    )


def make_alone(family, processor, folder, row):
    """What transformers itself makes of one row, and the number of tokens before and behind each answer's."""
    opened = [Image.open(folder / name) for name in row["images"]]
    if family == "paligemma":
        made = processor(text="<image>what is it?", images=opened, suffix="a red cat", return_tensors="pt")
        made.pop("labels")
        return made
    messages, left = [], list(opened)
    for message in row["messages"]:
        parts = []
        for i, piece in enumerate(message["content"].split("<image>")):
            parts += [{"type": "image", "image": left.pop(0)}] if i else []
            parts += [{"type": "text", "text": piece}] if piece else []
        messages.append({"role": message["role"], "content": parts})
    text = processor.apply_chat_template(messages, tokenize=False)
    if family == "llava":  # its template ends no answer
        text += "</s>"
    images = {"images": [opened]} if opened else {}
    bos = processor.tokenizer.bos_token
    return processor(text=[text], return_tensors="pt", add_special_tokens=not (bos and text.startswith(bos)), **images)


def test_the_loss_is_that_of_each_row_alone(seeing, pictures):
    family, model, processor = seeing
    encoder, made = prepare(processor, pictures)
    rows = [made.rows[i] for i in range(len(made.rows))]
    assert made.numbers == ([1] if family == "paligemma" else [1, 2, 3])
    total, count = 0.0, 0
    for number, row in zip(made.numbers, rows, strict=True):
        alone = make_alone(family, processor, pictures, ROWS[number - 1])
        assert alone["input_ids"][0].tolist() == row["input_ids"]
        with torch.no_grad():
            logits_TV = model(**alone).logits[0]
        labels_T = torch.tensor(row["labels"])
        total += nnf.cross_entropy(logits_TV[:-1], labels_T[1:], ignore_index=IGNORED, reduction="sum").item()
        count += int((labels_T[1:] != IGNORED).sum())
    batch = PictureCollator(encoder, processor.tokenizer.pad_token_id)(rows)
    loss = LabelLoss(model)
    try:
        with torch.no_grad():
            found, counted = loss(model, batch)
    finally:
        loss.remove()
    assert (counted, count) == (count, counted)
    torch.testing.assert_close(found.item(), total, rtol=1e-4, atol=1e-3)


def test_only_what_the_assistant_says_is_learned(seeing, pictures):
    family, _, processor = seeing
    _, made = prepare(processor, pictures)
    decode = lambda row: processor.tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    end = {"llava": " </s>", "paligemma": "<|im_end|>"}.get(family, "<|im_end|>\n")
    first = made.rows[0]
    assert decode(first).strip(" ") == f"a red cat{end}"
    special = set(PictureEncoder(processor)._special)
    for row in made.rows:
        assert special.isdisjoint(set(row["labels"]))
        assert bool(special & set(row["input_ids"])) == bool(row["num_pictures"])
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
    if family not in ("paligemma", "llava"):
        assert decode(made.rows[1]) == f"a cat{end}no{end}"
        assert decode(made.rows[2]) == f"a blue dog{end}"
    everything = list(prepare(processor, pictures, loss_on="all")[1].rows)
    for row, part in zip(everything, made.rows, strict=True):
        assert special.isdisjoint(set(row["labels"]))
        if family != "paligemma":
            assert (
                sum(label != IGNORED for label in row["labels"]) > sum(label != IGNORED for label in part["labels"])
                or row["num_pictures"] == 0
            )


def test_pictures_tell_in_the_loss(seeing, pictures):
    family, model, processor = seeing
    encoder, made = prepare(processor, pictures)
    row = made.rows[0]
    collate = PictureCollator(encoder, 0)
    batch, other = collate([row]), collate([row])
    (name,) = [name for name in batch if name.startswith("pixel_values")]
    other[name] = torch.zeros_like(other[name]) - 1
    with torch.no_grad():
        seen, blind = model(**batch).logits, model(**other).logits
    assert not torch.allclose(seen, blind, atol=1e-3), family


def test_rows_too_long_and_pictures_that_go(pictures, tmp_path):
    _, processor = build(ALONE["llava_next"])
    encoder, made = prepare(processor, pictures, max_length=60)
    assert made.numbers == [1, 3]
    assert "longer than 60 tokens" in made.report.dropped
    cut = prepare(processor, pictures, max_length=44, too_long="truncate")[1]
    assert cut.numbers == [1, 3]
    assert [len(row["input_ids"]) for row in cut.rows] == [44, 18]
    assert "whose pictures do not end within 44 tokens" in cut.report.dropped
    batch = PictureCollator(encoder, 0)([cut.rows[0], cut.rows[1]])
    assert batch["input_ids"].shape == (2, 44)
    assert batch["attention_mask"].sum(1).tolist() == [44, 18]
    assert (
        encoder.count(PictureText(made.rows[0]["text"], (Picture(str(pictures / "wide.png")),)))
        == made.rows[0]["length"]
    )
    (tmp_path / "gone.png").write_bytes((pictures / "wide.png").read_bytes())
    gone = prepare(processor, tmp_path, [{**ROWS[0], "images": ["gone.png"]}])[1]
    (tmp_path / "gone.png").unlink()
    with pytest.raises(DoraError, match=r"can no longer be read.*gone.png"):
        PictureCollator(encoder, 0)([gone.rows[0]])


def test_a_processor_without_a_template_is_refused():
    _, processor = build(ALONE["llava"])
    processor.tokenizer.chat_template = None
    with pytest.raises(DoraError, match="LlavaProcessor has no chat template"):
        PictureEncoder(processor)


@pytest.fixture(scope="module")
def films(pictures):
    """Two videos of 20 and of 3 frames beside the pictures; of the first the frames 2, 7, 12 and 17 are seen."""
    pytest.importorskip("av", reason="videos are read by PyAV")
    write_video(pictures / "long.mp4", [12 * i for i in range(20)])
    write_video(pictures / "short.mp4", [250, 120, 10], size=(24, 32))
    return pictures


def open_frames(file, places):
    import av

    with av.open(str(file)) as opened:
        frames = [frame.to_image() for frame in opened.decode(video=0)]
    told = {"total_num_frames": len(frames), "fps": 4.0, "duration": len(frames) / 4, "frames_indices": list(places)}
    return [frames[i] for i in places], told


PLACES = {"long.mp4": (2, 7, 12, 17), "short.mp4": (0, 1, 2)}
FILM_ROWS = [
    {
        "videos": [name],
        "messages": [{"role": "user", "content": "<video>what is it?"}, {"role": "assistant", "content": "a cat"}],
    }
    for name in PLACES
]
FILM_ROWS[1]["messages"][0]["content"] = "what is in <video>?"


def test_the_loss_of_rows_with_videos_is_that_of_each_row_alone(seeing, films):
    family, model, processor = seeing
    encoder = PictureEncoder(processor, frames=4)
    settings = SETTINGS.model_copy(update={"images": None, "videos": "videos"})
    tokenize = lambda: tokenize_pictures(datasets.Dataset.from_list(FILM_ROWS), [1, 2], settings, encoder, films)
    if family in ALONE:
        with pytest.raises(UsageError, match="takes pictures and no videos; models that take both are Qwen-VL"):
            tokenize()
        return
    made = tokenize()
    special, total, count = set(encoder._special), 0.0, 0
    for row, given in zip(made.rows, FILM_ROWS, strict=True):
        (name,) = given["videos"]
        frames, told = open_frames(films / name, PLACES[name])
        parts, words = [], given["messages"][0]["content"].split("<video>")
        for piece in (words[0], None, words[1]):
            parts += [{"type": "video"}] if piece is None else [{"type": "text", "text": piece}] if piece else []
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        ]
        text = processor.apply_chat_template(messages, tokenize=False)
        alone = processor(
            text=[text], videos=[frames], video_metadata=[told], do_sample_frames=False, return_tensors="pt"
        )
        assert alone["input_ids"][0].tolist() == row["input_ids"]
        assert (row["num_pictures"], row["num_videos"]) == (0, 1)
        assert special & set(row["input_ids"])
        assert special.isdisjoint(set(row["labels"]))
        said = processor.tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert said.strip().startswith("a cat")
        with torch.no_grad():
            logits_TV = model(**alone).logits[0]
        labels_T = torch.tensor(row["labels"])
        total += nnf.cross_entropy(logits_TV[:-1], labels_T[1:], ignore_index=IGNORED, reduction="sum").item()
        count += int((labels_T[1:] != IGNORED).sum())
    loss = LabelLoss(model)
    try:
        with torch.no_grad():
            # the two have as many frames, where a processor wants that
            alone = [PictureCollator(encoder, processor.tokenizer.pad_token_id)([row]) for row in made.rows]
            found = [loss(model, batch) for batch in alone]
    finally:
        loss.remove()
    assert sum(each for _, each in found) == count
    torch.testing.assert_close(sum(each.item() for each, _ in found), total, rtol=1e-4, atol=1e-3)


def test_videos_tell_in_the_loss(seeing, films):
    family, model, processor = seeing
    if family in ALONE:
        return
    encoder = PictureEncoder(processor, frames=4)
    settings = SETTINGS.model_copy(update={"images": None, "videos": "videos"})
    made = tokenize_pictures(datasets.Dataset.from_list(FILM_ROWS), [1, 2], settings, encoder, films)
    collate = PictureCollator(encoder, 0)
    batch, other = collate([made.rows[0]]), collate([made.rows[0]])
    (name,) = [name for name in batch if name.startswith("pixel_values")]
    other[name] = torch.zeros_like(other[name]) - 1
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, model(**other).logits, atol=1e-3), family


def test_pictures_and_videos_in_one_row(seeing, films):
    family, model, processor = seeing
    if family in ALONE:
        return
    ask = {"role": "user", "content": "is <image> in <video>?"}
    row = {"images": ["wide.png"], "videos": ["long.mp4"], "messages": [ask, {"role": "assistant", "content": "no"}]}
    encoder = PictureEncoder(processor, frames=4)
    settings = SETTINGS.model_copy(update={"videos": "videos"})
    tokenize = lambda: tokenize_pictures(datasets.Dataset.from_list([row]), [1], settings, encoder, films)
    if family == "smolvlm":
        with pytest.raises(UsageError, match="takes either in a row, not both"):
            tokenize()
        return
    made = tokenize()
    # that the tokens are the processor's own is checked there
    batch = PictureCollator(encoder, 0)([made.rows[0]])
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    asked = read_text(made.rows[0])
    assert asked.kind == (True, True)
    assert encoder.count(replace(asked, text=asked.text)) == len(made.rows[0]["input_ids"])
