"""The `doralib` command: its verbs, a file each, and an exit status for each kind of error.

What a verb needs is imported when it runs, so help needs no torch.
"""

import logging
import sys
import warnings
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import DoraError, Note
from .analyze import analyze_command
from .bench import bench_command
from .compare import compare_command
from .console import print_log, show_controls
from .convert import convert_command
from .data import data_command
from .demo import demo_command
from .eval import eval_command
from .generate import generate_command
from .inspect import inspect_command
from .merge import merge_command
from .options import VerifyingCommand
from .recipes import recipes_command
from .targets import targets_command
from .train import train_command

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


app.command("train")(train_command)
app.command("data")(data_command)
app.command("eval")(eval_command)
app.command("generate")(generate_command)
app.command("merge", cls=VerifyingCommand)(merge_command)
app.command("convert")(convert_command)
app.command("inspect")(inspect_command)
app.command("targets")(targets_command)
app.command("analyze")(analyze_command)
app.command("compare")(compare_command)
app.command("recipes")(recipes_command)
app.command("bench")(bench_command)
app.command("demo")(demo_command)

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
    # what transformers plans to rename is no news for the user of a command
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(prog_name="doralib", standalone_mode=True)
    except DoraError as error:
        print(f"doralib: {show_controls(str(error))}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("doralib: stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"doralib: {show_controls(_explain(error))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
