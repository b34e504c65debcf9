"""Every field of PEFT's settings with a verdict: read, harmless, or refused when it is set; as of PEFT 0.21.2.

A field that changes numbers must not be passed over: the file would load, and mean another adapter.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import DoraError, UsageError, list_some, raise_problems


@dataclass(frozen=True)
class Verdicts:
    """What becomes of each field of one kind of settings."""

    title: str
    read: frozenset[str]
    """Fields whose meaning is in the adapter that is read."""
    harmless: frozenset[str]
    """Fields that change no number of a trained adapter on its base."""
    refused: Mapping[str, tuple[Any, str]]
    """The value at which a field does nothing, and what it means at any other."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Check that nothing is set which cannot be meant here.

        Raises:
            DoraError: with every such field and what it means.
        """
        problems = [
            f"{field} is {settings[field]!r}: {why}"
            for field, (idle, why) in self.refused.items()
            if settings.get(field) and settings[field] != idle
        ]
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and not re.fullmatch(_SAFE_STARTS, start.lower()):
            problems.append(
                f"init_lora_weights is {start!r}: its A and B belong to a base that PEFT changed, not to the base "
                "model; save it in PEFT with save_pretrained(path_initial_model_for_weight_conversion=...)"
            )
        if problems:
            raise DoraError("\n  ".join(["adapter: its settings say what is not read here:", *problems]))

    def describe_unknown(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """A note of the fields that PEFT did not have when this was written, as far as they are set."""
        known = self.read | self.harmless | self.refused.keys()
        unknown = sorted(field for field, value in settings.items() if field not in known and value)
        if not unknown:
            return ()
        fields = list_some(unknown, 5, ", ")
        return (f"the settings have fields that {self.title} of 0.21.2 has not, which are left aside: {fields}",)


def sort_names(settings: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The lists of names among some settings, in order.

    Raises:
        DoraError: if one holds something else than names.
    """
    fields = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
    lists = {field: settings[field] for field in fields if isinstance(settings.get(field), list | set | tuple)}
    problems = [
        f"{field} holds {each!r:.40}, which is no name"
        for field, names in lists.items()
        for each in names
        if not isinstance(each, str)
    ]
    raise_problems("the adapter's settings", problems)
    return {field: tuple(sorted(names)) for field, names in lists.items()}


# PEFT's starts that leave the base weight as it is
_SAFE_STARTS = r"true|false|gaussian|eva|orthogonal|mica"
_ANY_METHOD = frozenset(
    {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out", "runtime_config"}
)

LORA = Verdicts(
    "PEFT's LoraConfig",
    read=frozenset(
        {
            *("peft_type", "use_dora", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora"),
            *("target_modules", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern"),
            *("modules_to_save", "bias", "init_lora_weights", "layers_to_transform", "layers_pattern"),
            "trainable_token_indices",
        }
    ),
    # the megatron and tying ones say how the model was laid out, the others how A and B started or were trained
    harmless=_ANY_METHOD
    | {"megatron_config", "megatron_core", "ensure_weight_tying", "qalora_group_size", "velora_config"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"},
    refused={
        "alora_invocation_tokens": (
            None,
            "an aLoRA acts only after these tokens, so no weight holds it; serve it with PEFT",
        ),
        "invocation_string": (None, "an aLoRA acts only after this text, so no weight holds it; serve it with PEFT"),
        "lora_bias": (False, "B has a bias; merge it in PEFT (merge_and_unload), which has a place for that"),
        "layer_replication": (None, "the model has repeated layers; build and merge it in PEFT"),
        "use_qalora": (False, "A takes sums of groups of inputs; merge it in PEFT"),
        "use_bdlora": (None, "A or B is block-diagonal; merge it in PEFT"),
        "monteclora_config": (None, "A and B are drawn anew at each step; it has no one weight"),
        "arrow_config": (None, "tokens choose between several adapters, so no weight holds them; serve it with PEFT"),
        "kasa_config": (
            None,
            "PEFT cuts the base weight down for it, so it is no change of the base; merge in PEFT",
        ),
        "enable_lora": (None, "slices of fused projections are adapted in loralib's layout; merge it with that"),
        "magnitudes_divided_by_norm": (None, "the file was written for TensorRT-LLM; leave --from out"),
    },
)

VERA = Verdicts(
    "PEFT's VeraConfig",
    read=frozenset(
        {
            *("peft_type", "base_model_name_or_path", "r", "target_modules", "exclude_modules", "vera_dropout"),
            *("projection_prng_key", "save_projection", "d_initial", "layers_to_transform", "layers_pattern"),
        }
    ),
    harmless=_ANY_METHOD | {"init_weights"},
    refused={
        "bias": ("none", "VeRA's biases have no place here; merge it in PEFT"),
        "modules_to_save": (None, "modules trained beside VeRA have no place here; merge it in PEFT"),
    },
)

SHARED = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "modules_to_save", "target_parameters", "bias"),
)
"""Fields that mean the same in PEFT's LoraConfig and in `DoraConfig`."""
_OF_VERA = ("r", "target_modules", "exclude_modules", "d_initial", "projection_prng_key")


def take_shared(settings: Mapping[str, Any], fields: Collection[str] = SHARED) -> dict[str, Any]:
    """The fields that are set, as `DoraConfig` takes them."""
    values = {field: settings[field] for field in fields if settings.get(field) is not None}
    return values | sort_names(values)


def translate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `DoraConfig` for a fresh adapter that trains as PEFT's would.

    Args:
        settings: PEFT's own, as `to_dict` gives them, of a LoraConfig or a VeraConfig.

    Raises:
        UsageError: naming every field that is set and cannot be meant here.
    """
    kind = str(getattr(settings.get("peft_type", "LORA"), "value", settings.get("peft_type", "LORA")))
    if kind not in ("LORA", "VERA"):
        raise UsageError(f"peft_type is {kind!r}: LoraConfig and VeraConfig are read")
    verdicts, start = {"LORA": (LORA, "init_lora_weights"), "VERA": (VERA, "init_weights")}[kind]
    problems = []
    try:
        verdicts.check({field: value for field, value in settings.items() if field != start})
    except DoraError as error:
        problems += str(error).splitlines()[1:]
    if not settings.get("target_modules") and not settings.get("target_parameters"):
        problems.append("  target_modules is not set: PEFT would choose by the model's type; name the layers")
    values = take_shared(settings, SHARED if kind == "LORA" else _OF_VERA)
    values |= {"dropout_mode": "exact", "method": "dora" if settings.get("use_dora") else "lora"}
    if kind == "VERA":
        values |= {"method": "vera", "lora_dropout": settings.get("vera_dropout") or 0.0}
    elif tokens := settings.get("trainable_token_indices"):
        values["trainable_token_indices"] = dict(tokens) if isinstance(tokens, Mapping) else tuple(tokens)
    begin = settings.get(start, True)
    if kind == "LORA" and isinstance(begin, str) and re.fullmatch(r"gaussian|pissa|pissa_niter_\d+|olora", begin):
        values["init_lora_weights"] = begin
    elif begin is not True:
        problems.append(f"  {start} is {begin!r}: known are true, gaussian, pissa, pissa_niter_N and olora")
    if settings.get("layers_to_transform") is not None and "target_modules" in values:
        values["target_modules"] = _name_layers(settings, values["target_modules"], problems)
    if problems:
        raise UsageError("\n".join(["the settings of PEFT say what is not meant here:", *problems]))
    return values


def _name_layers(settings: Mapping[str, Any], targets: str | tuple[str, ...], problems: list[str]) -> str:
    """One regular expression for the targets in the layers that PEFT is told to transform."""
    if isinstance(targets, str):
        problems.append(
            "  layers_to_transform goes with a list of target_modules; write both as one regular expression"
        )
        return targets
    layers, pattern = settings["layers_to_transform"], settings.get("layers_pattern") or "[^.]*"
    numbers = "|".join(map(str, [layers] if isinstance(layers, int) else layers))
    above = pattern if isinstance(pattern, str) else "|".join(pattern)
    # the last number in a name is the layer's
    return rf".*\.(?:{above})\.(?:{numbers})\.(?:(?!\d+\.)[^.]*\.)*(?:{'|'.join(map(re.escape, targets))})"
