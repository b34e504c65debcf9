"""Rows with pictures in the layouts that people bring: conversations with their pictures in place, and bad rows."""

import base64
import json
from pathlib import Path

import datasets
import pytest

pytest.importorskip("PIL", reason="pictures are read by pillow")
from PIL import Image

from doralib.data.picture_rows import ASK_FOR_CAPTION, find_layout, list_captioned, read_picture_row
from doralib.data.pictures import (
    Picture,
    find_root,
    make_thumbnail,
    measure_pictures,
    open_picture,
    shrink,
)
from doralib.data.prepare import BadRow
from doralib.errors import UsageError
from doralib.recipe import DataSettings

ROOT = Path("/pictures")
IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def read(row, **settings):
    found = find_layout(DataSettings(train="rows.jsonl", **settings), list(row), row, "rows.jsonl")
    made = read_picture_row(row, found, ROOT)
    said = [(message["role"], message["content"]) for message in made.talk.messages]
    return found.layout, said, [picture.path for picture in made.pictures]


def test_published_layouts_become_conversations():
    llava = {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "What feature can be seen on the back of the bus?"},
            {"from": "gpt", "value": "The back of the bus features an advertisement."},
        ],
    }
    assert read(llava, layout="llava") == read(llava)
    assert read(llava) == (
        "messages",
        [
            ("user", [IMAGE, text("What are the colors of the bus in the image?")]),
            ("assistant", "The bus in the image is white and red."),
            ("user", "What feature can be seen on the back of the bus?"),
            ("assistant", "The back of the bus features an advertisement."),
        ],
        ["/pictures/coco/train2017/000000033471.jpg"],
    )
    # as LLaMA-Factory's demonstration has it: two places, the same picture twice
    factory = {
        "messages": [
            {"content": "<image>Who are they?", "role": "user"},
            {"content": "They're Kane and Gretzka from Bayern Munich.", "role": "assistant"},
            {"content": "What are they doing?<image>", "role": "user"},
            {"content": "They are celebrating on the soccer field.", "role": "assistant"},
        ],
        "images": ["mllm_demo_data/1.jpg", "mllm_demo_data/1.jpg"],
    }
    layout, said, pictures = read(factory)
    assert said[0] == ("user", [IMAGE, text("Who are they?")])
    assert said[2] == ("user", [text("What are they doing?"), IMAGE])
    assert (layout, pictures) == ("messages", ["/pictures/mllm_demo_data/1.jpg"] * 2)


def test_parts_with_pictures_of_their_own():
    url = f"data:image/png;base64,{base64.b64encode(b'x').decode()}"
    talk = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}, "text": None},
                {"type": "text", "text": "what?"},
                {"type": "image", "image": "b.png"},
                {"type": "image", "path": "/c.png"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    layout, said, pictures = read({"messages": talk})
    assert said == [("user", [IMAGE, text("what?"), IMAGE, IMAGE]), ("assistant", "ab")]
    assert (layout, pictures) == ("messages", ["", "/pictures/b.png", "/c.png"])
    # parts without a picture of their own take those of the column; the same as JSON text
    row = {
        "messages": json.dumps([{"role": "user", "content": [IMAGE, text("q")]}, {"role": "assistant", "content": "a"}])
    }
    assert read({**row, "image": "a.png"})[1:] == (
        [("user", [IMAGE, text("q")]), ("assistant", "a")],
        ["/pictures/a.png"],
    )


def test_pictures_without_a_place_come_first_and_rows_without_pictures_stay_text():
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    _, said, _ = read({"messages": talk, "images": ["a.png", "b.png"]})
    assert said == [("system", "s"), ("user", [IMAGE, IMAGE, text("q")]), ("assistant", "a")]
    for nothing in ([], None, ""):
        found = DataSettings(train="r", layout="messages", images="images")
        made = read_picture_row({"messages": talk, "images": nothing}, found, ROOT)
        assert made.pictures == ()
        assert [message["content"] for message in made.talk.messages] == ["s", "q", "a"]


def test_questions_and_captions():
    layout, said, pictures = read({"file": "a.jpg", "question": "How many?", "answer": 2})
    assert (layout, pictures) == ("vqa", ["/pictures/a.jpg"])
    assert said == [("user", [IMAGE, text("How many?")]), ("assistant", "2")]
    row = {"image": "a.jpg", "question": "How many?", "answers": [{"answer": a} for a in ("two", "2", "2")]}
    short = {"prompt": "{question}\nAnswer in one word.", "target": "answers"}
    assert read(row, **short)[1] == [("user", [IMAGE, text("How many?\nAnswer in one word.")]), ("assistant", "2")]
    layout, said, _ = read({"file_name": "a.jpg", "text": "a dog"})
    assert (layout, said) == ("caption", [("user", [IMAGE, text(ASK_FOR_CAPTION)]), ("assistant", "a dog")])
    _, said, _ = read(
        {"file_name": "a.jpg", "text": "ein Hund", "language": "German"},
        prompt="Describe in {language}.",
        layout="caption",
    )
    assert said[0] == ("user", [IMAGE, text("Describe in German.")])


def test_what_cannot_be_read_is_said():
    talk = [{"role": "user", "content": "<image><image>q"}, {"role": "assistant", "content": "a"}]
    bad = {
        "pictures: 1, places for them (<image>): 2": {"messages": talk, "images": ["a.png"]},
        "is not here; fetch it": {"messages": talk, "images": ["https://x/a.png", "b.png"]},
        "names no picture": {"messages": talk, "images": [{"path": None}, "b.png"]},
        "nothing in 'answer'": {"image": "a.png", "question": "q", "answer": " "},
        "nothing in 'image'": {"image": "", "question": "q", "answer": "a"},
        "pictures, videos and texts alone are read": {
            "messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, talk[1]],
            "images": [],
        },
    }
    asked = {"layout": "vqa", "images": "image", "prompt": "question", "target": "answer"}
    for why, row in bad.items():
        settings = DataSettings(
            train="r", **({"images": "images", "layout": "messages"} if "messages" in row else asked)
        )
        with pytest.raises(BadRow) as told:
            read_picture_row(row, settings, ROOT)
        assert why in str(told.value), told.value
    with pytest.raises(UsageError, match=r"data.images: no column of rows.jsonl holds names of pictures") as told:
        read({"question": "q", "answer": "a"})
    assert "columns of rows.jsonl: question, answer" in str(told.value)
    with pytest.raises(UsageError, match="auto cannot tell"):
        read({"image": "a.png", "x": 1, "y": 2})
    with pytest.raises(UsageError, match=r"data.prompt: rows.jsonl has no column 'qestion'; did you mean 'question'"):
        read({"image": "a.png", "question": "q", "answer": "a"}, prompt="{qestion}", target="answer")


def test_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jpg", "deep/a.png", "c.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_text("a bee\n")
    (tmp_path / "deep/a.txt").write_text("an ant")
    assert list_captioned(str(tmp_path))[:] == {"image": ["b.jpg", "deep/a.png"], "caption": ["a bee", "an ant"]}
    assert list_captioned(str(tmp_path / "b.txt")) is None
    assert find_root(None, str(tmp_path)) == tmp_path == find_root(None, str(tmp_path / "*.jsonl"))
    assert find_root(None, str(tmp_path / "b.txt")) == tmp_path
    assert find_root("elsewhere", str(tmp_path)) == Path("elsewhere")


def test_a_picture_is_read_upright_on_white_and_no_larger_than_asked(tmp_path):
    turned = Image.new("RGB", (40, 20), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("P", (30, 10)).save(tmp_path / "palette.gif")
    for name in ("cut.png", "cut.jpg"):
        Image.effect_noise((200, 200), 90).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:5000])
    (tmp_path / "words.png").write_text("no picture")
    names = ("turned.jpg", "clear.png", "palette.gif", "cut.png", "cut.jpg", "words.png", "none.png")
    found = measure_pictures([Picture(str(tmp_path / name)) for name in names])
    sizes = {Path(picture.path).name: size for picture, size in found.items()}
    assert [sizes[name] for name in names[:3]] == [(20, 40), (10, 10), (30, 10)]
    assert [str(sizes[name].kind) for name in names[3:]] == ["with a picture that cannot be read"] * 3 + [
        "without its picture"
    ]
    upright = open_picture(Picture(str(tmp_path / "turned.jpg")))
    assert (upright.size, upright.mode) == ((20, 40), "RGB")
    assert open_picture(Picture(str(tmp_path / "clear.png"))).getpixel((5, 5)) == (255, 255, 255)
    assert open_picture(Picture(str(tmp_path / "turned.jpg")), 10).size == shrink((20, 40), 10) == (5, 10)
    held = Picture(data=(tmp_path / "turned.jpg").read_bytes())
    assert open_picture(held).size == (20, 40)
    assert make_thumbnail(held).startswith("data:image/webp;base64,")


def test_pictures_that_datasets_holds(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    rows = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "a.png")], "question": ["q"], "answer": ["a"]},
        features=datasets.Features(
            {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
        ),
    )
    from doralib.data.rows import keep_undecoded

    (row,) = keep_undecoded(rows)
    assert read(row)[0] == "vqa"
    (picture,) = read_picture_row(row, find_layout(DataSettings(train="r"), list(row), row, "r"), ROOT).pictures
    assert measure_pictures([picture])[picture] == (8, 6)
