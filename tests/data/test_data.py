"""Rows to tokens: what is learned, what is left out and said, what is refused."""

import json

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from doralib.data.batches import Collator
from doralib.data.columns import check_columns
from doralib.data.prepare import IGNORED
from doralib.data.prompts import STYLES
from doralib.data.rows import RawRows, read_both, read_dataset
from doralib.data.tokenize import find_samples, tokenize_rows
from doralib.errors import DoraError, UsageError
from doralib.recipe import DataSettings

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
    "<|im_start|>{{ m['content'] }}{% endif %}{% endfor %}"
)


def make_tokenizer(bos=False, template=None, alphabet=True):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|start|>", "<|im_start|>", "<|im_end|>"]
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    core.train_from_iterator(
        ["a good film, a bad film, positive negative"] * 4,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=letters, show_progress=False),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|start|>")
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


ROWS = [{"text": "a good film", "label": "positive"}, {"text": "a bad film", "label": "negative"}]
SETTINGS = {"train": "t.jsonl", "prompt": "Review: {text}\nSentiment:", "target": " {label}"}


def dataset(rows):
    return datasets.Dataset.from_list(rows)


def run(rows, tokenizer, **settings):
    chosen = DataSettings(**{**SETTINGS, **settings})
    rows = dataset(rows)
    check_columns(chosen, rows.column_names, "t.jsonl")
    return tokenize_rows(rows, range(1, len(rows) + 1), chosen, tokenizer)


def learned(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def test_completion_learns_the_target_and_its_end(tokenizer):
    made = run(ROWS, tokenizer)
    assert tokenizer.decode(made.rows[0]["input_ids"]) == "Review: a good film\nSentiment: positive<|end|>"
    assert [learned(row, tokenizer) for row in made.rows] == [" positive<|end|>", " negative<|end|>"]
    # in use the model sees the prompt's own tokens
    prompt = tokenizer("Review: a good film\nSentiment:")["input_ids"]
    assert made.rows[0]["input_ids"][: len(prompt)] == prompt
    assert made.report.lines() == []
    assert made.report.kept == made.report.rows == 2
    assert made.report.tokens == sum(made.rows["length"])
    assert made.report.label_tokens == sum(label != IGNORED for row in made.rows for label in row["labels"])


def test_loss_on_all_learns_everything(tokenizer):
    made = run(ROWS, tokenizer, loss_on="all")
    assert all(row["labels"] == row["input_ids"] for row in made.rows)


def test_start_token_as_the_tokenizer_does():
    made = run(ROWS, make_tokenizer(bos=True))
    assert [row["input_ids"][0] for row in made.rows] == [1, 1]
    assert all(row["input_ids"].count(1) == 1 and row["labels"][0] == IGNORED for row in made.rows)


def test_columns_instead_of_templates_and_no_prompt(tokenizer):
    made = run(ROWS, tokenizer, prompt="text", target="label")
    assert tokenizer.decode(made.rows[1]["input_ids"]) == "a bad filmnegative<|end|>"
    plain = run(ROWS, tokenizer, prompt=None, target="text")
    assert learned(plain.rows[0], tokenizer) == "a good film<|end|>"


def test_numbers_and_braces(tokenizer):
    made = run([{"text": "x", "label": 0}], tokenizer, prompt="{{{text}}}", target="{label}")
    assert tokenizer.decode(made.rows[0]["input_ids"]) == "{x}0<|end|>"


def test_alpaca_with_and_without_input(tokenizer):
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Greet", "input": "", "output": "Hi"},
    ]
    made = run(rows, tokenizer, style="alpaca", prompt=None, target=None)
    first, second = (tokenizer.decode(row["input_ids"]) for row in made.rows)
    assert first.startswith("Below is an instruction that describes a task, paired with an input")
    assert first.endswith("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3<|end|>")
    assert "### Input" not in second
    assert learned(made.rows[1], tokenizer) == "Hi<|end|>"


TALK = [
    {"role": "user", "content": "a film?"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "bad"},
]


def test_chat_learns_every_answer_and_nothing_else():
    tokenizer = make_tokenizer(template=CHAT)
    made = run([{"messages": TALK}], tokenizer, style="chat", prompt=None, target=None)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(made.rows[0]["input_ids"]) == whole
    assert learned(made.rows[0], tokenizer) == "good<|im_end|>\nbad<|im_end|>\n"
    everything = run([{"messages": TALK}], tokenizer, style="chat", prompt=None, target=None, loss_on="all")
    assert learned(everything.rows[0], tokenizer) == whole


def test_chat_refuses_what_it_cannot_do(tokenizer):
    chat = {"style": "chat", "prompt": None, "target": None}
    with pytest.raises(UsageError, match="has none"):
        run([{"messages": TALK}], tokenizer, **chat)


def test_an_answer_that_the_template_leaves_out_is_counted():
    chat = {"style": "chat", "prompt": None, "target": None}
    tokenizer = make_tokenizer(template=FORGETFUL)
    made = run([{"messages": TALK}, {"messages": TALK[:2]}], tokenizer, **chat)
    assert tokenizer.decode(made.rows[0]["input_ids"]) == "<|im_start|>a film?<|im_start|>and<|im_start|>bad"
    assert [learned(row, tokenizer) for row in made.rows] == ["<|im_start|>bad", "<|im_start|>good"]
    told = "\n".join(made.report.lines())
    assert "of 2 rows: 1 with answers that the chat template leaves out or rewrites, which are not learned" in told
    assert "row 1: answers that" in told


def test_chat_counts_rows_it_cannot_use():
    silent = [{"role": "user", "content": "x"}]
    made = run(
        [{"messages": TALK}, {"messages": silent}, {"messages": []}, {"messages": [{"content": "x"}]}],
        make_tokenizer(template=CHAT),
        style="chat",
        prompt=None,
        target=None,
    )
    assert made.report.dropped == {"empty": 2, "malformed": 1}
    assert any("row 4: a message in 'messages' lacks the text of its role" in line for line in made.report.lines())


def test_a_conversation_may_begin_with_the_assistant():
    tokenizer = make_tokenizer(template=CHAT)
    made = run([{"messages": TALK[1:]}, {"messages": TALK[1:2]}], tokenizer, style="chat", prompt=None, target=None)
    assert tokenizer.decode(made.rows[0]["input_ids"]) == tokenizer.apply_chat_template(TALK[1:], tokenize=False)
    assert [learned(row, tokenizer) for row in made.rows] == ["good<|im_end|>\nbad<|im_end|>\n", "good<|im_end|>\n"]


BAD = [
    *ROWS,
    {"text": "", "label": "positive"},
    {"text": "x", "label": None},
    {"text": "a " * 300, "label": "negative"},
]


def test_rows_left_out_are_counted_and_named(tokenizer):
    made = run(BAD, tokenizer, max_length=64)
    assert made.report.dropped == {"empty": 2, "longer than 64 tokens": 1}
    told = "\n".join(made.report.lines())
    assert "of 5 rows: 2 left out, empty; 1 left out, longer than 64 tokens" in told
    for expected in ("row 3: nothing in text", "row 4: nothing in label", "row 5: "):
        assert expected in told
    with pytest.raises(DoraError, match=r"(?s)bad_rows is 'error'.*row 3"):
        run(BAD, tokenizer, bad_rows="error")


def test_long_rows_are_cut_if_asked(tokenizer):
    made = run(BAD, tokenizer, max_length=64, too_long="truncate", loss_on="all")
    assert made.report.truncated == 1
    assert max(made.rows["length"]) == 64
    assert "row 5: cut" in "\n".join(made.report.lines())
    # the prompt alone fills the length: nothing would be learned
    assert run(BAD, tokenizer, max_length=64, too_long="truncate").report.dropped["no target within 64 tokens"] == 1


def test_more_than_a_thousand_rows_keep_their_numbers(tokenizer):
    rows = [dict(ROWS[i % 2]) for i in range(1500)]
    rows[1234]["label"] = ""
    made = run(rows, tokenizer)
    assert made.report.kept == len(made.rows) == 1499
    assert "row 1235:" in "\n".join(made.report.lines())


def test_nested_values_are_malformed(tokenizer):
    made = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [["a"], ["b"]]})
    with pytest.raises(UsageError, match=r"(?s)the data set is empty:.*holds a list"):
        tokenize_rows(made, [1, 2], DataSettings(**SETTINGS), tokenizer)


def test_target_without_tokens_is_an_error():
    with pytest.raises(DoraError, match=r"row 2: the tokenizer maps the target 'ЖЖ' to no token"):
        run([ROWS[0], {"text": "a", "label": "ЖЖ"}], make_tokenizer(alphabet=False), target="{label}")


def test_misspelt_names_are_all_told_at_once():
    with pytest.raises(UsageError) as caught:
        check_columns(DataSettings(**{**SETTINGS, "prompt": "{txt}", "target": "lable"}), ["text", "label"], "t.csv")
    for expected in ("'txt'; did you mean 'text'", "'lable'; did you mean 'label'", "columns of t.csv: text, label"):
        assert expected in str(caught.value)
    with pytest.raises(UsageError, match="did you mean 'alpaca'"):
        check_columns(DataSettings(train="t", style="alpacca"), ["instruction"], "t")
    with pytest.raises(UsageError, match=r"data.prompt: style alpaca does not read it"):
        check_columns(DataSettings(train="t", style="alpaca", prompt="x"), ["instruction", "output"], "t")
    with pytest.raises(UsageError, match=r"data.target: style completion needs it"):
        check_columns(DataSettings(train="t", style="completion"), ["text"], "t")
    with pytest.raises(UsageError, match=r"a brace in the text is written"):
        check_columns(DataSettings(train="t", target="{text"), ["text"], "t")
    with pytest.raises(UsageError, match=r"holds a column.s name alone"):
        check_columns(DataSettings(train="t", target="{text!r}"), ["text"], "t")


@pytest.mark.parametrize("style", STYLES)
def test_every_style_names_its_columns(style):
    settings = DataSettings(train="t", style=style, **({"target": "x"} if style == "completion" else {}))
    with pytest.raises(UsageError, match="has no column"):
        check_columns(settings, ["something"], "t")


def test_samples_are_prompt_and_answer(tokenizer):
    raw = RawRows(dataset(BAD[2:] + ROWS), None, (1, 2, 3, 4, 5))
    found = find_samples(raw, DataSettings(**SETTINGS), tokenizer, 2)
    assert found[1].prompt == "Review: a good film\nSentiment:"
    assert found[1].expected == " positive"


def test_batches_are_padded_on_the_right_to_a_multiple_of_eight():
    batch = Collator(7)(
        [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4] * 9, "labels": [4] * 9}]
    )
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(batch, (2, 16))
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [7] * 13
    assert batch["labels"][0].tolist() == [IGNORED, 2, 3] + [IGNORED] * 13
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_kind_of_file(kind, tmp_path, cache):
    path = tmp_path / f"odd [name].{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        dataset(ROWS).to_parquet(path)
    else:
        sep = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("".join(sep.join(row) + "\n" for row in [ROWS[0], *(row.values() for row in ROWS)]))
    assert read_dataset(str(path), "data.train").to_list() == ROWS


def test_words_that_look_like_nothing_stay_words(tmp_path, cache):
    (tmp_path / "a.csv").write_text("text,label\nx,None\nNA,\n")
    rows = read_dataset(str(tmp_path / "a.csv"), "data.train").to_list()
    assert rows == [{"text": "x", "label": "None"}, {"text": "NA", "label": None}]


def test_csv_is_read_as_it_is_written(tmp_path, cache):
    (tmp_path / "a.csv").write_text("\ufefftext,label,\n007,true,\n1.10,1,\n12345678901234567890123,,x\n")
    rows = read_dataset(str(tmp_path / "a.csv"), "data.train")
    assert rows["text"][:] == ["007", "1.10", "12345678901234567890123"]
    assert rows["label"][:] == ["true", "1", None]
    assert rows["column 3"][:] == [None, None, "x"]
    (tmp_path / "long.csv").write_text("text,label\n" + "many words " * 20_000 + ",1\n")
    assert read_dataset(str(tmp_path / "long.csv"), "data.train")["label"][:] == ["1"]


def test_csv_of_another_width_than_its_header_is_refused(tmp_path, cache):
    (tmp_path / "a.csv").write_text("text,label\ngood, very good,positive\nbad, very bad,negative\n")
    with pytest.raises(DoraError, match=r"header has 2 columns and the first row 3"):
        read_dataset(str(tmp_path / "a.csv"), "data.train")
    (tmp_path / "a.csv").write_text("text,text\ngood,positive\n")
    with pytest.raises(DoraError, match=r"two columns of one name, text"):
        read_dataset(str(tmp_path / "a.csv"), "data.train")


def test_rows_not_shown_are_announced_only_where_there_are_some(tokenizer):
    for count, told in ((3, 0), (4, 1)):
        rows = dataset([{"text": "a", "label": "b"}] + [{"text": "", "label": "b"}] * count)
        made = tokenize_rows(rows, range(1, 9), DataSettings(train="t", prompt="text", target="label"), tokenizer)
        assert sum("row " in line for line in made.report.examples) == 3
        assert sum("not shown" in line for line in made.report.examples) == told


def test_samples_are_rows_that_the_model_takes(tokenizer):
    rows = dataset([{"text": "a " * 60, "label": "b"}, {"text": "a", "label": "b"}])
    settings = DataSettings(train="t", prompt="text", target="label", max_length=20)
    found = find_samples(RawRows(rows, None, (1, 2)), settings, tokenizer, 5)
    assert [sample.prompt for sample in found] == ["a"]


def test_utf_16_is_named(tmp_path, cache):
    (tmp_path / "a.csv").write_text("text,label\na,b\n", encoding="utf-16")
    with pytest.raises(DoraError, match=r"UTF-16 text.*iconv -f utf-16"):
        read_dataset(str(tmp_path / "a.csv"), "data.train")


def test_missing_and_odd_files(tmp_path, cache, monkeypatch):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "rows.docx").write_text("x")
    with pytest.raises(UsageError, match=r"data.train: no file .*looked for .*did you mean 'train.jsonl'"):
        read_dataset(str(tmp_path / "trian.jsonl"), "data.train")
    with pytest.raises(UsageError, match=r"there is no folder"):
        read_dataset(str(tmp_path / "no" / "train.jsonl"), "data.train")
    with pytest.raises(UsageError, match=r"ends in '.docx'"):
        read_dataset(str(tmp_path / "rows.docx"), "data.train")
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"is a folder without a file of rows; the kinds read are .*csv"):
        read_dataset(str(tmp_path / "none"), "data.train")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UsageError, match="is empty"):
        read_dataset(str(tmp_path / "empty.jsonl"), "data.train")
    (tmp_path / "head.csv").write_text("text,label\n")
    with pytest.raises(UsageError, match="has no rows"):
        read_dataset(str(tmp_path / "head.csv"), "data.train")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DoraError, match=r"no file here .* and as a hub data set"):
        read_dataset("nobody/nothing", "data.train")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2 is not JSON: .*may be cut short"),
        ("a.json", '[{"text": "a"},\n{"text": "b"', "line 2 is not JSON: .*may be cut short"),
        ("a.jsonl", '{"text": "a"}\nnothing\n{"text": "b"}\n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', 'line 2 is no object with columns, .* but "b"'),
        ("a.parquet", "PAR1 but no more", "cannot be read"),
        ("a.csv", 'text,label\n"a,b\nc', "cannot be read"),
    ],
)
def test_damaged_files(name, text, said, tmp_path, cache):
    (tmp_path / name).write_text(text)
    with pytest.raises(DoraError, match=said) as caught:
        read_dataset(str(tmp_path / name), "data.train")
    assert str(tmp_path / name) in str(caught.value)


def test_a_row_of_another_kind_is_malformed(tmp_path, cache, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n{"txt": "c"}\n{"text": 4}\n')
    rows = read_dataset(str(tmp_path / "a.jsonl"), "data.train")
    made = tokenize_rows(rows, range(1, 5), DataSettings(train="t", target="text"), tokenizer)
    assert made.report.dropped == {"malformed": 1, "empty": 1}
    assert [learned(row, tokenizer) for row in made.rows] == ["a<|end|>", "4<|end|>"]


def test_validation_is_a_fraction_or_a_file(tmp_path, cache):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(20)))
    both = read_both(DataSettings(train=str(path), validation=0.25), seed=3)
    assert (len(both.train), len(both.validation)) == (15, 5)
    assert sorted(both.train_numbers + both.validation_numbers) == list(range(1, 21))
    for rows, numbers in ((both.train, both.train_numbers), (both.validation, both.validation_numbers)):
        assert [int(text) + 1 for text in rows["text"]] == list(numbers)
    again = read_both(DataSettings(train=str(path), validation=0.25), seed=3)
    assert again.validation_numbers == both.validation_numbers
    assert (
        read_both(DataSettings(train=str(path), validation=0.25), seed=4).validation_numbers != both.validation_numbers
    )
    assert len(read_both(DataSettings(train=str(path), validation=str(path), limit=4), seed=0).validation) == 20
    with pytest.raises(UsageError, match="leaves nothing to train on"):
        read_both(DataSettings(train=str(path), validation=0.5, limit=1), seed=0)


@pytest.mark.parametrize(
    ("length", "limit", "sizes"), [(10, 4, [4, 4, 2]), (9, 4, [4, 3, 2]), (8, 4, [4, 4]), (3, 4, [3])]
)
def test_a_long_text_becomes_several_rows_with_nothing_left_out(tokenizer, length, limit, sizes):
    texts = [{"text": "a film"}, {"text": " ".join(["film"] * 40)}, {"text": "a bad"}]
    ids = [tokenizer(each["text"])["input_ids"] + [tokenizer.eos_token_id] for each in texts]
    ids[1][length - 1 :] = [tokenizer.eos_token_id]
    texts[1]["text"] = tokenizer.decode(ids[1][:-1])
    assert tokenizer(texts[1]["text"])["input_ids"] == ids[1][:-1]
    made = run(texts, tokenizer, style="text", prompt=None, target=None, max_length=limit)
    assert [len(row["input_ids"]) for row in made.rows][1:-1] == sizes
    assert [token for row in made.rows for token in row["input_ids"]] == [token for row in ids for token in row]
    assert list(made.numbers) == [1, *[2] * len(sizes), 3]
    assert made.report.kept == 3
    assert made.report.tokens == sum(map(len, ids))
    assert made.report.divided == (len(sizes) > 1)
    # what is not a text by itself is left out, as it was
    skipped = run(texts, tokenizer, style="text", prompt=None, target=None, max_length=limit, too_long="skip")
    assert len(skipped.rows) == 3 - (len(sizes) > 1)
