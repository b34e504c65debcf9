"""EleutherAI's lm-eval harness on a loaded model, with local files where there is no hub; its results as ours."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError, did_you_mean
from ..files import find_file
from .metrics import Score
from .result import TaskResult

_Z = 1.96  # of a 95 % interval, by the harness' standard errors
_OUR_NAMES = {"acc": "accuracy", "exact_match": "accuracy"}


def run_harness(
    model: nn.Module,
    tokenizer: Tokenizer,
    asked: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, TaskResult]:
    """Score a model by tasks of the harness; each is a name, or ``name=FILE`` for rows of a local file.

    A file has the columns of the task's own data set, as .json, .jsonl, .csv or .parquet.

    Raises:
        UsageError: if lm-eval is not installed, a task is unknown, or a file is not there.
    """
    try:
        import lm_eval  # noqa: PLC0415  an extra, wanted here only
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(f"--harness needs lm-eval: pip install 'doralib[eval]' ({error})") from None
    files = {name: Path(data) for name, found, data in (each.partition("=") for each in asked) if found}
    names = [each.partition("=")[0] for each in asked]
    with tempfile.TemporaryDirectory() as folder:
        manager = TaskManager()
        if unknown := [name for name in names if name not in manager.task_index]:
            raise UsageError(
                f"--harness: lm-eval has no task {unknown[0]!r}{did_you_mean(unknown[0], manager.all_tasks)}"
            )
        for name, data in files.items():
            _write_local(Path(folder), name, manager.task_index[name], find_file(data))
        if files:
            manager = TaskManager(include_path=folder)
        local = {name: f"local_{name}" if name in files else name for name in names}
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[*local.values()],
            task_manager=manager,
            limit=limit,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            bootstrap_iters=1000,
        )
    return {name: _read_result(name, found["results"][task], found["n-samples"]) for name, task in local.items()}


def _write_local(folder: Path, name: str, entry: Any, data: Path) -> None:
    """The task over again, on a file."""
    kind = {".jsonl": "json", ".ndjson": "json"}.get(data.suffix, data.suffix.removeprefix("."))
    path = str(data.resolve())
    settings = {
        "include": str(entry["yaml_path"] if isinstance(entry, Mapping) else entry.yaml_path),
        "task": f"local_{name}",
        "dataset_path": kind,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"train": path, "validation": path, "test": path}},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def _read_result(name: str, values: Mapping[str, Any], samples: Mapping[str, Any]) -> TaskResult:
    count = samples.get(f"local_{name}", samples.get(name, {})).get("effective", 0)
    return TaskResult(name, "harness", int(count), read_metrics(values), None, (), 0, 0.0)


def read_metrics(values: Mapping[str, Any]) -> dict[str, Score]:
    """Metrics such as ``acc,none`` with their ``acc_stderr,none``."""
    metrics: dict[str, Score] = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        reach = _Z * error if isinstance(error, int | float) else 0.0
        ours = _OUR_NAMES.get(metric, metric)
        if ours not in metrics:
            metrics[ours] = Score(float(value), float(value - reach), float(value + reach))
    return metrics
