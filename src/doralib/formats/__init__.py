"""Adapter file formats: for each, a pair of pure functions between its tensors and settings and ours."""

from ..errors import DoraError, UsageError, did_you_mean
from . import aitoolkit, diffusers, fsdp_qlora, kohya, llama_cpp, mlx, nvlabs, peft, tensorrt, torchtune
from .base import Format, RawAdapter

FORMATS = {
    each.name: each
    for each in (
        peft.FORMAT,
        nvlabs.FORMAT,
        kohya.FORMAT,
        aitoolkit.FORMAT,
        diffusers.FORMAT,
        mlx.FORMAT,
        torchtune.FORMAT,
        torchtune.EXPORT,
        fsdp_qlora.FORMAT,
        tensorrt.FORMAT,
        llama_cpp.FORMAT,
    )
}


def detect_format(raw: RawAdapter) -> Format:
    """The one format that a file is in, by its keys and settings.

    Raises:
        DoraError: if it is none, or several.
    """
    fits = _find_fitting(raw)
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = ", ".join(each.name for each in fits)
        raise DoraError(f"the file could be of several formats ({names}); say which")
    raise DoraError(f"no known adapter has these tensors {_show_tensors(raw)}\n  known: {', '.join(FORMATS)}")


def explain_mismatch(form: Format, raw: RawAdapter) -> str:
    """What a file looks like instead of this format; nothing, if it does look like it."""
    fits = _find_fitting(raw)
    if form in fits:
        return ""
    others = " or ".join(each.name for each in fits)
    if others:
        return f"the file does not look like {form.name} but like {others}; leave --from out, or give --from {others}"
    return f"the file does not look like {form.name}, nor like any other known adapter {_show_tensors(raw)}"


def _find_fitting(raw: RawAdapter) -> list[Format]:
    """The formats that a file could be in."""
    fits = [each for each in FORMATS.values() if each.detect(raw)]
    shared = {each.variant_of for each in fits}
    return [each for each in fits if each.name not in shared]


def _show_tensors(raw: RawAdapter) -> str:
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
