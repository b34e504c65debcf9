"""The kinds of task whose answer is a text that the model writes."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..config import explain_regex, search_text
from ..data.prepare import Row
from ..data.templates import value_text
from .example import Example, check_answers, fill, make_answered, plain_text, read_value
from .numbers import read_number
from .task import Task
from .vqa import read_yes_no


class GenerationTask(Task):
    """What every kind with generated text says."""

    answer: str
    """A column or template with the right answer."""
    max_new_tokens: int = Field(default=64, ge=1)
    num_beams: int = Field(default=1, ge=1)
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    after_last: str | None = None
    """Only the text behind the last of these counts, should the model write it again."""
    lowercase: bool = False
    """Compare without regard to case."""

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        return [Example(fill(self.prompt, row), self.normal(plain_text(read_value(self.answer, row)))) for row in rows]

    def predicted(self, text: str) -> str:
        """The answer in a generated text."""
        return self.counted(text).strip()

    def counted(self, text: str) -> str:
        """The part of a generated text that counts."""
        return text.rpartition(self.after_last)[2] if self.after_last else text

    def normal(self, text: str) -> str:
        """The form in which answers are compared."""
        return text.lower() if self.lowercase else text


class ExactMatchTask(GenerationTask):
    """The generated text must be the answer."""

    kind: Literal["exact_match"] = "exact_match"
    strip: bool = True
    """Leave out space around the generated text."""

    def predicted(self, text: str) -> str:
        text = self.counted(text)
        return self.normal(text.strip() if self.strip else text)


class RegexTask(GenerationTask):
    """The first match of a regular expression in the generated text must be the answer."""

    kind: Literal["regex"] = "regex"
    pattern: str
    """The whole match counts, or the first group if there is one; no match gives an empty answer."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        if why := explain_regex(self.pattern):
            raise ValueError(f"pattern: {why}")
        return self

    def predicted(self, text: str) -> str:
        found = search_text(self.pattern, self.counted(text), ignore_case=self.lowercase)
        if found is None:
            return ""
        return self.normal((found[1] if found.groups() else found[0]) or "")


class NumberTask(GenerationTask):
    """The last number in the generated text must be the last one in the answer: see `read_number`."""

    kind: Literal["number"] = "number"

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        answers = [plain_text(read_value(self.answer, row)) for row in rows]
        numbers = [self.predicted(answer) for answer in answers]
        without = Counter(answer for answer, number in zip(answers, numbers, strict=True) if not number)
        check_answers(self.name, len(rows), without, "a text with a number")
        return [Example(fill(self.prompt, row), number) for row, number in zip(rows, numbers, strict=True)]

    def predicted(self, text: str) -> str:
        return read_number(self.counted(text))


class FirstLabelTask(GenerationTask):
    """The known label that comes first in the generated text must be the answer: FinLoRA's way."""

    kind: Literal["first_label"] = "first_label"
    labels: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The known labels; null: every answer of the data, as FinLoRA has it."""
    separator: str | None = None
    """Text and answer are several, parted by this: each is an answer of its own."""

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        # as they are written: F1 compares them with whole texts
        made = [Example(fill(self.prompt, row), value_text(read_value(self.answer, row))) for row in rows]
        if self.labels is not None:
            known = {self.normal(label) for label in self.labels}
            bad = Counter(example.answer for example in made if self.normal(example.answer) not in known)
            check_answers(self.name, len(rows), bad, ", ".join(self.labels))
        return made

    def divide(self, text: str) -> list[str]:
        """The answers in a text."""
        return (
            [text]
            if self.separator is None
            else [part.strip().replace("\n", "") for part in text.split(self.separator)]
        )

    def find_label(self, text: str, known: Collection[str]) -> str:
        """The known label that begins first, the longest where several do; empty if there is none."""
        text = self.normal(text)
        found = [(at, -len(label), label) for label in known if (at := text.find(label)) >= 0]
        return min(found)[2] if found else ""


class VqaTask(GenerationTask):
    """The generated text is compared with what people answered: VQA's soft accuracy.

    The answer column holds a list of answers, or of {answer: ...}, or one text, which is then right or wrong.
    """

    kind: Literal["vqa"] = "vqa"

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        return [make_answered(fill(self.prompt, row), read_value(self.answer, row)) for row in rows]


class CaptionTask(GenerationTask):
    """The generated text is compared with the captions that people wrote: CIDEr and BLEU-4."""

    kind: Literal["caption"] = "caption"

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        return [make_answered(fill(self.prompt, row), read_value(self.answer, row)) for row in rows]


class YesNoTask(GenerationTask):
    """Yes or no, as POPE reads it: no, where the first sentence says no or not, and yes elsewhere."""

    kind: Literal["yes_no"] = "yes_no"

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        answers = [plain_text(read_value(self.answer, row)).lower() for row in rows]
        answers = [{"true": "yes", "1": "yes", "false": "no", "0": "no"}.get(answer, answer) for answer in answers]
        check_answers(self.name, len(rows), Counter(a for a in answers if a not in ("yes", "no")), "yes, no")
        return [Example(fill(self.prompt, row), answer) for row, answer in zip(rows, answers, strict=True)]

    def predicted(self, text: str) -> str:
        return read_yes_no(self.counted(text).strip())


class BertScoreTask(GenerationTask):
    """How alike the generated text and the answer are to an encoder: BERTScore (arXiv 1904.09675)."""

    kind: Literal["bertscore"] = "bertscore"
    scorer: str
    """The encoder: a folder or a hub name."""
    scorer_layer: int = Field(ge=1)
    """The layer whose vectors are compared, counted from 1."""


class TranslationTask(GenerationTask):
    """How much of the answer is in the generated text, over all rows: BLEU and chrF by sacrebleu."""

    kind: Literal["translation"] = "translation"
    tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """sacrebleu's name for how BLEU divides a text into words: zh for Chinese, char where words have no blanks."""


class SummaryTask(GenerationTask):
    """How much of the answer is in the generated text, row by row: ROUGE-1, ROUGE-2 and ROUGE-L."""

    kind: Literal["summary"] = "summary"
