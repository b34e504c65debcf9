"""What is known of a job before it begins: its rows, its steps, and the memory that it takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..recipe import Recipe
from .modality import Prepared
from .plan.estimate import Estimate


@dataclass(frozen=True)
class Outlook:
    """A job that was checked and not begun."""

    recipe: Recipe
    """With the style that was found."""
    facts: Mapping[str, str]
    """What the job is, by a word for each, as a run says before it trains."""
    notes: tuple[str, ...]
    """Rows that are left out, cut or divided."""
    steps: int
    steps_an_epoch: int
    memory: Estimate | None
    """None where it cannot be estimated."""
    data: Prepared
