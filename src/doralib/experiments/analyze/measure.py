"""Lengths, directions and spectra of every weight of every tuned model, one weight at a time."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import functional as F
from .sources import Source, Weight, split_name

log = logging.getLogger(__name__)

_TOP = 10  # of the tuned weight's singular vectors, those looked at; as in arXiv 2410.21228
_UNLIKE = 0.5  # less like every old vector than this: an intruder
_KEPT = 64


@dataclass(frozen=True)
class Spectrum:
    """The change of one weight by its singular values."""

    values: tuple[float, ...]
    """Of V - W, the largest first, 64 at most."""
    intruders: int
    """How many of the 10 first left singular vectors of V are like none of W: every cosine is under 0.5."""


@dataclass(frozen=True)
class WeightMovement:
    """How far one weight of one tuned model went; a line of analysis.csv."""

    tuned: str
    method: str
    step: int | None
    layer: int | None
    module: str
    delta_m: float
    """Mean over the output rows of | |v| - |w| |; the paper's equation 3."""
    delta_d: float
    """Mean over the output rows of 1 - cos(v, w); equation 4."""
    spectrum: Spectrum | None = None


def measure(
    sources: Sequence[Source], modules: Sequence[str] = (), *, spectra: bool = False
) -> Iterator[WeightMovement]:
    """Measure every weight whose module is wanted; of every one if none is named."""
    for source in sources:
        log.info(f"measuring {source.label}" + ("" if source.step is None else f", step {source.step}"))
        for weight in source.weights():
            if modules and split_name(weight.name)[1] not in modules:
                continue
            layer, module = split_name(weight.name)
            delta_m, delta_d = _measure_rows(weight)
            spectrum = find_spectrum(*weight.whole()) if spectra else None
            yield WeightMovement(source.label, source.method, source.step, layer, module, delta_m, delta_d, spectrum)


def _measure_rows(weight: Weight) -> tuple[float, float]:
    rows, length, direction = 0, 0.0, 0.0
    for W_OI, V_OI in weight.blocks():
        # a full fine-tune turns rows by less than float32 tells 1 - cos from 0
        length_O, direction_O = F.moved(W_OI.double(), V_OI.double())
        rows += len(length_O)
        length += length_O.sum().item()
        direction += direction_O.sum().item()
    return length / rows, direction / rows


def find_spectrum(W_OI: Tensor, V_OI: Tensor) -> Spectrum:
    """Singular values of V - W, and how many of V's first directions are new."""
    values = torch.linalg.svdvals(V_OI - W_OI)
    old_OK = torch.linalg.svd(W_OI, full_matrices=False).U
    new_OK = torch.linalg.svd(V_OI, full_matrices=False).U[:, :_TOP]
    likeness = (old_OK.T @ new_OK).abs().amax(0)
    return Spectrum(tuple(values[:_KEPT].tolist()), int((likeness < _UNLIKE).sum()))
