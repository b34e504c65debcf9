"""What a VL-BART answers to rows of a layout, how right it is, and the files of predictions that servers take."""

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..adapters.inference import unchanged
from ..data.encoding import context_length
from ..data.layouts import LAYOUTS
from ..data.layouts.task import LayoutTask
from ..data.prepare import Row
from ..data.visual_rows import encode_text, pad_rows, stack_features
from ..recipe import DataSettings, VisualSettings
from .captions import caption_scores
from .generation import evaluation_mode
from .metrics import Score, accuracy_score, mean_score
from .vqa import labeled_accuracy, soft_accuracy

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


def ask_about(model: Any, tokenizer: Tokenizer, text: str, features: Sequence[str], max_new_tokens: int) -> str:
    """What a VL-BART answers to one text about some files of features, greedily."""
    longest = {"max_length": context_length(model) or 600}
    settings = DataSettings(train="-", layout="vlbart", **longest)
    task = replace(LAYOUTS["vlbart"].tasks["gqa"], target_tokens=max_new_tokens, text_tokens=None)
    with evaluation_mode(model), unchanged(model):
        return VisualModel(model, tokenizer, settings).answer(
            task, [{"text": text, "spare": 0, "features": list(features)}]
        )[0]


def score_answers(
    task: LayoutTask, rows: Sequence[Row], said: Sequence[str], *, seed: int
) -> tuple[dict[str, Score], list[float]]:
    """The metrics of some answers, and how right each is, 0 to 1; of captions, which have no such value, none.

    Raises:
        UsageError: if captions are to be scored and pycocoevalcap is not installed.
    """
    if task.scoring == "caption":
        return caption_scores(said, [row["answers"] for row in rows], seed), []
    values = [_score(task, row, each) for row, each in zip(rows, said, strict=True)]
    if task.scoring == "vqa":
        return {"vqa_accuracy": mean_score(values, seed)}, values
    return {"accuracy": accuracy_score([value == 1 for value in values], seed)}, values


def _score(task: LayoutTask, row: Row, said: str) -> float:
    """How right an answer is, 0 to 1."""
    scores = dict(zip(row["targets"], row["scores"], strict=True))
    if task.scoring == "vqa":
        return soft_accuracy(said, row["answers"]) if row["answers"] else labeled_accuracy(said, scores)
    if task.scoring == "choice":
        return float(scores.get(f"a{read_choice(said, task.choices)}", 0.0) == 1)
    return float(scores.get(said, 0.0) == 1)


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
