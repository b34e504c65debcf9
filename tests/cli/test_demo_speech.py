"""The assets of `doralib demo speech`, offline: which captions are read, and how they are split."""

import csv
import zipfile

import pytest

from doralib.cli import demo_speech
from doralib.cli.demo_speech import Caption, read_captions, write_captions
from doralib.errors import DoraError
from doralib.evaluation.task_file import load_tasks

STAMPS = "./usr/share/tuxpaint/stamps/"
FILES = {
    # English stands first, without a key
    "animals/frog.txt": "A frog.\nca.utf8=Una granota.\nro.utf8=O   broască.\nroa.utf8=No.\n",
    "animals/frog_desc_ro.ogg": b"frog",
    "animals/frog_desc_ca.ogg": b"granota",
    # the same sentence of another stamp, in other letters
    "animals/frog2.txt": "A frog.\nro.utf8=o broască.\n",
    "animals/frog2_desc_ro.ogg": b"frog 2",
    "food/silent.txt": "Bread.\nro.utf8=Pâine.\n",
    "food/wordless_desc_ro.ogg": b"?",
    "food/english.txt": "Milk.\n",
    "food/english_desc_ro.ogg": b"milk",
    "food/sound.ogg": b"a sound of the thing itself",
}


def write_package(folder, files):
    with zipfile.ZipFile(folder / "stamps.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(STAMPS + name, data)
    return folder / "stamps.zip"


def test_a_caption_has_a_sentence_and_its_sound_in_the_language(tmp_path):
    package = write_package(tmp_path, FILES)
    assert list(read_captions(package)) == [
        Caption("animals/frog", "O broască.", b"frog"),
        Caption("animals/frog2", "o broască.", b"frog 2"),
    ]
    assert list(read_captions(package, "ca")) == [Caption("animals/frog", "Una granota.", b"granota")]


def test_no_sentence_is_in_training_and_test(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_speech, "NUM_TEST", 3)
    files = {}
    for i in range(12):
        files |= {f"a/{i}.txt": f"Stamp.\nro.utf8=Timbrul {i % 8}\n", f"a/{i}_desc_ro.ogg": bytes([i])}
    package = write_package(tmp_path, files)
    write_captions(package, tmp_path / "one")
    write_captions(package, tmp_path / "two")
    sets = {}
    for name in ("train", "test"):
        text = (tmp_path / "one" / f"{name}.csv").read_text(encoding="utf-8")
        assert text == (tmp_path / "two" / f"{name}.csv").read_text(encoding="utf-8")
        sets[name] = list(csv.DictReader(text.splitlines()))
        for row in sets[name]:
            number = int(row["file"].removeprefix("clips/a-").removesuffix(".ogg"))
            assert row["text"] == f"Timbrul {number % 8}"
            assert (tmp_path / "one" / row["file"]).read_bytes() == bytes([number])
    assert not {row["text"] for row in sets["train"]} & {row["text"] for row in sets["test"]}
    # a sentence that several say stays whole, so the test may have some more
    assert len(sets["train"]) + len(sets["test"]) == 12
    assert 3 <= len(sets["test"]) <= 4
    (task,) = load_tasks([str(tmp_path / "one" / "captions.yaml")])
    assert (task.kind, task.language) == ("words", "ro")


def test_a_package_of_too_few_captions_is_told(tmp_path):
    with pytest.raises(DoraError, match="holds 2 spoken captions; is it the whole package"):
        write_captions(write_package(tmp_path, FILES), tmp_path / "out")
    assert not (tmp_path / "out").exists()
