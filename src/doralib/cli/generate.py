"""`doralib generate`: one prompt, a file of prompts, or a chat; of a diffusion pipeline pictures."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .console import console, errors, print_log, show_controls
from .draw import PICTURES, Drawn, draw
from .options import AllowNonfinite, Alpha, Base, Batch, Dtype, Model, Revision, Seed

if TYPE_CHECKING:
    from ..data.picture_rows import Seen
    from ..data.picture_tokens import PictureEncoder
    from ..data.prompt_form import PromptForm
    from ..evaluation.generation import Answer

Values = Mapping[str, str]


def generate_command(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One prompt.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="One field of the prompt that the run was trained on.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture that is asked about; give it again for several.")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video that is asked about; give it again for several.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts: .txt (a line each), .json, .jsonl; or series.")] = None,
    audio: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A sound to write down; may be given several times.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the answers of --file or --audio as .jsonl; pictures as .png; forecasts as .csv."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="In the chat template, or as it is; else as trained."),
    ] = None,
    base: Base = None,
    revision: Revision = None,
    alpha: Alpha = None,
    allow_nonfinite: AllowNonfinite = False,
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="The longest answer.")] = 128,
    system: Annotated[str, typer.Option(help="What a model is told before a conversation.")] = "",
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: from all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Leave out less than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    batch_size: Batch = 8,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=999, help="Pictures: steps of drawing; else 25.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Pictures: how much the prompt counts.")] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Pictures: height and width in pixels.")] = None,
    negative: Annotated[str | None, typer.Option(help="Pictures: what is not to be seen.")] = None,
    features: Annotated[
        list[Path] | None, typer.Option(help="Of a VL-BART: what doralib features wrote; once for each picture.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Put on MODEL; of several each answers.")
    ] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Of series: forecast so many values.")] = None,
) -> None:
    """Answer prompts, or chat in the terminal.

    What a run was trained on decides how it is asked. With no prompt at all: a chat. A diffusion pipeline draws a
    picture for each prompt, all into one file.
    """
    from ..checkpoints.load import load_model, load_named_adapters, read_named_adapters
    from ..checkpoints.pipelines import find_pipeline
    from ..evaluation.generation import Sampling
    from ..formats.base import Hints
    from ..hub import add_revision
    from .forecast import ForecastRequest, is_series_model, write_forecasts
    from .prompt_file import read_prompts

    fields, given = _read_fields(field or []), Hints(alpha=alpha, allow_nonfinite=allow_nonfinite)
    load = lambda: load_model(add_revision(model, revision), base=base, dtype=dtype, given=given)
    if is_series_model(model, base):
        texts = {
            "--prompt": prompt,
            "--field": fields,
            "--chat": chat,
            "--system": system,
            "--adapter": adapter,
            "--image": image,
            "--video": video,
            "--audio": audio,
        }
        write_forecasts(model, load, ForecastRequest(file, out, horizon, texts), batch_size)
        return
    _check({"--prompt": prompt is not None, "--field": fields, "--file": file, "--audio": audio}, out, adapter or [])
    drawn = {"--steps": steps, "--guidance": guidance, "--size": size, "--negative": negative}
    if (pipeline := find_pipeline(model, base, assume=out is not None and out.suffix.lower() in PICTURES)) is not None:
        _check_no_text(
            {
                "--image": image,
                "--video": video,
                "--audio": audio,
                "--field": fields,
                "--system": system,
                "--chat": chat is not None,
                "--adapter": adapter,
            }
        )
        prompts = [prompt] if prompt is not None else [each["prompt"] for each in read_prompts(file)] if file else []
        draw(Drawn(model, pipeline, dtype, given), prompts, out, seed, drawn)
        return
    _check_text_alone(model, horizon, drawn)
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    # on the standard output stand answers alone
    print_log(errors)
    model, named = add_revision(model, revision), read_named_adapters(adapter or [])
    forms = _find_forms(model, named, chat)
    asked = _list_asked(prompt, fields, file, next(iter(forms.values())), about=bool(image or video))
    pictures = _find_pictures(image or [], video or [], chat)
    # before the model is loaded: a field that is missing costs nothing
    complete = {name: _complete(asked, form, name, system) for name, form in forms.items()}
    loaded, tokenizer = load()
    if _answer_by_features(features or [], model, loaded, tokenizer, prompt, max_new_tokens) or _write_down(
        loaded, tokenizer, audio or [], out, batch_size
    ):
        return
    _check_writes(model, loaded)
    load_named_adapters(loaded, named)
    encoder = _make_encoder(loaded, tokenizer, model, pictures)
    asking = _Asking(loaded, tokenizer, named, forms, max_new_tokens, sampling, encoder, pictures)
    if asked:
        _tell_answers(asking, complete, asked, out, batch_size)
    else:
        asking.chat(system)


def _write_down(model: Any, processor: Any, sounds: Sequence[Path], out: Path | None, batch_size: int) -> bool:
    """Write what is said in each sound; False if the model is one of text, and there is no sound.

    Raises:
        UsageError: if the model hears nothing, there is no sound, or one of them cannot be heard.
    """
    from ..data.prepare import BadRow
    from ..evaluation.transcripts import transcribe
    from .prompt_file import write_answers

    if model.main_input_name == "input_ids" or not hasattr(processor, "feature_extractor"):
        if sounds:
            raise UsageError("--audio: this model reads text; give a --prompt")
        return False
    if not sounds:
        raise UsageError("this model writes what it hears: give a sound with --audio FILE")
    try:
        texts = transcribe(model, processor, [str(sound.expanduser()) for sound in sounds], batch_size=batch_size)
    except BadRow as bad:
        raise UsageError(f"--audio: {bad}") from None
    if out is not None:
        write_answers(out, [{"audio": str(sound)} for sound in sounds], texts)
        console.print(f"{len(texts)} answers written: {out}")
        return True
    for sound, text in zip(sounds, texts, strict=True):
        shown = show_controls(text) if sys.stdout.isatty() else text
        print(f"{sound}: {shown}" if len(sounds) > 1 else shown)
    return True


@dataclass(frozen=True)
class _Asking:
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


def _check_writes(name: str, model: Any) -> None:
    """Raise UsageError if a model gives no text."""
    from ..evaluation.classifier import find_head_kind

    if find_head_kind(model) is not None:
        raise UsageError(f"{name} gives labels and no text; score it with doralib eval")


def _answer_by_features(
    features: Sequence[Path], name: str, model: Any, tokenizer: Any, prompt: str | None, max_new_tokens: int
) -> bool:
    """Print what a VL-BART answers about some features; whether the model is one.

    Raises:
        UsageError: if features are given to another model, or none to a VL-BART.
    """
    from ..evaluation.visual import ask_about

    if not hasattr(model, "visual_embedding"):
        if features:
            raise UsageError(f"--features: {name} is no VL-BART and reads none; leave it out")
        return False
    if prompt is None or not features:
        raise UsageError(
            f"{name} is a VL-BART: give one --prompt as in its training, such as 'vqa: what is it?', and --features"
        )
    if absent := [str(file) for file in features if not file.is_file()]:
        raise UsageError(f"--features: there is no file {', '.join(absent)}; doralib features makes it of a picture")
    print(show_controls(ask_about(model, tokenizer, prompt, list(map(str, features)), max_new_tokens)))
    return True


def _tell_empty(answers: "Sequence[Answer]") -> list[str]:
    for number, each in enumerate(answers, 1):
        if each.empty:
            errors.print(f"the answer to prompt {number} is empty: {each.empty}")
    return [each.text for each in answers]


def _find_pictures(images: Sequence[Path], videos: Sequence[Path], chat: bool | None) -> "list[Seen]":
    """The pictures of --image and the videos of --video, each of which can be read.

    Raises:
        UsageError: if one cannot, or the prompt is to be given as it is.
    """
    from ..data.picture_tokens import measure_seen
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


def _make_encoder(loaded: Any, processor: Any, model: str, pictures: "Sequence[Seen]") -> "PictureEncoder | None":
    """What writes questions for a model that takes pictures; None for others.

    Raises:
        UsageError: if there are pictures and the model takes none.
    """
    from ..data.picture_tokens import make_encoder

    if hasattr(processor, "image_processor"):
        return make_encoder(loaded, processor)
    if pictures:
        option = _name_seen(pictures)
        raise UsageError(f"{option}: {model} takes text alone, and no pictures; leave {option} out")
    return None


def _check_text_alone(model: str, horizon: int | None, drawn: Mapping[str, Any]) -> None:
    """Check that nothing is asked of a model of text that only others can do.

    Raises:
        UsageError: naming each option.
    """
    if horizon is not None:
        raise UsageError(f"--horizon: {model} does not forecast series; leave it out")
    if wrong := [name for name, value in drawn.items() if value is not None]:
        raise UsageError(f"{', '.join(wrong)}: {model} is no diffusion pipeline and draws no pictures; leave it out")


def _check_no_text(given: Mapping[str, Any]) -> None:
    """Check that nothing is asked of a diffusion pipeline that only models of text can do.

    Raises:
        UsageError: naming each option.
    """
    if wrong := [name for name, value in given.items() if value]:
        raise UsageError(f"{', '.join(wrong)}: a diffusion pipeline draws pictures and says nothing; leave it out")


def _tell_answers(
    asking: _Asking,
    complete: Mapping[str, Sequence[Values]],
    asked: Sequence[Values],
    out: Path | None,
    batch_size: int,
) -> None:
    """Print what each adapter answers, or write it."""
    from .prompt_file import write_answers

    for name, questions in complete.items():
        answers = asking.answer(name, questions, batch_size)
        if out is None:
            for each in answers:
                # a pipe gets the answer as it is
                shown = show_controls(each) if sys.stdout.isatty() else each
                print(f"{name}: {shown}" if len(asking.named) > 1 else shown)
        else:
            write_answers(out, asked, answers)
            console.print(f"{len(answers)} answers written: {out}")


def _list_asked(
    prompt: str | None, fields: Values, file: Path | None, form: "PromptForm | None", *, about: bool
) -> list[Values]:
    """What is asked; a caption of pictures in the words of the training."""
    from .prompt_file import read_prompts

    asked: list[Values] = [{"prompt": prompt}] if prompt is not None else [fields] if fields else []
    asked += read_prompts(file, form) if file else []
    if about and not asked and form is not None and form.pictures and not form.fields:
        return [{}]
    return asked


def _find_forms(model: str, named: Mapping[str, Path], chat: bool | None) -> "dict[str, PromptForm | None]":
    """How each adapter of a model is asked, or the model itself: as was said, or else as in its training."""
    from ..data.prompt_form import PromptForm, read_form

    places: Mapping[str, Path | str] = named or {model: model}
    if chat is None:
        return {name: read_form(place) for name, place in places.items()}
    return dict.fromkeys(places, PromptForm(style="chat", fields=("prompt",)) if chat else None)


def _read_fields(given: Sequence[str]) -> dict[str, str]:
    """The fields of one prompt.

    Raises:
        UsageError: if one is not NAME=TEXT, or is given twice.
    """
    pairs = [each.partition("=") for each in given]
    if bad := [name for name, equals, _ in pairs if not (name and equals)]:
        raise UsageError(f"--field {bad[0]}: give a name and a text, NAME=TEXT")
    names = [name for name, _, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--field: {', '.join(twice)} is given twice")
    return {name: text for name, _, text in pairs}


def _complete(asked: "Sequence[Values]", form: "PromptForm | None", model: str, system: str) -> list[Values]:
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


def _check(given: Mapping[str, Any], out: Path | None, adapters: list[str]) -> None:
    """Check options that depend on each other."""
    from ..disk import check_writable

    if len(asked := [name for name, value in given.items() if value]) > 1:
        raise UsageError(f"{' and '.join(asked)}: give one of them")
    if len(adapters) > 1 and out is not None:
        raise UsageError("--out is for one --adapter; several answer on the terminal")
    if out is not None:
        check_writable(out, "--out", folder=False)


def _reader() -> Callable[[str], str]:
    """Lines with arrows, history and pasted texts at a terminal; plain lines from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession

    return PromptSession().prompt


def _write(text: str) -> None:
    print(text, end="", flush=True)
