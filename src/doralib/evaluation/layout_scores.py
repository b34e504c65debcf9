"""A VL-BART's results on rows of a layout, one for each task, with the files of predictions."""

import time
from collections.abc import Sequence
from functools import partial

from ..adapters.inference import unchanged
from ..data.layouts import choose_tasks
from ..data.prepare import Row
from ..progress import Tick, log_progress
from .generation import evaluation_mode
from .result import WRONG_KEPT, TaskResult
from .visual import VisualModel, score_answers, write_predictions


def score_layout(
    asked: VisualModel, rows: Sequence[Row], *, limit: int | None = None, seed: int = 0, tick: Tick | None = None
) -> tuple[dict[str, TaskResult], dict[str, str]]:
    """The result of each task, and files of predictions by name; rows whose answers are unknown are answered too.

    Args:
        rows: Of a layout, with features that are there.
        limit: At most so many rows of each task.

    Raises:
        UsageError: if captions are to be scored and pycocoevalcap is not installed.
        DoraError: if features cannot be read.
    """
    tick, settings = tick or log_progress(), asked.settings
    results: dict[str, TaskResult] = {}
    files: dict[str, str] = {}
    with evaluation_mode(asked.model), unchanged(asked.model):
        for name, task in choose_tasks(settings).items():
            own = [row for row in rows if row["task"] == name][:limit]
            if not own:
                continue
            start = time.perf_counter()
            said = asked.answer(task, own, partial(_advance, tick, name))
            file, text = write_predictions(name, task, own, said, settings)
            files[file] = text
            known = [(row, each) for row, each in zip(own, said, strict=True) if row["targets"] or row["answers"]]
            if not known:
                continue
            metrics, values = score_answers(task, [row for row, _ in known], [each for _, each in known], seed=seed)
            wrong = [
                {"prompt": row["text"], "expected": _best(row), "predicted": each}
                for (row, each), value in zip(known, values, strict=False)
                if value == 0
            ]
            right = "".join("01"[value > 0] for value in values)
            seconds = time.perf_counter() - start
            results[name] = TaskResult(
                name, task.scoring, len(known), metrics, None, tuple(wrong[:WRONG_KEPT]), 0, seconds, right
            )
    return results, files


def _advance(tick: Tick, name: str, share: float) -> None:
    tick(name, share, 1.0)


def _best(row: Row) -> str:
    return str(max(zip(row["scores"], row["targets"], strict=True))[1]) if row["targets"] else str(row["answers"][0])
