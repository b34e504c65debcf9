"""`doralib data`: the rows of a recipe as its model will see them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..errors import DoraError, UsageError, check_given_once, collecting, raise_all
from .console import console

if TYPE_CHECKING:
    from ..recipe import ModelSettings, Recipe

_BAR_WIDTH = 40


def data_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, a run's config.yaml, or a packaged recipe.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings given again, e.g. data.style=chat")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="So many rows of train are shown.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write a page (.html).")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every row as a line of JSON: input_ids, labels, text.")
    ] = None,
) -> None:
    """Show the rows of RECIPE as the model will see them.

    Nothing is trained, and of the model only its tokenizer and configuration are read.
    """
    from ..disk import check_writable
    from ..training.recipe_file import read_recipe

    problems: list[DoraError] = []
    for path, option in ((out, "--out"), (json_file, "--json")):
        with collecting(problems):
            if path is not None:
                check_writable(path, option, folder=False)
    if out is not None and json_file is not None and out.resolve() == json_file.resolve():
        problems.append(UsageError(f"--out and --json are one file, {out}; give two names"))
    recipes = []
    with collecting(problems):
        check_given_once(changes or [])
        recipes.append(read_recipe(recipe, changes or []))
    if not recipes:
        raise_all(problems)
    (chosen,) = recipes
    _check_shown(chosen.model)
    from ..checkpoints.models import load_tokenizer
    from ..runs.report_data import write_data_page

    made, survey = _prepare(chosen, rows, problems)
    tokenizer = load_tokenizer(chosen.model)
    console.print(show_survey(survey))
    if out is not None:
        write_data_page(out, survey, f"The rows of {Path(recipe).name}")
        console.print(f"written: {out}")
    if json_file is not None:
        lines = (
            {"split": name, "row": number, **row}
            for name, prepared in {"train": made.train, "validation": made.validation}.items()
            if prepared is not None
            for number, row in zip(prepared.numbers, prepared.rows, strict=True)
        )
        count = write_rows(json_file, lines, tokenizer)
        console.print(f"{count:,} rows written: {json_file}")


def _prepare(recipe: "Recipe", shown: int, problems: list[DoraError]) -> tuple[Any, dict[str, Any]]:
    """The rows of train and validation, and their survey.

    Raises:
        DoraError: with these problems and all that is wrong with rows, tasks and tokenizer.
    """
    from ..checkpoints.models import load_config, load_tokenizer
    from ..evaluation.task_file import load_tasks
    from ..training.job import look_ahead
    from ..training.modalities import choose_modality, text
    from ..training.modalities.image_text import ImageText

    if isinstance(choose_modality(recipe), ImageText):
        raise_all(problems)
        found: Any = look_ahead(recipe, check_out=False).data
        return found, {**found.survey, "shown": found.survey["shown"][:shown]}
    with collecting(problems):
        raw = text.check_rows(recipe.data, recipe.seed)
    with collecting(problems):
        tasks = load_tasks(recipe.eval.tasks)
    with collecting(problems):
        tokenizer = load_tokenizer(recipe.model)
        # what looks at the model looks at its configuration alone
        model = SimpleNamespace(config=load_config(recipe.model))
    raise_all(problems)
    made = text.tokenize(raw, recipe.data, model, tokenizer)
    return made, text.survey(made, tokenizer, shown, tasks)


def _check_shown(model: "ModelSettings") -> None:
    """Check that the rows are texts, maybe about pictures, each of which becomes one row of tokens.

    Raises:
        UsageError: if they are pairs, pictures alone, sounds or series.
    """
    from ..checkpoints.kind import is_pipeline, read_kind

    kind = read_kind(model.path) if model.kind == "auto" else model.kind
    if is_pipeline(model.path):
        kind = "text-to-image"
    if kind not in (None, "causal", "classify", "tokens", "image-text"):
        raise UsageError(f"doralib data shows rows of one text; for a model of kind {kind} see doralib check")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> int:
    """Write one JSON object a line, with the row's text beside its tokens; returns how many."""
    from ..data.survey import decode
    from ..disk import replacing

    keys, count = ("split", "row", "input_ids", "labels"), 0
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        for row in rows:
            line = {**{key: row[key] for key in keys}, "text": decode(row["input_ids"], tokenizer)}
            file.write(json.dumps(line) + "\n")
            count += 1
    return count


def show_survey(survey: Mapping[str, Any]) -> Group:
    """The survey of some rows for the terminal."""
    from ..runs.report_data import tell_asked, tell_shared, tell_twice

    parts: list[RenderableType] = [_count_table(survey)]
    for name, split in survey["splits"].items():
        parts.append(Text(f"\ntokens of a row, {name}", style="bold"))
        parts.append(_draw_lengths(split["histogram"]))
        parts += [Text(f"{name}: {count:,} left out, {reason}") for reason, count in split["dropped"].items()]
        parts += [Text(f"  {line}") for line in split["examples"]]
        parts += [Text(line) for line in tell_twice(name, split)]
    parts += [Text(line) for line in (*tell_shared(survey["duplicates"]), *tell_asked(survey["tasks"]))]
    for row in survey["shown"]:
        head = f"\nrow {row['number']}: {row['tokens']:,} tokens, {row['learned']:,} learned"
        parts += [Text(head, style="bold"), color_learned(row["pieces"])]
    return Group(*parts)


def color_learned(pieces: Sequence[Sequence[Any]]) -> Text:
    """A row's text with its learned parts in color, or in marks where there are no colors."""
    from ..data.survey import LEFT, RIGHT, shorten

    shown = Text()
    for text, learned in pieces:
        plain = shorten(text)
        if not learned:
            shown.append(plain)
        elif console.is_terminal and not console.no_color:
            shown.append(plain, style="bold green")
        else:
            shown.append(f"{LEFT}{plain}{RIGHT}")
    return shown


def _count_table(survey: Mapping[str, Any]) -> Table:
    settings = survey["settings"]
    packed = ", packed" if settings["packing"] else ""
    title = f"style {settings['style']}, loss on {settings['loss_on']}, at most {settings['max_length']} tokens{packed}"
    table = Table(title=title)
    table.add_column("")
    for name in ("rows", "used", "left out", "cut", "tokens", "learned", "shortest", "median", "longest"):
        table.add_column(name, justify="right")
    for name, split in survey["splits"].items():
        counts = [split["rows"], split["kept"], sum(split["dropped"].values()), split["cut"]]
        counts += [split["tokens"], split["learned"], *(split["lengths"][k] for k in ("shortest", "median", "longest"))]
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _draw_lengths(bars: Sequence[Sequence[int]]) -> Text:
    from ..runs.report_data import name_bar

    most, width = max(count for _, _, count in bars), max(len(name_bar(low, high)) for low, high, _ in bars)
    lines = [
        f"{name_bar(low, high):>{width}} {'#' * round(_BAR_WIDTH * count / most):<{_BAR_WIDTH}} {count:,}"
        for low, high, count in bars
    ]
    return Text("\n".join(lines))
