"""Models and adapters by their names on the hub, `OWNER/NAME` or `OWNER/NAME@REVISION`, as folders of its local cache.

huggingface_hub does the work, and says no word to the network where HF_HUB_OFFLINE is set. It is imported when a name
is asked for: what is on the disk needs none of it.
"""

import os
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from .errors import UsageError

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_OF_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".yaml", ".json", ".jsonl")
ADAPTER_SETTINGS = "adapter_config.json"
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")
_OF_ADAPTERS = (*_BESIDE, "adapter_model.*", "adapters.safetensors")
_OF_MODELS = (*_BESIDE, "*.safetensors", "*.py")
_NOT_WANTED = ("checkpoint-*/*", "checkpoints/*", "runs/*", "optimizer.*", "training_args.bin")


def is_local(name: str) -> bool:
    """Whether a name is a path, and not one of the hub's, by its form alone."""
    on_windows = "\\" in name or bool(PureWindowsPath(name).drive)
    bare = name.partition("@")[0]
    return on_windows or name.startswith((".", "/", "~")) or bare.count("/") > 1


def is_hub_name(name: str | Path) -> bool:
    """Whether nothing is there by this name, and the hub could have it: OWNER/NAME, with or without @REVISION."""
    path, bare = Path(name).expanduser(), str(name).partition("@")[0]
    if path.exists() or is_local(str(name)) or path.suffix in _OF_FILES:
        return False
    # a slip in the last part of a path is no name of the hub
    return bool(_NAME.fullmatch(bare)) and not (len(path.parts) > 1 and path.parent.exists())


def check_model_place(name: str) -> None:
    """Check that a model that is named by its place is there; a name may be the hub's.

    Raises:
        UsageError: if nothing is there.
    """
    if is_local(name) and not Path(name).expanduser().exists():
        raise UsageError(f"model: there is no model folder {name}; give a folder, a .gguf file or a hub name")


def add_revision(name: str | Path, revision: str | None) -> str:
    """The name with @REVISION.

    Raises:
        UsageError: if it is no name of the hub, or has a revision already.
    """
    if revision is None:
        return str(name)
    if not is_hub_name(name) or "@" in str(name):
        why = "names a revision already" if "@" in str(name) else "is on the disk"
        raise UsageError(f"--revision {revision} is for a name of the hub, and {name} {why}")
    return f"{name}@{revision}"


def split_revision(name: str) -> tuple[str, str | None]:
    """A name of the hub and its revision, if it says one; a path stays whole."""
    if not is_hub_name(name):
        return name, None
    bare, _, revision = name.partition("@")
    return bare, revision or None


def fetch_folder(name: str | Path) -> Path:
    """The folder of the local cache that has what the hub has by a name; a path is returned as it is.

    Of an adapter come the files of the adapter alone, whatever else is beside it.

    Raises:
        UsageError: if the hub has nothing by that name, or cannot be asked and the cache has nothing.
    """
    if not is_hub_name(name) or "/" not in str(name):
        return Path(name)
    return find_hub_adapter(name) or _download(str(name), _OF_MODELS)


def fetch_model(name: str) -> Path:
    """As `fetch_folder`, of a model, whose name may have no owner."""
    return _download(name, _OF_MODELS)


def find_hub_adapter(name: str | Path) -> Path | None:
    """The folder of an adapter of the hub, or None if there is none of that name."""
    if not is_hub_name(name) or "/" not in str(name) or find_hub_file(name, ADAPTER_SETTINGS) is None:
        return None
    return _download(str(name), _OF_ADAPTERS)


def find_hub_file(name: str | Path, file: str) -> Path | None:
    """One file of what the hub has by a name, or None."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  # what is on the disk goes without

    bare, revision = split_revision(str(name))
    try:
        return Path(hf_hub_download(bare, file, revision=revision))
    except Exception:  # noqa: BLE001 - the hub and the network fail in their own ways
        # what else is wrong, the download of the whole says
        return None


def _download(name: str, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # as above

    bare, revision = split_revision(name)
    try:
        return Path(
            snapshot_download(bare, revision=revision, allow_patterns=[*wanted], ignore_patterns=[*_NOT_WANTED])
        )
    except Exception as error:
        raise UsageError(f"there is nothing at {name} here, and {explain_hub(error)}") from error


def explain_hub(error: Exception) -> str:
    """Why the hub gave nothing, in a line."""
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    lines: list[Any] = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"the hub gave nothing by that name{offline}: {lines[0]}"
