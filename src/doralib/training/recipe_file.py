"""Recipes from a YAML file or by the name of a packaged one, with `key=value` on top."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..documents import decode_yaml
from ..errors import UsageError, did_you_mean
from ..families import Variant, is_family, read_family
from ..files import read_yaml
from ..recipe import Recipe
from .fields import find_unfit

_FOLDER = Path(__file__).parents[1] / "recipes"


def packaged_recipes() -> dict[str, Variant]:
    """The recipes that come with doralib, by name: NAME, or EXPERIMENT/NAME."""
    found: dict[str, Variant] = {}
    for path in sorted(_FOLDER.rglob("*.yaml")):
        name = path.relative_to(_FOLDER).with_suffix("").as_posix()
        values = read_yaml(path)
        if is_family(values):
            found |= {f"{name}/{each.name}": _in_family(name, each) for each in read_family(path).values()}
        else:
            found[name] = Variant(name, values, notes=_read_comment(path))
    return found


def read_recipe(path_or_name: str, overrides: list[str]) -> Recipe:
    """A recipe, checked.

    Args:
        path_or_name: A YAML file, or the name of a packaged recipe.
        overrides: ``key=value`` or ``group.key=value``; the value is read as YAML.

    Raises:
        UsageError: if there is no such recipe, it is not YAML, or it has unknown keys or wrong values, all at once.
    """
    values = _read(path_or_name)
    for change in overrides:
        override(values, change)
    try:
        return Recipe(**values)
    except UsageError as error:
        # what is wrong in training is said with it; TRL's objectives have more fields, which are looked at later
        training = values.get("training")
        more = find_unfit(training) if isinstance(training, dict) and not values.get("objective") else []
        raise UsageError("\n".join(map(str, [error, *more]))) from None


def read_shared(family: str) -> dict[str, Any]:
    """What every recipe of a packaged family begins with."""
    return dict(read_yaml(_FOLDER / f"{family}.yaml")["shared"])


def _read(path_or_name: str) -> dict[str, Any]:
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        inside = path / "config.yaml"
        more = f"; a run's recipe is its {inside}" if inside.is_file() else ", and a recipe is a file"
        raise UsageError(f"{path_or_name} is a folder{more}")
    if not path.is_file():
        known = packaged_recipes()
        if path_or_name not in known:
            beside = [each.name for each in path.parent.glob("*.y*ml")]
            hint = did_you_mean(path_or_name, known) or did_you_mean(path.name, beside)
            raise UsageError(
                f"there is no recipe {path_or_name!r}{hint} (looked for the file {path.absolute()}, and among the "
                f"{len(known)} packaged recipes, which `doralib recipes` lists)"
            )
        return dict(known[path_or_name].values)
    values = read_yaml(path)
    if is_family(values):
        raise UsageError(
            f"{path} describes a family of recipes; `doralib recipes NAME` prints one of the packaged ones"
        )
    if not isinstance(values, dict):
        raise UsageError(f"{path} is no recipe: it should hold the groups model, data, adapter, training, ...")
    return {str(key): value for key, value in values.items()}


def _in_family(family: str, variant: Variant) -> Variant:
    name = f"{family}/{variant.name}"
    return replace(variant, name=name, values={**variant.values, "out": f"runs/{name}"})


def _read_comment(path: Path) -> tuple[str, ...]:
    """The first sentence of a recipe's own comment."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return (first.removeprefix("#").strip(),) if first.startswith("#") else ()


def override(values: dict[str, Any], change: str) -> None:
    """Set one value of a recipe's groups, as ``group.key=value`` says.

    Raises:
        UsageError: if that is no setting, or its value is not YAML.
    """
    key, found, text = change.partition("=")
    path = key.strip().split(".")
    if not found or not all(path):
        raise UsageError(f"{change!r} is no setting; write group.key=value, such as training.max_steps=100")
    value = text if _takes_text_alone(path) and _is_plain(text) else _value(change, text)
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if inner is None:
            inner = values[part] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{change!r}: {part} is {inner!r} and has no settings of its own")
        values = inner
    values[path[-1]] = value


def _takes_text_alone(path: list[str]) -> bool:
    """Whether the setting is a text or null, and nothing else that YAML writes."""
    cls: Any = Recipe
    for part in path[:-1]:
        field = cls.model_fields.get(part)
        cls = field.annotation if field is not None else None
        if not (isinstance(cls, type) and issubclass(cls, BaseModel)):
            return False
    field = cls.model_fields.get(path[-1])
    return field is not None and field.annotation in (str, str | None)


def _is_plain(text: str) -> bool:
    """Whether a text is meant as it stands, with its blanks: it is not quoted, and not null."""
    bare = text.strip()
    return bare not in ("", "null", "~") and not bare.startswith(('"', "'"))


def _value(change: str, text: str) -> Any:
    """The value as YAML, but a bare text stays as it is: `Review: {text}` is no mapping, `# {text}` no comment."""
    bare = not text.lstrip().startswith(("{", "[", '"', "'"))
    if bare and ("\n" in text or re.search(r"(^|\s)#", text)):
        return text
    try:
        value = decode_yaml(text)
    except ValueError as error:
        if bare:
            return text
        hint = "; put quotes around the whole setting, where its value has spaces"
        raise UsageError(f"{change!r}: the value is not YAML: {error}{hint}") from None
    return text if bare and isinstance(value, (dict, list)) else value
