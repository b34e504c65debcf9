"""What is compared: cells of a grid, the runs in them, and the recipe of each run."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DoraError, UsageError, collecting, raise_all
from ...recipe import Recipe
from ...training.arguments import check_arguments
from ...training.recipe_file import override

WITHOUT_RANK = ("full",)
_NOT_QUANTIZED = "null"
# one fine-tuning method's usual rate over that of the adapters with A and B
_RATE_RATIO = {"full": 0.1, "vera": 10.0, "dvora": 10.0}


@dataclass(frozen=True)
class Grid:
    """What the user asked to compare."""

    recipe: Recipe
    methods: tuple[str, ...]
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    out: Path
    rates: tuple[float, ...] = ()
    """Empty: searched for each cell, from the recipe's own rate, which is the rate of lora and dora."""
    axis: str | None = None
    """A setting of the recipe that is varied too, such as adapter.magnitude_lr_ratio."""
    axis_values: tuple[str, ...] = ()
    tune_seeds: int = 1
    """So many of the seeds choose a cell's rate, by the mean of their validation losses."""
    budget: int = 5
    """Rates to try for a cell, where none are given."""
    stop_early: bool = False
    """Stop runs that fall behind, by asynchronous successive halving."""
    keep_checkpoints: bool = False

    @property
    def needs_validation(self) -> bool:
        """Whether there is a rate to choose."""
        return len(self.rates) != 1

    @property
    def choosing(self) -> tuple[int, ...]:
        """The seeds that choose the rates."""
        return self.seeds[: self.tune_seeds]

    def cells(self) -> Iterator["Cell"]:
        """Every combination of method, rank and value of the axis; a method without a rank once."""
        for method in self.methods:
            for r in (None,) if method in WITHOUT_RANK else self.ranks:
                for value in self._values(method):
                    yield Cell(method, r, value)

    def _values(self, method: str) -> tuple[str | None, ...]:
        """Of the axis; what is trained whole is never quantized."""
        whole = method in WITHOUT_RANK and self.axis == "model.quantization"
        return (_NOT_QUANTIZED,) if whole else self.axis_values or (None,)

    def start_rate(self, cell: "Cell") -> float:
        """Where the search for the cell's rate begins."""
        return float(self.recipe.training["learning_rate"]) * _RATE_RATIO.get(cell.method, 1.0)


@dataclass(frozen=True)
class Cell:
    """Runs that differ in rate and seed alone."""

    method: str
    r: int | None
    value: str | None
    """Of the axis."""

    @property
    def name(self) -> str:
        """For folders: letters, digits, points and dashes."""
        r = "" if self.r is None else f"-r{self.r}"
        value = "" if self.value is None else "-" + re.sub(r"[^\w.]+", "_", self.value)
        return f"{self.method}{r}{value}"

    def text(self, axis: str | None) -> str:
        """For a person."""
        r = "" if self.r is None else f" r {self.r}"
        return f"{self.method}{r}" + ("" if self.value is None else f", {axis}={self.value}")


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    cell: Cell
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its recipe."""
        return f"{self.cell.name}-lr{self.rate:g}-seed{self.seed}"


def make_recipe(grid: Grid, run: Run) -> Recipe:
    """The recipe of one run. Alpha keeps its ratio to the rank; nothing is scored, for that comes after the choice.

    Raises:
        UsageError: if the method cannot be trained with these settings.
    """
    values = copy.deepcopy(grid.recipe.model_dump(mode="json", exclude_unset=True))
    adapter: dict[str, Any] = dict(values.get("adapter") or {})
    own = grid.recipe.adapter
    if run.cell.method in WITHOUT_RANK:
        adapter = {}
    elif run.cell.r is not None:
        adapter |= {"r": run.cell.r, "lora_alpha": own.lora_alpha / own.r * run.cell.r}
    values["adapter"] = adapter | {"method": run.cell.method}
    values["training"] = {**values.get("training", {}), "learning_rate": run.rate}
    values["eval"] = {"tasks": [], "before": False}
    values["seed"] = run.seed
    values["out"] = str(grid.out / "runs" / run.name)
    if grid.axis is not None:
        override(values, f"{grid.axis}={run.cell.value}")
    return Recipe(**values)


def check_grid(grid: Grid) -> None:
    """Check everything that can be checked before the first run.

    Raises:
        UsageError: with every problem of every cell.
    """
    problems: list[DoraError] = []
    rateless = "learning_rate" not in grid.recipe.training and not grid.rates
    if rateless:
        problems.append(UsageError("--lrs auto begins at training.learning_rate, and the recipe has none"))
    if grid.needs_validation and grid.recipe.data.validation is None:
        problems.append(UsageError("rates are chosen on validation rows: set data.validation, or give one rate"))
    if grid.needs_validation and grid.recipe.objective.kind == "grpo":
        problems.append(UsageError("rates are chosen by the loss, which says nothing of grpo: give one by --lrs"))
    if grid.tune_seeds > len(grid.seeds):
        problems.append(
            UsageError(f"--tune-seeds {grid.tune_seeds}: --seeds gives {len(grid.seeds)}; give more, or tune by fewer")
        )
    for cell in grid.cells():
        with collecting(problems):
            # without a rate any that is allowed shows what else is wrong
            rate = 1e-4 if rateless else (grid.rates or (grid.start_rate(cell),))[0]
            recipe = make_recipe(grid, Run(cell, rate, 0))
            check_arguments(recipe)
    names = [cell.name for cell in grid.cells()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(UsageError(f"the grid has {', '.join(twice)} twice; name every value once"))
    # most problems are every cell's
    raise_all([UsageError(text) for text in dict.fromkeys(map(str, problems))])
