"""`doralib check`: everything that can be known of a job without training."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from .console import bars, console, print_json
from .data import show_survey
from .options import Json
from .recipe import Changes, Name, read_checked

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..training.outlook import Outlook


def check_command(
    recipe: Name,
    changes: Changes = None,
    rows: Annotated[int, typer.Option(min=0, max=5, help="So many rows of train are shown.")] = 2,
    as_json: Json = False,
) -> None:
    """Check RECIPE and its data, and say what training would do.

    The model's weights are not read, and nothing is written.
    """
    chosen = read_checked(recipe, changes)
    check_and_show(chosen, rows=rows, as_json=as_json)
    if as_json:
        return
    command = shlex.join(["doralib", "train", recipe, *(changes or [])])
    out = Path(chosen.out).expanduser()
    there = f"; {out} is there already, so add --resume or --overwrite" if (out / "config.yaml").exists() else ""
    console.print(f"\nNothing stands in the way of: {command}{there}", soft_wrap=True)


def check_and_show(
    recipe: "Recipe",
    *,
    resume: bool = False,
    overwrite: bool = False,
    must_be_free: bool = False,
    rows: int = 2,
    as_json: bool = False,
) -> "Outlook":
    """Check a job and print what is known of it.

    Raises:
        UsageError: for all that training would refuse before its first step.
    """
    from ..training.job import look_ahead

    with bars() as tick:
        found = look_ahead(recipe, resume=resume, overwrite=overwrite, check_out=must_be_free, tick=tick)
    survey = found.data.survey
    if as_json:
        print_json(
            {
                "recipe": found.recipe.model_dump(mode="json"),
                "facts": dict(found.facts),
                "notes": list(found.notes),
                "steps": found.steps,
                "steps_an_epoch": found.steps_an_epoch,
                "memory": None if found.memory is None else found.memory.to_json(),
                "data": survey,
            }
        )
        return found
    _show(found, {**survey, "shown": survey["shown"][:rows]} if survey is not None else None)
    return found


def _show(found: "Outlook", survey: Mapping[str, Any] | None) -> None:
    console.print(Text("the recipe, without what is left at its default", style="bold"))
    said = found.recipe.model_dump(mode="json", exclude_defaults=True)
    print(yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120))
    facts = Table(show_header=False, box=None)
    memory = "not known; doralib plan says why"
    if found.memory is not None:
        memory = f"{found.memory.summary()}; doralib plan shows the arithmetic"
    for name, text in {**found.facts, "memory": memory}.items():
        facts.add_row(name, Text(text))
    console.print(facts)
    if survey is not None:
        console.print(show_survey(survey))
    else:
        for line in found.notes:
            console.print(line)
