"""What was trained, uploaded to the hub: the files that make an adapter or a model, and its card."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ..errors import DoraError, UsageError
from ..files import read_json
from ..formats.base import SETTINGS_FILE
from ..formats.files import find_adapter_file, find_base_name, is_adapter
from ..hub import is_hub_name, split_revision
from ..runs.card import make_card
from ..runs.folder import RunFolder
from ..runs.record import read_run
from .merge import RECORD

_CARD = "README.md"
_OF_ADAPTERS = ("adapter_*.json", "adapter_model.safetensors", "doralib_*.json")
_TOKENIZERS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("*.bpe.model", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)


@dataclass(frozen=True)
class Upload:
    """What stands on the hub now."""

    url: str
    files: tuple[str, ...]


def push(
    run: Path,
    to: str,
    *,
    base: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Upload:
    """Upload an adapter or a model and its card, in one commit.

    Args:
        run: A run, an adapter's folder in PEFT's format, or a model's folder.
        to: OWNER/NAME, or NAME.
        base: The base's name on the hub, where an adapter names a folder of this machine.

    Raises:
        UsageError: if there is nothing to upload, the adapter would name a folder of this machine, HF_HUB_OFFLINE is
            set, or nobody is logged in.
        DoraError: if the hub refuses.
    """
    folder, files = _choose_files(run)
    files = _change_files(run, folder, files, to, base)
    adds = [CommitOperationAdd(name, content) for name, content in files.items()]
    api, said = HfApi(), message or f"{run.resolve().name}, trained with doralib"
    try:
        name = api.create_repo(to, private=private or None, exist_ok=True).repo_id
        if revision:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.create_commit(name, adds, commit_message=said, revision=revision)
    except (OfflineModeIsEnabled, LocalTokenNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise _explain(to, error) from error
    return Upload(str(getattr(done, "repo_url", "") or f"{api.endpoint}/{name}"), tuple(files))


def _choose_files(run: Path) -> tuple[Path, dict[str, str | bytes]]:
    """The folder that is uploaded, and its files by their names there."""
    folder = run / "model" if (run / "model" / "config.json").is_file() else run
    if is_adapter(folder):
        find_adapter_file(folder)
        if not (folder / SETTINGS_FILE).is_file():
            raise UsageError(f"{run} is no adapter in PEFT's format; write it so first (doralib convert --to peft)")
        patterns: tuple[str, ...] = (*_OF_ADAPTERS, *_TOKENIZERS, _CARD)
    elif (folder / "config.json").is_file():
        patterns = ("*.safetensors", "*.json", "*.py", _CARD, *_TOKENIZERS)
    else:
        raise UsageError(f"{run} holds no adapter and no model: a run is uploaded once it has come to its end")
    found = {file.relative_to(folder).as_posix(): str(file) for each in patterns for file in sorted(folder.glob(each))}
    # it says where on this machine things lie
    return folder, {name: file for name, file in found.items() if name != RECORD}


def _change_files(
    run: Path, folder: Path, files: dict[str, str | bytes], to: str, base: str | None
) -> dict[str, str | bytes]:
    """The files with the base's name on the hub, and with the card of a run as it reads there."""
    named = base or (find_base_name(folder) if is_adapter(folder) else None)
    if named and not is_hub_name(named):
        raise UsageError(
            f"{run} adapts {named}, a folder of this machine, which nobody else has: "
            "give the name of that model on the hub, --base OWNER/NAME"
        )
    made = dict(files)
    if base and SETTINGS_FILE in files:
        bare, revision = split_revision(base)
        settings = {**read_json(folder / SETTINGS_FILE), "base_model_name_or_path": bare}
        settings |= {"revision": revision} if revision else {}
        made[SETTINGS_FILE] = (json.dumps(settings, indent=2) + "\n").encode()
    if RunFolder(run).config.is_file():
        made[_CARD] = make_card(read_run(run), place=to, base=named).encode()
    return made


def _explain(to: str, error: Exception) -> DoraError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, OfflineModeIsEnabled):
        return UsageError("push: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it")
    response = getattr(error, "response", None)
    if isinstance(error, LocalTokenNotFoundError) or getattr(response, "status_code", None) == 401:
        return UsageError(f"push --to {to}: the hub does not know you: hf auth login, or set HF_TOKEN")
    return DoraError(f"push --to {to}: the hub refused it: {lines[0]}")
