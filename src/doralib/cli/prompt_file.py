"""Files of prompts for `doralib generate`, and of the answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk import replacing
from ..documents import decode_json
from ..errors import DoraError, UsageError
from ..files import find_file, read_json, read_text

if TYPE_CHECKING:
    from ..data.prompt_form import PromptForm


def read_prompts(path: str | Path, form: "PromptForm | None" = None) -> list[dict[str, str]]:
    """The prompts in a file: lines of a .txt, or of the rows of a .json or .jsonl the fields of the form, or `prompt`.

    Raises:
        UsageError: if there is no such file, it holds no prompt, or a row has none.
        DoraError: if it is not JSON or not UTF-8.
    """
    path = find_file(path)
    if path.suffix == ".txt":
        prompts = [{"prompt": line} for line in read_text(path).splitlines() if line.strip()]
    elif path.suffix in {".json", ".jsonl"}:
        rows = read_json(path, object) if path.suffix == ".json" else _json_lines(path)
        if not isinstance(rows, list):
            raise UsageError(f"{path} must hold a list of objects with the key `prompt`")
        found = [_pick(row, form) if isinstance(row, dict) else None for row in rows]
        if bad := [i for i, values in enumerate(found, 1) if values is None]:
            keys = " and ".join(f"`{name}`" for name in (form.fields if form else ("prompt",)))
            raise UsageError(f"{path}: {len(bad)} of {len(rows)} rows, first row {bad[0]}, have no text under {keys}")
        prompts = [values for values in found if values is not None]
    else:
        raise UsageError(f"{path}: prompts are read from .txt (one a line), .json or .jsonl (key `prompt`)")
    if not prompts:
        raise UsageError(f"{path} holds no prompt")
    return prompts


def _pick(row: Mapping[str, Any], form: "PromptForm | None") -> dict[str, str] | None:
    if form is not None:
        return form.pick(row)
    return {"prompt": row["prompt"]} if isinstance(row.get("prompt"), str) else None


def write_answers(path: str | Path, prompts: Sequence[Mapping[str, str]], outputs: Sequence[str]) -> None:
    """Write one JSON object a line, `{"prompt": ..., "output": ...}`, whole or not at all."""
    lines = [
        json.dumps({**prompt, "output": output}, ensure_ascii=False) + "\n"
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
