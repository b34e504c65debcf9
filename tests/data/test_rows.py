"""Files of rows as people write them: values as they stand there, tables of every separator, compressed files."""

import bz2
import gzip
import json
import lzma
import zipfile

import datasets
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_kinds import make_tokenizer

from doralib.data.columns import check_columns
from doralib.data.json_rows import split_columns
from doralib.data.prompts import render_row
from doralib.data.rows import read_dataset
from doralib.data.templates import columns_in, fill_template
from doralib.data.tokenize import tokenize_rows
from doralib.errors import DoraError, UsageError
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task_file import read_task
from doralib.recipe import DataSettings


def read(tmp_path, name, text, **options):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_dataset(str(path), "data.train", **options)


WRITTEN = [
    "12345678901234567890123",
    "1",
    "1.0",
    "2.50",
    "1e5",
    "1E+5",
    "-0",
    "0.1000000000000000055511151231257827",
    "true",
    "false",
    "9223372036854775808",
    "7" * 5000,
]
LOOKS = ["2024-01-01", "2024-01-01T10:00:00Z", "12:30", "007", "1.10", "True", "null", "NaN", "[1]", "{}", "\\u00e9\\n"]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("values", [WRITTEN, [f'"{look}"' for look in LOOKS], *([value] for value in WRITTEN)])
def test_values_of_json_are_text_as_written(values, ending, tmp_path):
    lines = [f'{{"l": {value}}}' for value in values]
    rows = read(tmp_path, f"a.{ending}", "\n".join(lines) if ending == "jsonl" else f"[{', '.join(lines)}]")
    settings = DataSettings(train="t", style="completion", target="{l}")
    texts = [render_row(row, settings, make_tokenizer("byte level")).text for row in rows]
    assert texts == [json.loads(value) if value.startswith('"') else value for value in values]


def test_a_column_of_dates_and_one_of_mixed_numbers_are_used(tmp_path):
    rows = read(
        tmp_path, "a.jsonl", '{"d": "2024-01-01", "n": 1, "t": true}\n{"d": "2024-01-02", "n": 2.5, "t": null}\n'
    )
    settings = DataSettings(train="t", prompt="{d} {t}", target="{n}")
    tokenizer = make_tokenizer("byte level")
    made = tokenize_rows(rows, [1, 2], settings, tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in made.rows] == ["2024-01-01 true1</s>", "2024-01-02 2.5</s>"]


def test_a_task_scores_the_text_of_the_file(tmp_path):
    read(tmp_path, "a.jsonl", '{"q": 1.0, "big": 12345678901234567890123, "a": true, "d": "2024-01-01"}\n')
    task = "kind: exact_match\ndata: a.jsonl\nprompt: '{q} {big} {d}'\nanswer: a\n"
    (tmp_path / "t.yaml").write_text(task)
    (example,) = read_examples(read_task(tmp_path / "t.yaml"))
    assert (example.prompt, example.answer) == ("1.0 12345678901234567890123 2024-01-01", "true")


ROWS = [{"t": "a", "l": 1}, {"t": "b", "l": 2}]


@pytest.mark.parametrize(
    "text",
    [
        {"version": 1, "data": ROWS},
        {"data": ROWS},
        {"version": "1.0", "rows": ROWS, "license": "MIT"},
        {"t": ["a", "b"], "l": [1, 2]},
        {"t": {"0": "a", "1": "b"}, "l": {"0": 1, "1": 2}},
        {"0": ROWS[0], "1": ROWS[1]},
        {"columns": ["t", "l"], "index": [0, 1], "data": [["a", 1], ["b", 2]]},
        {"train": ROWS, "test": [{"t": "x", "l": 0}]},
        {"schema": {"fields": []}, "data": ROWS},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_inside_an_object(text, indent, tmp_path):
    assert list(read(tmp_path, "a.json", json.dumps(text, indent=indent))) == ROWS


def test_a_row_that_holds_lists_is_a_row(tmp_path):
    for row in (
        {"messages": [{"role": "user", "content": "q"}], "tools": [{"type": "function"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"question": "q", "answers": [{"text": "a"}]},
    ):
        assert list(read(tmp_path, "a.jsonl", json.dumps(row))) == [row]
        assert list(read(tmp_path, "a.json", json.dumps(row, indent=1))) == [row]
    # a line of JSONL is a row, even one that could be a table of columns
    for row in ({"words": ["a", "b"], "labels": ["x", "y"]}, {"messages": []}, {"data": ROWS}):
        assert list(read(tmp_path, "a.jsonl", json.dumps(row))) == [row]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert list(read(tmp_path, "a.jsonl", f"{json.dumps(talk)}\n{json.dumps(talk)}\n")) == [{"messages": talk}] * 2
    assert list(read(tmp_path, "a.json", json.dumps([talk, talk]))) == [{"messages": talk}] * 2
    assert list(read(tmp_path, "a.json", json.dumps(ROWS[0], indent=1) + "\n" + json.dumps(ROWS[1]))) == ROWS


def test_one_of_several_tables_is_named(tmp_path):
    text = json.dumps({"train": ROWS, "test": ROWS[:1]})
    assert len(read(tmp_path, "a.json", text, split="test")) == 1
    with pytest.raises(UsageError, match=r"several lists of rows, train, test, and none is called 'dev'; .*data.split"):
        read(tmp_path, "a.json", text, split="dev")


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.csv", "t;l\na;1\nb,c;2\n", [("a", "1"), ("b,c", "2")]),
        ("a.csv", "t\tl\na\t1\n", [("a", "1")]),
        ("a.csv", "t|l\na|1\n", [("a", "1")]),
        ("a.tsv", "t,l\na,1\n", [("a", "1")]),
        ("a.csv", "sep=;\r\nt;l\r\na;1\r\n", [("a", "1")]),
        ("a.csv", "\ufeffsep=,\r\nt,l\r\na,1\r\n", [("a", "1")]),
        ("a.csv", "t, l\na,1\n", [("a", "1")]),
        ("a.csv", " t , l \na, 1\n", [("a", " 1")]),
        ("a.csv", 't, l\n"a, b", "c, d"\n', [("a, b", "c, d")]),
        ("a.csv", 't,l\n"a\nb","say ""hi"""\n', [("a\nb", 'say "hi"')]),
        ("a.csv", "t,l\na;b,1;2\n", [("a;b", "1;2")]),
        ("a.csv", "t,l\n\na,1\n\n", [("a", "1")]),
        ("a.csv", "t,l\na\n", [("a", None)]),
        ("a.csv", "t,l\na,1,,\n", [("a", "1")]),
        ("a.csv", "sep\nx\n", [("x",)]),
        ("a.csv", 't;l\n"a\n' + "b\n" * 30 + '";1\n', [("a\n" + "b\n" * 30, "1")]),
    ],
)
def test_tables(name, text, rows, tmp_path):
    made = read(tmp_path, name, text)
    assert [tuple(row.values()) for row in made] == rows
    assert made.column_names == (["t", "l"] if len(rows[0]) == 2 else ["sep"])


def test_another_separator_is_said(tmp_path, caplog):
    with caplog.at_level("INFO", "doralib"):
        read(tmp_path, "a.csv", "t;l\na;1\n")
    assert "a.csv: its cells are separated by ';'" in caplog.text


def test_a_long_row_and_an_open_quote_are_named(tmp_path):
    with pytest.raises(DoraError, match=r"its header has 2 columns and row 2 has 3; put values"):
        read(tmp_path, "a.csv", "t,l\na,b\nc,d,e\n")
    with pytest.raises(DoraError, match=r"near line 4: .*a quote inside quotes is written twice"):
        read(tmp_path, "a.csv", 'sep=,\nt,l\n"a,b\nc')


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def pack(path, ending, text):
    if ending in PACKERS:
        path.write_bytes(PACKERS[ending](text))
    elif ending == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(text)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside.txt", text)


@pytest.mark.parametrize("ending", [*PACKERS, ".zst", ".zip"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "tsv", "txt"])
def test_compressed_files(kind, ending, tmp_path):
    text = {"csv": "t\na\nb\n", "tsv": "t\na\nb\n", "txt": "a\n\nb\n"}.get(kind, '{"t": "a"}\n{"t": "b"}\n')
    path = tmp_path / f"a.{kind}{ending}"
    pack(path, ending, text.encode())
    assert [next(iter(row.values())) for row in read_dataset(str(path), "data.train")] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DoraError, match=r"data.train: .* cannot be read: .*is it whole\?"):
        read_dataset(str(path), "data.train")


def test_other_compressed_files_are_refused(tmp_path):
    for name in ("a.parquet.gz", "a.gz", "a.csv.rar"):
        with pytest.raises(
            UsageError, match=r"ends in '.(gz|rar)'; the kinds read are .*\.csv.* with \.gz, .*\.zip behind"
        ):
            read(tmp_path, name, "x")
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as archive:
        archive.writestr("a.csv", "t\na\n")
        archive.writestr("b.csv", "t\na\n")
    with pytest.raises(DoraError, match="holds 2 files"):
        read_dataset(str(tmp_path / "a.csv.zip"), "data.train")


def test_a_text_file_has_a_row_for_each_line(tmp_path):
    rows = read(tmp_path, "a.txt", "first line\r\n\n  second\n")
    settings = DataSettings(train="t")
    check_columns(settings, rows.column_names, "a.txt")
    tokenizer = make_tokenizer("byte level")
    made = tokenize_rows(rows, [1, 2], settings, tokenizer)
    assert [tokenizer.decode(row["labels"]) for row in made.rows] == ["first line</s>", "  second</s>"]


@pytest.mark.parametrize(
    "template", ['{"text": "{t}"}', '{"a": {"b": "{t}"}, "c": "{a b}"}', "{t} and {", "}", "[{t:>3}]", "{}"]
)
def test_a_template_with_braces_comes_back_as_it_has_to_be(template):
    with pytest.raises(UsageError) as caught:
        columns_in(template, "data.prompt")
    assert "a brace in the text is written {{ or }}: " in str(caught.value)
    suggested = eval(str(caught.value).split("written {{ or }}: ")[1])
    filled = fill_template(suggested, {"t": "x", "a b": "y"})
    assert filled == template.replace("{t}", "x").replace("{a b}", "y")


def test_parquet_keeps_its_own_kinds(tmp_path):
    from datetime import date
    from decimal import Decimal

    table = pa.table(
        {"n": [1, 2], "f": [1.5, 2.0], "b": [True, False], "d": [date(2024, 1, 1)] * 2, "m": [Decimal("1.10")] * 2}
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_dataset(str(tmp_path / "a.parquet"), "data.train")
    settings = DataSettings(train="t", style="completion", target="{n} {f} {b} {d} {m}")
    texts = [render_row(row, settings, make_tokenizer("byte level")).text for row in rows]
    assert texts == ["1 1.5 true 2024-01-01 1.10", "2 2.0 false 2024-01-01 1.10"]


def test_rows_of_json_can_be_chosen_and_copied(tmp_path):
    import pickle

    rows = read(tmp_path, "a.jsonl", '{"a": 1.0}\n{"a": [2.50]}\n{"a": null}\n')
    assert [str(value) for value in pickle.loads(pickle.dumps(rows))["a"][:]] == ["1.0", "[2.5]", "None"]
    assert str(pickle.loads(pickle.dumps(rows[0]["a"]))) == "1.0"
    assert rows.select([1])[0] == {"a": [2.5]}
    assert isinstance(rows, datasets.Dataset)


def test_a_place_holder_of_git_lfs_says_what_it_is(tmp_path):
    """As most of FinLoRA's data are after a plain `git clone`."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 134\n"
    with pytest.raises(DoraError, match=r"a\.jsonl cannot be read: it is the place holder .* `git lfs pull`"):
        read(tmp_path, "a.jsonl", pointer)


def test_a_large_file_of_lines_is_read_as_a_small_one(tmp_path, monkeypatch):
    """Piece by piece into a mapped file: the same values and types, where pieces differ too."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"é {i}", "n": i, "late": None} for i in range(40)]
    rows += [
        {"text": "b", "n": 1.5, "turns": [{"role": "user"}], "late": 10**30},
        {"n": None, "text": "\u2028", "z": "x"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    small = read_dataset(str(path), "data.train")
    monkeypatch.setattr("doralib.data.tables.LARGE", 0)
    monkeypatch.setattr("doralib.data.large_rows._PIECE", 100)
    monkeypatch.setattr("doralib.data.tables._read_json", lambda *_: pytest.fail("it was read at once"))
    for _ in range(2):  # the second time from the file that stands in the cache
        large = read_dataset(str(path), "data.train")
        assert large.column_names == small.column_names
        assert [str(large[i]) for i in range(len(rows))] == [str(small[i]) for i in range(len(rows))]
        assert large.features == small.features
    assert len(list((tmp_path / "cache").rglob("rows.arrow"))) == 1
    assert large.cache_files
    monkeypatch.undo()
    monkeypatch.setattr("doralib.data.tables.LARGE", 0)
    for text, why in (('{"a": 1}\n[1]\n', "line 2 is no object"), ('{"a": 1}\n{"a": \n', "line 2 is not JSON")):
        path.write_text(text)
        with pytest.raises(DoraError, match=why):
            read_dataset(str(path), "data.train")
    path.write_text('{"a":\n 1}\n{"a": 2}\n')
    assert read_dataset(str(path), "data.train")["a"][:] == [1, 2]


_VALUES = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.lists(st.integers(), max_size=2))


@given(
    st.dictionaries(st.text(), _VALUES, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.none() | st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(',"\\}:0x \n\x01')),
)
@example({"a": "b\\", "c": 1}, False, None, None)
@example({"a": "b", "c": "d"}, False, None, (0.4, '"'))
def test_a_row_is_read_as_json_reads_it(row, ascii_only, indent, changed):
    """Flat rows go by a regular expression: what it takes is JSON, and what it leaves is read value by value."""
    text = json.dumps(row, ensure_ascii=ascii_only, indent=indent)
    if changed is not None:
        at = int(changed[0] * len(text))
        text = text[:at] + changed[1] + text[at + 1 :]
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):
            split_columns(text, "train", "rows", by_lines=True)
        return
    if not isinstance(expected, dict):
        return
    found = split_columns(text, "train", "rows", by_lines=True)
    assert list(found) == list(expected)
    for name, value in expected.items():
        (written,) = found[name]
        assert repr(json.loads(written) if written is not None else None) == repr(value)


@pytest.mark.parametrize("name", ["la\0bel", "\ud800"])
def test_a_column_that_arrow_cannot_name_is_told(tmp_path, name):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", name: "b"}))
    with pytest.raises(DoraError, match="columns whose names cannot be stored: '"):
        read_dataset(str(tmp_path / "rows.jsonl"), "data.train")
