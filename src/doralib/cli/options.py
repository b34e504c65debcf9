"""Options that several verbs take."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Model = Annotated[str, typer.Argument(help="A run, an adapter, a model folder, a .gguf file or a hub name.")]
Base = Annotated[str | None, typer.Option(help="The base model, where it is not the one that the adapter names.")]
Alpha = Annotated[float | None, typer.Option(min=0, max=1e6, help="lora_alpha, for files that forget it.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Take NaN and infinite numbers in adapter and base as they are.")
]
Component = Annotated[str | None, typer.Option(help="The part of a pipeline, e.g. unet.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Variant = Annotated[str | None, typer.Option(help="Of several weights in the base's folder: fp16, ema, ...")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the output folder.")]
Batch = Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Examples at a time.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything that is drawn.")]


class VerifyingCommand(TyperCommand):
    """A command whose ``--verify`` may stand alone, which means the first of its choices."""

    choices = ("logits", "exact")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say the choice that is meant where none follows."""
        said = [
            f"--verify={self.choices[0]}" if arg == "--verify" and after not in self.choices else arg
            for arg, after in zip(args, [*args[1:], ""], strict=True)
        ]
        return super().parse_args(ctx, said)
