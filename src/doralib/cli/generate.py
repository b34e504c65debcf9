"""`doralib generate`: one prompt, a file of prompts, or a chat."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .console import console, errors, print_log, show_controls
from .options import AllowNonfinite, Alpha, Base, Batch, Dtype, Model, Seed


def generate_command(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts: .txt (a line each), .json, .jsonl.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the answers of --file as .jsonl.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--plain", help="Use the tokenizer's chat template.")] = False,
    base: Base = None,
    alpha: Alpha = None,
    allow_nonfinite: AllowNonfinite = False,
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="The longest answer.")] = 128,
    system: Annotated[str, typer.Option(help="What a model is told before a chat.")] = "",
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: from all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Leave out less than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    batch_size: Batch = 8,
    seed: Seed = 0,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Put on MODEL; of several each answers.")
    ] = None,
) -> None:
    """Answer prompts, or chat in the terminal.

    With neither --prompt nor --file: a chat.
    """
    from ..adapters.inference import unchanged
    from ..adapters.multiple import set_adapter
    from ..checkpoints.load import load_model, load_named_adapters, load_own_tokenizer
    from ..evaluation import generation
    from ..evaluation.classifier import find_head_kind
    from ..formats.base import Hints
    from .chat import Chat
    from .prompt_file import read_prompts, write_answers

    _check(prompt, file, out, system, adapter or [])
    prompts = [prompt] if prompt is not None else read_prompts(file) if file else None
    sampling = generation.Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    # on the standard output stand answers alone
    print_log(errors)
    loaded, tokenizer = load_model(
        model, base=base, dtype=dtype, given=Hints(alpha=alpha, allow_nonfinite=allow_nonfinite)
    )
    if find_head_kind(loaded) is not None:
        raise UsageError(f"{model} gives labels and no text; score it with doralib eval")
    names = load_named_adapters(loaded, adapter or [])
    own = {name: load_own_tokenizer(loaded, path, lambda: tokenizer) for name, path in names.items()}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    if prompts is None:
        with unchanged(loaded):
            tokenizer = next(iter(own.values()), tokenizer)
            Chat(loaded, tokenizer, _reader(), _write, system=system, adapters=own, **options).run()
        return
    for name in names or [""]:
        if name:
            set_adapter(loaded, name)
        with unchanged(loaded):
            theirs = own.get(name, tokenizer)
            answers = generation.generate(loaded, theirs, prompts, batch_size=batch_size, chat=chat, **options)
        if out is not None:
            write_answers(out, prompts, answers)
            console.print(f"{len(answers)} answers written: {out}")
            return
        for answer in answers:
            # a pipe gets the answer as it is
            shown = show_controls(answer) if sys.stdout.isatty() else answer
            print(f"{name}: {shown}" if len(names) > 1 else shown)


def _check(prompt: str | None, file: Path | None, out: Path | None, system: str, adapters: list[str]) -> None:
    """Check options that depend on each other."""
    from ..disk import check_writable

    if prompt is not None and file is not None:
        raise UsageError("--prompt and --file were both given: one of them")
    if system and (prompt is not None or file is not None):
        raise UsageError("--system is for a chat; put it into the text of a prompt")
    if len(adapters) > 1 and out is not None:
        raise UsageError("--out is for one --adapter; several answer on the terminal")
    if out is not None:
        check_writable(out, "--out", folder=False)


def _reader() -> Callable[[str], str]:
    """Lines with arrows, history and pasted texts at a terminal; plain lines from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession

    return PromptSession().prompt


def _write(text: str) -> None:
    print(text, end="", flush=True)
