"""Videos of rows: which frames are seen, what stands for them in a conversation, and those that cannot be read."""

import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="frames become pictures of pillow")
pytest.importorskip("av", reason="videos are read by PyAV")
from films import write_video
from PIL import Image

from doralib.data.frames import turn_upright
from doralib.data.picture_rows import ask_with_pictures, find_layout, read_picture_row
from doralib.data.pictures import Picture
from doralib.data.prepare import BadRow
from doralib.data.videos import Video, find_video, measure_video, open_video, spread_evenly
from doralib.recipe import DataSettings

ROOT = Path("/films")
VIDEO, IMAGE = {"type": "video"}, {"type": "image"}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("films") / "a.mp4", [10 * i for i in range(20)])


def test_frames_are_spread_evenly():
    assert spread_evenly(3, 8) == (0, 1, 2)
    assert spread_evenly(8, 8) == tuple(range(8))
    assert spread_evenly(20, 4) == (2, 7, 12, 17)
    assert spread_evenly(20, 1) == (10,)
    for total in (9, 31, 1000):
        places = spread_evenly(total, 8)
        assert len(set(places)) == 8
        assert all(0 <= place < total for place in places)


def test_the_frames_that_are_seen(film):
    found = measure_video(Video(str(film)), 4)
    assert (found.size, found.places, found.total, found.fps) == ((32, 24), (2, 7, 12, 17), 20, 4.0)
    frames = open_video(Video(str(film)), found)
    assert [round(np.asarray(frame).mean(), -1) for frame in frames] == [20, 70, 120, 170]
    small = open_video(Video(str(film)), found, longest=16)
    assert {frame.size for frame in small} == {(16, 12)}
    told = found.describe((16, 12))
    assert (told["total_num_frames"], told["duration"], told["frames_indices"]) == (20, 5.0, [2, 7, 12, 17])


@pytest.mark.parametrize("damage", ["gone", "text", "cut", "picture"])
def test_a_video_that_cannot_be_read_is_a_bad_row(film, damage, tmp_path):
    file = tmp_path / "b.mp4"
    if damage == "text":
        file.write_text("no video")
    elif damage == "cut":
        file.write_bytes(film.read_bytes()[:300])
    elif damage == "picture":
        file.write_bytes(b"")
    found = measure_video(Video(str(file)), 4)
    assert isinstance(found, BadRow)
    assert found.kind == ("without its video" if damage == "gone" else "with a video that cannot be read")
    assert str(file) in str(found)


def test_a_sound_is_no_video(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    found = measure_video(Video(str(tmp_path / "a.wav")), 4)
    assert str(found).endswith("a.wav cannot be read as a video: it has no pictures")


def test_a_video_that_has_changed_since_is_told(film, tmp_path):
    found = measure_video(Video(str(film)), 4)
    with pytest.raises(BadRow, match="other frames than before"):
        open_video(Video(str(film)), replace(found, places=(2, 40)))


def test_a_telephones_video_is_turned_upright():
    class Frame:
        rotation = -90

        def to_image(self):
            picture = Image.new("RGB", (4, 2))
            picture.putpixel((0, 0), (255, 0, 0))
            return picture

    turned = turn_upright(Frame())
    assert turned.size == (2, 4)
    assert turned.getpixel((1, 0)) == (255, 0, 0)


def read(row, **settings):
    found = find_layout(DataSettings(train="rows.jsonl", **settings), list(row), row, "rows.jsonl")
    made = read_picture_row(row, found, ROOT)
    said = [(message["role"], message["content"]) for message in made.talk.messages]
    return found.layout, said, made.pictures


def text(words):
    return {"type": "text", "text": words}


def test_videos_have_their_places_in_conversations():
    films = (Video("/films/a.mp4"), Video("/films/b.mkv"))
    ask = {"role": "user", "content": "What is in <video> and in <video>?"}
    answer = {"role": "assistant", "content": "a cat"}
    layout, said, seen = read({"videos": ["a.mp4", "b.mkv"], "messages": [ask, answer]})
    assert (layout, seen) == ("messages", films)
    assert said[0] == ("user", [text("What is in "), VIDEO, text(" and in "), VIDEO, text("?")])
    # parts, with a video of their own or the next of the row
    parts = [VIDEO, {"type": "video", "video": "b.mkv"}, text("What?")]
    assert read({"videos": ["a.mp4"], "messages": [{"role": "user", "content": parts}, answer]})[2] == films
    # without places they come first
    bare = read({"video": "a.mp4", "messages": [{"role": "user", "content": "What?"}, answer]})
    assert bare[1][0] == ("user", [VIDEO, text("What?")])


def test_pictures_and_videos_each_take_their_own_places():
    ask = {"role": "user", "content": "Is <image> in <video>?"}
    row = {"images": ["a.png"], "videos": ["a.mp4"], "messages": [ask, {"role": "assistant", "content": "no"}]}
    _, said, seen = read(row)
    assert seen == (Picture("/films/a.png"), Video("/films/a.mp4"))
    assert said[0] == ("user", [text("Is "), IMAGE, text(" in "), VIDEO, text("?")])
    asked = ask_with_pictures("Is <video> like <image>?", [Picture("a.png"), Video("a.mp4")])
    assert asked.pictures == (Video("a.mp4"), Picture("a.png"))
    with pytest.raises(BadRow, match=r"videos: 1, places for them \(<video>\): 2"):
        read({"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video><video>?"}, row["messages"][1]]})


def test_questions_and_captions_of_videos():
    layout, said, seen = read({"clip": "a.webm", "question": "What is <video> it?", "answer": "a dog"})
    assert (layout, seen) == ("vqa", (Video("/films/a.webm"),))
    assert said == [("user", [VIDEO, text("What is  it?")]), ("assistant", "a dog")]
    assert read({"video": "a.mp4", "caption": "a dog runs"})[0] == "caption"
    with pytest.raises(BadRow) as told:
        read({"video": None, "question": "What?", "answer": "a dog"})
    assert told.value.kind == "without its video"


def test_a_video_is_a_file():
    assert find_video({"type": "video", "path": "a.mp4"}, ROOT) == Video("/films/a.mp4")
    for value in ("https://example.org/a.mp4", {"bytes": b"x"}, "", None):
        with pytest.raises(BadRow) as told:
            find_video(value, ROOT)
        assert "video" in told.value.kind
