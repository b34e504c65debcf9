"""What a VL-BART answers to rows of a layout, how right it is, and the files of predictions that servers take."""

import copy
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..adapters.inference import unchanged
from ..data.layouts import choose_tasks
from ..data.layouts.task import LayoutTask
from ..data.prepare import Row
from ..data.visual_rows import encode_text, pad_rows, stack_features
from ..progress import Tick, log_progress
from ..recipe import DataSettings, VisualSettings
from .captions import caption_scores
from .evaluate import TaskResult
from .generation import evaluation_mode
from .metrics import Score, accuracy_score, mean_score
from .vqa import labeled_accuracy, soft_accuracy

_WRONG_KEPT = 20
_TRUTH = ("false", "true")


@dataclass(frozen=True)
class VisualModel:
    """A VL-BART, and what it is asked with."""

    model: Any
    tokenizer: Tokenizer
    settings: DataSettings
    batch_size: int = 16

    def answer(
        self, task: LayoutTask, rows: Sequence[Row], tick: Callable[[float], None] = lambda _: None
    ) -> list[str]:
        """What it answers to each row, as published: greedily, captions with five beams, true or false by its logits.

        Raises:
            DoraError: if features cannot be read.
        """
        said: list[str] = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            states, mask = self.model.encode(**self._batch(task, batch))
            choose = self._choose_truth if task.scoring == "truth" else self._write
            said += choose(task, states, mask)
            tick(len(batch) / len(rows))
        return said

    def _batch(self, task: LayoutTask, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids = [encode_text(row, task, self.settings, self.tokenizer) for row in rows]
        visual = VisualSettings(**self.model.config.visual)
        batch = {
            "input_ids": pad_rows(ids, int(self.tokenizer.pad_token_id)),
            "attention_mask": pad_rows([[1] * len(each) for each in ids], 0),
            **stack_features([row["features"] for row in rows], visual),
        }
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in batch.items()}

    def _write(self, task: LayoutTask, states: Any, mask: Tensor) -> list[str]:
        config = copy.deepcopy(self.model.generation_config)
        beams = {"num_beams": task.num_beams, "early_stopping": task.num_beams > 1}
        config.update(**beams, do_sample=False, max_new_tokens=task.target_tokens, max_length=None, min_length=0)
        written = self.model.generate(encoder_outputs=states, attention_mask=mask, generation_config=config)
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _choose_truth(self, task: LayoutTask, states: Any, mask: Tensor) -> list[str]:  # noqa: ARG002
        """Which of two words is likelier, where their tokens first differ."""
        words = [self.tokenizer(word, verbose=False)["input_ids"] for word in _TRUTH]
        same = next(i for i, pair in enumerate(zip(*words, strict=False)) if pair[0] != pair[1])
        begin = torch.tensor([self.model.config.decoder_start_token_id, *words[0][:same]], device=mask.device)
        given = {"encoder_outputs": states, "attention_mask": mask}
        logits_BTV = self.model(**given, decoder_input_ids=begin.expand(len(mask), -1)).logits
        both_B2 = logits_BTV[:, -1, [word[same] for word in words]]
        return [_TRUTH[i] for i in both_B2.argmax(-1).tolist()]


def score_layout(
    asked: VisualModel, rows: Sequence[Row], *, limit: int | None = None, seed: int = 0, tick: Tick | None = None
) -> tuple[dict[str, TaskResult], dict[str, str]]:
    """The result of each task, and files of predictions by name, of the rows whose features are there.

    Args:
        rows: Of a layout.
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
            if known:
                result = score_answers(name, task, *zip(*known, strict=True), seed=seed)
                results[name] = TaskResult(**result, seconds=time.perf_counter() - start)
    return results, files


def _advance(tick: Tick, name: str, share: float) -> None:
    tick(name, share, 1.0)


def score_answers(
    name: str, task: LayoutTask, rows: Sequence[Row], said: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """The fields of a `TaskResult` but for its seconds."""
    values = [_score(task, row, each) for row, each in zip(rows, said, strict=True)]
    exact = task.scoring in ("label", "truth", "choice")
    metrics: dict[str, Score]
    if task.scoring == "caption":
        metrics = caption_scores(said, [row["answers"] for row in rows], seed)
    elif exact:
        metrics = {"accuracy": accuracy_score([value == 1 for value in values], seed)}
    else:
        metrics = {"vqa_accuracy": mean_score(values, seed)}
    wrong = [
        {"prompt": row["text"], "expected": _best(row), "predicted": each}
        for row, each, value in zip(rows, said, values, strict=True)
        if value == 0 and task.scoring != "caption"
    ]
    right = "".join(str(int(value == 1)) for value in values) if exact else ""
    return {
        "task": name,
        "kind": task.scoring,
        "n": len(rows),
        "metrics": metrics,
        "confusion": None,
        "wrong": tuple(wrong[:_WRONG_KEPT]),
        "cut": 0,
        "right": right,
    }


def _score(task: LayoutTask, row: Row, said: str) -> float:
    """How right an answer is, 0 to 1; of a caption nothing is said."""
    scores = dict(zip(row["targets"], row["scores"], strict=True))
    if task.scoring == "vqa":
        return soft_accuracy(said, row["answers"]) if row["answers"] else labeled_accuracy(said, scores)
    if task.scoring == "choice":
        return float(scores.get(f"a{read_choice(said, task.choices)}", 0.0) == 1)
    return float(scores.get(said, 0.0) == 1)


def _best(row: Row) -> str:
    pairs = zip(row["scores"], row["targets"], strict=True)
    return str(max(pairs)[1]) if row["targets"] else str(row["answers"][0])


def read_choice(said: str, choices: int) -> int | None:
    """The number of the choice that an answer such as ``a2`` names; None: it names none."""
    found = re.match(r"\s*a?(\d+)\b", said)
    return int(found[1]) if found and int(found[1]) < choices else None


def write_predictions(
    name: str, task: LayoutTask, rows: Sequence[Row], said: Sequence[str], settings: DataSettings
) -> tuple[str, str]:
    """The name of a file of predictions and its text, as the servers of the tasks take them."""
    split = "held_out"
    if isinstance(settings.validation, str):
        split = "val" if settings.validation_split == "validation" else "test"
    told: list[Mapping[str, Any]] = [json.loads(row["told"]) for row in rows]
    pairs = list(zip(told, said, strict=True))
    if settings.layout == "value":
        split = "test_public" if (name, split) == ("how2qa", "test") else split
        if task.scoring == "choice":
            # a server wants some choice for each question
            chosen = {str(each["qid"]): read_choice(text, task.choices) or 0 for each, text in pairs}
            return f"{name}_{split}_predictions.json", json.dumps(chosen)
        lines = [json.dumps({**each, "descs": [{"desc": text}]}) + "\n" for each, text in pairs]
        return f"{name}_{split}_predictions.jsonl", "".join(lines)
    if task.scoring == "truth":
        lines = [f"{each['identifier']},{text.capitalize()}\n" for each, text in pairs]
        return f"{name}_{split}_predictions.csv", "".join(lines)
    word = {"vqa": "answer", "label": "prediction", "caption": "caption"}[task.scoring]
    return f"{name}_{split}_predictions.json", json.dumps([{**each, word: text} for each, text in pairs])
