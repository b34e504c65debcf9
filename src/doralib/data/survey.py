"""What rows are like as the model sees them: lengths, what is learned, what is left out, what is there twice."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..recipe import DataSettings
from .packing import is_packed
from .prepare import IGNORED, PreparedRows, RowNumber

LEFT, RIGHT = "⟦", "⟧"
"""What stands around the learned part of a text where there are no colors."""

_ROWS_AT_ONCE = 10_000
_BARS = 12
_DUPLICATES_SHOWN = 5
_MOST_CHARACTERS = 400

Piece = tuple[str, bool]


def survey_rows(
    train: PreparedRows,
    validation: PreparedRows | None,
    settings: DataSettings,
    tokenizer: Tokenizer,
    shown: int = 5,
    prompts: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> dict[str, Any]:
    """What the rows are like, as plain values for a page or a terminal.

    Keys: ``settings``; ``splits``, by the name of each what `survey_split` says; ``duplicates``, what `find_shared`
    says of train and validation; ``tasks``, what `find_asked` says of ``prompts``; ``shown``, the first rows of train:
    number, tokens, learned tokens, and pieces ``[text, learned]``.
    """
    splits = {"train": (train, train.numbers)}
    if validation is not None:
        splits["validation"] = (validation, validation.numbers)
    first = train.rows.select(range(min(shown, len(train.rows))))
    return {
        "settings": {
            "style": settings.style,
            "loss_on": settings.loss_on,
            "max_length": settings.max_length,
            "packing": is_packed(settings),
        },
        "splits": {name: survey_split(rows, numbers) for name, (rows, numbers) in splits.items()},
        "duplicates": find_shared(*splits["train"], *splits["validation"]) if validation is not None else None,
        "tasks": find_asked(*splits["train"], prompts or {}),
        "shown": [
            {
                "number": number,
                "tokens": len(row["input_ids"]),
                "learned": count_learned(row["labels"]),
                "pieces": split_learned(row["input_ids"], row["labels"], tokenizer),
            }
            for number, row in zip(splits["train"][1], first, strict=False)
        ],
    }


def survey_split(prepared: PreparedRows, numbers: Sequence[RowNumber]) -> dict[str, Any]:
    """Of the rows of one split: how many, how long, what is learned of them, which are left out or there twice."""
    report, lengths = prepared.report, np.array(prepared.rows["length"][:])
    seen: dict[bytes, RowNumber] = {}
    twice, silent = [], []
    for number, (ids, labels) in zip(numbers, _iterate(prepared), strict=True):
        first = seen.setdefault(ids.tobytes(), number)
        twice += [(number, first)] if first != number else []
        silent += [number] if count_learned(labels) == 0 else []
    counts, edges = np.histogram(lengths, bins=_find_edges(lengths))
    return {
        "rows": report.rows,
        "kept": report.kept,
        "dropped": dict(report.dropped),
        "cut": report.truncated,
        "examples": [line.strip() for line in report.examples],
        "tokens": report.tokens,
        "learned": report.label_tokens,
        "nothing_learned": silent[:_DUPLICATES_SHOWN],
        "num_nothing_learned": len(silent),
        "lengths": {"shortest": int(lengths.min()), "median": int(np.median(lengths)), "longest": int(lengths.max())},
        "histogram": [
            [int(low), int(high) - 1, int(n)] for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
        "num_twice": len(twice),
        "twice": twice[:_DUPLICATES_SHOWN],
    }


def find_shared(
    train: PreparedRows,
    train_numbers: Sequence[RowNumber],
    validation: PreparedRows,
    validation_numbers: Sequence[RowNumber],
) -> dict[str, Any]:
    """Rows of validation that stand in train too: whole, or with the same beginning and another answer."""
    whole: dict[bytes, RowNumber] = {}
    beginnings: dict[bytes, RowNumber] = {}
    for number, (ids, labels) in zip(train_numbers, _iterate(train), strict=True):
        whole.setdefault(ids.tobytes(), number)
        if beginning := _read_beginning(ids, labels):
            beginnings.setdefault(beginning, number)
    same, alike = [], []
    for number, (ids, labels) in zip(validation_numbers, _iterate(validation), strict=True):
        if (other := whole.get(ids.tobytes())) is not None:
            same.append((number, other))
        elif (other := beginnings.get(_read_beginning(ids, labels))) is not None:
            alike.append((number, other))
    return {
        "num_same": len(same),
        "same": same[:_DUPLICATES_SHOWN],
        "num_same_prompt": len(alike),
        "same_prompt": alike[:_DUPLICATES_SHOWN],
    }


def find_asked(
    train: PreparedRows, train_numbers: Sequence[RowNumber], prompts: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, dict[str, Any]]:
    """For each task, given as its prompts in tokens, those that rows of train begin with."""
    beginnings: dict[bytes, RowNumber] = {}
    for number, (ids, labels) in zip(train_numbers, _iterate(train), strict=True):
        if beginning := _read_beginning(ids, labels):
            beginnings.setdefault(beginning, number)
    found = {}
    for task, asked in prompts.items():
        keys = [np.asarray(ids, dtype=np.int32).tobytes() for ids in asked]
        pairs = [(number, beginnings[key]) for number, key in enumerate(keys, 1) if key in beginnings]
        found[task] = {"num_asked": len(asked), "num_same": len(pairs), "same": pairs[:_DUPLICATES_SHOWN]}
    return found


def count_learned(labels: Sequence[int] | np.ndarray) -> int:
    """How many tokens of a row are learned; the first never is, as nothing comes before it."""
    return int((np.asarray(labels)[1:] != IGNORED).sum())


def split_learned(ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer) -> list[Piece]:
    """A row's text in stretches, each learned or not; special tokens are spelled out."""
    learned = [label != IGNORED for label in labels]
    ends = [i for i in range(1, len(ids)) if learned[i] != learned[i - 1]] + [len(ids)]
    pieces, start, before = [], 0, ""
    for end in ends:
        # a tokenizer may begin a text without the blank that its first word has elsewhere
        upto = decode(ids[:end], tokenizer)
        text = upto.removeprefix(before) if upto.startswith(before) else decode(ids[start:end], tokenizer)
        pieces.append((text, learned[start]))
        start, before = end, upto
    return pieces


def decode(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text as it is, special tokens too."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def mark_learned(row: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """A row's text with its learned stretches in `LEFT` and `RIGHT`; long ones without their middle."""
    pieces = split_learned(row["input_ids"], row["labels"], tokenizer)
    return "".join(f"{LEFT}{shorten(text)}{RIGHT}" if learned else shorten(text) for text, learned in pieces)


def shorten(text: str) -> str:
    """A text without its middle where it is long."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


def _iterate(prepared: PreparedRows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels of each row, int32, whose bytes can be compared; before them what its pictures are."""
    names = [name for name in ("input_ids", "labels", "pictures_hash") if name in prepared.rows.column_names]
    for table in prepared.rows.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE):
        columns = {name: _cut(table.column(name)) for name in names}
        if "pictures_hash" not in columns:
            yield from zip(columns["input_ids"], columns["labels"], strict=True)
            continue
        for ids, labels, seen in zip(columns["input_ids"], columns["labels"], columns["pictures_hash"], strict=True):
            yield np.concatenate([seen, ids]), np.concatenate([np.full_like(seen, IGNORED), labels])


def _cut(column: Any) -> Iterator[np.ndarray]:
    """The values of each row of a column, int32."""
    whole = column.combine_chunks()
    if not hasattr(whole, "offsets"):
        # one number a row, of 64 bits
        yield from whole.to_numpy(zero_copy_only=False)[:, None].view(np.int32)
        return
    values, edges = whole.values.to_numpy(zero_copy_only=False).astype(np.int32, copy=False), whole.offsets.to_numpy()
    for start, end in itertools.pairwise(edges.tolist()):
        yield values[start:end]


def _read_beginning(ids: np.ndarray, labels: np.ndarray) -> bytes:
    """What comes before the first learned token, if it is more than a start token."""
    at = int(np.argmax(labels != IGNORED))
    return ids[:at].tobytes() if at > 1 else b""


def _find_edges(lengths: np.ndarray) -> np.ndarray:
    """Whole numbers, so that no bar is wider than it says."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    step = max(1, -(-(high - low) // _BARS))
    return np.arange(low, high + step, step)
