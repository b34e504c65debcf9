"""`doralib generate`: one prompt, a file of prompts, or a chat; of a diffusion pipeline pictures."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .asking import Asking, Values, complete_fields, find_encoder, find_forms, find_pictures
from .console import console, errors, print_log, show_controls
from .draw import PICTURES, Drawn, draw
from .options import AllowNonfinite, Alpha, Base, Batch, Dtype, Model, Revision, Seed

if TYPE_CHECKING:
    from ..data.prompt_form import PromptForm


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
    from .transcribe import write_down

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
    forms = find_forms(model, named, chat)
    asked = _list_asked(prompt, fields, file, next(iter(forms.values())), about=bool(image or video))
    pictures = find_pictures(image or [], video or [], chat)
    # before the model is loaded: a field that is missing costs nothing
    complete = {name: complete_fields(asked, form, name, system) for name, form in forms.items()}
    loaded, tokenizer = load()
    if _answer_by_features(features or [], model, loaded, tokenizer, prompt, max_new_tokens) or write_down(
        loaded, tokenizer, audio or [], out, batch_size
    ):
        return
    _check_writes(model, loaded)
    load_named_adapters(loaded, named)
    encoder = find_encoder(loaded, tokenizer, model, pictures)
    asking = Asking(loaded, tokenizer, named, forms, max_new_tokens, sampling, encoder, pictures)
    if asked:
        _tell_answers(asking, complete, asked, out, batch_size)
    else:
        asking.chat(system)


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
    asking: Asking,
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


def _check(given: Mapping[str, Any], out: Path | None, adapters: list[str]) -> None:
    """Check options that depend on each other."""
    from ..disk import check_writable

    if len(asked := [name for name, value in given.items() if value]) > 1:
        raise UsageError(f"{' and '.join(asked)}: give one of them")
    if len(adapters) > 1 and out is not None:
        raise UsageError("--out is for one --adapter; several answer on the terminal")
    if out is not None:
        check_writable(out, "--out", folder=False)
