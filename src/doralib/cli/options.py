"""Options that several verbs take, and those that all of them take."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .console import set_volume

Model = Annotated[str, typer.Argument(help="A run, an adapter, a model folder, a .gguf file or a hub name.")]
Base = Annotated[str | None, typer.Option(help="The base model, where it is not the one that the adapter names.")]
Revision = Annotated[str | None, typer.Option(help="Of a hub name: its branch, tag or commit; or give NAME@REVISION.")]
Alpha = Annotated[float | None, typer.Option(min=0, max=1e6, help="lora_alpha, for files that forget it.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Take NaN and infinite numbers in adapter and base as they are.")
]
Component = Annotated[str | None, typer.Option(help="The part of a pipeline, e.g. unet.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Variant = Annotated[str | None, typer.Option(help="Of several weights in the base's folder: fp16, ema, ...")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the output folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; all else goes to the standard error.")]
Batch = Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Examples at a time.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything that is drawn.")]


Quiet = Annotated[bool, typer.Option("--quiet", help="Print warnings and results alone.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print what is for developers too, and of errors where.")]


def with_volume(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options ``--quiet`` and ``--verbose``."""

    @functools.wraps(command)
    def call(*, quiet: bool = False, verbose: bool = False, **given: Any) -> None:
        if quiet and verbose:
            raise typer.BadParameter("--quiet and --verbose do not go together")
        set_volume(quiet=quiet, verbose=verbose, aside=bool(given.get("as_json")))
        command(**given)

    more = {"quiet": Quiet, "verbose": Verbose}
    shown = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=k) for n, k in more.items()]
    own = inspect.signature(command)
    call.__signature__ = own.replace(parameters=[*own.parameters.values(), *shown])  # type: ignore[attr-defined]
    call.__annotations__ = {**command.__annotations__, **more}
    return call


class Verb(TyperCommand):
    """A command whose usage line names its arguments as its help does: ``RECIPE [KEY=VALUE]...``."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces of the usage line, options last."""
        arguments = [each for each in self.get_params(ctx) if each.param_type_name == "argument"]
        return [*map(_write_usage, arguments), self.options_metavar or ""]


def _write_usage(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper()).removesuffix("...").strip("[]")
    shown = name if argument.required else f"[{name}]"
    return shown if argument.nargs == 1 else f"{shown}..."


class VerifyingCommand(Verb):
    """A command whose ``--verify`` may stand alone, which means the first of its choices."""

    choices = ("logits", "exact")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say the choice that is meant where none follows."""
        said = [
            f"--verify={self.choices[0]}" if arg == "--verify" and after not in self.choices else arg
            for arg, after in zip(args, [*args[1:], ""], strict=True)
        ]
        return super().parse_args(ctx, said)
