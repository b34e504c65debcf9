"""A session at a real terminal: what a user types and sees, from the training to an answer."""

import json
import os
import re
import sys

import pytest
import yaml

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal of POSIX")


def type_command(folder, *words):
    """Start doralib at a terminal of its own."""
    import pexpect

    plain = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "120"}
    command = ["-m", "doralib", *words]
    return pexpect.spawn(
        sys.executable, command, timeout=280, encoding="utf-8", dimensions=(40, 120), env=plain, cwd=str(folder)
    )


def plain_text(text):
    """What is left on the screen of colors and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.long
def test_from_a_recipe_to_an_answer(tiny_llama_folder, tmp_path):
    import pexpect

    rows = [{"text": f"a film number {i}", "label": "positive"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": str(tiny_llama_folder)},
        "data": {"train": "rows.jsonl", "prompt": "Review: {text}\nSentiment:", "target": " {label}"},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "training": {"max_steps": 4, "per_device_train_batch_size": 2},
        "out": "run",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    child = type_command(tmp_path, "train", "recipe.yaml")
    child.expect(pexpect.EOF)
    child.close()
    said = plain_text(child.before)
    assert child.exitstatus == 0, said
    assert "Traceback" not in said
    # a bar moved, and the end says how it went and what to type next
    assert re.search(r"step .*\d+%", said)
    last = [line.split(maxsplit=1) for line in said.strip().splitlines()[-3:]]
    assert [name for name, _ in last] == ["trained", "report", "next"]
    assert re.fullmatch(r"4 steps in .* s, loss [\d.]+\s*", last[0][1])
    assert last[2][1].strip() == "doralib generate run --prompt 'a film number 0'"

    child = type_command(tmp_path, "generate", "run", "--max-new-tokens", "3")
    child.expect("each question stands by itself")
    child.expect(">")
    child.sendline("/help")
    child.expect("end the chat, as Ctrl-D")
    child.expect(">")
    child.sendline("a film number 1")
    child.expect(["cut after 3 tokens", "an empty answer", ">"])
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
