"""The kinds of task about sounds, pictures, videos and series, and those of published folders."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..data.pictures import find_root
from ..data.prepare import BadRow, Row
from ..data.sounds import name_clip
from ..data.videos import Video
from ..errors import DoraError, UsageError
from ..recipe import DataSettings, SeriesSettings
from .example import Example, ForecastExample, LlavaExample, fill, plain_text, read_value
from .media import check_pictures, find_sounds
from .task import Task
from .task_generated import GenerationTask

log = logging.getLogger(__name__)


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
