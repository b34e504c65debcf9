"""The JSON schemas of recipes and tasks, for editors that complete and check YAML."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import TrainingArguments

from ..evaluation.task import KINDS
from ..files import write_json
from ..recipe import Recipe
from .fields import DEFAULTS, EXTRA, OWNED

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe, with every field of `transformers.TrainingArguments` that a recipe may set."""
    schema = Recipe.model_json_schema()
    shared = schema.setdefault("$defs", {})
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments)
    training: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in OWNED:
            training[name] = _field_schema(hints[name], shared)
            default = DEFAULTS.get(name, field.default)
            if isinstance(default, bool | int | float | str):
                training[name]["default"] = default
    training |= {name: TypeAdapter(kind).json_schema() for name, kind in EXTRA.items()}
    schema["properties"]["training"] |= {"properties": dict(sorted(training.items())), "additionalProperties": False}
    return {"$schema": _DIALECT, "title": "doralib recipe", **{k: v for k, v in schema.items() if k != "title"}}


def task_schema() -> dict[str, Any]:
    """The schema of a task file: what may stand in it follows from its kind."""
    group = {
        "type": "array",
        "items": {"type": "string"},
        "description": "Tasks that this name stands for.",
    }
    kinds: list[dict[str, Any]] = [
        {"type": "object", "properties": {"group": group}, "required": ["group"], "additionalProperties": False}
    ]
    shared: dict[str, Any] = {}
    for kind, cls in KINDS.items():
        schema = cls.model_json_schema()
        shared |= schema.pop("$defs", {})
        schema["properties"]["kind"] = {"const": kind}
        # a file may take keys from another one (`like`), so none is required in itself
        schema.pop("required", None)
        schema["properties"]["like"] = {"type": "string", "description": "Another task file, whose keys hold here too."}
        kinds.append(schema)
    return {"$schema": _DIALECT, "title": "doralib task", "anyOf": kinds, **({"$defs": shared} if shared else {})}


def _field_schema(hint: Any, shared: dict[str, Any]) -> dict[str, Any]:
    """The schema of one of the Trainer's fields; anything, where its type is none that JSON has."""
    try:
        schema = TypeAdapter(hint).json_schema()
    except Exception:  # noqa: BLE001  pydantic has many ways to say that a type is none of JSON's
        return {}
    # a reference is looked up from the top
    shared |= schema.pop("$defs", {})
    return schema


def write_schemas(*folders: str) -> None:
    """Write both schemas as `recipe.schema.json` and `task.schema.json` into each folder."""
    for folder in folders:
        write_json(Path(folder) / "recipe.schema.json", recipe_schema())
        write_json(Path(folder) / "task.schema.json", task_schema())
