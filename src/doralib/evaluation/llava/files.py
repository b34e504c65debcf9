"""Answers to LLaVA-1.5's evaluations in LLaVA's own files, and the files that servers take of them."""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...disk import replacing
from ...errors import UsageError, list_some
from ...extras import import_extra
from ..json_lines import JsonLine, append_lines, read_done
from ..vqa import normalize_written
from .questions import LlavaQuestion, make_key, read_mmbench, read_submitted
from .scores import read_gqa

# of MMBench's table, which is sent back with the answers
_NOT_SENT = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_AT = 6


class _AnswerLine(JsonLine):
    question_id: int | str
    text: str
    prompt: str = ""
    model_id: str = ""


@dataclass(frozen=True)
class AnswerFile:
    """A file of answers, ``{question_id, prompt, text, ...}`` a line."""

    path: Path
    benchmark: str

    def read(self, questions: Sequence[LlavaQuestion], model: str | None = None) -> dict[int, str]:
        """The answers that the file has, by the places of their questions; none if there is no file.

        Raises:
            UsageError: if they are of another model than the one that is named.
        """
        lines = read_done(self.path, _AnswerLine)
        if other := {line["model_id"] for line in lines if model and line["model_id"]} - {model}:
            raise UsageError(
                f"{self.path} has answers of {', '.join(sorted(other))}, not of {model}; choose another folder"
            )
        told = {make_key(self.benchmark, line["question_id"], line["prompt"]): line["text"] for line in lines}
        keys = [make_key(self.benchmark, each.id, each.told) for each in questions]
        return {i: told[key] for i, key in enumerate(keys) if key in told}

    def read_all(self, questions: Sequence[LlavaQuestion]) -> list[str]:
        """The answer to each question.

        Raises:
            UsageError: if some are missing.
        """
        found = self.read(questions)
        missing = [str(each.id) for i, each in enumerate(questions) if i not in found]
        if missing:
            raise UsageError(
                f"{self.path} has no answer to {len(missing)} of {len(questions)} questions of {self.benchmark}: "
                f"{list_some(missing, 5, ', ')}"
            )
        return [found[i] for i in range(len(questions))]

    def append(self, questions: Sequence[LlavaQuestion], said: Sequence[str], model: str) -> None:
        """Write an answer to each question."""
        append_lines(
            self.path,
            [
                {"question_id": each.id, "prompt": each.told, "text": text}
                | {**each.more, "answer_id": uuid.uuid4().hex[:22], "model_id": model, "metadata": {}}
                for each, text in zip(questions, said, strict=True)
            ],
        )


def name_upload(benchmark: str) -> str | None:
    """The name of the file for the server, or for GQA's own script; None: there is none."""
    if benchmark not in _UPLOADS:
        return None
    return f"{benchmark}_upload.{'xlsx' if benchmark == 'mmbench' else 'json'}"


def write_upload(
    benchmark: str, source: Path, questions: Sequence[LlavaQuestion], said: Sequence[str], path: Path
) -> None:
    """Write the file that an evaluation's server takes.

    Args:
        source: The evaluation's folder, from which the questions came.

    Raises:
        UsageError: if openpyxl, which writes MMBench's, is not installed.
    """
    with replacing(path) as part:
        if benchmark == "mmbench":
            _write_workbook(read_mmbench(source), dict(zip((each.id for each in questions), said, strict=True)), part)
        else:
            part.write_text(json.dumps(_UPLOADS[benchmark](source, questions, said)), encoding="utf-8")


def check_workbooks(where: str) -> None:
    """Check that what writes MMBench's file is installed.

    Raises:
        UsageError: if it is not.
    """
    import_extra("openpyxl", f"the file for the server of {where}")


def _list_vqav2(source: Path, questions: Sequence[LlavaQuestion], said: Sequence[str]) -> list[dict[str, Any]]:
    known = {each.id: normalize_written(text) for each, text in zip(questions, said, strict=True)}
    return [{"question_id": number, "answer": known.get(number, "")} for number in read_submitted(source)]


def _list_vizwiz(_: Path, questions: Sequence[LlavaQuestion], said: Sequence[str]) -> list[dict[str, Any]]:
    name = lambda each: Path(each.picture.path).name
    return [
        {"image": name(each), "answer": normalize_written(text)} for each, text in zip(questions, said, strict=True)
    ]


def _list_gqa(_: Path, questions: Sequence[LlavaQuestion], said: Sequence[str]) -> list[dict[str, Any]]:
    return [{"questionId": each.id, "prediction": read_gqa(text)} for each, text in zip(questions, said, strict=True)]


_UPLOADS: dict[str, Callable[[Path, Sequence[LlavaQuestion], Sequence[str]], list[dict[str, Any]]]] = {
    "gqa": _list_gqa,
    "vqav2": _list_vqav2,
    "vizwiz": _list_vizwiz,
    "mmbench": lambda *_: [],  # a workbook
}


def _write_workbook(columns: dict[str, list[str | None]], said: dict[int | str, str], path: Path) -> None:
    numbers = [int(cell or "") for cell in columns["index"]]
    sent: dict[str, Sequence[Any]] = {name: cells for name, cells in columns.items() if name not in _NOT_SENT}
    names = list(sent)
    names.insert(_PREDICTION_AT, "prediction")
    sent |= {"index": numbers, "prediction": [said.get(number) for number in numbers]}
    book = import_extra("openpyxl", "MMBench's file").Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in (names, *zip(*(sent[name] for name in names), strict=True)):
        sheet.append(row)
    book.save(path)
