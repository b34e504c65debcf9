"""Files of prompts for `doralib generate`, and of the answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..disk import replacing
from ..documents import decode_json
from ..errors import DoraError, UsageError
from ..files import find_file, read_json, read_text


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a file: lines of a .txt, or the key `prompt` of the rows of a .json or .jsonl.

    Raises:
        UsageError: if there is no such file, it holds no prompt, or a row has none.
        DoraError: if it is not JSON or not UTF-8.
    """
    path = find_file(path)
    if path.suffix == ".txt":
        prompts = [line for line in read_text(path).splitlines() if line.strip()]
    elif path.suffix in {".json", ".jsonl"}:
        rows = read_json(path, object) if path.suffix == ".json" else _json_lines(path)
        if not isinstance(rows, list):
            raise UsageError(f"{path} must hold a list of objects with the key `prompt`")
        bad = [i for i, row in enumerate(rows, 1) if not (isinstance(row, dict) and isinstance(row.get("prompt"), str))]
        if bad:
            raise UsageError(f"{path}: {len(bad)} of {len(rows)} rows, first row {bad[0]}, have no text under `prompt`")
        prompts = [row["prompt"] for row in rows]
    else:
        raise UsageError(f"{path}: prompts are read from .txt (one a line), .json or .jsonl (key `prompt`)")
    if not prompts:
        raise UsageError(f"{path} holds no prompt")
    return prompts


def write_answers(path: str | Path, prompts: Sequence[str], outputs: Sequence[str]) -> None:
    """Write one JSON object a line, `{"prompt": ..., "output": ...}`, whole or not at all."""
    lines = [
        json.dumps({"prompt": prompt, "output": output}, ensure_ascii=False) + "\n"
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    with replacing(path) as part:
        part.write_text("".join(lines), encoding="utf-8")


def _json_lines(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                rows.append(decode_json(line))
            except ValueError as error:
                raise DoraError(
                    f"{path}: line {number} is not JSON ({error}); correct it or restore the file"
                ) from None
    return rows
