"""What grows with the work and what must not: counted, not timed."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import doralib
from doralib.config import DoraConfig
from doralib.evaluation.evaluate import evaluate
from doralib.evaluation.task_file import load_tasks

HANDLES = Path("/proc/self/fd")


def count_held() -> tuple[int, int]:
    gc.collect()
    tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    return tensors, sum(1 for _ in HANDLES.iterdir()) if HANDLES.is_dir() else 0


@pytest.mark.long
def test_evaluations_in_a_row_hold_nothing(tiny_llama, tmp_path):
    model, tokenizer = tiny_llama
    doralib.adapt(model, DoraConfig(r=2, target_modules=("q_proj",)))
    rows = [{"text": f"a good film {i}", "label": "ab"[i % 2]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data: {tmp_path / 'rows.jsonl'}"
    (tmp_path / "score.yaml").write_text(
        f"{{name: s, kind: classification, {data}, prompt: text, answer: label, labels: {{a: ' a', b: ' b'}}}}"
    )
    (tmp_path / "write.yaml").write_text(
        f"{{name: w, kind: exact_match, {data}, prompt: text, answer: label, max_new_tokens: 2}}"
    )
    tasks = load_tasks([str(tmp_path / "score.yaml"), str(tmp_path / "write.yaml")])
    held = []
    for i in range(12):
        evaluate(model, tokenizer, tasks, batch_size=2)
        if i % 4 == 3:
            held.append(count_held())
    assert held[0] == held[1] == held[2], held


class Stack(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(layers))


@pytest.mark.parametrize("targets", [("layers.0", "layers.1"), "all-linear", r"layers\.\d+"])
def test_the_work_of_adapting_grows_with_the_layers_and_no_faster(targets):
    """Ten thousand layers adapt in seconds as long as nothing is done for each pair of them."""
    counts = []
    for layers in (200, 400):
        model, calls = Stack(layers), 0

        def count(_frame, event, _argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        chosen = tuple(f"layers.{i}" for i in range(layers)) if isinstance(targets, tuple) else targets
        sys.setprofile(count)
        try:
            doralib.adapt(model, DoraConfig(r=1, target_modules=chosen))
        finally:
            sys.setprofile(None)
        counts.append(calls)
    assert counts[1] < 2.5 * counts[0], counts
