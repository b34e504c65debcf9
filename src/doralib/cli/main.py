"""The `doralib` command: its verbs, a file each, and an exit status for each kind of error.

What a verb needs is imported when it runs, so help needs no torch.
"""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from textwrap import dedent, indent
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import DoraError, Note
from ..extras import explain_missing
from .analyze import analyze_command
from .bench import bench_command
from .check import check_command
from .compare import compare_command
from .console import print_log, set_volume, show_controls
from .convert import convert_command
from .data import data_command
from .demo import demo_command
from .eval import eval_command
from .features import features_command
from .generate import generate_command
from .init import init_command
from .inspect import inspect_command
from .merge import merge_command
from .options import Verb, VerifyingCommand, with_volume
from .plan import plan_command
from .push import push_command
from .recipes import recipes_command
from .serve import serve_command
from .targets import targets_command
from .train import train_command

_FIRST = """
To begin: `doralib demo` does everything once, on a small model and real data (minutes on 2 cores). For your own data
`doralib init DATA` writes a recipe, `doralib check RECIPE` shows what it would do, and `doralib train RECIPE` does it.
"""

app = typer.Typer(
    name="doralib",
    help="DoRA fine-tuning: LoRA's cost, exact numbers, every adapter file.",
    epilog=_FIRST,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# transformers imports these where they are installed, and each tells of kernels that it has no GPU for
_TALKATIVE = (
    "torchao",
    "torch.utils._pytree",
    "bitsandbytes.backends.cpu.ops",
    "bitsandbytes.autograd._functions",  # a line for each product of an int8 base
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"doralib {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="The version, and nothing else.")
    ] = False,
) -> None:
    """DoRA fine-tuning: LoRA's cost, exact numbers, every adapter file."""


_VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "train": (
        train_command,
        """
        doralib train recipe.yaml
        doralib train recipe.yaml adapter.r=32 'data.target= {label}' out=runs/r32
        doralib train recipe.yaml --resume
        """,
    ),
    "plan": (
        plan_command,
        """
        doralib plan recipe.yaml
        doralib plan recipe.yaml model.quantization=nf4 --gpus 2 --gpu-memory 24
        """,
    ),
    "check": (
        check_command,
        """
        doralib check recipe.yaml
        doralib check chat data.train=talks.jsonl out=runs/talks --json
        """,
    ),
    "init": (
        init_command,
        """
        doralib init
        doralib init reviews.csv --out reviews.yaml
        """,
    ),
    "data": (
        data_command,
        """
        doralib data recipe.yaml --rows 10
        doralib data recipe.yaml data.packing=true --out rows.html
        """,
    ),
    "eval": (
        eval_command,
        """
        doralib eval runs/reviews --tasks sentiment.yaml
        doralib eval HuggingFaceTB/SmolLM2-135M --tasks boolq,piqa --limit 100 --json
        """,
    ),
    "generate": (
        generate_command,
        """
        doralib generate runs/reviews --prompt 'A gem.'
        doralib generate runs/alpaca --field instruction='Translate to French.' --field input='Good night.'
        doralib generate runs/talks
        """,
    ),
    "merge": (
        merge_command,
        """
        doralib merge runs/reviews --out merged --verify
        doralib merge runs/reviews --out merged --for ollama
        """,
    ),
    "serve": (serve_command, "doralib serve runs/reviews --port 8000"),
    "push": (push_command, "doralib push runs/reviews --to OWNER/NAME"),
    "convert": (convert_command, "doralib convert runs/reviews --to mlx --out adapter-mlx"),
    "inspect": (
        inspect_command,
        """
        doralib inspect runs/reviews
        doralib inspect adapter.safetensors --base models/base --json
        """,
    ),
    "features": (
        features_command,
        """
        doralib features pictures --model google/vit-base-patch16-224 --out features
        doralib features clips --model openai/clip-vit-base-patch32 --fps 0.5 --out features
        """,
    ),
    "targets": (targets_command, "doralib targets HuggingFaceTB/SmolLM2-135M"),
    "analyze": (analyze_command, "doralib analyze models/base runs/reviews --out movement"),
    "compare": (compare_command, "doralib compare recipe.yaml --methods lora,dora --seeds 0,1,2 --out runs/compare"),
    "recipes": (
        recipes_command,
        """
        doralib recipes
        doralib recipes chat > chat.yaml
        """,
    ),
    "bench": (bench_command, "doralib bench step rounds=3 layers=4"),
    "demo": (demo_command, "doralib demo --method dora"),
}
"""The verbs in the order of the help, each with examples."""


def _add(name: str, command: Callable[..., None], examples: str) -> None:
    # the mark keeps lines as they are
    shown = "\b\nExamples:\n" + indent(dedent(examples).strip(), "  ")
    app.command(name, cls=VerifyingCommand if name == "merge" else Verb, epilog=shown)(with_volume(command))


for _name, (_command, _examples) in _VERBS.items():
    _add(_name, _command, _examples)

_python_format = warnings.formatwarning


def _format_warning(message: Any, category: type[Warning], *where: Any, **more: Any) -> str:
    if issubclass(category, Note):
        return f"note: {show_controls(str(message))}\n"
    return _python_format(message, category, *where, **more)


def _explain(error: OSError) -> str:
    """What the system refused, and for which file."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}; is the path right, and may you write there?"


def main() -> None:
    """Run one command; a user's mistake is one message, not a traceback."""
    warnings.formatwarning = _format_warning
    print_log()
    set_volume()
    # what transformers plans to rename is no news for the user of a command
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(prog_name="doralib", standalone_mode=True)
    except DoraError as error:
        if logging.getLogger("doralib").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        print(f"doralib: {show_controls(str(error))}", file=sys.stderr)
        sys.exit(error.exit_status)
    except ModuleNotFoundError as error:
        if not (told := explain_missing((error.name or "").partition(".")[0])):
            raise
        print(f"doralib: {told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("doralib: stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"doralib: {show_controls(_explain(error))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
