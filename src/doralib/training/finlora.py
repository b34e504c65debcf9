"""FinLoRA's file of runs, `finetune_configs.json`: one of its entries as a recipe.

FinLoRA (https://github.com/Open-Finance-Lab/FinLoRA) lays an entry over a template and hands both to axolotl. The
template is what the packaged recipes `finlora/...` share.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import DoraConfig
from ..errors import DoraError, UsageError, collecting, did_you_mean, list_some, raise_all
from ..files import read_json
from ..recipe import Recipe
from ..validation import ELSEWHERE
from .fields import OWNED, list_fields
from .recipe_file import override, read_shared

_PLACES = {
    "base_model": "model.path",
    "dataset_path": "data.train",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "peft_use_rslora": "adapter.use_rslora",
    "learning_rate": "training.learning_rate",
    "num_epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
}
"""Where the values that FinLoRA's script reads are in a recipe."""

_BITS = {8: ("int8", "adamw_bnb_8bit"), 4: ("nf4", "paged_adamw_8bit"), None: (None, "adamw_torch_fused")}
"""quant_bits to the base's storage and the optimizer; without it an entry is one of finetune_configs_plain.json."""

_DROPPED = {
    "deepspeed": "ZeRO divides memory between GPUs and changes no number; docs/distributed.md says how to use several",
    "chat_template": "the rows are prompts and answers, and none is written as a chat",
    "special_tokens": "padding is masked, so its token changes no number",
    **dict.fromkeys(("wandb_project", "wandb_name", "wandb_watch"), "a run is reported in its own folder"),
    **dict.fromkeys(("bf16", "tf32"), "model.dtype says it"),
    "flash_attention": "model.attn_implementation says it",
    **dict.fromkeys(("model_type", "tokenizer_type"), "the model's own files say it"),
}
"""Settings of axolotl that a recipe has no place for, and why nothing is lost. The template has the first four."""

_FEDERATED = re.compile("fed|client|server")


def read_finlora(file: str | Path, name: str, overrides: list[str]) -> tuple[Recipe, list[str]]:
    """An entry of FinLoRA's file as a recipe, checked, and what was left out or differs, a line each.

    Args:
        file: `finetune_configs.json`, or another of its kind.
        name: The entry; its run is written to axolotl-output/NAME, as FinLoRA names it.
        overrides: ``key=value`` of the recipe, as for `read_recipe`.

    Raises:
        UsageError: if the file has no such entry, or listing everything in it that a recipe cannot have.
        DoraError: if the file is not JSON, or no object of entries.
    """
    entry = _find_entry(file, name)
    values, problems = read_shared("finlora"), list[DoraError]()
    values["out"] = f"axolotl-output/{name}"
    for key, place in (("base_model", "model"), ("dataset_path", "data")):
        if key not in entry:
            problems.append(UsageError(f"{key}: is missing"))
            # told now, and not once more by the recipe
            values[place][_PLACES[key].partition(".")[2]] = key
    with collecting(problems):
        values["model"]["quantization"], values["training"]["optim"] = _read_bits(entry.get("quant_bits"))
    notes = [f"{key} is left out: {_DROPPED[key]}" for key in ("deepspeed", "chat_template", "special_tokens")]
    for key, value in entry.items():
        with collecting(problems):
            notes += _lay_in(values, key, value)
    values["adapter"]["method"] = "dora" if entry.get("peft_use_dora") else "lora"
    if isinstance(train := entry.get("dataset_path"), str):
        values["data"]["train"] = _find_data(Path(file).expanduser().parent, train)
    for change in overrides:
        with collecting(problems):
            override(values, change)
    _set_evaluations(values.get("training"))
    with collecting(problems):
        recipe = Recipe(**values)
    if problems:
        raise_all([UsageError(f"{file}: {name}:"), *problems])
    return recipe, [*dict.fromkeys(notes), _compare_batches(recipe)]


def _find_entry(file: str | Path, name: str) -> Mapping[str, Any]:
    entries = read_json(file)
    if not all(isinstance(entry, dict) for entry in entries.values()):
        raise UsageError(f"{file} is no file of FinLoRA's runs: it should hold names, each with its settings")
    if name not in entries:
        names = list_some(list(entries), between=", ") or "none"
        raise UsageError(f"{file} has no run {name!r}{did_you_mean(name, entries)}\n  it has {names}")
    return entries[name]


def _lay_in(values: dict[str, Any], key: str, value: Any) -> list[str]:
    """Put a value of the entry into the recipe's; what there is to say of it.

    Raises:
        UsageError: if a recipe has no place for it.
    """
    if key in ("quant_bits", "dataset_path"):
        return []
    if key == "peft_use_dora":
        if not isinstance(value, bool):
            raise UsageError(f"{key}: should be true or false, got {value!r}")
        return []
    if key in _DROPPED:
        return [f"{key} is left out: {_DROPPED[key]}"]
    place = _PLACES.get(key) or _find_place(key)
    if _FEDERATED.search(key) and not place:
        raise UsageError(
            f"{key}: doralib does not train in a federation; take it out to train on this file's rows alone"
        )
    if not place:
        hint = did_you_mean(key, [*_PLACES, "quant_bits", "peft_use_dora"])
        raise UsageError(f"{key}: neither FinLoRA's script nor a recipe has such a setting{hint}; take it out")
    group, _, field = place.rpartition(".")
    (values[group] if group else values)[field] = value
    return [] if key in _PLACES else [f"{key} is taken as {place}; FinLoRA's own script does not read it"]


def _find_place(key: str) -> str:
    """The place of another setting, by the name that axolotl or doralib has for it; empty if there is none."""
    if key in DoraConfig.model_fields:
        return f"adapter.{key}"
    if key in list_fields() - OWNED.keys():
        return f"training.{key}"
    return "seed" if key == "seed" else ELSEWHERE.get(key, "")


def _read_bits(bits: Any) -> tuple[str | None, str]:
    if isinstance(bits, bool) or bits not in _BITS:
        raise UsageError(f"quant_bits: should be 8 or 4, or left out for a base as it is stored, got {bits!r}")
    return _BITS[bits]


def _find_data(folder: Path, source: str) -> str:
    """The data as seen from the file of runs, whose folder FinLoRA's script is started in; else as it is."""
    beside = os.path.normpath(folder / Path(source).expanduser())
    return source if Path(source).expanduser().is_file() and not Path(beside).is_file() else beside


def _set_evaluations(training: Any) -> None:
    """Four evaluations an epoch, as shares of the run."""
    epochs = training.get("num_train_epochs") if isinstance(training, dict) else None
    if isinstance(epochs, int | float) and epochs > 0.25 and training.get("eval_strategy") == "steps":
        training.setdefault("eval_steps", 1 / (4 * epochs))


def _compare_batches(recipe: Recipe) -> str:
    counts = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows, times = (recipe.training.get(key, 1) for key in counts)
    return (
        f"an optimizer step has {rows} x {times} rows on each GPU, and FinLoRA's adapters were trained on 2 to 8; "
        "multiply training.gradient_accumulation_steps for the same step on one"
    )
