"""`doralib push`: what was trained, with its card, to the hub."""

from pathlib import Path
from typing import Annotated

import typer

from .console import console


def push_command(
    run: Annotated[Path, typer.Argument(help="A run, an adapter folder in PEFT's format, or a merged folder.")],
    to: Annotated[str, typer.Option(help="Its name there: OWNER/NAME, or NAME for your own.")],
    base: Annotated[
        str | None, typer.Option(help="The base's name on the hub, where it was a folder of this machine.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it for you alone, if it is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload what was trained to the hub.

    The adapter or model, its tokenizer and a model card; no rows, logs or checkpoints. You log in with `hf auth login`.
    """
    from ..checkpoints.upload import push

    done = push(run, to, base=base, private=private, revision=revision, message=message)
    for name in done.files:
        console.print(f"uploaded: {name}")
    console.print(f"written: {done.url}")
