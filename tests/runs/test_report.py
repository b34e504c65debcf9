"""report.html: whole on its own, true to the files, safe against what the data says, patient with what is missing."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from doralib.errors import DoraError, UsageError
from doralib.runs import plots
from doralib.runs.charts import Series, line_chart, number_text
from doralib.runs.divergence import find_divergence
from doralib.runs.markup import Markup, el
from doralib.runs.record import read_run
from doralib.runs.report import write_report
from doralib.runs.use import closing_lines, generate_command

EVIL = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps tags, attributes and the text outside <style>."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def said(self):
        return " ".join(" ".join(self.text).split())


def score(value):
    return {"value": value, "low": value - 0.0311, "high": value + 0.0277}


def result(task, accuracy, counts, wrong=()):
    metrics = {"accuracy": score(accuracy), "macro_f1": score(accuracy - 0.0123)}
    confusion = {"labels": ["positive", "negative"], "counts": counts}
    base = {"task": task, "kind": "classification", "n": 317, "metrics": metrics, "confusion": confusion}
    return {**base, "wrong": list(wrong), "seconds": 1.0}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    config = {
        "model": {"path": "models/tiny"},
        "data": {"train": "rows.jsonl", "prompt": EVIL},
        "adapter": {"method": "dora", "r": 16},
        "eval": {"tasks": ["movies.yaml"]},
        "out": "runs/x",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"kind": "train", "step": s, "loss": 3 / s, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 400}
        for s in range(1, 41)
    ]
    lines.append({"kind": "eval", "step": 40, "eval_loss": 0.4321})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mistakes = [{"prompt": EVIL, "expected": "positive", "predicted": "negative"}]
    before = {"movies": result("movies", 0.7713, [[171, 22], [51, 73]])}
    after = {"movies": result("movies", 0.8617, [[177, 16], [28, 96]], mistakes)}
    (folder / "results.json").write_text(json.dumps({"before": before, "after": after}))
    samples = [{"prompt": EVIL, "expected": "yes", "before": EVIL, "after": "yes"}]
    (folder / "samples.json").write_text(json.dumps(samples))
    summary = {
        "base_model": "models/tiny",
        "method": "dora",
        "trainable_parameters": 1234567,
        "total_parameters": 98765432,
        "train_rows": 4321,
        "dropped_rows": {"too long": 13},
        "steps": 40,
        "seconds": 192.4,
        "tokens_per_second": 481.2,
        "best_step": None,
        "status": "finished",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.9", "packages": {"torch": "2.13.0"}}))
    return folder


def page_of(run, figures=False):
    return Page(write_report(run, figures=figures).read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_stands_alone(run):
    page = page_of(run)
    assert page.tags[:2] == ["html", "head"]
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in {"src", "href", "srcset", "data", "action"}]
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "url(" not in source
    assert "@import" not in source
    assert not re.search(r"https?://", source)


def test_what_the_files_say_is_on_the_page(run):
    said = page_of(run).said()
    for number_ in ("77.1 %", "86.2 %", "+9.0 points", "74.0 to 79.9", "83.1 to 88.9", "317", "4,321", "3 min 12 s"):
        assert number_ in said, number_
    for count in ("171", "22", "51", "73", "177", "16", "28", "96"):
        assert re.search(rf"\b{count}\b", said), count
    for text in ("too long 13", "0.4321", "2.13.0", "3.11.9", "1.23 million", "481", "rank 16", "models/tiny"):
        assert text in said, text


def test_every_number_in_the_results_comes_from_the_files(run):
    """Other results, other page: no number of the first survives in the tables."""
    first = page_of(run).said()
    results = json.loads((run / "results.json").read_text())
    results["before"]["movies"]["metrics"]["accuracy"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    results["after"]["movies"]["metrics"]["accuracy"] = {"value": 0.25, "low": 0.2, "high": 0.3}
    (run / "results.json").write_text(json.dumps(results))
    second = page_of(run).said()
    assert "77.1 %" in first
    for gone in ("77.1 %", "86.2 %", "74.0 to 79.9", "83.1 to 88.9"):
        assert gone not in second
    assert "\N{MINUS SIGN}25.0 points" in second


def test_data_cannot_become_markup(run):
    page = page_of(run)
    assert "script" not in page.tags
    assert page.said().count("<script>alert('x')</script>") >= 4  # prompt in the sample, before, wrong answer, config


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "results.json", "samples.json", "summary.json", "environment.json"]
)
@pytest.mark.parametrize("damage", ["missing", "half", "empty", "of another kind", "not text"])
def test_a_missing_or_damaged_file_is_named_and_the_rest_is_there(run, name, damage):
    path = run / name
    if damage == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        half = whole[: len(whole) // 2]
        path.write_bytes({"half": half, "empty": b"", "of another kind": b"7", "not text": b"\xff\xfe\x00"}[damage])
    said = page_of(run).said()
    if not (name == "metrics.jsonl" and damage == "empty") and not (name == "config.yaml" and damage == "half"):
        assert name in said.split("Results")[0]
    assert "doralib" in said


@pytest.mark.parametrize("number", [1e300, -1e12, math.inf, math.nan])
@pytest.mark.parametrize("key", ["value", "low", "high"])
def test_a_share_that_is_none_is_not_drawn(run, key, number):
    results = json.loads((run / "results.json").read_text())
    assert 'class="track"' in write_report(run, figures=False).read_text()
    for when in ("before", "after"):
        for each in results[when].values():
            each["metrics"]["accuracy"][key] = number
    (run / "results.json").write_text(json.dumps(results))
    assert 'class="track"' not in write_report(run, figures=False).read_text()


def test_a_model_of_no_parameters_has_no_share_of_them(run):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "total_parameters": 0}))
    assert "1.23 million" in page_of(run).said()


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    said = page_of(tmp_path).said()
    for name in ("config.yaml", "metrics.jsonl", "results.json", "samples.json", "summary.json", "environment.json"):
        assert f"{name} is missing" in said


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(DoraError, match="no run folder"):
        write_report(tmp_path / "none")


def test_a_line_cut_off_by_a_kill_costs_only_itself(run):
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write('{"kind": "train", "step": 41, "lo')
    assert "1 damaged line left out" in page_of(run).said()
    assert len(read_run(run).train) == 40


def test_a_step_trained_again_after_a_resume_counts_once(run):
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write('{"kind": "train", "step": 40, "loss": 7.5}\n')
    lines = read_run(run).train
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["loss"] == 7.5


def test_without_scores_before_the_page_says_so(run):
    results = json.loads((run / "results.json").read_text())
    del results["before"]
    (run / "results.json").write_text(json.dumps(results))
    said = page_of(run).said()
    assert "not scored before" in said
    assert "86.2 %" in said


def test_higher_perplexity_is_worse(run):
    for_perplexity = lambda value: {"wiki": {"n": 5, "metrics": {"perplexity": {"value": value}}}}
    (run / "results.json").write_text(json.dumps({"before": for_perplexity(20.0), "after": for_perplexity(30.0)}))
    page = page_of(run)
    assert ("span", "class", "bad") in page.attributes
    assert "+10.000" in page.said()


def test_saying_yes_more_often_is_neither_better_nor_worse(run):
    asked = lambda value: {"pope": {"n": 5, "metrics": {"yes_rate": {"value": value}}}}
    (run / "results.json").write_text(json.dumps({"before": asked(0.4), "after": asked(0.6)}))
    page = page_of(run)
    assert "+20.0 points" in page.said()
    assert not {("span", "class", "good"), ("span", "class", "bad")} & set(page.attributes)


@pytest.mark.parametrize(("status", "text"), [("interrupted", "not the end of the run"), ("nan", "loss was NaN")])
def test_a_run_that_did_not_finish_says_so_at_the_top(run, status, text):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "status": status}))
    assert text in page_of(run).said()


def test_nan_in_the_metrics_leaves_a_gap(run):
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write('{"kind": "train", "step": 41, "loss": NaN, "grad_norm": Infinity}\n')
    source = write_report(run, figures=False).read_text(encoding="utf-8")
    assert not re.search(r'points="[^"]*(nan|inf)', source)


def test_full_fine_tuning_is_loaded_as_a_model(run):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "method": "full"}))
    said = page_of(run).said()
    assert "full fine-tuning" in said
    assert "PeftModel" not in said


def test_paths_with_spaces_are_quoted_in_commands(run):
    assert f"doralib eval '{run}' --tasks movies.yaml" in page_of(run).said()


def test_the_results_figure_covers_nothing():
    """One task: its two intervals are inside the axes, and the key is outside of them."""
    figure = plots._results({"before": {"t": result("t", 0.5, [])}, "after": {"t": result("t", 0.6, [])}})
    figure.canvas.draw()
    (axes,), (key,) = figure.axes, figure.legends
    low, high = axes.get_ylim()
    assert low < -0.3
    assert high > 0.3
    assert not key.get_window_extent().overlaps(axes.get_window_extent())
    # they differ in grey: one dot is hollow
    assert len({line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"}) == 2


def test_a_full_fine_tune_has_no_rank(run):
    summary = json.loads((run / "summary.json").read_text())
    assert "rank " in page_of(run).said()
    (run / "summary.json").write_text(json.dumps({**summary, "method": "full"}))
    assert "rank " not in page_of(run).said()


def test_figures_are_png_files(run):
    pytest.importorskip("matplotlib")
    write_report(run)
    files = sorted(path.name for path in (run / "figures").iterdir())
    assert files == ["gradient_norm.png", "learning_rate.png", "loss.png", "results.png", "tokens_per_second.png"]
    assert all((run / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in files)


def test_the_home_folder_is_not_on_the_page(run, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: run.parent)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["path"] = f"{run.parent}/models/tiny"
    config["data"]["train"] = f"{run.parent}-other/rows.jsonl"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = write_report(run, figures=False).read_text()
    assert "~/models/tiny" in page
    assert f"{run.parent}-other/rows.jsonl" in page
    assert f"{run.parent}/" not in page


def test_without_matplotlib_the_page_is_whole_and_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"doralib\[plots\]"):
        plots.new_figure()
    page = page_of(run, figures=True)
    assert "doralib[plots]" in page.said()
    assert page.tags.count("svg") == 4
    assert not (run / "figures").exists()


def test_a_chart_of_one_value_or_of_equal_values_can_be_drawn():
    for points in ([(1, 0.5)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (2, 1e-9)], [(3, -2e6), (9, 5e6)]):
        chart = line_chart("Loss", [Series("loss", points)])
        assert chart is not None
        Page(chart)
        assert "nan" not in chart
    assert line_chart("Loss", [Series("loss", [])]) is None
    assert line_chart("Loss", [Series("loss", [(1, float("nan"))])]) is None


def test_numbers_are_short():
    shown = {
        0.0: "0",
        0.001: "0.001",
        1e-5: "1e-5",
        2.5e-4: "2.5e-4",
        12345.6: "12,346",
        481.234: "481.2",
        -0.5: "-0.5",
    }
    assert {value: number_text(value) for value in shown} == shown


def test_markup_escapes_all_that_is_not_markup():
    assert el("p", "<b>", Markup("<b>x</b>"), title='"<') == '<p title="&quot;&lt;">&lt;b&gt;<b>x</b></p>'


def test_a_run_without_tasks_lacks_no_results(run):
    (run / "results.json").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "eval": {"tasks": []}}))
    page = page_of(run)
    assert "results.json" not in page.said()
    assert ("div", "class", "note") not in page.attributes


def test_a_change_is_shown_with_its_paired_interval(run):
    results = json.loads((run / "results.json").read_text())
    interval = {"value": 0.0904, "low": 0.0123, "high": 0.1456}
    (run / "results.json").write_text(json.dumps({**results, "change": {"movies": {"accuracy": interval}}}))
    page = page_of(run)
    assert "+1.2 to +14.6" in page.said()
    assert ("span", "class", "good") in page.attributes
    interval["low"] = -0.01
    results["before"]["movies"]["metrics"].pop("macro_f1")
    (run / "results.json").write_text(json.dumps({**results, "change": {"movies": {"accuracy": interval}}}))
    assert ("span", "class", "good") not in page_of(run).attributes, "the rows alone may have made it"


def test_the_commands_ask_as_the_run_was_trained(run):
    form = {"style": "completion", "prompt": "Review: {text}", "fields": ["text"]}
    (run / "doralib_prompt.json").write_text(json.dumps(form))
    (run / "samples.json").write_text(json.dumps([{"prompt": "x", "given": {"text": "It's\ngood"}}]))
    record = read_run(run)
    assert generate_command(record) == f"doralib generate '{run}' --prompt 'It'\"'\"'s'"
    assert generate_command(record, "us/run") == "doralib generate us/run --prompt TEXT"
    (run / "doralib_prompt.json").write_text(json.dumps({**form, "fields": ["text", "of"]}))
    assert generate_command(read_run(run)).endswith("""--field 'text=It'"'"'s' --field of=TEXT""")
    (run / "doralib_prompt.json").write_text(json.dumps({"style": "chat", "fields": ["prompt"]}))
    assert generate_command(read_run(run)) == f"doralib generate '{run}'"
    (run / "doralib_prompt.json").unlink()
    assert "doralib generate" not in page_of(run).said(), "what gives labels answers nothing"


def test_a_training_ends_with_loss_time_and_the_next_command(run):
    told = closing_lines(read_run(run), run / "report.html")
    assert told["trained"] == "40 steps in 3 min 12 s, loss 0.075, validation loss 0.4321"
    assert [*told] == ["trained", "report", "next"]


UP = [1.4] * 6 + [0.6] * 6 + [5.0, 8.0, 6.0, 5.5, 3.0, 2.5] + [0.4] * 22


@pytest.mark.parametrize(
    ("losses", "config", "summary", "told"),
    [
        (UP, {}, {}, (14, 5.5)),
        ([3 / s for s in range(1, 41)], {}, {}, None),
        # two batches of hard rows
        ([1.4] * 12 + [9.0, 9.0] + [0.4] * 26, {}, {}, None),
        # many times of next to nothing
        ([0.01] * 12 + [0.3] * 28, {}, {}, None),
        # by 1 nat, and not to twice
        ([4.0] * 12 + [5.5] * 28, {}, {}, None),
        (UP[:9], {}, {}, None),
        (UP, {"objective": {"kind": "grpo"}}, {}, None),
        (UP, {}, {"unit": "pictures"}, None),
    ],
)
def test_a_loss_that_diverged_and_came_back_is_told(run, losses, config, summary, told):
    lines = [{"kind": "train", "step": s, "loss": loss} for s, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, read, write, more in (
        ("config.yaml", yaml.safe_load, yaml.safe_dump, config),
        ("summary.json", json.loads, json.dumps, summary),
    ):
        (run / name).write_text(write({**read((run / name).read_text()), **more}))
    found = find_divergence(read_run(run))
    assert (found and (found.step, found.loss)) == told
    assert ("The training loss diverged" in page_of(run).said()) == (told is not None)


def test_on_paper_nothing_scrolls_and_no_chart_is_cut():
    css = (Path(plots.__file__).parent / "report.css").read_text()
    paper = css.partition("@media print")[2]
    for rule in ("figure,", "break-inside: avoid", "print-color-adjust: exact", "overflow: visible", "pre-wrap"):
        assert rule in paper, rule


def test_a_subject_keeps_its_color_in_every_figure_of_bench():
    from doralib.experiments.bench.figures import choose_colors

    first, second = choose_colors(["base", "ours-dora", "copying"]), choose_colors(["peft-lora", "ours-dora"])
    assert first["ours-dora"] == second["ours-dora"]
    assert len({first[name] for name in ("base", "ours-dora", "peft-lora", "peft-dora", "ours-lora")}) == 5


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        (
            "results.json",
            {"after": {"t": {"confusion": {"labels": ["a"], "counts": [["x"]]}}}},
            "results.json, t: conf",
        ),
        (
            "results.json",
            {"after": {"t": {"confusion": {"labels": ["a"], "counts": [[1, 2]]}}}},
            "results.json, t: conf",
        ),
        (
            "results.json",
            {"after": {"t": {"wrong": 3, "metrics": {"f1": {"value": 1, "low": "x"}}}}},
            "t: wrong is dam",
        ),
        ("doralib_prompt.json", {"style": "completion", "fields": 2.5}, "doralib_prompt.json: fields is damaged"),
        ("summary.json", {"steps": "many", "seconds": []}, "summary.json: seconds, steps is damaged"),
        ("config.yaml", {"eval": {"tasks": 5}}, "config.yaml: eval is damaged"),
    ],
)
def test_values_that_are_not_what_they_should_be_are_noted_and_left_out(run, file, values, said):
    (run / file).write_text(json.dumps(values))
    assert said in page_of(run).said()
