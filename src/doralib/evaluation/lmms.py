"""lmms-eval, which asks about pictures and videos, in an environment of its own: started, and its results read."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DoraError, UsageError
from ..files import read_json
from .harness import read_metrics
from .metrics import Score
from .result import TaskResult
from .task import Task

# lmms-eval's own class for each kind of transformers' models; the general one for the others
_CLASSES = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), "llava_hf"),
    **{name: name for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics2")},
    "internvl": "internvl_hf",
    "mllama": "llama_vision",
}
_GENERAL = "huggingface"
_ASK_VERSION = "import importlib.metadata as m; print(m.version('lmms_eval'))"
# those of this environment would be found by the other's Python too
_OUR_OWN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_TAIL = 12


class LmmsTask(Task):
    """A task of lmms-eval by its name, as results are kept for it."""

    kind: Literal["lmms"] = "lmms"
    prompt: Literal[""] = ""


@dataclass(frozen=True)
class LmmsEval:
    """An environment with lmms-eval."""

    python: str
    """Its Python."""
    version: str

    def run(self, task: str, model: str, folder: Path, *, batch_size: int, limit: int | None, seed: int) -> TaskResult:
        """The result of a task, or of all tasks of a group.

        Args:
            model: Its ``--model`` and ``--model_args``, ``NAME,KEY=VALUE,...``.
            folder: Where it writes, one for each task; what it says is in ``lmms.log``.

        Raises:
            DoraError: if it fails, with the end of what it said.
        """
        name, _, args = model.partition(",")
        command = [self.python, "-m", "lmms_eval", "--model", name, "--model_args", args, "--tasks", task]
        command += ["--batch_size", str(batch_size), "--seed", str(seed), "--output_path", str(folder)]
        command += [] if limit is None else ["--limit", str(limit)]
        folder.mkdir(parents=True, exist_ok=True)
        log, before = folder / "lmms.log", _list_results(folder)
        with log.open("wb") as file:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_make_environment(),
                check=False,
            ).returncode
        found = [file for file, state in _list_results(folder).items() if before.get(file) != state]
        if status or not found:
            said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
            why = f"ended with status {status}" if status else "wrote no results"
            raise DoraError(
                "\n".join([f"task {task}: lmms-eval {why}; the end of {log}:", *(f"  {line}" for line in said)])
            )
        return _read_results(task, found[-1])


def find_lmms(python: str | None) -> LmmsEval:
    """The environment that a Python belongs to.

    Raises:
        UsageError: if none is named, or lmms-eval is not installed there.
    """
    advice = "python -m venv lmms && lmms/bin/pip install lmms-eval, then --harness-python lmms/bin/python"
    if python is None:
        raise UsageError(f"--harness lmms:... needs lmms-eval in an environment of its own: {advice}")
    try:
        asked = [str(Path(python).expanduser()), "-c", _ASK_VERSION]
        found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=120, env=_make_environment())
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--harness-python: {python} cannot be run: {error}") from None
    if found.returncode:
        last = (found.stderr.strip().splitlines() or [f"status {found.returncode}"])[-1]
        raise UsageError(f"--harness-python: {python} has no lmms-eval ({last}); {python} -m pip install lmms-eval")
    return LmmsEval(asked[0], found.stdout.strip())


def name_model(given: str | None, model: str, config: Mapping[str, Any]) -> str:
    """lmms-eval's words for a model: its class, by the model's config.json if none is given, and its place.

    Raises:
        UsageError: if the place has a character that divides lmms-eval's words.
    """
    if set(model) & set(",='\"{}[]"):
        raise UsageError(f"--harness lmms:... cannot say {model!r} to lmms-eval; choose a place without , = and quotes")
    name, comma, more = (given or _CLASSES.get(str(config.get("model_type")), _GENERAL)).partition(",")
    return f"{name},pretrained={model}{comma}{more}"


def _make_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OUR_OWN}


def _list_results(folder: Path) -> dict[Path, int]:
    """Its files of results, each with when it was written."""
    return {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("*_results.json"))}


def _read_results(task: str, file: Path) -> TaskResult:
    try:
        found = read_json(file)
        results, counts = found["results"], found["n-samples"]
        metrics: dict[str, Score] = {}
        for name, values in results.items():
            own = read_metrics(values)
            metrics |= own if name == task else {f"{name} {metric}": score for metric, score in own.items()}
        count = sum(int(each.get("effective", 0)) for each in counts.values())
    except (KeyError, TypeError, ValueError, AttributeError, json.JSONDecodeError) as error:
        raise DoraError(f"task {task}: {file} is not as lmms-eval writes its results: {error!r}") from None
    return TaskResult(task, "harness", count, metrics, None, (), 0, 0.0)
