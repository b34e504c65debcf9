"""What is wrong with settings, in words for the person who wrote them; pydantic's own words are for programmers."""

import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import did_you_mean, nearest

_KINDS = {
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a group of settings",
    "model_type": "a group of settings",
    "model_attributes_type": "a group of settings",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
}


ELSEWHERE = {
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "adapter.r"),
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    **dict.fromkeys(("lora_target_modules", "lora_target_linear", "lora_attn_modules"), "adapter.target_modules"),
    **dict.fromkeys(("use_dora", "peft_use_dora"), "adapter.method"),
    **dict.fromkeys(("base_model", "model_name_or_path", "checkpoint_dir"), "model.path"),
    **dict.fromkeys(("torch_dtype", "precision"), "model.dtype"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantize"), "model.quantization"),
    **dict.fromkeys(("sequence_len", "max_seq_length", "max_seq_len", "cutoff_len"), "data.max_length"),
    **dict.fromkeys(("dataset", "datasets"), "data.train"),
    "val_set_size": "data.validation",
    "train_on_inputs": "data.loss_on",
    **dict.fromkeys(("output_dir", "out_dir"), "out"),
    **dict.fromkeys(("num_epochs", "epochs"), "training.num_train_epochs"),
    **dict.fromkeys(("micro_batch_size", "batch_size"), "training.per_device_train_batch_size"),
    "lr": "training.learning_rate",
    "optimizer": "training.optim",
    **dict.fromkeys(("lr_scheduler", "scheduler"), "training.lr_scheduler_type"),
    "group_by_length": "training.train_sampling_strategy",
}
"""What PEFT, axolotl, torchtune, litgpt and older Trainers call a setting, and where it is in a recipe."""


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """All that is wrong with one value's settings, a line each."""
    grouped: dict[tuple[str, ...], list[Any]] = {}
    for problem in error.errors():
        grouped.setdefault(_find_place(cls, [str(part) for part in problem["loc"]]), []).append(problem)
    lines = [f"{cls.__name__}: {len(grouped)} problem{'s' * (len(grouped) > 1)}"]
    return "\n".join(lines + [f"  {_explain_setting(cls, path, found)}" for path, found in grouped.items()])


def _explain_setting(cls: type[BaseModel], path: tuple[str, ...], problems: list[Any]) -> str:
    where = ".".join(path)
    if problems[0]["type"] == "extra_forbidden":
        return f"{where}: there is no such setting{_find_hint(cls, path)}"
    if problems[0]["type"] == "missing":
        return f"{where}: is missing"
    got = problems[0]["input"]
    # of a setting that may be of two kinds, the one whose kind was right says more
    told = [problem for problem in problems if problem["type"] not in _KINDS]
    if told:
        text = told[0]["msg"].removeprefix("Value error, ")
        text = text[0].lower() + text[1:]
    else:
        text = f"should be {' or '.join(dict.fromkeys(_KINDS[problem['type']] for problem in problems))}"
        if inside := _list_fields(cls, path):
            text += f" ({', '.join(inside[:3])} ...)"
        if isinstance(got, str) and any(problem["type"] in ("tuple_type", "list_type") for problem in problems):
            text += f", such as [{got}]"
    shown = "" if isinstance(got, dict) or not where or repr(got) in text else f", got {got!r}"
    return f"{where or 'together'}: {text}{shown}"


def _find_hint(cls: type[BaseModel], path: tuple[str, ...]) -> str:
    """What an unknown key may have meant."""
    name, known = path[-1], _list_fields(cls, path[:-1])
    if hint := in_our_words(name, known, cls.model_fields) or did_you_mean(name, known):
        return hint
    listed = f"; known: {', '.join(sorted(known))}"
    if len(path) > 1:
        return listed
    inside = {field: f"{group}.{field}" for group in known for field in _list_fields(cls, (group,))}
    if homes := nearest(name, inside, count=1):
        return f"; did you mean {inside[homes[0]]!r}?"
    trainer = f"; a setting of the Trainer is written training.{name}" if "training" in known else ""
    return listed + trainer


def in_our_words(name: str, beside: Collection[str], groups: Collection[str]) -> str:
    """Where the setting of another tool is, as the end of a message; empty for a name that none of them has.

    Args:
        beside: The settings that could stand where the name does.
        groups: Those of the whole recipe.
    """
    place = ELSEWHERE.get(name, "")
    group, _, field = place.rpartition(".")
    if field in beside:
        return f"; here it is {field!r}"
    return f"; here it is {place!r}" if field and (group or field) in groups else ""


def _find_place(cls: type[BaseModel], path: list[str]) -> tuple[str, ...]:
    """The path of the setting; pydantic adds the kind that it tried where there are several."""
    for i, part in enumerate(path):
        field = cls.model_fields.get(part)
        if field is None:
            break
        if (group := _find_group(field.annotation)) is not None:
            cls = group
            continue
        several = _count_kinds(field.annotation) > 1
        return (*path[: i + 1], *(part for part in path[i + 1 + several :] if "[" not in part))
    return tuple(path)


def _count_kinds(annotation: Any) -> int:
    """Of how many kinds a setting may be, without null."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return 1
    return sum(each is not type(None) for each in typing.get_args(annotation))


def _find_group(annotation: Any) -> type[BaseModel] | None:
    """The group of settings that a setting is, or may be beside null."""
    if _count_kinds(annotation) == 1:
        annotation = next((each for each in typing.get_args(annotation) if each is not type(None)), annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _list_fields(cls: type[BaseModel], path: Iterable[str]) -> list[str]:
    for part in path:
        fields: Mapping[str, Any] = cls.model_fields
        inner = _find_group(fields[part].annotation) if part in fields else None
        if inner is None:
            return []
        cls = inner
    return list(cls.model_fields)
