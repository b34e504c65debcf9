"""An audit of the first step of training: what is trained in vain, and why."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import DoraConfig
from ..errors import list_some
from ..layers.layer import DoraLayer
from ..layers.wrapper import Place
from .adapt import adapt, remove
from .bypass import Bypass
from .registry import find_record, layers_of, places_of, record_of, trainable
from .scan import Scan


@dataclass(frozen=True)
class Finding:
    """One thing that is trained in vain."""

    name: str
    """A layer, by its name in the base model, or a parameter."""
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def audit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    tell: Callable[[str], None] | None = None,
    listen: bool = True,
) -> "Audit":
    """Watch the first step of training and tell what it trains in vain; call this before the first forward pass.

    Told are trained parameters that the optimizer does not have, adapted layers that got no gradient, with the reason,
    and parameters that a step left as they were, bit for bit, although they had a gradient and a learning rate.

    Args:
        tell: Gets each message; by default it becomes a warning.
        listen: Put hooks on the adapted layers until the first step, so that the reason why one has no gradient is
            seen; a compiler would compile twice for them.
    """
    watch = Audit(model, listen=listen)
    tell = tell or partial(warnings.warn, stacklevel=3)
    _tell(tell, "trained parameters that the optimizer does not have", watch.find_missing(optimizer))
    handles: list[RemovableHandle] = []
    steps = 0

    def before(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            watch.stop()
            _tell(tell, "these got no gradient in the first backward pass", watch.find_without_gradient())
        watch.keep_values(optimizer)

    def after(*_: Any) -> None:
        # a warm-up begins with a rate of zero
        if any(group["lr"] > 0 for group in optimizer.param_groups):
            for handle in handles:
                handle.remove()
            _tell(tell, "the first step changed nothing of these", watch.find_unchanged())

    handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    return watch


def probe(model: nn.Module, inputs: Mapping[str, Any]) -> list[Finding]:
    """Which layers of a plain model would be adapted in vain, found by one forward and backward pass of these inputs.

    Every layer that nothing speaks against gets an adapter of rank 1, which is taken off again.
    """
    found = Scan(model)
    tied = found.tied()
    passed_by = {name for name, each in found.bypassed.items() if each.always}
    names = [name for name in found.bases if name and name not in tied and name not in passed_by]
    if not names:
        return []
    pattern = "|".join(name.replace(".", r"\.") for name in names)
    with torch.random.fork_rng():
        with warnings.catch_warnings(action="ignore"):
            adapt(model, DoraConfig(r=1, target_modules=pattern))
        watch, training, buffers = Audit(model), model.training, [(b, b.clone()) for b in model.buffers()]
        try:
            with torch.enable_grad():
                _sum_outputs(model.train()(**inputs)).backward()
            return watch.find_without_gradient()
        finally:
            watch.stop()
            model.zero_grad(set_to_none=True)
            remove(model.train(training))
            for buffer, value in buffers:  # the means that batch norms keep
                buffer.copy_(value)


class Audit:
    """What a model does with its active adapter, watched from the making of this object until `stop`."""

    def __init__(self, model: nn.Module, *, listen: bool = True) -> None:
        self.model = model
        self.findings: list[Finding] = []
        """All that was found so far."""
        self._listens = listen
        self._called: set[str] = set()
        self._read: set[str] = set()
        self._values: dict[str, tuple[nn.Parameter, int]] = {}
        self._handles: list[RemovableHandle] = []
        self._places = dict(places_of(model))
        for name, place in self._places.items() if listen else ():
            self._handles.append(place.register_forward_pre_hook(partial(_add, self._called, name)))
            for layer in _layers_in(place):
                layer.on_read = partial(self._read.add, name)

    def stop(self) -> None:
        """Watch forward passes no longer."""
        for handle in self._handles:
            handle.remove()
        for place in self._places.values():
            for layer in _layers_in(place):
                layer.on_read = None

    def find_missing(self, optimizer: torch.optim.Optimizer) -> list[Finding]:
        """Trained parameters that are in no group of the optimizer."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        reason = "it is in none of the optimizer's groups; give the optimizer doralib.parameter_groups(model, ...)"
        return self._keep([Finding(name, reason) for name, p in self._trained() if id(p) not in known])

    def find_without_gradient(self) -> list[Finding]:
        """Adapted layers, and parameters beside them, that have no gradient after a backward pass."""
        bare: dict[str, list[str]] = {}
        whole: dict[str, int] = {}
        for name, p in self._trained():
            owner = self._owner(name)
            whole[owner] = whole.get(owner, 0) + 1
            if p.grad is None:
                bare.setdefault(owner, []).append(name)
        findings = []
        for owner, names in bare.items():
            if len(names) == whole[owner]:
                findings.append(Finding(owner, self._explain(owner)))
            else:
                findings += [Finding(name, "there is no path from it to the loss") for name in names]
        return self._keep(findings)

    def keep_values(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember what a step should change: all that has a gradient other than zero, and a learning rate."""
        moving = {id(p) for group in optimizer.param_groups if group["lr"] > 0 for p in group["params"]}
        self._values = {
            name: (p, _fingerprint(p))
            for name, p in self._trained()
            if id(p) in moving and p.grad is not None and _is_step(_local(p.grad))
        }

    def find_unchanged(self) -> list[Finding]:
        """What of these a step did not change."""
        still = {name: p for name, (p, kept) in self._values.items() if _fingerprint(p) == kept}
        self._values = {}
        small = "small steps are lost in {}: keep what is trained in float32, with p.data = p.data.float()"
        reasons = {name: small.format(p.dtype) for name, p in still.items() if p.dtype.itemsize < 4}
        other = (
            "the optimizer left it as it was, although it has a learning rate and a gradient, perhaps a very small one"
        )
        return self._keep([Finding(name, reasons.get(name, other)) for name in still])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the active adapter trains, by name; others on the model get no gradient, and need none."""
        record = find_record(self.model)
        active = None if record is None else record_of(self.model).active
        own = layers_of(self.model, active).values() if active else ()
        mine = {id(p) for layer in own for p in layer.parameters()}
        theirs = {id(p) for place in self._places.values() for p in place.parameters()} - mine
        yield from ((name, p) for name, p in trainable(self.model) if id(p) not in theirs)

    def _owner(self, parameter: str) -> str:
        """The place that a parameter is of, or itself."""
        return next((name for name in self._places if parameter.startswith(f"{name}.")), parameter)

    def _explain(self, owner: str) -> str:
        if owner not in self._places:
            return "there is no path from it to the loss"
        if owner in self._called:
            return "it is called, and there is no path from it to the loss"
        known = self._bypassed.get(owner)
        if owner in self._read or (known is not None and not self._listens):
            told = known or "the model reads its weight without calling it, so an adapter on it does nothing"
            return f"bypassed: {told}"
        if not self._listens:
            return "nothing calls it, or there is no path from it to the loss"
        return "unused: nothing called it in this step; where the input decides, other rows may"

    @cached_property
    def _bypassed(self) -> dict[str, Bypass]:
        return Scan(self.model).bypassed

    def _keep(self, findings: list[Finding]) -> list[Finding]:
        self.findings += findings
        return findings


def _layers_in(place: Place) -> list[DoraLayer]:
    return [module for module in place.modules() if isinstance(module, DoraLayer)]


def _add(names: set[str], name: str, *_: Any) -> None:
    names.add(name)


def _tell(tell: Callable[[str], None], what: str, findings: list[Finding]) -> None:
    if findings:
        tell(f"{len(findings)} trained in vain: {what}\n  {list_some([str(each) for each in findings], 8)}")


def _is_step(grad: Tensor) -> bool:
    """Whether a step by this gradient goes anywhere; a gradient scaler leaves out one that is not finite."""
    return bool(grad.any()) and bool(torch.isfinite(grad).all())


def _local(t: Tensor) -> Tensor:
    """This process's part of a tensor that is shared out."""
    part: Callable[[], Tensor] | None = getattr(t, "to_local", None)
    return t if part is None else part()


def _fingerprint(p: Tensor) -> int:
    """The sum of a tensor's bits as whole numbers: without a copy of it."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.dtype.itemsize]
    return int(_local(p.detach()).contiguous().view(bits).sum(dtype=torch.int64))


def _sum_outputs(output: Any) -> Tensor:
    """One number that depends on all that a model returns; on the logits alone, where there are some."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        output = output["logits"]
    total = torch.zeros(())
    waiting = [output]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor) and each.requires_grad:
            total = total + each.float().sum().to(total.device)
        elif isinstance(each, Mapping | list | tuple):
            waiting += each.values() if isinstance(each, Mapping) else each
    return total
