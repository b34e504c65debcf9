"""What passes between a file and a format: tensors and settings on one side, an adapter on the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import DoraConfig
from ..errors import DoraError, UsageError
from ..state import AdapterState

_MOST_LINES = 20


@dataclass(frozen=True)
class Content:
    """A file as it stands."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The JSON beside it, if there is one."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Words inside a safetensors file."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """doralib_config.json beside it: what PEFT's files have no word for."""


@dataclass(frozen=True)
class Given:
    """What the caller knows and a file may not say."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Weights of the base model by module name; a pipeline's under ``unet.``, ``text_encoder.`` and so on."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The base model's config.json."""
    alpha: float | None = None
    """lora_alpha, for files that forget it."""
    component: str | None = None
    """The part of a pipeline that the adapter belongs to, e.g. ``unet``."""
    lengths: Callable[[AdapterState], Mapping[str, Tensor]] | None = None
    """Length of each row of W + s B A by layer, (O,): reads the base model's weights."""


@dataclass(frozen=True)
class Found:
    """An adapter from a file."""

    config: DoraConfig
    state: AdapterState
    notes: tuple[str, ...] = ()
    """What had to be assumed, for a person."""


@dataclass(frozen=True)
class Format:
    """One tool's files."""

    name: str
    title: str
    """For a person."""
    detect: Callable[[Content], bool]
    read: Callable[[Content, Given], Found]
    write: Callable[[DoraConfig, AdapterState, Given], Content] | None
    tensors_file: str = "adapter_model.safetensors"
    settings_file: str | None = None
    keeps: tuple[str, ...] = ()
    """What its files say besides the layers: settings of training by our names, and base_model."""
    dropout_mode: str = "adapter"
    """What dropout means to the tool."""


def refuse(what: str, problems: list[str]) -> None:
    """Nothing, if there are no problems.

    Raises:
        DoraError: listing them.
    """
    if problems:
        more = [f"... and {len(problems) - _MOST_LINES} more"] if len(problems) > _MOST_LINES else []
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise DoraError("\n  ".join([f"{what}: {count}", *problems[:_MOST_LINES], *more]))


def only_layers(state: AdapterState, title: str, kinds: tuple[str, ...] = ("linear",)) -> None:
    """Nothing, if the adapter is layers of these kinds alone, which is all that most tools' files can hold.

    Raises:
        UsageError: naming the layers and whole tensors that would be lost.
    """
    if others := [f"{name} ({layer.kind})" for name, layer in state.layers.items() if layer.kind not in kinds]:
        raise UsageError(
            f"{title} has no DoRA of {', '.join(others[:5])}; it takes {' and '.join(kinds)} layers: merge"
        )
    if state.extra:
        names = ", ".join(sorted(state.extra)[:5])
        raise UsageError(
            f"{title} files hold layers' adapters alone; this adapter also trained {len(state.extra)} whole tensors "
            f"({names}), which would be lost: convert to peft, or merge"
        )
