"""lm-eval on a loaded model with a local file: the number it gives is the one our own task gives."""

import json
import sys

import pytest

from doralib.errors import UsageError
from doralib.evaluation.harness import run_harness

ROWS = [
    {
        "id": str(i),
        "question": f"the movie {i} was",
        "choices": {"text": ["wonderful", "dull", "terrible film"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i in range(9)
]


def test_arc_easy_on_a_local_file(tiny, tmp_path):
    pytest.importorskip("lm_eval")
    from doralib.evaluation.evaluate import evaluate
    from doralib.evaluation.task import ChoiceTask

    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flat = [{**row, "texts": row["choices"]["text"]} for row in ROWS]
    (tmp_path / "flat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    found = run_harness(*tiny, [f"arc_easy={tmp_path / 'arc.jsonl'}"], batch_size=4)["arc_easy"]
    prompt, data = "Question: {question}\nAnswer:", str(tmp_path / "flat.jsonl")
    ours = ChoiceTask(name="arc", data=data, prompt=prompt, choices="texts", answer="answerKey")
    assert found.metrics["accuracy"].value == evaluate(*tiny, [ours])["arc"].metrics["accuracy"].value
    assert found.n == 9
    with pytest.raises(UsageError, match="did you mean 'arc_easy'"):
        run_harness(*tiny, ["arc_eazy"])


def test_without_the_harness(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="needs lm-eval: pip install"):
        run_harness(*tiny, ["arc_easy"])
