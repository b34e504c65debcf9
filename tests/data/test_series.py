"""Series over time as they stand in files: four layouts, times of every kind, and what cannot be used, by reason."""

import json

import numpy as np
import pandas as pd
import pytest

from doralib.data.series import read_series
from doralib.data.tsf_rows import read_tsf
from doralib.data.windows import Origin, Unit, WindowCollator, find_unit, least_past, list_origins
from doralib.errors import DoraError, UsageError
from doralib.recipe import SeriesSettings


def read(path, text, **settings):
    path.write_text(text)
    return read_series(str(path), "data.train", SeriesSettings(**settings))


def values(table):
    return {each.name: each.values.tolist() for each in table.series}


MONTHS = [f"2020-{month:02d}-01" for month in range(1, 13)]
WANT = {"a": [1.0, 2.0, 4.0], "b": [5.0, 3.0, 1.0]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("long.csv", "series,date,value\n" + "".join(
            f"{name},{MONTHS[i]},{value:g}\n" for name, each in WANT.items() for i, value in enumerate(each)
        )),
        ("other_names.csv", "ds;unique_id;y\n" + "".join(
            f"{MONTHS[i]};{name};{each[i]:g}\n" for i in range(3) for name, each in WANT.items()
        )),
        ("wide.csv", "Month,a,b\n" + "".join(f"{MONTHS[i]},{WANT['a'][i]},{WANT['b'][i]}\n" for i in range(3))),
        ("wide_without_times.csv", "a,b\n1,5\n2,3\n4,1\n"),
        ("m4.csv", "V1,V2,V3,V4,V5\na,1,2,4,\nb,5,3,1,\n"),
        ("gluonts.jsonl", "".join(
            json.dumps({"item_id": name, "start": "2020-01-01", "freq": "M", "target": each}) + "\n"
            for name, each in WANT.items()
        )),
        ("monash.tsf", "# a comment\n@relation x\n@attribute series_name string\n@attribute start_timestamp date\n"
            "@frequency monthly\n@horizon 8\n@missing false\n@data\n"
            "a:2020-01-01 00-00-00:1,2,4\nb:2020-01-01 00-00-00:5,3,1\n"),
    ],
)  # fmt: skip
def test_every_layout_gives_the_same_series(tmp_path, name, text):
    table = read(tmp_path / name, text)
    assert values(table) == WANT
    assert table.report.rows == 2
    assert not table.report.dropped
    if name not in ("wide_without_times.csv", "m4.csv"):
        assert [each.season for each in table.series] == [12, 12]
        assert table.series[0].later(2) == ["2020-04-01", "2020-05-01"]
    else:
        assert table.series[0].later(2) == ["3", "4"]


@pytest.mark.parametrize("word", ["nan", "NaT", "NaN"])
@pytest.mark.parametrize("other", ["2020-01-02", "7"])
def test_a_time_that_pandas_takes_for_missing_is_no_time(tmp_path, word, other):
    with pytest.raises(UsageError, match=f"'{word}' is no time"):
        read(tmp_path / "rows.csv", f"series,date,value\na,{word},1\na,{other},2\na,{word},3\n")


@pytest.mark.parametrize(
    ("start", "freq"), [("", "D"), ("nan", "D"), ("x", "D"), ("9999-12-31", "D"), ("2020-01-01", "x")]
)
def test_a_list_whose_times_cannot_be_counted_has_none(tmp_path, start, freq):
    table = read(tmp_path / "rows.jsonl", json.dumps({"start": start, "freq": freq, "target": [1, 2, 4]}) + "\n")
    assert table.series[0].later(1) == ["3"]


def test_a_year_that_python_cannot_write_is_no_time(tmp_path):
    with pytest.raises(UsageError, match="'-0001-01-01' is no time"):
        read(tmp_path / "rows.csv", "series,date,value\na,2020-01-02,2\na,-0001-01-01,1\na,2020-01-03,3\n")


def test_times_beyond_whole_numbers(tmp_path):
    table = read(tmp_path / "rows.csv", "series,time,value\na,1e300,1\na,2e300,2\na,3e300,4\n")
    assert values(table) == {"a": [1.0, 2.0, 4.0]}


@pytest.mark.parametrize("wrong", [7, 7.5, True, {"a": 1}])
def test_a_number_where_others_have_a_list_is_a_series_of_none(tmp_path, wrong):
    rows = [{"start": "2020-01-01", "freq": "D", "target": each} for each in ([1, 2, 4], wrong)]
    table = read(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [each.values.tolist() for each in table.series] == [[1, 2, 4]]
    assert dict(table.report.dropped) == {"without a value": 1}


@pytest.mark.parametrize(
    ("times", "season", "later"),
    [
        (["2020-01-31", "2020-02-29", "2020-03-31"], 12, "2020-04-30"),
        (["2020-01-15", "2020-02-15", "2020-03-15"], 12, "2020-04-15"),
        (["2020-01-30", "2020-02-29", "2020-03-30"], 12, "2020-04-30"),
        (["2020Q1", "2020Q2", "2020Q3"], 4, "2020-10-01"),
        (["202001", "202002", "202003"], 12, "2020-04-01"),
        (["20200227", "20200228", "20200229"], 7, "2020-03-01"),
        (["2020-02-27", "2020-02-28", "2020-03-02"], 5, "2020-03-03"),
        (["2020-01-06", "2020-01-13", "2020-01-20"], 52, "2020-01-27"),
        (["2020-01-01 22:00", "2020-01-01 23:00", "2020-01-02 00:00"], 24, "2020-01-02T01:00:00"),
        (["2020-01-01 23:30", "2020-01-02 00:00", "2020-01-02 00:30"], 48, "2020-01-02T01:00:00"),
        (["2020-01-01T00:00Z", "2020-01-01T00:10Z", "2020-01-01T00:20Z"], 144, "2020-01-01T00:30:00"),
        (["1990", "1991", "1992"], 1, "1993"),
        (["0.5", "1", "1.5"], 1, "2"),
        (["13/01/2020", "14/01/2020", "15/01/2020"], 7, "2020-01-16"),
        (["Jan 2020", "Feb 2020", "Mar 2020"], 12, "2020-04-01"),
    ],
)
def test_times(tmp_path, times, season, later):
    table = read(tmp_path / "a.csv", "time,value\n" + "".join(f"{time},{i * i}\n" for i, time in enumerate(times)))
    assert table.report.lines() == []
    assert (table.series[0].season, table.series[0].later(1)) == (season, [later])


# the days of a month, and the values
BAD = {
    "gap": ("1=1 2=2 4=1 5=2", "with irregular times", "after 2020-01-02 comes 2020-01-04"),
    "twice": ("1=1 1=2 2=3", "with two values of one time", "2020-01-01 is there twice"),
    "missing": ("1=1 2= 3=3", "with missing values", "1 of 3 values are missing, the first at 2020-01-02"),
    "text": ("1=1 2=two 3=3", "with what is no number", "'two' is no number"),
    "flat": ("1=7 2=7 3=7", "constant", "each of its 3 values is 7"),
    "empty": ("1= 2=NA", "without a value", "it has no value"),
    "endless": ("1=1 2=inf", "with infinite values", "an infinite value cannot be learned"),
}


def test_bad_series_are_named_by_their_reason_and_the_others_kept(tmp_path):
    good = "good,2020-01-01,1\ngood,2020-01-02,2\ngood,2020-01-03,4\n"
    late = "late,2020-01-03,4\nlate,2020-01-01,0\nlate,2020-01-02,2\n"
    copy = good.replace("good", "copy")
    cells = [(name, *cell.split("=")) for name, (text, *_) in BAD.items() for cell in text.split()]
    rows = [f"{name},2020-01-0{day},{value}\n" for name, day, value in cells]
    table = read(tmp_path / "a.csv", "series,time,value\n" + "".join(rows) + good + late + copy)
    assert values(table) == {"good": [1, 2, 4], "late": [0, 2, 4]}
    report = table.report
    assert report.dropped == {**{kind: 1 for _, kind, _ in BAD.values()}, "the same as another": 1}
    assert report.noted == {"times out of order, which are sorted": 1}
    told = "\n".join(report.lines())
    for name, (_, _, detail) in BAD.items():
        assert f"row {name}: {detail}" in told
    assert "row copy: its values are those of good" in told


def test_a_value_that_is_a_list_is_no_number(tmp_path):
    rows = [{"id": "a", "target": [[1], [2], [4]]}, {"id": "b", "target": [1, 2, 4]}]
    table = read(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert values(table) == {"b": [1, 2, 4]}
    assert "[1] is no number" in "\n".join(table.report.lines())


def test_series_of_a_wide_table_begin_and_end_where_they_have_values(tmp_path):
    text = "date,a,b\n2020-01-01,,1\n2020-01-02,1,2\n2020-01-03,3,3\n2020-01-04,2,\n"
    table = read(tmp_path / "a.csv", text)
    assert values(table) == {"a": [1, 3, 2], "b": [1, 2, 3]}
    assert [str(each.times[0].date()) for each in table.series] == ["2020-01-02", "2020-01-01"]


def test_columns_that_do_not_say_what_they_are(tmp_path):
    text = "store,day,sales\nx,2020-01-01,1\nx,2020-01-02,2\nx,2020-01-03,4\n"
    with pytest.raises(UsageError, match=r"hold no number: 'store' \('x'\).*data.series.value"):
        read(tmp_path / "a.csv", text, time="day")
    with pytest.raises(UsageError, match=r"there is no column 'sale'; did you mean 'sales'"):
        read(tmp_path / "a.csv", text, value="sale")
    with pytest.raises(UsageError, match=r"which column names the series\? store could; set data.series.name=store"):
        read(tmp_path / "a.csv", text, value="sales", time="day")
    assert values(read(tmp_path / "a.csv", text, value="sales", time="day", name="store")) == {"x": [1, 2, 4]}
    with pytest.raises(UsageError, match="'soon' is no time"):
        read(tmp_path / "a.csv", "time,value\n2020-01-01,1\nsoon,2\n")


def test_a_damaged_tsf_is_named_by_its_line(tmp_path):
    with pytest.raises(DoraError, match="line 3 has 0 attributes before its values, and 1 are needed"):
        read_tsf(iter(["@attribute name string", "@data", "1,2,3"]), "x.tsf")
    with pytest.raises(UsageError, match="no line @data"):
        read_tsf(iter(["name,1,2"]), "x.tsf")
    missing = read(tmp_path / "a.tsf", "@attribute series_name string\n@data\na:1,?,3\nb:1,2,3\n")
    assert values(missing) == {"b": [1, 2, 3]}


def test_windows_end_where_the_series_does():
    assert list_origins(20, 8, 4, 3) == [10, 13, 16]
    assert list_origins(20, 17, 4, 3) == []
    assert [least_past(100, 24, 6), least_past(20, 24, 6), least_past(8, 24, 6)] == [24, 10, 6]


def test_a_batch_is_in_the_unit_of_each_past():
    series = [np.arange(10.0) ** 2, np.array([5.0, 5, 5, 5, 5, 5, 9, 5, 9, 5])]
    collate = WindowCollator(series, [1, 0], 4, 2, "std")
    batch = collate([{"series": 0, "origin": 6}, {"series": 0, "origin": 3}, {"series": 1, "origin": 5}])
    past = series[0][2:6]
    assert torch_equal(batch["past_values"][0], (past - past.mean()) / past.std())
    assert torch_equal(batch["future_values"][0], (series[0][6:8] - past.mean()) / past.std())
    assert batch["lengths"].tolist() == [4, 3, 4]
    assert batch["past_values"][1, 0] == 0
    # a flat past of a series that is not flat has a tenth of its unit
    assert torch_equal(batch["future_values"][2], np.array([0, 4]) / (0.1 * series[1].std()))
    assert batch["num_tokens"] == 4 + 3 + 4 + 3 * 2
    assert batch["labels"].tolist() == [0, 0, 0]


def torch_equal(got, want):
    return np.allclose(got.numpy(), want, atol=1e-6)


def test_units():
    past = np.array([2.0, 4.0])
    assert find_unit(past, "std") == Unit(3.0, 1.0)
    assert find_unit(past, "mean") == Unit(0.0, 3.0)
    assert find_unit(past, None) == Unit(0.0, 1.0)
    assert find_unit(np.zeros(3), "std") == Unit(0.0, 1.0)
    assert Unit(3.0, 2.0).back(Unit(3.0, 2.0).to(past)).tolist() == past.tolist()


def test_an_origin_has_what_was_before_and_what_came(tmp_path):
    (series,) = read(
        tmp_path / "a.csv",
        "time,value\n" + "".join(f"{d.date()},{i}\n" for i, d in enumerate(pd.date_range("2020-01-01", periods=9))),
    ).series
    origin = Origin(series, 6, 2)
    assert (origin.past.tolist(), origin.future.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7])
    assert origin.name() == "value from 2020-01-07"
