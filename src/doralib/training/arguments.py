"""The `training` group of a recipe: fields of `transformers.TrainingArguments`, checked before anything is loaded."""

import dataclasses
import importlib.util
import math
import os
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..errors import UsageError
from ..recipe import Recipe
from .fields import DEFAULTS, EXTRA, OWNED, find_unknown
from .optimizers import PRODIGY, check_prodigy

OBJECTIVE_DEFAULTS: Mapping[str, Any] = {"learning_rate": 1e-5, "bf16": False, "gradient_checkpointing": False}
"""Where an objective of TRL differs: its rate is ten times TRL's 1e-6, which is for training in full."""

_REFERENCE = "the reference is the same model with its adapter off"
_VLLM = "vLLM does not take an adapter of doralib while it trains"
_OWNED_OF_OBJECTIVES = {
    **dict.fromkeys(("max_length", "truncation_mode"), "it is data.max_length; a row that is longer is left out"),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "the recipe's model group loads the model"),
    **dict.fromkeys(("dataset_num_proc", "padding_free", "pad_token", "padding_value"), "doralib makes the tokens"),
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model"), _REFERENCE),
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), _REFERENCE),
    "cast_lm_head_to_fp32": "it changes the model itself; set model.dtype: float32",
    **dict.fromkeys(("log_completions", "log_multimodal", "log_unique_prompts"), "the report shows samples"),
    **dict.fromkeys(("num_completions_to_print", "log_completions_hub_repo"), "the report shows samples"),
    **dict.fromkeys(("generate_during_eval", "is_encoder_decoder"), "the report shows samples"),
    "label_smoothing_factor": "only objective.kind sft has it; dpo has label_smoothing",
    "max_tool_calling_iterations": "tools are not offered to the model",
    "use_transformers_paged": "it is use_transformers_continuous_batching now",
}
_OWN_ORDER = ("kto", "grpo")
"""Objectives with an order of rows that they need: KTO's pairs of neighbors, GRPO's groups of answers."""

_OLD_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def check_arguments(recipe: Recipe) -> dict[str, Any]:
    """The `training` group with numbers for numbers that YAML read as text, such as 1e-3.

    Raises:
        UsageError: naming every key that is unknown, ours or of the wrong kind, and every combination that cannot be.
    """
    kind = recipe.objective.kind
    cls = find_class(kind)
    hints, owned = typing.get_type_hints(cls), list_owned(kind)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    problems, values = find_unknown(recipe.training, known, owned, cls.__name__), {}
    for key, value in recipe.training.items():
        if key in owned or key not in known | EXTRA.keys():
            continue
        try:
            # YAML reads a bare no as false
            plain = "no" if value is False and key.endswith("_strategy") else value
            values[key] = _of_kind(plain, {**hints, **EXTRA}[key])
        except ValidationError as error:
            problems.append(f"training.{key}: {error.errors()[0]['msg'].lower()}, got {value!r}")
    problems += _out_of_range(values)
    problems += _impossible(values, kind, has_validation=recipe.data.validation is not None)
    if problems:
        raise UsageError("\n".join(problems))
    return values


def find_class(kind: str) -> type[TrainingArguments]:
    """The arguments that an objective takes.

    Raises:
        UsageError: if TRL is not installed, and this is one of its objectives.
    """
    if kind == "sft":
        return TrainingArguments
    if importlib.util.find_spec("trl") is None:
        raise UsageError(f"objective.kind {kind} is trained by TRL, which is not installed: pip install 'doralib[rl]'")
    # an optional extra, and a second to import
    from .objectives import ARGUMENTS  # noqa: PLC0415

    return ARGUMENTS[kind]


def list_owned(kind: str) -> dict[str, str]:
    """The fields that a recipe of this objective may not set, and what to do instead."""
    if kind == "sft":
        return OWNED
    names = [field.name for field in dataclasses.fields(find_class(kind))]
    own = {**_OWNED_OF_OBJECTIVES, **dict.fromkeys((name for name in names if "vllm" in name), _VLLM)}
    if kind in _OWN_ORDER:
        own["train_sampling_strategy"] = f"{kind} has an order of its own"
    if kind == "orpo":
        own["max_completion_length"] = own["max_length"]
    return {**OWNED, **{name: why for name, why in own.items() if name in names}}


def has_own_order(kind: str) -> bool:
    """Whether an objective decides the order of the rows itself."""
    return kind in _OWN_ORDER


def make_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for checkpoints in ``folder``.

    Raises:
        UsageError: as `check_arguments`, and for what TrainingArguments itself refuses.
    """
    given = check_arguments(recipe)
    if given.get("fp16") and not torch.cuda.is_available():
        raise UsageError("training.fp16 needs a GPU, and there is none here; bf16: true runs on a CPU")
    patient = given.pop("early_stopping_patience", None) is not None
    given.pop("projector_learning_rate", None)
    check_prodigy(given)
    if given.get("optim") == PRODIGY:
        # the Trainer gets it beside its arguments
        del given["optim"]
    if isinstance(given.get("report_to"), str):
        given["report_to"] = [given["report_to"]]
    kind = recipe.objective.kind
    cls = find_class(kind)
    fields = {field.name for field in dataclasses.fields(cls)}
    given = {(_OLD_NAMES[key] if _OLD_NAMES.get(key) in fields else key): value for key, value in given.items()}
    values = {
        **DEFAULTS,
        **({} if kind == "sft" else OBJECTIVE_DEFAULTS),
        **_evaluation(given, recipe, patient),
        **given,
    }
    cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    values = {"use_cpu": cpu, "dataloader_pin_memory": not cpu, **values}
    _check_strategy(recipe)
    own = {"output_dir": str(folder), "seed": recipe.seed, "data_seed": recipe.seed, "disable_tqdm": True}
    own |= {"remove_unused_columns": False, "label_names": ["labels"], "logging_nan_inf_filter": False}
    own |= {"train_sampling_strategy": "sequential"} if has_own_order(kind) else {}
    own |= {"max_length": recipe.data.max_length} if "max_length" in fields else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            made = cls(**{**values, **own})
        for reporter in get_reporting_integration_callbacks(made.report_to):
            reporter()  # says what is not installed
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError(f"training: {error}") from None
    if made.fsdp:
        raise UsageError("training.fsdp: say it as distributed.strategy: fsdp2 (docs/distributed.md)")
    return made


def _check_strategy(recipe: Recipe) -> None:
    """Check that several processes can share a run as the recipe says.

    Raises:
        UsageError: for DeepSpeed: it keeps gradients and weights where no part of a run would find them.
    """
    strategy, processes = recipe.distributed.strategy, int(os.environ.get("WORLD_SIZE", "1"))
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true")
    if processes > 1 and (strategy in ("zero2", "zero3") or launched):
        raise UsageError(
            "distributed.strategy: doralib train does not run under DeepSpeed yet; fsdp2 shares out the same weights, "
            "gradients and optimizer (docs/distributed.md)"
        )


def _evaluation(given: Mapping[str, Any], recipe: Recipe, patient: bool) -> dict[str, Any]:
    """Validate as often as we save, so that the best of the saved can be kept."""
    if recipe.data.validation is None:
        return {}
    steps = given.get("eval_steps", given.get("save_steps", DEFAULTS["save_steps"]))
    strategy = given.get("eval_strategy", given.get("save_strategy", "steps"))
    if strategy == "best":
        strategy = "steps"
    pair = {"eval_strategy": strategy, "eval_steps": steps}
    if "save_steps" not in given:
        pair |= {"save_steps": steps, "save_strategy": strategy if strategy != "no" else "steps"}
    return {**pair, **({"load_best_model_at_end": True} if patient else {})}


_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit", "early_stopping_patience"), 1),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "adam_epsilon", "dataloader_num_workers"), 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), 0),
}
_ABOVE_0 = ("learning_rate", "projector_learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
# no counter of torch or of a library below it holds more
_TOO_LARGE = 2**31
_BELOW_1 = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
# what an evaluation measures besides its own speed
_METRICS = (None, "loss", "eval_loss")


def _out_of_range(values: Mapping[str, Any]) -> list[str]:
    """Values that TrainingArguments takes and the run would fail at, or do nothing with."""
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    choices = {field.name: field.metadata.get("choices") or () for field in dataclasses.fields(TrainingArguments)}
    problems = [
        f"training.{key} must be one of {', '.join(choices[key])}, got {value!r}"
        for key, value in values.items()
        if choices.get(key) and value not in (None, *choices[key])
    ]
    problems += [
        f"training.{key} must be at least {least}, got {numbers[key]:g}"
        for key, least in _LEAST.items()
        if key in numbers and not numbers[key] >= least
    ]
    problems += [
        f"training.{key} must be above 0, got {numbers[key]:g}"
        for key in _ABOVE_0
        if key in numbers and not 0 < numbers[key] < math.inf
    ]
    problems += [
        f"training.{key} must be below 1, got {numbers[key]:g}" for key in _BELOW_1 if numbers.get(key, 0) >= 1
    ]
    problems += [
        f"training.{key} must be below {_TOO_LARGE:,}, got {value:.6g}"
        for key, value in numbers.items()
        if not abs(value) < _TOO_LARGE
    ]
    if (steps := numbers.get("max_steps", -1)) < 1 and steps != -1:
        problems.append(f"training.max_steps must be at least 1 (or -1: num_train_epochs decides), got {steps}")
    return problems


def _impossible(values: Mapping[str, Any], kind: str, *, has_validation: bool) -> list[str]:
    problems = []
    if not has_validation:
        measuring = ("early_stopping_patience", "load_best_model_at_end", "eval_on_start")
        needing = [key for key in measuring if values.get(key)]
        needing += ["eval_strategy"] if values.get("eval_strategy", "no") != "no" else []
        problems += [f"training.{key} needs rows to measure on: set data.validation" for key in needing]
    wants = values.get("report_to") or []
    if "tensorboard" in wants and importlib.util.find_spec("tensorboard") is None:
        problems.append("training.report_to: tensorboard is not installed; pip install 'doralib[train]'")
    if (metric := values.get("metric_for_best_model")) not in _METRICS and kind == "sft":
        problems.append(f"training.metric_for_best_model: an evaluation measures the loss alone, not {metric!r}")
    return problems


def _of_kind(value: Any, kind: Any) -> Any:
    """The value, or the number it spells.

    Raises:
        ValidationError: if it is of another kind than the field.
    """
    if value is None:
        return value
    read = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    return read if isinstance(value, str) and isinstance(read, (int, float)) else value
