"""`doralib features`."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DoraError, collecting, list_some
from .console import bars, console
from .options import Overwrite, Revision

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..checkpoints.vision import VisionEncoder


def features_command(
    media: Annotated[list[Path], typer.Argument(help="Pictures, videos, or folders of them.", metavar="FILE")],
    model: Annotated[str, typer.Option(help="A vision model of transformers: a folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="The folder of features: NAME.h5 of a picture, NAME.npz of a video.")],
    revision: Revision = None,
    fps: Annotated[float, typer.Option(min=1e-3, max=1e3, help="Frames a second that are taken of a video.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Pictures or frames at a time.")] = 16,
    overwrite: Overwrite = False,
) -> None:
    """Write the features of pictures and videos that a VL-BART reads.

    Of a picture the grid of the model's last layer, of a video one vector for each frame that is taken. What is there
    already stays, so that a run that was stopped goes on.
    """
    from ..data.features import import_h5py, read_features
    from ..data.frames import check_readers, find_media, is_video
    from ..hub import add_revision

    files = find_media(media)
    check_readers(files)
    wanted = {file: out / f"{file.stem}{'.npz' if is_video(file) else '.h5'}" for file in files}
    if any(target.suffix == ".h5" for target in wanted.values()):
        import_h5py("--out")
    left = {file: target for file, target in wanted.items() if overwrite or not target.is_file()}
    failed = _write_all(left, add_revision(model, revision), fps, batch_size) if left else []
    console.print(
        f"{len(left) - len(failed):,} files of features in {out}, {len(files) - len(left):,} were there already"
    )
    for file in {target.suffix: target for target in wanted.values() if target.is_file()}.values():
        places, numbers = read_features(file).shape
        console.print(f"model.visual.features: {numbers} ({file.name} has {places} of them)")
    if failed:
        raise DoraError(f"{len(failed)} of {len(files)} files have no features:\n  {list_some(failed, 10)}")


def _write_all(left: dict[Path, Path], model: str, fps: float, batch_size: int) -> list[str]:
    """Write the features of each file; returns what is wrong with those that have none."""
    from ..checkpoints.vision import load_vision_encoder
    from ..data.features import write_features

    encoder = load_vision_encoder(model)
    problems: list[DoraError] = []
    with bars() as tick:
        for file, target in left.items():
            with collecting(problems):
                write_features(target, make_features(encoder, file, fps, batch_size))
            if tick is not None:
                tick("features", 1 / len(left), 1.0)
    return list(map(str, problems))


def make_features(encoder: "VisionEncoder", file: Path, fps: float, batch_size: int) -> "Tensor":
    """A picture's grid, or the vectors of a video's frames, (L, F).

    Raises:
        DoraError: if the file cannot be read.
    """
    import torch

    from ..data.frames import is_video, open_image, read_frames

    if not is_video(file):
        return encoder.make_grids([open_image(file)])[0]
    return torch.cat([encoder.make_vectors(batch) for batch in _take(read_frames(file, fps), batch_size)])


def _take(frames: "Iterable[Image]", size: int) -> "Iterator[list[Image]]":
    """The frames, so many at a time."""
    left = iter(frames)
    while batch := list(islice(left, size)):
        yield batch
