"""What a model is scored on: the kinds of task, each of which makes examples from rows."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..config import Checked, explain_regex, search_text
from ..data.pictures import find_root
from ..data.prepare import BadRow, Row
from ..data.sounds import name_clip
from ..data.templates import value_text
from ..data.videos import Video
from ..errors import DoraError, UsageError
from ..recipe import DataSettings, SeriesSettings
from .example import (
    Example,
    ForecastExample,
    LlavaExample,
    check_answers,
    fill,
    find_choice,
    make_answered,
    plain_text,
    read_value,
)
from .media import check_pictures, find_sounds
from .numbers import read_number
from .vqa import read_yes_no

log = logging.getLogger(__name__)


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


class GenerationTask(Task):
    """What both kinds with generated text say."""

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
        raise NotImplementedError

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

    def predicted(self, text: str) -> str:
        return self.counted(text).strip()


class CaptionTask(GenerationTask):
    """The generated text is compared with the captions that people wrote: CIDEr and BLEU-4."""

    kind: Literal["caption"] = "caption"

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        return [make_answered(fill(self.prompt, row), read_value(self.answer, row)) for row in rows]

    def predicted(self, text: str) -> str:
        return self.counted(text).strip()


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

    def predicted(self, text: str) -> str:
        return self.counted(text).strip()


class TranslationTask(GenerationTask):
    """How much of the answer is in the generated text, over all rows: BLEU and chrF by sacrebleu."""

    kind: Literal["translation"] = "translation"
    tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """sacrebleu's name for how BLEU divides a text into words: zh for Chinese, char where words have no blanks."""

    def predicted(self, text: str) -> str:
        return self.counted(text).strip()


class SummaryTask(GenerationTask):
    """How much of the answer is in the generated text, row by row: ROUGE-1, ROUGE-2 and ROUGE-L."""

    kind: Literal["summary"] = "summary"

    def predicted(self, text: str) -> str:
        return self.counted(text).strip()


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


class SoundTask(Task):
    """What both kinds of task about sounds say; an example's prompt is the name of its sound."""

    named_in = ("audio", "answer")
    prompt: Literal[""] = ""
    audio: str = "audio"
    """The column of the files of sounds."""
    answer: str
    """A column or template with what is right."""
    root: str | None = None
    """The folder that the files are searched from; null: where the data lies."""

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        sounds = find_sounds(self.name, [row[self.audio] for row in rows], find_root(self.root, self.data or ""))
        return [
            Example(name_clip(clip), self.read_answer(row), sound=clip) for clip, row in zip(sounds, rows, strict=True)
        ]

    def read_answer(self, row: Row) -> str:
        """What is right."""
        raise NotImplementedError


class WordsTask(SoundTask):
    """Which words, and characters, of what is spoken are heard wrongly: WER and CER."""

    kind: Literal["words"] = "words"
    language: str | None = None
    """The language that is spoken, for a multilingual model that nothing else tells; null: as it was trained."""

    def read_answer(self, row: Row) -> str:
        return fill(self.answer, row)


class SoundLabelTask(SoundTask):
    """Which label a sound has: accuracy and macro F1 of a model with a head for sounds."""

    kind: Literal["audio-class"] = "audio-class"

    def read_answer(self, row: Row) -> str:
        return plain_text(read_value(self.answer, row))


class LlavaTask(GenerationTask):
    """One of LLaVA-1.5's evaluations, asked and scored as it does; what a server scores is written for it alone."""

    named_in = ()
    kind: Literal["llava"] = "llava"
    benchmark: Literal["gqa", "textvqa", "pope", "sqa", "vqav2", "vizwiz", "mmbench"]
    """Which of them; its data is LLaVA's folder `eval`, or in_folder of it."""
    prompt: Literal[""] = ""
    answer: Literal[""] = ""
    images: Literal["image"] = "image"

    @property
    def folder(self) -> Path:
        """Where its questions are."""
        whole = Path(self.data or "").expanduser()
        return inside if self.in_folder and (inside := whole / self.in_folder).is_dir() else whole

    def read(self, limit: int | None) -> list[Example]:
        """One example for each question, whose picture was opened once."""
        from .llava.questions import read_asked  # noqa: PLC0415  a task is checked without `datasets`

        asked = read_asked(self.benchmark, self.folder)[:limit]
        check_pictures(self.name, [(each.picture,) if each.picture else () for each in asked])
        return [
            LlavaExample(
                each.text,
                next(iter(each.answers), ""),
                pictures=(each.picture,) if each.picture else (),
                question=each,
            )
            for each in asked
        ]


def check_scored(tasks: Sequence[Task]) -> None:
    """Check that each task gives a score here.

    Raises:
        UsageError: naming those that servers score.
    """
    from .llava.scores import SCORED  # noqa: PLC0415  a task is checked without `datasets`

    if sent := [task.name for task in tasks if isinstance(task, LlavaTask) and task.benchmark not in SCORED]:
        raise UsageError(
            f"task {', '.join(sent)}: a server scores the answers; `doralib eval --answers DIR` writes the file for it"
        )


class FolderTask(Task):
    """A task of a folder about pictures or videos, scored as it was published.

    A VL-BART is asked about their features, another model about the videos themselves.
    """

    named_in = ()
    kind: Literal["folder"] = "folder"
    layout: Literal["vlbart", "value"]
    """How the folder that is given as data is laid out, as data.layout of a recipe."""
    task: str
    """Its name there: vqa, gqa, nlvr, caption, tvqa, how2qa, tvc or yc2c."""
    split: Literal["validation", "test"] = "test"
    """Which of its rows."""
    prompt: str = ""
    """Not read: the layout has texts of its own."""
    features: str | None = None
    """The folder of features below the task's own; null: as it is published."""
    videos: Literal["video"] | None = None
    """video: show the videos of layout value themselves, which lie in root or where the layout has them."""
    max_length: int = Field(default=600, ge=2)
    """Tokens of a text."""

    @model_validator(mode="after")
    def _videos_are_values(self) -> Self:
        if self.videos and self.layout != "value":
            raise ValueError(f"videos: layout {self.layout} is about pictures; leave it out")
        return self

    def settings(self) -> DataSettings:
        """The same as settings of a recipe's data."""
        given: dict[str, Any] = {"train": self.data, "validation": self.data, "validation_split": self.split}
        given |= {"layout": self.layout, "tasks": {self.task: 1.0}, "features": self.features}
        return DataSettings(**given, max_length=self.max_length)

    def read(self, limit: int | None) -> list[Example]:
        """One example for each row whose features, or whose video, are there.

        Raises:
            UsageError: if files are missing, or what scores them is not installed.
        """
        from ..data.layouts import choose_tasks, make_questions, read_layout  # noqa: PLC0415  a task is checked without `datasets`
        from .captions import check_caption_tools  # noqa: PLC0415

        settings, where = self.settings(), f"task {self.name}: data"
        if choose_tasks(settings)[self.task].scoring == "caption":
            check_caption_tools(where)
        rows, _ = read_layout(settings, str(self.data), self.split, where)
        files = [[ask["video"]] for ask in make_questions(rows, self.root)] if self.videos else rows["features"]
        there = [(row, seen) for row, seen in zip(rows, files, strict=True) if all(map(os.path.isfile, seen))]
        if not there:
            what = "video" if self.videos else "features"
            raise UsageError(f"{where}: no row has its {what}; the first would be {files[0][0]}")
        known = [(row, seen) for row, seen in there if row["targets"] or row["answers"]][:limit]
        if not known:
            raise UsageError(f"{where}: of no row of {self.split} the answer is known; give another split")
        shown = [tuple(map(Video, seen)) if self.videos else () for _, seen in known]
        if self.videos:
            check_pictures(self.name, shown)
        return [
            Example(row["text"].strip(), [*row["targets"], *row["answers"]][0], row=row, pictures=videos)
            for (row, _), videos in zip(known, shown, strict=True)
        ]


class ForecastTask(Task):
    """How near a model of series comes to what followed, at the last origins of each series."""

    named_in = ()
    kind: Literal["forecast"] = "forecast"
    prompt: str = ""
    series: SeriesSettings
    """Where the series stand, how far ahead is forecast (horizon), and the season that scores compare with."""
    origins: int = Field(default=1, ge=1)
    """So many times each series is forecast, the last time to its end."""
    step: int | None = Field(default=None, ge=1)
    """Values from one origin to the next; null: the horizon."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.series.horizon is None:
            raise ValueError("series.horizon: how many values ahead are scored?")
        if self.series.stride != 1:
            raise ValueError("series.stride is for training; step says how far apart the origins are")
        if self.prompt or self.chat:
            raise ValueError("a model of series is given no prompt")
        return self

    def read(self, limit: int | None) -> list[Example]:
        """An example for each origin of each series; series that cannot be used are logged.

        Raises:
            DoraError: if none is left.
        """
        from ..data.series import read_series  # noqa: PLC0415  a task is checked without `datasets`
        from ..data.windows import Origin  # noqa: PLC0415

        assert self.series.horizon is not None, "checked by _whole"
        horizon, step = self.series.horizon, self.step or self.series.horizon
        table = read_series(self.data or "", f"task {self.name}: data", self.series, self.split)
        report = table.report
        made: list[Example] = []
        for series in table.series:
            places = [len(series.values) - horizon - step * i for i in range(self.origins)]
            if min(places) < max(horizon, 2):
                needed = 2 * horizon + step * (self.origins - 1)
                report.drop(series.name, BadRow(f"shorter than {needed}", f"{len(series.values)} values"))
                continue
            origins = [Origin(series, at, horizon) for at in reversed(places)]
            made += [ForecastExample(origin.name(), "", origin=origin) for origin in origins]
        if lines := report.lines():
            log.warning("\n".join([f"task {self.name}: {lines[0]}", *lines[1:]]))
        if not made:
            raise DoraError(f"task {self.name}: no series can be scored")
        return made[:limit]


KINDS: dict[str, type[Task]] = {
    "choice": ChoiceTask,
    "classification": ClassificationTask,
    "exact_match": ExactMatchTask,
    "regex": RegexTask,
    "number": NumberTask,
    "first_label": FirstLabelTask,
    "vqa": VqaTask,
    "yes_no": YesNoTask,
    "caption": CaptionTask,
    "llava": LlavaTask,
    "bertscore": BertScoreTask,
    "translation": TranslationTask,
    "summary": SummaryTask,
    "words": WordsTask,
    "audio-class": SoundLabelTask,
    "perplexity": PerplexityTask,
    "folder": FolderTask,
    "forecast": ForecastTask,
}
