"""How a run is used: commands and code with its own paths in them, and what its training ends with."""

import shlex
from pathlib import Path

from .charts import number_text, time_text
from .record import RunRecord, Values, is_series, numbers

_SHOWN = 80  # characters of an example
_OF_SPEECH = ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC")


def list_commands(record: RunRecord, place: str | None = None) -> dict[str, str]:
    """What can be typed or run, by what it is for; nothing that would fail on this run.

    Args:
        place: Another name of the run, such as that on the hub.
    """
    run, whole = shlex.quote(place or str(record.path)), record.summary.get("method") == "full"
    typed = [line for line in (generate_command(record, place), None if place else _eval_command(record, run)) if line]
    found = {"Try it": "\n".join(typed)} if typed else {}
    name = place or str(record.path)
    if not whole:
        merged = "merged" if place else shlex.quote(f"{record.path}-merged")
        verify = "" if record.unit == "pictures" else " --verify"
        found["Merge it into a checkpoint of its own"] = f"doralib merge {run} --out {merged}{verify}"
    if record.unit == "pictures":
        found["Load it in diffusers"] = diffusers_code(record, name)
        return found
    found["Load it in Python"] = f"from doralib import load_model\n\nmodel, tokenizer = load_model({name!r})"
    if record.form and not whole:
        # PEFT needs to be told of a head, and of what else is no language model
        found["Load it in PEFT"] = peft_code(record, name)
    return found


def generate_command(record: RunRecord, place: str | None = None) -> str | None:
    """The command that asks a run something in the form of its training; None for what gives no text."""
    command = f"doralib generate {shlex.quote(place or str(record.path))}"
    if record.summary.get("auto_class") in _OF_SPEECH:
        given: Values = next((each["given"] for each in record.samples if isinstance(each.get("given"), dict)), {})
        sound = str(given.get("audio", "")) if place is None else ""
        return f"{command} --audio {shlex.quote(sound or 'FILE')}"
    if any(is_series(sample) for sample in record.samples):
        train = record.config.get("data", {}).get("train") if place is None else None
        return f"{command} --file {shlex.quote(train if isinstance(train, str) else 'SERIES.csv')} --out forecasts.csv"
    if record.unit == "pictures":
        prompt = str(record.samples[0].get("prompt", "")) if record.samples and place is None else "PROMPT"
        return f"{command} --prompt {shlex.quote(prompt)} --out picture.png"
    if not record.form:
        return None
    if record.form.get("pictures"):
        return f"{command} --image PICTURE{' --prompt TEXT' if record.form.get('fields') else ''}"
    if record.form.get("style") == "chat":
        return command
    fields = [str(name) for name in record.form.get("fields") or ["prompt"]]
    given = next((each["given"] for each in record.samples if isinstance(each.get("given"), dict)), {})
    # rows of the training are for those alone who have the run
    texts = {name: _shorten(str(given.get(name, ""))) if place is None else "" for name in fields}
    if len(fields) == 1:
        return f"{command} --prompt {shlex.quote(texts[fields[0]] or 'TEXT')}"
    typed = [f"{name}={text or 'TEXT'}" for name, text in texts.items()]
    return " ".join([command, *(f"--field {shlex.quote(each)}" for each in typed)])


def closing_lines(record: RunRecord, report: Path) -> dict[str, str]:
    """How a training came out, in a few lines: its time and loss, the page, and what to type next."""
    losses = {"loss": numbers(record.train, "loss"), "validation loss": numbers(record.evals, "eval_loss")}
    last = [f"{name} {number_text(points[-1][1])}" for name, points in losses.items() if points]
    seconds, commands = record.summary.get("seconds"), list_commands(record)
    time = f" in {time_text(seconds)}" if isinstance(seconds, int | float) else ""
    told = commands.get("Try it") or commands.get("Merge it into a checkpoint of its own") or ""
    return {
        "trained": ", ".join([f"{record.summary.get('steps', 0):,} steps{time}", *last]),
        "report": str(report),
        **({"next": told.splitlines()[0]} if told else {}),
    }


def diffusers_code(record: RunRecord, run: str) -> str:
    """What loads a run's adapter in diffusers."""
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(record.summary.get('base_model'))!r})\n"
        f'pipeline.load_lora_weights({run!r}, weight_name="pytorch_lora_weights.safetensors")'
    )


def _eval_command(record: RunRecord, run: str) -> str | None:
    tasks = (record.config.get("eval") or {}).get("tasks") if isinstance(record.config.get("eval"), dict) else None
    return f"doralib eval {run} --tasks {shlex.quote(','.join(map(str, tasks)))}" if tasks else None


def _shorten(text: str) -> str:
    """The first line, up to a blank where it is long."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= _SHOWN else line[:_SHOWN].rpartition(" ")[0] or line[:_SHOWN]


def peft_code(record: RunRecord, run: str) -> str:
    """What loads a run in PEFT, with its model's own class."""
    base, auto = str(record.summary.get("base_model")), str(record.summary.get("auto_class", "AutoModelForCausalLM"))
    where, more = repr(base), ""
    if base.endswith(".gguf"):
        where, more = repr(str(Path(base).parent)), f", gguf_file={Path(base).name!r}"
    words = "Processor" if auto == "AutoModelForImageTextToText" or auto in _OF_SPEECH else "Tokenizer"
    return (
        "from peft import PeftModel\n"
        f"from transformers import {auto}, Auto{words}\n\n"
        f"model = {auto}.from_pretrained({where}{more})\n"
        f"model = PeftModel.from_pretrained(model, {run!r})\n"
        f"{words.lower()} = Auto{words}.from_pretrained({run!r})"
    )
