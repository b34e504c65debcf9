"""Two processes that share a model out (FSDP2, gloo) do what one does; one that is lost ends the others."""

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import doralib
from doralib import DoraConfig
from doralib.checkpoints import models as checkpoints
from doralib.checkpoints.models import load_base
from doralib.errors import DoraError, UsageError
from doralib.layers.base.linear import Dense
from doralib.layers.base.opaque import Quantized
from doralib.training.callbacks import MetricsFile
from doralib.training.distributed import is_main
from doralib.training.job import fine_tune
from doralib.training.recipe_file import read_recipe
from doralib.training.sharding import reads_once, share_out, waits_for_weights

pytestmark = pytest.mark.long

BLOCKS, TARGETS = 2, 2
CASES = {
    "float32": {},
    "bfloat16": {"model.dtype": "bfloat16"},
    "mixed": {"training.bf16": "true"},
    "nf4": {"model.quantization": "nf4"},
}


def read(folder, out, **changes):
    changes = {"out": folder / out, "distributed.strategy": "fsdp2"} | changes
    return read_recipe(str(folder / "recipe.yaml"), [f"{key}={value}" for key, value in changes.items()])


def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def bytes_taken(folder):
    """Memory that a model takes which is loaded, adapted and shared out as a run does it."""
    recipe = read(folder, "none", **{"model.path": folder / "large"})
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous_bytes()
    model, _ = load_base(recipe.model, empty=waits_for_weights(recipe))
    doralib.adapt(model, DoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    share_out(model, recipe, torch.device("cpu"), from_first=reads_once(recipe))
    gc.collect()
    # what the allocator keeps for later is not the model's
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_bytes() - before


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    norms = []
    row_norm_sq = Dense.row_norm_sq
    Dense.row_norm_sq = Quantized.row_norm_sq = lambda base: norms.append(base) or row_norm_sq(base)
    found = {"read": []}
    load = checkpoints.load_language_model
    checkpoints.load_language_model = lambda settings: found["read"].append(settings.path) or load(settings)
    for name, changes in CASES.items():
        norms.clear()
        fine_tune(read(folder, name, **changes))
        found[f"norms {name}"] = len(norms)
    if sys.platform == "linux":
        found["taken"] = bytes_taken(folder)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    on_log = MetricsFile.on_log

    def dying(self, args, state, *others, **more):
        on_log(self, args, state, *others, **more)
        if rank == 1 and state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsFile.on_log = dying
    try:
        fine_tune(read(folder, "killed"))
    except DoraError as error:
        (folder / "said").write_text(str(error))
    assert is_main()
    # the others are gone: there is nobody to say goodbye to
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, even_llama_folder):
    folder = tmp_path_factory.mktemp("shared_out")
    rows = [{"text": ("good ", "bad ", "dull ", "fine ")[i % 4] * (1 + i % 3), "label": str(i % 2)} for i in range(43)]
    for name, some in {"train": rows[:32], "held_out": rows[32:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    recipe = {
        "model": {"path": str(even_llama_folder)},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "held_out.jsonl")},
        "adapter": {"r": 3, "target_modules": ["q_proj", "down_proj"]},
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 3},
        "out": str(folder / "run"),
    }
    recipe["data"] |= {"prompt": "{text}:", "target": " {label}"}
    recipe["training"] |= {"learning_rate": 1e-2, "per_device_eval_batch_size": 4, "gradient_checkpointing": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder / "large")
    AutoTokenizer.from_pretrained(even_llama_folder).save_pretrained(folder / "large")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], **quiet) for rank in range(2)]
    try:
        for rank, process in enumerate(both):
            _, said = process.communicate(timeout=500)
            assert process.returncode == (0, -signal.SIGKILL)[rank], said[-3000:]
    finally:
        for process in both:
            process.kill()
    return folder


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[k] for k in ("kind", "step", "loss", "eval_loss", "grad_norm") if k in line] for line in lines]


def check_same(one, other, rel):
    for ours, theirs in zip(curve(one), curve(other), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=rel)
    values = load_file(one / "adapter_model.safetensors")
    for name, value in load_file(other / "adapter_model.safetensors").items():
        torch.testing.assert_close(values[name], value, rtol=rel, atol=rel)


def alone(folder, out, **changes):
    return fine_tune(read(folder, out, **{"training.per_device_train_batch_size": 8, **changes}))


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_shared_out_trains_as_in_one_process(folder, case):
    # half precision sums four rows and four otherwise than eight
    rel = 1e-3 if case == "float32" else 0.05
    check_same(folder / case, alone(folder, f"{case} alone", **CASES[case]), rel)
    assert {path.name for path in (folder / case).iterdir()} == {p.name for p in (folder / f"{case} alone").iterdir()}


def test_the_first_process_alone_reads_the_weights(folder):
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    # the quantized model is read by every process, and each model by the first
    assert (len(first["read"]), len(second["read"])) == (len(CASES) + 1, 1)
    if sys.platform == "linux":
        whole = (folder / "large" / "model.safetensors").stat().st_size
        # half of it, and what FSDP2 and the allocator keep; with all of it beside that it would be 1.5
        assert max(first["taken"], second["taken"]) < 1.25 * whole


def test_frozen_rows_are_not_measured_anew_for_every_pass(folder):
    for rank in range(2):
        told = json.loads((folder / f"{rank}.json").read_text())
        for case in CASES:
            # at the start, once they are shared out, once the Trainer has them, and in the plan's models;
            # six steps are computed twice, which would be twelve times
            assert BLOCKS * TARGETS <= told[f"norms {case}"] <= 4 * BLOCKS * TARGETS, case


def test_a_lost_process_ends_the_others_and_one_process_goes_on_with_the_run(folder):
    assert "another process of this run has ended" in (folder / "said").read_text()
    assert f"--resume goes on from {folder / 'killed' / 'checkpoints'}" in (folder / "said").read_text()
    with pytest.raises(UsageError, match="a step had 8 rows, and has 4 now"):
        fine_tune(read(folder, "killed"), resume=True)
    fine_tune(read(folder, "killed", **{"training.per_device_train_batch_size": 8}), resume=True)
    check_same(folder / "killed", folder / "float32", 1e-3)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
