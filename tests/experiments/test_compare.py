"""Comparisons: the grid, the choice of rates, what is done once and what goes on after a kill, the numbers."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("scipy")
from scipy import stats

from doralib import files
from doralib.cli.main import app
from doralib.errors import DoraError, UsageError
from doralib.evaluation.metrics import Score
from doralib.evaluation.result import TaskResult
from doralib.experiments.compare import launch as launching
from doralib.experiments.compare import study
from doralib.experiments.compare.early_stop import Halving
from doralib.experiments.compare.grid import Cell, Grid, Run, check_grid, make_recipe
from doralib.experiments.compare.launch import Outcome, find_launcher, launch_here
from doralib.experiments.compare.pictures import pictures_section
from doralib.experiments.compare.rates import next_step, rate_at
from doralib.experiments.compare.report import write_comparison
from doralib.experiments.compare.study import Comparison, RunResult, compare, list_commands
from doralib.experiments.compare.table import (
    COLUMNS,
    compare_methods,
    curves,
    diverged_runs,
    losses_by_rate,
    rates_at_an_end,
    summarize,
)
from doralib.experiments.page import write_sections
from doralib.experiments.statistics import correlation, deviation, mean_interval, paired_difference
from doralib.recipe import Recipe

WORDS = ["good", "bad", "fine", "dull", "brilliant", "terrible", "film", "movie"]


@pytest.fixture
def job(tmp_path, tiny_llama_folder):
    """A recipe of four steps with a validation set and a task; as values."""
    rows = [
        {"text": f"{WORDS[i % 8]} {WORDS[(3 * i) % 8]}", "label": ("positive", "negative")[i % 2]} for i in range(40)
    ]
    for name, some in (("train", rows[:32]), ("test", rows[32:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    task = {"kind": "classification", "data": "test.jsonl", "prompt": "{text}", "answer": "label"}
    (tmp_path / "mood.yaml").write_text(yaml.safe_dump({**task, "labels": [" positive", " negative"]}))
    return {
        "model": {"path": str(tiny_llama_folder), "dtype": "float32"},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "validation": 0.25,
            "style": "completion",
            "prompt": "{text}",
            "target": " {label}",
        },
        "adapter": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
        "training": {
            "learning_rate": 1e-2,
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "eval_steps": 2,
            "save_steps": 2,
        },
        "eval": {"tasks": [str(tmp_path / "mood.yaml")], "before": True},
        "out": "unused",
    }


@pytest.fixture
def request_for(job, tmp_path):
    def make(**changes):
        known = {"recipe": Recipe(**job), "methods": ("lora", "dora"), "ranks": (2,), "seeds": (0,), "rates": (1e-2,)}
        return Grid(**{**known, "out": tmp_path / "grid", **changes})

    return make


class InProcess:
    """Runs the commands here, and remembers them."""

    def __init__(self):
        self.asked = []

    def __call__(self, command, log, unwanted):
        words = command[command.index("doralib") + 1 :]
        self.asked.append(words)
        app(words, standalone_mode=False)
        return Outcome(0, 1000)


# which rate next


def test_rates_from_coarse_to_fine():
    best = lambda target: lambda step: abs(step - target)

    def search(loss, budget=20):
        losses = {}
        while len(losses) < budget and (step := next_step(losses)) is not None:
            losses[step] = loss(step)
        return losses

    assert list(search(best(0))) == [0, 2, -2, 1, -1]
    assert list(search(best(5))) == [0, 2, -2, 4, 6, 5]  # at 4 and 6 alike the smaller is kept, and 5 is between
    assert list(search(best(-4))) == [0, 2, -2, -4, -6, -3, -5]
    assert list(search(lambda step: 1.0)) == [0, 2, -2, 1, -1]
    assert min(search(best(5)).items(), key=lambda item: item[1])[0] == 5
    # a rate at which training fails is as bad as can be
    assert list(search(lambda step: float("inf") if step > 0 else -step)) == [0, 2, -2, 1, -1]
    assert [rate_at(1e-3, step) for step in (-2, -1, 0, 1, 2, 4)] == [3.16e-4, 5.62e-4, 1e-3, 1.78e-3, 3.16e-3, 1e-2]


# what is run


def test_the_recipe_of_a_run(request_for):
    asked = request_for(
        ranks=(2, 8), methods=("full", "dora", "vera"), axis="adapter.d_initial", axis_values=("1", ".5")
    )
    assert [cell.name for cell in asked.cells()] == [
        "full-1",
        "full-.5",
        *(f"{m}-r{r}-{v}" for m in ("dora", "vera") for r in (2, 8) for v in ("1", ".5")),
    ]
    made = make_recipe(asked, Run(Cell("dora", 8, ".5"), 3e-4, 7))
    assert (made.adapter.r, made.adapter.lora_alpha, made.adapter.d_initial) == (8, 24, 0.5)  # alpha stays 3 r
    assert (made.training["learning_rate"], made.seed, made.eval.tasks) == (3e-4, 7, ())
    assert made.out.endswith("grid/runs/dora-r8-.5-lr0.0003-seed7")
    full = make_recipe(request_for(), Run(Cell("full", None, None), 1e-5, 0))
    assert (full.adapter.method, full.adapter.target_modules) == ("full", None)
    assert [asked.start_rate(Cell(m, 2, None)) for m in ("full", "lora", "dora", "vera")] == [1e-3, 1e-2, 1e-2, 1e-1]


def test_what_cannot_be_compared_is_said_before_the_first_run(request_for, job):
    for changes, told in (
        ({"methods": ("dora", "adapters")}, "method"),
        ({"axis": "adapter.no_such", "axis_values": ("1", "2")}, "no such setting"),
        (
            {"recipe": Recipe(**{**job, "data": {**job["data"], "validation": None}}), "rates": (1, 2)},
            "set data.validation",
        ),
        ({"rates": (), "recipe": Recipe(**{**job, "training": {"max_steps": 3}})}, "the recipe has none"),
        ({"axis": "model.revision", "axis_values": ("a b", "a,b")}, "twice"),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            check_grid(request_for(**changes))
        assert len(set(str(caught.value).splitlines())) == len(str(caught.value).splitlines())
    with pytest.raises(UsageError, match=r"the recipe has none(.|\n)*method"):
        check_grid(request_for(rates=(), recipe=Recipe(**{**job, "training": {"max_steps": 3}}), methods=("dorra",)))
    with pytest.raises(UsageError, match="with --lrs auto"):
        list_commands(request_for(rates=()))


@pytest.mark.long
def test_a_whole_grid(request_for, tmp_path):
    asked = request_for(methods=("lora", "dora", "full"), rates=(1e-2, 1e-3), seeds=(0, 1))
    here = InProcess()
    result = compare(asked, here)
    verbs = [words[0] for words in here.asked]
    assert (verbs.count("train"), verbs.count("eval")) == (3 * 3, 1 + 3 * 2)
    assert all(not (tmp_path / "grid" / "runs" / each.run.name / "checkpoints").exists() for each in result.runs)
    # the chosen rate has the lowest validation loss of the first seed
    for cell in asked.cells():
        first = [each for each in result.runs if each.run.cell == cell and each.run.seed == 0]
        (chosen,) = [each for each in first if each.chosen]
        assert chosen.loss == min(each.loss for each in first)
        assert {each.run.rate for each in result.runs if each.run.cell == cell and each.run.seed == 1} == {
            chosen.run.rate
        }
    again = InProcess()
    assert compare(asked, again) == result
    assert again.asked == []
    written = write_comparison(result)
    with written[0].open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    by = lambda **wanted: [line for line in lines if wanted.items() <= line.items()]
    assert len(by(split="validation", metric="loss")) == 9
    assert len(by(split="test", metric="accuracy")) == 1 + 6
    assert len(by(method="base", metric="accuracy")) == 1
    assert {line["peak_bytes"] for line in by(split="validation")} == {"1000"}
    page = written[1].read_text()
    assert "lora r 2 - dora r 2" in page
    assert "full" in page
    assert page.count("data:image/png") == len(written) - 2
    (lora, *_) = summarize(result)
    values = [float(line["value"]) for line in by(method="lora", split="test", metric="accuracy")]
    assert lora.scores["mood"] == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    names = {(each.first.method, each.second.method) for each in compare_methods(result)}
    assert names == {("lora", "dora"), ("lora", "full"), ("dora", "full")}
    with pytest.raises(UsageError, match="another recipe or axis"):
        compare(request_for(axis="adapter.lora_dropout", axis_values=("0", "0.1")), here)


# by the first seed 0.01 is best, by the mean of two 0.001, and by that of three 0.1
LOSSES = {(1e-1, 0): 3.0, (1e-1, 1): 3.0, (1e-1, 2): 0.1, (1e-2, 0): 1.0, (1e-2, 1): 4.0, (1e-2, 2): 4.0}
LOSSES |= {(1e-3, 0): 1.5, (1e-3, 1): 2.0, (1e-3, 2): 9.0}


@pytest.mark.parametrize(("count", "rate", "trained"), [(1, 1e-2, 5), (2, 1e-3, 7), (3, 1e-1, 9)])
def test_several_seeds_choose_a_rate_by_their_mean(request_for, monkeypatch, count, rate, trained):
    asked = []

    def train(_, run, halving=None):
        asked.append(run)
        return RunResult(run, LOSSES[run.rate, run.seed], 1.0, None, False)

    monkeypatch.setattr(study._Work, "train", train)
    bare = request_for().recipe.model_copy(update={"eval": Recipe.model_fields["eval"].get_default()})
    grid = request_for(recipe=bare, methods=("dora",), rates=(1e-1, 1e-2, 1e-3), seeds=(0, 1, 2), tune_seeds=count)
    found = compare(grid, InProcess())
    assert len(asked) == len(set(asked)) == trained
    assert sorted((each.run.rate, each.run.seed) for each in found.runs if each.chosen) == [(rate, i) for i in range(3)]
    ((_, points),) = losses_by_rate(found).items()
    means = {lr: sum(LOSSES[lr, seed] for seed in range(count)) / count for lr in (1e-3, 1e-2, 1e-1)}
    assert dict(points) == pytest.approx(means)
    ends = rates_at_an_end(found)
    assert ends == ([] if rate == 1e-2 else [f"dora r 2 ({rate:g})"])
    page = write_comparison(found)[1].read_text()
    assert ("beyond it may be better" in page) == bool(ends)
    assert ("first seed" in page) == (count == 1)


@pytest.mark.parametrize(("rates", "told"), [((1e-2,), "as given"), ((1e-2, 1e-3), "chosen among 0.001, 0.01")])
def test_how_a_rate_came_about_is_said(request_for, monkeypatch, caplog, rates, told):
    monkeypatch.setattr(
        study._Work, "train", lambda _, run, halving=None: RunResult(run, LOSSES[run.rate, run.seed], 1.0, None, False)
    )
    bare = request_for().recipe.model_copy(update={"eval": Recipe.model_fields["eval"].get_default()})
    with caplog.at_level("INFO"):
        compare(request_for(recipe=bare, methods=("dora",), rates=rates), InProcess())
    assert f"dora r 2: rate 0.01, {told}" in caplog.text


@pytest.mark.long
def test_a_searched_rate_keeps_to_its_budget(request_for):
    here = InProcess()
    result = compare(request_for(methods=("dora",), rates=(), budget=4), here)
    rates = [each.run.rate for each in sorted(result.runs, key=lambda each: each.chosen)]
    assert len(rates) == 4
    assert {1e-2, 3.16e-2, 3.16e-3} < set(rates)
    (chosen,) = [each for each in result.runs if each.chosen]
    assert chosen.loss == min(each.loss for each in result.runs)


def test_a_failed_run_is_named_with_the_end_of_its_log(request_for, tmp_path):
    def broken(command, log, unwanted):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("line\n" * 40 + "the disk is full\n")
        return Outcome(1, None)

    recipe = request_for().recipe.model_copy(update={"eval": Recipe.model_fields["eval"].get_default()})
    with pytest.raises(DoraError, match=r"(?s)run lora-r2-lr0.01-seed0 failed with status 1.*the disk is full"):
        compare(request_for(recipe=recipe), broken)


@pytest.mark.long
def test_a_grid_killed_in_the_middle_goes_on(job, tmp_path):
    """By the command itself, in processes of their own: SIGKILL to all of them, then the same comparison again."""
    job["training"] |= {"max_steps": 20}
    job["eval"] = {"tasks": []}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    out = tmp_path / "cut"
    words = ["compare", str(tmp_path / "job.yaml"), "--methods", "lora,dora", "--lrs", "0.01", "--out", str(out)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen([sys.executable, "-m", "doralib", *words], start_new_session=True, **silent)
    second = out / "runs" / "dora-r2-lr0.01-seed0"
    while not list(second.glob("checkpoints/checkpoint-*/whole.json")) and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    first = out / "runs" / "lora-r2-lr0.01-seed0" / "adapter_model.safetensors"
    before = first.stat().st_mtime_ns
    asked = Grid(Recipe(**job), ("lora", "dora"), (2,), (0,), out, rates=(1e-2,))
    here = InProcess()
    resumed = compare(asked, here)
    assert [words[0] for words in here.asked] == ["train"]
    assert here.asked[0][2] == "--resume"
    assert first.stat().st_mtime_ns == before
    whole = compare(dataclasses.replace(asked, out=tmp_path / "whole"), InProcess())
    assert [(each.run, each.loss) for each in resumed.runs] == [(each.run, each.loss) for each in whole.runs]


def test_a_failure_stops_the_cells_beside_it(request_for, tmp_path):
    """Two at the same time: one fails, and the other's run is asked to stop."""
    stopped = []

    def launch(command, log, unwanted):
        if "dora" in command[-1]:  # the later one, so that nobody waits for the one before it
            return Outcome(1, None)
        ends = time.monotonic() + 30
        while not unwanted() and time.monotonic() < ends:
            time.sleep(0.01)
        stopped.append(time.monotonic() < ends)
        return Outcome(130, None)

    recipe = request_for().recipe.model_copy(update={"eval": Recipe.model_fields["eval"].get_default()})
    with pytest.raises(DoraError, match=r"dora-r2-lr0\.01-seed0 failed"):
        compare(request_for(recipe=recipe), launch, at_once=2)
    assert stopped == [True]


def test_commands_are_those_of_the_first_seed(request_for, run, job, tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    status, shown, _ = run(
        "compare",
        tmp_path / "job.yaml",
        "--ranks",
        "2,4",
        "--lrs",
        "1e-2,1e-3",
        "--out",
        tmp_path / "grid",
        "--commands",
    )
    assert status == 0
    assert len(shown.splitlines()) == 8
    for line in shown.splitlines():
        verb, recipe = line.split()[1:]
        assert verb == "train"
        assert Recipe(**files.read_yaml(recipe)).out.startswith(str(tmp_path / "grid" / "runs"))


def test_wrong_options(run, job, tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    for options, told in (
        (("--ranks", "2,x"), "--ranks 2,x: should be whole numbers"),
        (("--seeds", "1,1"), "a value is there twice"),
        (("--axis", "adapter.r"), "KEY=V1,V2"),
        (("--launcher", "slrum"), "did you mean 'slurm'"),
        (("--tune-seeds", "2"), "--tune-seeds 2: --seeds gives 1; give more"),
    ):
        status, _, err = run("compare", tmp_path / "job.yaml", "--out", tmp_path / "grid", *options)
        assert (status, told in " ".join(err.split())) == (2, True), err
    wrong_files = ("model.path=./none", "data.train=nope.jsonl")
    options = ("--ranks", "2,x", "--seeds", "1,1", "--axis", "adapter.r", "--launcher", "slrum", "data.trian=x")
    _, _, err = run("compare", tmp_path / "job.yaml", "--out", tmp_path / "grid", *options)
    _, _, early = run("compare", tmp_path / "job.yaml", "--out", tmp_path / "grid", *wrong_files, "--ranks", "2,x")
    for told in ("--ranks 2,x", "there is no model folder ./none", "no file 'nope.jsonl'"):
        assert told in early
    _, _, late = run("compare", tmp_path / "job.yaml", "--out", tmp_path / "grid", *wrong_files, "--methods", "dorra")
    for told in ("there is no model folder ./none", "no file 'nope.jsonl'", "got 'dorra'"):
        assert told in late
    assert not (tmp_path / "grid").exists()
    for told in ("--ranks 2,x", "--seeds '1,1'", "--axis adapter.r", "'slurm'", "'train'"):
        assert told in err


# early stopping


def test_a_run_that_falls_behind_is_stopped_and_stays_so(request_for):
    pytest.importorskip("optuna")
    curves = {1e-2: [1.0, 0.8, 0.6, 0.5, 0.45, 0.44, 0.43, 0.42], 1e-3: [1.2, 1.19, 1.18, 1.17, 1.16, 1.15, 1.14, 1.13]}
    lines = {}

    def pretend(command, log, unwanted):
        made = Recipe(**files.read_yaml(command[-1]))
        folder = Path(made.out)
        folder.mkdir(parents=True)
        status = "finished"
        for i, loss in enumerate(curves[made.training["learning_rate"]], 1):
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "eval", "step": i, "eval_loss": loss}) + "\n")
            lines[made.training["learning_rate"]] = i
            if unwanted():
                status = "interrupted"
                break
        files.write_json(folder / "summary.json", {"status": status, "seconds": 1.0})
        (folder / "adapter_model.safetensors").touch()
        return Outcome(0, None)

    recipe = request_for().recipe.model_copy(update={"eval": Recipe.model_fields["eval"].get_default()})
    asked = request_for(recipe=recipe, methods=("dora",), rates=(1e-2, 1e-3), stop_early=True)
    result = compare(asked, pretend)
    assert lines[1e-2] == 8
    assert lines[1e-3] < 8
    assert [(each.run.rate, each.stopped, each.chosen) for each in result.runs] == [
        (1e-3, True, False),
        (1e-2, False, True),
    ]
    assert Halving(asked.out / "trials.log").was_stopped(Run(Cell("dora", 2, None), 1e-3, 0))

    def nothing(command, log, unwanted):
        raise AssertionError("nothing is left to do")

    assert compare(asked, nothing) == result


# where runs run


def test_a_process_here_is_measured_and_stopped(tmp_path):
    log = tmp_path / "log"
    code = "import sys, time; held = bytearray(80_000_000); del held; time.sleep(3); print('done'); sys.exit(3)"
    outcome = launch_here([sys.executable, "-c", code], log, lambda: False)
    assert outcome.status == 3
    if Path("/proc/self/status").exists():
        assert 80e6 < outcome.peak_bytes < 150e6  # this process holds far more, and forked it
    assert log.read_text() == "done\n"
    outcome = launch_here([sys.executable, "-c", "import time; time.sleep(60)"], log, lambda: True)
    assert outcome.status == -signal.SIGTERM


def test_launchers_that_are_not_installed_are_refused(monkeypatch):
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    for name, package in (("slurm", "submitit"), ("ray", "ray")):
        with pytest.raises(UsageError, match=f"needs {package}, which is not installed"):
            find_launcher(name)
    assert find_launcher("local") is launch_here


def test_submitit_runs_the_command(tmp_path):
    """Where there is no Slurm, submitit runs a job here."""
    pytest.importorskip("submitit")
    launch = find_launcher("slurm")
    done = launch([sys.executable, "-c", "print('from a job')"], tmp_path / "jobs" / "a.log", lambda: False)
    assert done.status == 0
    assert "from a job" in (tmp_path / "jobs" / "a.log").read_text()
    assert launch([sys.executable, "-c", "raise SystemExit(2)"], tmp_path / "jobs" / "b.log", lambda: False).status == 1


# statistics


def test_paired_difference_against_the_known():
    rng = np.random.default_rng(0)
    both = rng.random((3, 400))
    one, other = both < 0.7, both < 0.6
    text = lambda rows: ["".join("01"[int(cell)] for cell in row) for row in rows]
    found = paired_difference(text(one), text(other))
    gain_N = (one.astype(float) - other).mean(0)
    assert found.value == pytest.approx(gain_N.mean())
    # the percentile interval of a mean is that of its normal law
    half = 1.96 * gain_N.std(ddof=1) / 20
    assert found.low == pytest.approx(gain_N.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gain_N.mean() + half, abs=0.1 * half)
    # unpaired, the interval would be far wider
    unpaired = 1.96 * np.sqrt(one.mean(0).var() / 400 + other.mean(0).var() / 400)
    assert found.high - found.low < 1.4 * unpaired
    same = paired_difference(["0101"], ["0101"])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert deviation([1.0, 3.0]) == pytest.approx(np.sqrt(2))
    assert deviation([1.0]) is None
    assert mean_interval(np.array([2.0])).value == 2


def test_correlations_against_scipy():
    rng = np.random.default_rng(1)
    x = rng.normal(size=300)
    y = 0.6 * x + 0.8 * rng.normal(size=300)
    pearson, spearman = correlation(x, y, "pearson"), correlation(x, y, "spearman")
    assert pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    fisher = stats.pearsonr(x, y).confidence_interval()
    assert pearson.low == pytest.approx(fisher.low, abs=0.03)
    assert pearson.high == pytest.approx(fisher.high, abs=0.03)
    assert correlation([1, 2], [1, 2], "pearson") is None
    assert correlation([1, 2, 3], [5, 5, 5], "spearman") is None


def test_what_each_method_draws_stands_side_by_side(request_for):
    """The paper's Figure 10: a line a prompt, a column a cell, of the first seed."""
    grid = request_for(seeds=(0, 1))
    picture = lambda text: f"data:image/webp;base64,{text}"
    runs = []
    for method in ("lora", "dora"):
        for seed in grid.seeds:
            run = Run(Cell(method, 2, None), 1e-2, seed)
            runs.append(RunResult(run, 1.0, 1.0, None, False, chosen=True))
            samples = [
                {"prompt": f"a <b>{word}", "expected": picture(word), "after": picture(f"{method}{seed}{word}")}
                for word in ("cat", "cup")
            ]
            folder = grid.out / "runs" / run.name
            folder.mkdir(parents=True)
            # of the last run one prompt was not drawn
            few = samples[: 1 if (method, seed) == ("dora", 0) else 2]
            (folder / "samples.json").write_text(json.dumps(few))
    section = pictures_section(Comparison(grid, {}, runs))
    assert list(section.head) == ["prompt", "of the data", "lora r 2", "dora r 2"]
    page = write_sections(grid.out / "compare.html", "compared", "", [section]).read_text()
    assert "a &lt;b&gt;cat" in page
    assert re.findall(r'src="data:image/webp;base64,(\w+)"', page) == ["cat", "lora0cat", "dora0cat", "cup", "lora0cup"]
    assert pictures_section(Comparison(grid, {}, [])) is None
    for file in grid.out.rglob("samples.json"):
        file.write_text(json.dumps([{"prompt": "a text", "expected": "yes", "after": "no"}]))
    assert pictures_section(Comparison(grid, {}, runs)) is None


def test_a_difference_is_of_the_same_rank(request_for):
    def result(method, r, right):
        score = Score(right.count("1") / len(right), 0, 1)
        scored = TaskResult("t", "regex", len(right), {"accuracy": score}, None, (), 0, 1.0, right)
        return RunResult(Run(Cell(method, r, None), 1e-3, 0), 1.0, 1.0, None, False, True, {"t": scored})

    runs = [
        result("lora", 2, "1100"),
        result("lora", 4, "1110"),
        result("dora", 2, "1111"),
        result("full", None, "0000"),
    ]
    found = compare_methods(Comparison(request_for(), {}, runs))
    assert [(d.first.name, d.second.name, d.accuracy.value) for d in found] == [
        ("lora-r2", "dora-r2", -0.5),
        ("lora-r2", "full", 0.5),
        ("lora-r4", "full", 0.75),
        ("dora-r2", "full", 1.0),
    ]


def test_a_mean_with_a_run_that_diverged_says_so(request_for, job):
    recipe = Recipe(**{**job, "eval": {}})
    grid = request_for(recipe=recipe, methods=("dora",), seeds=(0, 1), rates=(1e-2, 1e-3))

    def train(command, log, unwanted):
        folder = grid.out / "runs" / Path(command[-1]).stem
        folder.mkdir(parents=True)
        files.write_json(folder / "summary.json", {"status": "finished"})
        # a rate that was tried and not taken may diverge
        diverges = "lr0.01" in folder.name or folder.name.endswith("seed1")
        losses = [1.0] * 6 + [7.0 if diverges else 0.5] * 6
        lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses)]
        lines += [{"kind": "eval", "step": step, "eval_loss": losses[step - 1]} for step in (6, 12)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "adapter_model.safetensors").touch()
        return Outcome(0, 1000)

    comparison = compare(grid, train)
    assert sum(each.diverged for each in comparison.runs) == 2
    assert diverged_runs(comparison) == ["dora-r2-lr0.001-seed1"]
    assert curves(comparison) == {Cell("dora", 2, None): [(6.0, 1.0), (12.0, (0.5 + 7.0) / 2)]}
    written = write_comparison(comparison)
    assert grid.out / "figures" / "curves.png" in written
    page = written[1].read_text()
    assert "The training loss of dora-r2-lr0.001-seed1 diverged" in page
