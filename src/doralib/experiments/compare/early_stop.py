"""Runs that fall behind are stopped by asynchronous successive halving (arXiv 1810.05934), as Optuna does it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...extras import import_extra
from .grid import Cell, Run

Losses = Callable[[], list[float]]
"""Validation losses of a run so far."""
_WORST = 1e9  # a loss that is not finite, for Optuna's comparisons


class Halving:
    """Remembers, in one file, how far every run of every cell came."""

    def __init__(self, file: Path) -> None:
        self._optuna = optuna = import_extra("optuna", "--stop-early")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file.parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(file))
        self._storage = optuna.storages.JournalStorage(backend)

    def study(self, cell: Cell) -> Any:
        """The runs of a cell, which compete with each other."""
        return self._optuna.create_study(
            study_name=cell.name,
            storage=self._storage,
            pruner=self._optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
            load_if_exists=True,
        )

    def was_stopped(self, run: Run) -> bool:
        """Whether an earlier session stopped it."""
        pruned = self._optuna.trial.TrialState.PRUNED
        return any(each.state == pruned for each in self._trials(run))

    def watch(self, run: Run, losses: Losses) -> "RunWatch":
        """What to ask while the run goes on."""
        study, fail = self.study(run.cell), self._optuna.trial.TrialState.FAIL
        for each in self._trials(run):
            if not each.state.is_finished():  # of a session that was killed
                study.tell(each.number, state=fail)
        trial = study.ask()
        trial.set_user_attr("run", run.name)
        return RunWatch(study, trial, losses, self._optuna.trial.TrialState)

    def _trials(self, run: Run) -> list[Any]:
        return [each for each in self.study(run.cell).get_trials() if each.user_attrs.get("run") == run.name]


class RunWatch:
    """One run under way."""

    def __init__(self, study: Any, trial: Any, losses: Losses, states: Any) -> None:
        self._study, self._trial, self._losses, self._states = study, trial, losses, states
        self._told = 0
        self.stopped = False

    def unwanted(self) -> bool:
        """Whether it has fallen behind, by the losses that are new."""
        for loss in self._losses()[self._told :]:
            self._told += 1
            self._trial.report(loss if math.isfinite(loss) else _WORST, self._told)
            if self._trial.should_prune():
                self.stopped = True
        return self.stopped

    def close(self, loss: float) -> None:
        """Say how it ended."""
        if self.stopped:
            self._study.tell(self._trial, state=self._states.PRUNED)
        elif math.isfinite(loss):
            self._study.tell(self._trial, loss)
        else:
            self._study.tell(self._trial, state=self._states.FAIL)
