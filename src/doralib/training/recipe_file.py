"""Recipes from a YAML file or by the name of a packaged one, with `key=value` on top."""

import re
from pathlib import Path
from typing import Any

from ..documents import decode_yaml
from ..errors import UsageError, did_you_mean
from ..files import read_yaml
from ..recipe import Recipe

_FOLDER = Path(__file__).parents[1] / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with doralib, by name: NAME, or EXPERIMENT/NAME."""
    paths = sorted(_FOLDER.rglob("*.yaml"))
    return {path.relative_to(_FOLDER).with_suffix("").as_posix(): path for path in paths}


def read_recipe(path_or_name: str, overrides: list[str]) -> Recipe:
    """A recipe, checked.

    Args:
        path_or_name: A YAML file, or the name of a packaged recipe.
        overrides: ``key=value`` or ``group.key=value``; the value is read as YAML.

    Raises:
        UsageError: if there is no such recipe, it is not YAML, or it has unknown keys or wrong values, all at once.
    """
    values = _read(path_or_name)
    for override in overrides:
        _override(values, override)
    return Recipe(**values)


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
                f"there is no recipe {path_or_name!r}{hint} (looked for the file "
                f"{path.absolute()}, and among the packaged recipes: {', '.join(known) or 'none'})"
            )
        path = known[path_or_name]
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path} is no recipe: it should hold the groups model, data, adapter, training, ...")
    return {str(key): value for key, value in values.items()}


def _override(values: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    path = key.strip().split(".")
    if not found or not all(path):
        raise UsageError(f"{override!r} is no setting; write group.key=value, such as training.max_steps=100")
    value = _value(override, text)
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if inner is None:
            inner = values[part] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{override!r}: {part} is {inner!r} and has no settings of its own")
        values = inner
    values[path[-1]] = value


def _value(override: str, text: str) -> Any:
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
        raise UsageError(f"{override!r}: the value is not YAML: {error}{hint}") from None
    return text if bare and isinstance(value, (dict, list)) else value
