"""Ids are those of the whole text for every kind of tokenizer and every style; labels are the answer's characters."""

import itertools

import datasets
import pytest
from tokenizer_kinds import CHAT, KINDS, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from doralib.data.columns import check_columns
from doralib.data.encoding import encode
from doralib.data.prepare import IGNORED
from doralib.data.prompts import render_row
from doralib.data.tokenize import tokenize_rows
from doralib.errors import DoraError
from doralib.recipe import DataSettings

TALK = [
    {"role": "user", "content": "a good film?"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "good and bad"},
    {"role": "assistant", "content": "good and bad"},
]
STYLES = {
    "completion": ({"prompt": "Review: {t}\nSentiment:", "target": " {l}"}, {"t": "a good film", "l": "positive"}),
    "joined": ({"style": "completion", "prompt": "Review:{t} ", "target": "{l}"}, {"t": "good", "l": "good"}),
    "no prompt": ({"style": "completion", "target": "t"}, {"t": "a bad film"}),
    "alpaca": ({}, {"instruction": "good?", "input": "a film", "output": "bad"}),
    "history": ({"style": "alpaca"}, {"instruction": "and?", "output": "bad", "history": [["good?", "good film"]]}),
    "chat": ({}, {"messages": TALK}),
    "text": ({}, {"text": "a good film, a bad film"}),
}
LEARNED = {
    "completion": [" positive"],
    "joined": ["good"],
    "no prompt": ["a bad film"],
    "alpaca": ["bad"],
    "history": ["good film</s>", "bad"],
    "chat": ["good<|im_end|>\n", "good and bad<|im_end|>\n"],
    "text": ["a good film, a bad film"],
}


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: make_tokenizer(kind) for kind in KINDS}


def prepare(style, tokenizer, row=None, **changes):
    settings, found = STYLES[style]
    chosen = DataSettings(train="t", **{"style": style if style != "no prompt" else "auto", **settings, **changes})
    rows = datasets.Dataset.from_list([row or found])
    check_columns(chosen, rows.column_names, "t")
    return tokenize_rows(rows, [1], chosen, tokenizer), render_row(rows[0], chosen, tokenizer)


def wanted_ids(text, style, tokenizer):
    if style == "chat":
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, end = tokenizer(text)["input_ids"], tokenizer.eos_token_id
    return ids if end is None or ids[-1] == end else [*ids, end]


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text(kind, style, loss_on, tokenizers):
    tokenizer = tokenizers[kind]
    made, rendered = prepare(style, tokenizer, loss_on=loss_on)
    row = made.rows[0]
    if style == "chat":
        assert rendered.text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert row["input_ids"] == wanted_ids(rendered.text, style, tokenizer)
    assert all(label in (token, IGNORED) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    learned = [rendered.text[start:end] for start, end in rendered.learned]
    if loss_on == "completion":
        expected = [words if tokenizer.eos_token else words.replace("</s>", "") for words in LEARNED[style]]
        assert learned == expected
    else:
        assert "".join(learned) == rendered.text


def characters(tokenizer, text, closed):
    """The characters of each token, by decoding ever longer beginnings: knows nothing of offsets."""
    ids = tokenizer(text, add_special_tokens=not closed)["input_ids"]
    ends = [len(tokenizer.decode(ids[:i], clean_up_tokenization_spaces=False)) for i in range(len(ids) + 1)]
    return list(itertools.pairwise(ends))


@pytest.mark.parametrize("style", ["completion", "joined", "alpaca", "history", "chat"])
@pytest.mark.parametrize("kind", ["byte level", "byte level, trimmed", "like Llama 3", "without offsets"])
def test_labels_are_the_tokens_that_hold_a_learned_character(kind, style, tokenizers):
    tokenizer = tokenizers[kind]
    made, rendered = prepare(style, tokenizer)
    row = made.rows[0]
    special = tokenizer(rendered.text)["input_ids"][:1] == [1] and not rendered.closed
    moved = len("<s>") * special
    learned = [(start + moved, end + moved) for start, end in rendered.learned]
    places = characters(tokenizer, rendered.text, rendered.closed)
    expected = [any(start < b and a < end for a, b in learned) for start, end in places]
    if not rendered.closed:
        expected += [True] * (len(row["input_ids"]) - len(expected))
    assert [label != IGNORED for label in row["labels"]] == expected


@pytest.mark.parametrize("length", range(1, 7))
@pytest.mark.parametrize("kind", ["byte level", "without offsets"])
def test_a_token_that_ends_in_what_follows_is_learned(kind, length):
    roles = "{% for m in messages %}{{ 'Sentiment' if m.role == 'user' else 'it' }}:{{ m.content }}\n{% endfor %}"
    tokenizer = make_tokenizer(kind, roles + "{% if add_generation_prompt %}it:{% endif %}")
    answer = "d film"[-length:]
    talk = [TALK[0], {"role": "assistant", "content": answer}, *TALK[2:]]
    made, rendered = prepare("chat", tokenizer, {"messages": talk})
    assert [rendered.text[start:end] for start, end in rendered.learned] == [f"{answer}\n", "good and bad\n"]
    places = characters(tokenizer, rendered.text, closed=True)
    expected = [any(start < b and a < end for a, b in rendered.learned) for start, end in places]
    assert [label != IGNORED for label in made.rows[0]["labels"]] == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wordpiece"])
def test_labels_read_as_the_answers(kind, tokenizers):
    tokenizer = tokenizers[kind]
    made, _ = prepare("chat", tokenizer)
    words = tokenizer.decode([label for label in made.rows[0]["labels"] if label != IGNORED])
    assert "".join(words.split()) == "good<|im_end|>goodandbad<|im_end|>"


def test_the_ends_that_a_tokenizer_adds_are_learned_once(tokenizers):
    for kind, end in (("unigram", 2), ("byte level", 2), ("like Llama 3", 2), ("without offsets", 2)):
        row = prepare("completion", tokenizers[kind])[0].rows[0]
        assert row["labels"][-1] == row["input_ids"][-1] == end
        assert row["input_ids"].count(end) == 1
    # a label that spells the end
    ended = {"t": "a film", "l": "good</s>"}
    row = prepare("completion", tokenizers["byte level"], ended)[0].rows[0]
    assert row["input_ids"].count(2) == 1
    for kind in ("like Llama 3", "metaspace always", "without offsets"):
        row = prepare("completion", tokenizers[kind])[0].rows[0]
        assert row["input_ids"][0] == 1
        assert row["labels"][0] == IGNORED
    # what a tokenizer puts around a text without an end-of-text token of its own
    row = prepare("completion", tokenizers["wordpiece"])[0].rows[0]
    tokenizer = tokenizers["wordpiece"]
    assert tokenizer.convert_ids_to_tokens([row["input_ids"][0], row["labels"][-1]]) == ["[CLS]", "[SEP]"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_row_is_the_beginning_of_the_whole_one(kind, tokenizers):
    whole = prepare("chat", tokenizers[kind])[0].rows[0]
    length = len(whole["input_ids"]) - 3
    cut = prepare("chat", tokenizers[kind], max_length=length, too_long="truncate")[0].rows[0]
    assert cut["input_ids"] == whole["input_ids"][:length]
    assert cut["labels"] == whole["labels"][:length]


def test_a_token_shared_with_the_prompt_is_learned(tokenizers):
    vocabulary = {token: i for i, token in enumerate(["<unk>", *"Reviw:god▁", "go", "goo", "good", "▁good", "</s>"])}
    core = Tokenizer(models.BPE(vocabulary, [("g", "o"), ("go", "o"), ("goo", "d"), ("▁", "good")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    # the blank at the end of the prompt and the label make one token, and it is the answer's only one
    row = prepare("joined", tokenizer, {"t": "go", "l": "good"})[0].rows[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[-3:] == ["go", "▁good", "</s>"]
    assert row["labels"][-2:] == row["input_ids"][-2:]
    assert row["labels"][:-2] == [IGNORED] * (len(row["labels"]) - 2)


def test_characters_of_several_tokens_and_empty_answers(tokenizers):
    talk = {"t": "x", "l": "né 🤖"}
    labels = prepare("completion", tokenizers["metaspace always"], talk)[0].rows[0]["labels"]
    spelt = tokenizers["metaspace always"].convert_ids_to_tokens([label for label in labels if label != IGNORED])
    assert [token for token in spelt if "0x" in token] == [f"<0x{byte:02X}>" for byte in "é🤖".encode()]
    for kind in ("byte level", "byte level, trimmed", "like Llama 3"):
        tokenizer = tokenizers[kind]
        row = prepare("completion", tokenizer, talk)[0].rows[0]
        assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]).strip() == "né 🤖</s>"
    talk = [TALK[0], {"role": "assistant", "content": ""}, *TALK[2:]]
    row = prepare("chat", tokenizers["byte level"], {"messages": talk})[0].rows[0]
    learned = tokenizers["byte level"].decode([label for label in row["labels"] if label != IGNORED])
    assert learned == "<|im_end|>\ngood and bad<|im_end|>\n"


def test_blanks_that_a_trimming_tokenizer_hides_are_learned(tokenizers):
    row = prepare("completion", tokenizers["byte level, trimmed"], {"t": "x", "l": "   positive   negative"})[0].rows[0]
    words = tokenizers["byte level, trimmed"].decode([label for label in row["labels"] if label != IGNORED])
    assert words == "    positive   negative</s>"


@pytest.mark.parametrize("kind", ["unigram", "without offsets", "byte level"])
def test_many_rows_keep_their_own_labels(kind, tokenizers):
    rows = [{"t": "a good film" * (i % 5), "l": ["positive", "negative"][i % 2]} for i in range(1, 30) if i % 5]
    settings = DataSettings(train="t", **STYLES["completion"][0])
    made = tokenize_rows(datasets.Dataset.from_list(rows), range(1, 30), settings, tokenizers[kind])
    for row, given in zip(made.rows, rows, strict=True):
        alone = prepare("completion", tokenizers[kind], given)[0].rows[0]
        assert row == alone


def test_a_lone_surrogate_is_one_bad_row(tmp_path):
    from doralib.data.rows import read_dataset

    path = tmp_path / "a.jsonl"
    path.write_text('{"t": "x \\ud800 y", "l": "good"}\n{"t": "\\ud83e\\udd16", "l": "good"}\n')
    rows = read_dataset(str(path), "data.train")
    settings = DataSettings(train="t", **STYLES["completion"][0])
    made = tokenize_rows(rows, [1, 2], settings, make_tokenizer("byte level"))
    assert made.report.dropped == {"malformed": 1}
    assert any("row 1: the character 0xd800 near 'Review: x '" in line for line in made.report.lines())
    assert made.report.kept == 1


def test_a_target_without_tokens_is_an_error_for_tokenizers_without_offsets_too():
    class Deaf(type(make_tokenizer("without offsets"))):
        def _tokenize(self, text, **options):
            return super()._tokenize(text.replace("Ж", ""), **options)

    tokenizer = Deaf(eos_token="</s>", unk_token="<unk>")
    with pytest.raises(DoraError, match="maps the target 'ЖЖ' to no token"):
        prepare("joined", tokenizer, {"t": "a", "l": "ЖЖ"})


def test_a_template_is_read_from_the_tokenizer(tokenizers):
    assert tokenizers["byte level"].chat_template == CHAT


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_goes_on(kind, tokenizers):
    """In use a prompt has what stands before any text, and not the end of one."""
    tokenizer = tokenizers[kind]
    bare = tokenizer("a good film", add_special_tokens=False)["input_ids"]
    before = {"wordpiece": ["[CLS]"], "unigram": [], "byte level": [], "byte level, trimmed": []}.get(kind, ["<s>"])
    assert encode(tokenizer, "a good film") == [*tokenizer.convert_tokens_to_ids(before), *bare]
    assert encode(tokenizer, "a good film", chat=True) == bare
