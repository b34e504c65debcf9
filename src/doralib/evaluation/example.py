"""What a model is asked, and the right answer: an example, made from a row."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.pictures import Picture
from ..data.prepare import Row
from ..data.sounds import Clip
from ..data.templates import columns_in, fill_template, value_text
from ..data.videos import Video
from ..errors import DoraError, list_some

if TYPE_CHECKING:
    from ..data.windows import Origin
    from .llava.questions import LlavaQuestion

_SHOWN = 12


@dataclass(frozen=True)
class Example:
    """One question."""

    prompt: str
    answer: str
    """Text of the right answer, as it is compared and shown."""
    options: tuple[str, ...] = ()
    """The texts to choose from, with the space before them."""
    truth: int = -1
    """Which option is right."""
    row: Row | None = None
    """Of a layout, what the text alone does not say."""
    answers: tuple[str, ...] = ()
    """What several people answered."""
    pictures: tuple[Picture | Video, ...] = ()
    """What the prompt is about."""
    sound: Clip | None = None
    """What is heard."""


@dataclass(frozen=True)
class LlavaExample(Example):
    """A question of one of LLaVA's evaluations."""

    question: "LlavaQuestion" = field(kw_only=True)


@dataclass(frozen=True)
class ForecastExample(Example):
    """A series and a time from which on it is forecast."""

    origin: "Origin" = field(kw_only=True)


def fill(template: str, row: Row) -> str:
    """The template with the row's values as text; braces in values stay as they are."""
    return fill_template(template, {name: value_text(row[name]) for name in columns_in(template)})


def read_value(template: str, row: Row) -> Any:
    """A column's value as it is, or a filled template."""
    return row[template] if template in row else fill(template, row)


def plain_text(value: Any) -> str:
    """A value of a row or a label as text: true and false, whole numbers without a point, no space around."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def find_choice(answer: Any, texts: Sequence[str], first: int) -> int | None:
    """Which of the texts an answer means: by its text, else its number, else its letter."""
    said = plain_text(answer)
    stripped = [text.strip() for text in texts]
    if said in stripped:
        return stripped.index(said)
    if said.isdecimal():
        index = int(said) - first
    elif len(said) == 1 and said.isalpha() and said.isascii():
        index = ord(said.upper()) - ord("A")
    else:
        return None
    return index if 0 <= index < len(texts) else None


def make_answered(prompt: str, value: Any) -> Example:
    """An example with what several people answered: texts, or {answer: ...}, of which the commonest is shown."""
    given = value if isinstance(value, list | tuple) else [value]
    answers = tuple(plain_text(each.get("answer") if isinstance(each, Mapping) else each) for each in given)
    return Example(prompt, Counter(answers).most_common(1)[0][0] if answers else "", answers=answers or ("",))


def check_answers(name: str, rows: int, bad: Counter[str], allowed: str) -> None:
    """Check that no row of a task has an answer that cannot be given.

    Args:
        name: Of the task.
        rows: How many there are.
        bad: How often there is each answer that cannot be given.
        allowed: What can be, for the error.

    Raises:
        DoraError: naming them.
    """
    if not bad:
        return
    shown = list_some([f"{value!r} ({count})" for value, count in bad.most_common()], _SHOWN, ", ")
    raise DoraError(
        f"task {name}: {bad.total()} of {rows} rows have an answer that cannot be given: {shown}\n"
        f"  allowed: {allowed}; correct the task or remove those rows"
    )
