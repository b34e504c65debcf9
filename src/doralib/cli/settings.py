"""`doralib train --settings`: every setting of a recipe, its default and its meaning."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text
from transformers import TrainingArguments

from ..recipe import Recipe
from ..training.fields import DEFAULTS, EXTRA

Line = tuple[str, str, str]
_OFTEN_SET = {
    "max_steps": "Optimizer steps; -1: num_train_epochs decides.",
    "num_train_epochs": "Times that every row is seen.",
    "per_device_train_batch_size": "Rows at a time.",
    "gradient_accumulation_steps": "So many batches make one optimizer step.",
    "gradient_checkpointing": "Less memory, more time.",
    "max_grad_norm": "Longer gradients are cut to it.",
    "weight_decay": "Never on magnitudes.",
}


def settings_tables() -> Group:
    """A table for each group of a recipe."""
    parts: list[RenderableType] = [
        Text("A recipe is a YAML file of these groups. On the command line the same setting is group.setting=value.")
    ]
    alone = []
    for name, field in Recipe.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            parts.append(_table(f"{name}:", (_settings_line(key, each) for key, each in inner.model_fields.items())))
        elif name == "training":
            parts.append(_table(f"{name}:", _training_lines()))
        else:
            alone.append(_settings_line(name, field))
    return Group(*parts, _table("of the recipe itself:", alone))


def _table(title: str, lines: Iterable[Line]) -> Table:
    columns = [Column("setting", overflow="fold", min_width=16), Column("default", overflow="fold"), Column("what")]
    table = Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def _settings_line(name: str, field: FieldInfo) -> Line:
    default = "needed" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True)) or '""'
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
    said = " ".join((field.description or "").split())
    unsaid = [choice for choice in choices if str(choice) not in said]
    listed = f"One of {', '.join(map(str, choices))}. " if unsaid else ""
    return name, default, f"{listed}{said}"


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _training_lines() -> list[Line]:
    """Where our defaults differ from the Trainer's, and those of its own that most recipes set."""
    own_of_trainer = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    theirs = [(name, _as_yaml(own_of_trainer[name]), said) for name, said in _OFTEN_SET.items()]
    ours = [(name, _as_yaml(value), "") for name, value in DEFAULTS.items() if name != "log_level"]
    own = [(name, "null", "Stop after so many evaluations without a better loss.") for name in EXTRA]
    words = {
        "learning_rate": "Of A, and of all that has no rate of its own.",
        "warmup_steps": "Below 1: a share of the run, here as below.",
        "logging_steps": "A line of metrics after so many steps.",
        "save_steps": "A checkpoint after so many steps; with data.validation also its loss.",
        "save_total_limit": "Older checkpoints are deleted.",
        "report_to": "tensorboard: its events too.",
    }
    others = ("...", "", "Every other field of transformers.TrainingArguments, by its own name.")
    return [*theirs, *((name, default, words.get(name, said)) for name, default, said in [*ours, *own]), others]
