"""Pictures and videos as features: rows of a layout's tasks for a VL-BART, in batches of one task each."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from ...checkpoints.models import Loaded, load_vl_bart
from ...checkpoints.visual_file import write_visual
from ...data.layouts import choose_tasks
from ...data.pictures import ENDINGS, Picture, make_thumbnail
from ...data.prepare import BadRow, Sample
from ...data.rows import RawRows, read_both
from ...data.survey import LEFT, RIGHT
from ...data.visual_rows import VisualCollator, check_readable, check_width, encode_rows
from ...evaluation.captions import check_caption_tools
from ...evaluation.generation import evaluation_mode
from ...evaluation.layout_scores import score_layout
from ...evaluation.result import TaskResult
from ...evaluation.visual import VisualModel
from ...progress import Tick
from ...recipe import DataSettings, ModelSettings, Recipe, VisualSettings
from ..modality import Collate, Prepared
from .text import within

_SAMPLES = 8


def _show(stems: Sequence[str]) -> tuple[str, ...]:
    """The pictures of a row as they stand in the report; none where they lie elsewhere."""
    places = [Path(f"{stem}{ending}") for stem in stems for ending in ENDINGS]
    shown = []
    for file in filter(Path.is_file, places):
        with suppress(BadRow):
            shown.append(make_thumbnail(Picture(str(file))))
    return tuple(shown)


class VisualTasks:
    """The functions of a modality; it knows the rows once it has seen them.

    Args:
        recipe: Whose seed draws the visual embedding and the targets.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.rows: RawRows | None = None
        self.visual: VisualSettings | None = None
        self.settings = recipe.data
        self.predictions: Mapping[str, str] = {}

    def check_rows(self, settings: DataSettings, seed: int) -> RawRows:
        """The rows of all tasks of the layout."""
        check_readable(settings)
        if settings.validation is not None and any(t.scoring == "caption" for t in choose_tasks(settings).values()):
            check_caption_tools("data.tasks")
        self.rows = read_both(settings, seed)
        return self.rows

    def load(self, settings: ModelSettings, *, empty: bool = False) -> Loaded:
        """A BART with a visual embedding, and its tokenizer."""
        model, tokenizer = load_vl_bart(settings, seed=self.recipe.seed, empty=empty)
        self.visual = VisualSettings(**model.config.visual)
        return model, tokenizer

    def prepare(
        self, rows: RawRows, settings: DataSettings, model: nn.Module, processor: Any, tick: Tick | None = None
    ) -> Prepared:
        """Tokens of the rows; features are read when a batch is made, those of the first row now."""
        settings = self.settings = within(settings, model)
        train = encode_rows(rows.train, rows.train_numbers, settings, processor, learn=True, tick=tick)
        held = None
        if rows.validation is not None:
            held = encode_rows(rows.validation, rows.validation_numbers, settings, processor, learn=False, tick=tick)
        assert self.visual is not None
        check_width(train, self.visual)
        ratios = {name: settings.tasks.get(name, 1.0) for name in choose_tasks(settings)}
        told = {
            "a batch": "of one task, its size times " + ", ".join(f"{r:.3g} ({name})" for name, r in ratios.items())
        }
        first = f"{rows.train[0]['text']}{LEFT}{rows.train[0]['targets'][0]}{RIGHT}"
        return Prepared(train, held, self._find_samples(rows), told, first, ratios=ratios, order="random")

    def _find_samples(self, rows: RawRows) -> list[Sample]:
        """The first usable rows of each task."""
        of, found = rows.train if rows.validation is None else rows.validation, []
        count: dict[str, int] = {}
        each = max(_SAMPLES // len(choose_tasks(self.recipe.data)), 1)
        for row in of:
            there = all(Path(file).is_file() for file in row["features"])
            if count.get(row["task"], 0) < each and there and row["targets"]:
                count[row["task"]] = count.get(row["task"], 0) + 1
                best = max(zip(row["scores"], row["targets"], strict=True))[1]
                found.append(Sample(row["text"], best, {"row": json.dumps(dict(row))}, _show(row["pictures"])))
        return found

    def collate(self, model: nn.Module, processor: Any, data: Prepared) -> Collate:  # noqa: ARG002
        """Rows to tensors, with the features from their files."""
        assert self.visual is not None
        alike = [name for name, task in choose_tasks(self.recipe.data).items() if task.scoring == "caption"]
        return VisualCollator(self.visual, int(processor.pad_token_id), self.recipe.seed, frozenset(alike))

    def samples(
        self, model: nn.Module, processor: Any, settings: DataSettings, asked: list[dict[str, Any]]
    ) -> list[str]:
        """What the model answers to each row."""
        tasks, visual = choose_tasks(settings), VisualModel(model, processor, self.settings)
        rows = [json.loads(sample["given"]["row"]) for sample in asked]
        with evaluation_mode(model):
            return [visual.answer(tasks[row["task"]], [row])[0] for row in rows]

    def score(
        self,
        model: nn.Module,
        processor: Any,
        settings: DataSettings,  # noqa: ARG002
        *,
        batch_size: int,
        seed: int,
        tick: Tick | None,
    ) -> dict[str, TaskResult]:
        """The published scores of each task on the rows of validation; nothing where there are none."""
        if self.rows is None or self.rows.validation is None:
            return {}
        there = [row for row in self.rows.validation if all(Path(file).is_file() for file in row["features"])]
        asked = VisualModel(model, processor, self.settings, batch_size)
        results, self.predictions = score_layout(asked, there, limit=self.recipe.eval.limit, seed=seed, tick=tick)
        return results

    def keep(self, folder: Path) -> None:
        """Write what the model sees beside its adapter."""
        assert self.visual is not None
        write_visual(folder, self.visual)
