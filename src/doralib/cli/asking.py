"""A loaded model that is asked: in which form, about what, and what it answers."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .console import errors

if TYPE_CHECKING:
    from ..data.picture_encoder import PictureEncoder
    from ..data.picture_rows import Seen
    from ..data.prompt_form import PromptForm
    from ..evaluation.generation import Answer

Values = Mapping[str, str]


def find_forms(model: str, named: Mapping[str, Path], chat: bool | None) -> "dict[str, PromptForm | None]":
    """How each adapter of a model is asked, or the model itself: as was said, or else as in its training."""
    from ..data.prompt_form import PromptForm, read_form

    places: Mapping[str, Path | str] = named or {model: model}
    if chat is None:
        return {name: read_form(place) for name, place in places.items()}
    return dict.fromkeys(places, PromptForm(style="chat", fields=("prompt",)) if chat else None)


def complete_fields(asked: "Sequence[Values]", form: "PromptForm | None", model: str, system: str) -> list[Values]:
    """What is asked, by the fields of the form.

    Raises:
        UsageError: if a field is missing or there is none of that name, with what to type.
    """
    if form is None:
        if system:
            raise UsageError("--system is for a conversation; give --chat, or put it into the text of the prompt")
        if other := next((name for values in asked for name in values if name != "prompt"), None):
            raise UsageError(f"--field {other}: {model} does not say in which form it was trained; give a --prompt")
        return list(asked)
    if form.pictures:
        told = {"system": system} if system else {}
        return [{"prompt": form.ask(values), **told} for values in asked]
    if system and form.style not in ("chat", "alpaca"):
        raise UsageError(f"--system: {model} was trained on prompts of style {form.style}, which have no such part")
    found: list[Values] = []
    for values in asked:
        try:
            found.append({**form.read(values), **({"system": system} if system else {})})
        except UsageError as error:
            typed = " ".join(f"--field {name}=TEXT" for name in form.fields)
            raise UsageError(f"{model}: {error}\n  give {typed}, or the whole text as --prompt with --raw") from None
    return found


@dataclass(frozen=True)
class Asking:
    """A loaded model, and in which form it, or each of its adapters, is asked."""

    model: Any
    tokenizer: Any
    named: Mapping[str, Path]
    """The places of its adapters."""
    forms: "Mapping[str, PromptForm | None]"
    max_new_tokens: int
    sampling: Any
    encoder: "PictureEncoder | None" = None
    """Of a model that takes pictures."""
    pictures: "Sequence[Seen]" = ()
    """What every prompt is about."""

    def chat(self, system: str) -> None:
        """A conversation; or single questions, where the model was trained on those."""
        from ..adapters.inference import unchanged
        from .chat import Chat

        form = next(iter(self.forms.values()))
        own = {name: self._find_tokenizer(name) for name in self.named}
        with unchanged(self.model):
            Chat(
                self.model,
                next(iter(own.values()), self.tokenizer if self.encoder is None else self.encoder.tokenizer),
                _reader(),
                _write,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                system=system,
                adapters=own,
                form=form if form is not None and (form.pictures or not form.closed) else None,
                encoder=self.encoder,
                waiting=list(self.pictures),
            ).run()

    def answer(self, name: str, questions: Sequence[Values], batch_size: int) -> list[str]:
        """The answers of the model, or of its adapter of this name; an empty one is told of."""
        from ..adapters.inference import unchanged
        from ..adapters.multiple import set_adapter
        from ..evaluation.generation import answer_texts

        if name in self.named:
            set_adapter(self.model, name)
        if self.encoder is not None:
            return self._answer_about(self.encoder, questions, batch_size)
        form, tokenizer = self.forms[name], self._find_tokenizer(name)
        texts = [form.render(values, tokenizer) if form else values["prompt"] for values in questions]
        with unchanged(self.model):
            answers = answer_texts(
                self.model,
                tokenizer,
                texts,
                max_new_tokens=self.max_new_tokens,
                batch_size=batch_size,
                chat=form is not None and form.closed,
                sampling=self.sampling,
            )
        return _tell_empty(answers)

    def _answer_about(self, encoder: "PictureEncoder", questions: Sequence[Values], batch_size: int) -> list[str]:
        """The answers to questions, each about the pictures."""
        from ..adapters.inference import unchanged
        from ..data.picture_rows import ask_with_pictures
        from ..data.prepare import BadRow
        from ..evaluation.generation import answer_pictures

        try:
            asked = [
                encoder.ask(ask_with_pictures(values["prompt"], self.pictures, values.get("system", "")))
                for values in questions
            ]
        except BadRow as bad:
            raise UsageError(f"{_name_seen(self.pictures)}: {bad}") from None
        with unchanged(self.model):
            answers = answer_pictures(
                self.model,
                encoder,
                asked,
                max_new_tokens=self.max_new_tokens,
                batch_size=batch_size,
                sampling=self.sampling,
            )
        return [each.strip() for each in _tell_empty(answers)]

    def _find_tokenizer(self, name: str) -> Any:
        from ..checkpoints.load import load_own_tokenizer

        if name not in self.named or self.encoder is not None:
            return self.tokenizer if self.encoder is None else self.encoder.tokenizer
        return load_own_tokenizer(self.model, self.named[name], lambda: self.tokenizer)


def _tell_empty(answers: "Sequence[Answer]") -> list[str]:
    for number, each in enumerate(answers, 1):
        if each.empty:
            errors.print(f"the answer to prompt {number} is empty: {each.empty}")
    return [each.text for each in answers]


def find_pictures(images: Sequence[Path], videos: Sequence[Path], chat: bool | None) -> "list[Seen]":
    """The pictures of --image and the videos of --video, each of which can be read.

    Raises:
        UsageError: if one cannot, or the prompt is to be given as it is.
    """
    from ..data.picture_encoder import measure_seen
    from ..data.pictures import Picture
    from ..data.prepare import BadRow
    from ..data.videos import Video

    if not images and not videos:
        return []
    pictures: list[Seen] = [Picture(str(path.expanduser())) for path in images]
    pictures += [Video(str(path.expanduser())) for path in videos]
    if chat is False:
        raise UsageError(
            f"{_name_seen(pictures)}: with --raw no chat template makes a place for a picture; leave --raw out"
        )
    # the frames are chosen once the model is loaded, which may say how many
    found = measure_seen(pictures, 1)
    if bad := [f"{_name_seen([seen])}: {look}" for seen, look in found.items() if isinstance(look, BadRow)]:
        raise UsageError("\n".join(bad))
    return pictures


def _name_seen(pictures: "Sequence[Seen]") -> str:
    """The option that gave the first of them."""
    from ..data.videos import Video

    return "--video" if isinstance(pictures[0], Video) else "--image"


def find_encoder(loaded: Any, processor: Any, model: str, pictures: "Sequence[Seen]") -> "PictureEncoder | None":
    """What writes questions for a model that takes pictures; None for others.

    Raises:
        UsageError: if there are pictures and the model takes none.
    """
    from ..data.picture_encoder import make_encoder

    if hasattr(processor, "image_processor"):
        return make_encoder(loaded, processor)
    if pictures:
        option = _name_seen(pictures)
        raise UsageError(f"{option}: {model} takes text alone, and no pictures; leave {option} out")
    return None


def _reader() -> Callable[[str], str]:
    """Lines with arrows, history and pasted texts at a terminal; plain lines from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession

    return PromptSession().prompt


def _write(text: str) -> None:
    print(text, end="", flush=True)
