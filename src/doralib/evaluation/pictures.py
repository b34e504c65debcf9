"""Pictures that a diffusion pipeline draws: drawn by seed, joined to a grid."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

_GAP = 4


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn."""

    steps: int = 25
    guidance: float | None = None
    """None: the pipeline's own."""
    size: tuple[int, int] | None = None
    """Height and width; None: the pipeline's own."""
    seed: int = 0
    negative: str | None = None
    """What is not to be seen."""


def draw_pictures(
    pipeline: Any, prompts: Sequence[str], drawing: Drawing, device: torch.device | str | None = None
) -> list[Image.Image]:
    """A picture for each prompt, one after the other, all from the same seed.

    Torch's own random numbers are left as they were, and every model in the mode that it was in.

    Args:
        device: Where it is done; parts that are elsewhere come for the time of the call. None: where they are.
    """
    asked: dict[str, Any] = {"num_inference_steps": drawing.steps}
    asked |= {} if drawing.guidance is None else {"guidance_scale": drawing.guidance}
    asked |= {} if drawing.size is None else {"height": drawing.size[0], "width": drawing.size[1]}
    asked |= {} if drawing.negative is None else {"negative_prompt": drawing.negative}
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    with _in_use(modules, device), torch.random.fork_rng(_list_devices()), torch.no_grad():
        return [
            pipeline(prompt=prompt, generator=torch.Generator().manual_seed(drawing.seed), **asked).images[0]
            for prompt in prompts
        ]


@contextmanager
def _in_use(modules: Sequence[nn.Module], device: torch.device | str | None) -> Iterator[None]:
    """Modules on the device and in evaluation mode inside the block."""
    places = [next(part.parameters()).device for part in modules]
    modes = [{each: each.training for each in part.modules()} for part in modules]
    for part, place in zip(modules, places, strict=True):
        part.eval()
        if device is not None and place.type != torch.device(device).type:
            part.to(device)
    try:
        yield
    finally:
        for part, place, mode in zip(modules, places, modes, strict=True):
            for each, was_training in mode.items():
                each.training = was_training
            if device is not None and place.type != torch.device(device).type:
                part.to(place)


def _list_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def join_pictures(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures as one, in rows from left to right; columns None: about as many as rows."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    if len(pictures) == 1:
        return pictures[0]
    width, height = max(p.width for p in pictures) + _GAP, max(p.height for p in pictures) + _GAP
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
