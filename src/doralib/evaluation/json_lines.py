"""Files of JSON lines that other people's scripts share with us: read in a form, and written line by line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..documents import decode_json
from ..errors import DoraError, UsageError
from ..files import read_text


class JsonLine(BaseModel):
    """What is read of a line; it may hold more."""

    model_config = ConfigDict(extra="allow", strict=True)


def read_json_lines(path: Path, form: type[JsonLine]) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line that was cut short is left out.

    Raises:
        UsageError: if there is no object in it.
        DoraError: if another line is not of the form.
    """
    # JSON has line separators of Unicode inside its texts
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(form.model_validate(decode_json(line)).model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"])
            raise DoraError(f"{path}, line {number}: {at + ': ' if at else ''}{first['msg']}") from None
        except ValueError as error:
            if number < len(lines):
                raise DoraError(f"{path}, line {number} is not JSON: {error}") from None
    if not found:
        raise UsageError(f"{path} holds no lines of JSON")
    return found


def read_done(path: Path, form: type[JsonLine]) -> list[dict[str, Any]]:
    """The lines of an earlier session; none if there is no file."""
    return read_json_lines(path, form) if path.is_file() and path.stat().st_size else []


def append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Write more lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with path.open("a+b") as file:
        _end_line(file)
        file.write(text.encode())


def _end_line(file: Any) -> None:
    """End the last line; half a line, which a session that was killed left, goes."""
    end = file.seek(0, 2)
    if not end or (file.seek(end - 1), file.read(1))[1] == b"\n":
        return
    file.seek(0)
    whole = file.read()
    begin = whole.rfind(b"\n") + 1
    try:
        json.loads(whole[begin:])
        file.write(b"\n")
    except ValueError:
        file.truncate(begin)
