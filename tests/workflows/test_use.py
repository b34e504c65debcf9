"""What a run's report says can be typed is typed here, for each kind of run."""

import json
import shlex

import pytest

from doralib.recipe import Recipe
from doralib.runs.record import read_run
from doralib.runs.use import list_commands
from doralib.training.job import train

ROWS = [
    {"text": f"{word} film number {i}", "of": "a critic", "label": label}
    for i in range(8)
    for word, label in (("A fine", "positive"), ("It's a dull", "negative"))
]
TALKS = [
    {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}
    for row in ROWS
]
TASK = """
kind: classification
data: rows.jsonl
prompt: "{text}\\nSentiment:"
labels: {positive: " positive", negative: " negative"}
answer: label
"""
KINDS = {
    "one field": {"data": {"prompt": "{text}\nSentiment:", "target": " {label}"}, "eval": {"tasks": ["task.yaml"]}},
    "two fields": {"data": {"prompt": "{of} says: {text} =", "target": " {label}"}},
    "text": {"data": {"style": "text", "target": "text"}},
    "chat": {"data": {"train": "talks.jsonl"}},
    "full": {"data": {"prompt": "text", "target": "label"}, "adapter": {"method": "full"}},
    "classify": {"model": {"kind": "classify"}, "data": {"prompt": "text", "target": "label", "validation": 0.25}},
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in ("one field", "chat", "full") else pytest.mark.long) for kind in KINDS],
)
def test_every_command_of_the_report_works(kind, tiny_llama_folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("rows", ROWS), ("talks", TALKS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK)
    given = KINDS[kind]
    adapter = {"r": 2, "target_modules": ["q_proj"]} if kind != "full" else {}
    recipe = Recipe(
        model={"path": str(tiny_llama_folder), **given.get("model", {})},
        data={"train": "rows.jsonl", **given["data"]},
        adapter={**adapter, **given.get("adapter", {})},
        training={"max_steps": 2, "report_to": "none"},
        eval={"limit": 4, **given.get("eval", {})},
        out="a run",
    )
    folder = train(recipe)
    said = iter(["hello", "/quit"])
    monkeypatch.setattr("doralib.cli.asking._reader", lambda: lambda _: next(said))
    commands, typed = list_commands(read_run(folder)), []
    for title, code in commands.items():
        if "import" in code:
            exec(compile(code, title, "exec"), {})
            continue
        for line in code.splitlines():
            tool, *words = shlex.split(line)
            assert tool == "doralib"
            more = ["--max-new-tokens", "2"] if words[0] == "generate" else []
            status, out, err = run(*words, *more)
            assert status == 0, line + out + err
            typed.append(words[0])
    expected = {"one field": ["generate", "eval", "merge"], "full": ["generate"], "classify": ["merge"]}
    assert typed == expected.get(kind, ["generate", "merge"])
    page = (folder / "report.html").read_text()
    assert "results.json" not in page.partition("Configuration")[0]
    results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}
    assert ("change" in results) == (kind == "one field")
