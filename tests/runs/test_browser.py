"""Pages in a real browser: what data says is shown and never run, and a script that stood in a page would not run."""

import json
import shutil
import subprocess

import pytest

from doralib.runs.markup import Markup, el
from doralib.runs.page import write_page
from doralib.runs.report import write_report
from doralib.runs.report_data import write_data_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# the word itself stands nowhere: it comes of running
MARK = "document.title='R'+'AN';document.body.append('R'+'AN')"
PAYLOADS = [
    f"<script>{MARK}</script>",
    f'<img src="x" onerror="{MARK}">',
    f'"><svg onload="{MARK}">',
    f"</style><script>{MARK}</script>",
    f'<a href="javascript:{MARK}">x</a><iframe srcdoc="<script>parent.{MARK}</script>"></iframe>',
    f"' autofocus onfocus={MARK} x='",
]


def show(path, tmp_path) -> str:
    """The page as the browser has it after its scripts."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=300"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def hostile_run(folder):
    evil = " ".join(PAYLOADS)
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"model": {"path": evil}, "data": {"train": evil}, evil: evil}))
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0, evil: evil}) + "\n")
    metrics = {evil: {"value": 0.5, "low": 0.4, "high": 0.6}}
    confusion = {"labels": [evil, "b"], "counts": [[1, 2], [3, 4]]}
    wrong = [{"prompt": evil, "expected": evil, "predicted": evil}]
    one = {"task": evil, "kind": "classification", "n": 3, "metrics": metrics, "confusion": confusion, "wrong": wrong}
    (folder / "results.json").write_text(json.dumps({"after": {evil: {**one, "seconds": 1.0}}}))
    (folder / "samples.json").write_text(json.dumps([dict.fromkeys(("prompt", "expected", "before", "after"), evil)]))
    (folder / "summary.json").write_text(json.dumps({"base_model": evil, "method": evil, "status": evil}))
    (folder / "environment.json").write_text(json.dumps({"python": evil, "packages": {evil: evil}}))
    return folder


def test_no_script_of_the_data_runs(tmp_path):
    report = write_report(hostile_run(tmp_path / "run"), figures=False)
    survey = {"settings": {PAYLOADS[1]: PAYLOADS[2]}, "splits": {}, "duplicates": {}, "tasks": {}, "shown": []}
    data = tmp_path / "data.html"
    write_data_page(data, survey, PAYLOADS[3])
    for page in (report, data):
        seen = show(page, tmp_path)
        assert "doralib" in seen
        assert "RAN" not in seen, page
        assert "onerror" in seen or "script" in seen, "the payload is not even shown"


def test_the_policy_stops_a_script_that_would_stand_there(tmp_path):
    page = write_page(tmp_path / "page.html", "t", el("p", "shown"), Markup(PAYLOADS[0] + PAYLOADS[1]))
    seen = show(page, tmp_path)
    assert "shown" in seen
    assert "RAN" not in seen
    # the same page without the policy: the browser does run scripts
    text = page.read_text()
    policy = text[text.index("<meta http-equiv") :].partition(">")[0] + ">"
    page.write_text(text.replace(policy, ""))
    assert "RAN" in show(page, tmp_path)
