"""What a model is scored on: what every kind of task says, and the kinds scored by likelihood."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..config import Checked
from ..data.prepare import Row
from ..errors import DoraError, UsageError
from .example import Example, check_answers, fill, find_choice, plain_text, read_value


def _labels(value: Any) -> Any:
    """A list of texts as a mapping from each text, stripped, to itself; keys of a mapping as plain text."""
    if isinstance(value, list | tuple):
        return {plain_text(text): text for text in value}
    if isinstance(value, Mapping):
        return {plain_text(key): text for key, text in value.items()}
    return value


class Task(Checked):
    """What every kind of task says."""

    named_in: ClassVar[tuple[str, ...]] = ("prompt", "answer")
    """The settings that name columns of the data."""

    kind: str
    name: str
    data: str | None = None
    """A .json, .jsonl, .csv or .parquet file (beside the task file), or a hub name; null: given as `task=DATA`."""
    in_folder: str | None = None
    """Where a folder of many data sets holds this one, e.g. boolq/test.json; the folder is then given as its data."""
    split: str = "test"
    """The split of a hub data set."""
    prompt: str
    """A column's name, or a template with {column}."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template."""
    images: str | None = None
    """The column of the pictures that the prompt is about; it is then put into the processor's chat template."""
    videos: str | None = None
    """Likewise the column of videos."""
    root: str | None = None
    """The folder in which relative names of pictures begin; null: that of the data; within data with in_folder."""

    @property
    def shows(self) -> list[str]:
        """The columns of what is shown with the prompt, pictures before videos."""
        return [column for column in (self.images, self.videos) if column is not None]

    def templates(self) -> list[str]:
        """Every text that names columns."""
        return [getattr(self, name) for name in self.named_in]

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """One example a row.

        Raises:
            DoraError: if an answer is none of those that can be given, or a text to score is empty.
        """
        raise NotImplementedError


class ChoiceTask(Task):
    """Multiple choice by log-likelihood; each row has its own choices."""

    kind: Literal["choice"] = "choice"
    choices: str | Annotated[tuple[str, ...], Field(min_length=2)]
    """A column that holds a list, or one column or template for each choice."""
    answer: str
    """A column or template that gives the right choice's index, its letter (A, B, ...) or its text."""
    first_index: Literal[0, 1] = 0
    """The index of the first choice in the answer column."""
    before_choice: str | None = None
    """Stands between prompt and choice; null: a space, or nothing after a chat template."""
    length_normalise: Literal["none", "tokens", "bytes"] = "none"
    """Divide each log-likelihood by the choice's length."""

    def templates(self) -> list[str]:
        return [*super().templates(), *([self.choices] if isinstance(self.choices, str) else self.choices)]

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        made, bad = [], Counter[str]()
        before = self.before_choice if self.before_choice is not None else "" if self.chat or self.shows else " "
        for row in rows:
            texts = [str(text) for text in self._choices_of(row)]
            truth = find_choice(read_value(self.answer, row), texts, self.first_index)
            if truth is None:
                bad[f"{plain_text(read_value(self.answer, row))} of {len(texts)} choices"] += 1
            else:
                options = tuple(before + text for text in texts)
                made.append(Example(fill(self.prompt, row), texts[truth].strip(), options, truth))
        check_answers(self.name, len(rows), bad, "an index, a letter or the text of one of the choices")
        return made

    def _choices_of(self, row: Row) -> Sequence[Any]:
        if not isinstance(self.choices, str):
            return [fill(choice, row) for choice in self.choices]
        value = row[self.choices]
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UsageError(f"task {self.name}: choices: column {self.choices!r} must hold lists, found {value!r:.80}")
        return value


class ClassificationTask(Task):
    """One of the same few labels for every row, by log-likelihood."""

    kind: Literal["classification"] = "classification"
    labels: Annotated[dict[str, str], BeforeValidator(_labels, json_schema_input_type=dict[str, str] | list[str])]
    """Texts that follow the prompt, as a list, or by the value that stands in the answer column."""
    answer: str
    """A column or template with the true label: one of the texts (or of the values)."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(self.labels) < 2:
            raise ValueError("at least two different labels are needed")
        return self

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        names, options = list(self.labels), tuple(self.labels.values())
        answers = [plain_text(read_value(self.answer, row)) for row in rows]
        check_answers(self.name, len(rows), Counter(a for a in answers if a not in self.labels), ", ".join(names))
        return [
            Example(fill(self.prompt, row), answer, options, names.index(answer))
            for row, answer in zip(rows, answers, strict=True)
        ]


class PerplexityTask(Task):
    """How well the model foresees a text."""

    named_in = ("prompt", "text")
    kind: Literal["perplexity"] = "perplexity"
    prompt: str = ""
    """Comes first and is not scored; may be empty."""
    text: str
    """A column or template."""
    window: int = Field(default=1024, ge=2)
    """Longer texts are scored in pieces of so many tokens, each with one token of the piece before."""

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        made = [Example(fill(self.prompt, row), fill(self.text, row)) for row in rows]
        if empty := sum(not example.answer.strip() for example in made):
            raise DoraError(f"task {self.name}: {empty} of {len(made)} texts are empty; leave those rows out")
        return made
