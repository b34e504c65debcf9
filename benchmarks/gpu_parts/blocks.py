"""Whole transformer blocks of LLaMA-3-8B's width with random weights: training steps, memory, loss curves."""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from doralib.adapters.adapt import adapt
from doralib.config import DoraConfig

from .bench import Bench
from .methods import Autocast, S, TritonLayer, shared_copy

FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SEVEN = (*FIVE, "o_proj", "gate_proj")


class Job(NamedTuple):
    """One training set-up."""

    targets: tuple[str, ...]
    R: int
    batch: int
    length: int
    accumulate: int
    checkpointing: bool


JOBS = [
    Job(FIVE, 16, 1, 2048, 1, False),
    Job(FIVE, 16, 4, 2048, 1, False),
    Job(FIVE, 64, 4, 2048, 1, False),
    Job(SEVEN, 16, 4, 2048, 1, False),
    Job(FIVE, 16, 4, 2048, 1, True),
    Job(FIVE, 16, 1, 2048, 8, False),
    Job(FIVE, 16, 1, 2048, 8, True),
    Job(SEVEN, 64, 1, 2048, 1, False),
]


def _base(bench: Bench) -> nn.Module:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if bench.dry:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, num_hidden_layers=1 if bench.dry else 3, vocab_size=64 if bench.dry else 32000, use_cache=False
    )
    with torch.device(bench.device):
        return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def _floor(model: nn.Module, _: Job) -> nn.Module:
    """No adapter: the embeddings' gradient makes the backward pass go through every layer."""
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    return model


def _peft(model: nn.Module, job: Job, *, dora: bool, fp32: bool) -> nn.Module:
    settings = peft.LoraConfig(
        r=job.R, lora_alpha=int(S * job.R), target_modules=list(job.targets), use_dora=dora, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=fp32)
    return Autocast(adapted) if fp32 else adapted


def _triton(model: nn.Module, job: Job, *, dora: bool) -> nn.Module:
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in job.targets:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], TritonLayer(module, job.R, dora=dora))
    return model


def _doralib(model: nn.Module, job: Job, *, method: str) -> nn.Module:
    return adapt(model, DoraConfig(method=method, r=job.R, lora_alpha=S * job.R, target_modules=job.targets))


METHODS: dict[str, Callable[[nn.Module, Job], nn.Module]] = {
    "frozen": _floor,
    "peft_lora": functools.partial(_peft, dora=False, fp32=False),
    "peft_dora": functools.partial(_peft, dora=True, fp32=False),
    "peft_lora_fp32": functools.partial(_peft, dora=False, fp32=True),
    "peft_dora_fp32": functools.partial(_peft, dora=True, fp32=True),
    "triton_lora": functools.partial(_triton, dora=False),
    "triton_dora": functools.partial(_triton, dora=True),
    "doralib_lora": functools.partial(_doralib, method="lora"),
    "doralib_dora": functools.partial(_doralib, method="dora"),
}


class Trainer:
    """A model by one method, its optimizer and a training step."""

    def __init__(self, base: nn.Module, name: str, job: Job, lr: float = 1e-4) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = METHODS[name](shared_copy(base), job)
        self.model.train()
        self.job, self.trained = job, [p for p in self.model.parameters() if p.requires_grad]
        fused = bool(self.trained) and self.trained[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, fused=fused) if self.trained else None
        if job.checkpointing:
            inner = self.model.inner if isinstance(self.model, Autocast) else self.model
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(self, tokens: Tensor) -> Tensor:
        """Forward and backward over the micro-batches, then the optimizer; the last loss."""
        for _ in range(self.job.accumulate):
            loss = self.model(input_ids=tokens, labels=tokens).loss / self.job.accumulate
            loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach() * self.job.accumulate

    def own_bytes(self) -> int:
        """Of the adapter and the optimizer's state."""
        state = self.optimizer.state if self.optimizer is not None else {}
        tensors = [*self.trained, *(t for slots in state.values() for t in slots.values() if isinstance(t, Tensor))]
        return sum(t.numel() * t.element_size() for t in tensors)


def blocks(bench: Bench) -> None:
    """Steps per method, interleaved; the step's peak above what is always held; then the loss curves."""
    base = _base(bench)
    jobs = JOBS
    if bench.dry:
        jobs = [Job(FIVE, 4, 2, 8, accumulate, checkpointing) for accumulate, checkpointing in ((1, False), (2, True))]
    _loss_curves(bench, base)
    for job in jobs:
        if bench.late("blocks"):
            return
        vocab = base.config.vocab_size
        tokens = torch.randint(vocab, (job.batch, job.length), device=bench.device)
        trainers, row = {}, {"job": job._asdict(), "base_bytes": sum(p.numel() * 2 for p in base.parameters())}
        for name in METHODS:
            try:
                trainers[name] = Trainer(base, name, job)
                trainers[name].step(tokens)
            except Exception as error:  # noqa: BLE001 - one method's failure must not hide the others
                trainers.pop(name, None)
                bench.record("block_failures", job=job._asdict(), method=name, error=repr(error)[:500])
        runs = {name: functools.partial(trainer.step, tokens) for name, trainer in trainers.items()}
        row["step_ms"] = bench.interleaved(runs, 7 if job.accumulate > 1 else 11, 1.0)
        row["step_peak"] = {name: bench.peak_bytes(run) for name, run in runs.items()}
        row["own_bytes"] = {name: trainer.own_bytes() for name, trainer in trainers.items()}
        bench.record("blocks", **row)
        lora = row["step_ms"]["peft_lora"]["median"]
        ratios = ", ".join(f"{k} {v['median'] / lora:.2f}" for k, v in row["step_ms"].items())
        bench.say(f"{job}: peft_lora {lora:.1f} ms; {ratios}")
        del trainers, runs
        bench.free()


def _loss_curves(bench: Bench, base: nn.Module) -> None:
    """Five steps from the same A: PEFT's DoRA beside ours."""
    job = Job(FIVE, 4 if bench.dry else 16, 2, 16 if bench.dry else 512, 1, False)
    tokens = torch.randint(base.config.vocab_size, (job.batch, job.length), device=bench.device)
    names = ("peft_dora_fp32", "triton_dora", "doralib_dora")
    trainers = {name: Trainer(base, name, job, lr=1e-3) for name in names}
    first = _factors_a(trainers["peft_dora_fp32"].model)
    for name in names[1:]:
        for key, parameter in _factors_a(trainers[name].model).items():
            parameter.data.copy_(first[key])
    for name, trainer in trainers.items():
        bench.record("losses", method=name, losses=[round(trainer.step(tokens).item(), 5) for _ in range(5)])


def _factors_a(model: nn.Module) -> dict[str, Tensor]:
    """Each lora_A by the name of its layer, without the wrappers' part of it."""
    found = [(name.split(".lora_A")[0], p) for name, p in model.named_parameters() if ".lora_A" in name]
    return {name[name.index("layers.") :]: p for name, p in found}
