"""`doralib serve`: a model handed to the server of transformers."""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DoraError, UsageError
from .console import console, sigterm_as_ctrl_c
from .options import Alpha, Base, Model, Revision

# what `transformers serve` imports beside transformers itself
_NEEDED = ("fastapi", "uvicorn", "openai")


def serve_command(
    model: Model,
    base: Base = None,
    revision: Revision = None,
    alpha: Alpha = None,
    host: Annotated[str, typer.Option(help="Where it listens.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
) -> None:
    """Serve a model by `transformers serve`, in OpenAI's protocol.

    An adapter is merged first, into a folder that goes when the server ends.
    """
    from ..hub import add_revision

    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(f"transformers serve needs {', '.join(missing)}: pip install 'doralib[serve]'")
    with sigterm_as_ctrl_c(), _open_plain(add_revision(model, revision), base, alpha) as place:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", place]
        command += ["--host", host, "--port", str(port), "--dtype", dtype, "--device", device]
        console.print(f"transformers serve {' '.join(command[4:])}")
        console.print(f"once it is loaded, http://{host}:{port}/v1 answers for the model {place}; Ctrl-C ends it")
        with subprocess.Popen(command) as server:
            try:
                status = server.wait()
            except KeyboardInterrupt:
                server.terminate()
                server.wait()
                return
    if status:
        raise DoraError(f"transformers serve ended with status {status}; its own lines above say why")


@contextmanager
def _open_plain(name: str, base: str | None, alpha: float | None) -> Iterator[str]:
    """A model that plain transformers loads, for as long as the block runs.

    Raises:
        UsageError: if it gives labels and no text, or its path cannot be named to the server.
    """
    from ..checkpoints.heads import find_head
    from ..checkpoints.kind import read_label_kind
    from ..formats.base import Hints
    from ..formats.files import is_adapter
    from ..hub import find_hub_adapter, is_hub_name
    from .merge import merge_and_show, with_weights

    folder = find_hub_adapter(name) or Path(name).expanduser()
    if is_adapter(folder):
        from ..checkpoints.merge import Ingredient

        if find_head(folder) is not None:
            raise UsageError(f"{name} gives labels, and transformers serve answers in text")
        with tempfile.TemporaryDirectory(prefix="doralib-serve-", ignore_cleanup_errors=True) as scratch:
            each = Ingredient(Path(), given=Hints(alpha=alpha))
            out = Path(scratch) / "merged"
            merge_and_show(with_weights([folder], [], each), base, out, dtype=None, verify=(), overwrite=False)
            yield str(out)
        return
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not is_hub_name(name) and not (folder / "config.json").is_file():
        raise UsageError(f"{name} is no run, adapter or model folder, and no name of the hub")
    if read_label_kind(str(folder)) is not None:
        raise UsageError(f"{name} gives labels, and transformers serve answers in text")
    if "@" in str(folder) and not is_hub_name(name):
        raise UsageError(f"{name}: transformers serve takes what follows an @ for a revision; rename the folder")
    yield name if is_hub_name(name) else str(folder)
