"""A diffusion pipeline's parts, and which of them a module name belongs to."""

import re

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_COMPONENT = re.compile(rf"({'|'.join(COMPONENTS)})\.(.+)")
# what follows the part's own name; GPT-2's names begin with "transformer.h." and are no pipeline's
_INSIDE = {
    "unet": re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b.*"),
    "transformer": re.compile(r"(?!h\.|wte|wpe|word_embeddings|layers?\.\d).+"),
    "text_encoder": re.compile(r"(text_model|encoder|text_projection|model|shared)\b.*"),
}


def find_component(name: str) -> str | None:
    """The part of a pipeline that a module's name begins with."""
    match = _COMPONENT.fullmatch(name)
    if match is None:
        return None
    kind = "text_encoder" if match[1].startswith("text_encoder") else match[1]
    return match[1] if _INSIDE[kind].fullmatch(match[2]) else None


def guess_component(names: list[str]) -> str | None:
    """The part that modules without a part in front of their names must be of, where the names are telling."""
    if all(_INSIDE["unet"].fullmatch(name) for name in names):
        return "unet"
    if all(re.match(r"(single_)?transformer_blocks\.\d", name) for name in names):
        return "transformer"
    return None


def strip_component(name: str, component: str | None) -> str:
    """The name inside its part."""
    return name.removeprefix(f"{component}.") if component else name
