"""The recipe that a command names, with the settings given again, checked as far as that takes no seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import check_given_once

if TYPE_CHECKING:
    from ..recipe import Recipe


def complete_recipe(incomplete: str) -> list[str]:
    """Names of packaged recipes, and YAML files, that begin so; for the shell."""
    from ..training.recipe_file import packaged_recipes

    path = Path(incomplete)
    folder = path if incomplete.endswith("/") else path.parent
    beside = [each for each in folder.glob("*") if each.is_dir() or each.suffix in (".yaml", ".yml")]
    files = [f"{each}/" if each.is_dir() else str(each) for each in beside if not each.name.startswith(".")]
    return [name for name in (*sorted(files), *packaged_recipes()) if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Settings as `group.key=` that begin so; for the shell."""
    from pydantic import BaseModel

    from ..recipe import Recipe
    from ..training.fields import OWNED, list_fields

    names = []
    for group, field in Recipe.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += [f"{group}.{name}=" for name in inner.model_fields]
        elif group == "training":
            names += [f"training.{name}=" for name in sorted(list_fields() - OWNED.keys())]
        else:
            names.append(f"{group}=")
    return [name for name in names if name.startswith(incomplete)]


Name = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or a packaged recipe (`doralib recipes`).",
        autocompletion=complete_recipe,
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings given again, e.g. adapter.r=8 'data.target= {label}'",
        autocompletion=complete_setting,
    ),
]


def read_checked(name: str, changes: Sequence[str] | None) -> "Recipe":
    """The recipe, its files of data and its names of tasks and settings checked.

    Raises:
        DoraError: for all that is wrong, before torch and the like are imported.
    """
    from ..training.recipe_file import read_recipe

    check_given_once(changes or [])
    chosen = read_recipe(name, list(changes or []))
    from ..training.early import check_early

    check_early(chosen)
    return chosen
