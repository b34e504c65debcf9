"""One adapted layer: time, matrix products, memory kept for the backward pass, largest temporary of a norm refresh."""

from collections import OrderedDict
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ...disk import format_bytes
from ...functional import BLOCK_ELEMENTS
from .counting import ProductCounter, allocations, saved_bytes
from .measure import Turn, interleave, log
from .options import LayerOptions, batch_of, sizes
from .subjects import AdapterSettings, build, check_subjects, default_subjects, nudge, pairs
from .tables import TIME_RATIO, Bars, Case, Goal, Report, Table, ms, timing_table

_LIMITS = {"with_output": 16.2 * 2**20, "without_output": 8.2 * 2**20}
"""Bytes, for 1024 x 1024, 2,048 tokens, float32, r 16."""


class OneLayer(nn.Sequential):
    """A model that is one linear layer."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__(OrderedDict(proj=nn.Linear(in_features, out_features, bias=False, dtype=dtype)))


class Pass:
    """Forward and backward of one layer, gradients dropped before the next."""

    def __init__(self, model: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.model, self.x, self.dy = model.train(), x.detach().requires_grad_(), dy

    def __call__(self) -> None:
        """Gradients of the input and of what is trained."""
        self.model(self.x).backward(self.dy)

    def after_optimizer_step(self) -> None:
        """What is trained has moved; gradients are gone."""
        nudge(self.model)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """The adapter stays as it is, as between micro-batches."""
        self.x.grad = None
        self.model.zero_grad(set_to_none=True)


def bench_layer(options: LayerOptions) -> Report:
    """Forward and backward after an optimizer step, for every shape, dtype, number of tokens and dropout."""
    check_subjects(options.subjects or [])
    report = Report(
        "layer",
        "One adapted layer",
        options.model_dump(mode="json"),
        Bars("One layer, forward and backward, time over PEFT LoRA", TIME_RATIO),
        [
            "shapes are out x in; A and B are moved before each pass, as by an optimizer, so the norm is computed anew",
            "products: matrix products of forward and backward after an optimizer step / of the next micro-batch",
            "saved: bytes kept for the backward pass, without the frozen weight and the parameters, which exist anyway;"
            " the second number leaves out the layer's output, which its consumer often keeps anyway",
            "largest temporary: largest single allocation of a forward pass of one token after an optimizer step, "
            "from torch's CPU allocator",
        ],
    )
    for shape, dtype, tokens, dropout in product(options.shapes, options.dtype, options.tokens, options.dropout):
        settings = {"shape": shape, "dtype": dtype, "tokens": tokens, "dropout": dropout, "r": options.r}
        name = f"{shape} {dtype}, {tokens} tokens" + (f", dropout {dropout:g}" if dropout else "")
        log.info(f"layer: {name}")
        case = {"name": name, "settings": settings, **_case(settings, options)}
        report.add(case, timing_table(case), _count_table(case), goals=_goals(case))
    return report


def counts(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Any]:
    """Matrix products, saved bytes and the largest temporary of one layer."""
    once = Pass(model, x, dy)
    once.after_optimizer_step()
    found: dict[str, Any] = {}
    for when, prepare in (("fresh", once.after_optimizer_step), ("next micro-batch", once.drop_gradients)):
        prepare()
        with ProductCounter() as counter:
            once()
        found[f"products, {when}"] = {"calls": counter.calls, "flops": sum(counter.flops)}
    found["saved"] = saved_bytes(once.model, once.x, model.parameters()).to_json()
    once.after_optimizer_step()
    one_token = x[:1].detach()
    found["largest temporary"] = max(allocations(lambda: model(one_token)), default=0)
    return found


def _case(settings: dict[str, Any], options: LayerOptions) -> dict[str, Any]:
    (O, I), rows = sizes(settings["shape"]), batch_of(settings["tokens"])
    N, dtype = rows[0] * rows[1], getattr(torch, settings["dtype"])
    torch.manual_seed(0)
    base, x, dy = OneLayer(O, I, dtype), torch.randn(N, I).to(dtype), torch.randn(N, O).to(dtype)
    adapter = AdapterSettings(options.r, settings["dropout"], ("proj",))
    names = list(options.subjects or default_subjects(settings["dtype"], settings["dropout"]))
    passes = {name: Pass(build(name, base, adapter), x, dy) for name in names}
    turns = {name: Turn(each, each.after_optimizer_step) for name, each in passes.items()}
    rounds = interleave(turns, options.rounds, options.warmup)
    counted = {name: counts(each.model.train(), x, dy) for name, each in passes.items()}
    return {**rounds.summary(pairs(names)), "counts": counted}


def _count_table(case: Case) -> Table:
    columns = ["subject", "ms", "products", "Gflop", "saved", "saved, output elsewhere", "largest temporary"]
    table = Table(f"{case['name']}: counts", columns)
    for name, found in case["counts"].items():
        fresh, again, saved = found["products, fresh"], found["products, next micro-batch"], found["saved"]
        products = [f"{fresh['calls']} / {again['calls']}", f"{fresh['flops'] / 1e9:.3g} / {again['flops'] / 1e9:.3g}"]
        memory = (saved["with_output"], saved["without_output"], found["largest temporary"])
        table.rows.append([name, ms(case["seconds"][name]["median"]), *products, *map(format_bytes, memory)])
    return table


def _goals(case: Case) -> list[Goal]:
    """Of the case that the promise names: four (out, r) or one row block for the norm, and what is saved."""
    settings, found = case["settings"], case["counts"].get("ours-dora")
    promised = {"shape": "1024x1024", "tokens": "2048", "dropout": 0.0, "r": 16}
    if found is None or not promised.items() <= settings.items():
        return []
    O, _ = sizes(settings["shape"])
    few = 4 * max(4 * O * settings["r"], BLOCK_ELEMENTS)
    goals = [Goal(f"{case['name']}: bytes of the largest temporary", found["largest temporary"], few)]
    if settings["dtype"] == "float32":
        goals += [
            Goal(f"{case['name']}: bytes saved {key.replace('_', ' ')}", found["saved"][key], limit)
            for key, limit in _LIMITS.items()
        ]
    return goals
