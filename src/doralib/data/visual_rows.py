"""Rows of layouts as a VL-BART takes them: tokens of texts and targets, features from files, weights of labels."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError
from ..progress import Tick
from ..recipe import DataSettings, VisualSettings
from .features import fit_features, import_h5py, make_boxes, read_features
from .layouts import choose_tasks
from .layouts.task import LayoutTask
from .prepare import IGNORED, BadRow, PreparedRows, Row, RowNumber, RowReport

_TOLD_EVERY = 1000


def encode_rows(
    rows: datasets.Dataset,
    numbers: Sequence[RowNumber],
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    learn: bool,
    tick: Tick | None = None,
) -> PreparedRows:
    """Rows with tokens of the text and of each target; those without features or without a target are left out.

    Args:
        rows: Of a layout.
        learn: Whether a target is drawn anew each epoch, in proportion to its score; else the best one stays.

    Raises:
        UsageError: if no row is left.
        DoraError: if bad rows are errors.
    """
    tasks, report = choose_tasks(settings), RowReport(len(rows))
    made: dict[str, list[Any]] = {
        name: [] for name in ("task", "row", "input_ids", "targets", "scores", "features", "length")
    }
    kept: list[RowNumber] = []
    for number, row in zip(numbers, rows, strict=True):
        try:
            encoded = _encode_row(row, tasks[row["task"]], settings, tokenizer, learn=learn)
        except BadRow as bad:
            report.drop(number, bad)
        else:
            values = {**encoded, "task": row["task"], "row": len(kept), "features": row["features"]}
            for name, column in made.items():
                column.append(values[name])
            report.kept += 1
            report.tokens += encoded["length"]
            report.label_tokens += len(encoded["targets"][0])
            kept.append(number)
        if tick is not None and (report.kept + sum(report.dropped.values())) % _TOLD_EVERY == 0:
            tick("tokens", min(_TOLD_EVERY / len(rows), 1.0), 1.0)
    report.check(settings.bad_rows)
    return PreparedRows(datasets.Dataset.from_dict(made), report, tuple(kept))


def _encode_row(
    row: Row, task: LayoutTask, settings: DataSettings, tokenizer: Tokenizer, *, learn: bool
) -> dict[str, Any]:
    if absent := [file for file in row["features"] if not Path(file).is_file()]:
        raise BadRow("without features", f"there is no {absent[0]}")
    right = [(target, score) for target, score in zip(row["targets"], row["scores"], strict=True) if score > 0]
    if not right:
        raise BadRow("without an answer", f"{row['text']!r:.80} has no answer")
    if not learn:
        right = [max(right, key=lambda pair: pair[1])]
    ids = encode_text(row, task, settings, tokenizer)
    targets = [encode_target(target, task.target_tokens, tokenizer) for target, _ in right]
    length = len(ids) + max(map(len, targets))
    return {"input_ids": ids, "targets": targets, "scores": [score for _, score in right], "length": length}


def encode_text(row: Row, task: LayoutTask, settings: DataSettings, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a row's text; of one too long the end is left out, or what is spoken behind its beginning.

    A question whose end is cut is still one; one about a video stands behind all that is said there.
    """
    limit = min(task.text_tokens or settings.max_length, settings.max_length)
    text, spare = str(row["text"]), int(row["spare"])
    ids = _encode(text, tokenizer)
    if len(ids) > limit and spare:
        head, _, rest = text.partition(" ")
        words, rest = rest[:spare].split(" "), rest[spare:]
        shorten = lambda count: _encode(f"{head} {' '.join(words[:count])}{rest}", tokenizer)
        fits = bisect_left(range(1, len(words) + 1), True, key=lambda count: len(shorten(count)) > limit)
        ids = shorten(fits)
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def encode_target(text: str, limit: int, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a target, the last of them an end."""
    ids, end = _encode(text, tokenizer), int(tokenizer.eos_token_id)
    ids = ids if ids[-1:] == [end] else [*ids, end]
    return ids if len(ids) <= limit else [*ids[: limit - 1], end]


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def check_width(rows: PreparedRows, visual: VisualSettings) -> None:
    """Read the first row's features as the model will.

    Raises:
        UsageError: if they are not as wide, or there are more pictures, than model.visual says.
        DoraError: if they cannot be read.
    """
    stack_features([rows.rows[0]["features"]], visual)


def stack_features(files: Sequence[Sequence[str]], visual: VisualSettings) -> dict[str, Tensor]:
    """``features`` (B, N, F) of the pictures of each row, and their ``places`` (B, N, 2), padded with zeros and -1.

    ``boxes`` (B, N, 4) where the model is told them.
    """
    most = max(map(len, files))
    if most > visual.images:
        raise UsageError(f"model.visual.images is {visual.images}, and a row has {most} pictures: {files[0][0]} ...")
    features_BNF = torch.zeros(len(files), most * visual.tokens, visual.features)
    places_BN2 = torch.full((len(files), most * visual.tokens, 2), -1)
    for i, row in enumerate(files):
        for k, name in enumerate(row):
            file = Path(name)
            if visual.boxes and file.suffix == ".npz":
                raise UsageError(f"model.visual.boxes: frames of a video have no place in a grid: {file}; leave it out")
            found_LF = read_features(file)
            if found_LF.shape[1] != visual.features:
                raise UsageError(
                    f"model.visual.features is {visual.features}, and the features in {file} have "
                    f"{found_LF.shape[1]} numbers; set it to that"
                )
            here = slice(k * visual.tokens, (k + 1) * visual.tokens)
            features_BNF[i, here] = fit_features(found_LF, visual.tokens, file)
            places_BN2[i, here] = torch.stack([torch.full((visual.tokens,), k), torch.arange(visual.tokens)], dim=-1)
    stacked = {"features": features_BNF, "places": places_BN2}
    if visual.boxes:
        stacked["boxes"] = make_boxes(visual.tokens).repeat(len(files), most, 1)
    return stacked


@dataclass
class VisualCollator:
    """Rows to one batch: tokens padded, one target of each, features read from their files.

    A label weighs so that each row of a question counts by the score of its target, whatever its length; captions of a
    batch count by their tokens.
    """

    visual: VisualSettings
    pad_id: int
    seed: int
    by_token: frozenset[str]
    """The tasks whose labels count alike."""
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the targets of another epoch from now on."""
        self.epoch = epoch

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Keys input_ids, attention_mask, labels, weights, features, places, num_tokens, and perhaps boxes."""
        drawn = [self._draw(row) for row in rows]
        targets = [row["targets"][choice] for row, choice in zip(rows, drawn, strict=True)]
        counted = [len(row["input_ids"]) for row in rows]
        weights = self._weigh(rows, drawn, [len(target) for target in targets])
        stacked = stack_features([row["features"] for row in rows], self.visual)
        return {
            "input_ids": pad_rows([row["input_ids"] for row in rows], self.pad_id),
            "attention_mask": pad_rows([[1] * count for count in counted], 0),
            "labels": pad_rows(targets, IGNORED),
            "weights": pad_rows([[w] * len(t) for w, t in zip(weights, targets, strict=True)], 0.0),
            **stacked,
            "num_tokens": torch.tensor(
                sum(counted) + sum(map(len, targets)) + int((stacked["places"] >= 0).sum()) // 2
            ),
        }

    def _draw(self, row: Row) -> int:
        """Which target, the same whenever the row is read in an epoch."""
        scores = np.asarray(row["scores"])
        if len(scores) == 1:
            return 0
        return int(
            np.random.default_rng([self.seed, self.epoch, row["row"]]).choice(len(scores), p=scores / scores.sum())
        )

    def _weigh(self, rows: Sequence[Row], drawn: Sequence[int], lengths: Sequence[int]) -> list[float]:
        alike = [row["task"] in self.by_token for row in rows]
        tokens = sum(length for length, each in zip(lengths, alike, strict=True) if each)
        share = sum(alike) / len(rows)
        return [
            share / tokens if each else row["scores"][choice] / length / len(rows)
            for row, choice, length, each in zip(rows, drawn, lengths, alike, strict=True)
        ]


def pad_rows(values: Sequence[Sequence[Any]], filling: Any) -> Tensor:
    """Rows of numbers as one tensor, (rows, longest)."""
    longest = max(map(len, values))
    return torch.tensor([[*row, *[filling] * (longest - len(row))] for row in values])


def check_readable(settings: DataSettings) -> None:
    """Raise UsageError if the package that reads the layout's features is not installed."""
    if settings.layout == "vlbart":
        import_h5py("data.layout vlbart")
