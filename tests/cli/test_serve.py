"""`doralib serve`: which folder transformers' server is given, and what is refused."""

import subprocess
from pathlib import Path

import pytest
from conftest import make_llama

import doralib


@pytest.fixture
def served(monkeypatch):
    """The commands that were started, and the files of the folder that each was given, while it was there."""
    seen = []

    class Server:
        def __init__(self, command):
            place = Path(command[4])
            files = {each.name for each in place.iterdir()} if place.is_dir() else set()
            seen.append((command, files))

        __enter__ = lambda self: self
        __exit__ = lambda self, *_: None
        wait = lambda self: 0

    monkeypatch.setattr("doralib.cli.serve._NEEDED", ())
    monkeypatch.setattr(subprocess, "Popen", Server)
    return seen


def test_a_folder_goes_to_transformers_as_it_is(run, served, tiny_llama_folder):
    assert run("serve", tiny_llama_folder, "--port", "8123", "--dtype", "float32")[0] == 0
    ((command, _),) = served
    assert command[1:] == [
        *("-m", "transformers.cli.transformers", "serve", str(tiny_llama_folder)),
        *("--host", "localhost", "--port", "8123", "--dtype", "float32", "--device", "auto"),
    ]


def test_an_adapter_goes_there_merged_and_leaves_nothing(run, served, tiny_llama_folder, tmp_path):
    model = make_llama()
    model.name_or_path = str(tiny_llama_folder)
    doralib.save_adapter(doralib.adapt(model, doralib.DoraConfig(r=2, target_modules=("q_proj",))), tmp_path / "run")
    assert run("serve", tmp_path / "run")[0] == 0
    ((command, files),) = served
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not Path(command[4]).exists()


def test_what_cannot_be_served_is_refused(run, served, tmp_path, monkeypatch):
    status, _, err = run("serve", tmp_path)
    assert status == 2
    assert "is no run, adapter or model folder" in err
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a@b" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "takes what follows an @ for a revision" in run("serve", tmp_path / "a@b")[2]
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    assert "gives labels" in run("serve", tmp_path / "head")[2]
    monkeypatch.setattr("doralib.cli.serve._NEEDED", ("no_such_server",))
    status, _, err = run("serve", tmp_path / "a@b")
    assert status == 2
    assert "pip install 'doralib[serve]'" in err
    assert not served
