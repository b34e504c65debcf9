"""Stable Diffusion's U-Nets by the original code's module names, which kohya's files of SDXL have.

The original numbers all blocks of a half through: a level is its residual layers, then the layer that changes the size.
diffusers names level, kind and number. So the numbers follow from how many layers a level has.
"""

import re
from collections.abc import Iterable, Mapping

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_HALVES = {"down_blocks": "input_blocks", "up_blocks": "output_blocks"}
_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_DIFFUSERS_HALVES = {own: name for name, own in _HALVES.items()}
_ORIGINAL = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)(?:\.(.+))?")
_ORIGINAL_MIDDLE = re.compile(r"middle_block\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def find_original_names(modules: Iterable[str]) -> dict[str, str]:
    """The original name of each module of a U-Net that has one, by diffusers' name."""
    names = list(modules)
    layers = _count_layers(names)
    attended = {match[2] for name in names if (match := _BLOCK.fullmatch(name)) and _is_attention_above(match)}
    found = {name: _TOP[name] for name in names if name in _TOP}
    for name in names:
        if match := _MIDDLE.fullmatch(name):
            # a residual layer, attention, a residual layer
            place = 1 if match[1] == "attentions" else 2 * int(match[2])
            found[name] = f"middle_block.{place}.{_name_inside(match[1], match[3])}"
        elif match := _BLOCK.fullmatch(name):
            half, level, kind, number, inside = match.groups()
            block = _find_block(half, int(level), kind, int(number), layers)
            place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + (level in attended)}[kind]
            found[name] = f"{_HALVES[half]}.{block}.{place}.{_name_inside(kind, inside)}"
    return found


def find_diffusers_names(modules: Iterable[str]) -> dict[str, str]:
    """diffusers' name of each module of a U-Net that has one, by its original name."""
    names = list(modules)
    numbers = [(match, int(match[2])) for name in names if (match := _ORIGINAL.fullmatch(name))]
    # a level of the lower half ends with its `op`, one of the upper half with the block that has a `conv` of its own
    lower = min((n for m, n in numbers if m[1] == "input_blocks" and m[4] == "op"), default=len(numbers) + 1)
    upper = 1 + min((n for m, n in numbers if m[1] == "output_blocks" and m[4] == "conv"), default=len(numbers))
    found = {own: name for name, own in _TOP.items() if own in names}
    for match, n in numbers:
        if match[0] in found:
            continue
        half, place, inside = match[1], int(match[3]), match[4]
        level, number = divmod(n - 1, lower) if half == "input_blocks" else divmod(n, upper)
        kind = "attentions" if place else "resnets"
        if inside == "op" or (place and inside == "conv"):
            kind, number, inside = ("downsamplers" if inside == "op" else "upsamplers"), 0, "conv"
        front = f"{_DIFFUSERS_HALVES[half]}.{level}"
        found[match[0]] = f"{front}.{kind}.{number}.{_name_outside(kind, inside)}"
    for name in names:
        if match := _ORIGINAL_MIDDLE.fullmatch(name):
            kind, number = ("attentions", 0) if match[1] == "1" else ("resnets", int(match[1]) // 2)
            found[name] = f"mid_block.{kind}.{number}.{_name_outside(kind, match[2])}"
    return found


def _count_layers(names: Iterable[str]) -> Mapping[str, int]:
    """How many residual layers a level has, in each half."""
    found = {"down_blocks": 0, "up_blocks": 0}
    for name in names:
        if (match := _BLOCK.fullmatch(name)) and match[3] == "resnets":
            found[match[1]] = max(found[match[1]], int(match[4]) + 1)
    return found


def _find_block(half: str, level: int, kind: str, number: int, layers: Mapping[str, int]) -> int:
    """The number of an original block: of the lower half the first is conv_in, and a level ends with its own block."""
    if half == "down_blocks":
        within = layers[half] if kind == "downsamplers" else number
        return 1 + level * (layers[half] + 1) + within
    # of the upper half the layer that changes the size stands in the level's last block
    return level * layers[half] + (layers[half] - 1 if kind == "upsamplers" else number)


def _is_attention_above(match: re.Match[str]) -> bool:
    return match[1] == "up_blocks" and match[3] == "attentions"


def _name_inside(kind: str, inside: str) -> str:
    if kind == "resnets":
        return _RESIDUAL.get(inside, inside)
    return "op" if kind == "downsamplers" and inside == "conv" else inside


def _name_outside(kind: str, inside: str) -> str:
    """The name inside a residual layer as diffusers has it; others have the same."""
    return next((name for name, own in _RESIDUAL.items() if own == inside), inside) if kind == "resnets" else inside
