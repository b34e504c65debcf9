"""What a kind of data (text, images, speech) does for a job; the life cycle and the trainer know nothing else of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..checkpoints.models import Loaded
from ..config import DoraConfig
from ..data.prepare import PreparedRows, Row, Sample
from ..data.prompt_form import PromptForm
from ..data.rows import RawRows
from ..evaluation.result import TaskResult
from ..progress import Tick
from ..recipe import DataSettings, ModelSettings

Collate = Callable[[Sequence[Row]], dict[str, Tensor]]


@dataclass(frozen=True)
class Prepared:
    """The data of a job as its model takes them."""

    train: PreparedRows
    validation: PreparedRows | None
    samples: list[Sample]
    """A few prompts, answered before and after training for the report."""
    told: Mapping[str, str] = field(default_factory=dict)
    """What else there is to say before training, by a word for each."""
    first: str = ""
    """The first row for a person, with what is learned of it marked."""
    survey: Mapping[str, Any] | None = None
    """What the rows are like, for the report: see `data.survey`."""
    form: PromptForm | None = None
    """How the model is asked, if it answers."""
    kinds: Sequence[int] = ()
    """The kind of each row of train, where rows of two kinds may not share a batch."""
    ratios: Mapping[str, float] | None = None
    """Where a batch holds rows of one task alone: how many, over the batch size, by the names in the column `task`."""
    unit: str = "tokens"
    """What rows are counted in."""
    order: str | None = None
    """The `train_sampling_strategy` that the rows need; None: by how much padding there would be."""


class Modality(Protocol):
    """The functions of a file in `modalities`."""

    def check_rows(self, settings: DataSettings, seed: int) -> RawRows:
        """The rows of training and validation; raises what can be said against them without the model."""

    def load(self, settings: ModelSettings, *, empty: bool = False) -> Loaded:
        """The model without an adapter, and what turns its data into tensors: a tokenizer or a processor.

        An empty model has no weights and stands on the device `meta`.
        """

    def prepare(
        self, rows: RawRows, settings: DataSettings, model: nn.Module, processor: Any, tick: Tick | None = None
    ) -> Prepared:
        """The rows as this model takes them; raises if none is left."""

    def collate(self, model: nn.Module, processor: Any, data: Prepared) -> Collate | None:
        """The function that makes one batch of rows: `labels`, and the arguments of the model's forward.

        None: the objective's trainer makes it.
        Where the sum of its `attention_mask` is not the number of its tokens, `num_tokens`, a scalar, is.
        """

    def samples(
        self, model: nn.Module, processor: Any, settings: DataSettings, asked: list[dict[str, str]]
    ) -> list[str]:
        """What the model answers to each sample, given as ``{"prompt": ..., "expected": ...}``."""


@runtime_checkable
class DrawingModality(Protocol):
    """A modality whose samples are pictures, drawn at each checkpoint too, and whose layers are its own to choose."""

    def hash_rows(self, rows: RawRows) -> dict[str, str]:
        """Hashes of what files of rows name and do not hold, by what it is; a resumed run must find them again."""

    def configure(self, model: nn.Module, processor: Any, config: DoraConfig) -> DoraConfig:
        """The adapter's settings with what follows from the model; it gets the recipe's new tokens."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what others read of the trained adapter, beside PEFT's files; each process calls it."""


@runtime_checkable
class ScoringModality(Protocol):
    """A modality that also scores the validation rows by more than the loss."""

    def score(
        self, model: nn.Module, processor: Any, settings: DataSettings, *, batch_size: int, seed: int, tick: Tick | None
    ) -> dict[str, TaskResult]:
        """Results by name."""


@runtime_checkable
class TargetingModality(Protocol):
    """A modality that says which layers are adapted where the settings name none."""

    def choose_targets(self, model: nn.Module, adapter: DoraConfig) -> DoraConfig:
        """The settings with targets that its models have; raises if those that are named mean too much."""


@runtime_checkable
class KeepingModality(Protocol):
    """A modality of which a folder says more than weights and tokenizer."""

    predictions: Mapping[str, str]
    """The files that the last scoring made, by name."""

    def keep(self, folder: Path) -> None:
        """Write what belongs beside an adapter."""
