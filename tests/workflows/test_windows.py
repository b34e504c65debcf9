"""What Windows has not, or does otherwise, taken away: every verb that writes files goes on."""

import ast
import errno
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from adapted import move
from conftest import make_llama

import doralib
from doralib import disk, files, process
from doralib.checkpoints.adapter import find_other_base
from doralib.checkpoints.safetensors import Checkpoint
from doralib.errors import DoraError
from doralib.files import read_json, read_tensors, write_json, write_tensors
from doralib.hub import is_local
from doralib.runs import checkpointing

SOURCE = Path(doralib.__file__).parent
# of the standard library's, what Windows' Python has not
NO_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline", "crypt", "nis"}
NO_FUNCTIONS = {
    *("pread", "pwrite", "preadv", "pwritev", "readv", "writev", "copy_file_range", "sendfile", "splice", "sync"),
    *("fdatasync", "fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "setsid", "killpg", "nice", "uname"),
    *("sysconf", "statvfs", "fstatvfs", "mkfifo", "chown", "lchown", "fchown", "wait4", "posix_fadvise", "getloadavg"),
    *("posix_fallocate", "sched_getaffinity", "sched_setaffinity", "openpty", "setrlimit", "O_DIRECTORY", "O_NOFOLLOW"),
    *("O_CLOEXEC", "O_DIRECT", "O_SYNC", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "alarm", "EDQUOT"),
}
# a file that asks first whether the system has it
ASKED_FIRST = {
    ("process.py", "resource"),
    ("process.py", "sysconf"),
    ("process.py", "getloadavg"),
    ("experiments/bench/measure.py", "sysconf"),
}


def test_nothing_that_windows_has_not_is_used_unasked():
    found = set()
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {(name, alias.name) for alias in node.names if alias.name in NO_MODULES}
            if isinstance(node, ast.ImportFrom) and node.module in NO_MODULES:
                found.add((name, node.module))
            of_system = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if of_system and node.value.id in ("os", "signal", "errno") and node.attr in NO_FUNCTIONS:
                found.add((name, node.attr))
    assert found == ASKED_FIRST


def test_text_is_read_and_written_as_utf_8_whatever_the_system_takes_for_its_own():
    """Windows' own is an old code page, in which a quotation mark of a template is an error or another letter."""
    unsaid = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            own = ast.unparse(node.func.value) == "files"
            known = any(word.arg == "encoding" for word in node.keywords)
            if node.func.attr in ("read_text", "write_text") and not own and not known:
                unsaid.append(f"{path.relative_to(SOURCE)}: {ast.unparse(node)}")
    # these read the kernel's files, which no Windows has
    assert [line for line in unsaid if not line.startswith("experiments/bench/me")] == []


def open_file(path, flags, *args, real=os.open, readable, **kwargs):
    """Windows opens no folders."""
    if Path(path).is_dir():
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    handle = real(path, flags, *args, **kwargs)
    (readable.discard if flags & (os.O_RDWR | os.O_WRONLY) else readable.add)(handle)
    return handle


def sync_file(handle, real=os.fsync, *, readable):
    """Windows syncs what may be written alone."""
    if handle in readable:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real(handle)


def replace_file(source, target, real=os.replace, **kwargs):
    """Windows replaces and moves nothing that is mapped."""
    mapped = [line.partition("/")[2] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    for path in (source, target):
        if any(f"/{name}".startswith((f"{path}/", f"{path} ")) or f"/{name}" == str(path) for name in mapped):
            raise PermissionError(errno.EACCES, "the file is mapped", str(path))
    real(source, target, **kwargs)


def refuse(*_, **__):
    raise OSError(errno.EPERM, "a required privilege is not held by the client")


@pytest.fixture
def windows(monkeypatch):
    """As far as our code can tell: calls that are missing, and files that may not be replaced."""
    for name in ("pwrite", "pread", "preadv", "copy_file_range", "sync", "fork"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("resource", "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in (disk, files, process):
        monkeypatch.setattr(module, "ON_WINDOWS", True)
    for name in ("symlink", "link", "kill"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    readable = set()
    monkeypatch.setattr(os, "open", partial(open_file, readable=readable))
    monkeypatch.setattr(os, "fsync", partial(sync_file, readable=readable))
    monkeypatch.setattr(os, "replace", replace_file)


@pytest.fixture
def adapter(tmp_path):
    model = move(doralib.adapt(make_llama(), doralib.DoraConfig(r=2, target_modules=("q_proj", "up_proj"))))
    doralib.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "doralib_merge.json"}


def test_the_taken_away_is_missed(windows, tmp_path):
    """The fixture does what it says, or the tests below prove nothing."""
    with pytest.raises(AttributeError):
        os.pwrite(0, b"", 0)
    with pytest.raises(ImportError):
        import resource  # noqa: F401
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(3)})
    import safetensors.torch

    mapped = safetensors.torch.load_file(tmp_path / "a.safetensors")
    with pytest.raises(PermissionError, match="mapped"):
        write_tensors(tmp_path / "a.safetensors", mapped)


def test_merge(adapter, tiny_llama_folder, tmp_path, run, request):
    assert run("merge", adapter, "--base", tiny_llama_folder, "--out", tmp_path / "want")[0] == 0
    request.getfixturevalue("windows")
    status, out, _ = run("merge", adapter, "--base", tiny_llama_folder, "--out", tmp_path / "got", "--verify")
    assert status == 0, out
    assert content(tmp_path / "got") == content(tmp_path / "want")
    status, out, _ = run("merge", adapter, "--base", tiny_llama_folder, "--out", tmp_path / "got", "--overwrite")
    assert status == 0, out
    assert content(tmp_path / "got") == content(tmp_path / "want")


def test_convert_and_back(windows, adapter, tiny_llama_folder, tmp_path, run):
    for source, to, out in ((adapter, "mlx", "mlx"), (tmp_path / "mlx", "peft", "back")):
        assert run("convert", source, "--to", to, "--out", tmp_path / out, "--base", tiny_llama_folder)[0] == 0
    one, other = (read_tensors(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back"))
    assert one.keys() == other.keys()
    lora = ("--to", "lora", "--rank", "4", "--base", tiny_llama_folder, "--texts", "--out", tmp_path / "lora")
    assert run("convert", adapter, *lora)[0] == 0


def test_an_adapter_that_is_loaded_can_be_saved_in_its_place(windows, adapter):
    model = doralib.load_adapter(make_llama(), adapter)
    before = read_tensors(adapter / "adapter_model.safetensors")
    doralib.save_adapter(model, adapter)
    assert before.keys() == read_tensors(adapter / "adapter_model.safetensors").keys()


@pytest.mark.long
def test_train_evaluate_and_resume(windows, tiny_llama_folder, tmp_path, run):
    rows = [{"text": f"the film was {word}", "label": word} for word in ("good", "bad", "fine", "dull") * 4]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": str(tiny_llama_folder), "dtype": "float32"},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "style": "completion",
            "prompt": "{text}",
            "target": " {label}",
        },
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "training": {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01},
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, out, err = run("train", tmp_path / "recipe.yaml")
    assert status == 0, out + err
    run_folder = tmp_path / "run"
    want = read_tensors(run_folder / "adapter_model.safetensors")
    assert checkpointing.step_of(checkpointing.find_newest(run_folder / "checkpoints")) == 4
    # killed after the second step: what a dead process left behind lies there too
    shutil.rmtree(run_folder / "checkpoints" / "checkpoint-4")
    (run_folder / "adapter_model.safetensors").unlink()
    left = run_folder / f".adapter_model.safetensors.{disk._HOST}-999999999-0123abcd.part"
    left.write_bytes(b"half")
    status, out, err = run("train", tmp_path / "recipe.yaml", "--resume")
    assert status == 0, out + err
    assert not left.exists()
    got = read_tensors(run_folder / "adapter_model.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert (run_folder / "report.html").is_file()
    status, out, err = run("train", tmp_path / "recipe.yaml", "--overwrite")
    assert status == 0, out + err


def test_without_psutil_nothing_is_known_and_nothing_deleted(windows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    left = tmp_path / f".a.json.{disk._HOST}-999999999-0123abcd.part"
    left.write_bytes(b"half")
    write_json(tmp_path / "a.json", 1)
    assert left.exists()
    assert process.is_alive(os.getpid())


def test_memory_and_load_of_a_machine_that_does_not_tell(monkeypatch):
    known = process.read_machine_memory()
    assert known > 100e6
    assert len(process.read_load()) == 3
    for name in ("sysconf", "getloadavg"):
        monkeypatch.delattr(os, name)
    assert process.read_load() == []
    assert process.read_machine_memory() == pytest.approx(known, rel=0.01)
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert process.read_machine_memory() is None


def test_peak_memory_on_every_system(monkeypatch):
    here = process.read_peak_memory()
    assert here > 50e6
    monkeypatch.setattr(process, "Path", lambda _: Path("/nowhere"))
    import resource

    assert process.read_peak_memory() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    monkeypatch.setattr(sys, "platform", "darwin")  # counts in bytes
    assert process.read_peak_memory() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setitem(sys.modules, "resource", None)
    assert process.read_peak_memory() is None
    monkeypatch.setitem(sys.modules, "psutil", type("", (), {"Process": lambda: Peak}))
    assert process.read_peak_memory() == 123


class Peak:
    def memory_info():
        return type("", (), {"peak_wset": 123})


@pytest.mark.parametrize("code", [errno.ENOSPC, 112])
def test_a_full_disk_by_the_number_that_the_system_gives(code, tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(DoraError, match="disk is full"), disk.replacing(tmp_path / "a"):
        raise SafetensorError(f"I/O error: there is not enough space on the disk. (os error {code})")
    with pytest.raises(SafetensorError), disk.replacing(tmp_path / "a"):
        raise SafetensorError("I/O error: another (os error 1121)")


@pytest.mark.parametrize("name", ["C:\\models\\llama", "C:/llama", "models\\llama", ".\\llama", "\\\\server\\llama"])
def test_windows_paths_are_no_hub_names(name):
    assert is_local(name)


def test_hub_names_are_no_paths():
    assert not is_local("HuggingFaceTB/SmolLM2-135M")


@pytest.mark.parametrize("named", ["C:\\Users\\me\\Llama-3", "D:/models/Llama-3", "/home/me/Llama-3", "meta/Llama-3"])
def test_a_base_is_the_same_wherever_it_lies(named):
    assert find_other_base(named, "/data/Llama-3") == ()
    assert find_other_base(named, "/data/Mistral")


@pytest.mark.parametrize("file", ["..\\secret.safetensors", "C:secret.safetensors", "sub\\a.safetensors", "sub/a"])
def test_an_index_names_files_of_its_own_folder_alone(file, tmp_path):
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"w": file}})
    with pytest.raises(DoraError, match="names files outside its own folder"):
        Checkpoint.open(tmp_path)


def test_settings_written_on_windows_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"path": "C:\\\\models"}\r\n')
    assert read_json(tmp_path / "a.json") == {"path": "C:\\models"}
    (tmp_path / "a.yaml").write_bytes("\ufeffmodel:\r\n  path: C:\\models\r\n".encode())
    assert files.read_yaml(tmp_path / "a.yaml") == {"model": {"path": "C:\\models"}}
