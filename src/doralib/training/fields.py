"""The names in a recipe's `training` group, known without an import of transformers, which takes seconds."""

import ast
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError, did_you_mean
from ..recipe import Recipe
from ..validation import in_our_words

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.05,
    "optim": "adamw_torch",
    "logging_steps": 0.02,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 3,
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
    "log_level": "error",
}
"""Where ours differ from the Trainer's; steps below 1 are shares of the whole run."""

EXTRA: Mapping[str, Any] = {"early_stopping_patience": int, "projector_learning_rate": float}
"""Keys that are ours and no field of TrainingArguments: stop after so many evaluations without a better loss; the
learning rate of what is trained whole (adapter.modules_to_save), such as a projector."""

OWNED = {
    "output_dir": "a run's folder is the recipe's `out`",
    "seed": "it is the recipe's own `seed`",
    "data_seed": "it follows from the recipe's `seed`",
    "resume_from_checkpoint": "use --resume, which takes the newest whole checkpoint",
    "ignore_data_skip": "a resumed run would see other rows",
    "save_only_model": "a run could not be resumed",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM save a checkpoint already",
    "remove_unused_columns": "the rows hold tokens, labels and lengths and nothing else",
    "length_column_name": "the rows' lengths are known",
    "label_names": "they are `labels`",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "disable_tqdm": "the progress bar shows in a terminal, lines elsewhere",
    "do_train": "train trains",
    "do_eval": "set data.validation",
    "do_predict": "use `doralib eval` or the recipe's `eval`",
    "prediction_loss_only": "use the recipe's `eval` for more than the loss",
    "use_liger_kernel": "logits are computed only where there are labels already",
    "auto_find_batch_size": "the steps, and with them the learning rates, would change during the run",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token"), "upload the run's folder when you are content"),
    **dict.fromkeys(
        ("hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"), "nothing is uploaded during training"
    ),
}
"""Fields of TrainingArguments that a recipe may not set, and what to do instead."""


def list_fields() -> set[str]:
    """The names of the installed `TrainingArguments`, read from its source; empty where there is none to read."""
    found = importlib.util.find_spec("transformers")
    source = Path(found.origin).with_name("training_args.py") if found is not None and found.origin else None
    if source is None or not source.is_file():
        return set()
    classes = [node for node in ast.parse(source.read_bytes()).body if isinstance(node, ast.ClassDef)]
    body = next((each.body for each in classes if each.name == "TrainingArguments"), [])
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {
        node.target.id for node in fields if isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    }


def find_unfit(training: Mapping[Any, Any]) -> list[UsageError]:
    """An error for each key that no recipe of kind sft may set; none where transformers is not installed."""
    fields = list_fields()
    return [UsageError(line) for line in find_unknown({str(key): None for key in training}, fields)] if fields else []


def find_unknown(
    training: Mapping[str, Any],
    fields: Collection[str],
    owned: Mapping[str, str] = OWNED,
    title: str = "TrainingArguments",
) -> list[str]:
    """A line for each key that a recipe may not set (`owned`, with the reason), or that is none of these fields."""
    known = set(fields) - owned.keys() | EXTRA.keys()
    problems = []
    for key in training:
        if key in owned:
            problems.append(f"training.{key} cannot be set: {owned[key]}")
        elif key not in known:
            hint = in_our_words(key, known, Recipe.model_fields) or did_you_mean(key, known)
            problems.append(f"training.{key}: {title} has no such field{hint}")
    return problems
