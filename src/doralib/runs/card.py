"""The model card of a run, README.md: what was trained on what, its scores, how to load it. The hub shows it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..disk import replacing
from .record import METHODS, RunRecord, read_metric, read_run
from .use import diffusers_code, generate_command, peft_code

_PIPELINES = {
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
}
"""The hub's word for what a model of a class does."""
_TASK_TYPES = {"classification": "text-classification", "generation": "text-generation"}
_SETTINGS = ("method", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights")
_TRAINING = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type")


def write_card(run: Path) -> Path:
    """Write README.md into a run folder, beside its adapter or into the folder of its model; returns the path.

    What a run has no figures for is left out. Names of files are given without the folders that they lie in.

    Raises:
        DoraError: if there is no such folder.
    """
    record = read_run(run)
    path = (run / "model" if _is_whole(record) else run) / "README.md"
    with replacing(path) as part:
        part.write_text(make_card(record), encoding="utf-8")
    return path


def make_card(record: RunRecord, place: str | None = None, base: str | None = None) -> str:
    """The text of the card.

    Args:
        place: The run's name on the hub, by which it is loaded there.
        base: The base's name on the hub, where it is not the one that the run says.
    """
    if base:
        record = replace(record, summary={**record.summary, "base_model": base})
    name, data = place or _name(record), _describe(record, whole=_is_whole(record))
    parts = ["---\n" + data.to_yaml() + "\n---", f"# {name.rpartition('/')[2]}", _sentence(record), _scores(record)]
    parts += [_use(record, name, whole=_is_whole(record), on_hub=place is not None), _settings(record)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _is_whole(record: RunRecord) -> bool:
    return record.summary.get("method") == "full"


def _describe(record: RunRecord, *, whole: bool) -> ModelCardData:
    base, draws, found = _base(record), record.unit == "pictures", []
    for task, result in record.results["after"].items():
        for metric in _mapping(result.get("metrics")):
            score = read_metric(result, metric)
            if score is not None:
                kind = _TASK_TYPES.get(str(result.get("kind")), "text-generation")
                found.append(EvalResult(kind, "custom", task, metric, score.value))
    return ModelCardData(
        base_model=base or None,
        base_model_relation="finetune" if whole else "adapter",
        library_name="diffusers" if draws else "transformers" if whole else "peft",
        pipeline_tag="text-to-image"
        if draws
        else _PIPELINES.get(str(record.summary.get("auto_class")), "text-generation"),
        tags=["doralib", str(record.summary.get("method") or "dora")],
        model_name=_name(record) if found else None,
        eval_results=found or None,
    )


def _name(record: RunRecord) -> str:
    return record.path.resolve().name


def _base(record: RunRecord) -> str:
    """The base's hub name, or the last part of its path: a folder of this machine tells a reader nothing."""
    base = str(record.summary.get("base_model") or "")
    return Path(base).name if Path(base).is_absolute() or Path(base).exists() else base


def _sentence(record: RunRecord) -> str:
    """What was trained on what, in two lines."""
    s, method = record.summary, str(record.summary.get("method", ""))
    whole = {key: value for key, value in s.items() if isinstance(value, int)}
    adapter = f"A {METHODS.get(method, 'trained')} adapter for {_base(record)}"
    what = f"{_base(record)}, trained in full" if method == "full" else adapter
    train = str(_mapping(record.config.get("data")).get("train", ""))
    on = f", trained on {Path(train).name}" if train else ""
    told = f"{what}{on}."
    if {"train_rows", "steps"} <= whole.keys():
        told += f" It took {whole['steps']:,} steps on {whole['train_rows']:,} rows."
    if trained := whole.get("trainable_parameters"):
        share = f", {trained / whole['total_parameters']:.2%} of all" if whole.get("total_parameters") else ""
        told += f" {trained:,} parameters were trained{share}."
    return told


def _scores(record: RunRecord) -> str:
    """The metrics before and after, with their intervals."""
    lines = []
    for task, result in record.results["after"].items():
        for metric in _mapping(result.get("metrics")):
            after, before = read_metric(result, metric), read_metric(record.results["before"].get(task, {}), metric)
            if after is not None:
                shown = [f"{m.value:.3f} ({m.low:.3f} to {m.high:.3f})" if m else "" for m in (before, after)]
                lines.append(f"| {task} | {metric} | {result.get('n', '')} | {shown[0]} | {shown[1]} |")
    if not lines:
        return ""
    head = "| task | metric | examples | before | after |\n|---|---|---:|---:|---:|"
    return "\n".join(["## Scores\n", head, *lines, "\nIn brackets: 95 % bootstrap intervals."])


def _use(record: RunRecord, place: str, *, whole: bool, on_hub: bool) -> str:
    # what is on the hub names its base there
    named = "" if on_hub else f" --base {_base(record)}"
    if whole:
        auto = record.summary.get("auto_class", "AutoModelForCausalLM")
        code = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{place}")'
        return f"## Use\n\n```python\n{code}\n```"
    if record.unit == "pictures":
        return f"""## Use

With diffusers:

```python
{diffusers_code(replace(record, summary={**record.summary, "base_model": _base(record)}), place)}
```

With doralib, which also merges it into a pipeline:

```console
{generate_command(record, place)}{named}
doralib merge {place}{named} --out merged
```"""
    asked, new_line = generate_command(record, place), "\n"
    auto = str(record.summary.get("auto_class", "AutoModelForCausalLM"))
    served = "\nvllm serve merged" if auto == "AutoModelForCausalLM" else ""
    peft = auto.replace("AutoModel", "AutoPeftModel")
    code = f'from peft import {peft}\n\nmodel = {peft}.from_pretrained("{place}")'
    if auto not in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        code = peft_code(replace(record, summary={**record.summary, "base_model": _base(record)}), place)
    loads = "every server" if served else "transformers"
    return f"""## Use

With PEFT:

```python
{code}
```

With doralib, which also merges it into a model that {loads} loads:

```console
{f"{asked}{named}{new_line}" if asked else ""}doralib merge {place}{named} --out merged{served}
```"""


def _settings(record: RunRecord) -> str:
    """The settings that a reader asks for first; config.yaml has all."""
    lines = [f"- {key}: {_text(value)}" for key, value in _chosen(record).items() if value not in (None, [], "")]
    versions = _mapping(record.environment.get("packages")).items()
    used = ", ".join(f"{name} {version}" for name, version in versions if version)
    return "\n".join(filter(None, ["## Settings\n", *lines, f"\nMade with {used}." if used else ""])) if lines else ""


def _chosen(record: RunRecord) -> dict[str, Any]:
    groups = {"adapter": _SETTINGS, "training": _TRAINING}
    return {key: _mapping(record.config.get(group)).get(key) for group, keys in groups.items() for key in keys} | {
        "seed": record.config.get("seed")
    }


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else " ".join(str(value).split())


def _mapping(value: Any) -> dict[str, Any]:
    """What should be a mapping, empty where a damaged file has something else."""
    return value if isinstance(value, dict) else {}
