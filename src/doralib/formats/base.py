"""What a file format is: from an adapter's tensors and settings to our state and back."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import DoraConfig
from ..state import AdapterState

SETTINGS_FILE = "adapter_config.json"


@dataclass(frozen=True)
class RawAdapter:
    """An adapter's files as they stand."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The JSON beside the tensors, if there is one."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The metadata inside a safetensors file."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """doralib_config.json beside the tensors: what PEFT's files have no word for."""
    notes: tuple[str, ...] = ()
    """What of the files was not as their format has it, a sentence each."""


@dataclass(frozen=True)
class Hints:
    """What a file may not say, and what is allowed: the user's alpha and component, all else from the base model."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the base model's weights by module name; a pipeline's under ``unet.``, ``text_encoder.`` and so on."""
    modules: Collection[str] = ()
    """Names of all modules of the base model, those without weights too."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The base model's config.json."""
    alpha: float | None = None
    """lora_alpha, for files that forget it."""
    component: str | None = None
    """The part of a pipeline that the adapter belongs to, e.g. ``unet``."""
    lengths: Callable[[AdapterState], Mapping[str, Tensor]] | None = None
    """Reads the base model's weights: the length of each row of W + s B A by layer, (O,)."""
    allow_nonfinite: bool = False
    """Take NaN and infinite numbers, in the adapter and in the base, as they are."""


@dataclass(frozen=True)
class ParsedAdapter:
    """An adapter as its format means it."""

    config: DoraConfig
    state: AdapterState
    notes: tuple[str, ...] = ()
    """What had to be assumed, a sentence each."""


@dataclass(frozen=True)
class Format:
    """One tool's files: how they are known, read and written, what they hold and what they need."""

    name: str
    """As it is given to ``--to`` and ``--from``."""
    title: str
    """The tool's own name, for messages."""
    detect: Callable[[RawAdapter], bool]
    read: Callable[[RawAdapter, Hints], ParsedAdapter]
    write: Callable[[DoraConfig, AdapterState, Hints], RawAdapter] | None
    """None: it is only read."""
    tensors_file: str = "adapter_model.safetensors"
    settings_file: str | None = None
    """None: the tensors are all there is, in one file."""
    keeps: tuple[str, ...] = ()
    """What its files say besides the layers: settings of training by our names, and base_model."""
    dropout_mode: str = "adapter"
    """What dropout means to the tool."""
    methods: tuple[str, ...] = ("dora", "lora")
    """The methods whose adapters it can hold."""
    pipelines: bool = False
    """Whether one file may hold adapters of several parts of a diffusion pipeline."""
    own_settings: bool = False
    """Whether doralib_config.json stands beside its files and keeps what they have no word for."""
    needs_weights: bool = False
    """Whether it is written with the base model's weights at hand: ``Hints.lengths``."""
    save: Callable[[RawAdapter, Path], None] | None = None
    """Writes the tensors' file where it is neither safetensors nor torch's own."""
    variant_of: str | None = None
    """A format with the same names; a file that both take for theirs is of this one."""
    note: str = ""
    """What a person has to know about the written file."""
