"""`doralib train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import check_given_once
from .console import bars, console, print_json
from .options import Json
from .recipe import Changes, Name, read_checked

if TYPE_CHECKING:
    from ..recipe import Recipe


def _show_settings(wanted: bool) -> None:
    if wanted:
        from .settings import settings_tables

        console.print(settings_tables())
        raise typer.Exit


def _show_schema(wanted: bool) -> None:
    if wanted:
        from .init import SCHEMA

        print(SCHEMA.read_text(encoding="utf-8"), end="")
        raise typer.Exit


def train_command(
    recipe: Name,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that stands there; start again.")
    ] = False,
    memory_check: Annotated[
        bool, typer.Option("--memory-check/--no-memory-check", help="Refuse a run that does not fit into the memory.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do what `doralib check` does, with these options, and stop.")
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
    as_json: Json = False,
) -> None:
    """Fine-tune a model as RECIPE says."""
    if finlora is not None:
        chosen = _read_finlora(finlora, recipe, changes or [], alone=print_config, quiet=as_json)
    elif print_config:
        from ..training.recipe_file import read_recipe

        check_given_once(changes or [])
        print(read_recipe(recipe, changes or []).to_yaml(), end="")
    else:
        chosen = read_checked(recipe, changes)
    if print_config:
        return
    if dry_run:
        from .check import check_and_show

        check_and_show(chosen, resume=resume, overwrite=overwrite, must_be_free=True, as_json=as_json)
        return
    from ..training import job

    with bars() as tick:
        run = job.train(chosen, resume=resume, overwrite=overwrite, tick=tick, check_memory=memory_check)
    if as_json:
        from ..files import read_json

        found = {name: run / f"{name}.json" for name in ("summary", "results")}
        print_json({"run": str(run), **{name: read_json(file) for name, file in found.items() if file.is_file()}})


def _read_finlora(file: Path, name: str, changes: list[str], *, alone: bool, quiet: bool) -> "Recipe":
    """The recipe that an entry of FinLoRA's file becomes, printed under what differs; alone: not to be run."""
    from ..training.early import check_early
    from ..training.finlora import read_finlora

    check_given_once(changes)
    recipe, notes = read_finlora(file, name, changes)
    if alone or not quiet:
        print("".join(f"# {note}\n" for note in notes) + recipe.to_yaml(), end="", flush=True)
    if not alone:
        check_early(recipe)
    return recipe
