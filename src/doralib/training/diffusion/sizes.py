"""The sizes that pictures are fitted to: a square, or a bucket for each shape of picture."""

from collections.abc import Sequence

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string
from PIL import Image

from ...errors import UsageError
from ...recipe import DiffusionSettings
from .families import DiffusionFamily

_MULTIPLE = 8
"""Of pixels, which one latent stands for."""


def list_sizes(settings: DiffusionSettings, family: DiffusionFamily) -> list[tuple[int, int]]:
    """Heights and widths in pixels, the first that of the report's pictures.

    Raises:
        UsageError: if the recipe's buckets cannot be read, or a side does not fit the latents.
    """
    side, asked = settings.resolution or family.resolution, settings.buckets
    if asked is None:
        found = [(side, side)]
    elif asked == "auto":
        found = generate_aspect_ratio_buckets(side)
    else:
        try:
            found = parse_buckets_string(asked)
        except ValueError as error:
            raise UsageError(f"diffusion.buckets: {error}") from None
    multiple = _MULTIPLE * family.patch
    if odd := [f"{height} x {width}" for height, width in found if height % multiple or width % multiple]:
        raise UsageError(f"diffusion: {odd[0]} pixels: {family.name} takes multiples of {multiple}")
    return found


def choose_size(picture: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The height and width whose shape is nearest to the picture's."""
    return sizes[find_nearest_bucket(picture.height, picture.width, sizes)]
