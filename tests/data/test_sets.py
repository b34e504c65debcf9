"""Where rows come from: folders, patterns, several sets with weights, documents; and tokens that are kept."""

import json

import datasets
import pytest
from conftest import make_tokenizer

from doralib.data import token_cache, tokenize
from doralib.data.prepare import IGNORED
from doralib.data.rows import hash_sources, list_inputs, read_both, read_sets
from doralib.data.tokenize import tokenize_rows
from doralib.errors import DoraError, UsageError
from doralib.recipe import DataSettings
from doralib.training.modalities import text


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(rows):
    return rows["text"][:]


def test_a_folder_and_a_pattern_are_their_files_in_order(here):
    write(here / "rows" / "b.jsonl", [{"text": "b1", "n": 1}, {"text": "b2", "n": 1.0}])
    write(here / "rows" / "deep" / "a.jsonl", [{"text": "a1", "more": [1]}])
    (here / "rows" / "c.csv").write_text("text\nc1\n")
    for name in ("README.md", ".hidden.jsonl"):
        (here / "rows" / name).write_text("{no rows}")
    both = read_both(DataSettings(train="rows"), 0)
    assert words(both.train) == ["b1", "b2", "c1", "a1"]
    assert both.train_numbers == ("b.jsonl:1", "b.jsonl:2", "c.csv:1", "a.jsonl:1")
    assert [str(row["n"]) for row in both.train] == ["1", "1.0", "None", "None"]
    assert both.train[3]["more"] == [1]
    assert words(read_both(DataSettings(train="rows/*.jsonl"), 0).train) == ["b1", "b2"]
    assert words(read_both(DataSettings(train="rows/**/*.jsonl"), 0).train) == ["b1", "b2", "a1"]
    with pytest.raises(UsageError, match=r"no file of rows matches 'rows/\*.md' .*of another kind: README.md"):
        read_both(DataSettings(train="rows/*.md"), 0)
    assert {key: len(files) for key, files in list_inputs(DataSettings(train="rows")).items()} == {"data.train": 3}
    assert len(hash_sources(DataSettings(train="rows", validation="rows/c.csv"))) == 4


def test_a_folder_of_splits_gives_the_split_that_is_asked_for(here, caplog):
    for name in ("train-00000", "train-00001", "test-00000", "validation"):
        write(here / "set" / f"{name}.jsonl", [{"text": name}])
    write(here / "contest" / "a.jsonl", [{"text": "a"}])
    write(here / "contest" / "b.jsonl", [{"text": "b"}])
    with caplog.at_level("INFO", "doralib"):
        rows = read_both(DataSettings(train="set", validation="set"), 0)
    assert words(rows.train) == ["train-00000", "train-00001"]
    assert words(rows.validation) == ["validation"]
    assert "without test-00000.jsonl, validation.jsonl" in caplog.text
    assert words(read_both(DataSettings(train="contest"), 0).train) == ["a", "b"]


def test_parquet_of_a_folder_and_what_datasets_saved(here):
    for name in ("a", "b"):
        datasets.Dataset.from_dict({"text": [name]}).to_parquet(here / f"{name}.parquet")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["x"]})})
    both.save_to_disk(str(here / "saved"))
    assert words(read_both(DataSettings(train="*.parquet"), 0).train) == ["a", "b"]
    assert words(read_both(DataSettings(train="saved"), 0).train) == ["x"]
    with pytest.raises(DoraError, match="split 'test', cannot be read"):
        read_both(DataSettings(train="saved", split="test"), 0)
    write(here / "mixed" / "a.jsonl", [{"text": "a"}])
    datasets.Dataset.from_dict({"text": ["b"]}).to_parquet(here / "mixed" / "b.parquet")
    with pytest.raises(UsageError, match=r"Parquet files beside others \(.jsonl\)"):
        read_both(DataSettings(train="mixed"), 0)


def test_weights_repeat_rows_and_nothing_that_is_held_out(here):
    write(here / "a.jsonl", [{"text": f"a{i}"} for i in range(10)])
    write(here / "b.jsonl", [{"text": f"b{i}"} for i in range(10)])
    train = [{"path": "a.jsonl", "weight": 2.5}, {"path": "b.jsonl", "weight": 0.5}]
    a, b = read_sets(DataSettings(train=train, validation=0.2), seed=3)
    assert (len(a.train), len(b.train)) == (20, 4)
    assert sorted({words(a.train).count(word) for word in words(a.train)}) == [2, 3]
    assert len(set(words(b.train))) == 4
    for part in (a, b):
        assert len(part.validation) == 2
        assert not set(words(part.train)) & set(words(part.validation))
    assert a.train_numbers[0] == "a.jsonl:" + str(int(words(a.train)[0][1:]) + 1)
    joined = read_both(DataSettings(train=train, validation=0.2), seed=3)
    assert words(joined.train) == words(a.train) + words(b.train)
    assert words(read_both(DataSettings(train=train, validation=0.2), seed=3).train) == words(joined.train)
    with pytest.raises(UsageError, match=r"data.train: weight 0.01 of 10 rows leaves none"):
        read_both(DataSettings(train=[{"path": "a.jsonl", "weight": 0.01}]), 0)
    with pytest.raises(UsageError, match="weight"):
        DataSettings(train=[{"path": "a.jsonl", "weight": 0}])


def test_sets_of_different_styles_are_one_training(here, tiny_llama):
    model, tokenizer = tiny_llama
    write(
        here / "talk.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    write(here / "alpaca.jsonl", [{"instruction": "numbers", "output": "1"}] * 2)
    write(here / "labels.jsonl", [{"text": "a good film", "label": "positive"}])
    train = ["talk.jsonl", "alpaca.jsonl", {"path": "labels.jsonl", "prompt": "{text}", "target": " {label}"}]
    raw = text.check_rows(DataSettings(train=train), 0)
    assert [source.style for source in raw.settings.train] == ["chat", "alpaca", "completion"]
    again = text.check_rows(DataSettings(**raw.settings.model_dump(mode="json")), 0)
    assert again.settings == raw.settings
    made = text.tokenize(raw, raw.settings, model, tokenizer)
    shown = [
        tokenizer.decode(
            [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        )
        for row in made.train.rows
    ]
    assert shown == ["b<|im_end|>\n", *["1<|im_end|>"] * 2, " positive<|im_end|>"]
    assert made.train.report.rows == made.train.report.kept == 4
    assert list(made.train.numbers) == ["talk.jsonl:1", "alpaca.jsonl:1", "alpaca.jsonl:2", "labels.jsonl:1"]
    with pytest.raises(UsageError, match=r"the sets have different columns.*talk.jsonl: messages; alpaca"):
        read_both(DataSettings(train=train[:2]), 0)
    bad = [{"path": "talk.jsonl", "target": "{txt}"}, {"path": "alpaca.jsonl", "target": "{lable}"}]
    with pytest.raises(UsageError, match=r"talk.jsonl has no column 'txt'(.|\n)*alpaca.jsonl has no column 'lable'"):
        text.check_rows(DataSettings(train=bad), 0)


BOOK = "Chapter one\nIt was a dark night,\nand it rained.\n\nA man came in.\n"


@pytest.mark.parametrize(
    ("written", "documents", "found"),
    [
        ("one\n\ntwo\n", None, ["one", "two"]),
        (BOOK, None, [BOOK.strip()]),
        (BOOK, "line", ["Chapter one", "It was a dark night,", "and it rained.", "A man came in."]),
        (BOOK, "paragraph", ["Chapter one\nIt was a dark night,\nand it rained.", "A man came in."]),
        ("one\ntwo", "file", ["one\ntwo"]),
    ],
)
def test_documents_of_a_text_file(here, written, documents, found):
    (here / "a.txt").write_text(written)
    assert words(read_both(DataSettings(train="a.txt", documents=documents), 0).train) == found


def test_nothing_of_a_document_is_left_out_for_its_length(here, tiny_llama):
    model, tokenizer = tiny_llama
    whole = "a dull film, a terrible waste of an evening\n" * 40 + "\n" + "and the end\n"
    (here / "book.txt").write_text(whole)
    raw = text.check_rows(DataSettings(train="book.txt", max_length=64), 0)
    made = text.tokenize(raw, raw.settings, model, tokenizer)
    assert not made.train.report.dropped
    assert "".join(tokenizer.decode(row["input_ids"]) for row in made.train.rows) == whole.strip("\n") + "<|im_end|>"
    prepared = text.prepare(raw, raw.settings, model, tokenizer)
    assert max(prepared.train.rows["length"]) <= 64
    assert sum(prepared.train.rows["length"]) == made.train.report.tokens


@pytest.mark.parametrize(
    ("prompt", "target", "row", "seam"),
    [
        ("{text}\nSentiment:", "{label}", "positive", "Sentiment:positive"),
        ("{text}", "label", "positive", "filmpositive"),
        ("{text}\nSentiment:", " {label}", "positive", ""),
        ("{text}\n", "{label}", "positive", ""),
        ("<q>{text}</q>", "{label}", "positive", ""),
        ("{text}", "label", "好", ""),
    ],
)
def test_a_target_that_is_glued_to_its_prompt_is_warned_of_once(here, tiny_llama, caplog, prompt, target, row, seam):
    model, tokenizer = tiny_llama
    write(here / "a.jsonl", [{"text": "film", "label": row}] * 3)
    raw = text.check_rows(DataSettings(train="a.jsonl", prompt=prompt, target=target), 0)
    with caplog.at_level("WARNING", "doralib"):
        text.tokenize(raw, raw.settings, model, tokenizer)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == bool(seam)
    if seam:
        assert repr(seam)[1:-1] in caplog.text
        assert "write data.target: ' {label}'" in caplog.text


@pytest.fixture
def kept(here, monkeypatch):
    """Tokens are kept from ten rows on; how often rows were rendered."""
    monkeypatch.setattr(tokenize, "_WORTH_KEEPING", 10)
    rendered = []
    render = tokenize.render_row
    monkeypatch.setattr(tokenize, "render_row", lambda row, *rest: rendered.append(row) or render(row, *rest))
    return rendered


def test_tokens_are_made_once(here, kept, caplog):
    rows = [{"text": f"film {i}", "label": "" if i == 3 else "good"} for i in range(12)]
    write(here / "a.jsonl", rows)
    settings = DataSettings(train="a.jsonl", style="completion", prompt="{text}", target=" {label}")
    ticks = []

    def make(changes=None, tokenizer=None):
        kept.clear()
        own = settings.model_copy(update=changes or {})
        raw = read_both(own, 0)
        tick = lambda what, amount, total, note="": ticks.append((what, amount, total))
        return tokenize_rows(raw.train, raw.train_numbers, own, tokenizer or make_tokenizer(), tick)

    first = make()
    assert len(kept) == 12
    assert ticks == [("tokenizing", 12, 12)]
    with caplog.at_level("INFO", "doralib"):
        again = make()
    assert not kept
    assert "the tokens of 12 rows are those of an earlier run" in caplog.text
    assert again.rows.to_list() == first.rows.to_list()
    assert again.report == first.report
    assert list(again.numbers) == list(first.numbers)
    assert again.report.dropped == {"empty": 1}
    for change in ({"max_length": 64}, {"prompt": "{text}\n"}, {"loss_on": "all"}):
        make(change)
        assert kept, change
    other = make_tokenizer()
    other.add_tokens(["film"])
    make(tokenizer=other)
    assert kept
    make({"validation": 0.2})
    assert kept
    rows[0]["text"] = "movie 0"
    write(here / "a.jsonl", rows)
    assert make().rows[0]["input_ids"] != first.rows[0]["input_ids"]


def test_damaged_or_old_tokens_are_made_anew_and_the_oldest_go(here, kept, monkeypatch):
    monkeypatch.setattr(token_cache, "_MOST_KEPT", 2)
    write(here / "a.jsonl", [{"text": f"film {i}"} for i in range(12)])

    def make(max_length):
        kept.clear()
        raw = read_both(DataSettings(train="a.jsonl"), 0)
        own = DataSettings(train="a.jsonl", style="text", max_length=max_length)
        return tokenize_rows(raw.train, raw.train_numbers, own, make_tokenizer())

    first = make(32).rows.to_list()
    folder = here / "cache" / "doralib" / "tokens"
    (entry,) = folder.iterdir()
    for file in ("report.json", next(entry.glob("*.arrow")).name):
        (entry / file).write_bytes(b"{")
        assert make(32).rows.to_list() == first
        assert kept
        assert make(32).rows.to_list() == first
        assert not kept
    for length in (33, 34, 35):
        make(length)
    assert len(list(folder.iterdir())) == 2
