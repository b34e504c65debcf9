"""`doralib eval --harness`: tasks of lm-eval here, and of lmms-eval in its own environment."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .console import console, sigterm_as_ctrl_c

if TYPE_CHECKING:
    from ..evaluation.result import TaskResult
    from ..formats.base import Hints

_LMMS = "lmms:"


@dataclass(frozen=True)
class Harness:
    """What was asked for."""

    tasks: str
    python: str | None
    """Of lmms-eval's environment."""
    name: str | None
    """lmms-eval's words for the model."""
    out: Path | None
    resume: bool
    batch_size: int
    limit: int | None
    seed: int

    @property
    def tool(self) -> str:
        """What runs the tasks."""
        return "lmms-eval" if self.tasks.startswith(_LMMS) else "lm-eval"

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return [word.strip() for word in self.tasks.removeprefix(_LMMS).split(",") if word.strip()]


@dataclass(frozen=True)
class AskedModel:
    """The model that is asked."""

    path: str
    base: str | None
    dtype: str
    given: "Hints"
    load: Callable[[], tuple[Any, Any]]


def run_harness_tasks(harness: Harness, model: AskedModel) -> "dict[str, TaskResult]":
    """The result of each task; with --out it is written.

    Raises:
        UsageError: if options do not go together, or what runs the tasks is not installed.
        DoraError: if lmms-eval fails.
    """
    from ..disk import check_writable
    from ..evaluation.harness import run_harness
    from ..files import write_json

    out = harness.out
    if out is not None:
        check_writable(out, "--out", folder=False)
    if harness.tool == "lmms-eval":
        return _run_lmms(harness, model)
    given = {"--harness-python": harness.python, "--harness-model": harness.name, "--resume": harness.resume or None}
    if wrong := [option for option, value in given.items() if value is not None]:
        raise UsageError(f"{', '.join(wrong)}: goes with --harness lmms:..., whose tasks run in another environment")
    loaded, limit = model.load(), harness.limit
    results = run_harness(*loaded, harness.names, batch_size=harness.batch_size, limit=limit, seed=harness.seed)
    if out is not None:
        write_json(out, {"model": model.path, "after": {task: result.to_json() for task, result in results.items()}})
    return results


def _run_lmms(harness: Harness, model: AskedModel) -> "dict[str, TaskResult]":
    from ..disk import delete
    from ..evaluation.lmms import LmmsTask, find_lmms, name_model
    from ..evaluation.results_file import ResultsFile

    out = harness.out
    if harness.resume and out is None:
        raise UsageError("--resume needs --out, the file that has the results so far")
    if not harness.names:
        raise UsageError("--harness lmms: names no task; give lmms-eval's names, as in lmms:gqa,pope")
    lmms = find_lmms(harness.python)
    settings = {"model": model.path, "base": model.base, "dtype": model.dtype, "alpha": model.given.alpha}
    settings |= {"limit": harness.limit, "seed": harness.seed, "lmms-eval": lmms.version, "name": harness.name}
    chosen = [LmmsTask(name=name) for name in harness.names]
    file = None if out is None else ResultsFile(out, settings)
    results = file.read(chosen) if file and harness.resume else {}
    left = [task for task in chosen if task.name not in results]
    kept = nullcontext(str(out.with_name(f"{out.stem}_lmms"))) if out else tempfile.TemporaryDirectory()
    with sigterm_as_ctrl_c(), kept as place:
        folder = Path(place)
        if not harness.resume:
            delete(folder / "model")
        if left:
            where = _merge(model, folder / "model")
            name = name_model(harness.name, where, _read_config(where))
        for task in left:
            console.print(f"{task.name}: lmms-eval {lmms.version} asks {name}; what it says is in", soft_wrap=True)
            console.print(f"  {folder / task.name / 'lmms.log'}", soft_wrap=True)
            limits: dict[str, Any] = {"limit": harness.limit, "seed": harness.seed, "batch_size": harness.batch_size}
            results[task.name] = lmms.run(task.name, name, folder / task.name, **limits)
            if file:
                file.add(task, results[task.name])
        # it takes as much of the disk as the model
        delete(folder / "model")
    return {task.name: results[task.name] for task in chosen}


def _merge(model: AskedModel, out: Path) -> str:
    """What lmms-eval can load: the model as it is, or the adapter merged into its base, at `out`."""
    from ..checkpoints.merge import Ingredient
    from ..formats.files import is_adapter
    from ..hub import fetch_folder, find_hub_adapter
    from .merge import merge_and_show

    folder = find_hub_adapter(model.path) or Path(model.path).expanduser()
    if is_adapter(folder):
        if not out.is_dir():
            dtype = None if model.dtype == "auto" else model.dtype
            merge_and_show(
                [Ingredient(folder, given=model.given)], model.base, out, dtype=dtype, verify=(), overwrite=False
            )
        return str(out)
    if given := [name for name, value in (("--base", model.base), ("--alpha", model.given.alpha)) if value is not None]:
        raise UsageError(
            f"{', '.join(given)}: {model.path} is a model and no adapter, so nothing reads it; leave it out"
        )
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if folder.exists():
        return str(folder.absolute())
    return str(fetch_folder(model.path)) if "@" in model.path else model.path


def _read_config(where: str) -> Mapping[str, Any]:
    from ..checkpoints.models import load_config
    from ..recipe import ModelSettings

    found: Mapping[str, Any] = load_config(ModelSettings(path=where)).to_dict()
    return found
