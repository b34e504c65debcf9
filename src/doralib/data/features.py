"""Features of pictures and videos, one file each: a grid in HDF5, frames in npz; read, written, pooled to a number."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..disk import replacing
from ..errors import DoraError, UsageError
from ..extras import import_extra

ENDINGS = (".h5", ".npz")
"""Of a picture's grid, and of a video's frames."""


def import_h5py(setting: str) -> Any:
    """The package h5py.

    Raises:
        UsageError: if it is not installed.
    """
    return import_extra("h5py", f"{setting}: an .h5 file")


def read_features(file: Path) -> Tensor:
    """The features in a file, (L, F) in float32: of an .h5 under NAME/features, of an .npz under features.

    Raises:
        DoraError: if the file is damaged, or holds something else.
    """
    try:
        found = _read_h5(file) if file.suffix == ".h5" else _read_npz(file)
        features_LF = torch.from_numpy(np.asarray(found, dtype=np.float32))
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DoraError(f"{file} holds no features that can be read: {error}; make it again") from None
    if features_LF.dim() != 2 or not len(features_LF):
        raise DoraError(f"{file}: features should be (places, numbers), and are {tuple(features_LF.shape)}")
    if not bool(features_LF.isfinite().all()):
        raise DoraError(f"{file}: some features are NaN or infinite; make it again")
    return features_LF


def _read_h5(file: Path) -> Any:
    with import_h5py(str(file)).File(file, "r") as opened:
        return opened[f"{file.stem}/features"][...]


def _read_npz(file: Path) -> Any:
    with np.load(file, allow_pickle=False) as opened:
        return opened["features"]


def write_features(file: Path, features_LF: Tensor) -> None:
    """Write features into an .h5 or .npz file as `read_features` reads them, and as those that are published are."""
    values = features_LF.detach().cpu().float().numpy()
    with replacing(file) as part:
        if file.suffix == ".h5":
            with import_h5py(str(file)).File(part, "w") as opened:
                opened.create_dataset(f"{file.stem}/features", data=values)
        else:
            with part.open("wb") as opened:
                np.savez(opened, features=values)


def make_boxes(count: int) -> Tensor:
    """Left, right, top and bottom of each cell of a square grid, row by row, (count, 4), 0 to 1."""
    side = math.isqrt(count)
    top_N, left_N = torch.arange(count) // side / side, torch.arange(count) % side / side
    return torch.stack([left_N, left_N + 1 / side, top_N, top_N + 1 / side], dim=-1)


def fit_features(features_LF: Tensor, count: int, file: Path) -> Tensor:
    """As many features as a model reads, (count, F): a grid is max-pooled in both directions.

    Of more frames each window's largest numbers are taken, behind fewer stand zeros.

    Raises:
        UsageError: if a grid is not square, or is to become one that is not.
    """
    if file.suffix == ".npz":
        if len(features_LF) <= count:
            return nnf.pad(features_LF, (0, 0, 0, count - len(features_LF)))
        return nnf.adaptive_max_pool1d(features_LF.T, count).T
    if len(features_LF) == count:
        return features_LF
    side, wanted = math.isqrt(len(features_LF)), math.isqrt(count)
    if side * side != len(features_LF) or wanted * wanted != count:
        raise UsageError(
            f"model.visual.tokens: {file} has {len(features_LF)} places, and {count} are asked for; a grid is pooled "
            "from a square to a square, such as 49 to 36"
        )
    grid_FHW = features_LF.T.reshape(-1, side, side)
    return nnf.adaptive_max_pool2d(grid_FHW, wanted).flatten(1).T
