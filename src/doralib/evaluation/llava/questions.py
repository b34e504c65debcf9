"""The questions of LLaVA-1.5's evaluations, from the folder `eval` as LLaVA lays it out, with the true answers."""

import base64
import binascii
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...data.csv_rows import read_columns
from ...data.pictures import Picture
from ...errors import DoraError, list_some, raise_problems
from ...files import find_file, read_json
from ..json_lines import JsonLine, read_json_lines

LETTERS = "ABCDE"
_LETTER_ONLY = "Answer with the option's letter from the given choices directly."
_PLACE = "<image>"
_MMBENCH_OPTIONS = "ABCD"
# what pandas, by which LLaVA reads the table, takes for no value, and what LLaVA does
_NOTHING = {"#n/a", "#n/a n/a", "#na", "<na>", "n/a", "na", "nan", "-nan", "null", "none"}


class _AskedLine(JsonLine):
    question_id: int | str
    image: str
    text: str
    category: str = ""


class _LabelLine(JsonLine):
    image: str
    text: str
    label: str


@dataclass(frozen=True)
class LlavaQuestion:
    """One question, with what its answer is compared with."""

    id: int | str
    text: str
    """What is asked, behind the picture if there is one."""
    told: str
    """The prompt as LLaVA writes it beside an answer."""
    picture: Picture | None
    answers: tuple[str, ...] = ()
    """The true one, or those that people gave; none where a server keeps them."""
    group: str = ""
    """What kind of question it is, where scores are told apart."""
    choices: int = 0
    """How many there are to choose from; 0: the answer is free."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What a line of an answer file says besides."""


def read_asked(benchmark: str, folder: Path) -> list[LlavaQuestion]:
    """The questions of an evaluation; pictures are not opened.

    Raises:
        UsageError: if a file of LLaVA's folder is not there.
        DoraError: if one is damaged, or a question has no true answer.
    """
    return _READERS[benchmark](folder)


def make_key(benchmark: str, number: int | str, told: str) -> Hashable:
    """What tells a question from the others: its number, and in TextVQA, which numbers pictures, the question too."""
    return (str(number), _find_question(told)) if benchmark == "textvqa" else str(number)


def read_submitted(folder: Path) -> list[int | str]:
    """The numbers of all questions that VQAv2's server wants an answer to, more than are asked."""
    lines = read_json_lines(find_file(folder / "llava_vqav2_mscoco_test2015.jsonl"), _AskedLine)
    return [line["question_id"] for line in lines]


def read_mmbench(folder: Path) -> dict[str, list[str | None]]:
    """MMBench's table by its columns."""
    path = find_file(folder / "mmbench_dev_20230712.tsv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        columns = read_columns(file, "\t", str(path))
    if missing := [name for name in ("index", "question", "hint", "A", "B", "image") if name not in columns]:
        raise DoraError(f"{path} has no column {', '.join(missing)}; it has {', '.join(columns)}")
    return columns


def _read_asked(path: Path, images: Path) -> list[LlavaQuestion]:
    return [
        LlavaQuestion(line["question_id"], line["text"], line["text"], Picture(str(images / line["image"])))
        for line in read_json_lines(find_file(path), _AskedLine)
    ]


def _read_gqa(folder: Path) -> list[LlavaQuestion]:
    data, name = folder / "data", "testdev_balanced_questions.json"
    path = data / name if (data / name).is_file() else data / "questions1.2" / name
    truth = read_json(path if path.is_file() else data / name)
    asked = _read_asked(folder / "llava_gqa_testdev_balanced.jsonl", data / "images")
    _check_known([str(each.id) for each in asked], truth, path)
    made = []
    for each in asked:
        known = truth[str(each.id)]
        kind = "open" if known.get("types", {}).get("structural") == "query" else "binary"
        made.append(replace(each, answers=(str(known["answer"]),), group=kind))
    return made


def _read_textvqa(folder: Path) -> list[LlavaQuestion]:
    path = folder / "TextVQA_0.5.1_val.json"
    rows = read_json(path).get("data", [])
    truth = {(str(row["image_id"]), row["question"].lower()): tuple(row["answers"]) for row in rows}
    asked = _read_asked(folder / "llava_textvqa_val_v051_ocr.jsonl", folder / "train_images")
    keys = [(str(each.id), _find_question(each.told)) for each in asked]
    _check_known(keys, truth, path)
    return [replace(each, answers=truth[key]) for each, key in zip(asked, keys, strict=True)]


def _find_question(told: str) -> str:
    """The question alone in a prompt with what was read in the picture, in lower case."""
    lines = told.split("\n")
    if told.startswith("OCR tokens: "):
        return told.partition("Question: ")[2].partition(" Short answer:")[0].lower()
    return lines[told.startswith("Reference OCR token:") and len(lines) == 3].lower()


def _read_pope(folder: Path) -> list[LlavaQuestion]:
    path, images = find_file(folder / "llava_pope_test.jsonl"), folder / "val2014"
    lines = read_json_lines(path, _AskedLine)
    truth: dict[tuple[str, str, str], str] = {}
    for group in dict.fromkeys(line["category"] for line in lines):
        file = find_file(folder / "coco" / f"coco_pope_{group}.json")
        truth |= {(group, *_point_at(row)): row["label"] for row in read_json_lines(file, _LabelLine)}
    keys = [(line["category"], *_point_at(line)) for line in lines]
    _check_known(keys, truth, folder / "coco")
    return [
        LlavaQuestion(
            line["question_id"], line["text"], line["text"], Picture(str(images / line["image"])), (label,), group
        )
        for line, (label, group) in zip(lines, ((truth[key], key[0]) for key in keys), strict=True)
    ]


def _point_at(line: Mapping[str, Any]) -> tuple[str, str]:
    """The picture, and what is asked about it; LLaVA's file has a slip that POPE's has no more."""
    return line["image"], line["text"].partition("\n")[0].replace("imange", "image")


def _read_sqa(folder: Path) -> list[LlavaQuestion]:
    path, asked = folder / "problems.json", folder / "llava_test_CQM-A.json"
    problems, rows = read_json(path), read_json(asked, list)
    _check_known([str(row["id"]) for row in rows], problems, path)
    made = []
    for row in rows:
        known, seen = problems[str(row["id"])], row.get("image")
        text = f"{row['conversations'][0]['value'].replace(_PLACE, '').strip()}\n{_LETTER_ONLY}"
        picture = Picture(str(folder / "images" / "test" / seen)) if seen else None
        told, letter = f"{_PLACE}\n{text}" if seen else text, LETTERS[known["answer"]]
        group = "image" if seen else ""
        made.append(LlavaQuestion(row["id"], text, told, picture, (letter,), group, len(known["choices"])))
    return made


def _read_mmbench(folder: Path) -> list[LlavaQuestion]:
    columns = read_mmbench(folder)
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    made, problems = [], []
    for number, row in enumerate(rows, 1):
        options = _list_options(row)
        letters = list(_MMBENCH_OPTIONS[: len(options)])
        hint = [] if _is_nothing(row["hint"]) else [str(row["hint"])]
        chosen = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        told = "\n".join([*hint, str(row["question"]), *chosen])
        more = {"round_id": 0, "options": options, "option_char": letters}
        try:
            picture = Picture(f"the picture of row {number}", base64.b64decode(row["image"] or "", validate=True))
            made.append(
                LlavaQuestion(
                    int(row["index"] or ""), f"{told}\n{_LETTER_ONLY}", told, picture, choices=len(options), more=more
                )
            )
        except (binascii.Error, ValueError) as error:
            problems.append(f"row {number}: {error}")
    raise_problems(str(folder / "mmbench_dev_20230712.tsv"), problems)
    return made


def _list_options(row: Mapping[str, str | None]) -> list[str]:
    """The choices up to the first that is none."""
    found = [row.get(letter) for letter in _MMBENCH_OPTIONS]
    end = next((i for i, option in enumerate(found) if _is_nothing(option)), len(found))
    return [str(option) for option in found[:end]]


def _is_nothing(value: str | None) -> bool:
    return value is None or value.lower() in _NOTHING


def _check_known(keys: Sequence[Any], truth: Mapping[Any, Any], path: Path) -> None:
    if unknown := [str(key) for key in keys if key not in truth]:
        raise DoraError(
            f"{path} has no answer to {len(unknown)} of {len(keys)} questions; it is of another version\n  "
            f"{list_some(unknown, 3)}"
        )


_READERS: dict[str, Callable[[Path], list[LlavaQuestion]]] = {
    "gqa": _read_gqa,
    "textvqa": _read_textvqa,
    "pope": _read_pope,
    "sqa": _read_sqa,
    "vqav2": lambda folder: _read_asked(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", folder / "test2015"),
    "vizwiz": lambda folder: _read_asked(folder / "llava_test.jsonl", folder / "test"),
    "mmbench": _read_mmbench,
}
