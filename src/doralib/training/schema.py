"""The JSON schemas of recipes and tasks, for editors that complete and check YAML."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import TrainingArguments

from ..errors import UsageError
from ..evaluation.task_file import KINDS
from ..files import write_json
from ..recipe import ObjectiveSettings, Recipe
from .arguments import find_class, list_owned
from .fields import DEFAULTS, EXTRA

_OBJECTIVES: tuple[str, ...] = typing.get_args(ObjectiveSettings.model_fields["kind"].annotation)
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe, with every field that a recipe may set of the arguments that objectives take.

    Those of TRL are there only where it is installed.
    """
    schema = Recipe.model_json_schema()
    shared = schema.setdefault("$defs", {})
    training: dict[str, Any] = {}
    for kind in _OBJECTIVES:
        for name, made in _list_fields(kind, shared).items():
            known = training.setdefault(name, made)
            if {**known, "default": None} != {**made, "default": None}:
                training[name] = {"anyOf": [*known.get("anyOf", [known]), made]}
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


def _list_fields(kind: str, shared: dict[str, Any]) -> dict[str, Any]:
    """The fields that an objective adds, each with its schema; of those of the stock Trainer its own defaults."""
    try:
        cls, owned = find_class(kind), list_owned(kind)
    except UsageError:
        return {}
    hints, stock = typing.get_type_hints(cls), {field.name for field in dataclasses.fields(TrainingArguments)}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.init and field.name not in owned and (kind == "sft" or field.name not in stock):
            found[field.name] = _field_schema(hints[field.name], shared)
            default = DEFAULTS.get(field.name, field.default)
            if isinstance(default, bool | int | float | str):
                found[field.name]["default"] = default
    return found


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
