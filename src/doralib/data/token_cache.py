"""Tokens kept on disk: made anew only where rows, settings or the tokenizer have changed.

They lie in the cache of `datasets`, at most `_MOST_KEPT` sets of rows; the oldest is deleted.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..disk import replacing
from ..errors import DoraError
from ..files import hash_file, read_json, write_json
from ..recipe import DataSettings
from .prepare import PreparedRows, RowNumber, RowReport

log = logging.getLogger(__name__)

_MOST_KEPT = 8
_ROWS_AT_ONCE = 10_000


def hash_job(rows: datasets.Dataset, numbers: Sequence[RowNumber], settings: DataSettings, tokenizer: Tokenizer) -> str:
    """The SHA-256 of all that tokens and labels follow from, in hexadecimal."""
    digest = hashlib.sha256()
    digest.update(settings.model_dump_json(exclude={"train", "validation", "limit", "packing"}).encode())
    digest.update(json.dumps(_describe_tokenizer(tokenizer), sort_keys=True, default=str).encode())
    # what was made by other code is made anew
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(hash_file(file).encode())
    digest.update("\n".join(map(str, numbers)).encode())
    for table in rows.with_format("arrow").iter(_ROWS_AT_ONCE):
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, table.schema.remove_metadata()) as stream:
            stream.write_table(table.combine_chunks())
        digest.update(buffer.getvalue())
    return digest.hexdigest()


def _describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the ids of a text, and the text of a conversation, follow from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "class": type(tokenizer).__name__,
        "transformers": version("transformers"),
        "backend": backend.to_str() if backend is not None else tokenizer.get_vocab(),
        "settings": tokenizer.init_kwargs,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
    }


def find_kept_tokens(key: str) -> PreparedRows | None:
    """The tokens kept under a key, read as they are needed; None where there are none, or they are damaged."""
    folder = _folder() / key
    if not folder.is_dir():
        return None
    try:
        rows = datasets.load_from_disk(str(folder))
        said = read_json(folder / "report.json")
        report = RowReport(
            **{**said["report"], **{name: Counter(said["report"][name]) for name in ("dropped", "noted")}}
        )
        if len(rows) != len(said["numbers"]):
            return None
    except (DoraError, OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None
    with contextlib.suppress(OSError):
        folder.touch()
    log.info(f"the tokens of {report.rows:,} rows are those of an earlier run, from {folder}")
    return PreparedRows(rows, report, said["numbers"])


def keep_tokens(key: str, made: PreparedRows) -> None:
    """Keep tokens for the next run; a full disk only means that it makes them again."""
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        had_bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            with replacing(folder / key) as part:
                made.rows.save_to_disk(str(part))
                write_json(part / "report.json", {"report": vars(made.report), "numbers": list(made.numbers)})
        finally:
            if not had_bars:
                datasets.enable_progress_bars()
        kept = sorted(
            (each for each in folder.iterdir() if len(each.name) == len(key)), key=lambda each: each.stat().st_mtime
        )
        for old in kept[:-_MOST_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        log.info(f"the tokens could not be kept for the next run: {error}")


def _folder() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE, "doralib", "tokens")
