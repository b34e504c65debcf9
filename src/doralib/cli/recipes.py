"""`doralib recipes`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from ..errors import UsageError, did_you_mean
from .console import console, print_json
from .options import Json

if TYPE_CHECKING:
    from ..families import Variant


def recipes_command(
    name: Annotated[
        str | None, typer.Argument(help="A recipe, to print its YAML; or how names begin, to list those alone.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the packaged recipes, or print one.

    What each reproduces, and the result that was published.
    """
    from ..training.recipe_file import packaged_recipes

    known = packaged_recipes()
    if name in known and as_json:
        print_json(dict(known[name].values))
        return
    if name in known:
        # as it is: rich would break its lines
        print(recipe_text(known[name]), end="")
        return
    chosen = [recipe for recipe in known.values() if recipe.name.startswith(name or "")]
    if not chosen:
        raise UsageError(f"there is no recipe {name!r}{did_you_mean(str(name), known)}; `doralib recipes` lists them")
    if as_json:
        print_json([{"name": each.name, "about": _tell(each), "published": each.published} for each in chosen])
        return
    console.print(_table(chosen))


def recipe_text(recipe: "Variant") -> str:
    """A recipe as a YAML file of its own, under comments that say what it is."""
    import yaml

    lines = [recipe.name]
    if recipe.reproduces:
        lines.append(f"Reproduces {recipe.reproduces} of the DoRA paper, arXiv 2402.09353.")
    if recipe.published:
        scores = ", ".join(f"{column} {value:g}" for column, value in recipe.published.items())
        lines.append(f"Published: {scores}")
    head = "".join(f"# {line}\n" for line in [*lines, *recipe.notes])
    return head + yaml.safe_dump(dict(recipe.values), sort_keys=False, allow_unicode=True, width=120)


def _table(recipes: list["Variant"]) -> Table:
    table = Table("Recipe", "What it is", Column("Published", justify="right"))
    for recipe in recipes:
        table.add_row(*map(Text, (recipe.name, _tell(recipe), _published_text(recipe))))
    return table


def _tell(recipe: "Variant") -> str:
    return recipe.reproduces or next(iter(recipe.notes), "")


def _published_text(recipe: "Variant") -> str:
    """The average, or the only score."""
    if not recipe.published:
        return ""
    column = "average" if "average" in recipe.published else next(iter(recipe.published))
    return f"{column} {recipe.published[column]:g}"
