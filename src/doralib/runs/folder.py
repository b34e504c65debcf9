"""The folder of one run: who may write into it, and what it says about itself."""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..errors import UsageError
from ..recipe import Recipe
from . import checkpointing
from .machine import cpu_name, package_versions

_PACKAGES = ("doralib", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "peft")


class RunFolder:
    """Paths of a run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.samples = path / "samples.json"
        self.summary = path / "summary.json"
        self.survey = path / "data.json"

    @property
    def trained(self) -> Path:
        """Stands once training is over: the adapter, or the whole model of full fine-tuning."""
        whole = self.path / "model"
        return whole if whole.exists() else self.path / "adapter_model.safetensors"

    def check(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        """Check that this recipe may write here in this way.

        Raises:
            UsageError: if a run stands there and neither was asked for, or what was asked for cannot be.
        """
        if resume and overwrite:
            raise UsageError("--resume goes on with a run and --overwrite deletes it; give one of them")
        files.check_writable(self.path, "out", folder=True)
        there = self.path.is_dir() and any(self.path.iterdir())
        if resume:
            self._check_resume(recipe)
        elif there and not self.config.is_file():
            raise UsageError(f"out: {self.path} holds files and is no run of doralib; choose another folder")
        elif there and not overwrite:
            raise UsageError(
                f"out: the run folder {self.path} exists ({self._how_far()}); --resume goes on with it, --overwrite "
                "deletes it and starts again, or choose another `out`"
            )

    def open(self, recipe: Recipe, *, overwrite: bool) -> None:
        """Make the folder, or empty it first; `check` has said that this may be done."""
        if overwrite and self.path.exists():
            files.delete(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.is_file():
            with files.replacing(self.config) as part:
                part.write_text(recipe.to_yaml(), encoding="utf-8")
        files.write_json(self.environment, describe_environment())

    def read(self, path: Path, otherwise: Any) -> Any:
        """A JSON file of an earlier session, if there is one."""
        return files.read_json(path, object if otherwise is None else type(otherwise)) if path.is_file() else otherwise

    def _check_resume(self, recipe: Recipe) -> None:
        if not self.config.is_file():
            raise UsageError(f"--resume: there is no run at {self.path}; leave it out to start one")
        other = sorted(_differences(files.read_yaml(self.config), recipe.model_dump(mode="json")))
        other = [key for key in other if not key.startswith("eval.") and key != "out"]
        if other:
            raise UsageError(
                f"--resume goes on with the same settings, and these differ from {self.config}: {', '.join(other)}; "
                "take them back, or start again with --overwrite or another `out`"
            )

    def _how_far(self) -> str:
        last = checkpointing.find_newest(self.checkpoints)
        status = self.read(self.summary, {}).get("status", "not finished")
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


def _differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [where]
    inner = lambda key: f"{where}.{key}" if where else key
    return [k for key in one.keys() | other.keys() for k in _differences(one.get(key), other.get(key), inner(key))]
