"""`doralib generate`: asked in the form of the training, or as the user says; an empty answer says why."""

import json

import pytest
import torch
from adapted import move
from conftest import make_llama, make_tokenizer

import doralib
from doralib.data.encoding import encode
from doralib.data.prompt_form import PromptForm, make_form, write_form
from doralib.data.prompts import render_row
from doralib.errors import UsageError
from doralib.evaluation.generation import generate
from doralib.recipe import DataSettings, ObjectiveSettings
from doralib.training.modalities import preference, text

COMPLETION = DataSettings(train="-", style="completion", prompt="Q: {q}\nof {text} =", target=" {a}")
ROW = {"q": "what", "text": "a film", "a": "dull", "instruction": "judge", "output": "dull", "input": "a film"}


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        (COMPLETION, {"q": "what", "text": "a film"}),
        (COMPLETION.model_copy(update={"prompt": "text", "target": "a"}), {"text": "a film"}),
        (COMPLETION.model_copy(update={"prompt": "text", "target": "a"}), {"prompt": "a film"}),
        (DataSettings(train="-", style="alpaca"), {"instruction": "judge", "input": "a film"}),
        (DataSettings(train="-", style="alpaca"), {"instruction": "judge", "input": "a film", "system": "be brief"}),
    ],
)
def test_a_prompt_is_what_stood_before_the_answer_in_training(settings, given):
    tokenizer = make_tokenizer()
    row = {**ROW, "system": given["system"]} if "system" in given else ROW
    whole = render_row(row, settings, tokenizer)
    assert make_form(settings).render(given, tokenizer) == whole.text[: whole.learned[-1][0]]


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [("{q}? ", "what?"), ("{q}?   ", "what?  "), ("{q}?\n", "what?\n"), ("{q}?", "what?")],
)
def test_a_blank_at_the_end_is_left_to_the_answer_as_in_training(prompt, asked):
    tokenizer, settings = make_tokenizer(), COMPLETION.model_copy(update={"prompt": prompt, "target": "a"})
    row = {"q": "what", "a": "good film"}
    trained = encode(tokenizer, render_row(row, settings, tokenizer).text)
    given = make_form(settings, joined=True).render({"q": "what"}, tokenizer)
    tokens = encode(tokenizer, given)
    assert given == asked
    assert trained[: len(tokens)] == tokens
    # an answer that is tokenized by itself follows the prompt as it is
    assert make_form(settings).render({"q": "what"}, tokenizer) == prompt.format(q="what")
    whole = encode(tokenizer, prompt.format(q="what"))
    assert (trained[: len(whole)] == whole) == (not prompt.endswith(" "))


@pytest.mark.parametrize("objective", [None, "dpo", "grpo"])
def test_the_samples_of_a_report_are_asked_so_too(objective, monkeypatch):
    asked = []
    where = text if objective is None else preference
    monkeypatch.setattr(where, "answer_each", lambda _, tokenizer, prompts, **__: asked.extend(prompts) or [])
    model, tokenizer = make_llama(), make_tokenizer()
    samples = text.samples if objective is None else preference.Preference(ObjectiveSettings(kind=objective)).samples
    samples(model, tokenizer, COMPLETION, [{"prompt": "what? ", "expected": "good"}])
    # the prompts of grpo are tokenized by themselves in training
    assert asked == [encode(tokenizer, "what? " if objective == "grpo" else "what?")]


def test_a_chat_is_asked_in_the_chat_template():
    tokenizer, form = make_tokenizer(), make_form(DataSettings(train="-", style="chat"))
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert form.render({"prompt": "hi", "system": "be brief"}, tokenizer) == expected
    assert make_form(DataSettings(train="-", style="text")).render({"prompt": "Once"}, tokenizer) == "Once"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": "x"}, "are made of q and text"),
        ({"q": "x"}, "text is not given"),
        ({"q": "x", "txt": "y"}, "'txt'; did you mean 'text'"),
        ({"q": "", "text": " "}, "nothing in q, text"),
    ],
)
def test_what_is_missing_is_told(given, told):
    with pytest.raises(UsageError, match=told):
        make_form(COMPLETION).render(given, make_tokenizer())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and adapters of it that were trained on single prompts, on two fields and on chats."""
    root = tmp_path_factory.mktemp("models")
    base = make_llama()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
    base.save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    base.name_or_path = str(root / "base")
    doralib.adapt(base, doralib.DoraConfig(r=2, target_modules=("q_proj",)))
    move(base, 0.1)
    forms = {
        "one": PromptForm(style="completion", prompt="Review: {text}\nSentiment:", fields=("text",)),
        "two": make_form(COMPLETION),
        "chat": make_form(DataSettings(train="-", style="chat")),
    }
    for name, form in forms.items():
        doralib.save_adapter(base, root / name)
        write_form(root / name, form)
    return root


def answer(folder, text, **options):
    model, tokenizer = doralib.load_model(str(folder))
    return generate(model, tokenizer, [text], max_new_tokens=4, **options)[0]


def test_a_run_is_asked_as_it_was_trained(models, run):
    short = ("--max-new-tokens", "4")
    whole, bare = "Review: a dull film\nSentiment:", "a dull film"
    expected, raw = answer(models / "one", whole), answer(models / "one", bare)
    assert expected != raw
    assert run("generate", models / "one", "--prompt", bare, *short)[1] == f"{expected}\n"
    assert run("generate", models / "one", "--field", f"text={bare}", *short)[1] == f"{expected}\n"
    assert run("generate", models / "one", "--raw", "--prompt", whole, *short)[1] == f"{expected}\n"
    beside = ("--adapter", f"a={models / 'one'}")
    assert run("generate", models / "base", *beside, "-p", bare, *short)[1] == f"{expected}\n"
    talk = answer(models / "chat", bare, chat=True)
    assert run("generate", models / "chat", "--prompt", bare, *short)[1] == f"{talk}\n"
    assert run("generate", models / "one", "--chat", "--prompt", bare, *short)[1] == f"{talk}\n"
    two = answer(models / "two", "Q: what\nof a film =")
    assert run("generate", models / "two", "--field", "q=what", "--field", "text=a film", *short)[1] == f"{two}\n"


def test_a_merged_model_is_asked_so_too(models, run, tmp_path):
    assert run("merge", models / "one", "--out", tmp_path / "merged")[0] == 0
    short = ("--prompt", "a dull film", "--max-new-tokens", "4")
    assert run("generate", tmp_path / "merged", *short)[1] == run("generate", models / "one", *short)[1]


def test_mistakes_cost_no_loading(models, run, monkeypatch):
    from doralib.checkpoints import load

    monkeypatch.setattr(load, "load_model", None)
    status, _, err = run("generate", models / "two", "--prompt", "x")
    assert status == 2
    assert "--field q=TEXT --field text=TEXT, or the whole text as --prompt with --raw" in err
    assert run("generate", models / "one", "--field", "text")[0] == 2
    assert "given twice" in run("generate", models / "one", "--field", "text=a", "--field", "text=b")[2]
    assert "have no such part" in run("generate", models / "one", "--prompt", "a", "--system", "b")[2]
    assert "--chat" in run("generate", models / "base", "--prompt", "a", "--system", "b")[2]
    assert "give one of them" in run("generate", models / "one", "--prompt", "a", "--field", "text=b")[2]


def test_a_file_of_rows_is_asked_by_their_fields(models, run, tmp_path):
    rows = [{"text": "a dull film", "label": "negative"}, {"prompt": "a dull film"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers.jsonl"
    asked = ("--file", tmp_path / "rows.jsonl", "--out", out, "--max-new-tokens", "4")
    assert run("generate", models / "one", *asked)[0] == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.keys() for row in found] == [{"text", "output"}, {"prompt", "output"}]
    assert found[0]["output"] == found[1]["output"] == answer(models / "one", "Review: a dull film\nSentiment:")
    status, _, err = run("generate", models / "two", "--file", tmp_path / "rows.jsonl")
    assert status == 2
    assert "2 of 2 rows, first row 1, have no text under `q` and `text`" in err


def test_an_empty_answer_says_why():
    model, tokenizer = make_llama(), make_tokenizer()
    hook = model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([2]), 9.0))
    from doralib.evaluation.generation import answer_texts

    (empty,) = answer_texts(model, tokenizer, ["a"], max_new_tokens=3, batch_size=1)
    assert empty.empty == "its first token was an end, '<|im_end|>'"
    assert not empty.cut
    hook.remove()


def test_single_questions_at_the_prompt(models, run, monkeypatch):
    said = iter(["what", "a film", "/reset", "/quit"])
    monkeypatch.setattr("doralib.cli.asking._reader", lambda: lambda _: next(said))
    status, out, _ = run("generate", models / "two", "--max-new-tokens", "4")
    assert status == 0
    assert "each question stands by itself, in the form of the training: 'Q: {q}\\nof {text} ='" in out
    assert answer(models / "two", "Q: what\nof a film =").strip() in out
    assert "there is no command /reset" in out
