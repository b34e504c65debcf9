"""The folder of one run: who may write into it, and what it says about itself."""

import contextlib
import fnmatch
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .. import disk, files
from ..errors import UsageError, list_some
from ..recipe import PROMPT_FILE, SERIES_FILE, Recipe
from . import checkpointing, lock
from .machine import cpu_name, package_versions

RECORD = "run.json"
_WRITTEN = (
    *("config.yaml", "environment.json", "metrics.jsonl", "results.json", "samples.json", "summary.json"),
    *("report.html", "figures/*.png", "tensorboard/events.out.tfevents.*", "checkpoints/checkpoint-*/*"),
    *("adapter_config.json", "doralib_config.json", "adapter_model.safetensors", "data.json"),
    *("pytorch_lora_weights.safetensors", "*_emb.safetensors"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "normalizer.json"),
    *("README.md", "model/README.md", "doralib_labels.json", PROMPT_FILE, SERIES_FILE),
    *("doralib_visual.json", "predictions/*"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
"""Every file that a run may write, but for those of a whole model, which it lists when it has them."""

# how a step's rows are shared out may differ: that there are as many is checked against the checkpoint
_SHARES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_MAY_DIFFER = ("out", *(f"training.{name}" for name in _SHARES))

_PACKAGES = ("doralib", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "peft")


class RunFolder:
    """Paths of a run's files."""

    def __init__(self, path: Path) -> None:
        # a link to a run stays a link
        self.path = Path(os.path.realpath(path)) if path.is_symlink() else path
        self.record = self.path / RECORD
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.results = self.path / "results.json"
        self.samples = self.path / "samples.json"
        self.summary = self.path / "summary.json"
        self.survey = self.path / "data.json"
        self.predictions = self.path / "predictions"

    @property
    def trained(self) -> Path:
        """Stands once training is over: the adapter, or the whole model of full fine-tuning."""
        whole = self.path / "model"
        return whole if whole.exists() else self.path / "adapter_model.safetensors"

    def check(
        self, recipe: Recipe, *, resume: bool, overwrite: bool, data: Mapping[str, str], inputs: Iterable[str] = ()
    ) -> None:
        """Check that this recipe may write here in this way.

        Args:
            recipe: The recipe.
            resume: Whether to go on with the run that stands here.
            overwrite: Whether to delete it.
            data: The hash of each file of data by its setting, which a resumed run must find again.
            inputs: What the run reads, of which nothing may be deleted.

        Raises:
            UsageError: if a run stands there and neither was asked for, or what was asked for cannot be.
        """
        if resume and overwrite:
            raise UsageError("--resume goes on with a run and --overwrite deletes it; give one of them")
        disk.check_writable(self.path, "out", folder=True)
        self._check_content(recipe, resume=resume, overwrite=overwrite, data=data, inputs=inputs)

    def check_free(self) -> None:
        """Check that no other process writes here.

        Raises:
            UsageError: if one does.
        """
        if holder := lock.find_holder(self.path):
            raise UsageError(f"out: {holder}")

    @contextlib.contextmanager
    def open(
        self, recipe: Recipe, *, resume: bool, overwrite: bool, data: Mapping[str, str], inputs: Iterable[str] = ()
    ) -> Iterator[None]:
        """Make the folder, or empty it first, and keep it from other processes while the block runs.

        Raises:
            UsageError: as `check`, for what has come to stand here since.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with lock.hold(self.path):
            self._check_content(recipe, resume=resume, overwrite=overwrite, data=data, inputs=inputs)
            disk.clear_scratch(self.path)
            if overwrite:
                self._empty()
            if not self.record.is_file() or not self.config.is_file():
                files.write_json(self.record, {"files": list(_WRITTEN), "data": dict(data)})
            if not self.config.is_file():
                with disk.replacing(self.config) as part:
                    part.write_text(recipe.to_yaml(), encoding="utf-8")
            files.write_json(self.environment, describe_environment())
            yield

    def list_as_written(self, names: Iterable[str]) -> None:
        """Add files to those that the run has written, before they are there."""
        record = self._read_record()
        listed = [*record.get("files", []), *names]
        files.write_json(self.record, {**record, "files": sorted(set(listed), key=listed.index)})

    def write_predictions(self, texts: Mapping[str, str]) -> None:
        """Write files of predictions, by name."""
        for name, text in texts.items():
            with disk.replacing(self.predictions / name) as part:
                part.write_text(text, encoding="utf-8")

    def read(self, path: Path, otherwise: Any) -> Any:
        """A JSON file of an earlier session, if there is one."""
        return files.read_json(path, object if otherwise is None else type(otherwise)) if path.is_file() else otherwise

    def _check_content(
        self, recipe: Recipe, *, resume: bool, overwrite: bool, data: Mapping[str, str], inputs: Iterable[str]
    ) -> None:
        """`check`, but for whether it can be written at all."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        there = {item.name for item in found if not _is_hollow(item)}
        ours = {name for name in there if name in (RECORD, lock.NAME) or disk.is_scratch(Path(name))}
        if there == ours:
            # what a run leaves that was killed at its first write is nothing to go on with, and nothing to lose
            if resume and not ours:
                raise UsageError(f"--resume: there is no run at {self.path}; leave it out to start one")
        elif not self.config.is_file() or (not resume and not self._read_record()):
            raise UsageError(
                f"out: {self.path} holds files and is no run of doralib (a run has {self.config.name} and "
                f"{RECORD}, which lists its files); choose another folder"
            )
        elif resume:
            self._check_resume(recipe, data)
        elif overwrite:
            self._check_overwrite(inputs)
        else:
            raise UsageError(
                f"out: the run folder {self.path} exists ({self._how_far()}); --resume goes on with it, --overwrite "
                "deletes it and starts again, or choose another `out`"
            )

    def _check_resume(self, recipe: Recipe, data: Mapping[str, str]) -> None:
        other = sorted(_differences(files.read_yaml(self.config), recipe.model_dump(mode="json")))
        other = [key for key in other if not key.startswith(("eval.", "distributed")) and key not in _MAY_DIFFER]
        if other:
            raise UsageError(
                f"--resume goes on with the same settings, and these differ from {self.config}: {', '.join(other)}; "
                "take them back, or start again with --overwrite or another `out`"
            )
        before = self._read_record().get("data", {})
        if changed := [key for key, found in data.items() if before.get(key, found) != found]:
            raise UsageError(
                f"--resume goes on with the same rows, and the file of {', '.join(changed)} is not the one that this "
                "run began with; put that one back, or start again with --overwrite or another `out`"
            )

    def _check_overwrite(self, inputs: Iterable[str]) -> None:
        """Check that all that stands here is the run's own, is not needed, and can be deleted."""
        own, others = self._list_files()
        if others:
            raise UsageError(
                f"--overwrite deletes a run, and {self.path} holds what the run did not write: "
                f"{list_some(others, 5, ', ')}; move it away, or choose another `out`"
            )
        folder = Path(os.path.realpath(self.path))
        places = {each: Path(os.path.realpath(Path(each).expanduser())) for each in inputs}
        if needed := [each for each, place in places.items() if place == folder or folder in place.parents]:
            raise UsageError(
                f"--overwrite deletes the run at {self.path}, and this run reads {', '.join(needed)} in it; choose "
                "another `out`"
            )
        if shut := sorted({str(file.parent) for file in own if not os.access(file.parent, os.W_OK | os.X_OK)}):
            raise UsageError(f"--overwrite: {', '.join(shut)} is read-only; nothing was deleted; choose another `out`")

    def _list_files(self) -> tuple[list[Path], list[str]]:
        """The files that the run's record lists, and the names of all else."""
        patterns = [str(each) for each in self._read_record().get("files", [])]
        own, others = [], []
        for place, folders, names in os.walk(self.path):
            here = Path(place)
            folders[:] = [name for name in folders if not disk.is_scratch(here / name)]
            others += [f"{name} (a link)" for name in folders if (here / name).is_symlink()]
            for file in (here / name for name in names if not disk.is_scratch(here / name)):
                name = file.relative_to(self.path).as_posix()
                if name in (RECORD, lock.NAME):
                    continue
                (own.append(file) if _is_listed(name, patterns) else others.append(name))
        checkpoints = {file.parent for file in own if file.parent.parent == self.checkpoints}
        strange = [path for each in sorted(checkpoints) for path in checkpointing.list_others(each)]
        return own, others + [path.relative_to(self.path).as_posix() for path in strange]

    def _empty(self) -> None:
        """Delete the run's own files. Killed half-way, it is an older state of the same run, or none."""
        if (self.path / "model").is_dir():
            # a folder half deleted must not look like a trained model
            disk.set_aside(self.path / "model")
            disk.clear_scratch(self.path)
        own, _ = self._list_files()
        for file in sorted(set(own) - {self.config}, key=lambda file: file != self.trained):
            file.unlink()
        folders = {place for file in own for place in file.parents if self.path in place.parents}
        for folder in sorted(folders, reverse=True):
            # what is mounted there stays, empty
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.config.unlink(missing_ok=True)

    def _read_record(self) -> dict[str, Any]:
        record = self.read(self.record, {})
        return record if isinstance(record, dict) and isinstance(record.get("files", []), list) else {}

    def _how_far(self) -> str:
        last = checkpointing.find_newest(self.checkpoints)
        summary = self.read(self.summary, {})
        status = summary.get("status", "not finished") if isinstance(summary, dict) else "not finished"
        return f"{status}, " + (f"newest checkpoint at step {checkpointing.step_of(last)}" if last else "no checkpoint")


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and, in a git repository, the commit."""
    commit = None
    # git may not be installed, or its disk may hang: the run does not need it
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10)
        commit = found.stdout.strip() or None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": package_versions(_PACKAGES),
        "commit": commit,
    }


def _is_hollow(item: Path) -> bool:
    """Whether it is a folder without any file in it."""
    return item.is_dir() and not item.is_symlink() and all(_is_hollow(each) for each in item.iterdir())


def _is_listed(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name within the run is one of these; a * stands for no slash."""
    parts = name.split("/")
    return any(
        len(parts) == len(wanted := pattern.split("/"))
        and all(fnmatch.fnmatchcase(part, each) for part, each in zip(parts, wanted, strict=True))
        for pattern in patterns
    )


def _differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [where]
    inner = lambda key: f"{where}.{key}" if where else key
    return [k for key in one.keys() | other.keys() for k in _differences(one.get(key), other.get(key), inner(key))]
