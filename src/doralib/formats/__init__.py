"""Adapter file formats: for each, a pair of pure functions between its tensors and settings and ours."""

from ..config import DoraConfig
from ..errors import DoraError, UsageError, did_you_mean
from ..state import AdapterState
from . import aitoolkit, diffusers, fsdp_qlora, kohya, mlx, nvlabs, tensorrt, torchtune
from .base import Content, Format, Found, Given
from .peft import from_peft, to_peft, unsaid_in_peft


def _is_peft(content: Content) -> bool:
    named = any(key.startswith("base_model.model.") for key in content.tensors)
    ours = named or (content.settings.get("peft_type") == "LORA" and "use_dora" in content.settings)
    others = (nvlabs.detect, torchtune.detect_export, fsdp_qlora.detect, tensorrt.detect)
    return ours and not any(other(content) for other in others)


def _read_peft(content: Content, given: Given) -> Found:
    if not content.settings:
        raise DoraError("PEFT's adapter_config.json is missing beside the tensors; without it alpha is unknown")
    lora = content.settings.get("peft_type", "LORA") == "LORA"
    unsaid = unsaid_in_peft(content.settings, given.alpha) if lora else {}
    told = {field: value for field, value in unsaid.items() if field != "lora_alpha" or given.alpha is None}
    notes = tuple(f"the settings do not say {field}: {value:g}, PEFT's default" for field, value in told.items())
    return Found(*from_peft(content.tensors, {**content.settings, **unsaid}), notes)


def _write_peft(config: DoraConfig, state: AdapterState, _given: Given) -> Content:
    return Content(*to_peft(config, state), own=config.model_dump(mode="json"))


_CONFIG = "adapter_config.json"
FORMATS = {
    each.name: each
    for each in (
        Format(
            "peft",
            "PEFT",
            _is_peft,
            _read_peft,
            _write_peft,
            settings_file=_CONFIG,
            keeps=("lora_dropout", "base_model"),
            dropout_mode="exact",
        ),
        Format("nvlabs", "NVlabs/DoRA", nvlabs.detect, nvlabs.read, None, "adapter_model.bin", _CONFIG),
        Format("kohya", "kohya / LyCORIS", kohya.detect, kohya.read, kohya.write, "lora.safetensors"),
        Format("ai-toolkit", "ai-toolkit", aitoolkit.detect, aitoolkit.read, aitoolkit.write, "lora.safetensors"),
        Format(
            "diffusers",
            "diffusers",
            diffusers.detect,
            diffusers.read,
            diffusers.write,
            "pytorch_lora_weights.safetensors",
            keeps=("lora_dropout",),
            dropout_mode="exact",
        ),
        Format(
            "mlx",
            "MLX-LM",
            mlx.detect,
            mlx.read,
            mlx.write,
            "adapters.safetensors",
            _CONFIG,
            keeps=("lora_dropout", "base_model"),
        ),
        Format(
            "torchtune",
            "torchtune",
            torchtune.detect_live,
            torchtune.read_live,
            torchtune.write_live,
            "adapter_model.pt",
            _CONFIG,
        ),
        Format(
            "torchtune-export",
            "torchtune's export",
            torchtune.detect_export,
            torchtune.read_export,
            None,
            settings_file=_CONFIG,
        ),
        Format(
            "fsdp-qlora",
            "fsdp_qlora",
            fsdp_qlora.detect,
            fsdp_qlora.read,
            fsdp_qlora.write,
            "model_state_dict.safetensors",
        ),
        Format("tensorrt", "TensorRT-LLM", tensorrt.detect, tensorrt.read, None, settings_file=_CONFIG),
    )
}


def detect(content: Content) -> Format:
    """The one format that a file is in, by its keys and settings.

    Raises:
        DoraError: if it is none, or several.
    """
    fits = [each for each in FORMATS.values() if each.detect(content)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = ", ".join(each.name for each in fits)
        raise DoraError(f"the file could be of several formats ({names}); say which")
    raise DoraError(f"no known adapter has these tensors {_shown(content)}\n  known: {', '.join(FORMATS)}")


def unlike(form: Format, content: Content) -> str:
    """What a file looks like instead of this format; nothing, if it does look like it."""
    if form.detect(content):
        return ""
    others = " or ".join(each.name for each in FORMATS.values() if each.detect(content))
    if others:
        return f"the file does not look like {form.name} but like {others}; leave --from out, or give --from {others}"
    return f"the file does not look like {form.name}, nor like any other known adapter {_shown(content)}"


def _shown(content: Content) -> str:
    """The first tensors of a file, and how many there are."""
    keys = sorted(content.tensors)
    shown = "\n  ".join(f"{key} {tuple(content.tensors[key].shape)}" for key in keys[:5]) or "no tensors"
    return f"({len(keys)}):\n  {shown}"


def format_named(name: str) -> Format:
    """The format of this name.

    Raises:
        UsageError: if there is none.
    """
    if name not in FORMATS:
        raise UsageError(f"{name!r} is no adapter format{did_you_mean(name, FORMATS)}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
