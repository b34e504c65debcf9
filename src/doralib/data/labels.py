"""Texts to tokens, and which of the tokens are learned: those that hold a learned character."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from .prepare import IGNORED, RenderedRow

_Coded = tuple[list[int], list[bool], str]
"""Tokens, which of them are learned, and a learned stretch that has no token."""


@dataclass(frozen=True)
class LabeledRow:
    """Tokens of one row, and labels of the same length."""

    input_ids: list[int]
    labels: list[int]
    lost: str = ""
    """A learned stretch of the text that no token stands for."""


def label_rows(tokenizer: Tokenizer, rows: Sequence[RenderedRow]) -> list[LabeledRow]:
    """Each row's text as the tokenizer's own tokens of the whole text, the learned ones as labels.

    A text that is not closed gets the tokens that the tokenizer puts around a text, and at its end the end-of-text
    token, which is learned with what stands before it.
    """
    closed = _encode(tokenizer, [row for row in rows if _spells_start(row)], special=False)
    others = _encode(tokenizer, [row for row in rows if not _spells_start(row)], special=True)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    made = []
    for row in rows:
        ids, taken, lost = next(closed if _spells_start(row) else others)
        if not row.closed and ids[-1:] != end:
            ids, taken = ids + end, taken + [_reaches_end(row)] * len(end)
        labels = [token if learned else IGNORED for token, learned in zip(ids, taken, strict=True)]
        made.append(LabeledRow(ids, labels, lost))
    return made


def _spells_start(row: RenderedRow) -> bool:
    return row.closed and not row.begins_bare


def count_common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many elements the two sequences have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _encode(tokenizer: Tokenizer, rows: Sequence[RenderedRow], special: bool) -> Iterator[_Coded]:
    if not rows:
        return
    fast = bool(tokenizer.is_fast)
    texts = [row.text for row in rows]
    wanted = {"return_offsets_mapping": fast, "return_attention_mask": False, "return_token_type_ids": False}
    coded = tokenizer(texts, add_special_tokens=special, verbose=False, **wanted)
    for i, row in enumerate(rows):
        ids = list(coded["input_ids"][i])
        yield ids, *(_by_offsets(coded["offset_mapping"][i], row) if fast else _by_prefixes(ids, row, tokenizer))


def _by_offsets(offsets: Sequence[tuple[int, int]], row: RenderedRow) -> tuple[list[bool], str]:
    """By the characters that each token stands for."""
    text = [i for i, offset in enumerate(offsets) if tuple(offset) != (0, 0)]
    learned, heard = bytearray(len(row.text)), bytearray(len(row.text))
    for start, end in row.learned:
        learned[start:end] = b"\1" * (end - start)
    taken = [False] * len(offsets)
    before = 0
    for i in text:
        start, end = offsets[i]
        # a tokenizer that trims its offsets leaves nothing of a blank: it stands between its neighbours
        start = min(start, before) if start == end else start
        taken[i] = 1 in learned[start:end]
        heard[start:end] = b"\1" * (end - start)
        before = end
    after = text[-1] + 1 if text else 0
    taken[after:] = [_reaches_end(row)] * (len(offsets) - after)
    stretches = [(row.text[start:end], heard[start:end]) for start, end in row.learned]
    return taken, next((words for words, there in stretches if words.strip() and 1 not in there), "")


def _by_prefixes(ids: Sequence[int], row: RenderedRow, tokenizer: Tokenizer) -> tuple[list[bool], str]:
    """By how far the tokens of the text before a place are those of the whole text."""
    encode = lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    whole, lost = encode(row.text), ""
    first = next((i for i in range(len(ids)) if ids[i : i + len(whole)] == whole), 0)
    taken = [False] * len(ids)
    for start, end in row.learned:
        begin, upto = count_common(encode(row.text[:start]), whole), encode(row.text[:end])
        stop = count_common(upto, whole)
        # the last characters may share a token with what follows
        stop = min(stop + (stop < len(upto)), len(whole))
        taken[first + begin : first + stop] = [True] * (stop - begin)
        if begin >= stop and row.text[start:end].strip():
            lost = row.text[start:end]
    after = first + len(whole)
    taken[after:] = [_reaches_end(row)] * (len(ids) - after)
    return taken, lost


def _reaches_end(row: RenderedRow) -> bool:
    return bool(row.learned) and row.learned[-1][1] == len(row.text)
