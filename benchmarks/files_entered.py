"""How many files and rooms a reader meets who follows one training step, load_adapter, merge --verify and train.

    PYTHONPATH=tests python benchmarks/files_entered.py

A file counts when a function of it is entered, in this thread; what only runs at import does not.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from conftest import make_llama, make_tokenizer

import doralib
from doralib.cli.main import main as run_command

HERE = str(Path(doralib.__file__).parent)


def files_of(call):
    """The files whose functions the call enters."""
    found = set()

    def look(frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(HERE) and frame.f_code.co_name != "<module>":
            found.add(name.removeprefix(HERE + "/"))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(found)


def command(*arguments):
    """Run `doralib ARGUMENTS`."""
    sys.argv = ["doralib", *map(str, arguments)]
    try:
        run_command()
    except SystemExit as stop:
        if stop.code:
            raise


def main():
    """Print each trip's number of files and rooms, and the files' names."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        make_llama().save_pretrained(base)
        make_tokenizer().save_pretrained(base)
        rows = [{"text": f"a film number {i}", "label": ("negative", "positive")[i % 2]} for i in range(20)]
        data = Path(folder) / "train.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        model = doralib.adapt(make_llama(), doralib.DoraConfig(r=2, target_modules=("q_proj",)))
        ids, adapter, out = torch.arange(8)[None], Path(folder) / "adapter", Path(folder) / "run"
        doralib.save_adapter(model, adapter)
        settings = [f"model.path={base}", f"data.train={data}", f"out={out}", "training.max_steps=2", "eval.tasks=[]"]
        trips = {
            "one training step": lambda: model(ids, labels=ids).loss.backward(),
            "load_adapter": lambda: doralib.load_adapter(make_llama(), adapter),
            "merge --verify": lambda: command(
                "merge", adapter, "--base", base, "--out", Path(folder) / "m", "--verify"
            ),
            "train": lambda: command("train", "sentiment", *settings, "adapter.target_modules=[q_proj]"),
        }
        found = {name: files_of(call) for name, call in trips.items()}
    for name, files in found.items():
        rooms = {file.rpartition("/")[0].partition("/")[0] or "the ground" for file in files}
        print(f"{name}: {len(files)} files in {len(rooms)} rooms: {', '.join(files)}")


main()
