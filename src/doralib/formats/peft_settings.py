"""Every field of PEFT's settings with a verdict: read, harmless, or refused when it is set; as of PEFT 0.21.2.

A field that changes numbers must not be passed over: the file would load, and mean another adapter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DoraError, list_some, raise_problems


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
