"""Without the extras: every verb says in one line what to install, and inspect, convert and merge do without."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import make_llama

import doralib
from doralib.config import DoraConfig
from doralib.errors import UsageError
from doralib.extras import EXTRAS, import_extra

# what no package of the core brings along
OURS = (
    *("transformers", "accelerate", "datasets", "pyarrow", "pandas", "jinja2", "tokenizers"),
    *("huggingface_hub", "scipy", "optuna", "matplotlib", "lm_eval", "bitsandbytes", "torchao", "peft", "gguf"),
    *("prompt_toolkit", "requests"),
)
WITHOUT = """
import contextlib, importlib.util, io, json, sys

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {blocked} else find(name, package)

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from doralib.cli.main import main
for arguments in json.load(sys.stdin):
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = ["doralib", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture
def bare(tmp_path):
    """Run several `doralib ARGUMENTS`, in one process, where only the core is installed."""

    def call(*commands):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT.format(blocked=set(OURS))],
            input=json.dumps([list(map(str, arguments)) for arguments in commands]),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(doralib.__file__).parents[1])},
        )
        assert "Traceback" not in done.stderr, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


@pytest.fixture
def files(tmp_path, tiny_llama_folder):
    """A recipe, its rows, a base and an adapter."""
    model = make_llama()
    doralib.adapt(model, DoraConfig(r=2, target_modules=("q_proj",)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    doralib.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").symlink_to(tiny_llama_folder)
    (tmp_path / "rows.csv").write_text("text,label\na film,good\n" * 3)
    (tmp_path / "r.yaml").write_text(
        "model: {path: base}\ndata: {train: rows.csv, prompt: '{text}', target: ' {label}'}\nout: run\n"
    )
    return tmp_path


def test_inspect_convert_merge_and_the_rest_of_the_core(bare, files):
    done = bare(
        ["inspect", "adapter", "--base", "base"],
        ["convert", "adapter", "--to", "mlx", "--out", "mlx"],
        ["merge", "adapter", "--base", "base", "--out", "merged", "--verify", "exact"],
        ["recipes", "chat"],
        ["init", "rows.csv"],
        ["train", "r.yaml", "--print-config"],
        ["train", "--schema"],
    )
    assert [(status, err) for status, _, err in done] == [(0, "")] * 7
    assert "direction moved" in done[0][1]
    for file in ("mlx/adapters.safetensors", "merged/model.safetensors", "recipe.yaml"):
        assert (files / file).is_file()


def test_every_other_verb_says_what_to_install(bare, files):
    commands = [
        ["train", "r.yaml"],
        ["check", "r.yaml"],
        ["data", "r.yaml"],
        ["train", "--settings"],
        ["eval", "base", "--tasks", "boolq=rows.csv"],
        ["generate", "base", "--prompt", "a"],
        ["targets", "base"],
        ["merge", "adapter", "--base", "base", "--out", "m2", "--verify"],
        ["compare", "r.yaml", "--out", "c"],
        ["analyze", "base", "adapter", "--out", "a"],
        ["bench", "step", "--quick"],
        ["demo"],
    ]
    for command, (status, _, err) in zip(commands, bare(*commands), strict=True):
        assert status in (1, 2), (command, err)
        assert re.search(r"pip install 'doralib\[(train|compare)\]'", err), (command, err)
        assert len(err.strip().splitlines()) == 1, (command, err)


def test_mistakes_in_yaml_and_data_are_told_without_extras(bare, files):
    ((status, _, err),) = bare(["train", "r.yaml", "data.target=lable", "training.max_steps=3"])
    assert (status, "did you mean 'label'" in err) == (2, True), err


def test_the_extras_that_errors_name_are_the_packages_own():
    own = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(own)
    named = {re.split(r"[\[<>=;]", each)[0].replace("-", "_"): extra for extra in own for each in own[extra]}
    # a package that an extra lists stands under that extra; the others come with one of these
    for package, extra in EXTRAS.items():
        name = {"PIL": "pillow"}.get(package, package)
        assert name not in named or name in {re.split(r"[<>=]", e)[0].replace("-", "_") for e in own[extra]}, package


def test_a_package_that_cannot_be_loaded_says_why(tmp_path, monkeypatch):
    (tmp_path / "soundfile.py").write_text("raise OSError('no libsndfile')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "soundfile", raising=False)
    with pytest.raises(UsageError, match=r"needs soundfile, which cannot be loaded: no libsndfile; 'doralib\[audio\]'"):
        import_extra("soundfile", "a sound")
