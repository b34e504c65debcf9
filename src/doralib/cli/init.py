"""`doralib init`: a first recipe for somebody's own data."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError, raise_all
from .console import console
from .options import Overwrite

SCHEMA = Path(__file__).parents[1] / "schemas" / "recipe.schema.json"
_MODEL, _CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"
_LENGTHS = (256, 512, 1024, 2048)
_FEW_ROWS, _NO_VALIDATION = 2000, 20
"""Below so many rows there are three epochs, and none is held out."""


def init_command(
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A file, folder or hub name; else it is asked.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base model: a hub name or a folder.")] = None,
    out: Annotated[Path, typer.Option(help="The recipe's file.")] = Path("recipe.yaml"),
    overwrite: Overwrite = False,
) -> None:
    """Write a recipe for DATA, with a comment at each setting.

    It looks at the columns. Without DATA it asks three questions.
    """
    if out.exists() and not overwrite:
        raise UsageError(f"{out} is there already; name another file with --out, or replace it with --overwrite")
    asking = data is None
    if asking and not sys.stdin.isatty():
        raise UsageError("name the data, for example: doralib init reviews.csv")
    source = data if data is not None else str(typer.prompt("Rows to learn from (a file, a folder or a hub name)"))
    plan = look_at_data(source)
    console.print(f"{source}: {plan.what}")
    chosen = model or (_CHAT_MODEL if plan.data.get("style") == "chat" else _MODEL)
    run = f"runs/{Path(source).name.partition('.')[0] or 'first'}"
    if asking:
        chosen = model or str(typer.prompt("Model (a hub name or a folder)", default=chosen))
        run = str(typer.prompt("Folder of the run", default=run))
    write_recipe(out, source, chosen, run, plan)
    console.print(
        f"written: {out}\n  look at it, then: doralib check {out}\n  and to train:     doralib train {out}",
        soft_wrap=True,
    )


@dataclass(frozen=True)
class _Plan:
    """What the columns of some rows say."""

    what: str
    """The rows in words."""
    data: Mapping[str, str]
    """Settings of the group data: the style, and where it takes some prompt and target."""
    max_length: int = 512
    num_rows: int | None = None
    """None where it is not known, as of hub data sets."""


def look_at_data(source: str) -> _Plan:
    """How rows of these columns are learned.

    Raises:
        UsageError: if there is no such file, or its columns fit no way of training.
    """
    from ..data.detect import describe_style, find_first, find_style, guess_pair
    from ..data.sources import list_files
    from ..data.tables import is_parquet, read_head, read_table
    from ..recipe import DataSettings
    from ..training.early import find_data_problems

    settings = DataSettings(train=source)
    head = read_head(source, "DATA", "train", None)
    if head is None:
        return _Plan("its columns are looked at when it is checked", {})
    files = list_files(source, "DATA")
    num_rows = None if any(map(is_parquet, files)) else len(read_table(files, "DATA", "train", None).numbers)
    columns, first = list(head), find_first(head)
    pair = guess_pair(columns)
    if pair is not None and not {"prompt", "completion"} <= set(columns) and not {"chosen", "rejected"} <= set(columns):
        asked, answered = pair
        data = {"prompt": f"{{{asked}}}\n{answered.capitalize()}:", "target": f" {{{answered}}}"}
        what = f"{answered!r} is learned as the answer to {asked!r}"
    else:
        found = find_style(settings, columns, first, source)
        data = {"style": found.style}
        data |= {name: str(getattr(found, name)) for name in ("prompt", "target") if getattr(found, name) is not None}
        what = describe_style(found).removeprefix("data.style: auto found ")
    raise_all(find_data_problems(settings.model_copy(update=data)))
    return _Plan(what, data, _choose_length(head), num_rows)


def _choose_length(head: Mapping[str, Sequence[Any]]) -> int:
    """Tokens enough for rows twice as long as the longest looked at, at three characters a token."""
    rows = [" ".join(str(value) for value in row if value is not None) for row in zip(*head.values(), strict=True)]
    need = max(map(len, rows), default=0) * 2 / 3
    return next((length for length in _LENGTHS if length >= need), _LENGTHS[-1])


def write_recipe(path: Path, source: str, model: str, run: str, plan: _Plan) -> None:
    """Write the recipe; the comments say what else a setting could be."""
    from ..disk import replacing

    text = json.dumps  # a JSON text is a YAML text with its quotes
    few = plan.num_rows is not None and plan.num_rows < _FEW_ROWS
    held = plan.num_rows is None or plan.num_rows >= _NO_VALIDATION
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# doralib check {path}: what it would do; doralib train {path}: does it; docs: doralib train --settings",
        "model:",
        f"  path: {text(model, ensure_ascii=False)}  # a hub name, a folder or a .gguf file",
        "  dtype: auto  # as stored; float32 is the faster one on most CPUs, bfloat16 on GPUs",
        "  # quantization: nf4  # a quarter of the memory; needs doralib[quant]",
        "data:",
        f"  train: {text(source, ensure_ascii=False)}  # {plan.what}",
        "  validation: 0.05  # this share of the rows is held out to measure the loss on; or a file"
        if held
        else "  # validation: more.jsonl  # rows to measure the loss on; here are too few to hold some out",
        *(f"  {key}: {text(value, ensure_ascii=False)}{_COMMENTS[key]}" for key, value in plan.data.items()),
        f"  max_length: {plan.max_length}  # tokens of a row; {_TOO_LONG[plan.data.get('style') == 'text']}",
        "adapter:",
        "  method: dora  # dora, lora, dvora, vera or full",
        "  r: 16  # the rank: more can learn more, and costs more",
        "  lora_alpha: 32  # usually twice r",
        "  lora_dropout: 0.0",
        "  target_modules: all-linear  # or a list, [q_proj, v_proj]: see doralib targets MODEL",
        "training:  # any field of transformers.TrainingArguments",
        "  learning_rate: 2.0e-4",
        f"  num_train_epochs: {3 if few else 1}",
        "  per_device_train_batch_size: 8  # fewer where memory is short, with gradient_accumulation_steps: 2",
        f"out: {text(run, ensure_ascii=False)}",
        "seed: 0",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


_COMMENTS = {
    "style": "  # completion, alpaca, chat or text",
    "prompt": "  # given, not learned; {column} is the row's own",
    "target": "  # learned; the blank before a word belongs to it",
    "messages": "",
}
_TOO_LONG = {
    True: "longer ones are divided, so that nothing is left out",
    False: "longer ones are left out and counted; too_long: truncate cuts them",
}
