"""Files appear whole or not at all, and a damaged one is named."""

import errno
import json
import os
import socket
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import make_tokenizer

from doralib import disk
from doralib.checkpoints.safetensors import Checkpoint, copy_bytes, read_rows, read_whole
from doralib.disk import replacing, replacing_together, was_cut_short
from doralib.errors import DoraError, UsageError, list_some, raise_problems
from doralib.files import read_json, read_tensors, read_yaml, write_json, write_tensors

TENSORS = {
    "b.weight": torch.arange(21, dtype=torch.bfloat16).view(7, 3),
    "a.weight": torch.arange(10, dtype=torch.float64).view(5, 2),
    "half": torch.arange(12, dtype=torch.float16).view(2, 3, 2),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "count": torch.tensor([1, 2, 3]),
    "eight": torch.arange(6, dtype=torch.float32).view(2, 3).to(torch.float8_e4m3fn),
}


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def raise_full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_file_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "f.txt"
    if before:
        path.write_text(before)

    def fail():
        with replacing(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == (["f.txt"] if before else [])
    assert before is None or path.read_text() == before


def test_a_folder_replaces_a_folder(tmp_path):
    out = tmp_path / "deep" / "out"
    for text in ("one", "two"):
        with replacing(out) as part:
            part.mkdir()
            (part / text).write_text(text)
    assert names(out) == ["two"]
    assert names(out.parent) == ["out"]


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("old")
    with pytest.raises(IsADirectoryError, match="a folder stands where the file is to be"):
        write_json(tmp_path / "out", 1)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_a_failed_folder_leaves_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def fail():
        with replacing(tmp_path / "out") as part:
            part.mkdir()
            (part / "new").write_text("new")
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_a_folder_set_aside_comes_back_when_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename = Path.replace
    monkeypatch.setattr(disk, "exchange", lambda *_: False)

    def refuse_new(path, target):
        if path.suffix == ".part":
            raise PermissionError
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", refuse_new)
    with pytest.raises(PermissionError), replacing(tmp_path / "out") as part:
        part.mkdir()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_what_a_killed_run_left_is_cleared_and_brought_back(tmp_path):
    child = os.fork()
    if child == 0:
        with replacing(tmp_path / "f") as part:
            part.write_text("half")
            os._exit(9)
    os.waitpid(child, 0)
    # killed between setting the old folder aside and renaming the new one
    aside = tmp_path / f".g.{socket.gethostname()}-{child}-0123abcd.old"
    aside.mkdir()
    (aside / "kept").write_text("kept")
    assert len(names(tmp_path)) == 2
    (tmp_path / "f").write_text("old")
    write_json(tmp_path / "f", 1)
    with pytest.raises(ValueError), replacing(tmp_path / "g"):
        raise ValueError
    assert names(tmp_path) == ["f", "g"]
    assert (tmp_path / "g" / "kept").read_text() == "kept"


def fork(act):
    """Run in a process that dies at the end of it; its number."""
    child = os.fork()
    if child == 0:
        act()
        os._exit(9)
    os.waitpid(child, 0)
    return child


SET = ("settings.json", "mark.bin")


def write_set(folder, text, *, die_before=None):
    """Write two files that belong together; the process may die at one of its renames."""
    rename, done = Path.replace, []

    def counted(path, target):
        done.append(path)
        if len(done) == die_before:
            os._exit(9)
        return rename(path, target)

    Path.replace = counted
    try:
        with replacing_together([folder / name for name in SET]) as parts:
            for part in parts:
                part.write_text(text)
    finally:
        Path.replace = rename


def read_set(folder):
    return [(folder / name).read_text() if (folder / name).exists() else None for name in SET]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "over an old one"])
def test_a_set_of_files_appears_as_a_whole_whenever_it_is_killed(tmp_path, before, beside):
    folder = tmp_path / "set"
    if beside:
        folder.mkdir()
        (folder / "README").write_text("mine")
    if before:
        write_set(folder, "old")
    for die_before in range(1, 5):
        fork(lambda at=die_before: write_set(folder, "new", die_before=at))
        found = read_set(folder)
        if found[1] is not None:
            assert found in (["old"] * 2, ["new"] * 2), die_before
            continue
        # the mark is away: nobody takes the rest for an adapter, and the old set is put aside, or there was none
        assert not before or beside
        if folder.exists():
            assert was_cut_short(folder / SET[1]) or found == [None, None]
        with pytest.raises(ZeroDivisionError), replacing_together([folder / name for name in SET]):
            raise ZeroDivisionError
        assert read_set(folder)[1] == ("old" if before else None)
        assert not before or read_set(folder) == ["old"] * 2
    write_set(folder, "last")
    assert read_set(folder) == ["last"] * 2
    assert names(folder) == sorted(["README"] * beside + list(SET))
    assert names(tmp_path) == ["set"]


def test_a_set_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "README").write_text("mine")
    write_set(tmp_path, "old")
    rename, done = Path.replace, []

    def fails(path, target):
        done.append(path)
        if len(done) == 4:
            raise_full()
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(DoraError, match="disk is full"):
        write_set(tmp_path, "new")
    assert read_set(tmp_path) == ["old"] * 2
    assert names(tmp_path) == ["README", *sorted(SET)]


def test_two_folders_change_places_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if disk.exchange(tmp_path / "a", tmp_path / "b"):
        assert [names(tmp_path / "a"), names(tmp_path / "b")] == [["b"], ["a"]]
    with pytest.raises(FileNotFoundError):
        disk.exchange(tmp_path / "a", tmp_path / "none")


def test_somebody_elses_hidden_files_stay(tmp_path):
    others = [".x.json.old", ".x.json.part", ".x.json.elsewhere-1-0123abcd.part", ".x.json.bak"]
    for name in others:
        (tmp_path / name).write_text("mine")
    write_json(tmp_path / "x.json", 1)
    write_json(tmp_path / "x.json", 2)
    assert names(tmp_path) == sorted([*others, "x.json"])


def test_a_number_that_a_new_process_has_again(tmp_path):
    """In a container every run is process 1: what is not in use by this process is of an earlier one."""
    left = tmp_path / f".x.json.{socket.gethostname()}-{os.getpid()}-0123abcd.part"
    left.write_text("half")
    write_json(tmp_path / "x.json", 1)
    assert names(tmp_path) == ["x.json"]


def test_a_device_is_written_through(tmp_path, capfd):
    write_json("/dev/null", 1)
    assert Path("/dev/null").is_char_device()
    write_json("/dev/stdout", {"a": 1})
    assert json.loads(capfd.readouterr().out) == {"a": 1}
    with pytest.raises(OSError, match="No space left"):
        write_json("/dev/full", 1)
    os.mkfifo(tmp_path / "pipe")
    child = os.fork()
    if child == 0:
        write_json(tmp_path / "pipe", 3)
        os._exit(0)
    assert json.loads((tmp_path / "pipe").read_text()) == 3
    os.waitpid(child, 0)
    disk.check_writable("/dev/null", "--out", folder=False)
    with pytest.raises(UsageError, match="is no regular file"):
        disk.check_writable("/dev/null", "--out", folder=True)
    for empty in ("", " "):
        with pytest.raises(UsageError, match="--out is empty"):
            disk.check_writable(empty, "--out", folder=True)


def test_files_in_a_new_folder_have_the_modes_of_new_files(tmp_path):
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "out") as part:
            part.mkdir()
            safetensors.torch.save_file({"a": torch.ones(2)}, part / "model.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_tensors_leave_no_name_that_safetensors_made_up(tmp_path, monkeypatch):
    save = safetensors.torch.save_file

    def killed(tensors, file, **more):
        save(tensors, Path(file).with_name(".tmpAbCdEf"), **more)
        os._exit(9)

    monkeypatch.setattr(safetensors.torch, "save_file", killed)
    fork(lambda: write_tensors(tmp_path / "a.safetensors", TENSORS))
    monkeypatch.undo()
    write_tensors(tmp_path / "a.safetensors", TENSORS)
    assert names(tmp_path) == ["a.safetensors"]


def test_long_names(tmp_path):
    for name in ("x" * 240 + ".json", "é" * 110 + ".json"):
        write_json(tmp_path / name, 1)
        assert read_json(tmp_path / name, int) == 1


def test_a_full_disk_in_torchs_words(tmp_path):
    with pytest.raises(DoraError, match=r"a\.pt could not be written: PytorchStreamWriter.*; .* are free"):
        torch_full(tmp_path / "a.pt")
    assert names(tmp_path) == []


def torch_full(path):
    with replacing(path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real.json").write_text("1")
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", 2)
    assert (tmp_path / "link.json").is_symlink()
    assert read_json(tmp_path / "real.json", int) == 2


def test_disk_full(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", 1)
    monkeypatch.setattr(os, "fsync", raise_full)
    with pytest.raises(
        DoraError, match=r"disk is full: writing .*x\.json needs .* are free\n  what stood there before is"
    ):
        write_json(tmp_path / "x.json", [2] * 100)
    assert names(tmp_path) == ["x.json"]
    assert read_json(tmp_path / "x.json", int) == 1
    with pytest.raises(DoraError, match="nothing was left behind"), replacing(tmp_path / "y", need=10**18):
        pytest.fail("must be refused before anything is written")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_known_by_the_words_of_the_package_tokenizers(tmp_path):
    """Its errors have no class of their own."""
    tokenizer = make_tokenizer().backend_tokenizer
    with pytest.raises(DoraError, match=r"disk is full: writing .*tok"), replacing(tmp_path / "tok"):
        tokenizer.save("/dev/full")
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", ["f", "folder/g"])
def test_other_errors_of_the_system_are_passed_on(tmp_path, path):
    with pytest.raises(PermissionError), replacing(tmp_path / path):
        raise PermissionError
    assert not (tmp_path / path).exists()


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"text": "é", "n": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"text": "é", "n": [1, 2.5, None]}
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(DoraError, match=r"cut\.json is not whole JSON") as caught:
        read_json(tmp_path / "cut.json")
    assert not isinstance(caught.value, UsageError)
    with pytest.raises(UsageError, match=r"no file aa\.json in .*did you mean 'a\.json'(.|\n)*it holds: a\.json, cut"):
        read_json(tmp_path / "aa.json")
    with pytest.raises(UsageError, match=r"its folder .* does not exist"):
        read_json(tmp_path / "none" / "a.json")


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {**TENSORS, "turned": TENSORS["a.weight"].T, "same": TENSORS["a.weight"]}, {"by": "us"})
    back = read_tensors(path)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)
    torch.testing.assert_close(back["turned"], TENSORS["a.weight"].T, rtol=0, atol=0)
    assert Checkpoint.open(path).shards[0].metadata == {"format": "pt", "by": "us"}


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_cut_tensor_file_is_named(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DoraError, match=r"t\.safetensors .*truncated or not a safetensors file"):
        read_tensors(path)
    with pytest.raises(DoraError, match=r"t\.safetensors .*(cut short|not a safetensors file)"):
        Checkpoint.open(path)


def test_missing_bytes_are_counted(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-13])
    with pytest.raises(DoraError, match="13 are missing"):
        Checkpoint.open(path)
    path.write_bytes(whole + b"12")
    with pytest.raises(DoraError, match="2 bytes after its last tensor"):
        Checkpoint.open(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(DoraError, match="git lfs pull"):
        Checkpoint.open(path)


def test_a_header_that_lies_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(20))
    with pytest.raises(DoraError, match="contradicts itself at w"):
        Checkpoint.open(tmp_path / "m.safetensors")


def test_rows_are_read_as_stored(tmp_path):
    write_tensors(tmp_path / "t.safetensors", TENSORS)
    slots = Checkpoint.open(tmp_path / "t.safetensors").slots
    assert set(slots) == set(TENSORS)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(read_whole(slots[name]), tensor, rtol=0, atol=0)
    torch.testing.assert_close(read_rows(slots["b.weight"], slice(2, 5)), TENSORS["b.weight"][2:5], rtol=0, atol=0)
    torch.testing.assert_close(read_rows(slots["half"], slice(1, 9)), TENSORS["half"][1:].view(1, 6), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_range_is_copied_to_another_place(tmp_path, monkeypatch, kernel):
    def cannot(*_args):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not kernel:
        monkeypatch.setattr(os, "copy_file_range", cannot)
    (tmp_path / "a").write_bytes(bytes(range(20)))
    (tmp_path / "b").write_bytes(b"-" * 12)
    copy_bytes(tmp_path / "a", 7, 5, tmp_path / "b", 2)
    assert (tmp_path / "b").read_bytes() == b"--" + bytes(range(7, 12)) + b"-----"
    with pytest.raises(DoraError, match="became shorter"):
        copy_bytes(tmp_path / "a", 18, 5, tmp_path / "b", 0)


def sharded(folder: Path) -> None:
    write_tensors(folder / "m-1.safetensors", {"a": torch.ones(2, 3), "b": torch.ones(3)})
    write_tensors(folder / "m-2.safetensors", {"c": torch.ones(4)})
    weight_map = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 52}, "weight_map": weight_map})


def test_shards(tmp_path):
    sharded(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.slots) == ["a", "b", "c"]
    assert [shard.path.name for shard in checkpoint.shards] == ["m-1.safetensors", "m-2.safetensors"]


def test_everything_wrong_with_shards_is_told_at_once(tmp_path):
    sharded(tmp_path)
    index = read_json(tmp_path / "model.safetensors.index.json")
    index["weight_map"] |= {"d": "m-2.safetensors", "e": "m-3.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", index)
    cut = tmp_path / "m-1.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(DoraError) as caught:
        Checkpoint.open(tmp_path)
    text = str(caught.value)
    assert "m-1.safetensors is cut short" in text
    assert "m-2.safetensors has no tensor d" in text
    assert "no file m-3.safetensors" in text


def test_an_index_cannot_point_outside(tmp_path):
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "../secret.safetensors"}})
    with pytest.raises(DoraError, match="outside its own folder"):
        Checkpoint.open(tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(UsageError, match=r"no model\.safetensors(.|\n)*pytorch_model\.bin(.|\n)*save_pretrained"):
        Checkpoint.open(tmp_path)
    with pytest.raises(UsageError, match="no model folder"):
        Checkpoint.open(tmp_path / "none")


@pytest.mark.parametrize("text", [b"a: [", b"a: \xff"])
def test_yaml_that_is_none_is_named(tmp_path, text):
    (tmp_path / "a.yaml").write_bytes(text)
    with pytest.raises(UsageError, match=r"a\.yaml is not YAML"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UsageError, match=r"no file b\.yaml.*did you mean 'a\.yaml'"):
        read_yaml(tmp_path / "b.yaml")


def test_yaml_makes_no_objects(tmp_path):
    (tmp_path / "a.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(UsageError, match="is not YAML"):
        read_yaml(tmp_path / "a.yaml")


def test_a_long_list_says_how_many_more_there_are():
    assert list_some([], 2, ", ") == ""
    assert list_some(["a", "b"], 2, ", ") == "a, b"
    assert list_some(["a", "b", "c"], 2, ", ") == "a, b, ... and 1 more"
    raise_problems("it", [])
    with pytest.raises(DoraError, match=r"^it: 1 problem\n  a$"):
        raise_problems("it", ["a"])
    with pytest.raises(DoraError, match=r"^it: 22 problems\n  0\n(?s:.*)\n  19\n  \.\.\. and 2 more$"):
        raise_problems("it", [str(i) for i in range(22)])
