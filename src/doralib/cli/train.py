"""`doralib train`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import check_given_once
from .console import bars, console


def _show_settings(wanted: bool) -> None:
    if wanted:
        from .settings import settings_tables

        console.print(settings_tables())
        raise typer.Exit


def _show_schema(wanted: bool) -> None:
    if wanted:
        from ..training.schema import recipe_schema

        print(json.dumps(recipe_schema(), indent=2))
        raise typer.Exit


def train_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a packaged recipe (`doralib recipes`).")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings given again, e.g. adapter.r=8")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that stands there; start again.")
    ] = False,
    _settings: Annotated[
        bool,
        typer.Option(
            "--settings", is_eager=True, callback=_show_settings, help="Every setting of a recipe, with its default."
        ),
    ] = False,
    _schema: Annotated[
        bool,
        typer.Option("--schema", is_eager=True, callback=_show_schema, help="A recipe's JSON schema, for editors."),
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete recipe as YAML, checked, and stop.")
    ] = False,
    finlora: Annotated[
        Path | None, typer.Option(help="FinLoRA's finetune_configs.json; RECIPE is then the name of one of its runs.")
    ] = None,
) -> None:
    """Fine-tune a model as RECIPE says."""
    from ..training import job
    from ..training.recipe_file import read_recipe

    check_given_once(changes or [])
    if finlora is not None:
        from ..training.finlora import read_finlora

        chosen, notes = read_finlora(finlora, recipe, changes or [])
        print("".join(f"# {note}\n" for note in notes) + chosen.to_yaml(), end="", flush=True)
    else:
        chosen = read_recipe(recipe, changes or [])
        if print_config:
            print(chosen.to_yaml(), end="")
    if print_config:
        return
    with bars() as tick:
        job.train(chosen, resume=resume, overwrite=overwrite, tick=tick)
