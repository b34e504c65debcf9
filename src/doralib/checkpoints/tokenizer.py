"""The tokenizer and chat template that lie beside an adapter; read from its files alone, without transformers."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DoraError
from ..files import read_json, read_text, write_json
from ..formats.files import find_adapter_file

_CONFIG, _WHOLE, _TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
_VOCABULARIES = (
    *(_WHOLE, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.bpe", "tekken.json", "tiktoken.model", "bpe.codes", "source.spm"),
)
# all that makes a tokenizer: where one takes the place of another, none of the other's may stay
_FILES = (
    *(*_VOCABULARIES, _CONFIG, _TEMPLATE, "chat_template.json", "special_tokens_map.json", "added_tokens.json"),
    *("merges.txt", "target.spm"),
)
_TEMPLATES_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class OwnTokenizer:
    """What an adapter's folder has of a tokenizer."""

    folder: Path
    is_whole: bool
    """There is a vocabulary, and not the chat template alone."""
    template: Any
    """The chat template, as tokenizers of transformers take it; None: there is none."""

    def words(self) -> str:
        """What there is, for a person."""
        parts = ["tokenizer"] * self.is_whole + ["chat template"] * (self.template is not None)
        return f"{' and '.join(parts)} in {self.folder}"


def find_own_tokenizer(adapter: Path) -> OwnTokenizer | None:
    """What lies beside an adapter that is given as a folder; a lone file among others has nothing of its own.

    Raises:
        DoraError: if a file of it is damaged.
    """
    if not adapter.is_dir():
        return None
    folder = find_adapter_file(adapter).parent
    is_whole = any((folder / name).is_file() for name in _VOCABULARIES)
    template = read_template(folder)
    return OwnTokenizer(folder, is_whole, template) if is_whole or template is not None else None


def find_misfit(own: OwnTokenizer, config: dict[str, Any]) -> str:
    """Why a model of this config cannot take the tokenizer's ids, or ""; ids are read where files of JSON say them."""
    rows = (config.get("text_config") or config).get("vocab_size") or config.get("vocab_size")
    largest = max(_read_ids(own.folder).items(), key=lambda item: item[1], default=("", -1))
    return explain_misfit(*largest, rows) if rows and largest[1] >= rows else ""


def explain_misfit(token: str, number: int, rows: int) -> str:
    """The token of the largest id, that id, and how many embeddings the model has."""
    return f"{token!r} has id {number}, and the model has {rows} embeddings"


def copy_tokenizer(own: OwnTokenizer, folder: Path) -> None:
    """Put an adapter's tokenizer, or its chat template alone, in the place of a model's.

    A tokenizer without a template keeps the model's.
    """
    template = own.template if own.template is not None else read_template(folder)
    for name in _FILES if own.is_whole else (_TEMPLATE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
        if (own.folder / name).is_file():
            shutil.copyfile(own.folder / name, folder / name)
    if (own.folder / _TEMPLATES_FOLDER).is_dir():
        shutil.copytree(own.folder / _TEMPLATES_FOLDER, folder / _TEMPLATES_FOLDER, dirs_exist_ok=True)
    if template is not None and read_template(folder) != template:
        settings = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
        write_json(folder / _CONFIG, {**settings, "chat_template": template})


def take_tokenizer(adapters: Sequence[Path], folder: Path) -> list[str]:
    """Put the adapters' own tokenizer into a merged folder; returns what there is to say.

    Several adapters have to bring the same one; one that does not fit the model, by its config, is left aside.
    """
    found = [own for own in map(find_own_tokenizer, adapters) if own is not None]
    if not found or not (folder / "config.json").is_file():
        return []
    if any(_read_files(own) != _read_files(found[0]) for own in found):
        return [f"the base's tokenizer is kept: {' and '.join(own.words() for own in found)} differ"]
    if why := find_misfit(found[0], read_json(folder / "config.json")):
        return [f"the base's tokenizer is kept: that of {found[0].folder} does not fit, {why}"]
    copy_tokenizer(found[0], folder)
    return [f"with the {found[0].words()}"]


def _read_files(own: OwnTokenizer) -> dict[str, bytes]:
    return {name: (own.folder / name).read_bytes() for name in _FILES if (own.folder / name).is_file()}


def read_template(folder: Path) -> Any:
    """The chat template in a folder, as tokenizers of transformers take it, or None."""
    if (folder / _TEMPLATE).is_file():
        return read_text(folder / _TEMPLATE)
    for name in ("chat_template.json", _CONFIG):
        if (folder / name).is_file():
            settings = read_json(folder / name)
            found = settings.get("chat_template") if isinstance(settings, dict) else None
            if found:
                return found
    return None


def _read_ids(folder: Path) -> dict[str, int]:
    """Ids by token, from the files that say them; empty if none does."""
    ids: dict[str, int] = {}
    if (folder / _WHOLE).is_file():
        whole = read_json(folder / _WHOLE)
        vocabulary = (whole.get("model") or {}).get("vocab") or {}
        ids = vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
        ids = {**ids, **{token["content"]: token["id"] for token in whole.get("added_tokens") or []}}
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file() and not (folder / _WHOLE).is_file():
            ids = {**ids, **read_json(folder / name)}
    if not all(isinstance(number, int) for number in ids.values()):
        raise DoraError(f"{folder}: the tokenizer's files hold ids that are no numbers; save the tokenizer again")
    return ids
