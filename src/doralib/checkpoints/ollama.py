"""A Modelfile, by which Ollama asks a model in the form of its chat template, or of its training."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.answers import REFUSALS
from ..data.encoding import chat_text
from ..data.prompt_form import PromptForm, read_form
from ..data.turns import find_end_tokens, find_turn_end
from ..disk import replacing
from ..errors import UsageError

# words that no template changes, nor any other text holds
_SYSTEM, _ASKED, _ANSWER, _AGAIN = "SystemText", "QuestionOne", "AnswerOne", "QuestionTwo"


def write_modelfile(folder: Path, weights: str) -> list[str]:
    """Write the Modelfile of a merged folder, whose ``weights`` are a file in it; returns what there is to say."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    form, system = read_form(folder), ""
    lines, notes = [f"FROM ./{weights}"], []
    try:
        if form is None or form.closed:
            template, system = make_chat_template(tokenizer)
        else:
            template = _make_single_template(form, tokenizer)
        lines.append(f'TEMPLATE """{template}"""')
    except UsageError as error:
        notes.append(f"the Modelfile has no TEMPLATE, so Ollama takes the one in the file if it knows it: {error}")
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'PARAMETER stop "{each}"' for each in _list_stops(tokenizer)]
    with replacing(folder / "Modelfile") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


def make_chat_template(tokenizer: Tokenizer) -> tuple[str, str]:
    """The chat template in Ollama's language, and the system text that it puts where none is given.

    Ollama writes a conversation turn by turn, from four texts of the template: what stands before and after a system
    text, before a question, between question and answer, and after an answer. They are cut out of what the template
    renders, and only texts that make the same conversations again are returned.

    Raises:
        UsageError: if there is no chat template, or it is none that can be written so.
    """
    one, told = _cut(tokenizer, [_ASKED]), _cut(tokenizer, [_SYSTEM, _ASKED])
    two = _cut(tokenizer, [_ASKED, _ANSWER, _AGAIN])
    if one is None or two is None:
        raise UsageError("the chat template rewrites what is said")
    before, between = one
    head, middle = told[:2] if told else ("", before)
    after = two[2]
    # a template may begin with a system text of its own, where none is given
    own = bool(head) and before.startswith(head) and before.endswith(middle)
    system = before[len(head) : len(before) - len(middle)] if own else ""
    inside = told is not None and head == before and after.endswith(before)
    ask = before if inside else _common_end(middle if system else _common_end(before, middle), after)
    fits = (told is None or told == (head, middle, between)) and two == (before, between, after, between)
    if not fits or (before != ask and not system):
        raise UsageError("the chat template writes later turns otherwise than the first")
    head, tail, question, between, end = map(
        _escape, (head, middle.removesuffix(ask), ask, between, after.removesuffix(ask))
    )
    # a system text stands before the question, or in it
    first = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{tail}{{{{ end }}}}" if told and not inside else ""
    within = f"{{{{ if .System }}}}{{{{ .System }}}}{_escape(middle)}{{{{ end }}}}" if inside else ""
    return (
        f"{first}{{{{ if .Prompt }}}}{question}{within}{{{{ .Prompt }}}}{between}{{{{ end }}}}{{{{ .Response }}}}{end}",
        system,
    )


def _cut(tokenizer: Tokenizer, said: Sequence[str]) -> tuple[str, ...] | None:
    """What the template writes around the texts of a conversation; None if it changes or refuses them."""
    roles = {_SYSTEM: "system", _ANSWER: "assistant"}
    try:
        text = chat_text(tokenizer, [{"role": roles.get(each, "user"), "content": each} for each in said])
    except REFUSALS:
        return None
    # llama.cpp puts the first token there itself
    text, parts = text.removeprefix(str(tokenizer.bos_token or "")), []
    for each in said:
        part, found, text = text.partition(each)
        if not found:
            return None
        parts.append(part)
    return (*parts, text)


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _make_single_template(form: PromptForm, tokenizer: Tokenizer) -> str:
    """The form of single prompts, of which the question is the only field."""
    if len(form.fields) > 1:
        raise UsageError(f"its prompts are made of {' and '.join(form.fields)}, and Ollama asks one text")
    before, _, after = form.render({form.fields[0]: _ASKED}, tokenizer).partition(_ASKED)
    return f"{_escape(before)}{{{{ .Prompt }}}}{_escape(after)}"


def _escape(text: str) -> str:
    """A text that Go's templates write as it is."""
    if '"""' in text:
        raise UsageError("the template holds three quotes, which end a text of a Modelfile")
    return text.replace("{{", '{{ "{{" }}')


def _list_stops(tokenizer: Tokenizer) -> list[str]:
    """The texts that end an answer."""
    ids = find_end_tokens(None, tokenizer)
    texts = [*tokenizer.convert_ids_to_tokens(ids), find_turn_end(tokenizer).text]
    return [text for text in texts if text and '"' not in text]
