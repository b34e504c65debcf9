"""`doralib eval --mt-bench`: answers, what judging will cost, scores by category."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ..errors import UsageError
from .console import bars, console

if TYPE_CHECKING:
    from ..evaluation.mt_bench.scores import CategoryScore

_KEYS = ("DORALIB_JUDGE_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True)
class MtBench:
    """What was asked for."""

    questions: Path
    out: Path
    """A folder: FastChat's files, scores.json and radar.png."""
    judge_url: str | None
    judge_model: str | None
    price: str | None
    """Dollars a million tokens: of prompts, of what the judge writes."""
    against: Path | None
    """Answers of another model, for judging in pairs."""
    limit: int | None
    max_new_tokens: int
    yes: bool


def run_mt_bench(asked: MtBench, name: str, load: Callable[[], tuple[Any, Any]], seed: int) -> None:
    """Answer the questions, and judge the answers where a judge is named; what is there already is not done again.

    Raises:
        UsageError: if files are missing, the judge is named in part, or judging was not agreed to.
        DoraError: if the judge does not answer; what it said before is kept.
    """
    from ..evaluation.mt_bench.answers import Answering, answer_questions
    from ..evaluation.mt_bench.questions import read_answers, read_judge_prompts, read_questions

    if (asked.judge_url is None) != (asked.judge_model is None):
        raise UsageError("--judge-url and --judge-model go together: where the judge is, and its name there")
    if asked.against is not None and asked.judge_url is None:
        raise UsageError("--against compares two models' answers by a judge: name it by --judge-url and --judge-model")
    price = _read_price(asked.price)
    questions = read_questions(asked.questions)[: asked.limit]
    prompts = read_judge_prompts(asked.questions) if asked.judge_url else {}
    others = {}
    if asked.against is not None:
        others = read_answers(asked.against)
        if missing := [str(question.id) for question in questions if question.id not in others]:
            raise UsageError(f"--against: {asked.against} has no answer to question {', '.join(missing[:5])}")
    file = asked.out / "model_answer" / f"{name}.jsonl"
    answered = read_answers(file)
    if any(question.id not in answered for question in questions):
        model, tokenizer = load()
        with bars() as tick:
            step = lambda: tick("answers", 1, len(questions)) if tick else None
            answering = Answering(model, tokenizer, name, asked.max_new_tokens, seed)
            answered = answer_questions(answering, questions, file, tick=step)
    console.print(f"written: {file}")
    if asked.judge_url is None:
        console.print("no judge: --judge-url and --judge-model name one")
        return
    _judge(asked, name, questions, answered, others, prompts, price)


def _judge(
    asked: MtBench,
    name: str,
    questions: Sequence[Any],
    answered: dict[int, Any],
    others: dict[int, Any],
    prompts: Any,
    price: tuple[float, float] | None,
) -> None:
    from ..disk import replacing
    from ..evaluation.mt_bench import judge as judging
    from ..evaluation.mt_bench.questions import read_judgments
    from ..evaluation.mt_bench.scores import draw_radar, score_categories
    from ..files import write_json

    key = next((os.environ[each] for each in _KEYS if os.environ.get(each)), "")
    judge = judging.Judge(str(asked.judge_url), str(asked.judge_model), key)
    kind = "pair" if asked.against else "single"
    file = asked.out / "model_judgment" / f"{_as_name(judge.model)}_{kind}_{name}.jsonl"
    done = read_judgments(file, pairs=asked.against is not None)
    if asked.against:
        single = judging.make_pairs(questions, answered, others, prompts)
        swapped = judging.make_pairs(questions, others, answered, prompts)
    else:
        single, swapped = judging.make_single(questions, answered, prompts), []
    left = [each for each in [*single, *swapped] if (each.question.id, each.turn) not in done]
    if left and not asked.yes:
        _ask(*judging.estimate_tokens(left), len(left), price)
    with bars() as tick:
        step = lambda: tick("judgments", 1, len(single)) if tick else None
        if asked.against:
            names = (name, asked.against.stem)
            verdicts = judging.judge_pairs(judge, single, swapped, file, names=names, tick=step)
        else:
            verdicts = judging.judge_single(judge, single, file, name=name, tick=step)
    scores = score_categories(questions, verdicts)
    against = f", against {asked.against.stem}" if asked.against else ""
    console.print(_table(scores, f"{name}{against}, judged by {judge.model}"))
    write_json(asked.out / f"scores_{kind}.json", {each.category: each.both for each in scores})
    with replacing(asked.out / f"radar_{kind}.png") as part:
        draw_radar(scores, name, 1 if asked.against else 10).savefig(part, format="png")
    console.print(f"written: {file}, scores_{kind}.json and radar_{kind}.png")


def _ask(prompt_tokens: int, most_written: int, count: int, price: tuple[float, float] | None) -> None:
    cost = "its cost is unknown without --judge-price"
    if price is not None:
        least, most = prompt_tokens * price[0] / 1e6, (prompt_tokens * price[0] + most_written * price[1]) / 1e6
        cost = f"that costs {least:.2f} to {most:.2f} dollars"
    console.print(
        f"{count} judgments: about {prompt_tokens:,} tokens of prompts, at most {most_written:,} tokens written; {cost}"
    )
    try:
        agreed = typer.confirm("Go on?", default=False)
    except typer.Abort:
        agreed = False
    if not agreed:
        raise UsageError("nothing was sent to the judge; --yes answers beforehand")


def _read_price(price: str | None) -> tuple[float, float] | None:
    if price is None:
        return None
    try:
        read, written = (float(word) for word in price.split(","))
    except ValueError:
        raise UsageError(
            f"--judge-price {price}: should be dollars a million tokens, read and written: 2.5,10"
        ) from None
    return read, written


def _table(scores: "Sequence[CategoryScore]", title: str) -> Table:
    table = Table("Category", title=title)
    for heading in ("First turn", "Second turn", "Both", "Without a score"):
        table.add_column(heading, justify="right")
    for each in scores:
        numbers = ["-" if value is None else f"{value:.2f}" for value in (each.first, each.second, each.both)]
        table.add_row(each.category, *numbers, str(each.unscored) if each.unscored else "")
    return table


def _as_name(text: str) -> str:
    return text.replace("/", "_")
