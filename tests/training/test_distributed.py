"""Two processes on a CPU (gloo) train what one does, and write what one would."""

import copy
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
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import doralib
from doralib import DoraConfig
from doralib.adapters.load import load_into
from doralib.adapters.registry import state_of
from doralib.errors import UsageError
from doralib.runs import checkpointing
from doralib.training.callbacks import MetricsFile
from doralib.training.job import Interrupted
from doralib.training.job import fine_tune as train_as_recipe
from doralib.training.recipe_file import read_recipe

pytestmark = pytest.mark.long

METHODS = {
    "dora": {},
    "full_gradient": {"detach_norm": False},
    "lora": {"method": "lora"},
    "vera": {"method": "vera"},
    "dvora": {"method": "dvora"},
}
# how the model is wrapped, its method, and whether activations are computed again
CASES = [
    *(("ddp", method, again) for method in METHODS for again in (False, True)),
    *(("ddp_unused", method, True) for method in ("dora", "lora")),
    *(("fsdp", method, method != "lora") for method in METHODS),
    ("fsdp", "dora", False),
    ("fsdp_kept", "dora", False),
]
STEPS = 3
SAVED = {
    "dora": {"modules_to_save": ["head"]},
    "lora": {"method": "lora", "bias": "lora_only"},
    "dvora": {"method": "dvora"},
    "pissa": {"init_lora_weights": "pissa"},
}


class Block(nn.Module):
    """Two adapted layers, one with a bias."""

    def __init__(self, recomputed, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, dtype=dtype), nn.Linear(10, 6, bias=False, dtype=dtype)
        self.recomputed = recomputed

    def forward(self, x):
        return x + (checkpoint(self._inner, x, use_reentrant=False) if self.recomputed else self._inner(x))

    def _inner(self, x):
        return self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, recomputed=False, dtype=torch.float64):
        super().__init__()
        self.blocks = nn.ModuleList(Block(recomputed, dtype) for _ in range(2))
        self.head = nn.Linear(6, 4, dtype=dtype)
        self.skip = False

    def forward(self, x):
        for block in self.blocks[1 if self.skip else 0 :]:
            x = block(x)
        return self.head(x)


def make(recomputed=False, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = Model(recomputed, dtype)
    # ranks and rows that two processes cannot share out evenly
    doralib.adapt(model, DoraConfig(**({"r": 3, "target_modules": ["up", "down"]} | settings)))
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        yield [torch.randn(8, n, generator=generator, dtype=torch.float64).to(dtype) for n in (6, 4)]


def train(model, network, share=slice(None), skip=False, watch=lambda x: None):
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    for number, (x, y) in enumerate(batches(model.blocks[0].up.weight.dtype)):
        model.skip = skip and number % 2 == 1
        watch(x)
        optimizer.zero_grad()
        (network(x[share]) - y[share]).square().mean().backward()
        optimizer.step()


def wrap(model, how):
    if how.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=how == "ddp_unused")
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=how == "fsdp")
    return fully_shard(model)


def whole(p):
    return p.full_tensor() if isinstance(p, DTensor) else p


def difference(one, other):
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return max((whole(p) - q).abs().max().item() for (_, p), (_, q) in pairs)


def train_both(rank, how, method, recomputed):
    """How far two processes with half a batch each end from one with the whole."""
    skip = how == "ddp_unused"
    alone = make(recomputed, **METHODS[method])
    start = copy.deepcopy(alone)
    train(alone, alone, skip=skip)
    together = make(recomputed, **METHODS[method])
    train(together, wrap(together, how), slice(4 * rank, 4 * rank + 4), skip)
    return {"off": difference(together, alone), "moved": difference(alone, start)}


def outputs_are_fresh(rank, dtype):
    """In every step the outputs of a sharded model are, bit for bit, those of a plain one with its values."""
    model, plain = make(dtype=dtype), make(dtype=dtype)
    network, seen = wrap(model, "fsdp"), []
    model.blocks[1].up.register_forward_pre_hook(
        lambda layer, _: seen.append(
            (type(layer.lora_A).__name__, layer.lora_A._version, layer.lora_A.detach().clone())
        )
    )
    equal = []

    def compare(x):
        with torch.no_grad():
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                p.copy_(whole(q))
            model.eval()
            with doralib.unchanged(model):
                equal.extend(torch.equal(network(x), plain(x)) for _ in range(2))
            model.train()

    train(model, network, slice(4 * rank, 4 * rank + 4), watch=compare)
    kinds, versions, values = zip(*seen, strict=True)
    return {
        "equal": equal,
        "sharded": sorted({type(p).__name__ for p in model.parameters()}),
        "computing": sorted(set(kinds)),
        "versions": sorted(set(versions)),
        "different": len({tuple(v.flatten().tolist()) for v in values}),
    }


def save_and_load(rank, folder, settings):
    """A sharded model's file is a plain one's, byte for byte; values come back into a sharded model."""
    plain, model = make(**settings), make(**settings)
    wrap(model, "fsdp")
    doralib.save_adapter(model, folder / "sharded")
    if rank == 0:
        doralib.save_adapter(plain, folder / "plain")
    distributed.barrier()
    same = [(folder / k / "adapter_model.safetensors").read_bytes() for k in ("sharded", "plain")]
    other = make(**settings)
    with torch.no_grad():
        for p in trained(other):
            p.mul_(2)
    wrap(other, "fsdp")
    if "init_lora_weights" in settings:
        load_into(other, state_of(plain))
    else:
        doralib.load_adapter(other, folder / "plain")
    return {"same": same[0] == same[1], "off": difference(other, plain)}


def refusals(folder):
    """What a sharded model is told."""
    model, bare = make(), Model()
    wrap(model, "fsdp"), wrap(bare, "fsdp")
    config = DoraConfig(target_modules=["up"])
    calls = {
        "adapt": lambda: doralib.adapt(bare, config),
        "load": lambda: doralib.load_adapter(bare, folder),
        "beside": lambda: doralib.add_adapter(model, "second", config),
        "merge": lambda: doralib.merge(model),
        "merge_adapter": lambda: doralib.merge_adapter(model),
        "hotswap": lambda: doralib.hotswap_adapter(model, folder),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except UsageError as error:
            said[name] = str(error)
    return said


def worker(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {str(case): train_both(rank, *case) for case in CASES}
    for dtype in (torch.float64, torch.bfloat16):
        found[f"fresh {dtype}"] = outputs_are_fresh(rank, dtype)
    for name, settings in SAVED.items():
        found[f"saved {name}"] = save_and_load(rank, folder / name, settings)
    found["refusals"] = refusals(folder / "dora" / "plain")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
    train_runs(rank, folder)


def train_runs(rank, folder):
    """`doralib train` as torchrun starts it: a run to the end, and one that is stopped in one process and resumed."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    recipe = read_recipe(str(folder / "recipe.yaml"), [])
    train_as_recipe(recipe)
    on_log = MetricsFile.on_log

    def stopping(self, args, state, *others, **more):
        on_log(self, args, state, *others, **more)
        if rank == 1 and state.global_step == 4:
            signal.raise_signal(signal.SIGTERM)

    MetricsFile.on_log = stopping
    stopped = recipe.model_copy(update={"out": str(folder / "stopped")})
    with pytest.raises(Interrupted, match=r"stopped at step (4|5) of 6"):
        train_as_recipe(stopped)
    MetricsFile.on_log = on_log
    train_as_recipe(stopped, resume=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama_folder):
    """What both processes found, of everything: they are started once."""
    folder = tmp_path_factory.mktemp("two")
    rows = [{"text": ("good ", "bad ", "dull ", "fine ")[i % 4] * (1 + i % 3), "label": str(i % 2)} for i in range(43)]
    for name, some in {"train": rows[:32], "held_out": rows[32:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    recipe = {
        "model": {"path": str(tiny_llama_folder)},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "held_out.jsonl")},
        "adapter": {"r": 3, "target_modules": ["q_proj", "down_proj"]},
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 3},
        "eval": {"before": False},
        "out": str(folder / "run"),
    }
    recipe["data"] |= {"prompt": "{text}:", "target": " {label}"}
    recipe["training"] |= {"learning_rate": 1e-2, "save_total_limit": 1, "per_device_eval_batch_size": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    commands = [[sys.executable, __file__, str(rank), str(folder)] for rank in range(2)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **quiet) for command in commands]
    try:
        for process in both:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in both:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_train_what_one_does(found, case):
    for each in found:
        told = each[str(case)]
        assert told["moved"] > 0.01
        assert told["off"] < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_sharded_model_never_computes_with_a_stale_norm(found, dtype):
    for each in found:
        told = each[f"fresh {dtype}"]
        assert told["equal"] == [True] * (2 * STEPS)
        assert told["sharded"] == ["DTensor"]
        assert told["computing"] == ["Parameter"]
        # no counter says that they have changed
        assert told["versions"] == [0]
        assert told["different"] == STEPS


@pytest.mark.parametrize("name", SAVED)
def test_a_sharded_model_is_saved_and_loaded(found, name):
    for each in found:
        told = each[f"saved {name}"]
        assert told["same"]
        assert told["off"] < 1e-12


def test_what_a_sharded_model_cannot_do_is_said(found):
    said = found[0]["refusals"]
    assert said == found[1]["refusals"]
    assert sorted(said) == ["adapt", "beside", "hotswap", "load", "merge", "merge_adapter"]
    for name in ("adapt", "load", "beside"):
        assert "before fully_shard" in said[name]
    assert "doralib merge" in said["merge"]
    assert "load_adapter" in said["hotswap"]


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[k] for k in ("kind", "step", "loss", "eval_loss", "grad_norm") if k in line] for line in lines]


def values(run):
    return load_file(run / "adapter_model.safetensors")


def test_a_run_in_two_processes_is_the_run_in_one(folder):
    run, training = folder / "run", {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 3}
    recipe = read_recipe(str(folder / "recipe.yaml"), [f"training.{k}={v}" for k, v in training.items()])
    alone = train_as_recipe(recipe.model_copy(update={"out": str(folder / "alone")}))
    for ours, theirs in zip(curve(run), curve(alone), strict=True):
        # 11 held out rows are not shared out evenly
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=2e-4)
    for name, value in values(alone).items():
        torch.testing.assert_close(values(run)[name], value, rtol=1e-3, atol=1e-4)
    told = [json.loads((path / "summary.json").read_text()) for path in (run, alone)]
    for key in ("steps", "tokens", "status", "trainable_parameters"):
        assert told[0][key] == told[1][key]
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    (last,) = (run / "checkpoints").iterdir()
    assert checkpointing.is_whole(last)
    assert {"meter.json", "rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in last.iterdir()}


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(folder):
    assert curve(folder / "stopped") == curve(folder / "run")
    for name, value in values(folder / "run").items():
        assert torch.equal(values(folder / "stopped")[name], value)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
