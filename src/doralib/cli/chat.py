"""A chat in the terminal: a line that begins with / is a command, everything else is said to the model.

A model that was trained on single prompts is asked single questions, in the form of its training.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapters.adapt import disable, enable
from ..adapters.multiple import set_adapter
from ..data.conversations import Conversation
from ..data.encoding import chat_text, context_length, encode
from ..data.picture_encoder import PictureEncoder, PictureText
from ..data.picture_rows import PictureRow, Seen, ask_with_pictures
from ..data.pictures import Picture, measure_pictures
from ..data.prepare import BadRow
from ..data.prompt_form import PromptForm
from ..data.videos import Video, measure_video
from ..disk import replacing
from ..errors import UsageError, did_you_mean
from ..evaluation.generation import GREEDY, Sampling, describe_ends, stream, stream_about

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK = '"""'
"""Begins and ends a text of several lines."""
_BASE = "base"


@dataclass
class Chat:
    """A conversation with a model; `run` is its loop.

    Ctrl-C ends an answer, which is then forgotten with its question; at the prompt it ends the chat.

    Raises:
        UsageError: if the tokenizer has no chat template.
    """

    model: nn.Module
    """As for `generate`."""
    tokenizer: "PreTrainedTokenizerBase"
    """The model's, with a chat template."""
    read: Callable[[str], str]
    """Like `input`: shows a prompt, returns a line or a pasted text, raises EOFError at the end."""
    write: Callable[[str], None]
    """Shows a piece of text, without a line end of its own."""
    max_new_tokens: int = 512
    """The most tokens an answer gets."""
    sampling: Sampling = GREEDY
    """How tokens are chosen."""
    system: str = ""
    """What the model is told before the conversation."""
    adapters: Mapping[str, "PreTrainedTokenizerBase"] = field(default_factory=dict)
    """Names of the model's adapters that can be switched to, each with its tokenizer."""
    form: PromptForm | None = None
    """Ask each question by itself in this form; None: a conversation, in the chat template."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """What was said since the last /reset; of single questions the last."""
    encoder: PictureEncoder | None = None
    """Of a model that takes pictures."""
    waiting: list[Seen] = field(default_factory=list)
    """Pictures and videos that the next question is about."""
    pictures: list[Seen] = field(default_factory=list)
    """Those of the messages, in their order."""

    def __post_init__(self) -> None:
        if self.form is None and self.encoder is None:
            chat_text(self.tokenizer, [{"role": "user", "content": ""}])
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "this list"),
            "/reset": (self._reset, "forget the conversation"),
            "/system": (self._set_system, "TEXT: what the model is told first; without a text, show it"),
            "/set": (
                self._set,
                "NAME VALUE: temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed",
            ),
            "/save": (self._save, "FILE: add the conversation to a .jsonl file, as a row that `train` reads"),
        }
        if self.encoder is not None:
            self._commands["/image"] = (self._add_image, "FILE: the next question is about this picture too")
            if self.encoder.video_place is not None:
                self._commands["/video"] = (self._add_video, "FILE: the next question is about this video too")
        if self._asks_alone():
            # nothing is remembered
            del self._commands["/reset"], self._commands["/save"], self._commands["/system"]
        if self.adapters:
            self._commands["/adapter"] = (self._switch, f"NAME: answer with {', '.join(self.adapters)} or {_BASE}")

    def run(self) -> list[dict[str, Any]]:
        """Talk until /quit or the end of the input; returns the messages since the last /reset."""
        ends = describe_ends(self.model, self.tokenizer)
        self.write(f"/help shows the commands, /quit ends the chat; an answer ends at {ends}\n")
        if self._asks_alone():
            assert self.form is not None
            asked = self.form.prompt or f"style {self.form.style}"
            self.write(f"each question stands by itself, in the form of the training: {asked!r}\n")
        while (text := self._read_text()) is not None and text != "/quit":
            name, _, rest = text.partition(" ")
            if name in self._commands:
                self._run_command(self._commands[name][0], rest.strip())
            elif text.startswith("/") and "\n" not in text:
                hint = did_you_mean(name, self._commands)
                self.write(f"there is no command {name}{hint}; /help shows those that there are\n")
            elif text:
                self._say(text)
        return self.messages

    def _read_text(self, shown: str = "> ") -> str | None:
        """What the user says, or None at the end; between two lines of three quotes a text of several lines."""
        try:
            line = self.read(shown).strip()
            if not line.startswith(_BLOCK):
                return line
            lines = [line.removeprefix(_BLOCK)]
            while not lines[-1].rstrip().endswith(_BLOCK):
                lines.append(self.read(". "))
            return "\n".join(lines).strip().removesuffix(_BLOCK).strip()
        except (EOFError, KeyboardInterrupt):
            return None

    def _run_command(self, command: Callable[[str], None], rest: str) -> None:
        try:
            command(rest)
        except (UsageError, OSError) as error:
            self.write(f"{error}\n")

    def _help(self, _rest: str) -> None:
        for name, (_, what) in self._commands.items():
            self.write(f"{name:10}{what}\n")
        self.write(f"{'/quit':10}end the chat, as Ctrl-D and Ctrl-C do; Ctrl-C during an answer ends the answer\n")
        self.write(f"{_BLOCK:10}begins and ends a text of several lines\n")

    def _asks_alone(self) -> bool:
        """Whether each question stands by itself; about pictures there is a conversation."""
        return self.form is not None and not self.form.pictures

    def _add_image(self, name: str) -> None:
        picture = Picture(str(Path(name).expanduser()))
        (found,) = measure_pictures([picture]).values()
        if not name or isinstance(found, BadRow):
            raise UsageError(f"/image FILE: {found}" if name else "/image FILE: name a file")
        self.waiting.append(picture)
        self.write(f"{name}, {found[0]} x {found[1]} pixels: ask about it\n")

    def _add_video(self, name: str) -> None:
        assert self.encoder is not None, "the command is there with it alone"
        film = measure_video(Video(str(Path(name).expanduser())), self.encoder.frames) if name else None
        if film is None or isinstance(film, BadRow):
            raise UsageError(f"/video FILE: {film}" if name else "/video FILE: name a file")
        self.waiting.append(Video(str(Path(name).expanduser()), film))
        self.write(f"{name}, {film.total} frames, of which {len(film.places)} are seen: ask about it\n")

    def _reset(self, _rest: str) -> None:
        self.messages, self.pictures = [], []
        self.write("forgotten\n")

    def _set_system(self, text: str) -> None:
        if text:
            self.system = text
        self.write(f"system: {self.system}\n" if self.system else "the model is told nothing first\n")

    def _set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        settings = {**self.sampling.model_dump(), "max_new_tokens": self.max_new_tokens}
        if not value.strip():
            shown = {key: each for key, each in settings.items() if not isinstance(each, tuple)}
            self.write("".join(f"{key} {each}\n" for key, each in shown.items()))
        elif name == "max_new_tokens":
            if not value.strip().isdecimal() or int(value) < 1:
                raise UsageError(f"max_new_tokens is a whole number from 1 on, not {value.strip()!r}")
            self.max_new_tokens = int(value)
        else:
            self.sampling = Sampling(**{**self.sampling.model_dump(), name: value.strip()})

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if not name or not self.messages:
            raise UsageError("/save FILE.jsonl: name a file" if self.messages else "there is nothing to save yet")
        if path.suffix != ".jsonl":
            raise UsageError(f"/save {name}: a conversation is a line of a .jsonl file; give the name that ending")
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        kinds = {"images": Picture, "videos": Video}
        seen = {
            name: [str(Path(each.path).absolute()) for each in self.pictures if isinstance(each, kind)]
            for name, kind in kinds.items()
        }
        shown = {name: files for name, files in seen.items() if files}
        row = json.dumps({"messages": self._with_system(self.messages), **shown}, ensure_ascii=False)
        with replacing(path) as part:
            gap = "" if before.endswith("\n") or not before else "\n"
            part.write_text(f"{before}{gap}{row}\n", encoding="utf-8")
        self.write(f"saved: row {len(before.splitlines()) + 1} of {path}\n")

    def _switch(self, name: str) -> None:
        if name == _BASE:
            disable(self.model)
        elif name in self.adapters:
            enable(self.model)
            set_adapter(self.model, name)
            self.tokenizer = self.adapters[name]
        else:
            known = ", ".join([*self.adapters, _BASE])
            raise UsageError(f"there is no adapter {name!r}{did_you_mean(name, self.adapters)}; there are {known}")
        self.write(f"answers are of {name} now\n")

    def _say(self, text: str) -> None:
        """Answer, or forget the question where no answer comes."""
        if self.encoder is not None:
            self._say_about(self.encoder, text)
            return
        if self.form is not None:
            self.messages = []
        self.messages.append({"role": "user", "content": text})
        prompt = self._fit() if self.form is None else self._ask(self.form, text)
        answer = None if prompt is None else self._answer(prompt)
        self.write("\n")
        if answer is None:
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": answer})

    def _say_about(self, encoder: PictureEncoder, text: str) -> None:
        """Answer with the pictures of the conversation in view, or forget the question."""
        if self.form is not None and len(self.form.fields) == 1:
            text = self.form.ask({"prompt": text})
        try:
            asked = ask_with_pictures(text, self.waiting)
        except BadRow as bad:
            self.write(f"{bad}\n")
            return
        before, seen = len(self.messages), len(self.pictures)
        self.messages += asked.talk.messages
        self.pictures += asked.pictures
        prompt = self._fit_about(encoder)
        answer = None if prompt is None else self._answer(prompt)
        self.write("\n")
        if answer is None:
            del self.messages[before:], self.pictures[seen:]
            return
        self.waiting = []
        self.messages.append({"role": "assistant", "content": answer.strip()})

    def _fit_about(self, encoder: PictureEncoder) -> PictureText | None:
        """`_fit` for a conversation about pictures, which is not shortened."""
        talk = Conversation(self._with_system(self.messages), [False] * (len(self.messages) + bool(self.system)))
        limit = context_length(self.model)
        try:
            prompt = encoder.ask(PictureRow(talk, tuple(self.pictures)))
            too_long = limit is not None and encoder.count(prompt) + self.max_new_tokens > limit
        except BadRow as bad:
            self.write(str(bad))
            return None
        if too_long:
            self.write(f"that is too long: the model takes {limit} tokens with its pictures; /reset begins anew")
        return None if too_long else prompt

    def _with_system(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]

    def _fit(self) -> str | None:
        """The conversation as text, without its oldest turns where it is too long; None if the last is too long too."""
        limit, kept = context_length(self.model), list(self.messages)
        render = lambda: chat_text(self.tokenizer, self._with_system(kept))
        length = lambda: len(encode(self.tokenizer, render(), chat=True)) + self.max_new_tokens
        too_long = lambda: limit is not None and length() > limit
        while too_long() and len(kept) > 1:
            del kept[:2]  # a question and its answer
        if too_long():
            self.write(f"that is too long: the model takes {limit} tokens with the {self.max_new_tokens} of the answer")
            return None
        if len(kept) < len(self.messages):
            self.write(f"(the oldest turns are forgotten: the model takes {limit} tokens)\n")
            self.messages = kept
        return render()

    def _ask(self, form: PromptForm, text: str) -> str | None:
        """A single question in its form, of which the first field is given; None if it is too long, or not said."""
        first, *others = form.fields
        values = {first: text, **{name: self._read_text(f"{name}> ") for name in others}}
        if not all(value is not None for value in values.values()):
            return None
        try:
            prompt = form.render({name: str(value) for name, value in values.items()}, self.tokenizer)
        except UsageError as error:
            self.write(str(error))
            return None
        limit = context_length(self.model)
        if limit is not None and len(encode(self.tokenizer, prompt)) + self.max_new_tokens > limit:
            self.write(f"that is too long: the model takes {limit} tokens with the {self.max_new_tokens} of the answer")
            return None
        return prompt

    def _answer(self, prompt: str | PictureText) -> str | None:
        """The answer, written as it comes; None if the user stopped it."""
        given: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "sampling": self.sampling}
        try:
            if isinstance(prompt, PictureText):
                assert self.encoder is not None
                answer = stream_about(self.model, self.encoder, prompt, self.write, **given)
            else:
                answer = stream(self.model, self.tokenizer, prompt, self.write, chat=self.form is None, **given)
        except KeyboardInterrupt:
            self.write("\n(stopped)")
            return None
        if answer.cut:
            self.write(f"\n(cut after {self.max_new_tokens} tokens; /set max_new_tokens N allows more)")
        elif answer.empty:
            self.write(f"(an empty answer: {answer.empty})")
        return answer.text
