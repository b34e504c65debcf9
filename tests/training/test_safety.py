"""Nothing is lost: what --overwrite may delete, who may write, what a resumed run takes up, wherever it stands."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from doralib import files
from doralib.data import rows as data_rows
from doralib.errors import DoraError, UsageError
from doralib.recipe import Recipe
from doralib.runs import checkpointing, lock
from doralib.runs.folder import RunFolder
from doralib.training import job
from doralib.training.job import fine_tune, train


@pytest.fixture
def data_file(tmp_path):
    words = ["good", "bad", "fine", "dull", "film", "plot", "evening"]
    texts = [" ".join(words[(i * (k + 3)) % 7] for k in range(2 + i % 9)) for i in range(56)]
    lines = [json.dumps({"text": text, "label": ("positive", "negative")[i % 2]}) for i, text in enumerate(texts)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def recipe(tiny_llama_folder, data_file, tmp_path):
    """Fills in what a test does not say."""

    def make(**changes):
        values = {
            "model": {"path": str(tiny_llama_folder)},
            "data": {"train": str(data_file), "prompt": "{text}", "target": " {label}"},
            "adapter": {"r": 3, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1},
            "training": {"per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2},
            "eval": {"before": False},
            "out": "run",
        }
        for group, given in changes.items():
            values[group] = {**values[group], **given} if isinstance(given, dict) else given
        return Recipe(**values | {"out": str(tmp_path / values["out"]) if values["out"] else ""})

    return make


def summary(run):
    return json.loads((run / "summary.json").read_text())


def weights(run):
    return load_file(run / "adapter_model.safetensors")


def measured(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if line["kind"] == "eval"]


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def begun(recipe, tmp_path):
    """A short run, and the recipe that made it."""
    wanted = recipe(training={"max_steps": 2, "save_steps": 1})
    return train(wanted), wanted


@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex",
        "checkpoints/checkpoint-1/mine.json",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("checkpoints/notes.txt", "figures/raw/a.png", "more/x")
        ),
    ],
)
def test_overwrite_deletes_nothing_that_the_run_did_not_write(begun, name):
    run, wanted = begun
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("mine")
    before = listing(run)
    with pytest.raises(UsageError, match=f"holds what the run did not write: {name}; move it away"):
        fine_tune(wanted, overwrite=True)
    assert listing(run) == before
    (run / name).unlink()
    fine_tune(wanted, overwrite=True)


def test_a_run_lists_every_file_that_it_writes(recipe, tmp_path, data_file):
    task = {"kind": "classification", "data": str(data_file), "prompt": "{text}", "answer": "label"}
    task["labels"] = {"positive": " positive", "negative": " negative"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    for method, more in (("dora", {}), ("full", {"target_modules": None})):
        wanted = recipe(
            out=method,
            adapter={"method": method, **more},
            data={"validation": 0.2},
            training={"max_steps": 2, "report_to": "tensorboard"},
            eval={"before": True, "tasks": [str(tmp_path / "task.yaml")], "limit": 4},
        )
        run = RunFolder(train(wanted))
        own, others = run._list_files()
        assert others == [], "a file that a run writes stands in its record, or --overwrite takes it for somebody's"
        assert {"results.json", "report.html", "summary.json"} <= {path.name for path in own}
        record = json.loads((run.path / "run.json").read_text())
        assert str(tmp_path) not in json.dumps(record["files"])


def test_overwrite_of_a_folder_with_a_recipe_named_config(recipe, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    wanted = recipe(out="project")
    (project / "config.yaml").write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    (project / "code.py").write_text("pass")
    before = listing(project)
    for options in ({"overwrite": True}, {}):
        with pytest.raises(UsageError, match="holds files and is no run of doralib"):
            fine_tune(wanted, **options)
    assert listing(project) == before
    with pytest.raises(UsageError, match="out"):
        recipe(out="")


def test_overwrite_keeps_what_the_run_reads(recipe):
    full = {"method": "full", "target_modules": None}
    run = fine_tune(recipe(adapter=full, training={"max_steps": 1}))
    before = listing(run)
    onward = recipe(model={"path": str(run / "model")}, training={"max_steps": 1})
    with pytest.raises(UsageError, match=r"this run reads .*/run/model in it"):
        fine_tune(onward, overwrite=True)
    assert listing(run) == before
    assert (run / "model" / "model.safetensors").stat().st_mode == (run / "config.yaml").stat().st_mode
    fine_tune(recipe(adapter=full, training={"max_steps": 2}), overwrite=True)
    assert summary(run)["steps"] == 2


@pytest.mark.long
def test_overwrite_through_a_link_renews_the_run_behind_it(begun, recipe, tmp_path):
    run, wanted = begun
    (tmp_path / "link").symlink_to(run)
    other = wanted.model_copy(update={"out": str(tmp_path / "link"), "seed": 5})
    before = weights(run)
    fine_tune(other, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(run).items())


@pytest.mark.long
def test_a_run_never_replaces_its_folder(begun, monkeypatch):
    """So a mount point, and a folder whose parent is read-only, can be a run's folder."""
    run, wanted = begun
    node, parent = run.stat().st_ino, run.parent
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(parent) and access(path, mode))
    fine_tune(wanted, overwrite=True)
    assert run.stat().st_ino == node
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "checkpoint-1" and access(path, mode))
    before = listing(run)
    with pytest.raises(UsageError, match="checkpoint-1 is read-only; nothing was deleted"):
        fine_tune(wanted, overwrite=True)
    assert listing(run) == before


@pytest.mark.long
def test_an_overwrite_that_ends_once_all_is_deleted_can_be_done_again(begun, monkeypatch):
    run, wanted = begun
    write = files.write_json

    def full(path, value):
        if path.name == "run.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        fine_tune(wanted, overwrite=True)
    assert listing(run) == ["run.json"]
    monkeypatch.setattr(files, "write_json", write)
    # something is mounted there
    (run / "checkpoints").mkdir()
    fine_tune(wanted)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_disk_that_is_full_for_the_tokenizer_is_told_and_the_run_goes_on(recipe, monkeypatch):
    """The package tokenizers says it in an error without a class of its own."""
    wanted = recipe(training={"max_steps": 2, "save_steps": 1})
    save = PreTrainedTokenizerFast.save_pretrained

    def full(tokenizer, *_, **__):
        tokenizer.backend_tokenizer.save("/dev/full")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(DoraError, match=r"could not be written: No space left.*--resume goes on from .*checkpoint-2"):
        fine_tune(wanted)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    run = fine_tune(wanted, resume=True)
    assert (run / "tokenizer.json").is_file()
    assert summary(run)["status"] == "finished"


HOLD = """
import sys, time
from pathlib import Path
from doralib.runs import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_writes_a_run_and_a_dead_one_leaves_it_free(begun):
    run, wanted = begun
    process = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    before = listing(run)
    try:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match=f"process {process.pid} on {socket.gethostname()} is writing into"):
                fine_tune(wanted, **options)
        with pytest.raises(UsageError, match="is writing into"), lock.hold(run):
            pytest.fail("two hold it")
        assert listing(run) == before
    finally:
        process.kill()
        process.wait()
    assert (run / lock.NAME).exists()
    fine_tune(wanted, overwrite=True)
    assert not (run / lock.NAME).exists()


def test_without_locks_of_the_file_system_the_process_decides(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(lock.errno.ENOTSUP, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    monkeypatch.setattr(lock, "_TRIES", 1)
    write = lambda host, process: (tmp_path / lock.NAME).write_text(json.dumps({"host": host, "process": process}))
    for host, process, free in [
        (socket.gethostname(), os.getppid(), False),
        (socket.gethostname(), 2**22 + 1, True),
        ("elsewhere", 5, False),
    ]:
        write(host, process)
        assert (lock.find_holder(tmp_path) is None) == free
    with pytest.raises(UsageError, match=r"process 5 on elsewhere .*delete .*\.lock"), lock.hold(tmp_path):
        pytest.fail("it is held")


def test_a_run_killed_at_its_first_write_leaves_the_folder_free(recipe, tmp_path):
    part = f".config.yaml.{socket.gethostname()}-{2**22 + 1}-0123abcd.part"
    for resume in (False, True):
        wanted = recipe(out=f"run-{resume}", training={"max_steps": 1})
        (tmp_path / wanted.out).mkdir()
        (tmp_path / wanted.out / part).write_text("half")
        fine_tune(wanted, resume=resume)
        assert part not in listing(tmp_path / wanted.out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ".config.yaml.part").write_text("mine")
    with pytest.raises(UsageError, match="holds files"):
        fine_tune(recipe(out="notes"))


def test_resume_refuses_other_rows(recipe, data_file, tmp_path):
    mine = tmp_path / "mine.jsonl"
    shutil.copy(data_file, mine)
    wanted = recipe(data={"train": str(mine)}, training={"max_steps": 1})
    fine_tune(wanted)
    stat = mine.stat()
    mine.write_text(mine.read_text().replace("good", "gold"))
    os.utime(mine, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UsageError, match=r"the file of data\.train is not the one that this run began with; put that"):
        fine_tune(wanted, resume=True)
    shutil.copy(data_file, mine)
    fine_tune(wanted, resume=True)


def test_a_copy_with_the_same_time_is_read_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    for word in ("one", "two"):
        path.write_text(json.dumps({"text": word}) + "\n")
        os.utime(path, (10**9, 10**9))
        assert data_rows.read_dataset(str(path), "data.train")["text"][:] == [word]


def test_local_files_ask_no_network(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(load.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(load.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(load, "get_session", lambda: asked.append("a request"), raising=False)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address) or [])
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "nobody counts this"}\n')
    data_rows.read_dataset(str(path), "data.train")
    assert asked == []
    assert load.config.HF_UPDATE_DOWNLOAD_COUNTS


PACE = {"max_steps": 40, "eval_steps": 2, "save_steps": 2, "early_stopping_patience": 2, "save_total_limit": None}
ODD = {"metric_for_best_model": "loss", "greater_is_better": True}


def cut_back(whole: Path, run: Path, step: int) -> None:
    """A copy of a run, as it was when its checkpoint of a step was whole."""
    shutil.copytree(whole, run)
    for name in ("adapter_model.safetensors", "adapter_config.json", "doralib_config.json", "summary.json"):
        (run / name).unlink(missing_ok=True)
    for path in (run / "checkpoints").iterdir():
        if checkpointing.step_of(path) > step:
            shutil.rmtree(path)


def test_early_stopping_counts_on_after_a_resume_in_a_moved_folder(recipe, tmp_path, monkeypatch):
    settings = {"data": {"validation": 0.2}, "training": PACE | ODD}
    whole = fine_tune(recipe(out="whole", **settings))
    assert (summary(whole)["steps"], summary(whole)["best_step"]) == (6, 2)
    wanted = weights(whole)
    for step in (2, 4, 6):
        run = tmp_path / "moved" / f"from-{step}"
        run.parent.mkdir(exist_ok=True)
        cut_back(whole, run, step)
        monkeypatch.chdir(run.parent)
        again = recipe(**settings).model_copy(update={"out": run.name})
        fine_tune(again, resume=True)
        assert (summary(run)["steps"], summary(run)["best_step"]) == (6, 2), step
        assert measured(run) == measured(whole)
        assert all(torch.equal(weights(run)[name], tensor) for name, tensor in wanted.items())
        state = json.loads((run / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == "checkpoint-2"
    # the best one is damaged: the best of the others is taken, and named
    run = tmp_path / "damaged"
    cut_back(whole, run, 6)
    flip(run / "checkpoints" / "checkpoint-2" / "adapter.safetensors")
    fine_tune(recipe(**settings).model_copy(update={"out": str(run)}), resume=True)
    assert summary(run)["best_step"] == 4
    kept = load_file(run / "checkpoints" / "checkpoint-4" / "adapter.safetensors")
    ours = weights(run)["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    assert torch.equal(ours, kept["model.layers.0.mlp.down_proj.lora_B"])


def flip(path: Path) -> None:
    """Another last byte, in a file of the same size."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter.safetensors", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_checkpoint_of_the_right_size_is_passed_over(recipe, tmp_path, caplog, name):
    settings = {"training": {"max_steps": 4, "save_steps": 2}}
    whole = fine_tune(recipe(out="whole", **settings))
    cut_back(whole, tmp_path / "run", 4)
    flip(tmp_path / "run" / "checkpoints" / "checkpoint-4" / name)
    assert checkpointing.is_whole(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    with caplog.at_level("WARNING", "doralib"):
        fine_tune(recipe(**settings), resume=True)
    assert f"checkpoint-4 is damaged ({name}: not the bytes that were written) and is passed over" in caplog.text
    assert all(torch.equal(weights(tmp_path / "run")[key], tensor) for key, tensor in weights(whole).items())


@pytest.mark.parametrize("best", [False, True])
def test_killed_before_the_last_checkpoints_are_pruned(recipe, best):
    more = {"eval_steps": 1, "load_best_model_at_end": True, **ODD} if best else {}
    settings = {"data": {"validation": 0.2}} if best else {}
    wanted = recipe(training={"max_steps": 3, "save_steps": 1, "save_total_limit": 1, **more}, **settings)
    run = fine_tune(wanted)
    kept = listing(run)
    last = next(iter((run / "checkpoints").iterdir()))
    assert last.name == ("checkpoint-1" if best else "checkpoint-3")
    # as they stood before
    for step in (2, 3) if best else (1, 2):
        shutil.copytree(last, run / "checkpoints" / f"checkpoint-{step}")
    if best:
        state = run / "checkpoints" / "checkpoint-3" / "trainer_state.json"
        told = json.loads(state.read_text())
        state.write_text(json.dumps({**told, "global_step": 3, "best_global_step": 1}))
        checkpointing.seal(state.parent)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / name).unlink()
    fine_tune(wanted, resume=True)
    assert listing(run) == kept


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_moved_start_killed_while_scoring_goes_on(recipe, monkeypatch, start):
    wanted = recipe(adapter={"init_lora_weights": start}, training={"max_steps": 2})
    sample = job.sample

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "sample", kill)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(wanted)
    monkeypatch.setattr(job, "sample", sample)
    run = RunFolder(Path(wanted.out))
    before = run.trained.read_bytes()
    fine_tune(wanted, resume=True)
    assert run.trained.read_bytes() == before
    assert "after" in json.loads(run.samples.read_text())[0]


def test_seals_without_hashes_still_count(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "a.json").write_text("1")
    (folder / "whole.json").write_text('{"a.json": 1}')
    assert checkpointing.find_sound(tmp_path) == folder
    for seal in ("[]", "3", '{"../x": 1}', '{"a.json": [1]}', "{}"):
        (folder / "whole.json").write_text(seal)
        assert checkpointing.find_sound(tmp_path) is None


QUIET = """
import socket, sys
asked = []

def refuse(*address, **_):
    asked.append(address)
    raise OSError("no network")

connect = socket.socket.connect
socket.getaddrinfo = refuse
socket.socket.connect = lambda self, at: connect(self, at) if self.family == socket.AF_UNIX else refuse(at)
from doralib.cli import main as cli
sys.argv[0] = "doralib"
try:
    cli.main()
finally:
    assert asked == [], asked
"""


@pytest.mark.long
def test_local_models_and_files_ask_nobody(recipe, tmp_path):
    wanted = recipe(training={"max_steps": 1})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment["HF_HOME"] = str(tmp_path / "home")
    for words in (["train", tmp_path / "recipe.yaml"], ["merge", wanted.out, "--out", tmp_path / "merged"]):
        done = subprocess.run(
            [sys.executable, "-c", QUIET, *words], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
