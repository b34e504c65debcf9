"""What a run folder holds, as values; a missing or damaged file becomes a note, not an error."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ..documents import decode_json
from ..errors import DoraError
from ..files import read_json, read_yaml
from ..recipe import PROMPT_FILE
from .folder import RunFolder

Values = dict[str, Any]

METHODS = {"dora": "DoRA", "lora": "LoRA", "vera": "VeRA", "dvora": "DVoRA", "full": "full fine-tuning"}
"""Names of methods for a person."""

OBJECTIVE_CURVES = {
    "reward": "Reward",
    "rewards/margins": "Margin: reward of good answers over bad ones",
    "rewards/accuracies": "Pairs in which the good answer has the higher reward",
    "kl": "KL divergence from the model without the adapter",
    "completions/mean_length": "Tokens of an answer",
}
"""What an objective measures besides the loss, by its key in metrics.jsonl, with a title."""


@dataclass(frozen=True)
class RunRecord:
    """The files of one run, each empty where it could not be read."""

    path: Path
    config: Values
    summary: Values
    results: dict[str, dict[str, Values]]
    """``before`` and ``after`` to task to TaskResult."""
    changes: dict[str, Values]
    """Task to metric to the mean change of its rows, with its interval."""
    samples: list[Values]
    survey: Values
    """What the rows are like; older runs and other kinds of data have none."""
    environment: Values
    form: Values
    """How the model is asked; empty for what gives no text."""
    train: list[Values]
    """The lines of metrics.jsonl of kind train, by step; of a step written twice the later one."""
    evals: list[Values]
    notes: tuple[str, ...]
    """What is missing or damaged, a sentence each."""

    @property
    def unit(self) -> str:
        """What the run's rows are counted in: tokens, or pictures."""
        return str(self.summary.get("unit") or "tokens")


@dataclass(frozen=True)
class MetricValue:
    """A metric of one task, with its 95 % interval."""

    value: float
    low: float
    high: float


class _Form(BaseModel):
    """What pages read of a file's values, which may hold more."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Summary(_Form):
    base_model: str | None = None
    method: str | None = None
    status: str | None = None
    seconds: float | None = None
    steps: int | None = None
    train_rows: int | None = None
    dropped_rows: dict[str, Any] | None = None


class _Evaluation(_Form):
    tasks: list[str] = []


class _Config(_Form):
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    adapter: dict[str, Any] | None = None
    training: dict[str, Any] = {}
    eval: _Evaluation = _Evaluation()


class _Prompt(_Form):
    style: str | None = None
    fields: list[str] | None = None


class _Confusion(_Form):
    labels: list[str]
    counts: list[list[int]]

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        if {len(self.counts), *map(len, self.counts)} - {len(self.labels)}:
            raise ValueError("it is not square")
        return self


class _Result(_Form):
    n: int | None = None
    kind: str | None = None
    metrics: dict[str, Any] = {}
    confusion: _Confusion | None = None
    wrong: list[dict[str, Any]] = []
    cut: int = 0


def read_run(run: Path) -> RunRecord:
    """Everything that can be read of a run.

    Raises:
        DoraError: if there is no such folder.
    """
    if not run.is_dir():
        raise DoraError(f"there is no run folder {run}")
    notes: list[str] = []
    folder = RunFolder(run)
    metrics = _read_metrics(folder.metrics, notes)
    config = _fit(_read(folder.config, dict, notes, read_yaml), _Config, folder.config.name, notes)
    results = _read(folder.results, dict, notes) if folder.results.exists() or _is_scored(config) else {}
    samples = _read(folder.samples, list, notes, partial(read_json, root=list))
    return RunRecord(
        path=run,
        config=config,
        summary=_fit(_read(folder.summary, dict, notes), _Summary, folder.summary.name, notes),
        results={
            when: {
                name: _fit(result, _Result, f"{folder.results.name}, {name}", notes)
                for name, result in _tasks(results.get(when)).items()
            }
            for when in ("before", "after")
        },
        changes=_tasks(results.get("change")),
        samples=[sample for sample in samples if isinstance(sample, dict)],
        survey=_read(folder.survey, dict, notes) if folder.survey.exists() else {},
        environment=_read(folder.environment, dict, notes),
        form=_read_form(folder, notes),
        train=_by_step(metrics, "train"),
        evals=_by_step(metrics, "eval"),
        notes=tuple(notes),
    )


def _is_scored(config: Values) -> bool:
    """Whether results belong to the run: tasks were asked for, or a head gives labels, or nobody knows."""
    evaluation, model = config.get("eval"), config.get("model")
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    kind = model.get("kind") if isinstance(model, dict) else None
    return not config or bool(tasks) or kind in ("classify", "tokens", "speech", "audio-class")


def _read_form(folder: RunFolder, notes: list[str]) -> Values:
    file = next(
        (each / PROMPT_FILE for each in (folder.path, folder.path / "model") if (each / PROMPT_FILE).exists()), None
    )
    return _fit(_read(file, dict, notes), _Prompt, file.name, notes) if file else {}


def _fit(values: Values, form: type[_Form], name: str, notes: list[str]) -> Values:
    """The values without those that are not what pages read there, which are noted."""
    try:
        form.model_validate(values)
    except ValidationError as error:
        wrong = {str(each["loc"][0]) for each in error.errors()}
        notes.append(f"{name}: {', '.join(sorted(wrong))} is damaged and left out.")
        return {key: value for key, value in values.items() if key not in wrong}
    return values


def is_series(sample: Values) -> bool:
    """Whether a sample is a series and not a text."""
    given = sample.get("given")
    return isinstance(given, dict) and "past" in given


def numbers(lines: list[Values], name: str) -> list[tuple[float, float]]:
    """(step, value) of every line that has a number by this name."""
    return [(float(line["step"]), float(line[name])) for line in lines if isinstance(line.get(name), int | float)]


def read_metric(result: Values, name: str) -> MetricValue | None:
    """A metric of a TaskResult, if it is there and a number."""
    metrics = result.get("metrics")
    score = metrics.get(name) if isinstance(metrics, dict) else None
    if not isinstance(score, dict):
        return None
    value, low, high = (score.get(key, score.get("value")) for key in ("value", "low", "high"))
    if not (isinstance(value, int | float) and isinstance(low, int | float) and isinstance(high, int | float)):
        return None
    return MetricValue(float(value), float(low), float(high))


def _read(path: Path, kind: type[Any], notes: list[str], read: Callable[[Path], Any] = read_json) -> Any:
    problem = "is missing"
    if path.exists():
        try:
            value = read(path)
            if isinstance(value, kind):
                return value
            problem = "does not hold what it should"
        except (DoraError, OSError) as error:
            problem = f"cannot be read: {str(error).splitlines()[0]}"
    notes.append(f"{path.name} {problem}.")
    return kind()


def _read_metrics(path: Path, notes: list[str]) -> list[Values]:
    """The lines that are whole; a run that was killed leaves half a line at the end."""
    if not path.exists():
        notes.append(f"{path.name} is missing: there are no curves.")
        return []
    lines, bad = [], 0
    for text in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        try:
            line = decode_json(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int | float):
            lines.append(line)
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} damaged line{'s' * (bad > 1)} left out.")
    return lines


def _by_step(lines: list[Values], kind: str) -> list[Values]:
    latest = {line["step"]: line for line in lines if line.get("kind") == kind}
    return [latest[step] for step in sorted(latest)]


def _tasks(value: Any) -> dict[str, Values]:
    if not isinstance(value, dict):
        return {}
    return {str(name): result for name, result in value.items() if isinstance(result, dict)}
