"""Options that several verbs take."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A run, an adapter, a model folder, a .gguf file or a hub name.")]
Base = Annotated[str | None, typer.Option(help="The base model, where it is not the one that the adapter names.")]
Alpha = Annotated[float | None, typer.Option(min=0, help="lora_alpha, for files that forget it.")]
Component = Annotated[str | None, typer.Option(help="The part of a pipeline, e.g. unet.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the output folder.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples at a time.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
