"""`--harness lmms:...` with a program in lmms-eval's place, of the same command line and file of results."""

import json
import os
import shutil
import signal
import stat
import sys

import pytest

pytest.importorskip("PIL", reason="pictures are read by pillow")
from seeing_models import make_llava

from doralib import DoraConfig, adapt, save_adapter
from doralib.evaluation.lmms import name_model

# the arguments and the file are those of lmms-eval 0.7.3: a model is loaded, and of a group each task has its numbers
STAND_IN = """
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "batch_size", "seed", "output_path", "limit"):
    parser.add_argument("--" + name)
args = parser.parse_args()
given = dict(pair.split("=", 1) for pair in args.model_args.split(","))
assert "doralib" not in sys.modules and "PYTHONPATH" not in given
config = json.loads((pathlib.Path(given["pretrained"]) / "config.json").read_text())
assert list(pathlib.Path(given["pretrained"]).glob("*.safetensors"))
print("asking", args.model, config["architectures"], given.get("device_map"))
if args.tasks == "nonsense":
    sys.exit("Tasks not found: nonsense")
if args.tasks == "endless":
    pathlib.Path(args.output_path, "process").write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
limit = int(float(args.limit or 50))
tasks = {"mmbench_en": ["mmbench_en_dev", "mmbench_en_test"]}.get(args.tasks, [args.tasks])
values = {
    "gqa": {"alias": "gqa", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1},
    "pope": {"alias": "pope", "pope_f1_score,none": 0.8, "pope_f1_score_stderr,none": "N/A", "submission,none": None},
}
results = {name: values.get(name, {"alias": name, "gpt_eval_score,none": 60.0}) for name in tasks}
folder = pathlib.Path(args.output_path) / "model__name"
folder.mkdir(parents=True, exist_ok=True)
counts = {name: {"original": 50, "effective": limit} for name in tasks}
(folder / "20261129_010203_results.json").write_text(json.dumps({"results": results, "n-samples": counts}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python that finds lmms-eval, and nothing of this environment's path."""
    place = tmp_path_factory.mktemp("lmms")
    (place / "site" / "lmms_eval").mkdir(parents=True)
    (place / "site" / "lmms_eval" / "__main__.py").write_text(STAND_IN)
    (place / "site" / "lmms_eval-0.7.3.dist-info").mkdir()
    (place / "site" / "lmms_eval-0.7.3.dist-info" / "METADATA").write_text("Name: lmms_eval\nVersion: 0.7.3\n")
    made = place / "python"
    made.write_text(f'#!/bin/sh\n[ -z "$PYTHONPATH" ] || exit 9\nPYTHONPATH={place}/site exec {sys.executable} "$@"\n')
    made.chmod(made.stat().st_mode | stat.S_IXUSR)
    return made


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, processor = make_llava()
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    save_adapter(adapt(model, DoraConfig(r=2, target_modules="all-linear")), folder / "run")
    return folder / "run"


def test_an_adapter_is_merged_asked_and_the_results_read(adapter, python, tmp_path, run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    out = tmp_path / "scores.json"
    ask = ["eval", adapter, "--harness", "lmms:gqa,pope,mmbench_en", "--harness-python", python, "--out", out]
    status, shown, err = run(*ask, "--limit", 8)
    assert status == 0, err
    assert "lmms-eval 0.7.3 asks llava_hf,pretrained=" in shown
    after = json.loads(out.read_text())["after"]
    assert {name: each["n"] for name, each in after.items()} == {"gqa": 8, "pope": 8, "mmbench_en": 16}
    assert after["gqa"]["metrics"]["accuracy"] == {
        "value": 0.5,
        "low": pytest.approx(0.304),
        "high": pytest.approx(0.696),
    }
    assert after["pope"]["metrics"] == {"pope_f1_score": {"value": 0.8, "low": 0.8, "high": 0.8}}
    assert list(after["mmbench_en"]["metrics"]) == ["mmbench_en_dev gpt_eval_score", "mmbench_en_test gpt_eval_score"]
    log = tmp_path / "scores_lmms" / "gqa" / "lmms.log"
    assert "asking llava_hf ['LlavaForConditionalGeneration'] None" in log.read_text()
    # the merged model takes much of the disk, and goes when all is done
    assert not (tmp_path / "scores_lmms" / "model").exists()
    # only what is left is asked
    log.unlink()
    status, shown, err = run(*ask, "--limit", 8, "--resume", "--json")
    assert status == 0, err
    assert not log.exists()
    kept = json.loads(out.read_text())
    del kept["after"]["gqa"], kept["tasks"]["gqa"]
    out.write_text(json.dumps(kept))
    status, shown, err = run(*ask, "--limit", 8, "--resume", "--harness-model", "llava_hf,device_map=auto")
    assert (status, "name 'llava_hf,device_map=auto'" in err or "name None" in err) == (2, True)
    status, shown, err = run(*ask, "--limit", 8, "--resume")
    assert (status, log.exists()) == (0, True), err
    status, shown, err = run(*ask[:-2], "--harness-model", "llava_hf,device_map=auto")
    assert status == 0, err
    assert "device_map=auto" in shown


def test_what_stops_it_is_said(adapter, python, tmp_path, run):
    ask = ["eval", adapter, "--harness"]
    empty = tmp_path / "bin"
    empty.mkdir()
    for wrong, told in [
        (["lmms:gqa"], "needs lmms-eval in an environment of its own: python -m venv lmms"),
        (["lmms:gqa", "--harness-python", tmp_path / "none"], "cannot be run"),
        (["lmms:gqa", "--harness-python", sys.executable], "has no lmms-eval (importlib.metadata.PackageNotFoundError"),
        (["lmms:", "--harness-python", python], "names no task"),
        (["lmms:gqa", "--harness-python", python, "--resume"], "--resume needs --out"),
        (["arc_easy", "--harness-python", python], "goes with --harness lmms"),
    ]:
        status, _, err = run(*ask, *wrong)
        assert (status, told in " ".join(err.split())) == (2, True), err
    status, _, err = run("eval", adapter, "--tasks", "sums", "--harness-python", python)
    assert (status, "--harness-python: goes with --harness, not with --tasks" in err) == (2, True)
    out = tmp_path / "a" / "s.json"
    status, _, err = run(*ask, "lmms:gqa,nonsense", "--harness-python", python, "--out", out)
    assert (status, "task nonsense: lmms-eval ended with status 1" in err, "Tasks not found: nonsense" in err) == (
        1,
        True,
        True,
    )
    assert list(json.loads(out.read_text())["after"]) == ["gqa"]
    # the merged model is kept for the rest, with --resume
    assert (tmp_path / "a" / "s_lmms" / "model").is_dir()
    broken = shutil.copytree(python.parent, tmp_path / "other")
    main = broken / "site" / "lmms_eval" / "__main__.py"
    main.write_text(main.read_text().replace('"n-samples"', '"n"'))
    (broken / "python").write_text((broken / "python").read_text().replace(str(python.parent), str(broken)))
    status, _, err = run(*ask, "lmms:gqa", "--harness-python", broken / "python")
    assert (status, "is not as lmms-eval writes its results: KeyError('n-samples')" in " ".join(err.split())) == (
        1,
        True,
    )
    main.write_text("")
    status, _, err = run(*ask, "lmms:gqa", "--harness-python", broken / "python")
    assert (status, "lmms-eval wrote no results" in err) == (1, True)


def test_sigterm_ends_it_too(adapter, python, tmp_path, run):
    out = tmp_path / "s.json"
    ask = ["eval", adapter, "--harness", "lmms:endless", "--harness-python", python, "--out", out]
    assert run(*ask)[0] == 130
    process = int((tmp_path / "s_lmms" / "endless" / "process").read_text())
    try:
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
    except ChildProcessError:
        # subprocess may have reaped it already
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_models_are_named_as_lmms_eval_does():
    assert name_model(None, "/m", {"model_type": "qwen2_5_vl"}) == "qwen2_5_vl,pretrained=/m"
    assert name_model(None, "/m", {"model_type": "idefics3"}) == "huggingface,pretrained=/m"
    assert name_model("x,a=1", "/m", {}) == "x,pretrained=/m,a=1"
    with pytest.raises(Exception, match="choose a place without"):
        name_model(None, "/a,b", {})
