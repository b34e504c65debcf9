"""`doralib eval`: tables for the terminal."""

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..evaluation.evaluate import TaskResult

_WRONG_SHOWN = 5
_PROMPT_SHOWN = 300  # characters: the end of a prompt says most


def results_table(results: Mapping[str, TaskResult], title: str) -> Table:
    """A table for the terminal, a line for each metric."""
    table = Table(title=title)
    for name, justify in (("Task", "left"), ("Rows", "right"), ("Metric", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("Value", "95 % interval"):
        table.add_column(name, justify="right")
    for result in results.values():
        first = [result.task, str(result.n)]
        for name, score in result.metrics.items():
            interval = f"{_shown(name, score.low)} to {_shown(name, score.high)}"
            table.add_row(*first, name.replace("_", " "), _shown(name, score.value), interval)
            first = ["", ""]
    return table


def wrong_answers(name: str, result: TaskResult) -> Group:
    """A table of the first mistakes for the terminal; nothing where there are none."""
    if not result.wrong:
        return Group()
    num_wrong = result.n - round(result.metrics["accuracy"].value * result.n)
    table = Table(title=f"{name}: {num_wrong} of {result.n} answers are wrong", show_lines=True)
    for column in ("Prompt", "Expected", "Predicted"):
        table.add_column(column, overflow="fold")
    for wrong in result.wrong[:_WRONG_SHOWN]:
        prompt = wrong["prompt"].strip()
        prompt = prompt if len(prompt) <= _PROMPT_SHOWN else "..." + prompt[-_PROMPT_SHOWN:]
        said = wrong["predicted"] or f"(no answer in: {wrong.get('output', '').strip()})"
        # Text: brackets in data are not markup
        table.add_row(*(Text(cell) for cell in (prompt, wrong["expected"], said)))
    return Group(table)


def _shown(metric: str, value: float) -> str:
    """Shares in per cent, the rest as numbers."""
    return f"{100 * value:.1f} %" if metric in {"accuracy", "macro_f1"} else f"{value:.3f}"
