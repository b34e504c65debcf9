"""Pictures of `doralib generate`: a diffusion pipeline draws one for each prompt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .console import console

if TYPE_CHECKING:
    from ..formats.base import Hints

PICTURES = (".png", ".webp", ".jpg", ".jpeg")
_STEPS = 25


@dataclass(frozen=True)
class Drawn:
    """What draws."""

    model: str
    """A run, an adapter or a pipeline."""
    pipeline: str
    dtype: str
    given: "Hints"


def draw(by: Drawn, prompts: Sequence[str], out: Path | None, seed: int, options: Mapping[str, Any]) -> None:
    """Draw a picture for each prompt and write them, several as a grid.

    Raises:
        UsageError: if there is no prompt or no place for the picture, or the size is none.
    """
    import torch

    from ..adapters.inference import unchanged
    from ..checkpoints.pipelines import join_parts, load_adapted_pipeline
    from ..disk import check_writable, replacing
    from ..evaluation.pictures import Drawing, draw_pictures, join_pictures

    if not prompts or out is None:
        raise UsageError(f"{by.model} draws pictures: give --prompt TEXT (or --file) and --out PICTURE.png")
    if out.suffix.lower() not in PICTURES:
        raise UsageError(f"--out {out}: a picture is written as {', '.join(PICTURES)}")
    check_writable(out, "--out", folder=False)
    size = _read_size(options["--size"])
    drawing = Drawing(options["--steps"] or _STEPS, options["--guidance"], size, seed, options["--negative"])
    pipeline = load_adapted_pipeline(by.model, by.pipeline, dtype=by.dtype, given=by.given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with unchanged(join_parts(pipeline)):
        pictures = draw_pictures(pipeline, prompts, drawing, device)
    with replacing(out) as part:
        join_pictures(pictures).save(part, out.suffix.lower().lstrip(".").replace("jpg", "jpeg"))
    told = "a picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
    console.print(f"{told} written: {out}")


def _read_size(text: str | None) -> tuple[int, int] | None:
    """Height and width.

    Raises:
        UsageError: if they are not two multiples of 8.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    height, width = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (height and width) or height % 8 or width % 8:
        raise UsageError(f"--size {text}: give height and width as 1024x768, both multiples of 8")
    return height, width
