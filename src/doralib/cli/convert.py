"""`doralib convert`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table

from .console import console, print_json
from .options import AllowNonfinite, Alpha, Component, Json, Overwrite, Revision, Variant

if TYPE_CHECKING:
    from ..checkpoints.convert import Conversion, ConversionRequest

# of a layer's change, in Frobenius norm: above it the LoRA is another adapter
_BAD = 0.1


def convert_command(
    adapter: Annotated[Path, typer.Argument(help="A file, or a folder that holds one.")],
    out: Annotated[Path, typer.Option(help="A folder, or one .safetensors or .gguf file.")],
    to: Annotated[
        str | None, typer.Option(help="peft, kohya, ai-toolkit, diffusers, mlx, torchtune, tensorrt, gguf, lora ...")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option("--for", help="vllm, sglang, llama.cpp, ollama, tensorrt-llm, peft, diffusers or comfyui."),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Its format, where the file could be of several.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, where its names or weights are needed.")] = None,
    revision: Revision = None,
    alpha: Alpha = None,
    allow_nonfinite: AllowNonfinite = False,
    component: Component = None,
    variant: Variant = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the nearest LoRA (lora, gguf, --for).")] = None,
    texts: Annotated[bool, typer.Option("--texts", help="With --to lora: compare logits on text too.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another format.

    Any known format as any other, as the nearest plain LoRA, or in the form that a server takes.
    """
    from ..checkpoints.convert import ConversionRequest
    from ..formats.base import Hints
    from ..hub import add_revision, fetch_folder

    shown: tuple[str, ...] = ()
    if texts:
        from ..checkpoints.verify import TEXTS

        shown = TEXTS
    given = Hints(alpha=alpha, component=component, allow_nonfinite=allow_nonfinite)
    done = convert_and_show(
        ConversionRequest(
            fetch_folder(add_revision(adapter, revision)),
            to,
            out,
            source,
            base,
            given,
            rank,
            shown,
            overwrite,
            server,
            variant,
        )
    )
    if as_json:
        print_json(asdict(done))


def convert_and_show(request: "ConversionRequest") -> "Conversion":
    """Convert, and tell the user what was done and assumed.

    Raises:
        UsageError: if the request cannot be right, e.g. a base model is needed.
        DoraError: if the adapter is damaged, or anything of it would be lost.
    """
    from ..checkpoints.convert import convert_adapter

    done = convert_adapter(request)
    console.print(f"{request.adapter} ({done.source}): {done.layers} layers written as {done.to} to {done.out}")
    for note in done.notes:
        console.print(f"note: {note}")
    if done.errors:
        console.print(_table(done))
    return done


def _table(done: "Conversion") -> Group:
    table = Table("layer", "rank", "error of the change", "error of the weight")
    for each in done.errors:
        table.add_row(each.layer, str(each.rank), f"{100 * each.relative:.3g} %", f"{100 * each.of_weight:.3g} %")
    lines = []
    if done.logits is not None:
        lines.append(f"logits differ by {100 * done.logits:.3g} %")
    worst = max(done.errors, key=lambda each: each.relative)
    if worst.relative > _BAD:
        lines.append(
            f"{worst.layer} loses {100 * worst.relative:.3g} % of its change: this LoRA is not the adapter. "
            "Merging loses nothing (doralib merge), a larger --rank loses less"
        )
    return Group(table, *lines)
