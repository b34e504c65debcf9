"""The form in which a model was asked in training, kept beside what was trained, so that it is asked so again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from ..config import Checked
from ..errors import DoraError, UsageError, did_you_mean
from ..files import read_json, write_json
from ..hub import find_hub_file, is_hub_name
from ..recipe import PROMPT_FILE, DataSettings
from .encoding import chat_text, leave_blanks
from .prepare import BadRow, Row
from .prompts import STYLES, render_row
from .templates import columns_in, fill_template, value_text

_ANSWER = "doralib answer"  # a column that no template can name: of what is rendered it is cut off again
_OPTIONAL = {"alpaca": ("input", "system"), "chat": ("system",)}
_NEEDED = {"alpaca": ("instruction",), "chat": ("prompt",), "text": ("prompt",)}


class PromptForm(Checked):
    """A style of rows, and the template of its prompts."""

    style: str
    """completion, alpaca, chat or text."""
    prompt: str | None = None
    """completion: the template, or a column's name."""
    fields: tuple[str, ...] = ()
    """What a prompt is made of."""
    joined: bool = False
    """Whether prompt and answer were tokenized as one text, so that a blank between them may be the answer's."""
    pictures: bool = False
    """Whether it is asked about pictures."""
    image_pixels: int | None = None
    """The longest side that a picture had in training; None: any."""
    video_frames: int = 8
    """So many frames of a video were seen."""

    @property
    def closed(self) -> bool:
        """Whether a prompt spells its own start and end tokens."""
        return STYLES[self.style].closed

    def read(self, values: Mapping[str, str]) -> dict[str, str]:
        """The values of the fields; a lone ``prompt`` is that of the only field.

        Raises:
            UsageError: if a field has no value, or a value no field.
        """
        given = dict(values)
        if given.keys() == {"prompt"} and len(self.fields) == 1:
            given = {self.fields[0]: given["prompt"]}
        known = (*self.fields, *_OPTIONAL.get(self.style, ()))
        parts = " and ".join(known)
        if unknown := [name for name in given if name not in known]:
            hint = "" if unknown == ["prompt"] else f", not of {unknown[0]!r}{did_you_mean(unknown[0], known)}"
            raise UsageError(f"the prompts of its training are made of {parts}{hint}")
        if missing := [name for name in self.fields if name not in given]:
            raise UsageError(
                f"the prompts of its training are made of {parts}, and {' and '.join(missing)} is not given"
            )
        return given

    def ask(self, values: Mapping[str, str]) -> str:
        """The words of a question about pictures; a ``prompt`` that is no field takes the place of all.

        Raises:
            UsageError: as `read`.
        """
        if values.keys() == {"prompt"} and len(self.fields) != 1:
            return values["prompt"]
        given = self.read(values)
        return fill_template(self.prompt, given) if self.prompt and self.fields else self.prompt or given["prompt"]

    def pick(self, row: Row) -> dict[str, str] | None:
        """What a row of a file has of the fields, or its ``prompt`` for the only one; None: it lacks some."""
        known = (*self.fields, *_OPTIONAL.get(self.style, ()))
        found = {name: row[name] for name in known if isinstance(row.get(name), str)}
        if found.keys() >= set(self.fields):
            return found
        whole = isinstance(row.get("prompt"), str) and len(self.fields) == 1
        return {"prompt": row["prompt"]} if whole else None

    def render(self, values: Mapping[str, str], tokenizer: Tokenizer) -> str:
        """The text that the model was given before an answer, in training, with these values.

        Raises:
            UsageError: as `read`, or if all values are empty.
        """
        given = self.read(values)
        if self.style == "chat":
            told = [{"role": "system", "content": given["system"]}] if given.get("system") else []
            return chat_text(tokenizer, [*told, {"role": "user", "content": given["prompt"]}])
        if not (self.style == "alpaca" or self.prompt):
            return given["prompt"]
        settings = DataSettings(train="-", style=self.style, prompt=self.prompt, target=f"{{{_ANSWER}}}")
        try:
            made = render_row({**given, _ANSWER: "-", "output": "-"}, settings, tokenizer)
        except BadRow as bad:
            raise UsageError(f"there is nothing to ask: {bad}") from None
        prompt = made.text[: made.learned[-1][0]]
        return leave_blanks(tokenizer, prompt) if self.joined else prompt

    def take(self, row: Row) -> dict[str, str]:
        """What a row of data has in the fields."""
        return {} if self.closed else {name: value_text(row[name]) for name in self.fields if name in row}


def make_form(settings: DataSettings, *, joined: bool = False) -> PromptForm | None:
    """The form of the prompts that rows of these settings make; None if their style is not one of single answers."""
    if settings.style in _NEEDED:
        return PromptForm(style=settings.style, fields=_NEEDED[settings.style])
    if settings.style != "completion":
        return None
    columns = columns_in(settings.prompt or "", "data.prompt")
    # a template without a column asks the same of every row, and so does none at all
    fields = tuple(dict.fromkeys(columns)) or ("prompt",)
    return PromptForm(style="completion", prompt=settings.prompt, fields=fields, joined=joined)


def write_form(folder: Path, form: PromptForm) -> None:
    """Keep the form beside an adapter or a model."""
    write_json(folder / PROMPT_FILE, form.model_dump(mode="json"))


def read_form(name: str | Path) -> PromptForm | None:
    """The form of what lies in a folder, in the model of a run, or on the hub by a name; None: it does not say.

    Raises:
        DoraError: if the file is damaged.
    """
    if is_hub_name(name):
        file = find_hub_file(name, PROMPT_FILE)
    else:
        places = (Path(name) / PROMPT_FILE, Path(name) / "model" / PROMPT_FILE)
        file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    said: Any = read_json(file)
    if not isinstance(said, dict) or said.get("style") not in STYLES:
        raise DoraError(f"{file} names no style of prompts; delete it, and ask with --raw")
    return PromptForm(**said)
