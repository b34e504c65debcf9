"""Adapter file formats: for each, a pair of pure functions between its tensors and settings and ours."""

from ..errors import DoraError, UsageError, did_you_mean
from . import aitoolkit, diffusers, fsdp_qlora, kohya, mlx, nvlabs, peft, tensorrt, torchtune
from .base import Format, RawAdapter

_CONFIG = "adapter_config.json"
FORMATS = {
    each.name: each
    for each in (
        Format(
            "peft",
            "PEFT",
            peft.detect,
            peft.read,
            peft.write,
            settings_file=_CONFIG,
            keeps=("lora_dropout", "base_model"),
            dropout_mode="exact",
            methods=("dora", "lora", "dvora", "vera"),
            own_settings=True,
        ),
        Format(
            "nvlabs",
            "NVlabs/DoRA",
            nvlabs.detect,
            nvlabs.read,
            None,
            "adapter_model.bin",
            _CONFIG,
            variant_of="peft",
        ),
        Format("kohya", "kohya / LyCORIS", kohya.detect, kohya.read, kohya.write, "lora.safetensors", pipelines=True),
        Format(
            "ai-toolkit",
            "ai-toolkit",
            aitoolkit.detect,
            aitoolkit.read,
            aitoolkit.write,
            "lora.safetensors",
            pipelines=True,
        ),
        Format(
            "diffusers",
            "diffusers",
            diffusers.detect,
            diffusers.read,
            diffusers.write,
            "pytorch_lora_weights.safetensors",
            keeps=("lora_dropout",),
            dropout_mode="exact",
            pipelines=True,
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
            variant_of="peft",
        ),
        Format(
            "fsdp-qlora",
            "fsdp_qlora",
            fsdp_qlora.detect,
            fsdp_qlora.read,
            fsdp_qlora.write,
            "model_state_dict.safetensors",
            variant_of="peft",
        ),
        Format(
            "tensorrt",
            "TensorRT-LLM",
            tensorrt.detect,
            tensorrt.read,
            tensorrt.write,
            settings_file=_CONFIG,
            keeps=("lora_dropout", "base_model"),
            dropout_mode="exact",
            needs_weights=True,
            variant_of="peft",
            note="TensorRT-LLM ignores magnitudes without --dora_plugin=enable",
        ),
    )
}


def detect_format(raw: RawAdapter) -> Format:
    """The one format that a file is in, by its keys and settings.

    Raises:
        DoraError: if it is none, or several.
    """
    fits = _fitting(raw)
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = ", ".join(each.name for each in fits)
        raise DoraError(f"the file could be of several formats ({names}); say which")
    raise DoraError(f"no known adapter has these tensors {_shown(raw)}\n  known: {', '.join(FORMATS)}")


def explain_mismatch(form: Format, raw: RawAdapter) -> str:
    """What a file looks like instead of this format; nothing, if it does look like it."""
    fits = _fitting(raw)
    if form in fits:
        return ""
    others = " or ".join(each.name for each in fits)
    if others:
        return f"the file does not look like {form.name} but like {others}; leave --from out, or give --from {others}"
    return f"the file does not look like {form.name}, nor like any other known adapter {_shown(raw)}"


def _fitting(raw: RawAdapter) -> list[Format]:
    """The formats that a file could be in."""
    fits = [each for each in FORMATS.values() if each.detect(raw)]
    shared = {each.variant_of for each in fits}
    return [each for each in fits if each.name not in shared]


def _shown(raw: RawAdapter) -> str:
    """The first tensors of a file, and how many there are."""
    keys = sorted(raw.tensors)
    shown = "\n  ".join(f"{key} {tuple(raw.tensors[key].shape)}" for key in keys[:5]) or "no tensors"
    return f"({len(keys)}):\n  {shown}"


def find_format(name: str) -> Format:
    """The format of this name.

    Raises:
        UsageError: if there is none.
    """
    if name not in FORMATS:
        raise UsageError(f"{name!r} is no adapter format{did_you_mean(name, FORMATS)}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
